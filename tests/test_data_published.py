from __future__ import annotations

import pytest
from datasets import Dataset, Image
from records import make_example, make_records
from tiny_models import make_processor

from vretrver_hf import Item
from vretrver_hf.data.examples import write_rows
from vretrver_hf.data.published import from_row, published_features, to_row, without_paths
from vretrver_hf.encoding import Encoder
from vretrver_hf.images import ItemError


@pytest.fixture(scope="module")
def records():
    encoder = Encoder(make_processor("qwen2_5_vl"), "qwen2_5_vl")
    return make_records(encoder, [make_example(number) for number in range(4)])


@pytest.fixture
def rows(records, tmp_path):
    write_rows(tmp_path / "rows.parquet", map(to_row, records), published_features())
    return Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))


def test_nothing_is_lost(records, rows):
    for record, row in zip(records, rows, strict=True):
        again = from_row(row)
        assert again.trajectory == record.trajectory
        assert again.example.positives == record.example.positives
        for number in range(4):
            here, there = record.item(number), again.item(number)
            assert here.text == there.text
            if here.image is not None:
                assert list(here.load_image().get_flattened_data()) == list(there.load_image().get_flattened_data())


def test_what_is_to_be_seen_needs_no_json(records, rows):
    """The first crops candidate 1; the third selects 3 and 1, then calls what is no tool."""
    assert isinstance(rows.features["query_image"], Image)
    assert [len(seen) for seen in rows["seen"]] == [1, 0, 2, 2]
    assert rows["calls"] == [1, 0, 2, 1] and rows["valid_calls"] == [1, 0, 1, 1]
    assert rows["order"][0] == [1, 0, 2] and rows["right"] == [True] * 4
    crop = records[0].trajectory.turns[2].images[0]
    shown = crop.render(records[0].item(1).load_image())
    assert list(rows["seen"][0][0].convert("RGB").get_flattened_data()) == list(shown.get_flattened_data())


def test_a_candidate_without_a_picture_keeps_its_place(rows):
    assert [image is None for image in rows[0]["candidate_images"]] == [False, True, False]


def test_what_is_no_picture_is_not_published(tmp_path):
    (tmp_path / "key").write_text("private")
    example = make_example(1)
    example.candidates[0] = Item(image=tmp_path / "key")
    with pytest.raises(ItemError, match="candidate 1"):
        without_paths(example)


def test_paths_become_bytes(tmp_path):
    example = make_example(1)
    example.candidates[0].image.save(tmp_path / "a.png")
    example.candidates[0] = Item(text="a", image=tmp_path / "a.png", id="a")
    freed = without_paths(example)
    assert freed.candidates[0].image == (tmp_path / "a.png").read_bytes()
    assert freed.candidates[1:] == example.candidates[1:] and freed.candidates[0].id == "a"
