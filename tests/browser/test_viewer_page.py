from __future__ import annotations

import sys

import pytest
from playwright.sync_api import expect
from records import ANSWER, make_example, make_records
from servers import free_port, serve
from tiny_models import make_processor

from vretrver_hf.data.conversations import write_records
from vretrver_hf.encoding import Encoder
from vretrver_hf.protocol import format_answer, format_turn


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Six trajectories: with 1, 0, 2, 1, and 0 calls, the last of them wrong, and one of a task of its own."""
    folder = tmp_path_factory.mktemp("records")
    encoder = Encoder(make_processor("qwen2_5_vl"), "qwen2_5_vl")
    records = make_records(encoder, [make_example(number) for number in range(4)])
    records += make_records(encoder, [make_example(4)], [[format_turn("1 fits", format_answer([0, 1, 2]))]])
    records += make_records(encoder, [make_example(5, pictures=False)], [[ANSWER]])
    write_records(folder, records)
    return folder


@pytest.fixture
def view(tmp_path):
    """Serves a folder or a file as `vretrver view` does; gives the address."""
    processes = []

    def start(source) -> str:
        port = free_port()
        command = [sys.executable, "-m", "vretrver_hf", "view", str(source), "--no-browser", "--port", str(port)]
        processes.append(serve(command, port, tmp_path)[0])
        return f"http://127.0.0.1:{port}"

    yield start
    for process in processes:
        process.terminate()
        process.wait(timeout=30)


def test_trajectories_are_filtered(page, records, view, shoot):
    page.goto(view(records))
    expect(page.locator("#trace h2")).to_have_text("q0")
    page.get_by_role("button", name="Next").click()
    expect(page.locator("#trace h2")).to_have_text("q1")
    page.get_by_label("wrong", exact=True).check()
    expect(page.locator("#trace .verdict")).to_contain_text("Wrong: candidate 2")
    shoot("wrong")
    page.get_by_label("calls not carried out", exact=True).check()
    expect(page.locator("#trace")).to_contain_text("Makes a call that is not carried out")
    page.get_by_label("answer mended or missing", exact=True).check()
    expect(page.locator("#trace")).to_contain_text("None is like that.")


def test_those_of_a_file_are_ordered_and_chosen_by_task(page, records, view, shoot):
    """The file that lies beside the pictures, by its own name."""
    page.goto(view(records / "trajectories.jsonl"))
    expect(page.get_by_role("heading", level=1)).to_have_text("6 trajectories")
    expect(page.locator("#trace h2")).to_have_text("q0")
    page.get_by_label("most calls", exact=True).check()
    expect(page.locator("#trace h2")).to_have_text("q2")
    expect(page.locator("#trace .steps > li")).to_have_count(3)  # one of its calls names no tool
    shoot("most-calls")
    page.locator("#task input").click()
    page.get_by_role("option", name="doors: text → text").click()
    expect(page.locator("#trace h2")).to_have_text("q5")
    page.get_by_role("button", name="Next").click()
    expect(page.locator("#chosen input")).to_have_value("6. q5 (right, 0 calls)")
    shoot("task")
