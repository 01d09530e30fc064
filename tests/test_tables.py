from __future__ import annotations

from vretrver_hf.tables import latex_table, markdown_table, percent


def test_table():
    assert markdown_table(["a", "b"], []) == "| a | b |\n|---|---|"
    table = markdown_table(["name", "share"], [["x|y", "5.0 %"], ["z", "12.5 %"]])
    assert table.splitlines() == [
        "| name |  share |",
        "|------|-------:|",
        "| x\\|y |  5.0 % |",
        "| z    | 12.5 % |",
    ]


def test_percent():
    assert [percent(1, 3), percent(0, 5), percent(0, 0)] == ["33.3 %", "0.0 %", "–"]


def test_latex():
    table = latex_table(["task_id", "R@1"], [["t → (i,t)", "50 % – 60 %"], ["a & b", r"~^\{}#$"]], caption="50 %")
    assert table.splitlines() == [
        r"\begin{table}",
        r"\centering",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"task\_id & R@1 \\",
        r"\midrule",
        r"t $\to$ (i,t) & 50 \% -- 60 \% \\",
        r"a \& b & \textasciitilde{}\textasciicircum{}\textbackslash{}\{\}\#\$ \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\caption{50 \%}",
        r"\end{table}",
    ]
