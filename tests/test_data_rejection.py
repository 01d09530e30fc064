from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import ANSWER, CROP, MALFORMED, NO_SUCH, PRESET, SELECT, make_example
from scripted import ScriptedEngine
from tiny_models import make_processor

from vretrver_hf import Item
from vretrver_hf.agent import play
from vretrver_hf.data.conversations import read_records
from vretrver_hf.data.rejection import (
    Query,
    Summary,
    judge,
    modalities,
    parse_keep,
    sample_queries,
    select,
    write_card,
    write_selection,
)
from vretrver_hf.encoding import Encoder
from vretrver_hf.engines import Sampling
from vretrver_hf.journal import Journal, Shard
from vretrver_hf.protocol import format_answer, format_turn, get_preset


WRONG = format_turn("1 fits", format_answer([0, 1, 2]))
SAMPLES = [[ANSWER], [CROP, ANSWER], [WRONG], [CROP, WRONG]]
"""What the model says as its first, second, … sample of a query: two of four are right, one of them with a tool."""


@pytest.fixture(scope="module")
def encoder():
    return Encoder(make_processor("qwen2_5_vl"), "qwen2_5_vl")


class SamplingEngine(ScriptedEngine):
    """Says another script for each sample of a query, and counts the conversations."""

    def __init__(self, encoder, samples=SAMPLES, **kwargs):
        super().__init__(encoder, lambda key, turn: samples[int(key.rpartition("#")[2])][turn], **kwargs)
        self.opened = 0

    def open(self, query_id="", sample=0):
        self.opened += 1
        return super().open(f"{query_id}#{sample}", sample)


def sample(folder, examples, engine, num_samples=4, **kwargs) -> Journal:
    keys = [f"q{number}" for number in range(len(examples))]
    journal = Journal(folder, {"seed": 3}, kwargs["shard"].index if "shard" in kwargs else 0)
    sample_queries(examples, keys, journal, engine, PRESET, Sampling(seed=3), num_samples, **kwargs)
    return journal


def played(encoder, *samples, preset=PRESET, **kwargs):
    """Trajectories of one query, one a script."""
    engine = SamplingEngine(encoder, samples, **kwargs)
    return play(engine, [make_example(0).task(preset, sample=number) for number in range(len(samples))])


