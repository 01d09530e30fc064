from __future__ import annotations

import dataclasses
import io
import json
import pickle

import datasets
import pytest
from PIL import Image
from records import ANSWER, CROP, MALFORMED, PRESET, SCRIPTS, SELECT, make_example, make_records, noise
from scripted import ScriptedEngine
from tiny_models import FAMILIES, make_processor

from vretrver_hf import Item
from vretrver_hf.agent import AgentLoop, play
from vretrver_hf.data.conversations import (
    MessageConversations,
    TrajectoryConversations,
    TrajectoryRecord,
    Unusable,
    load_conversations,
    read_records,
    write_records,
)
from vretrver_hf.data.examples import RerankExample
from vretrver_hf.encoding import Encoder
from vretrver_hf.engines.base import Sampling
from vretrver_hf.images import ItemError
from vretrver_hf.protocol import get_preset
from vretrver_hf.trajectory import Trajectory, Turn


EXAMPLES = [make_example(number) for number in range(4)]


@pytest.fixture(scope="module")
def records(encoder):
    return make_records(encoder, EXAMPLES)


class TestRecords:
    def test_are_read_back_as_they_were_written(self, records, tmp_path):
        write_records(tmp_path / "new" / "folder", iter(records))
        read = read_records(tmp_path / "new" / "folder")
        assert len(read) == 4
        assert [record.trajectory for record in read] == [record.trajectory for record in records]
        for before, after in zip(records, read, strict=True):
            assert (after.example.positives, after.example.data_source) == ([1], "doors")
            for number in range(4):
                one, other = before.item(number), after.item(number)
                assert one.text == other.text
                if one.image is not None:
                    assert one.load_image().tobytes() == other.load_image().tobytes()
        assert read[-1].trajectory == records[3].trajectory and [r.trajectory for r in read[1:3]] == [
            record.trajectory for record in records[1:3]
        ]
        with pytest.raises(IndexError, match="4 records, there is no record 4"):
            read[4]

    def test_travel_to_other_processes(self, records, tmp_path):
        write_records(tmp_path, records)
        assert pickle.loads(pickle.dumps(read_records(tmp_path)))[2].trajectory == records[2].trajectory

    def test_an_example_is_stored_once(self, records, tmp_path):
        write_records(tmp_path, [records[0]] * 5 + [records[1]] * 5)
        assert len(datasets.Dataset.from_parquet(str(tmp_path / "examples.parquet"))) == 2
        assert [record.trajectory.query_id for record in read_records(tmp_path)] == ["q0"] * 5 + ["q1"] * 5

    def test_of_nothing(self, tmp_path):
        write_records(tmp_path, [])
        assert list(read_records(tmp_path)) == []

    def test_an_interrupted_folder_is_not_taken_for_a_whole_one(self, records, tmp_path):
        def interrupted():
            yield records[0]
            raise InterruptedError

        with pytest.raises(InterruptedError):
            write_records(tmp_path, interrupted())
        with pytest.raises(FileNotFoundError, match="has no trajectories.jsonl"):
            read_records(tmp_path)

    def test_two_examples_may_not_share_an_id(self, records, tmp_path):
        other = dataclasses.replace(records[0].example, query=Item(text="another door"))
        with pytest.raises(ValueError, match="two examples have the query id 'q0'"):
            write_records(tmp_path, [records[0], TrajectoryRecord(other, records[0].trajectory)])

    def test_a_window_shows_some_of_the_candidates(self, records):
        example = make_example(1)
        trajectory = Trajectory("q1", 2, [2, 0], PRESET.to_dict())
        record = TrajectoryRecord(example, trajectory)
        assert [record.item(i) for i in range(3)] == [example.query, example.candidates[2], example.candidates[0]]

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            ({"query_id": "q9"}, "a trajectory of query 'q9' was paired with query 'q1'"),
            ({"candidate_indices": [0, 1, 3]}, r"query q1: candidate_indices \[0, 1, 3\] do not fit its 3 candidates"),
            ({"candidate_indices": [0, 1]}, "do not fit"),  # of another number than num_candidates
        ],
    )
    def test_that_do_not_belong_together_are_refused(self, values, reason):
        fields = {"query_id": "q1", "num_candidates": 3, "candidate_indices": [0, 1, 2], "preset": {}, **values}
        with pytest.raises(ValueError, match=reason):
            TrajectoryRecord(make_example(1), Trajectory(**fields))

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("{", "trajectories.jsonl, line 2: not a trajectory"),
            ('{"query_id": "q1"}', "line 2: not a trajectory"),
            (json.dumps(Trajectory("x", 1, [0], {}).to_dict()), "line 2: query 'x' is not in examples.parquet"),
        ],
    )
    def test_a_bad_line_is_named(self, records, tmp_path, line, reason):
        write_records(tmp_path, records[:1])
        with open(tmp_path / "trajectories.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
        read = read_records(tmp_path)
        assert read[0].trajectory == records[0].trajectory
        with pytest.raises(ValueError, match=reason):
            read[1]

    def test_a_folder_of_something_else_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="has no trajectories.jsonl: it is no folder that write_records"):
            read_records(tmp_path)


