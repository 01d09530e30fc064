"""The worked example's training: its tokenizer, its rows, its quick way through the model, and its loop."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "emoji"))

from art import ARTISTS, SIZE
from cases import View, disguise
from choices import choice_share
from emoji_toy import MERGED, TOY, WHOLE, data, model, processor, ranks, source, table
from examples import Drawing, Entry, Placed, Scene
from intervals import wilson
from locating import PLACE_WEIGHT, ask, close_up, point_out, thinned
from model import (
    change_looks,
    embed,
    embed_parts,
    encode_group,
    encode_pictures,
    fused_norms,
    losses_of,
    make_model,
    num_parameters,
    patches_of,
    render_group,
    target_losses,
    tiny_config,
)
from preset import MAX_TURN_TOKENS, PRESET
from rows import NUM_LOOKS, Picture, PictureGroup, RowMaker, by_length, collate, share_pictures, token_positions
from scenes import place_name, place_phrase
from searching import aim_box, box_around, in_view
from stages import COLD_START, SFT_TASKS, Feed, Source
from tokenizer import SPECIAL_TOKENS, VISIBLE_TOKENS, make_tokenizer, merges_of
from train_tiny import Paused, Plan, Trainer, save_model
from trajectories import Oracle

from vretrver_hf.encoding import Encoder
from vretrver_hf.images import ImageRef
from vretrver_hf.parsing import parse_turn
from vretrver_hf.protocol import format_answer, format_call
from vretrver_hf.reranker import bundled_model


def _trajectories(source: Source, count: int, seed: int = 0):
    """Cases with the oracle's conversations about them, all tasks in turn."""
    rng = random.Random(seed)
    for number in range(count):
        task = tuple(SFT_TASKS)[number % len(SFT_TASKS)]
        (example,) = source._makers[task].make(1, seed + number)
        case = source.cases.varied(example, rng, mixed=0.3)
        record = source.oracle.play(case, rng)
        yield case, record.messages, record.pictures


def _pixels(table: torch.Tensor, picture: Picture) -> Image.Image:
    group = _group(picture)
    return Image.fromarray(render_group(group.to("cpu"), table)[0].permute(1, 2, 0).to(torch.uint8).numpy())


def _group(picture: Picture) -> PictureGroup:
    return PictureGroup.of([picture], [np.zeros(picture.num_tokens, np.int64)])


def _plain_inputs(processor, table, row) -> dict[str, torch.Tensor]:
    """What the plain model takes for one row, its pictures through the plain image processor."""
    ids = torch.from_numpy(row.ids).long()[None]
    images = [_pixels(table, picture) for picture in row.pictures]
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == processor.image_token_id).int()}
    return inputs | dict(processor.image_processor(images, return_tensors="pt")) if images else inputs


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_merges_join_the_two_parts_that_lower_ranks_leave():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"abc": 4, b"bc": 5}
    # "abc" (4) is made of "ab" (3) and "c"; "bc" (5) comes too late to matter for it
    assert merges_of(ranks) == [(b"a", b"b"), (b"ab", b"c"), (b"b", b"c")]


def test_a_rank_of_three_parts_is_refused():
    with pytest.raises(ValueError, match="joins more than two parts"):
        merges_of({b"a": 0, b"b": 1, b"c": 2, b"abc": 3})  # no rank makes "ab" or "bc"


def test_control_tokens_are_single_and_calls_stay_visible(processor):
    tokenizer = processor.tokenizer
    for token in SPECIAL_TOKENS + VISIBLE_TOKENS:
        assert tokenizer.tokenize(f"a{token}b") == ["a", token, "b"]
    text = "<tool_call>x</tool_call><|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "<tool_call>x</tool_call>"
    assert len(tokenizer.tokenize("<think>")) > 1
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_saved_processor_has_the_budgets_and_the_template(processor):
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (56 * 56, PRESET.inspect_pixels)
    assert (processor.image_processor.patch_size, processor.image_processor.merge_size) == (14, 2)
    assert "<think>" not in processor.tokenizer.get_vocab()
    assert processor.tokenizer.chat_template == processor.chat_template


