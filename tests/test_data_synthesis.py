from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from records import PRESET, make_example
from scripted import ScriptedEngine
from teacher import QUICK, Reply, ScriptedTeacher, query_of, slowly, turn_of
from tiny_models import make_processor

from vretrver_hf import Item
from vretrver_hf.agent import play
from vretrver_hf.data import synthesis
from vretrver_hf.data.conversations import load_conversations
from vretrver_hf.data.examples import RerankExample
from vretrver_hf.data.rejection import Query
from vretrver_hf.data.synthesis import (
    Teacher,
    TeacherDown,
    annotation_prompt,
    judge,
    synthesize_queries,
    write_card,
    write_conversations,
)
from vretrver_hf.encoding import Encoder
from vretrver_hf.journal import Journal
from vretrver_hf.protocol import format_answer, format_call, format_turn, get_preset
from vretrver_hf.reranker import bundled_model
from vretrver_hf.samples import load_samples
from vretrver_hf.tools import VisualTools


SELECT = format_turn("1 or 3; look.", format_call("select_images", {"target_images": [1, 3]}))
CROP = format_turn("closer.", format_call("crop_image", {"bbox_2d": [0.1, 0.1, 0.6, 0.7], "target_image": 1}))
ANSWER = format_turn("2 is blue.\nBest first: 2, 1", format_answer([1, 0, 2]))
FAST = {"retries": 2, "timeout": 5}


def example(number: int) -> RerankExample:
    """As `make_example`, with a query that says which one it is."""
    made = make_example(number)
    return dataclasses.replace(made, query=Item(text=f"q{number}", image=made.query.image and None))


def say(*turns: str):
    """A script that says the same to every query."""
    return lambda body, before: turns[turn_of(body)]


def synthesize(folder, script, examples=None, settings=None, preset=PRESET, **kwargs) -> Journal:
    """Has a scripted teacher play the examples; the server is kept as `journal.server`."""
    examples = [example(0)] if examples is None else examples
    journal = Journal(folder, {})
    with ScriptedTeacher(script) as server:
        journal.server = server
        teacher = Teacher(server.url, "teacher", **{**FAST, **(settings or {})})
        keys = [entry.query_id for entry in examples]
        synthesize_queries(examples, keys, journal, teacher, preset, **kwargs)
    return journal


def talk(journal: Journal, key: str = "q0"):
    (trajectory,) = Query.from_dict(journal[key]).trajectories
    return trajectory


def picture(block) -> Image.Image:
    assert block["type"] == "image_url"
    header, _, data = block["image_url"]["url"].partition(",")
    assert header == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def assert_shows(block, expected: Image.Image) -> None:
    """JPEG at quality 95 of noise, its worst case, is off by a few levels."""
    found = picture(block)
    assert found.size == expected.size
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).mean() < 8


