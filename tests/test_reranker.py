from __future__ import annotations

import json
import logging
import re

import pytest
from scripted import ScriptedEngine

from vretrver_hf import Item, ItemError, Ranking, Reranker
from vretrver_hf.engines import Sampling
from vretrver_hf.engines.transformers import TransformersEngine
from vretrver_hf.protocol import format_answer, format_call, format_turn, get_preset
from vretrver_hf.reranker import RankRequest, save_config, saved_settings


PRESET = get_preset("foveated", overview_pixels=64 * 64, inspect_pixels=64 * 64)


class LargestFirst:
    """A perfect ranker of candidates whose texts are numbers: reads the prompt, answers with the largest first."""

    def __init__(self, encoder):
        self.prompts: dict[str, str] = {}
        self.encoder = encoder

    def engine(self, **kwargs) -> ScriptedEngine:
        ranker = self

        class Engine(ScriptedEngine):
            def submit(self, session, encoded, sampling):
                ranker.prompts[session.query_id] = encoded.text
                super().submit(session, encoded, sampling)

        return Engine(self.encoder, self.answer, **kwargs)

    def answer(self, query_id: str, turn: int) -> str:
        shown = [int(value) for value in re.findall(r"^\(\d+\) (\d+)$", self.prompts[query_id], re.MULTILINE)]
        return format_turn("by size", format_answer(sorted(range(len(shown)), key=lambda i: -shown[i])))


@pytest.fixture
def perfect(encoder):
    return LargestFirst(encoder)


def numbers(count: int) -> list[Item]:
    return [Item(text=str((i * 37) % count), id=f"c{i}") for i in range(count)]


@pytest.mark.parametrize("count", [2, 5, 20])
def test_one_window_ranks_everything(perfect, count):
    ranking = Reranker(perfect.engine(), PRESET).rank("q", numbers(count))
    assert [int(item.text) for item in ranking.items] == list(range(count))[::-1]
    assert ranking.status == "ok" and len(ranking.trajectories) == 1


def test_windows_bring_the_best_ten_of_fifty_to_the_top(perfect):
    ranking = Reranker(perfect.engine(), PRESET).rank("q", (item for item in [Item(text=str(i)) for i in range(50)]))
    assert [int(item.text) for item in ranking.items[:10]] == list(range(49, 39, -1))
    assert sorted(ranking.order) == list(range(50))
    shown = [trajectory.candidate_indices for trajectory in ranking.trajectories]
    assert [len(window) for window in shown] == [20] * 4
    assert shown[0] == list(range(30, 50)) and shown[1][:10] == list(range(20, 30))
    assert shown[1][10:] == list(range(49, 39, -1))  # the second window sees what the first left in its place


def test_top_k_limits_the_lists_but_not_the_order(perfect):
    ranking = Reranker(perfect.engine(), PRESET).rank("q", numbers(5), top_k=2)
    assert len(ranking.items) == len(ranking.ids) == 2 and len(ranking.order) == 5
    assert ranking.ids == [f"c{index}" for index in ranking.order[:2]]


def test_queries_advance_on_their_own(perfect):
    engine = perfect.engine(max_sessions=3)
    pairs = [(f"q{i}", numbers(n)) for i, n in enumerate([50, 3, 0, 25, 1, 7])]
    rankings = Reranker(engine, PRESET).rank_batch(pairs)
    assert [len(ranking.order) for ranking in rankings] == [50, 3, 0, 25, 1, 7]
    assert [len(ranking.trajectories) for ranking in rankings] == [4, 1, 0, 2, 0, 1]
    assert all(ranking.status == "ok" for ranking in rankings) and engine.most_open == 3


def test_a_batch_takes_queries_as_it_has_room(perfect):
    taken = []

    def pairs():
        for i in range(30):
            taken.append(i)
            yield f"q{i}", numbers(3)

    seen_ahead = []
    finished = []

    def on_event(event):
        if event.kind == "answer":
            finished.append(event.query_id)
            seen_ahead.append(len(taken) - len(finished))

    assert len(Reranker(perfect.engine(max_sessions=2), PRESET).rank_batch(pairs(), on_event=on_event)) == 30
    assert max(seen_ahead) <= 4


