from __future__ import annotations

import contextlib
import copy
from unittest import mock

import pytest
import torch
from PIL import Image

from vretrver_hf.vision import PictureFeatures, batched_attention, equal_pictures_once, quick_positions, rope_index


@pytest.fixture
def tower(model):
    return model.model.visual


@pytest.fixture
def image_processor(processor):
    return processor.image_processor


def pictures(picture, factor: int, *sizes: tuple[int, int]) -> list[Image.Image]:
    return [picture(width * factor, height * factor) for width, height in sizes]


def run(tower, image_processor, images):
    inputs = image_processor(images, do_resize=False, return_tensors="pt")
    with torch.no_grad():
        return tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])


@pytest.mark.parametrize(
    "sizes",
    [
        [(3, 2)],
        [(3, 2)] * 4,  # all alike: one batch
        [(3, 2), (2, 3), (5, 5), (3, 2), (1, 1)],  # equal areas of other shapes; windows of several sizes
    ],
)
def test_batches_are_the_towers_own_forward(tower, image_processor, encoder, picture, sizes):
    images = pictures(picture, encoder.factor, *sizes)
    expected = run(tower, image_processor, images)
    with batched_attention(tower):
        found = run(tower, image_processor, images)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=2e-5, rtol=1e-5)
    for mine, theirs in zip(
        getattr(found, "deepstack_features", None) or [],
        getattr(expected, "deepstack_features", None) or [],
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


def test_a_hook_of_somebody_elses_stays_in_force(tower, image_processor, encoder, picture):
    attention = tower.blocks[0].attn
    heard, original = [], attention.forward
    attention.forward = lambda *args, **kwargs: heard.append(1) or original(*args, **kwargs)
    with batched_attention(tower):
        run(tower, image_processor, pictures(picture, encoder.factor, (2, 2)))
    del attention.forward
    assert heard == [1] and not any("forward" in vars(block.attn) for block in tower.blocks)


def shown(features: PictureFeatures, images):
    with torch.no_grad(), features.shown(images) as inputs:
        return features._tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])


def test_each_picture_passes_the_tower_once(tower, image_processor, encoder, picture):
    features = PictureFeatures(tower, image_processor)
    a, b, c = pictures(picture, encoder.factor, (3, 2), (2, 2), (3, 2))
    for images in ([a, b], [b, c, b], [a.copy(), c]):
        expected = run(tower, image_processor, images)
        found = shown(features, images)
        assert type(found) is type(expected)
        torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=2e-5, rtol=1e-5)
    assert (features.num_computed, features.num_recalled) == (3, 4)
    assert "forward" not in vars(tower)


def test_pictures_are_scaled_where_the_tower_is(tower, image_processor, encoder, picture):
    elsewhere, met = copy.deepcopy(tower).to("meta"), []
    elsewhere.register_forward_pre_hook(lambda module, args: met.append(args[0].device.type))
    processed = []
    original = image_processor.preprocess
    with mock.patch.object(
        image_processor,
        "preprocess",
        lambda *args, **kwargs: processed.append(original(*args, **kwargs)) or processed[0],
    ):
        with contextlib.suppress(NotImplementedError, RuntimeError):  # nothing is computed there
            PictureFeatures(elsewhere, image_processor).tower_output(pictures(picture, encoder.factor, (2, 3)))
    assert processed[0]["pixel_values"].device.type == "meta" and met == ["meta"]


def test_equal_bytes_of_another_shape_are_another_picture(tower, image_processor, encoder):
    features = PictureFeatures(tower, image_processor)
    wide, high = (Image.new("RGB", (w * encoder.factor, h * encoder.factor), "red") for w, h in ((4, 2), (2, 4)))
    for image in (wide, high):
        expected = run(tower, image_processor, [image]).pooler_output
        torch.testing.assert_close(shown(features, [image]).pooler_output, expected, atol=2e-5, rtol=1e-5)
    assert features.num_computed == 2


def test_memory_is_bounded_and_the_oldest_go_first(tower, image_processor, encoder, picture):
    features = PictureFeatures(tower, image_processor)
    a, b, c = pictures(picture, encoder.factor, (2, 2), (2, 2), (2, 2))
    shown(features, [a])
    features.max_bytes = 2 * features._bytes
    shown(features, [b])
    shown(features, [a])
    shown(features, [c])  # b was not used for longest
    assert features._bytes <= features.max_bytes and features.num_computed == 3
    shown(features, [a])
    assert features.num_computed == 3
    shown(features, [b])
    assert features.num_computed == 4