_FULL, _CUT = make_tokenizer(ranks()), make_tokenizer(ranks(limit=270))


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_any_text_survives_the_round_trip(text):
    # The real vocabulary normalises to NFC, so only text that is NFC already comes back as it was.
    normal = _CUT.backend_tokenizer.normalizer.normalize_str(text)
    assert _CUT.decode(_CUT.encode(text), clean_up_tokenization_spaces=False) == normal


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*MERGED, "x", " ", "é"])).map("".join))
def test_ids_agree_with_the_whole_vocabulary_where_its_merges_lie_below_the_cut(text):
    whole = _FULL.encode(text)
    if all(token < 270 for token in whole):
        assert _CUT.encode(text) == whole


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_equal_the_chat_template(source, processor):
    encoder = Encoder(processor, "qwen2_5_vl")
    for case, messages, pictures in _trajectories(source, 24):
        row = source.rows.row(messages, pictures)
        refs = [ImageRef(0, *picture.size) for picture in pictures]
        images = [Image.new("RGB", picture.size) for picture in pictures]
        # TRL and the agent loop get the same ids as the template's rendering ...
        encoded = encoder._encode(encoder._render(messages), images, refs)
        assert row.ids.tolist() == encoded.token_ids
        # ... and so does plain transformers.
        text = processor.apply_chat_template(messages, tokenize=False)
        plain = processor(text=[text], images=images or None)
        assert row.ids.tolist() == list(plain["input_ids"][0])
        assert len(case.candidates) >= 2


def test_the_mask_is_what_the_model_samples(source, processor):
    kinds = set()
    for _, messages, pictures in _trajectories(source, 60, seed=5):
        row = source.rows.row(messages, pictures)
        learned = processor.tokenizer.decode(row.ids[row.weights > 0], clean_up_tokenization_spaces=False)
        expected = ""
        for message in messages:
            if message["role"] == "assistant" and message["loss"]:
                call = message["content"].endswith("</tool_call>")
                expected += message["content"] + ("" if call else "<|im_end|>")
                kinds.add("call" if call else "answer")
            elif message["role"] == "assistant":
                kinds.add("mistake")
        assert learned == expected
    assert kinds == {"call", "answer", "mistake"}


def test_the_template_marks_the_same_tokens(source, processor):
    for _, messages, pictures in _trajectories(source, 12, seed=9):
        row = source.rows.row([{**message, "loss": True} for message in messages], pictures)
        text_only = [m if m["role"] == "assistant" else {**m, "content": _words(m["content"])} for m in messages]
        inputs = processor.tokenizer.apply_chat_template(
            text_only, return_dict=True, return_assistant_tokens_mask=True
        )
        # Pictures are left out here, since they are never the model's own tokens.
        assert sum(inputs["assistant_masks"]) == (row.weights > 0).sum()


def _words(content):
    return content if isinstance(content, str) else [block for block in content if block["type"] == "text"]


def test_choices_weigh_more(processor):
    maker = RowMaker(processor.tokenizer.backend_tokenizer)

    def heavy(content: str) -> str:
        row = maker.row([{"role": "assistant", "content": content}], [], choice_weight=4.0)
        return processor.tokenizer.decode(row.ids[row.weights == 4.0])

    # The thought's numbers digit by digit, then the answer's first.
    assert heavy("<think>2 and 14 fit.</think>\n" + format_answer([1, 0, 2])) == "2142"
    assert heavy("<think>3?</think>\n" + format_call("select_images", {"target_images": [3]})) == "3"
    assert heavy("the keycap 5") == ""


def test_verdicts_weigh_more():
    maker = RowMaker(AutoProcessor.from_pretrained(bundled_model()).tokenizer.backend_tokenizer)
    content = "<think>2 shows three-thirty: no; 1 shows 6: yes.</think>\n" + format_answer([0, 1])
    row = maker.row([{"role": "assistant", "content": content}], [], choice_weight=4.0)
    heavy = [maker.tokenizer.decode([token]) for token in row.ids[row.weights == 4.0]]
    assert heavy == ["2", " no", "1", "6", " y", "1"]


def test_positions_equal_the_models_own(source, model, processor):
    for _, messages, pictures in _trajectories(source, 9, seed=2):
        row = source.rows.row(messages, pictures)
        ids = torch.from_numpy(row.ids).long()[None]
        grids = [[1, picture.size[1] // 14, picture.size[0] // 14] for picture in pictures]
        expected, _ = model.model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == processor.image_token_id).int(),
            image_grid_thw=torch.tensor(grids) if grids else None,
        )
        assert token_positions(row, processor.image_token_id).tolist() == expected[:, 0].tolist()


def test_as_many_pictures_as_pads(source):
    message = {"role": "user", "content": [{"type": "image"}]}
    with pytest.raises(ValueError, match="shows 1 pictures but 0 were given"):
        source.rows.row([message], [])


def test_parts_hold_every_row_and_no_more_tokens_than_allowed(source):
    rows = [source.rows.row(messages, pictures) for _, messages, pictures in _trajectories(source, 12)]
    longest = max(len(row.ids) for row in rows)
    parts = by_length(rows, 3 * longest)
    assert sorted(place for part in parts for place in part) == list(range(12))
    assert all(len(part) * max(len(rows[place].ids) for place in part) <= 3 * longest for part in parts)