def test_statuses_are_the_worst_of_the_windows(encoder):
    texts = iter([format_answer([0, 1]), "<answer>[2]</answer>", "<answer>none</answer>"])
    engine = ScriptedEngine(encoder, lambda query_id, turn: "<think>x</think>\n" + next(texts))
    ranking = Reranker(engine, get_preset(PRESET, max_calls=0), window=2, stride=1).rank("q", ["a", "b", "c", "d"])
    assert [trajectory.status for trajectory in ranking.trajectories] == ["ok", "repaired", "fallback"]
    assert ranking.status == "fallback" and sorted(ranking.order) == [0, 1, 2, 3]


def test_nothing_to_compare_costs_no_model_call(perfect):
    reranker = Reranker(perfect.engine(), PRESET)
    assert reranker.rank("q", []).order == [] and reranker.rank("q", ["a"]).order == [0]
    assert reranker.engine.most_open == 0


def test_bad_items_are_named_before_the_model_runs(perfect, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    reranker = Reranker(perfect.engine(), PRESET)
    with pytest.raises(ItemError, match="candidate 2"):
        reranker.rank("q", ["a", str(broken)])
    with pytest.raises(ItemError, match="query"):
        reranker.rank(None, ["a"])
    with pytest.raises(ItemError, match="query 1: candidate 1"):
        reranker.rank_batch([("q", ["a", "b"]), ("q", [str(broken), "b"])])
    assert reranker.engine.most_open <= 1


def test_a_batch_can_record_bad_items_and_go_on(perfect, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    pairs = [("q", numbers(3)), ("q", ["a", Item(image=broken)]), ("q", numbers(4))]
    good, bad, last = Reranker(perfect.engine(), PRESET).rank_batch(pairs, on_error="record")
    assert good.error is None and last.error is None
    assert "candidate 2" in bad.error and (bad.order, bad.status) == ([0, 1], "fallback")
    missing = tmp_path / "missing.png"
    for query, candidates in [("q", ["a", str(missing), "c"]), (None, ["a", "b", "c"]), ("q", (x for x in "abc"))]:
        (ranking,) = Reranker(perfect.engine(), PRESET).rank_batch([(query, candidates)], on_error="record")
        assert len(ranking.order) == len(ranking.items) == 3
    with pytest.raises(ValueError, match="'rais'.*'record'"):
        Reranker(perfect.engine(), PRESET).rank_batch([], on_error="rais")


def test_a_picture_that_vanishes_costs_its_query_only(perfect, tmp_path, picture):
    gone = tmp_path / "gone.png"
    picture().save(gone)
    # Of more candidates than a window holds, pictures are read anew for each window.
    pairs = [("q", ["a", Item(image=gone), "b"]), ("q", numbers(2))]
    vanish = lambda event: gone.unlink(missing_ok=True) if event.kind == "window" else None  # noqa: E731
    reranker = Reranker(perfect.engine(), PRESET, window=2, stride=1)
    bad, good = reranker.rank_batch(pairs, on_event=vanish)
    assert "candidate 2" in bad.error and bad.order == [0, 1, 2] and good.error is None and good.status == "ok"


def test_a_bad_picture_among_many_costs_its_query_only(encoder, picture):
    engine = ScriptedEngine(
        encoder, lambda query_id, turn: "<think>x</think>\n<answer>[2, 1]</answer>", max_sessions=16
    )
    pairs = [("q", [picture(), picture()]) for _ in range(40)]
    pairs[20] = ("q", [picture(), Item(image=b"no picture")])
    rankings = Reranker(engine, PRESET).rank_batch(pairs, on_error="record")
    assert [i for i, ranking in enumerate(rankings) if ranking.error] == [20] and "candidate 2" in rankings[20].error
    assert all(ranking.order == [1, 0] for i, ranking in enumerate(rankings) if i != 20)
    with pytest.raises(ItemError, match="query 20: candidate 2"):
        Reranker(engine, PRESET).rank_batch(pairs)


def test_the_stream_tells_events_and_ends_with_the_ranking(encoder, picture):
    turns = [
        format_turn("hm", format_call("select_images", {"target_images": [1]})),
        "<think>x</think>\n<answer>[2, 1]</answer>",
    ]
    engine = ScriptedEngine(encoder, lambda query_id, turn: turns[turn])
    *events, ranking = Reranker(engine, PRESET).rank_stream("q", [picture(), picture()])
    kinds = [event.kind for event in events]
    assert kinds == ["window", "thought", "call", "observation", "thought", "answer"]
    assert isinstance(ranking, Ranking) and ranking.order == [1, 0]
    heard = []
    Reranker(engine, PRESET).rank("q", [picture(), picture()], on_event=heard.append)
    assert [event.kind for event in heard] == kinds


def test_closing_the_stream_stops_the_model(encoder, picture):
    turn = format_turn("hm", format_call("select_images", {"target_images": [1]}))
    asked = []
    engine = ScriptedEngine(encoder, lambda query_id, number: asked.append(number) or turn)
    stream = Reranker(engine, PRESET).rank_stream("q", [picture(), picture()])
    assert next(stream).kind == "window" and asked == []  # told before the model runs
    assert next(stream).kind == "thought"
    heard = len(asked)
    stream.close()
    assert len(asked) == heard == 1 and not engine._open


def test_a_data_sets_prompt_is_replayed_whole(encoder):
    prompt = [{"role": "user", "content": "Mine: (1) a (2) b (3) c"}]
    engine = ScriptedEngine(encoder, lambda query_id, turn: format_turn("x", format_answer([2, 0, 1])))
    reranker = Reranker(engine, get_preset(PRESET, prompt_source="dataset"), window=3, stride=1)
    ranking = reranker.rank("q", ["a", "b", "c"], prompt=prompt)
    assert ranking.order == [2, 0, 1] and "Mine: (1) a" in ranking.trajectories[0].turns[0].text
    with pytest.raises(ValueError, match="4 candidates at once but the window holds 3"):
        reranker.rank("q", ["a", "b", "c", "d"], prompt=prompt)
    with pytest.raises(ValueError, match="this preset writes its own"):
        Reranker(engine, PRESET).rank("q", ["a", "b", "c"], prompt=prompt)


def test_duplicates_keep_their_places(perfect):
    ranking = Reranker(perfect.engine(), PRESET).rank("q", ["3", "3", "5"])
    assert ranking.order == [2, 0, 1] and ranking.ids == ["2", "0", "1"]


def test_rankings_become_json_and_html(perfect, tmp_path):
    ranking = Reranker(perfect.engine(), PRESET).rank("q", numbers(3))
    values = json.loads(json.dumps(ranking.to_dict()))
    assert values["order"] == ranking.order and values["calls"] == 0 and values["tokens"] == ranking.num_tokens > 0
    page = ranking.save_html(tmp_path / "new" / "page.html")
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_window_and_a_stride_that_leave_candidates_out_are_refused(perfect):
    with pytest.raises(ValueError, match="stride 30 exceeds size 20"):
        Reranker(perfect.engine(), PRESET, window=20, stride=30)


def test_saving_and_loading_plays_the_same(model, processor, tmp_path, picture):
    reranker = Reranker(
        TransformersEngine(model, processor), PRESET, window=7, stride=3, sampling=Sampling(max_turn_tokens=5)
    )
    reranker.save_pretrained(tmp_path)
    again = Reranker.from_pretrained(tmp_path, device="cpu")
    assert (again.preset, again.window, again.stride, again.sampling) == (PRESET, 7, 3, reranker.sampling)
    pictures = [picture(), picture()]
    before, after = (r.rank("q", pictures).trajectories[0].token_ids for r in (reranker, again))
    assert before == after
    changed = Reranker.from_pretrained(tmp_path, device="cpu", preset="release", window=2)
    assert (changed.preset, changed.window, changed.stride) == (get_preset("release"), 2, 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting"),
        ("[1]", "TypeError"),
        ('{"window": 5}', "preset"),
        ('{"preset": {"name": "release", "zoom": 2}}', "zoom"),
        (
            '{"preset": {"name": "release", "coordinates": "pixels", "max_calls": 2}, "sampling": {"min_p": 1}}',
            "min_p",
        ),
        ('{"preset": {"name": "release", "coordinates": "pixels", "max_calls": 2}, "speed": 1}', "speed"),
    ],
)
def test_an_unusable_config_is_named(model, processor, tmp_path, content, reason):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "reranker_config.json").write_text(content)
    with pytest.raises(ValueError, match=f"reranker_config.json of .* cannot be used.*{reason}"):
        Reranker.from_pretrained(tmp_path, device="cpu")


