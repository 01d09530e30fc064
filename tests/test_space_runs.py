"""The Space's runs on a real model, without a page."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from teacher import ScriptedTeacher
from tiny_models import make_model, make_processor

from vretrver_hf import Item, ItemError, Reranker
from vretrver_hf.chat_templates import apply_to
from vretrver_hf.engines import Sampling
from vretrver_hf.engines.openai import OpenAIEngine
from vretrver_hf.engines.transformers import TransformersEngine
from vretrver_hf.protocol import get_preset


sys.path.insert(0, str(Path(__file__).parents[1] / "spaces" / "rerank"))

from inputs import from_form, from_texts  # noqa: E402
from limits import Limits  # noqa: E402
from runs import Run, Runs, Stage, Stopped  # noqa: E402


ITEMS = Item(text="q"), [Item(text=text, id=text) for text in "abc"]


@pytest.fixture(scope="module")
def stage():
    """A model that writes 8,000 tokens a turn unless it is stopped."""
    processor = make_processor("qwen2_5_vl")
    apply_to(processor, "qwen2_5_vl")
    engine = TransformersEngine(make_model("qwen2_5_vl", processor), processor)
    return Stage(Reranker(engine, get_preset("foveated"), sampling=Sampling(max_turn_tokens=8000)))


def exhaust(stage, run):
    return list(stage.play(run, stage.reranker, *ITEMS))


def test_cancelling_stops_the_model_in_the_middle_of_a_turn(stage):
    run = Run(deadline=60)
    threading.Timer(0.5, run.cancel).start()
    started = time.monotonic()
    with pytest.raises(Stopped, match="Cancelled"):
        exhaust(stage, run)
    assert time.monotonic() - started < 10
    assert stage.reranker.engine._rows == [] and not stage.reranker.engine._waiting


def test_a_deadline_does_too(stage):
    with pytest.raises(Stopped, match="longer than 0.3 seconds"):
        exhaust(stage, Run(deadline=0.3))
    assert stage.reranker.engine._rows == []


def test_the_stage_can_be_used_again(stage):
    with pytest.raises(Stopped):
        exhaust(stage, Run(deadline=0.2))
    short = Reranker(stage.reranker.engine, stage.reranker.preset, sampling=Sampling(max_turn_tokens=4))
    *_, ranking = stage.play(Run(60), short, *ITEMS)
    assert sorted(ranking.order) == [0, 1, 2]


@pytest.mark.parametrize(("deadline", "reason"), [(60, "Cancelled"), (0.5, "longer than 0.5 seconds")])
def test_a_model_behind_an_endpoint_is_stopped_too(deadline, reason):
    """In the middle of a request, which ends with it."""
    with ScriptedTeacher(lambda body, before: 30.0) as server:
        with OpenAIEngine("m", server.url, timeout=30) as engine:
            run = Run(deadline)
            threading.Timer(1, run.cancel).start()
            started = time.monotonic()
            with pytest.raises(Stopped, match=reason):
                exhaust(Stage(Reranker(engine, get_preset("foveated"))), run)
            assert time.monotonic() - started < 10
            while not server.num_left:
                assert time.monotonic() - started < 10, "the request was not closed"
                time.sleep(0.05)


def test_a_new_run_of_a_visitor_stops_the_one_before():
    runs = Runs(deadline=60)
    with runs.begin("a") as first, runs.begin("b") as other, runs.begin("a") as second:
        with pytest.raises(Stopped):
            first.check()
        second.check()
        other.check()
        assert runs.cancel("a") and not runs.cancel("c")
        with pytest.raises(Stopped):
            second.check()
    assert not runs.cancel("a")


class TestInputs:
    LIMITS = Limits(max_candidates=3, max_bytes=2000, max_pixels=10_000, max_characters=10)

    @pytest.fixture
    def picture(self, tmp_path):
        def make(size=(20, 10), name="a.png") -> str:
            Image.new("RGB", size, "red").save(tmp_path / name)
            return str(tmp_path / name)

        return make

    def test_pictures_come_before_texts(self, picture):
        query, candidates = from_form("q", None, [picture()], "one\n\ntwo", False, self.LIMITS)
        assert [item.text for item in candidates] == [None, "one", "two"] and query.text == "q"

    def test_lines_may_belong_to_pictures(self, picture):
        _, candidates = from_form("q", None, [picture(), picture(name="b.png")], "one\ntwo", True, self.LIMITS)
        assert [(item.text, item.image.size) for item in candidates] == [("one", (20, 10)), ("two", (20, 10))]

    @pytest.mark.parametrize(
        ("form", "named"),
        [
            (("q", None, [], "one", False), "at least two candidates"),
            (("q", None, [], "a\nb\nc\nd", False), "4 candidates, and 3 are allowed"),
            (("q", None, [], "a\n" + "b" * 11, False), "candidate 2: its text has 11 characters"),
            (("", None, [], "a\nb", False), "query: there is none"),
            (("q", None, [], "a\nb", True), "2 lines of text for 0 pictures"),
        ],
    )
    def test_what_is_not_allowed(self, form, named):
        with pytest.raises(ItemError, match=named):
            from_form(*form, self.LIMITS)

    def test_pixels_and_bytes(self, picture):
        with pytest.raises(ItemError, match="candidate 1.* pixels"):
            from_form("q", None, [picture((200, 100))], "a", False, self.LIMITS)
        with pytest.raises(ItemError, match="candidate 1 is larger than the limit of 10 bytes$"):
            from_form("q", None, [picture()], "a", False, Limits(max_bytes=10))

    def test_an_upload_that_was_removed_is_asked_for_again(self, picture):
        kept, removed = picture(), picture(name="b.png")
        Path(removed).unlink()
        with pytest.raises(ItemError, match="^candidate 2: its upload was removed.* upload it again$") as caught:
            from_form("q", None, [kept, removed], "", False, self.LIMITS)
        assert "b.png" not in str(caught.value)

    @pytest.mark.parametrize("given", ["/etc/passwd.png", "https://x.org/a.png", "../a.png"])
    def test_programs_cannot_name_files(self, given):
        with pytest.raises(ItemError):
            from_texts("q", "", ["a", given], self.LIMITS)
        with pytest.raises(ItemError):
            from_texts("q", given, ["a", "b"], self.LIMITS)


def test_limits_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("VRETRVER_DEADLINE", "5")
    assert Limits.from_environment() == Limits(deadline=5)
