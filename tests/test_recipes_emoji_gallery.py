"""Traces that people read: chosen by rule, whatever they look like, with what was remarked on them."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from records import PRESET, noise
from tiny_models import make_processor


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "emoji"))

pytest.importorskip("datasets")

import gallery  # noqa: E402
from export import write_parquet  # noqa: E402
from gallery import COMMENTS, PAGE, SORTS, Trace, choose  # noqa: E402

from vretrver_hf import Item  # noqa: E402
from vretrver_hf.agent import play  # noqa: E402
from vretrver_hf.data.examples import RerankExample, load_examples, to_row  # noqa: E402
from vretrver_hf.encoding import Encoder  # noqa: E402
from vretrver_hf.engines.scripted import ScriptedEngine  # noqa: E402
from vretrver_hf.evaluation.job import QueryResult, Window  # noqa: E402
from vretrver_hf.evaluation.results import write_results  # noqa: E402
from vretrver_hf.journal import Journal  # noqa: E402
from vretrver_hf.protocol import format_answer, format_call, format_turn  # noqa: E402


SIDE, TARGET = 200, [40, 40, 70, 70]
RIGHT = 1  # 0-based


def crop(number: int, box: list[float]) -> str:
    return format_turn(f"look at {number}", format_call("crop_image", {"bbox_2d": box, "target_image": number}))


def hit(number: int) -> str:
    return crop(number, [0.15, 0.15, 0.4, 0.4])


def miss(number: int) -> str:
    return crop(number, [0.7, 0.7, 0.9, 0.9])


REFUSED = crop(2, [0.9, 0.9, 0.1, 0.1])
SELECT = format_turn("all", format_call("select_images", {"target_images": [1, 2]}))
GOOD, BAD = (format_turn("so", format_answer(order)) for order in ([1, 0, 2], [0, 1, 2]))
DETAIL, OVERVIEW = "detail/clock/blob", "overview/any"
# Kind of question, what the model says, and the sorts that it fits.
TRACES = {
    "needed": (DETAIL, [hit(1), hit(2), GOOD], {"needed"}),
    "needed, others not seen": (DETAIL, [hit(2), GOOD], {"needed"}),
    "guessed": (DETAIL, [GOOD], set()),
    "right by exclusion": (DETAIL, [hit(1), GOOD], set()),
    "another look at the same": (DETAIL, [miss(2), hit(2), GOOD], {"recovery"}),
    "another look at another": (DETAIL, [miss(1), hit(1), GOOD], set()),  # right without having seen it
    "refused, then met": (DETAIL, [REFUSED, hit(2), GOOD], {"recovery"}),
    "never met": (DETAIL, [miss(2), GOOD], set()),
    "gave up on one": (DETAIL, [miss(1), hit(2), GOOD], set()),
    "met, then missed": (DETAIL, [hit(2), miss(2), GOOD], set()),
    "wrong after a look": (DETAIL, [hit(1), BAD], {"wrong"}),
    "wrong at once": (DETAIL, [BAD], set()),
    "wrong and refused": (DETAIL, [REFUSED, BAD], set()),
    "wrong at a glance": (OVERVIEW, [SELECT, BAD], {"wrong"}),
    "needed after all": (DETAIL, [hit(1), SELECT, hit(2), GOOD], set()),
    "needless": (OVERVIEW, [SELECT, GOOD], {"needless"}),
    "needless crop": (OVERVIEW, [hit(2), GOOD], {"needless"}),
    "a glance": (OVERVIEW, [GOOD], set()),
}


def example(key: str, number: int) -> RerankExample:
    candidates = [Item(image=_png(noise(SIDE, SIDE, 10 * number + place))) for place in range(3)]
    return RerankExample(key, Item(text=f"{key}, with `ticks`"), candidates, [RIGHT], "emoji/detail")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def examples() -> list[RerankExample]:
    return [example(key, number) for number, key in enumerate(TRACES)]


@pytest.fixture(scope="module")
def traces(examples) -> dict[str, Trace]:
    """Each conversation as the real loop plays it."""
    engine = ScriptedEngine(
        Encoder(make_processor("qwen2_5_vl"), "qwen2_5_vl"), lambda query_id, turn: TRACES[query_id][1][turn]
    )
    played = play(engine, [one.task(PRESET) for one in examples])
    return {one.query_id: Trace(one.query_id, TRACES[one.query_id][0], RIGHT, one, [TARGET] * 3) for one in played}


@pytest.mark.parametrize("key", TRACES)
def test_rules(traces, key):
    assert {sort for sort, (_, fits) in SORTS.items() if fits(traces[key])} == TRACES[key][2]


def test_looks_say_what_was_met(traces):
    looks = traces["another look at the same"].looks
    assert [(look.number, look.on_target, look.turn.valid) for look in looks] == [(2, False, True), (2, True, True)]
    (look,) = traces["wrong and refused"].looks
    assert (look.number, look.on_target, look.turn.valid) == (None, None, False)
    assert [look.number for look in traces["needless"].looks] == [None]


def test_the_choice_is_drawn_from_the_seed_and_by_rule(traces):
    every = list(traces.values())
    first = [(sort, trace.key) for sort, trace in choose(every, 1, 0)]
    assert [sort for sort, _ in first] == list(SORTS)
    random.Random(5).shuffle(every)
    assert [(sort, trace.key) for sort, trace in choose(iter(every), 1, 0)] == first  # not from the order in the file
    assert any([(sort, trace.key) for sort, trace in choose(every, 1, seed)] != first for seed in range(1, 9))
    many = choose(every, 9, 0)
    assert len({trace.key for _, trace in many}) == len(many) == sum(bool(sorts) for *_, sorts in TRACES.values())


@pytest.fixture(scope="module")
def evaluation(traces, examples, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    rows = []
    for one in examples:
        row = to_row(one)
        names = [image["image"]["path"] for image in row["images"]]
        row["extra_info"] |= {"images": names, "target_boxes": [TARGET] * 3}
        rows.append(row | {"ability": TRACES[one.query_id][0], "reward_model": {"style": "rule", "ground_truth": 2}})
    write_parquet(folder / "test.parquet", rows)
    settings = {"model": "m", "data": str(folder / "test.parquet")}
    with Journal(folder / "out" / "journal", settings) as journal:
        for key, trace in traces.items():
            one = trace.trajectory
            result = QueryResult(list("012"), one.order, {"1": 1}, one.status, [Window.of(one)], [one.to_dict()])
            journal.append(key, result.to_dict())
        write_results(folder / "out", "tiny", settings, list(traces), ["emoji"] * len(traces), journal)
    return folder / "out"


def test_files(evaluation, tmp_path, capsys):
    out = tmp_path / "traces"
    gallery.main(evaluation, out, count=2, seed=0, html=tmp_path / "page.html")
    page = (out / PAGE).read_text()
    pictures = sorted(path.name for path in out.glob("*.webp"))
    count = len(choose(gallery.read_traces(evaluation, evaluation.parent / "test.parquet"), 2, 0))
    assert len(pictures) == count and all(f"]({name})" in page for name in pictures)
    assert page.count("*(no remark yet)*") == count and page.count("```") == 0
    assert "<answer>[2, 1, 3]</answer>" in page and "→ a, " in page and "<|im_end|>" not in page
    for _, (title, _) in SORTS.items():
        assert f". {title}\n" in page
    assert "8 traces" not in page and f"{count} traces" in capsys.readouterr().out
    html = (tmp_path / "page.html").read_text()
    assert html.count("<article") == count and "http" not in html.replace("http-equiv", "")


def test_remarks_stand_beneath_the_traces(evaluation, tmp_path):
    gallery.main(evaluation, tmp_path, count=1, seed=0, html=None)
    blank = (tmp_path / COMMENTS).read_text()
    key = blank.splitlines()[0].partition(":")[0]
    (tmp_path / COMMENTS).write_text(blank.replace(f'{key}: ""', f"{key}: >\n  It looked\n  again."))
    kept = (tmp_path / COMMENTS).read_text()
    gallery.main(evaluation, tmp_path, count=1, seed=0, html=None)
    page = (tmp_path / PAGE).read_text()
    assert "> It looked again.\n" in page and page.count("*(no remark yet)*") == len(SORTS) - 1
    assert (tmp_path / COMMENTS).read_text() == kept
    (tmp_path / COMMENTS).write_text("elsewhere: a good one\n")
    with pytest.raises(typer.BadParameter, match="remarks on elsewhere"):
        gallery.main(evaluation, tmp_path, count=1, seed=0, html=None)


def test_the_picture_shows_what_the_model_saw(traces, examples):
    trace = traces["another look at the same"]
    picture = gallery.draw_trace(examples[list(TRACES).index(trace.key)], trace)
    cell = gallery.CELL + 6
    assert picture.width == 3 * cell + 2 * gallery.GAP and picture.height > 2 * gallery.CELL
    colours = {colour for _, colour in picture.getcolors(1 << 24)}
    assert gallery.GREEN in colours and gallery.RED in colours


def test_without_trajectories_there_is_nothing_to_show(evaluation, tmp_path):
    settings = {"model": "m", "data": str(evaluation.parent / "test.parquet")}
    with Journal(tmp_path / "journal", settings) as journal:
        journal.append("guessed", QueryResult(list("012"), [1, 0, 2], {"1": 1}, "ok", []).to_dict())
        write_results(tmp_path, "tiny", settings, ["guessed"], ["emoji"], journal)
    with pytest.raises(typer.BadParameter, match="evaluate with --trajectories"):
        gallery.main(tmp_path, tmp_path / "out", count=1, seed=0, html=None)