class TestRequests:
    def test_what_the_teacher_is_sent(self, tmp_path):
        settings = {"temperature": 0.3, "max_turn_tokens": 99, "api_key": "secret-key"}
        journal = synthesize(tmp_path, say(SELECT, CROP, ANSWER), settings=settings)
        first, second, third = journal.server.requests
        assert (first["model"], first["temperature"], first["max_completion_tokens"]) == ("teacher", 0.3, 99)
        assert "stop" not in first and "tools" not in first
        assert journal.server.headers[0]["authorization"] == "Bearer secret-key"

        student = example(0).task(PRESET).messages()
        system, user = first["messages"]
        assert system["content"] == f"{annotation_prompt(PRESET)}\n\n{student[0]['content'][0]['text']}"
        texts = [block["text"] for block in user["content"] if block["type"] == "text"]
        assert texts == [block["text"] for block in student[1]["content"] if block["type"] == "text"]
        originals = [example(0).candidates[i].load_image() for i in (0, 2)]
        encoder = Encoder(make_processor("qwen2_5_vl"), "qwen2_5_vl")
        for block, image in zip(user["content"][1::2], originals, strict=True):
            assert_shows(block, image.resize(encoder.overview_size(image.size, PRESET), Image.Resampling.BICUBIC))

        tools = VisualTools(None, [originals[0], None, originals[1]], preset=PRESET)
        selected = tools.select_images([1, 3])
        assert second["messages"][:2] == first["messages"]
        assert second["messages"][2] == {
            "role": "assistant",
            "content": SELECT,
        }  # as text: servers drop it beside calls
        assert second["messages"][3]["role"] == "user"
        text, *pictures = second["messages"][3]["content"]
        assert text == {"type": "text", "text": "Images 1, 3:"}
        for block, image in zip(pictures, selected.images, strict=True):
            assert_shows(block, image)
        crop = tools.crop_image([0.1, 0.1, 0.6, 0.7], 1)
        assert_shows(third["messages"][5]["content"][1], crop.images[0])

    def test_seeds_differ_by_query_and_turn_and_nothing_else(self, tmp_path):
        examples = [example(0), example(1)]
        seeds = []
        for run in ("a", "b"):
            journal = synthesize(tmp_path / run, say(SELECT, ANSWER), examples, seed=5, concurrency=1)
            seeds.append([request["seed"] for request in journal.server.requests])
        assert seeds[0] == seeds[1] and len(set(seeds[0])) == 4
        other = synthesize(tmp_path / "c", say(SELECT, ANSWER), examples, seed=6, concurrency=1)
        assert not {request["seed"] for request in other.server.requests} & set(seeds[0])

    def test_pictures_of_the_other_family(self, tmp_path):
        journal = synthesize(tmp_path, say(SELECT, ANSWER), factor=32)
        sizes = [side for ref in talk(journal).images for side in (ref.width, ref.height)]
        assert len(sizes) == 8 and all(side % 32 == 0 for side in sizes)

    def test_the_answer_is_revealed_only_when_asked(self, tmp_path):
        hidden = synthesize(tmp_path / "a", say(ANSWER)).server.requests[0]["messages"][0]["content"]
        told = synthesize(tmp_path / "b", say(ANSWER), reveal=True).server.requests[0]["messages"][0]["content"]
        assert "Between us: relevant is 2." in told and "Between us" not in hidden
        assert "Between us: relevant are 1, 3." in annotation_prompt(PRESET, [2, 0])

    def test_a_data_sets_own_prompt(self, tmp_path):
        prompt = [{"role": "user", "content": "Query: q0\n(1) <image> (2) b (3) <image>. Rank."}]
        preset = get_preset(PRESET, prompt_source="dataset")
        journal = synthesize(tmp_path, say(ANSWER), [dataclasses.replace(example(0), prompt=prompt)], preset=preset)
        system, user = journal.server.requests[0]["messages"]
        assert system == {"role": "system", "content": annotation_prompt(preset)}
        assert [block["type"] for block in user["content"]] == ["text", "image_url", "text", "image_url", "text"]

    def test_many_at_a_time_but_no_more_than_asked(self, tmp_path):
        examples = [example(number) for number in range(6)]
        journal = synthesize(tmp_path, slowly(say(ANSWER), 0.2), examples, concurrency=3)
        assert journal.server.most_at_once == 3 and len(journal) == 6