def test_without_memory_nothing_is_kept_and_everything_works(tower, image_processor, encoder, picture):
    features = PictureFeatures(tower, image_processor, max_bytes=0)
    (image,) = pictures(picture, encoder.factor, (2, 2))
    for _ in range(2):
        expected = run(tower, image_processor, [image, image]).pooler_output
        torch.testing.assert_close(shown(features, [image, image]).pooler_output, expected, atol=2e-5, rtol=1e-5)
    assert features.num_computed == 2 and features._bytes == 0


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("shown", [[[]], [[(3, 2)]], [[(3, 2), (1, 1), (2, 5)], [], [(4, 4)], [(1, 3), (2, 2)]]])
def test_rotary_positions_are_the_models_own(model, encoder, shown, padding):
    """Rows with text before, between and behind pictures, as `<|vision_start|>` and `<|vision_end|>` stand there."""
    rows = [[0] * 3 + [t for w, h in pictures for t in [1] * (w * h) + [0] * 2] for pictures in shown]
    width = max(map(len, rows)) + (0 if padding == "none" else 2)
    if padding == "none":
        rows = [row + [0] * (width - len(row)) for row in rows]
    fill = [[0] * (width - len(row)) for row in rows]
    left = padding == "left"
    types = torch.tensor([gap + row if left else row + gap for gap, row in zip(fill, rows, strict=True)])
    mask = [
        [0] * len(g) + [1] * len(r) if left else [1] * len(r) + [0] * len(g) for g, r in zip(fill, rows, strict=True)
    ]
    mask = None if padding == "none" else torch.tensor(mask)
    sizes = [(1, 2 * h, 2 * w) for pictures in shown for w, h in pictures]
    grid = torch.tensor(sizes) if sizes else None
    ids = torch.where(types == 1, encoder.image_pad, 5)
    inputs = {"mm_token_type_ids": types, "image_grid_thw": grid, "attention_mask": mask}
    expected = model.model.get_rope_index(ids, **inputs)
    found = rope_index(types == 1, grid, 2, mask)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_a_model_with_quick_positions_is_the_same(model, encoder):
    ids = torch.tensor([[5, *[encoder.image_pad] * 6, 7, 8]])
    inputs = {"mm_token_type_ids": (ids == encoder.image_pad).int(), "image_grid_thw": torch.tensor([[1, 4, 6]])}
    expected = model.model.get_rope_index(ids, **inputs)
    original = model.model.get_rope_index
    quick_positions(model)
    try:
        assert model.model.get_rope_index != original
        for mine, theirs in zip(model.model.get_rope_index(ids, **inputs), expected, strict=True):
            assert torch.equal(mine, theirs)
        inputs["video_grid_thw"] = torch.tensor([[1, 4, 6]])
        inputs["mm_token_type_ids"] *= 2
        expected = original(ids, **inputs)[0]
        assert torch.equal(model.model.get_rope_index(ids, **inputs)[0], expected)  # the model's own
    finally:
        del model.model.get_rope_index


def test_equal_pictures_are_processed_once(image_processor, encoder, picture, monkeypatch):
    first, second = pictures(picture, encoder.factor, (3, 2), (2, 2))
    images = [first, second, first.copy(), first, second.copy()]
    counts, kind = [], type(image_processor)
    original = kind.preprocess
    monkeypatch.setattr(
        kind, "preprocess", lambda self, images, *a, **k: counts.append(len(images)) or original(self, images, *a, **k)
    )
    expected = image_processor(images, return_tensors="pt")
    with equal_pictures_once(image_processor):
        found = image_processor(images=images, return_tensors="pt")
        plain = image_processor(images=images[:2], return_tensors="pt")
        as_lists = image_processor(images=images, return_tensors="np")
    assert counts == [5, 2, 2, 2, 5] and "preprocess" not in vars(image_processor)
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
    assert torch.equal(plain["image_grid_thw"], expected["image_grid_thw"][:2])
    assert (as_lists["pixel_values"] == expected["pixel_values"].numpy()).all()