class TestSampleQueries:
    def test_every_query_is_played_as_often_as_asked(self, tmp_path, encoder):
        done = []
        examples = [make_example(number) for number in range(3)]
        engine = SamplingEngine(encoder, max_sessions=3)  # fewer than a query has samples
        with sample(tmp_path, examples, engine, on_query=lambda key, query: done.append(key)) as journal:
            queries = [Query.from_dict(journal[key]) for key in ("q0", "q1", "q2")]
        assert done == ["q0", "q1", "q2"] and engine.most_open == 3
        for number, query in enumerate(queries):
            assert (query.query_id, query.positives, query.data_source) == (f"q{number}", [1], "doors")
            assert [trajectory.sample for trajectory in query.trajectories] == [0, 1, 2, 3]
            assert [trajectory.num_valid_calls for trajectory in query.trajectories] == [0, 1, 0, 1]
            assert {trajectory.seed for trajectory in query.trajectories} == {3}
        assert [query.modalities for query in queries[:2]] == [
            "text → image or image+text or text",
            "image+text → image or image+text or text",
        ]

    def test_trajectories_are_those_of_the_loop(self, tmp_path, encoder):
        example = make_example(1)
        with sample(tmp_path, [make_example(0), example], SamplingEngine(encoder)) as journal:
            sampled = Query.from_dict(journal["q1"]).trajectories
        tasks = [example.task(PRESET, sample=number) for number in range(4)]
        expected = play(SamplingEngine(encoder), tasks, Sampling(seed=3))
        assert [timeless(trajectory) for trajectory in sampled] == [timeless(trajectory) for trajectory in expected]

    def test_goes_on_where_it_stopped(self, tmp_path, encoder):
        examples = [make_example(number) for number in range(4)]

        class Stopped(Exception):
            pass

        def stop_after_two(key, query):
            if key == "q1":
                raise Stopped

        engine = SamplingEngine(encoder, max_sessions=1)
        with pytest.raises(Stopped):
            sample(tmp_path / "a", examples, engine, on_query=stop_after_two)
        assert engine.opened == 8 and not engine._open
        engine = SamplingEngine(encoder, max_sessions=1)
        told = []
        with sample(tmp_path / "a", examples, engine, on_query=lambda key, query: told.append(key)) as stopped:
            assert engine.opened == 8 and told == ["q2", "q3"]
            with sample(tmp_path / "b", examples, SamplingEngine(encoder, max_sessions=1)) as whole:
                for key in ("q0", "q1", "q2", "q3"):
                    assert untimed(stopped[key]) == untimed(whole[key])

    def test_each_process_does_its_share(self, tmp_path, encoder):
        examples = [make_example(number) for number in range(5)]
        engines = [SamplingEngine(encoder) for _ in range(2)]
        for index, engine in enumerate(engines):
            sample(tmp_path, examples, engine, shard=Shard(index, 2)).close()
        assert [engine.opened for engine in engines] == [12, 8]
        with Journal(tmp_path, {"seed": 3}) as journal:
            assert len(journal) == 5

    def test_a_broken_picture_costs_its_query_only(self, tmp_path, encoder):
        examples = [make_example(number) for number in range(3)]
        broken = Item(image=b"no picture", id="2")
        examples[1] = dataclasses.replace(examples[1], candidates=[*examples[1].candidates[:2], broken])
        told = {}
        with sample(tmp_path, examples, SamplingEngine(encoder), on_query=told.__setitem__) as journal:
            assert "q0" in journal and "q2" in journal and len(journal) == 2
            assert list(journal.errors) == ["q1"] and "candidate 3 is no readable image" in journal.errors["q1"]
        assert told["q1"] is None
        examples[1] = make_example(1)  # mended
        engine = SamplingEngine(encoder)
        with sample(tmp_path, examples, engine) as journal:
            assert engine.opened == 4 and len(journal) == 3 and not journal.errors

    def test_a_row_that_cannot_be_read_costs_its_query_only(self, tmp_path, encoder):
        class Rows(list):
            def __getitem__(self, index):
                if index == 0:
                    raise ValueError("train.parquet, row 0: num_candidates must be a int")
                return super().__getitem__(index)

        examples = Rows(make_example(number) for number in range(2))
        with sample(tmp_path, examples, SamplingEngine(encoder)) as journal:
            assert "q1" in journal and "row 0: num_candidates" in journal.errors["q0"]

    def test_a_prompt_that_does_not_fit_costs_its_query_only(self, tmp_path, encoder):
        preset = get_preset(PRESET, prompt_source="dataset")
        prompt = [{"role": "user", "content": "Query: a door\n(1) <image> (2) blue (3) <image>"}]
        examples = [dataclasses.replace(make_example(0), prompt=prompt), make_example(2)]  # the second brings none
        with Journal(tmp_path, {}) as journal:
            sample_queries(examples, ["q0", "q2"], journal, SamplingEngine(encoder), preset, Sampling(), 1)
            assert "q0" in journal and "brings no prompt" in journal.errors["q2"]

    def test_without_tools(self, tmp_path, encoder):
        engine = SamplingEngine(encoder, [[CROP, ANSWER]])
        with sample(tmp_path, [make_example(0)], engine, num_samples=1, tools=False) as journal:
            trajectory = Query.from_dict(journal["q0"]).trajectories[0]
        assert "<tools>" not in trajectory.turns[0].text and trajectory.num_valid_calls == 0

    def test_the_prompt_is_stored_once(self, tmp_path, encoder):
        with sample(tmp_path, [make_example(0)], SamplingEngine(encoder)) as journal:
            entry = journal["q0"]
        assert entry["prompt"]["role"] == "prompt"
        assert all(turn["role"] != "prompt" for trajectory in entry["trajectories"] for turn in trajectory["turns"])