def test_batches_depend_on_seed_stage_and_number_alone(source, data):
    other = Source(data, data / "processor")
    for stage in ("stage0", "sft"):
        one, two = source.batch(stage, 3, 6), other.batch(stage, 3, 6)
        assert [part.ids.tolist() for part in one] == [part.ids.tolist() for part in two]
        assert [part.ids.tolist() for part in one] != [part.ids.tolist() for part in source.batch(stage, 4, 6)]


def test_workers_make_what_the_source_makes(source):
    feed = Feed(source, workers=1)
    try:
        batches = feed.batches("stage0", 4, start=2)
        for number in (2, 3, 4, 5):
            expected = source.batch("stage0", number, 4)
            assert [part.ids.tolist() for part in next(batches)] == [part.ids.tolist() for part in expected]
    finally:
        feed.close()


def test_processes_share_out_each_steps_rows(source):
    shares = [Feed(source, workers=0).batches("stage0", 8, start=3, rank=rank, ranks=2) for rank in (0, 1)]
    for numbers in ((6, 7), (8, 9)):  # steps 3 and 4
        for number, share in zip(numbers, shares, strict=True):
            expected = source.batch("stage0", number, 4)
            assert [part.ids.tolist() for part in next(share)] == [part.ids.tolist() for part in expected]


def test_the_first_examples_are_easy_and_have_few_candidates(source):
    def counts(first: bool) -> set[int]:
        source_rows = source._draw_examples(SFT_TASKS, 60, random.Random(0), 0.0, few=first)
        return {len(example.candidates) for example, _ in source_rows}

    assert counts(True) == {2, 3} and max(counts(False)) > 3


def test_a_disguise_keeps_the_question_and_takes_the_names(source):
    (example,) = source._makers["i2i"].make(1, 3)
    case = source.cases.plain(example)
    hidden = disguise(case, 5)
    assert hidden.relevance == case.relevance and all(side.concept is None for side in hidden.sides)
    for side, before in zip(hidden.sides, case.sides, strict=True):
        assert side.view.within(84 * 84) == dataclasses.replace(before.view.within(84 * 84), look=5)


def test_looks_by_hand():
    pixels = torch.arange(6.0).view(1, 3, 1, 2).repeat(3, 1, 1, 1)
    as_drawn, mirrored, swapped = change_looks(pixels, torch.tensor([0, 1, 4])).tolist()
    assert as_drawn == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert mirrored == [[[1, 0]], [[3, 2]], [[5, 4]]]
    assert swapped == [[[0, 1]], [[4, 5]], [[2, 3]]]
    over, both = change_looks(pixels.view(3, 3, 2, 1)[:2], torch.tensor([2, 3])).tolist()
    assert over == both == [[[1], [0]], [[3], [2]], [[5], [4]]]


def test_disguised_pictures_reach_the_model_in_disguise(source, table):
    picture = Picture(((0, WHOLE),), (56, 56))
    groups = [_group(dataclasses.replace(picture, look=look)) for look in range(NUM_LOOKS)]
    assert groups[0].looks is None
    identity = torch.nn.Identity()
    with mock.patch("model.encode_pictures", lambda _, patches, size: patches):
        seen = [encode_group(identity, group.to("cpu"), table) for group in groups]
    assert len({tuple(patches.flatten().tolist()) for patches in seen}) == NUM_LOOKS


# --- trajectories ----------------------------------------------------------------------------------------------------


def test_the_oracle_speaks_the_protocol_and_is_right(source):
    calls = []
    for case, messages, pictures in _trajectories(source, 150, seed=1):
        turns = [message for message in messages if message["role"] == "assistant"]
        parsed = [parse_turn(turn["content"]) for turn in turns]
        assert all(p.well_formed for p, turn in zip(parsed, turns, strict=True) if turn["loss"])
        if not case.kind.startswith("detail"):  # those may end before the right one is found
            assert parsed[-1].answer == format_answer(case.order)[len("<answer>") : -len("</answer>")]
        assert len(case.order) == len(case.candidates) and case.relevance[case.order[0]] == 3
        assert len(turns) <= PRESET.max_calls + 2
        blocks = [block for m in messages if isinstance(m["content"], list) for block in m["content"]]
        assert sum(block["type"] == "image" for block in blocks) == len(pictures)
        calls.append(sum(p.kind == "call" for p, turn in zip(parsed, turns, strict=True) if turn["loss"]))
    assert set(calls) >= {0, 1, 2}
    assert 0.3 < sum(count > 0 for count in calls) / len(calls) < 0.8


def test_learned_calls_are_valid(source):
    for _, messages, _ in _trajectories(source, 80, seed=4):
        for message, reply in zip(messages, messages[1:], strict=False):
            if message["role"] == "assistant" and message["loss"]:
                assert any(block["type"] == "image" for block in reply["content"])