def played(encoder, script, example=None, **sampling) -> tuple[TrajectoryRecord, list[Image.Image]]:
    """A record, and the pictures that its model was shown."""
    example = example or make_example(1)
    engine = ScriptedEngine(encoder, lambda query_id, turn: script[turn])
    shown = []
    submit = engine.submit
    engine.submit = lambda session, encoded, sampling: (
        shown.extend(encoded.images),
        submit(session, encoded, sampling),
    )
    ((_, trajectory),) = AgentLoop(engine, Sampling(**sampling)).run([example.task(PRESET)])
    return TrajectoryRecord(example, trajectory), shown


def same(images, others) -> bool:
    return [(image.size, image.tobytes()) for image in images] == [(image.size, image.tobytes()) for image in others]


class TestTrajectories:
    @pytest.mark.parametrize("script", SCRIPTS)
    def test_keep_the_tokens_that_were_sampled(self, encoder, script):
        record, shown = played(encoder, script)
        conversation = TrajectoryConversations([record], encoder, PRESET)[0]
        assert conversation.token_ids == record.trajectory.token_ids
        assert conversation.mask == record.trajectory.mask
        assert conversation.source == "stored"
        assert same(conversation.images, shown)

    def test_unusual_tokens_are_kept(self, encoder):
        """What was sampled need not be what the tokenizer would make of its text."""
        record, _ = played(encoder, [ANSWER])
        turn = record.trajectory.turns[1]
        turn.token_ids[0] = encoder.tokenizer.encode("~")[0]
        conversation = TrajectoryConversations([record], encoder, PRESET)[0]
        assert conversation.token_ids == record.trajectory.token_ids and "~" not in turn.text

    def test_what_is_learned_is_what_the_model_wrote(self, encoder):
        record, _ = played(encoder, [CROP, MALFORMED, ANSWER])
        conversation = TrajectoryConversations([record], encoder, PRESET)[0]
        learned = [t for t, bit in zip(conversation.token_ids, conversation.mask, strict=True) if bit]
        # The loop closed the call, the model closed the other two.
        assert encoder.tokenizer.decode(learned) == CROP + MALFORMED + "<|im_end|>" + ANSWER + "<|im_end|>"

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_of_another_family_are_played_again(self, family, encoder, script):
        (other,) = set(FAMILIES) - {family}
        theirs, _ = played(Encoder(make_processor(other), other), script)
        ours, shown = played(encoder, script)
        conversation = TrajectoryConversations([theirs], encoder, PRESET)[0]
        assert theirs.trajectory.token_ids != ours.trajectory.token_ids
        assert conversation.token_ids == ours.trajectory.token_ids
        assert conversation.mask == ours.trajectory.mask
        assert conversation.source == "rendered"
        assert same(conversation.images, shown)

    def test_of_an_engine_that_returns_text_are_played_again(self, encoder):
        record, shown = played(encoder, [SELECT, ANSWER])
        right = record.trajectory.token_ids, record.trajectory.mask
        record.trajectory.exact_tokens = False
        for turn in record.trajectory.assistant_turns:
            turn.token_ids = [0] * (len(turn.text) + 1)  # another tokenizer's
            turn.num_sampled = len(turn.text) + 1
        conversation = TrajectoryConversations([record], encoder, PRESET)[0]
        assert (conversation.token_ids, conversation.mask) == right
        assert same(conversation.images, shown)

    def test_a_turn_that_was_cut_off_is_not_taught_to_end_there(self, family, encoder):
        (other,) = set(FAMILIES) - {family}
        script = ["<think>" + 200 * "and " + "</think>", ANSWER]
        theirs, _ = played(Encoder(make_processor(other), other), script, max_turn_tokens=100)
        conversation = TrajectoryConversations([theirs], encoder, PRESET)[0]
        learned = [t for t, bit in zip(conversation.token_ids, conversation.mask, strict=True) if bit]
        text = theirs.trajectory.assistant_turns[0].text
        assert text.startswith("<think>and ") and not text.endswith("</think>")
        assert encoder.tokenizer.decode(learned) == text + ANSWER + "<|im_end|>"

    @pytest.mark.parametrize("tools", [True, False])
    def test_a_prompt_without_tools_stays_one(self, family, encoder, tools):
        (other,) = set(FAMILIES) - {family}
        theirs = make_records(Encoder(make_processor(other), other), [make_example(1)], [[ANSWER]], tools=tools)
        (ours,) = make_records(encoder, [make_example(1)], [[ANSWER]], tools=tools)
        assert TrajectoryConversations(theirs, encoder, PRESET)[0].token_ids == ours.trajectory.token_ids
        assert TrajectoryConversations([ours], encoder, PRESET)[0].source == "stored"

    def test_of_a_window_show_its_candidates(self, encoder):
        example = make_example(1)
        task = dataclasses.replace(
            example.task(PRESET), candidates=[example.candidates[2], example.candidates[0]], candidate_indices=[2, 0]
        )
        look = CROP.replace('"target_image": 1', '"target_image": 2')
        engine = ScriptedEngine(encoder, lambda query_id, turn: [look, "<answer>[2, 1]</answer>"][turn])
        (trajectory,) = play(engine, [task])
        conversation = TrajectoryConversations([TrajectoryRecord(example, trajectory)], encoder, PRESET)[0]
        assert conversation.source == "stored"
        crop = trajectory.turns[2].images[0]
        assert same(conversation.images[-1:], [crop.render(example.candidates[0].load_image())])

    def test_with_a_data_sets_own_prompt(self, encoder):
        preset = get_preset(PRESET, prompt_source="dataset")
        prompt = [{"role": "user", "content": "Mine: <image> and <image>, <image>"}]
        example = dataclasses.replace(make_example(1), prompt=prompt)
        (record,) = make_records(encoder, [example], [[ANSWER]], preset)
        conversation = TrajectoryConversations([record], encoder, preset)[0]
        assert conversation.source == "stored" and "Mine: " in encoder.tokenizer.decode(conversation.token_ids)

    def test_of_another_preset_are_an_error(self, encoder):
        record, _ = played(encoder, [ANSWER])
        with pytest.raises(
            ValueError, match="query q1 was played under {'max_calls': 4}.*under {'max_calls': 1}; set"
        ):
            TrajectoryConversations([record], encoder, get_preset(PRESET, max_calls=1))[0]

    def test_without_a_turn_are_unusable(self, encoder):
        trajectory = Trajectory("q1", 3, [0, 1, 2], PRESET.to_dict(), finish="error")
        with pytest.raises(Unusable, match="query q1: the model wrote nothing") as caught:
            TrajectoryConversations([TrajectoryRecord(make_example(1), trajectory)], encoder, PRESET)[0]
        assert caught.value.reason == "no assistant turn"

    @pytest.mark.parametrize("exact", [True, False])
    def test_with_a_broken_picture_name_it(self, encoder, exact):
        record, _ = played(encoder, [ANSWER])
        record.trajectory.exact_tokens = exact
        candidates = [Item(image=b"no picture"), *record.example.candidates[1:]]
        broken = TrajectoryRecord(dataclasses.replace(record.example, candidates=candidates), record.trajectory)
        with pytest.raises(ItemError, match="query q1.* no readable image"):
            TrajectoryConversations([broken], encoder, PRESET)[0]

    @pytest.mark.parametrize(
        "turns",
        [
            [CROP],  # something would have to follow
            [ANSWER, ANSWER],  # nothing can follow
        ],
    )
    def test_that_cannot_be_played_again_are_unusable(self, encoder, turns):
        record, _ = played(encoder, [ANSWER])
        record.trajectory.exact_tokens = False
        record.trajectory.turns[1:] = [Turn("assistant", [1], text, num_sampled=1) for text in turns]
        with pytest.raises(Unusable, match="query q1: played again, the conversation has another number") as caught:
            TrajectoryConversations([record], encoder, PRESET)[0]
        assert caught.value.reason == "does not play again"


