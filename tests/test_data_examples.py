from __future__ import annotations

import base64
import io
import json

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vretrver_hf import Item
from vretrver_hf.data.examples import (
    Examples,
    RerankExample,
    example_from_row,
    load_examples,
    row_features,
    to_row,
    write_examples,
)
from vretrver_hf.images import ItemError
from vretrver_hf.protocol import get_preset


def png(color: str, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def released_row(**info) -> dict:
    """A row as the released files hold it: a query with a picture, and three candidates."""
    return {
        "data_source": "CIRR",
        "prompt": [{"role": "user", "content": "Query: <image>less red (1) <image> (2) b (3) <image> c"}],
        "images": [{"image": "q.png"}, {"image": "1.png"}, {"image": "3.png"}],
        "ability": "rerank",
        "reward_model": {"style": "rule", "ground_truth": "3"},
        "extra_info": {
            "qid": "9:1",
            "ground_truth_position": 3,
            "num_candidates": 3,
            "query_image": "q.png",
            "query_text": "less red",
            "candidate_images": ["1.png", "", "3.png"],
            "candidate_texts": ["", "b", "c"],
        }
        | info,
    }


def test_reads_a_released_row():
    example = example_from_row(released_row(), image_root="/pictures")
    assert example == RerankExample(
        query_id="9:1",
        query=Item(text="less red", image="/pictures/q.png"),
        candidates=[Item(image="/pictures/1.png"), Item(text="b"), Item(text="c", image="/pictures/3.png")],
        positives=[2],
        data_source="CIRR",
        prompt=[{"role": "user", "content": "Query: <image>less red (1) <image> (2) b (3) <image> c"}],
    )


def test_absolute_paths_and_no_root_leave_paths_as_they_are():
    row = released_row(query_image="/elsewhere/q.png")
    assert example_from_row(row, image_root="/pictures").query.image == "/elsewhere/q.png"
    assert example_from_row(row).candidates[0].image == "1.png"


@pytest.mark.parametrize("entry", [lambda data: {"image": data}, lambda data: data], ids=["in a dict", "bare"])
@pytest.mark.parametrize(
    "store",
    [lambda data: data, lambda data: {"bytes": data, "path": "x.png"}, lambda data: Image.open(io.BytesIO(data))],
    ids=["bytes", "datasets", "PIL"],
)
def test_embedded_pictures_win_over_paths(entry, store):
    colors = ["red", "green", "blue"]
    row = {**released_row(), "images": [entry(store(png(color))) for color in colors]}
    example = example_from_row(row, image_root="/nowhere")
    shown = [example.query, example.candidates[0], example.candidates[2]]
    expected = [Image.new("RGB", (1, 1), color).getpixel((0, 0)) for color in colors]
    assert [item.load_image().getpixel((0, 0)) for item in shown] == expected
    assert example.candidates[1].image is None  # the text-only candidate keeps its place


def test_a_row_whose_pictures_are_partly_embedded():
    images = [{"image": {"bytes": png("red"), "path": "q.png"}}, {"image": {"bytes": None, "path": "1.png"}}, "3.png"]
    example = example_from_row({**released_row(), "images": images}, image_root="/r")
    assert example.query.image == png("red")
    assert [item.image for item in example.candidates] == ["/r/1.png", None, "/r/3.png"]


@pytest.mark.parametrize(("position", "positives"), [(1, [0]), ([1, 3], [0, 2])])
def test_one_or_several_positives(position, positives):
    assert example_from_row(released_row(ground_truth_position=position)).positives == positives


@pytest.mark.parametrize("absent", [[], None])
def test_a_column_that_is_empty_means_none_has_it(absent):
    row = {**released_row(candidate_images=absent, candidate_texts=["a", "b", "c"]), "images": [{"image": "q.png"}]}
    assert example_from_row(row).candidates == [Item(text="a"), Item(text="b"), Item(text="c")]


def test_a_numeric_id_and_missing_optional_fields():
    info = {"qid": 7, "query_text": "q", "candidate_texts": ["a"], "num_candidates": 1, "ground_truth_position": 1}
    assert example_from_row({"extra_info": info}) == RerankExample("7", Item(text="q"), [Item(text="a")], [0])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": []}, "extra_info must be a mapping, got None"),
        (released_row(qid=None), "extra_info.qid must be a string, got None"),
        (released_row(qid=""), "extra_info.qid must be a string, got ''"),
        (released_row(num_candidates=None), "extra_info.num_candidates must be an integer, got None"),
        # Compacted columns: nobody can say which candidate the one text belongs to.
        (released_row(candidate_texts=["b"]), "candidate_texts has 1 entries for 3 candidates; write '' where absent"),
        (
            {**released_row(candidate_images=["1.png", "3.png"]), "prompt": None},
            "candidate_images has 2 entries for 3 candidates",
        ),
        (released_row(num_candidates=4), "candidate_images has 3 entries for 4|candidate_texts has 3 entries for 4"),
        (released_row(ground_truth_position=0), "ground_truth_position must be a candidate's number, 1..3.*got 0"),
        (released_row(ground_truth_position=4), "ground_truth_position must be a candidate's number, 1..3.*got 4"),
        (released_row(ground_truth_position=[]), r"ground_truth_position.*got \[\]"),
        (released_row(ground_truth_position=None), "ground_truth_position.*got None"),
        (released_row(ground_truth_position=[1, 1]), "positives must be indices 0..2, each once"),
        (released_row(query_image="", query_text=""), "images has 3 entries but extra_info names 2 pictures"),
        ({**released_row(), "images": [{"image": "q.png"}]}, "images has 1 entries but extra_info names 3 pictures"),
        (released_row(candidate_texts=["", "", "c"]), "candidate 2: an item needs text, an image, or both"),
        (released_row(query_image=3), "the path of a picture must be a string, got int"),
        ({**released_row(), "prompt": [{"role": "user"}]}, "prompt must be a list of messages with role and content"),
        ({**released_row(), "prompt": ["hi"]}, "prompt must be a list of messages with role and content"),
    ],
)
def test_a_bad_row_says_where_and_what(row, reason):
    with pytest.raises(ValueError, match=f"^train.parquet, row 3: .*({reason})"):
        example_from_row(row, where="train.parquet, row 3")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"query_id": ""}, "needs a query_id"),
        ({"positives": []}, "query q: no candidate is marked as relevant"),
        ({"positives": [2]}, r"query q: positives must be indices 0..1, each once, got \[2\]"),
        ({"positives": [-1]}, "positives must be indices"),
        ({"positives": [1, 1]}, "positives must be indices"),
        ({"candidates": []}, "positives must be indices"),
    ],
)
def test_an_example_that_cannot_be_is_refused(values, reason):
    fields = {"query_id": "q", "query": Item(text="q"), "candidates": [Item(text="a"), Item(text="b")]}
    with pytest.raises(ValueError, match=reason):
        RerankExample(**{**fields, "positives": [0], **values})


