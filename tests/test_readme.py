"""What the README says happens, happens."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from vretrver_hf.cli import app, main


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_example_prints_what_stands_beside_it():
    ((code, output),) = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == output
    assert (ROOT / "outputs" / "ranking.html").stat().st_size > 10_000


def test_commands_run(capsys):
    commands = re.findall(r"^vretrver .*$", README, re.MULTILINE)
    assert commands
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(command)[1:])
        assert ended.value.code in (0, None), command
        assert capsys.readouterr().out


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize(
    "page", ["README.md", "recipes/emoji/README.md", "vretrver_hf/assets/vretrver-tiny/README.md"]
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert targets and not missing


@pytest.mark.parametrize("page", ["README.md", "recipes/emoji/README.md"])
def test_options_of_long_commands_exist(page):
    """Commands that take hours or another machine are not run here, but what they ask for must exist."""
    import typer.main

    commands = typer.main.get_command(app).commands
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = re.findall(r"-m vretrver_hf(\.evaluation| \w+) (--.*|outputs.*|\$R.*)$", text, re.MULTILINE)
    assert lines
    for name, rest in lines:
        command = commands["evaluate" if name == ".evaluation" else name.strip()]
        known = {option for parameter in command.params for option in parameter.opts}
        asked = set(re.findall(r"--[a-z-]+", rest))
        assert asked <= known, (name, asked - known)