def test_two_rivals_are_told_apart_in_words(source):
    by_name = {concept.name: code for code, concept in source.concepts.items()}
    artist = ARTISTS[0]
    example = source._makers["t2i"].make(1, 0)[0]
    shown = ["fox", "woman cook: tone 2", "dog", "woman cook: tone 5"]
    example.query, example.positive = Entry("a woman cook with dark skin", None, by_name[shown[3]]), 3
    example.candidates = [Entry(None, Drawing(artist, by_name[name]), by_name[name]) for name in shown]
    example.relevance = [0, 2, 0, 3]
    count_words = lambda text: len(text.split())  # noqa: E731 (the toy tokenizer has few words)
    oracle = Oracle(source.concepts, count_words, source.likeness)
    texts = set()
    for seed in range(40):
        messages = oracle.play(source.cases.plain(example), random.Random(seed)).messages
        texts |= {message["content"].split("</think>")[0] for message in messages if message["role"] == "assistant"}
    assert "<think>2 and 4 show a woman cook; 4 has dark skin." in texts
    assert "<think>2 and 4 show a woman cook; check the skin." in texts
    assert "<think>4 has dark skin." in texts


def _searches(source, count):
    """Detail scenes with the turns of their search: the candidates whose target came into view, and the last turn."""
    for number, example in enumerate(source._makers["detail"].make(count, 11)):
        case = source.cases.plain(example)
        messages = source.oracle.play(case, random.Random(number)).messages
        turns = [parse_turn(message["content"]) for message in messages if message["role"] == "assistant"]
        tools, read = case.tools(), []
        for turn in turns:
            if turn.kind == "call" and turn.call.name == "crop_image":
                target = turn.call.arguments["target_image"]
                (ref,) = tools.call("crop_image", turn.call.arguments).refs or [None]  # a mistake shows nothing
                if ref is not None and in_view(case.candidates[target - 1].scene, ref.box):
                    read.append(target)
        yield case, read, turns


def test_a_search_concludes_from_what_it_saw(source):
    found = went_on = missed = 0
    for case, read, turns in _searches(source, 300):
        best, order = case.order[0] + 1, json.loads(f"[{turns[-1].answer.strip('[]')}]")
        assert sorted(order) == list(range(1, 6))
        if not read:
            continue
        unread = [number for number in range(1, 6) if number not in read]
        assert order == [best] * (best in read) + unread + [number for number in read if number != best]
        found += best in read
        went_on += best in read[:-1]
        missed += any(turn.thought and " there; maybe " in turn.thought for turn in turns)
    assert 130 < found < 230 and went_on > 30  # there is no stopping rule
    assert missed > 50


def test_looks_at_the_wrong_thing_are_shown_and_looking_elsewhere_is_learned(source):
    misses = places = 0
    for number, example in enumerate(source._makers["detail"].make(200, 12)):
        case = source.cases.plain(example)
        messages = source.oracle.play(case, random.Random(number)).messages
        written = [message for message in messages if message["role"] == "assistant"]
        turns, tools = [parse_turn(message["content"]) for message in written], case.tools()
        for turn, after, message, later in zip(turns, turns[1:], written, written[1:], strict=False):
            if not after.thought or " there; maybe " not in after.thought or after.kind != "call":
                continue
            scene = case.candidates[turn.call.arguments["target_image"] - 1].scene
            first, second = (tools.call("crop_image", one.call.arguments).refs[0].box for one in (turn, after))
            assert not in_view(scene, first) and in_view(scene, second)
            assert not message["loss"] and later["loss"]
            assert place_phrase(scene, scene.target) in after.thought
            misses += 1
            places += place_phrase(scene, scene.target) not in turn.thought  # what it took for it stood elsewhere
            if case.kind.endswith("/place"):
                assert place_phrase(scene, scene.target) in turn.thought or "shows" in turn.thought
    assert misses > 30 and places > 5


def test_aimed_boxes_show_the_target_and_others_seldom(source):
    rng = random.Random(3)
    for example in source._makers["detail"].make(50, 5):
        case = source.cases.plain(example)
        scene, tools = case.candidates[0].scene, case.tools()
        seen = [tools.crop_image(aim_box(scene, rng), 1).refs[0].box for _ in range(4)]
        assert all(in_view(scene, box) for box in seen)
        shares = [(box[2] - box[0]) / scene.side for box in seen]
        assert max(shares) < 0.32  # a crop shows one thing closely
        best = tools.crop_image(box_around(scene.objects[scene.target], scene), 1).refs[0].box
        assert in_view(scene, best)
    assert not in_view(scene, (0, 0, 1, 1))