class TestJudge:
    @pytest.mark.parametrize(
        ("script", "reason"),
        [
            ([ANSWER], None),
            ([SELECT, CROP, ANSWER], None),
            ([WRONG], "wrong"),
            ([MALFORMED, ANSWER], "malformed turn"),  # neither call nor answer
            (["<answer>[2, 1, 3]</answer>"], "malformed turn"),  # no thought, though the ranking is right
            ([f"Well. {ANSWER}"], "malformed turn"),  # text outside the tags
            ([NO_SUCH, ANSWER], "invalid call"),  # no such tool
            ([SELECT.replace("[3, 1]", "[3, 2]"), ANSWER], "invalid call"),  # candidate 2 has no picture
            ([CROP, CROP, CROP, CROP, CROP, ANSWER], "invalid call"),  # one call more than there is budget for
            ([CROP] * 6, "invalid call"),  # never answers
            ([format_turn("2", "<answer>[2, 1]</answer>")], "not a permutation"),  # 3 is missing
            ([format_turn("2", "<answer>[2, 1, 3, 3]</answer>")], "not a permutation"),  # 3 twice
            ([format_turn("2", "<answer>2, 1, 3</answer>")], "not a permutation"),  # no list
        ],
    )
    def test_reasons(self, encoder, script, reason):
        assert judge(played(encoder, script), [1]) == [reason]

    def test_a_context_that_is_full(self, encoder):
        engine = ScriptedEngine(encoder, lambda query_id, turn: ANSWER, max_length=50)
        assert judge(play(engine, [make_example(0).task(PRESET)]), [1]) == ["context full"]

    def test_a_turn_that_is_cut_off(self, encoder):
        engine = ScriptedEngine(encoder, lambda query_id, turn: ANSWER)
        trajectories = play(engine, [make_example(0).task(PRESET)], Sampling(max_turn_tokens=10))
        assert judge(trajectories, [1]) == ["malformed turn"]

    @pytest.mark.parametrize(
        ("rule", "positives", "reason"),
        [
            ("first", [1], None),  # the answer is 2, 1, 3
            ("first", [0], "wrong"),
            ("first", [2, 1], None),  # one of two is enough
            ("top-1", [0], "wrong"),
            ("top-2", [0], None),
            ("top-2", [2], "wrong"),
            ("top-3", [2], None),
            ("top-99", [2], None),
            ("any", [2], None),
        ],
    )
    def test_rules(self, encoder, rule, positives, reason):
        assert judge(played(encoder, [ANSWER]), positives, parse_keep(rule)) == [reason]

    def test_no_rule_excuses_the_format(self, encoder):
        assert judge(played(encoder, [MALFORMED, ANSWER]), [1], parse_keep("any")) == ["malformed turn"]

    def test_positives_are_indices_of_the_whole_list(self, encoder):
        """A window of candidates 4, 5, 6: the second of them is candidate 5, index 4."""
        task = dataclasses.replace(make_example(0).task(PRESET), candidate_indices=[3, 4, 5])
        trajectories = play(ScriptedEngine(encoder, lambda query_id, turn: ANSWER), [task])
        assert judge(trajectories, [4]) == [None]
        assert judge(trajectories, [1]) == ["wrong"]

    def test_the_same_words_count_once(self, encoder):
        trajectories = played(encoder, [WRONG], [ANSWER], [CROP, ANSWER], [ANSWER], [WRONG])
        assert judge(trajectories, [1]) == ["wrong", None, None, "duplicate", "wrong"]

    @pytest.mark.parametrize("rule", ["", "second", "top-0", "top-", "top--1", "top-1.5", "First", "top-99999999"])
    def test_unknown_rules(self, rule):
        with pytest.raises(ValueError, match="unknown rule"):
            parse_keep(rule)