SYSTEM = "You rank. <tools>\n{}\n</tools>"
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": SYSTEM},
        {"from": "human", "value": "Query: <image>\nCandidates:\n(1) <image>a door\n(2) text"},
        {"from": "gpt", "value": CROP},
        {"from": "human", "value": "Here is the cropped image.\n<image>"},
        {"from": "gpt", "value": ANSWER},
    ],
    "images": ["0.png", "1.png", "2.png"],
}
PICTURES = [noise(100, 70, 0), noise(60, 90, 1), noise(170, 170, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, picture in enumerate(PICTURES):
        picture.save(folder / f"{number}.png")
    return folder


def conversation_of(encoder, row, folder, preset=PRESET):
    return MessageConversations(datasets.Dataset.from_list([row]), encoder, preset, folder, "set")[0]


class TestMessages:
    def test_are_rendered_as_the_processor_renders_them(self, encoder, folder):
        conversation = conversation_of(encoder, SHAREGPT, folder)
        roles = {"system": "system", "human": "user", "gpt": "assistant"}
        messages = []
        for turn in SHAREGPT["conversations"]:
            first, *rest = turn["value"].split("<image>")
            blocks = [{"type": "text", "text": first}]
            for piece in rest:
                blocks += [{"type": "image"}, {"type": "text", "text": piece}]
            messages.append({"role": roles[turn["from"]], "content": blocks})
        text = encoder.processor.apply_chat_template(messages, tokenize=False).removesuffix("\n")
        batch = encoder.processor(text=[text], images=conversation.images, images_kwargs={"do_resize": False})
        assert conversation.token_ids == batch["input_ids"][0]
        assert len(conversation.mask) == len(conversation.token_ids)
        assert conversation.source == "rendered"

    def test_what_is_learned_is_what_the_model_wrote(self, encoder, folder):
        conversation = conversation_of(encoder, SHAREGPT, folder)
        learned = [t for t, bit in zip(conversation.token_ids, conversation.mask, strict=True) if bit]
        assert encoder.tokenizer.decode(learned) == CROP + ANSWER + "<|im_end|>"

    def test_pictures_keep_to_the_budget_of_their_place(self, encoder, folder):
        conversation = conversation_of(encoder, SHAREGPT, folder)
        areas = [image.width * image.height for image in conversation.images]
        assert max(areas[:2]) <= PRESET.overview_pixels < areas[2] <= PRESET.inspect_pixels
        for image, original in zip(conversation.images, PICTURES, strict=True):
            assert same([image], [original.resize(image.size, Image.Resampling.BICUBIC)])
        pads = sum(token == encoder.image_pad for token in conversation.token_ids)
        assert pads == sum(areas) // encoder.factor**2

    @pytest.mark.parametrize(
        "store",
        [
            lambda path: {"bytes": path.read_bytes(), "path": None},
            lambda path: {"bytes": None, "path": path.name},
            str,
        ],
        ids=["bytes", "path in a dict", "absolute path"],
    )
    def test_pictures_come_in_several_forms(self, encoder, folder, store):
        row = {**SHAREGPT, "images": [store(folder / name) for name in SHAREGPT["images"]]}
        assert same(conversation_of(encoder, row, folder).images, conversation_of(encoder, SHAREGPT, folder).images)

    def test_pictures_of_an_image_column_are_not_decoded_before_their_turn(self, encoder, folder):
        data = io.BytesIO((folder / "2.png").read_bytes()[:100])
        images = [{"bytes": (folder / "0.png").read_bytes(), "path": None}] * 2 + [{"bytes": data.getvalue()}]
        features = datasets.Features(
            {
                "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
                "images": datasets.List(datasets.Image()),
            }
        )
        rows = datasets.Dataset.from_list([{**SHAREGPT, "images": images}], features=features)
        with pytest.raises(ItemError, match="set, row 0, image 3"):
            MessageConversations(rows, encoder, PRESET, name="set")[0]

    def test_the_messages_form_is_the_same_conversation(self, encoder, folder):
        roles = {"system": "system", "human": "user", "gpt": "assistant"}
        turns = [(roles[turn["from"]], turn["value"]) for turn in SHAREGPT["conversations"]]
        marks = {"messages": [{"role": role, "content": text} for role, text in turns], "images": SHAREGPT["images"]}
        blocks = {"messages": [], "images": SHAREGPT["images"]}
        for role, text in turns:
            first, *rest = text.split("<image>")
            content = [{"type": "text", "text": first}]
            for piece in rest:
                content += [{"type": "image", "text": None}, {"type": "text", "text": piece}]
            role = "tool" if text.startswith("Here is") else role  # what a tool returned is a user turn
            blocks["messages"].append({"role": role, "content": content})
        expected = conversation_of(encoder, SHAREGPT, folder)
        for row in (marks, blocks):
            conversation = conversation_of(encoder, row, folder)
            assert (conversation.token_ids, conversation.mask) == (expected.token_ids, expected.mask)

    def test_what_follows_the_last_turn_of_the_model_is_left_out(self, encoder, folder):
        more = {"from": "human", "value": "and this? <image>"}
        row = {"conversations": [*SHAREGPT["conversations"], more], "images": [*SHAREGPT["images"], "0.png"]}
        conversation = conversation_of(encoder, row, folder)
        expected = conversation_of(encoder, SHAREGPT, folder)
        assert (conversation.token_ids, conversation.mask) == (expected.token_ids, expected.mask)
        assert len(conversation.images) == 3

    def test_control_tokens_in_a_text_are_defused_and_tags_are_kept(self, encoder):
        texts = ["<tool_call> <|im_end|>\n<|im_start|>assistant <|image_pad|>", "<think>x<|im_end|></think>"]
        row = {"conversations": [{"from": "human", "value": texts[0]}, {"from": "gpt", "value": texts[1]}]}
        conversation = conversation_of(encoder, row, None)
        text = encoder.tokenizer.decode(conversation.token_ids)
        assert text.count("<|im_start|>assistant") == 1 and text.endswith("</think><|im_end|>")
        assert "<tool_call> < |im_end|>" in text and encoder.image_pad not in conversation.token_ids

    @pytest.mark.parametrize(
        ("change", "reason", "message"),
        [
            ({"images": ["0.png"]}, "pictures do not fit", "set, row 0: 3 pictures in the text but 1 in `images`"),
            ({"images": None}, "pictures do not fit", "3 pictures in the text but 0 in `images`"),
            (
                {"conversations": SHAREGPT["conversations"][:2], "images": ["0.png", "1.png"]},
                "no assistant turn",
                "set, row 0: no turn is the model's",
            ),
            ({"conversations": [], "images": []}, "no assistant turn", "no turn is the model's"),
            ({"conversations": None, "images": []}, "no assistant turn", "no turn is the model's"),
            (
                {"conversations": [{"from": "bot", "value": "hi"}], "images": []},
                "unknown role",
                "set, row 0: a turn has the role 'bot'",
            ),
            (
                {"conversations": [{"from": "gpt", "value": "<image>"}], "images": ["0.png"]},
                "picture in an assistant turn",
                "set, row 0: a turn of the model's shows a picture",
            ),
            (
                {"conversations": [{"from": "gpt", "value": ""}], "images": []},
                None,  # an empty answer is an answer: its end is learned
                None,
            ),
        ],
    )
    def test_rows_that_cannot_be_used(self, encoder, folder, change, reason, message):
        row = {**SHAREGPT, **change}
        if reason is None:
            assert sum(conversation_of(encoder, row, folder).mask) == 1
            return
        with pytest.raises(Unusable, match=message) as caught:
            conversation_of(encoder, row, folder)
        assert caught.value.reason == reason

    def test_a_missing_picture_is_named(self, encoder, folder):
        row = {**SHAREGPT, "images": ["0.png", "1.png", "gone.png"]}
        with pytest.raises(ItemError, match="set, row 0, image 3 .*gone.png.*does not exist"):
            conversation_of(encoder, row, folder)

    def test_columns_of_something_else_are_an_error(self, encoder):
        rows = datasets.Dataset.from_list([{"text": "a"}])
        with pytest.raises(ValueError, match=r"set has the columns \['text'\]: conversations are read"):
            MessageConversations(rows, encoder, PRESET, name="set")


class TestLoading:
    @pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
    def test_a_file_beside_its_pictures(self, encoder, folder, suffix):
        path = folder / f"train.{suffix}"
        if suffix == "json":
            path.write_text(json.dumps([SHAREGPT, SHAREGPT], indent=1), encoding="utf-8")
        elif suffix == "jsonl":
            path.write_text(2 * (json.dumps(SHAREGPT) + "\n"), encoding="utf-8")
        else:
            datasets.Dataset.from_list([SHAREGPT, SHAREGPT]).to_parquet(str(path))
        conversations = load_conversations(path, encoder, PRESET)
        assert len(conversations) == 2
        assert conversations[1].token_ids == conversation_of(encoder, SHAREGPT, folder).token_ids
        with pytest.raises(ItemError, match="/elsewhere/0.png"):
            load_conversations(path, encoder, PRESET, image_root="/elsewhere")[0]

    def test_a_picture_elsewhere(self, encoder, folder, tmp_path):
        (tmp_path / "moved").mkdir()
        (tmp_path / "moved" / "train.json").write_text(json.dumps([SHAREGPT]), encoding="utf-8")
        row = {**SHAREGPT, "images": [str(folder / name) for name in SHAREGPT["images"]]}
        (tmp_path / "moved" / "train.json").write_text(json.dumps([row]), encoding="utf-8")
        with pytest.raises(ItemError, match="train.json, row 0, image 1: the picture '.*' lies outside of image_root"):
            load_conversations(tmp_path / "moved" / "train.json", encoder, PRESET)[0]
        assert load_conversations(tmp_path / "moved" / "train.json", encoder, PRESET, image_root=folder)[0].images

    def test_a_folder_of_records(self, encoder, records, tmp_path):
        write_records(tmp_path, records)
        conversations = load_conversations(tmp_path, encoder, PRESET)
        assert [conversation.source for conversation in conversations] == ["stored"] * 4
        assert conversations[2].token_ids == records[2].trajectory.token_ids

    def test_a_missing_file(self, encoder, tmp_path):
        with pytest.raises(FileNotFoundError, match="gone.json does not exist"):
            load_conversations(tmp_path / "gone.json", encoder, PRESET)


def test_an_example_may_have_no_pictures_at_all(encoder):
    example = RerankExample("q", Item(text="q"), [Item(text="a"), Item(text="b"), Item(text="c")], [1])
    record, _ = played(encoder, [ANSWER], example)
    conversation = TrajectoryConversations([record], encoder, PRESET)[0]
    assert conversation.images == [] and conversation.source == "stored"