def test_boxes_lie_on_a_grid_within_the_scene():
    scene = Scene((Placed(Drawing("noto", "1f550"), 960, 504, 42),), 0, 1008)  # middle at 0.973, 0.521
    assert box_around(scene.objects[0], scene) == [0.8, 0.4, 1.0, 0.6]  # four steps of 0.05, not beyond the edge
    large = Scene((Placed(Drawing("noto", "1f550"), 60, 372, 276),), 0, 1008)  # 1.2 of its side are 6.57 steps
    assert box_around(large.objects[0], large) == [0.0, 0.35, 0.35, 0.7]


def test_places_and_names_in_scenes(source):
    rng, asked = random.Random(0), collections.Counter()
    for example in source._makers["overview"].make(60, 2):
        scene = thinned(example.candidates[0].image, rng.choice((1, 2, 4, None)), rng)
        target = scene.objects[scene.target]
        concept = source.concepts[target.drawing.code]
        question, *follow_up = ask(scene, source.concepts, rng, reduced=True)
        kind = question[0].split()[0]
        asked[kind] += 1
        name = question[0][9:-1] if kind == "Where" else question[1]
        box = follow_up[0][1] if kind == "Where" else question[0][11:-1]
        assert json.loads(box) == box_around(target, scene)
        assert name == "a clock" if concept.base == "clock" else concept.noun in name
        assert len(follow_up) == (kind == "Where") and (question[2] == PLACE_WEIGHT) == (kind == "Where")
        if kind == "Where":
            assert question[1] == place_name(scene, scene.target)
    assert min(asked.values()) > 15 and len(asked) == 2


def test_a_thinned_scene_keeps_its_layout(source):
    rng = random.Random(1)
    (example,) = source._makers["detail"].make(1, 2)
    whole = example.candidates[0].image
    assert set(thinned(whole, None, rng).objects) == set(whole.objects)
    few = [thinned(whole, 2, rng) for _ in range(60)]
    assert all(len(set(scene.objects)) == 2 and set(scene.objects) < set(whole.objects) for scene in few)
    about = sum(scene.objects[scene.target] == whole.objects[whole.target] for scene in few)
    assert 20 < about < 50  # half of them, and by chance


@pytest.mark.parametrize("form", ["ask_row", "close_row"])
@pytest.mark.parametrize("kind", ["overview", "detail"])
def test_a_question_comes_before_its_picture(source, form, kind):
    """The parts of a picture that is read can be compared with what was asked before."""
    row = getattr(source, form)(kind, random.Random(2))
    text = source.rows.tokenizer.decode(row.ids.tolist(), skip_special_tokens=False)
    before = re.findall(r"<\|im_start\|>user\n([^<]*)<\|vision_start\|>", text)
    assert len(before) == len(row.pictures) == text.count("<|vision_start|>") == 4
    assert all(re.match(r"(Where is .*|What is (at \[.*\]|in the middle))\?$", question) for question in before)


def test_pointing_at_what_a_query_asks_for(source):
    rng, pointed, hints = random.Random(3), set(), 0
    for task in ("overview", "detail"):
        for example in source._makers[task].make(30, 3):
            case = source.cases.plain(example)
            (question, *_), *_ = exchanges = point_out(case, rng, source.likeness)
            number = int(re.search(r"in (\d)\?", question)[1])
            scene = case.candidates[number - 1].scene
            if wrong := re.match(r"It is not in (\[.*?\])\. ", question):
                assert not in_view(scene, [scene.side * edge for edge in json.loads(wrong[1])])
                hints += 1
            assert json.loads(exchanges[-1][1]) == box_around(scene.objects[scene.target], scene)
            if case.kind.endswith("/place"):
                assert len(exchanges) == 1  # a place that the query names could be copied
            else:
                assert exchanges[0][1:] == (place_name(scene, scene.target), PLACE_WEIGHT)
            assert task == "detail" or number - 1 == case.order[0]  # the others may not show it there, or at all
            pointed.add(number)
    assert pointed == {1, 2, 3, 4, 5}
    assert 12 < hints < 36  # two in five of sixty


def test_crops_are_read_and_what_follows_is_concluded(source):
    rng, best_read = random.Random(4), 0
    for example in source._makers["detail"].make(100, 4):
        case = source.cases.plain(example)
        row = source.read_row(case, rng, "no tools")
        text = source.rows.tokenizer.decode(row.ids.tolist(), skip_special_tokens=False)
        best = case.order[0] + 1
        verdicts = dict(re.findall(r"<think>(\d) shows [^\n]*: (yes|no)\.<", text))
        assert verdicts == {number: "yes" if int(number) == best else "no" for number in verdicts}
        (order,) = re.findall(r"<answer>\[(.*?)\]</answer><", text)
        first = order.split(", ")[0]
        assert first == str(best) if str(best) in verdicts else first not in verdicts
        assert len(row.pictures) == 5 + len(verdicts)
        best_read += str(best) in verdicts
    assert 62 < best_read < 88  # 2.5 of 5 by chance, and half of the others