def test_the_task_is_the_example():
    example = example_from_row(released_row())
    task = example.task("foveated", sample=3, tools=False)
    assert (task.query, task.candidates, task.query_id) == (example.query, example.candidates, "9:1")
    assert (task.sample, task.tools, task.prompt, task.preset) == (3, False, example.prompt, get_preset("foveated"))


def items():
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
    image = st.sampled_from([png("red"), png("blue"), "a.png", "folder/b.jpg"])
    ids = st.none() | text
    with_text = st.builds(Item, text=text, image=st.none() | image, id=ids)
    return with_text | st.builds(Item, image=image, id=ids)


@st.composite
def examples(draw):
    candidates = draw(st.lists(items(), min_size=1, max_size=5))
    positives = st.lists(st.integers(0, len(candidates) - 1), min_size=1, unique=True)
    query = draw(items())
    return RerankExample(
        query_id=draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)),
        query=Item(text=query.text, image=query.image),
        candidates=candidates,
        positives=draw(positives),
        data_source=draw(st.sampled_from(["", "WebQA"])),
        prompt=draw(st.sampled_from([None, [{"role": "user", "content": "<image>"}]])),
    )


@settings(deadline=None)
@given(examples())
def test_rows_are_read_back_as_they_were(example):
    row = to_row(example, embed_images=False)
    assert example_from_row(row) == example
    # Through the columns of a file: types are kept, nothing is decoded.
    assert Examples(datasets.Dataset.from_list([row], features=row_features()))[0] == example