class TestSelect:
    def test_kinds_take_turns(self):
        samples = {0: True, 1: True, 2: True, 3: False, 4: False}
        assert select([samples], 1) == [[0]]
        assert select([samples], 2) == [[0, 3]]
        assert select([samples], 3) == [[0, 1, 3]]
        assert select([samples], 9) == [[0, 1, 2, 3, 4]]

    def test_the_kind_that_is_short_begins(self):
        """One a query: tool, then none, then tool again, although every query has both."""
        both = {0: True, 1: False}
        assert select([both, both, both], 1) == [[0], [1], [0]]

    def test_a_kind_that_is_missing_leaves_its_place_to_the_other(self):
        assert select([{4: False, 7: False, 9: False}, {}], 2) == [[4, 7], []]

    def test_share(self):
        """Six with a tool and two without: half of each is two of each."""
        accepted = [{0: True, 1: True}, {0: True, 1: True}, {0: True, 1: True}, {0: False}, {0: False}]
        chosen = select(accepted, 2, tool_share=0.5)
        assert sum(map(len, chosen[:3])) == 2 and chosen[3:] == [[0], [0]]

    @pytest.mark.parametrize("seed", range(6))
    def test_a_query_that_keeps_another_gives_first(self, seed):
        chosen = select([{0: True, 1: True}, {0: True}, {0: False}], 2, tool_share=2 / 3, seed=seed)
        assert [len(numbers) for numbers in chosen] == [1, 1, 1]

    def test_other_shares(self):
        accepted = [{0: True, 1: True}, {0: True, 1: True}, {0: True, 1: True}, {0: False}, {0: False}]
        assert select(accepted, 2, tool_share=0.75) == [[0, 1], [0, 1], [0, 1], [0], [0]]
        three_quarters_without = select(accepted, 2, tool_share=0.25)
        assert [len(numbers) for numbers in three_quarters_without[3:]] == [1, 1]
        assert sum(map(len, three_quarters_without[:3])) == 1  # round(2 · 0.25 / 0.75) = 1
        assert sum(map(len, select(accepted, 2, tool_share=1)[:3])) == 6
        assert select(accepted, 2, tool_share=0) == [[], [], [], [0], [0]]

    def test_a_share_that_one_kind_alone_cannot_have(self):
        with pytest.raises(
            ValueError, match="tool_share 0.5 cannot be reached: all 2 trajectories to choose from use tools"
        ):
            select([{0: True}, {1: True}], 1, tool_share=0.5)
        with pytest.raises(ValueError, match="all 1 trajectories to choose from do without tools"):
            select([{0: False}], 1, tool_share=1)
        assert select([{0: True}], 1, tool_share=1) == [[0]]
        assert select([{}], 1, tool_share=0.5) == [[]]

    @pytest.mark.parametrize(
        ("arguments", "named"), [((0,), "max_per_query"), ((1, 1.5), "tool_share"), ((1, -0.1), "tool_share")]
    )
    def test_settings_that_cannot_be(self, arguments, named):
        with pytest.raises(ValueError, match=named):
            select([], *arguments)

    @given(
        accepted=st.lists(st.dictionaries(st.integers(0, 7), st.booleans(), max_size=8), max_size=12),
        limit=st.integers(1, 4),
        share=st.none() | st.sampled_from([0.2, 0.5, 0.8]),
        seed=st.integers(0, 3),
    )
    def test_whatever_was_accepted(self, accepted, limit, share, seed):
        try:
            chosen = select(accepted, limit, share, seed)
        except ValueError:
            kinds = [set(samples.values()) for samples in accepted]
            assert len(set().union(*kinds)) == 1 or (limit == 1 and sum(len(kind) == 2 for kind in kinds) == 1)
            return
        assert chosen == select(accepted, limit, share, seed)
        for samples, numbers in zip(accepted, chosen, strict=True):
            assert len(numbers) <= limit and numbers == sorted(set(numbers)) and set(numbers) <= set(samples)
            if share is None:
                assert len(numbers) == min(limit, len(samples))
                tools = [samples[number] for number in numbers].count(True)
                possible = min(limit // 2, *(list(samples.values()).count(kind) for kind in (True, False)))
                assert min(tools, len(numbers) - tools) >= possible  # as balanced as it gets
        kinds = [samples[number] for samples, numbers in zip(accepted, chosen, strict=True) for number in numbers]
        if share is not None and kinds:
            tools, plain = kinds.count(True), kinds.count(False)
            off = abs(tools - plain * share / (1 - share)), abs(plain - tools * (1 - share) / share)
            assert min(off) <= 0.5 + 1e-9


class TestWriteSelection:
    @pytest.fixture
    def job(self, tmp_path, encoder):
        """Three queries, of which the second failed."""
        examples = [make_example(number) for number in range(3)]
        examples[1] = dataclasses.replace(examples[1], query=Item(image=b"no picture"))
        return examples, sample(tmp_path / "journal", examples, SamplingEngine(encoder))

    def test_records_in_the_order_of_the_queries(self, tmp_path, job):
        examples, journal = job
        summary = write_selection(tmp_path / "out", examples, ["q0", "q1", "q2"], journal, 1, 2)
        records = read_records(tmp_path / "out")
        assert [(r.trajectory.query_id, r.trajectory.sample) for r in records] == [
            ("q0", 0),
            ("q0", 1),
            ("q2", 0),
            ("q2", 1),
        ]
        assert [record.example.positives for record in records] == [[1]] * 4
        assert records[1].trajectory.completion == f"{CROP}\n{ANSWER}"
        assert {turn.seconds for record in records for turn in record.trajectory.turns} == {0.0}
        total = summary.total
        assert (total.queries, total.covered, total.sampled, total.accepted, total.kept) == (2, 2, 8, 4, 4)
        assert (total.sampled_with_tools, total.kept_with_tools) == (4, 2)
        assert summary.reasons == {"wrong": 4}
        assert summary.sampled_calls == {0: 4, 1: 4} and summary.kept_calls == {0: 2, 1: 2}
        assert list(summary.errors) == ["q1"]

    def test_another_choice_of_the_same_samples(self, tmp_path, job):
        examples, journal = job
        keys = ["q0", "q1", "q2"]
        write_selection(tmp_path / "out", examples, keys, journal, None, 4)
        assert len(read_records(tmp_path / "out")) == 8
        write_selection(tmp_path / "out", examples, keys, journal, 1, 1)
        assert [record.trajectory.num_calls for record in read_records(tmp_path / "out")] == [1, 0]

    def test_fewer_queries_than_were_sampled(self, tmp_path, job):
        examples, journal = job
        summary = write_selection(tmp_path / "out", examples[:1], ["q0"], journal, 1, 2)
        assert summary.total.queries == 1 and not summary.errors

    def test_nothing_accepted(self, tmp_path, encoder):
        journal = sample(tmp_path / "journal", [make_example(0)], SamplingEngine(encoder, [[WRONG]]), num_samples=1)
        summary = write_selection(tmp_path / "out", [make_example(0)], ["q0"], journal, 1, 1)
        assert summary.total.kept == 0 and len(read_records(tmp_path / "out")) == 0

    def test_data_that_is_not_what_was_sampled(self, tmp_path, job):
        examples, journal = job
        with pytest.raises(ValueError, match="a trajectory of query 'q0' was paired with query 'q2'"):
            write_selection(tmp_path / "out", examples[::-1], ["q0", "q1", "q2"], journal, 1, 2)

    def test_the_result_does_not_depend_on_the_processes(self, tmp_path, encoder):
        examples = [make_example(number) for number in range(5)]
        keys = [f"q{number}" for number in range(5)]
        files = []
        for count in (1, 3):
            for index in range(count)[::-1]:
                sample(tmp_path / str(count), examples, SamplingEngine(encoder), shard=Shard(index, count)).close()
            with Journal(tmp_path / str(count), {"seed": 3}) as journal:
                out = tmp_path / f"out{count}"
                write_card(out, write_selection(out, examples, keys, journal, 1, 2), {}, {})
            files.append({path.name: path.read_bytes() for path in out.iterdir()})
        assert files[0] == files[1] and set(files[0]) == {"README.md", "examples.parquet", "trajectories.jsonl"}


class TestCard:
    def test_says_what_was_done(self, tmp_path, encoder):
        examples = [make_example(0), dataclasses.replace(make_example(1), query=Item(image=b"no picture"))]
        journal = sample(tmp_path / "journal", examples, SamplingEngine(encoder))
        summary = write_selection(tmp_path, examples, ["q0", "q1"], journal, 1, 1)
        write_card(tmp_path, summary, {"model": "a/b", "sampling": {"seed": 3}}, {"keep": "first"})
        lines = [" ".join(line.split()) for line in (tmp_path / "README.md").read_text().splitlines()]
        assert lines[0] == "---" and "- rejection-sampling" in lines
        assert "| doors | 1 | 100.0 % | 4 | 50.0 % | 50.0 % | 1 | 100.0 % |" in lines
        assert "| all | 1 | 100.0 % | 4 | 50.0 % | 50.0 % | 1 | 100.0 % |" in lines
        assert "| wrong | 2 | 50.0 % | no relevant candidate is ranked high enough |" in lines
        assert "| 0 | 2 | 0 |" in lines and "| 1 | 2 | 1 |" in lines
        assert any(line.startswith("| q1 | query is no readable image") for line in lines)
        settings = json.loads((tmp_path / "README.md").read_text().partition("```json\n")[2].partition("```")[0])
        assert settings == {"model": "a/b", "sampling": {"seed": 3}, "keep": "first"}

    def test_many_failures_are_not_all_listed(self, tmp_path):
        summary = Summary(errors={f"q{number}": "broken | badly\nindeed" for number in range(25)})
        write_card(tmp_path, summary, {}, {})
        text = (tmp_path / "README.md").read_text()
        assert text.count("| broken \\| badly indeed |") == 20 and "and 5 more" in text

    def test_modalities(self):
        example = make_example(1, pictures=False)
        assert modalities(example) == "text → text"
        assert modalities(dataclasses.replace(example, query=Item(image=b"x"))) == "image → text"


def timeless(trajectory) -> dict:
    return untimed(trajectory.to_dict())


def untimed(value):
    if isinstance(value, dict):
        return {key: untimed(entry) for key, entry in value.items() if key != "seconds"}
    return [untimed(entry) for entry in value] if isinstance(value, list) else value


def test_the_folder_is_made(tmp_path, encoder):
    journal = sample(tmp_path / "journal", [make_example(0)], SamplingEngine(encoder))
    write_selection(tmp_path / "a" / "b", [make_example(0)], ["q0"], journal, 1, 1)
    assert Path(tmp_path / "a" / "b" / "trajectories.jsonl").is_file()
