"""What a model wrote, read back: tool calls and rankings out of text.

A turn is `<think>…</think>` and then exactly one `<tool_call>…</tool_call>` or `<answer>…</answer>`. Nothing in here
raises on what a model may write, evaluates it, or trusts its size: numbers, nesting and encodings that would break a
later step are refused as malformed. Whatever stands inside `<think>` is a thought, also where it quotes a call.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any, Literal, NoReturn


_TAG = re.compile(r"<(/?)(think|tool_call|answer)>")
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_END_OF_TURN = "<|im_end|>"
# A minus directly behind a digit separates ("3-1-2"); elsewhere it is a sign. Decimals are one number, not two.
_NUMBER = re.compile(r"(?:(?<!\d)-)?\d+(?:\.\d+)?")

_MAX_DIGITS = 18  # of an integer in a call: beyond it, arithmetic with floats overflows
_MAX_BRACKETS = 64  # in a call, which has 3: bounds the nesting, also for whoever writes the call out again


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """
    A call as the model wrote it; whether the tool exists and takes these arguments is the tool's to say.

    Args:
        name (`str`):
            Name of the tool.
        arguments (`dict`):
            Its arguments.
    """

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ParsedTurn:
    """
    One model turn.

    Args:
        kind (`str`):
            `"call"`, `"answer"` or `"malformed"`.
        thought (`str`, *optional*):
            What stands inside `<think>`; `None` where there is none.
        call (`ToolCall`, *optional*):
            The call of a `"call"` turn.
        answer (`str`, *optional*):
            What stands inside `<answer>` in an `"answer"` turn, for [`parse_ranking`] to judge.
        problem (`str`, *optional*):
            What departs from the protocol, in words that the model can act on. A turn whose only action is clear keeps
            its kind (a missing `<think>`, text around the tags); any other departure makes it `"malformed"`.
        well_formed (`bool`, *optional*, defaults to `False`):
            Whether the turn is exactly one thought and then exactly one call or answer, with nothing around them.
    """

    kind: Literal["call", "answer", "malformed"]
    thought: str | None
    call: ToolCall | None
    answer: str | None
    problem: str | None
    well_formed: bool = False


@dataclasses.dataclass(frozen=True)
class ParsedRanking:
    """
    The ranking that an answer states, completed to a permutation.

    Args:
        order (`list[int]`):
            Candidate indices, 0-based, best first: always a permutation of `range(n)`.
        status (`str`):
            `"ok"`: the answer is a JSON list that names every candidate once. `"repaired"`: some of the order is the
            model's, the rest was mended. `"fallback"`: no part of the order is the model's; it is the input order.
        problems (`list[str]`):
            What was wrong, in plain words; empty where the status is `"ok"`.
    """

    order: list[int]
    status: Literal["ok", "repaired", "fallback"]
    problems: list[str]


def parse_turn(text: str) -> ParsedTurn:
    """
    Reads one model turn.

    Args:
        text (`str`):
            The text of the turn, with or without the token that ends it.

    Example:

    ```python
    >>> from vretrver_hf.parsing import parse_turn

    >>> turn = parse_turn('<think>Is it red?</think><tool_call>{"name": "look", "arguments": {"at": 2}}</tool_call>')
    >>> turn.kind, turn.thought, turn.call.name, turn.call.arguments
    ('call', 'Is it red?', 'look', {'at': 2})
    >>> parse_turn("<think>Done.</think>").problem
    'there is no <tool_call> and no <answer>'

    ```
    """
    parts = _split_tags(text.rstrip().removesuffix(_END_OF_TURN))
    thoughts = [part.body.strip() for part in parts if part.tag == "think"]
    thought = "\n".join(thoughts) if thoughts else None
    actions = [part for part in parts if part.tag in ("tool_call", "answer")]
    problem = _fatal_problem(parts, actions)
    if problem is not None:
        return ParsedTurn("malformed", thought, None, None, problem)
    problem = _shape_problem(parts)
    if actions[0].tag == "answer":
        return ParsedTurn("answer", thought, None, actions[0].body.strip(), problem, problem is None)
    try:
        call = _read_call(actions[0].body)
    except _BadCall as error:
        return ParsedTurn("malformed", thought, None, None, str(error))
    return ParsedTurn("call", thought, call, None, problem, problem is None)


def parse_ranking(text: str, n: int) -> ParsedRanking:
    """
    Reads the ranking of `n` candidates out of a model's text: the last `<answer>` outside `<think>` counts.

    Whatever the text is, the order is a full permutation: repeated and foreign numbers are dropped and missing
    candidates appended in input order. Prose is searched for numbers. A missing `<think>` does not matter here.

    Args:
        text (`str`):
            One turn or a whole trajectory of the model's text.
        n (`int`):
            Number of candidates, which the answer numbers from 1.

    Raises:
        `ValueError`: if `n` is negative.

    Example:

    ```python
    >>> from vretrver_hf.parsing import parse_ranking

    >>> parse_ranking("<think>3 fits.</think><answer>[3, 1, 2]</answer>", 3)
    ParsedRanking(order=[2, 0, 1], status='ok', problems=[])
    >>> parse_ranking("<answer>[3, 3]</answer>", 3).problems
    ['1 repeated number dropped', '2 missing candidates appended in input order']

    ```
    """
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    before, mark, after = _without_thoughts(text).rpartition("<answer>")
    if not mark:
        return ParsedRanking(list(range(n)), "fallback", ["no <answer> outside <think>"])
    body, end, _ = after.partition("</answer>")
    problems = [] if end else ["the <answer> is not closed"]
    numbers = _strict_numbers(body)
    if numbers is None:
        problems.append("the answer is not a JSON list of integers")
        numbers = _loose_numbers(body)
    return _complete(numbers, n, problems)


class _BadCall(ValueError):
    pass


@dataclasses.dataclass(frozen=True)
class _Part:
    # What one pair of tags encloses, or, where `tag` is None, what stands outside of all pairs.
    tag: str | None
    body: str
    opened: bool = True
    closed: bool = True


def _split_tags(text: str) -> list[_Part]:
    parts: list[_Part] = []
    end = 0
    matches = list(_TAG.finditer(text))
    if (first := next((match for match in matches if match[2] == "think"), None)) is not None and first[1]:
        # A chat template may open the thought in the prompt, so that only its end is the model's.
        parts.append(_Part("think", text[: first.start()], opened=False))
        end = first.end()
    opening = None
    for match in matches:
        if match.start() < end:
            continue
        if opening is None and not match[1]:
            parts.append(_Part(None, text[end : match.start()]))
            opening = match
        elif opening is not None and match[1] and match[2] == opening[2]:
            parts.append(_Part(opening[2], text[opening.end() : match.start()]))
            opening, end = None, match.end()
    if opening is None:
        parts.append(_Part(None, text[end:]))
    else:
        parts.append(_Part(opening[2], text[opening.end() :], closed=False))
    return [part for part in parts if part.tag or part.body.strip()]


def _fatal_problem(parts: list[_Part], actions: list[_Part]) -> str | None:
    unclosed = [part.tag for part in parts if not part.closed]
    if unclosed:
        return f"<{unclosed[0]}> is not closed"
    if not actions:
        return "there is no <tool_call> and no <answer>"
    tags = [part.tag for part in actions]
    if "answer" in tags and "tool_call" in tags:
        return "a call and an answer in one turn; write one of them"
    if len(actions) > 1:
        return "more than one call in a turn" if tags[0] == "tool_call" else "more than one answer in a turn"
    if _TAG.search(actions[0].body):
        return f"tags inside <{tags[0]}>"
    return None


def _shape_problem(parts: list[_Part]) -> str | None:
    tags = [part.tag for part in parts]
    if "think" not in tags:
        return "there is no <think> before the action"
    if not all(part.opened for part in parts):
        return "<think> is not opened"
    if None in tags:
        return "there is text outside the tags"
    if tags[0] != "think" or len(tags) != 2:
        return "write one <think> and then the action"
    return None


def _read_call(body: str) -> ToolCall:
    try:
        value = _load_json(body)
    except json.JSONDecodeError as error:
        raise _BadCall(f"the call is not valid JSON ({error.msg} at character {error.pos + 1})") from None
    except UnicodeEncodeError:
        raise _BadCall("the call holds half of a surrogate pair") from None
    except ValueError as error:
        raise _BadCall(f"the call is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise _BadCall('the call is not a JSON object with "name" and "arguments"')
    if not isinstance(value.get("name"), str):
        raise _BadCall('the call has no "name" that is a string')
    if not isinstance(value.get("arguments"), dict):
        raise _BadCall('the call has no "arguments" that are a JSON object')
    if len(value) > 2:
        raise _BadCall('the call has keys besides "name" and "arguments"')
    return ToolCall(value["name"], value["arguments"])


def _load_json(text: str) -> Any:
    if text.count("[") + text.count("{") > _MAX_BRACKETS:
        raise ValueError("too many brackets")
    value = json.loads(
        text,
        parse_constant=_refuse_constant,
        parse_float=_finite_float,
        parse_int=_short_int,
        object_pairs_hook=_unique_keys,
    )
    # "\ud800" is valid JSON, but no tokenizer and no file takes half of a surrogate pair.
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _short_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError("a number is too large")
    return int(digits)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is repeated")
    return value


def _without_thoughts(text: str) -> str:
    before, end, after = text.partition("</think>")
    if end and "<think>" not in before:
        text = after
    return _THOUGHT.sub(" ", text)


def _strict_numbers(body: str) -> list[int] | None:
    try:
        value = _load_json(body)
    except ValueError:
        return None
    return value if isinstance(value, list) and all(type(number) is int for number in value) else None


def _loose_numbers(body: str) -> list[int]:
    values = [float(match) for match in _NUMBER.findall(body)]
    # An endless or fractional number names no candidate; 0 neither, and is counted as foreign.
    return [int(value) if value.is_integer() else 0 for value in values]


def _complete(numbers: list[int], n: int, problems: list[str]) -> ParsedRanking:
    known = [number for number in numbers if 1 <= number <= n]
    order = [number - 1 for number in dict.fromkeys(known)]
    missing = sorted(set(range(n)) - set(order))
    if n and not order:
        problems.append(f"the answer names none of the candidates 1..{n}")
        return ParsedRanking(missing, "fallback", problems)
    if foreign := len(numbers) - len(known):
        problems.append(f"{_count(foreign, 'number')} outside 1..{n} dropped")
    if repeated := len(known) - len(order):
        problems.append(f"{_count(repeated, 'repeated number')} dropped")
    if missing:
        problems.append(f"{_count(len(missing), 'missing candidate')} appended in input order")
    return ParsedRanking(order + missing, "repaired" if problems else "ok", problems)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
