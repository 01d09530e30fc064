"""Golden tests: the ids of the pieces are those of the whole conversation in the model's own processor."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vretrver_hf import Item, VisualTools
from vretrver_hf.encoding import Encoder, collapse_pads
from vretrver_hf.images import ImageRef
from vretrver_hf.protocol import build_messages, format_answer, format_call, format_turn, get_preset
from vretrver_hf.tools import Observation


PRESET = get_preset("foveated", overview_pixels=128 * 128, inspect_pixels=200 * 200)
CALLS = [
    ("crop_image", {"bbox_2d": [0.2, 0.1, 0.7, 0.6], "target_image": 1}),
    ("select_images", {"target_images": [1, 3]}),
    ("crop_image", {"bbox_2d": [0.9, 0.1, 0.1, 0.6], "target_image": 2}),  # reversed: text only comes back
]


def items(picture, images: int) -> tuple[Item, list[Item]]:
    """A query and three candidates, of which the first few have pictures of different shapes."""
    pictures = [picture(90 + 40 * i, 120) if i < images else None for i in range(4)]
    pictures = pictures[1:] + pictures[:1]  # candidates first, the query's picture last
    return Item(text="query", image=pictures[3]), [Item(text=f"text {i}", image=pictures[i]) for i in range(3)]


@pytest.mark.parametrize("images", [0, 1, 4])
@pytest.mark.parametrize("num_calls", [0, 1, 2, 3])
def test_pieces_concatenate_to_the_processors_rendering(encoder, picture, images, num_calls):
    query, candidates = items(picture, images)
    originals = [item.load_image() if item.image is not None else None for item in [query, *candidates]]
    tools = VisualTools(originals[0], originals[1:], preset=PRESET, factor=encoder.factor)
    messages = build_messages(query, candidates, PRESET)
    pieces = encoder.prompt(messages, originals.__getitem__, PRESET)
    ids, pictures = list(pieces.token_ids), list(pieces.images)
    for name, arguments in CALLS[:num_calls]:
        turn = format_turn("let me see", format_call(name, arguments))
        observation = tools.call(name, arguments)
        encoded = encoder.observation(observation)
        ids += encoder.tokenizer.encode(turn, add_special_tokens=False) + [encoder.end_of_turn] + encoded.token_ids
        pictures += encoded.images
        blocks = [{"type": "text", "text": observation.text}] + [{"type": "image"}] * len(observation.images)
        messages += [{"role": "assistant", "content": turn}, {"role": "user", "content": blocks}]
    answer = format_turn("done", format_answer([0, 1, 2]))
    ids += encoder.tokenizer.encode(answer, add_special_tokens=False) + [encoder.end_of_turn]
    messages.append({"role": "assistant", "content": answer})

    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    expected = encoder.processor(text=[text], images=pictures or None, images_kwargs={"do_resize": False})
    assert ids == expected["input_ids"][0]
    assert sum(token == encoder.image_pad for token in ids) == sum(map(encoder.image_tokens, pieces.refs)) + sum(
        (image.width // encoder.factor) * (image.height // encoder.factor) for image in pictures[len(pieces.refs) :]
    )


def test_prompt_pictures_keep_to_the_overview_budget(encoder, picture):
    query, candidates = items(picture, 4)
    originals = [item.load_image() for item in [query, *candidates]]
    encoded = encoder.prompt(build_messages(query, candidates, PRESET), originals.__getitem__, PRESET)
    assert [ref.index for ref in encoded.refs] == [0, 1, 2, 3]
    for ref, image in zip(encoded.refs, encoded.images, strict=True):
        assert image.size == (ref.width, ref.height) and ref.box is None
        assert ref.width * ref.height <= 128 * 128
        assert ref.width % encoder.factor == ref.height % encoder.factor == 0


def test_the_processor_would_resize_nothing(encoder, picture):
    """The processor's own resizing, which other engines run, leaves a fitted picture as it is."""
    query, candidates = items(picture, 4)
    originals = [item.load_image() for item in [query, *candidates]]
    encoded = encoder.prompt(build_messages(query, candidates, PRESET), originals.__getitem__, PRESET)
    ours = encoder.processor.image_processor(encoded.images, do_resize=False, return_tensors="pt")
    least = {"shortest_edge": 1, "longest_edge": 10**9}
    theirs = encoder.processor.image_processor(encoded.images, do_resize=True, size=least, return_tensors="pt")
    assert ours["image_grid_thw"].equal(theirs["image_grid_thw"])
    assert ours["pixel_values"].equal(theirs["pixel_values"])


def test_an_observation_opens_the_models_next_turn(encoder):
    encoded = encoder.observation(Observation("Not so.", [], False))
    assert encoder.tokenizer.decode(encoded.token_ids) == (
        "\n<|im_start|>user\nNot so.<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("text", ["", " spaced \n", "observation", "{{ x }} is 2 °"])
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_what_stands_around_an_observation_does_not_depend_on_it(encoder, picture, text, num_images):
    sides = 2 * encoder.factor
    refs = tuple(ImageRef(number, sides, sides) for number in range(num_images))
    images = [picture(sides, sides) for _ in refs]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    blocks = [{"type": "text", "text": text}, *({"type": "image"} for _ in refs)]
    options = {"tokenize": False, "add_generation_prompt": True}
    rendered = encoder.tokenizer.apply_chat_template([*turns, {"role": "user", "content": blocks}], **options)
    for _ in range(2):  # the second is put together from what the first one left
        encoded = encoder.observation(Observation(text, images, True, refs))
        assert encoded.text == rendered[rendered.rindex("a<|im_end|>") + len("a<|im_end|>") :]


def test_it_can_be_sent_to_another_process(encoder):
    observation = Observation("Not so.", [], False)
    expected = encoder.observation(observation).token_ids
    assert pickle.loads(pickle.dumps(encoder)).observation(observation).token_ids == expected


def test_decoding_drops_end_marks_and_keeps_tags(encoder):
    text = format_turn("a", format_call("select_images", {"target_images": [1]}))
    ids = encoder.tokenizer.encode(text, add_special_tokens=False)
    assert encoder.decode([*ids, encoder.end_of_turn]) == text


def test_call_tags_are_single_tokens(encoder):
    assert len(encoder.tokenizer.encode("</tool_call>", add_special_tokens=False)) == 1


def test_a_tokenizer_without_the_control_tokens_is_refused(family, processor):
    import copy

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = copy.copy(processor)
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    bare.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with pytest.raises(ValueError, match="no single token for"):
        Encoder(bare, family)


@given(st.lists(st.integers(0, 3), max_size=40))
def test_collapsing_leaves_no_neighbours_and_loses_nothing_else(ids):
    collapsed = collapse_pads(ids, pad=0)
    assert [token for token in collapsed if token] == [token for token in ids if token]
    assert not any(a == b == 0 for a, b in zip(collapsed, collapsed[1:], strict=False))
    assert (0 in collapsed) == (0 in ids)
