"""Tables as text: Markdown for people and repositories, LaTeX for papers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "→": r"$\to$"}
_LATEX |= {"–": "--", "±": r"$\pm$", **{mark: "\\" + mark for mark in "&%$#_{}"}}


def markdown_table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """
    A Markdown table that reads well as plain text too: the first column left, numbers right.

    Example:

    ```python
    >>> from vretrver_hf.tables import markdown_table

    >>> print(markdown_table(["fruit", "count"], [["apple", 12], ["fig", 3]]))
    | fruit | count |
    |-------|------:|
    | apple |    12 |
    | fig   |     3 |

    ```
    """
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [len(cells) > 1 and all(cell[:1].isdigit() for cell in column[1:]) for column in zip(*cells, strict=True)]
    right[0] = False
    lines = [
        " | ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        for row in cells
    ]
    rule = "|".join("-" * (width + 1) + (":" if r else "-") for width, r in zip(widths, right, strict=True))
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def percent(part: int, whole: int) -> str:
    """Such as `"12.5 %"`; a dash where there is nothing to share."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def latex_table(head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """
    A LaTeX table with the rules of `booktabs`: the first column left, the others right.

    Args:
        head (sequence), rows (iterable of sequences):
            The cells.
        caption (`str`, *optional*):
            Puts the table into a `table` environment of that caption.

    Example:

    ```python
    >>> from vretrver_hf.tables import latex_table

    >>> print(latex_table(["task", "R@1"], [["t → i", "50.0 %"]]))
    \\begin{tabular}{lr}
    \\toprule
    task & R@1 \\\\
    \\midrule
    t $\\to$ i & 50.0 \\% \\\\
    \\bottomrule
    \\end{tabular}

    ```
    """
    lines = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in (head, *rows)]
    body = [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", lines[0], r"\midrule", *lines[1:]]
    body += [r"\bottomrule", r"\end{tabular}"]
    if caption:
        body = [r"\begin{table}", r"\centering", *body, rf"\caption{{{_latex(caption)}}}", r"\end{table}"]
    return "\n".join(body)


def _latex(cell: Any) -> str:
    return re.sub(r"[\\~^→–±&%$#_{}]", lambda match: _LATEX[match[0]], str(cell))