def test_sft_rehearses_under_a_prompt_of_its_own(source, monkeypatch):
    """Under the protocol's prompts SFT shows thoughts and calls only; an answer at once would contradict them."""
    asked = []
    monkeypatch.setattr(type(source.rows), "row", lambda self, messages, *args, **kwargs: asked.append(messages))

    def systems() -> set[str]:
        """The system prompts under which candidates are ranked, of which the first words tell."""
        ranked = [messages for messages in asked if "Rank all" in str(messages[1]["content"])]
        return {
            re.search(r"Answer at once|for a query\. Tools|for a query", str(messages[0]))[0] for messages in ranked
        }

    source._stage0_rows(80, random.Random(1), rehearsed=True)
    assert systems() == {"Answer at once"}
    asked.clear()
    source._stage0_rows(80, random.Random(1))
    assert systems() == {"Answer at once", "for a query. Tools", "for a query"}


def test_a_close_up_is_what_a_crop_shows(source, table):
    (example,) = source._makers["detail"].make(1, 4)
    case = source.cases.plain(example)
    close = close_up(case, random.Random(1))
    for side in close.candidates:
        assert max(side.view.size) < 0.32 * 1008 and len(side.view.layers) <= 3
        picture = np.asarray(_pixels(table, side.view.within(PRESET.inspect_pixels)))
        assert (picture < 200).mean() > 0.01  # the clock is in it


def test_every_trajectory_of_the_cold_start_comes_once_an_epoch(source):
    places = [place for batch in range(5) for place in source._shuffled(batch * 2000, batch * 2000 + 2000)]
    assert sorted(places[:COLD_START]) == sorted(places[COLD_START:]) == list(range(COLD_START))
    assert places[:COLD_START] != places[COLD_START:]
    one, two = source.cold_start(7), source.cold_start(7)
    assert one.ids.tolist() == two.ids.tolist() != source.cold_start(8).ids.tolist()


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ref",
    [
        ImageRef(0, 84, 84),
        ImageRef(0, 140, 140),
        ImageRef(0, 196, 168),
        ImageRef(0, 84, 56, box=(11, 30, 140, 101)),
        ImageRef(0, 112, 112, box=(100, 90, 140, 130)),
    ],
)
def test_pictures_are_what_the_tools_render(table, ref):
    row = 7
    expected = ref.render(Image.fromarray(table[row].numpy()))
    found = _pixels(table, View(((row, WHOLE),)).shown(ref))
    _assert_alike(found, expected)


def _assert_alike(found: Image.Image, expected: Image.Image) -> None:
    """Equal but for the last level, which Pillow rounds in integers."""
    difference = np.abs(np.asarray(found, int) - np.asarray(expected, int))
    assert difference.max() <= 1 and difference.mean() < 0.1


def test_beyond_its_edges_a_picture_is_white(table):
    wide = View(((3, (-84, 0, SIZE + 84, SIZE)),), size=(336, 168))
    canvas = Image.new("RGB", (336, 168), "white")
    canvas.paste(Image.fromarray(table[3].numpy()), (84, 0))
    ref = ImageRef(0, 112, 56)
    _assert_alike(_pixels(table, wide.shown(ref)), ref.render(canvas))


def test_a_region_of_an_original_is_that_region_of_what_is_stored():
    view = View(((0, (-84, 0, SIZE + 84, SIZE)),), size=(672, 336))  # stored pixels are two of the original
    picture = view.shown(ImageRef(0, 56, 84, box=(168, 100, 368, 300)))
    assert picture == Picture(((0, (0.0, 50.0, 100.0, 150.0)),), (56, 84))