class TestReplies:
    @pytest.mark.parametrize(
        "reply",
        [
            SELECT,
            SELECT + "\nImages 1, 3: they show doors.\n<answer>[1, 2, 3]</answer>",  # made up what a tool would show
            SELECT.replace("\n", "").replace(", ", ","),  # other spacing
            {  # a server that takes calls apart
                "content": "<think>1 or 3; look.</think>\n",
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "select_images", "arguments": '{"target_images": [1, 3]}'},
                    }
                ],
            },
            {  # a server that takes thoughts apart
                "content": SELECT.partition("</think>")[2],
                "reasoning_content": "1 or 3; look.",
            },
            {"content": SELECT.partition("</think>")[2], "reasoning": "1 or 3; look."},
        ],
    )
    def test_a_call_however_it_is_sent(self, tmp_path, reply):
        journal = synthesize(tmp_path, lambda body, before: [reply, ANSWER][turn_of(body)])
        turns = talk(journal).assistant_turns
        assert [turn.text for turn in turns] == [SELECT, ANSWER]
        assert turns[0].call == {"name": "select_images", "arguments": {"target_images": [1, 3]}}

    def test_an_answer_is_written_as_the_protocol_writes_it(self, tmp_path):
        spaced = " <think>\n2 is blue.\nBest first: 2, 1 </think>\n\n<answer>\n[2,1 , 3]</answer>\n"
        assert talk(synthesize(tmp_path, say(spaced))).assistant_turns[0].text == ANSWER

    @pytest.mark.parametrize(
        ("turns", "reason"),
        [
            ([ANSWER], None),
            ([SELECT, CROP, ANSWER], None),
            ([ANSWER.replace("Best first: 2, 1", "**Best first:** 2 > 1.")], None),
            ([ANSWER.replace("Best first: 2, 1", "Best first: 3? No.\nbest first: [2]")], None),  # the last one counts
            (["I like 2."], "malformed turn"),
            ([""], "malformed turn"),
            ([ANSWER.partition("</think>")[2]], "malformed turn"),  # no thought
            ([f"Sure! {ANSWER}"], "malformed turn"),  # text outside the tags
            ([ANSWER[:40]], "malformed turn"),  # cut off
            ([SELECT.replace("[1, 3]", "[1, 2]")], "invalid call"),  # candidate 2 has no picture
            ([SELECT.replace("[1, 3]", "[1, 4]")], "invalid call"),  # there is no candidate 4
            ([SELECT.replace("[1, 3]", "[0]")], "invalid call"),  # the query has no picture
            ([CROP.replace("0.6", "0.05")], "invalid call"),  # a reversed box
            ([SELECT.replace("select_images", "zoom")], "invalid call"),  # no such tool
            ([SELECT] * 9, "invalid call"),  # more calls than the student has
            ([ANSWER.replace("[2, 1, 3]", "[2, 1]")], "not a permutation"),
            ([ANSWER.replace("\nBest first: 2, 1", "")], "no conclusion"),
            (
                [ANSWER.replace("2, 1</think>", "2, 1 or so it seems</think>")],
                "no conclusion",
            ),  # it does not end there
            ([ANSWER.replace("first: 2, 1", "first: 1, 2")], "contradiction"),
            ([ANSWER.replace("first: 2, 1", "first: 2, 3")], "contradiction"),
            ([ANSWER.replace("first: 2, 1", "first: 2, 1, 3, 4")], "contradiction"),  # there is no candidate 4
            ([ANSWER.replace("2, 1", "1, 2").replace("[1, 2", "[1, 2")], "wrong"),
        ],
    )
    def test_what_is_kept_and_why_not(self, tmp_path, turns, reason):
        journal = synthesize(tmp_path, say(*turns))
        assert judge(Query.from_dict(journal["q0"])) == reason
        assert not journal.errors
        if reason in ("malformed turn", "invalid call"):  # it would be rejected anyway, so nobody is asked again
            assert len(journal.server.requests) == (5 if len(turns) == 9 else 1)

    def test_a_conclusion_of_endless_digits_is_none(self, tmp_path):
        journal = synthesize(tmp_path, say(ANSWER.replace("first: 2, 1", f"first: {'2' * 9999}")))
        assert judge(Query.from_dict(journal["q0"])) == "no conclusion"

    def test_half_a_surrogate_pair_is_replaced(self, tmp_path):
        text = say(SELECT.replace("look", "look \ud800"), ANSWER.replace("blue", "blue \udc00"))
        with synthesize(tmp_path / "journal", text) as journal:
            assert write_conversations(tmp_path, [example(0)], ["q0"], journal).total.kept == 1
        (row,) = json.loads((tmp_path / "conversations.json").read_text(encoding="utf-8"))
        assert row["conversations"][2]["value"] == SELECT.replace("look", "look ?", 1)

    def test_without_labels_any_sound_ranking_is_kept(self, tmp_path):
        wrong = ANSWER.replace("2, 1", "1, 2")
        query = Query.from_dict(synthesize(tmp_path, say(wrong))["q0"])
        assert (judge(query), judge(query, max_rank=2), judge(query, max_rank=None)) == ("wrong", None, None)

    @pytest.mark.parametrize(
        "thought", ["I was told that it is 2.", "The ground truth says 2.", "The given answer fits."]
    )
    def test_a_thought_that_speaks_of_the_hint(self, tmp_path, thought):
        query = Query.from_dict(synthesize(tmp_path, say(ANSWER.replace("2 is blue.", thought)))["q0"])
        assert judge(query, revealed=True) == "hint" and judge(query, revealed=False) is None