def test_whether_tools_may_be_called_is_saved(model, processor, tmp_path):
    Reranker(TransformersEngine(model, processor), PRESET, tools=False).save_pretrained(tmp_path)
    assert Reranker.from_pretrained(tmp_path, device="cpu").tools is False
    assert Reranker.from_pretrained(tmp_path, device="cpu", tools=True).tools is True


def test_settings_that_cannot_work_are_refused_at_once(perfect):
    with pytest.raises(ValueError, match="inspect_pixels must be at least"):
        Reranker(perfect.engine(), get_preset(PRESET, inspect_pixels=100))
    with pytest.raises(ValueError, match="max_turn_tokens is 500 but the model reads at most 400"):
        Reranker(perfect.engine(max_length=400), PRESET, sampling=Sampling(max_turn_tokens=500))
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        Reranker(perfect.engine(), PRESET).rank("q", ["a", "b"], top_k=0)


def test_a_model_without_a_saved_protocol_is_played_as_released_with_a_warning(model, processor, tmp_path, caplog):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="vretrver_hf"):
        assert Reranker.from_pretrained(tmp_path, device="cpu").preset == get_preset("release")
    assert "reranker_config.json" in caplog.text


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="'warp'.*'transformers'"):
        Reranker.from_pretrained(engine="warp")