@pytest.mark.parametrize(
    "ref",
    [
        ImageRef(0, 84, 84),
        ImageRef(0, 56, 56),
        ImageRef(0, 140, 140),
        ImageRef(0, 140, 140, box=(590, 40, 790, 240)),  # one drawing whole, another cut
        ImageRef(0, 84, 140, box=(0, 0, 100, 160)),  # nothing in it
    ],
)
def test_a_scene_is_what_the_tools_render_of_it(source, table, ref):
    codes = source.art.codes[ARTISTS[0]]
    places = [(0, 300, 56), (640, 80, 48), (780, 180, 56), (600, 800, 300), (956, 952, 52)]
    objects = tuple(Placed(Drawing(ARTISTS[0], codes[n]), *place) for n, place in enumerate(places))
    canvas = Image.new("RGB", (1008, 1008), "white")
    for drawing, left, top, side in objects:
        stored = Image.fromarray(table[source.cases.row(*drawing)].numpy())
        canvas.paste(stored.resize((side, side), Image.Resampling.BICUBIC), (left, top))
    view = source.cases.view_of(Scene(objects, 0, 1008))
    found, expected = (np.asarray(picture, int) for picture in (_pixels(table, view.shown(ref)), ref.render(canvas)))
    # The scene is resized twice on its way and the layers once, so that edges differ a little.
    difference = np.abs(found - expected)
    assert difference.mean() < 1 and difference[expected < 255].sum() <= 12 * (expected < 255).sum()
    assert (expected == 255).all() == (found == 255).all()