def test_pictures_are_embedded_as_they_are_stored(tmp_path):
    (tmp_path / "a.jpg").write_bytes(png("red"))
    url = "data:image/png;base64," + base64.b64encode(png("green")).decode()
    pil = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    candidates = [Item(image=str(tmp_path / "a.jpg")), Item(image=png("blue")), Item(image=url), Item(image=pil)]
    example = example_from_row(to_row(RerankExample("q", Item(text="q"), candidates, [0])))
    assert [item.image for item in example.candidates[:2]] == [png("red"), png("blue")]
    for before, after in zip(candidates, example.candidates, strict=True):
        assert isinstance(after.image, bytes)
        assert before.load_image().tobytes() == after.load_image().tobytes()


def test_a_missing_picture_names_the_query_and_the_image(tmp_path):
    example = RerankExample("q7", Item(text="q"), [Item(text="a"), Item(image=tmp_path / "gone.png")], [0])
    with pytest.raises(ItemError, match="query q7, image 2 .*gone.png.*cannot be read"):
        to_row(example)


def make_examples(count: int) -> list[RerankExample]:
    return [
        RerankExample(f"q{i}", Item(text=f"query {i}"), [Item(image=png("red")), Item(text="b")], [i % 2])
        for i in range(count)
    ]


def test_a_written_file_is_read_back(tmp_path):
    written = make_examples(40)  # more than are held in memory at a time
    write_examples(tmp_path / "train.parquet", iter(written))
    read = load_examples(tmp_path / "train.parquet")
    assert list(read) == written and read.query_ids == [example.query_id for example in written]
    assert read[-1] == written[-1] and list(read[3:5]) == written[3:5]
    assert len(load_examples(tmp_path / "train.parquet", limit=7)) == 7
    assert len(load_examples(tmp_path / "train.parquet", limit=99)) == 40
    with pytest.raises(IndexError, match="40 rows, there is no row 40"):
        read[40]
    # The hub shows the pictures: the file says that they are some.
    assert datasets.Dataset.from_parquet(str(tmp_path / "train.parquet")).features == row_features()


def test_an_interrupted_file_does_not_appear(tmp_path):
    def interrupted():
        yield from make_examples(20)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        write_examples(tmp_path / "train.parquet", interrupted())
    assert not (tmp_path / "train.parquet").exists()


def test_a_folder_of_parquet_files_and_its_splits(tmp_path):
    for name, count in (("train-00000", 2), ("train-00001", 3), ("test-00000", 1)):
        write_examples(tmp_path / f"{name}.parquet", make_examples(count))
    assert (len(load_examples(tmp_path)), len(load_examples(tmp_path, split="test"))) == (5, 1)


def test_paths_start_from_the_folder_of_the_file(tmp_path):
    for name in ("q.png", "1.png", "3.png"):
        (tmp_path / name).write_bytes(png("red"))
    (tmp_path / "rows.jsonl").write_text(json.dumps(released_row()) + "\n", encoding="utf-8")
    (example,) = load_examples(tmp_path / "rows.jsonl")
    assert example.query.load_image().size == (8, 8)
    (moved,) = load_examples(tmp_path / "rows.jsonl", image_root="/elsewhere")
    assert moved.query.image == "/elsewhere/q.png"


def test_a_broken_picture_costs_its_item_and_not_the_data_set(tmp_path):
    example = RerankExample("q", Item(text="q"), [Item(image=png("red")[:40]), Item(text="b")], [1])
    write_examples(tmp_path / "train.parquet", [example])
    (read,) = load_examples(tmp_path / "train.parquet")
    with pytest.raises(ItemError, match="candidate 1"):
        read.candidates[0].load_image(name="candidate 1")


def test_a_bad_row_of_a_file_is_named(tmp_path):
    rows = [released_row(), released_row(ground_truth_position=8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    read = load_examples(tmp_path / "rows.jsonl")
    assert read[0].query_id == "9:1"
    with pytest.raises(ValueError, match="rows.jsonl, row 1: extra_info.ground_truth_position"):
        read[1]


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("gone.parquet", FileNotFoundError, "gone.parquet does not exist"),
        ("gone", FileNotFoundError, "gone does not exist"),
        ("table.csv", ValueError, "table.csv is neither a .parquet, .json or .jsonl file"),
    ],
)
def test_a_source_that_cannot_be_opened(tmp_path, name, error, reason):
    (tmp_path / "table.csv").write_text("a,b\n", encoding="utf-8")
    with pytest.raises(error, match=reason):
        load_examples(tmp_path / name)