class TestSavedSettings:
    """What a model is played with, told without loading it."""

    def test_of_the_bundled_model(self):
        settings, reranker = saved_settings(), Reranker.from_pretrained(device="cpu")
        assert settings["window"] == 8 and settings["preset"].name == "foveated"
        assert settings == {name: getattr(reranker, name) for name in settings}

    def test_of_a_model_with_nothing_saved(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        settings = saved_settings(tmp_path)
        assert (settings["preset"], settings["window"], settings["stride"]) == (get_preset("release"), 20, 10)
        assert settings["sampling"] == Sampling() and settings["tools"]

    def test_of_an_adapter(self, tmp_path):
        """Its own, and else those of its base."""
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        base.mkdir(), adapter.mkdir()
        (base / "config.json").write_text("{}")
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        save_config(base, PRESET, 6, 3, Sampling(max_turn_tokens=5))
        assert saved_settings(adapter)["window"] == 6 and saved_settings(adapter)["preset"] == PRESET
        save_config(adapter, PRESET, 4, 2, Sampling())
        assert saved_settings(adapter)["window"] == 4 and saved_settings(adapter)["sampling"] == Sampling()

    def test_of_nothing(self, tmp_path):
        with pytest.raises(OSError, match="none"):
            saved_settings(tmp_path / "none")


def test_an_engine_without_a_model_cannot_be_saved(perfect, tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        Reranker(perfect.engine(), PRESET).save_pretrained(tmp_path)


class TestRankIter:
    def test_takes_no_more_requests_than_there_is_room_for(self, encoder):
        taken, done = [], 0

        def requests():
            for number in range(12):
                taken.append(number)
                yield RankRequest(f"q{number}", "q", ["a", "b"])

        engine = ScriptedEngine(
            encoder, lambda query_id, turn: format_turn("b", format_answer([1, 0])), max_sessions=3
        )
        for ranking in Reranker(engine, PRESET).rank_iter(requests()):
            done += 1
            assert ranking.order == [1, 0] and len(taken) <= done + engine.max_sessions + 2
        assert done == 12

    def test_each_window_gets_a_prompt_of_its_own(self, encoder):
        shown = []

        def prompt(indices):
            shown.append(list(indices))
            return [{"role": "user", "content": f"which of {list(indices)}?"}]

        engine = ScriptedEngine(encoder, lambda query_id, turn: format_turn("r", format_answer([2, 1, 0])))
        reranker = Reranker(engine, get_preset(PRESET, prompt_source="dataset"), window=3, stride=2)
        (ranking,) = reranker.rank_iter([RankRequest("q", "q", ["a", "b", "c", "d", "e"], prompt)])
        assert shown == [[2, 3, 4], [0, 1, 4]] and ranking.order == [4, 1, 0, 3, 2]
        assert "which of [0, 1, 4]?" in ranking.trajectories[1].turns[0].text

    def test_passes(self, encoder):
        engine = ScriptedEngine(encoder, lambda query_id, turn: format_turn("r", format_answer([1, 0])))
        ranking = Reranker(engine, PRESET, window=2, stride=1, passes=2).rank("q", ["a", "b", "c"])
        assert len(ranking.trajectories) == 4
