from __future__ import annotations

import sys

import pytest
from playwright.sync_api import expect
from records import make_example, make_records
from servers import free_port, serve
from tiny_models import make_processor

from vretrver_hf.data.conversations import write_records
from vretrver_hf.encoding import Encoder
from vretrver_hf.protocol import format_answer, format_turn


@pytest.fixture
def viewer(tmp_path):
    encoder = Encoder(make_processor("qwen2_5_vl"), "qwen2_5_vl")
    records = make_records(encoder, [make_example(number) for number in range(4)])
    records += make_records(encoder, [make_example(4)], [[format_turn("1 fits", format_answer([0, 1, 2]))]])
    write_records(tmp_path / "records", records)
    port = free_port()
    command = [sys.executable, "-m", "vretrver_hf", "view", str(tmp_path / "records"), "--no-browser"]
    process, _ = serve([*command, "--port", str(port)], port, tmp_path)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=30)


def test_trajectories_are_filtered(page, viewer, shoot):
    page.goto(viewer)
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