class TestFailures:
    @pytest.mark.parametrize(
        "failure",
        [
            Reply(429, {"error": {"message": "slow down"}}, QUICK),
            Reply(500, b"oops", QUICK),
            Reply(503, b"", QUICK),
            Reply(cut=True),  # the connection ends in the middle
            1.5,  # silence for longer than the client waits
        ],
    )
    def test_tried_again(self, tmp_path, failure):
        def script(body, before):
            return failure if before == 0 and turn_of(body) == 1 else say(SELECT, ANSWER)(body, before)

        journal = synthesize(tmp_path, script, settings={"timeout": 0.5})
        assert judge(Query.from_dict(journal["q0"])) is None and not journal.errors
        assert len(journal.server.requests) == 3

    @pytest.mark.parametrize(
        ("failure", "told"),
        [
            (Reply(500, b"oops", QUICK), "no reply from the teacher: "),
            (Reply(400, {"error": {"message": "too many images"}}), "too many images"),
            (Reply(200, b"<html>", {"Content-Type": "text/html"}), "the reply is no chat completion"),
            (Reply(200, b'{"choices": []}'), "the reply is no chat completion"),
            (Reply(200, b'{"error": "x"}'), "the reply is no chat completion"),
            (Reply(200, b'{"choi'), "no reply from the teacher: "),
        ],
    )
    def test_a_query_without_a_reply_costs_itself_only_and_is_tried_again(self, tmp_path, failure, told):
        examples = [example(number) for number in range(3)]

        def script(body, before):
            return failure if query_of(body) == "q1" else ANSWER

        done = {}
        journal = synthesize(tmp_path, script, examples, on_query=done.__setitem__)
        assert len(journal) == 2 and list(journal.errors) == ["q1"] and told in journal.errors["q1"]
        assert done["q1"] is None and set(done) == {"q0", "q1", "q2"}
        journal.close()
        journal = synthesize(tmp_path, say(ANSWER), examples)
        assert len(journal) == 3 and not journal.errors and len(journal.server.requests) == 1

    def test_a_broken_picture_costs_its_query_only(self, tmp_path):
        broken = dataclasses.replace(example(1), query=Item(image=b"no picture"))
        journal = synthesize(tmp_path, say(ANSWER), [example(0), broken, example(2)])
        assert len(journal) == 2 and "query is no readable image" in journal.errors["q1"]

    @pytest.mark.parametrize("status", [401, 403, 404])
    def test_a_teacher_that_refuses_ends_the_job(self, tmp_path, status):
        examples = [example(number) for number in range(5)]
        reply = Reply(status, {"error": {"message": "your key secret-key is no good"}})

        def script(body, before):
            return ANSWER if query_of(body) == "q0" else reply

        with pytest.raises(TeacherDown, match="the teacher refuses: .*your key … is no good"):
            synthesize(tmp_path, script, examples, settings={"api_key": "secret-key"}, concurrency=1)
        with contextlib.closing(Journal(tmp_path, {}, shard=1)) as journal:
            assert "q0" in journal and len(journal) == 1
        assert not any("secret-key" in path.read_text() for path in tmp_path.iterdir())

    def test_ten_failures_in_a_row_end_the_job(self, tmp_path):
        examples = [example(number) for number in range(30)]

        def script(body, before):
            number = int(query_of(body)[1:])
            return ANSWER if number == 5 else Reply(400, {"error": {"message": f"no images, {number}"}})

        with pytest.raises(TeacherDown, match="failed 10 queries in a row; the last: .*no images, 15"):
            synthesize(tmp_path, script, examples, concurrency=1)

    def test_nobody_is_there(self, tmp_path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            teacher = Teacher(f"http://127.0.0.1:{free.getsockname()[1]}/v1", "teacher", retries=0)
            examples = [example(number) for number in range(12)]
            with Journal(tmp_path, {}) as journal, pytest.raises(TeacherDown, match="Connection error"):
                synthesize_queries(examples, [entry.query_id for entry in examples], journal, teacher, PRESET)

    def test_the_key_is_not_shown(self):
        assert "secret" not in repr(Teacher("http://localhost", "m", api_key="secret"))


@pytest.fixture(scope="module")
def encoder():
    return Encoder(make_processor("qwen2_5_vl"), "qwen2_5_vl")


class TestWriteConversations:
    def write(self, folder, examples, script, **kwargs):
        keys = [entry.query_id for entry in examples]
        with synthesize(folder / "journal", script, examples, concurrency=1) as journal:
            return write_conversations(folder, examples, keys, journal, **kwargs)

    def test_the_released_form(self, tmp_path):
        self.write(tmp_path, [example(0)], say(SELECT, CROP, ANSWER))
        with Journal(tmp_path / "journal", {}) as journal:
            played = talk(journal)
        (row,) = json.loads((tmp_path / "conversations.json").read_text())
        speakers = [turn["from"] for turn in row["conversations"]]
        assert speakers == ["system", "human", "gpt", "human", "gpt", "human", "gpt"]
        values = [turn["value"] for turn in row["conversations"]]
        assert [values[i] for i in (2, 4, 6)] == [SELECT, CROP, ANSWER]
        assert values[3] == "Images 1, 3:<image><image>"
        assert re.fullmatch(r"Image 1 \[.*\]:<image>", values[5])
        assert not any(line in values[0] for line in annotation_prompt(PRESET).splitlines() if line)
        assert values[1].count("<image>") == 2 and len(row["images"]) == 5 and row["id"] == "q0"
        first, third = [example(0).candidates[i].load_image() for i in (0, 2)]
        stored = [Image.open(tmp_path / path) for path in row["images"]]
        for found, expected in zip(stored, [first, third, first, third], strict=False):  # in full, for any student
            assert np.array_equal(np.asarray(found), np.asarray(expected))
        assert np.array_equal(np.asarray(stored[4]), np.asarray(first.crop(played.turns[4].images[0].box)))

    def test_is_read_as_the_tokens_that_the_loop_would_play(self, tmp_path, encoder):
        examples = [example(0), example(2)]
        script = {"q0": [SELECT, CROP, ANSWER], "q2": [ANSWER]}
        self.write(tmp_path, examples, lambda body, before: script[query_of(body)][turn_of(body)])
        learned = load_conversations(tmp_path / "conversations.json", encoder, PRESET)
        engine = ScriptedEngine(encoder, lambda query_id, turn: script[query_id][turn])
        for conversation, played in zip(
            learned, play(engine, [entry.task(PRESET) for entry in examples]), strict=True
        ):
            assert conversation.token_ids == played.token_ids
            assert [image.size for image in conversation.images] == [(ref.width, ref.height) for ref in played.images]
            assert conversation.mask == played.mask

    def test_only_what_is_fit_in_the_order_of_the_queries(self, tmp_path):
        examples = [example(number) for number in range(5)]
        said = {"q1": ["?"], "q3": [ANSWER.replace("\nBest first: 2, 1", "")]}

        def script(body, before):
            time.sleep(0.1 if query_of(body) == "q0" else 0)
            return said.get(query_of(body), [SELECT, ANSWER])[turn_of(body)]

        keys = [entry.query_id for entry in examples]
        with synthesize(tmp_path / "journal", script, examples, concurrency=5) as journal:
            summary = write_conversations(tmp_path, examples, keys, journal)
        rows = json.loads((tmp_path / "conversations.json").read_text())
        assert [row["id"] for row in rows] == ["q0", "q2", "q4"]
        assert (summary.total.queries, summary.total.accepted, summary.total.kept) == (5, 3, 3)
        assert summary.reasons == {"malformed turn": 1, "no conclusion": 1}
        assert summary.kept_calls == {1: 3} and summary.sampled_calls == {1: 3, 0: 2}

    def test_a_mark_in_somebodys_text_is_no_picture(self, tmp_path, encoder):
        made = example(0)
        marked = dataclasses.replace(made, query=Item(text="an <image> of a door"))
        answer = ANSWER.replace("2 is blue", "The <image> 2 is blue")
        self.write(tmp_path, [marked], say(answer))
        (row,) = json.loads((tmp_path / "conversations.json").read_text())
        assert sum(turn["value"].count("<image>") for turn in row["conversations"]) == len(row["images"]) == 2
        assert len(load_conversations(tmp_path / "conversations.json", encoder, PRESET)[0].images) == 2

    def test_a_picture_is_stored_once_and_what_is_no_longer_used_goes(self, tmp_path):
        made = example(0)
        twice = dataclasses.replace(made, candidates=[made.candidates[0], made.candidates[1], made.candidates[0]])
        wrong = ANSWER.replace("2, 1", "1, 2")
        examples = [twice, dataclasses.replace(example(2), query_id="q2")]

        def script(body, before):
            return ANSWER if query_of(body) == "q0" else wrong

        summary = self.write(tmp_path, examples, script, max_rank=None)
        (tmp_path / "images" / "notes.txt").touch()  # not ours
        assert summary.total.kept == 2 and len(list((tmp_path / "images").glob("*.png"))) == 3
        with Journal(tmp_path / "journal", {}) as journal:
            write_conversations(tmp_path, examples, ["q0", "q2"], journal, max_rank=1)
        assert sorted(path.name for path in (tmp_path / "images").iterdir())[-1] == "notes.txt"
        assert len(list((tmp_path / "images").glob("*.png"))) == 1

    def test_nothing_accepted(self, tmp_path):
        self.write(tmp_path, [example(0)], say("?"))
        assert json.loads((tmp_path / "conversations.json").read_text()) == []

    def test_card(self, tmp_path):
        examples = [example(0), dataclasses.replace(example(1), query=Item(image=b"x"))]
        summary = self.write(tmp_path, examples, say("?"))
        write_card(tmp_path, summary, {"teacher": "a/b", "reveal": False}, "first")
        text = (tmp_path / "README.md").read_text()
        assert "0 conversations in which `a/b` ranks" in text and "It was not told" in text
        assert (
            re.search(r"\| malformed turn +\| +1 \| 100.0 % \|", text)
            and "| q1 " in text
            and '"keep": "first"' in text
        )


@pytest.fixture(scope="module")
def served_model():
    """The bundled model behind `transformers serve`, a real OpenAI-compatible server."""
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    command += [str(bundled_model()), "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(600):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                assert server.poll() is None
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


class TestRealServer:
    PRESET = get_preset(
        "foveated", **json.loads(Path(bundled_model(), "reranker_config.json").read_text(encoding="utf-8"))["preset"]
    )

    def test_the_bundled_model_as_teacher(self, tmp_path, served_model):
        """It knows no `Best first:`, so the rules reject what it says; before that all is real, pictures too."""
        samples = [sample for sample in load_samples() if sample.task == "text-to-image"]
        trajectories, summary = self.synthesize(tmp_path, served_model, samples)
        assert all(trajectory.assistant_turns for trajectory in trajectories)
        assert summary.total.queries == 3 and summary.reasons.total() == 3

    def test_it_is_shown_what_it_calls_for(self, tmp_path, served_model, monkeypatch):
        """
        Behind the annotation prompt, which it never learned to read, the bundled model calls nothing. Without it, it
        plays as it does alone, and says of each picture that it calls for what that shows.
        """
        monkeypatch.setattr(synthesis, "annotation_prompt", lambda *args: "")
        (sample,) = [sample for sample in load_samples() if sample.id == "detail-test_combination-2026-000002"]
        ((trajectory,), _) = self.synthesize(tmp_path, served_model, [sample])
        turns = trajectory.turns[1:]
        rounds = list(zip(turns[::2], turns[1::2], turns[2::2], strict=False))
        assert trajectory.num_valid_calls == len(rounds) >= 2
        for asking, observation, telling in rounds:
            asked = asking.call["arguments"]
            number = asked["target_image"]
            (shown,) = observation.images
            width, height = sample.candidates[number - 1].load_image().size
            left, top, right, bottom = (
                side * part for side, part in zip([width, height] * 2, asked["bbox_2d"], strict=True)
            )
            assert shown.index == number and observation.valid
            assert shown.box[0] <= left < right <= shown.box[2] and shown.box[1] <= top < bottom <= shown.box[3]
            assert f"{number} shows a {sample.candidates[number - 1].id}:" in telling.thought

    def synthesize(self, folder, url, samples) -> tuple:
        examples = [RerankExample(s.id, s.query, s.candidates, [s.positive], s.task) for s in samples]
        keys = [entry.query_id for entry in examples]
        teacher = Teacher(url, str(bundled_model()), temperature=0.2, max_turn_tokens=96)
        with Journal(folder, {}) as journal:
            synthesize_queries(examples, keys, journal, teacher, self.PRESET, concurrency=2)
            assert not journal.errors
            queries = [Query.from_dict(journal[key]) for key in keys]
            summary = write_conversations(folder, examples, keys, journal)
        return [query.trajectories[0] for query in queries], summary