# --- the quick way through the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(84, 84), (112, 112), (56, 112), (140, 84)])
def test_the_batched_tower_equals_the_plain_one(model, processor, table, size):
    pictures = [Picture(((row, WHOLE),), size) for row in range(3)]
    images = [_pixels(table, picture) for picture in pictures]
    plain = processor.image_processor(images, return_tensors="pt")
    group = PictureGroup.of(pictures, [np.zeros(pictures[0].num_tokens, np.int64)] * 3)
    patches = patches_of(render_group(group.to("cpu"), table))
    with torch.no_grad():
        expected = torch.stack(model.model.get_image_features(**plain).pooler_output)
        found = encode_pictures(model.model.visual, patches, size)
    assert patches.shape[1] * 4 == 4 * (size[0] // 14) * (size[1] // 14)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_equals_the_plain_models(source, model, processor, table, fused):
    rows = [source.rows.row(messages, pictures) for _, messages, pictures in _trajectories(source, 5, seed=6)]
    batch = collate(rows, source.rows.image_pad).to("cpu")
    with torch.no_grad():
        if fused:
            with fused_norms():
                losses, _ = target_losses(model, batch, table)
        else:
            losses, _ = target_losses(model, batch, table)
        expected = []
        for row in rows:
            labels = torch.from_numpy(np.where(row.weights > 0, row.ids, -100)).long()[None]
            expected.append(model(**_plain_inputs(processor, table, row), labels=labels).loss.item())
    counts = [int((row.weights > 0).sum()) for row in rows]
    mean = sum(loss * count for loss, count in zip(expected, counts, strict=True)) / sum(counts)
    assert losses.mean().item() == pytest.approx(mean, abs=1e-4)


def test_padding_changes_nothing(source, model, table):
    row = source.trajectory_row(*[(case, random.Random(0)) for case, *_ in _trajectories(source, 1)][0])
    pad = source.rows.image_pad
    short = collate([row], pad, multiple=1).to("cpu")
    long = collate([row], pad, multiple=1024).to("cpu")
    with torch.no_grad():
        torch.testing.assert_close(
            target_losses(model, short, table)[0], target_losses(model, long, table)[0], rtol=0, atol=1e-4
        )


def test_parts_that_share_the_tower_have_the_same_gradients(source, model, table):
    rng = random.Random(5)
    rows = [source.caption_row(rng), source.locate_row(rng)]
    rows += [
        source.choice_row(disguise(source.cases.plain(example), 3), rng)
        for example in source._makers["i2i"].make(2, 1)
    ]
    parts = [collate(rows[:1], source.rows.image_pad), collate(rows[1:], source.rows.image_pad)]

    def gradients(losses) -> list[torch.Tensor]:
        model.zero_grad()
        for loss in losses:
            loss.backward()
        return [weight.grad.clone() for weight in model.parameters()]

    apart = gradients(
        (target_losses(model, part.to("cpu"), table)[0] * part.to("cpu").weights).sum() for part in parts
    )
    bare, groups = share_pictures(parts)
    assert len(groups) == len({group.size for part in parts for group in part.groups})
    bare, groups = [part.to("cpu") for part in bare], [group.to("cpu") for group in groups]
    pieces = embed_parts(model, bare, groups, table).split([part.ids.numel() for part in bare])
    pieces = [piece.view(*part.ids.shape, -1) for piece, part in zip(pieces, bare, strict=True)]
    together = gradients(
        [sum((losses_of(model, e, p)[0] * p.weights).sum() for e, p in zip(pieces, bare, strict=True))]
    )
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    model.zero_grad()


def test_gradients_reach_the_tower_through_its_pictures(source, model, table):
    batch = collate([source.caption_row(random.Random(0))], source.rows.image_pad).to("cpu")
    model.zero_grad()
    target_losses(model, batch, table, augment=True)[0].sum().backward()
    kernel = model.model.visual.patch_embed.proj.weight
    assert kernel.grad.abs().sum() > 0
    assert embed(model, batch, table).shape == (*batch.ids.shape, 64)
    model.zero_grad()


# --- the model and the loop ------------------------------------------------------------------------------------------


def test_the_real_size_is_small_enough():
    tokenizer = make_tokenizer(ranks())
    config = tiny_config(tokenizer, vocab_size=8202)  # the real vocabulary's size
    with torch.device("meta"):
        count = num_parameters(Qwen2_5_VLForConditionalGeneration(config))
    assert 11_000_000 < count <= 12_000_000 and 2 * count <= 24_000_000
    assert sum(config.text_config.rope_parameters["mrope_section"]) == 320 // 5 // 2


def test_a_few_steps_learn_and_a_resumed_run_goes_on(source, processor, table, tmp_path):
    model = make_model(tiny_config(processor.tokenizer, **TOY))
    fixed = source.parts(source._stage0_rows(8, random.Random(0)))  # a stage's own batches are filled up to 32 rows
    plan = Plan("stage0", minutes=10, lr=3e-3, warmup=1e-6, max_steps=3)
    trainer = Trainer(model, table, plan, tmp_path / "checkpoint.pt")
    before = _loss(model, fixed, table)
    trainer.train(iter([fixed] * 3))
    assert trainer.step == 3
    assert _loss(model, fixed, table) < before - 0.1
    again = make_model(tiny_config(processor.tokenizer, **TOY), seed=1)
    resumed = Trainer(again, table, plan, tmp_path / "checkpoint.pt")
    assert resumed.resume() and resumed.step == 3 and resumed.spent == trainer.spent
    assert _loss(again, fixed, table) == pytest.approx(_loss(model, fixed, table), abs=1e-5)


def test_a_paused_run_goes_on_where_it_stopped(source, processor, table, tmp_path):
    config = tiny_config(processor.tokenizer, **{**TOY, "num_hidden_layers": 1})
    plan = Plan("stage0", minutes=10, lr=1e-3, max_steps=3)
    model = make_model(config)
    with pytest.raises(Paused, match="after step 1; go on with --resume"):
        Trainer(model, table, plan, tmp_path / "checkpoint.pt", pause_at=0.0).train(source_batches(source, 0))
    again = Trainer(make_model(config, seed=1), table, plan, tmp_path / "checkpoint.pt")
    assert again.resume() and again.step == 1
    again.train(source_batches(source, again.step))
    assert again.step == 3
    for name, weight in again.model.state_dict().items():
        assert weight.isfinite().all(), name


def source_batches(source, start):
    return Feed(source, workers=0).batches("stage0", 4, start)


def _loss(model, parts, table) -> float:
    with torch.no_grad():
        losses = [target_losses(model, part.to("cpu"), table)[0] for part in parts]
    return torch.cat(losses).mean().item()


def test_sft_leaves_the_tower_alone(source, processor, model, table):
    tower = {name: weight.clone() for name, weight in model.model.visual.state_dict().items()}
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = Trainer(model, table, Plan("sft", minutes=10, lr=1e-3, warmup=1e-6, max_steps=1))
    trainer.train(iter([source.batch("sft", 0, 2)]))
    assert all(torch.equal(weight, tower[name]) for name, weight in model.model.visual.state_dict().items())
    assert not torch.equal(model.lm_head.weight, kept["lm_head.weight"])
    model.load_state_dict(kept)
    model.requires_grad_(True).eval()


def test_training_ends_with_the_clock(source, model, table):
    plan = Plan("stage0", minutes=0, lr=1e-3)
    trainer = Trainer(model, table, plan)
    assert trainer.train(iter([])) == [] and trainer.step == 0


@pytest.mark.parametrize(("progress", "rate"), [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.55, 0.5), (1.0, 0.0)])
def test_the_rate_follows_the_clock(progress, rate):
    assert Plan("sft", 1, lr=1.0, warmup=0.1).rate(progress) == pytest.approx(rate)


def test_a_saved_model_is_an_ordinary_one(data, model, processor, table, source, tmp_path):
    save_model(model, data / "processor", tmp_path)
    loaded, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    config = json.loads((tmp_path / "reranker_config.json").read_text())
    assert config["preset"] == PRESET.to_dict() and config["sampling"]["max_turn_tokens"] == MAX_TURN_TOKENS
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=1e-2, atol=1e-2)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.chat_template == processor.chat_template
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_choices_of_a_random_model_are_shares(source, model, table):
    share = choice_share(model, table, source, source.evaluation("i2i", "test_combination", 4))
    assert share in (0, 0.25, 0.5, 0.75, 1)


def test_wilsons_interval():
    low, high = wilson(90, 100)
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)  # the textbook's figures for 90 of 100
