from __future__ import annotations

import datasets
import pytest
from evaluation_files import released_row, write_rows
from mbeir_files import write_mbeir

from vretrver_hf.data.mbeir import MBEIR
from vretrver_hf.data.trec import Hit, write_run
from vretrver_hf.evaluation.queries import MBEIRSet, ReleasedSet


class TestReleased:
    def open(self, path, rows, **options) -> ReleasedSet:
        return ReleasedSet.open(str(write_rows(path / "rows.parquet", rows)), **options)

    def test_coarse_results_with_what_is_relevant(self, tmp_path):
        queries = self.open(tmp_path, [released_row(0), released_row(1, hits=7, positive=2)])
        assert queries.keys == ["q0", "q1"] and queries.groups == ["cirr_task7"] * 2 and queries.has_prompts
        assert [len(query.candidates) for query in queries] == [50, 7]
        assert [query.relevant for query in queries] == [{"49": 1}, {"2": 1}]
        assert [item.id for item in queries[1].candidates] == list("0123456")

    def test_a_positive_that_the_coarse_stage_missed_counts_zero(self, tmp_path):
        (query,) = self.open(tmp_path, [released_row(0, hits=7, positive=30)])
        assert not set(query.relevant) & {item.id for item in query.candidates} and len(query.relevant) == 1

    def test_what_the_prompt_shows(self, tmp_path):
        row = released_row(0)
        (query,) = self.open(tmp_path, [row], coarse=False)
        assert len(query.candidates) == 20 and query.relevant == {"19": 1}
        (message,) = query.prompt(range(20))
        assert message["content"] == row["prompt"][0]["content"].replace("<image>", "< image>")  # no picture is meant

    @pytest.mark.parametrize("absent", [None, [], "column"])
    @pytest.mark.parametrize("inside", [False, True])
    def test_what_is_ranked_is_recorded(self, tmp_path, absent, inside):
        """Figures over the candidates that a row shows are not those over coarse results."""

        def row(number, has_hits):
            row = released_row(number)
            hits = row.pop("hit")
            if has_hits or absent != "column":
                (row["extra_info"] if inside else row)["hit"] = hits if has_hits else absent
            return row

        def ranked(name, *have, **options):
            (tmp_path / name).mkdir()
            queries = self.open(tmp_path / name, [row(n, has) for n, has in enumerate(have)], **options)
            lengths = [len(query.candidates) for query in queries]
            return queries.facts["candidates"], lengths

        assert ranked("all", True, True) == ("hits", [50, 50])
        assert ranked("none", False, False) == ("shown", [20, 20])
        assert ranked("off", True, True, coarse=False) == ("shown", [20, 20])
        if absent != "column":
            assert ranked("some", True, False) == ("hits, and shown in 1 of 2 rows", [50, 20])

    def test_a_compacted_row_is_ranked_by_its_hits(self, tmp_path):
        row = released_row(0, hits=3)
        shown = "Query: q Candidates:(1) <image>(2) a text(3) <image>b\n\nGuidelines: rank."
        row["prompt"] = [{"role": "user", "content": shown}]
        lists = {"candidate_images": ["1.png", "3.png"], "candidate_texts": ["a text", "b"]}
        row["extra_info"] |= {**lists, "num_candidates": 3, "ground_truth_position": 3}
        row["images"] = [{"image": path} for path in lists["candidate_images"]]
        row["hit"].append({"candidate_images": "3.png", "candidate_texts": "b"})
        (query,) = self.open(tmp_path, [row])
        assert query.relevant == {"3": 1}
        content = query.prompt([3, 0])[0]["content"]
        assert content.startswith("Query: q Candidates:(1) <image>b(2) Candidates:") and "\n\nGuidelines" in content

    def test_other_rows_in_the_same_place_have_another_digest(self, tmp_path):
        digests = []
        for source in ("one", "one", "two"):
            digests.append(self.open(tmp_path, [released_row(0, source=source)]).facts["digests"]["data"])
        assert digests[0] == digests[1] != digests[2]
        (tmp_path / "data").mkdir()
        whole = []
        for name, row in (("test-1", 1), ("test-2", 2), ("test-2", 3)):
            write_rows(tmp_path / "data" / f"{name}.parquet", [released_row(row)])
            whole.append(ReleasedSet.open(str(tmp_path / "data")).facts["digests"]["data"])
        assert len(set(whole)) == 3

    def test_a_data_set_of_the_hub_goes_by_its_fingerprint(self, tmp_path, monkeypatch):
        hosted = [datasets.Dataset.from_list([released_row(n)]) for n in (0, 0, 1)]
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split: hosted.pop())
        digests = [ReleasedSet.open("someone/rows").facts["digests"]["data"] for _ in range(3)]
        assert digests[0] != digests[1] == digests[2]

    def test_a_prompt_is_replayed_as_it_is(self, tmp_path):
        row = released_row(0)
        row["prompt"][0]["content"] = row["prompt"][0]["content"].replace("<image>", "")
        info = row["extra_info"]
        info["candidate_texts"] = [text.replace("<image>", "") for text in info["candidate_texts"]]
        (query,) = self.open(tmp_path, [row], coarse=False)
        assert query.prompt(range(20)) == row["prompt"]

    def test_a_window_of_the_coarse_results_in_the_prompts_own_words(self, tmp_path):
        (query,) = self.open(tmp_path, [released_row(0)])
        (message,) = query.prompt([49, 3])
        start, _, end = message["content"].partition("Candidates:\n")
        assert start == "Query: Candidates: q0\n"
        assert end == "(1) Candidates:(1) < image> worth 49\n(2) Candidates:(1) < image> worth 3\n\nGuidelines: rank."

    def test_rows_without_hits_or_prompts(self, tmp_path):
        row = released_row(0, source="mine") | {"prompt": None}
        del row["hit"]
        queries = self.open(tmp_path, [row])
        assert not queries.has_prompts and queries.groups == ["mine"]
        assert queries[0].prompt is None and len(queries[0].candidates) == 20

    def test_ids_of_ones_own(self, tmp_path):
        row = released_row(0, hits=3)
        del row["hit"]
        row["extra_info"]["candidate_ids"] = [f"c{n}" for n in range(row["extra_info"]["num_candidates"])]
        (query,) = self.open(tmp_path, [row])
        assert query.candidates[0].id == "c0" and list(query.relevant)[0].startswith("c")

    def test_limit_and_duplicates(self, tmp_path):
        rows = [released_row(0), released_row(1), released_row(0)]
        assert self.open(tmp_path, rows, limit=2).keys == ["q0", "q1"]
        with pytest.raises(ValueError, match="rows 0 and 2 have the same query id 'q0'"):
            self.open(tmp_path, rows)

    def test_a_bad_row_is_named_when_it_is_read(self, tmp_path):
        bad = released_row(1)
        bad["extra_info"]["ground_truth_position"] = 21
        queries = self.open(tmp_path, [released_row(0), bad])
        with pytest.raises(ValueError, match="rows.parquet, row 1: extra_info.ground_truth_position"):
            queries[1]


class TestMBEIR:
    @pytest.fixture
    def folder(self, tmp_path):
        return write_mbeir(tmp_path / "mbeir", {7: "cirr"})

    @pytest.fixture
    def run(self, tmp_path):
        hits = [("7:0", [Hit("7:1000005", 0.9), Hit("7:1000000", 0.3)]), ("7:2", [Hit("7:1000009", 1.0)])]
        write_run(tmp_path / "run.txt", hits, task_id=7)
        return tmp_path / "run.txt"

    def test_queries_with_the_hits_of_a_run(self, folder, run):
        queries = MBEIRSet.open(folder, "cirr_task7", run)
        assert queries.keys == ["7:0", "7:1", "7:2", "7:3"] and set(queries.groups) == {"cirr_task7"}
        assert [item.id for item in queries[0].candidates] == ["7:1000005", "7:1000000"]
        assert queries[0].relevant == {"7:1000000": 1, "7:1000029": 1}  # the second was not retrieved
        assert queries[0].query.text == "Find it. query 0" and queries[0].query.image is not None
        assert queries[1].candidates == []
        digests = queries.facts["digests"]
        assert set(digests) == {"queries", "pool", "instructions", "qrels", "run"} and len(set(digests.values())) == 5
        assert queries.facts == {"task": "cirr_task7", "pool": "local", "instruction": "first", "digests": digests}

    def test_instructions_and_the_global_pool(self, folder, run):
        queries = MBEIRSet.open(folder, "cirr_task7", run, instruction="none", union=True, limit=1)
        assert queries[0].query.text == "query 0" and len(queries) == 1
        digests = queries.facts["digests"]
        assert queries.facts == {"task": "cirr_task7", "pool": "global", "instruction": "none", "digests": digests}
        assert MBEIRSet.open(folder, "cirr_task7", run, instruction="3").facts["instruction"] == "seed 3"
        with pytest.raises(ValueError, match="unknown instruction 'any'"):
            MBEIRSet.open(folder, "cirr_task7", run, instruction="any")

    @pytest.mark.parametrize(
        ("name", "file"),
        [
            ("queries", "mbeir/query/test/mbeir_cirr_task7_test.jsonl"),
            ("pool", "mbeir/cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl"),
            ("instructions", "mbeir/instructions/query_instructions.tsv"),
            ("qrels", "mbeir/qrels/test/mbeir_cirr_task7_test_qrels.txt"),
            ("run", "run.txt"),
        ],
    )
    def test_a_changed_file_changes_its_digest_alone(self, folder, run, tmp_path, name, file):
        before = MBEIRSet.open(folder, "cirr_task7", run).facts["digests"]
        with open(tmp_path / file, "a") as opened:
            opened.write("\n")
        after = MBEIRSet.open(folder, "cirr_task7", run).facts["digests"]
        assert [key for key in before if before[key] != after[key]] == [name]

    def test_a_copy_without_instructions(self, folder, run):
        (folder / "instructions" / "query_instructions.tsv").unlink()
        queries = MBEIRSet.open(folder, "cirr_task7", run, instruction="none")
        assert "instructions" not in queries.facts["digests"] and queries[0].query.text == "query 0"

    def test_a_run_of_other_things(self, folder):
        with pytest.raises(ValueError, match="the run has none of the 4 queries of cirr_task7"):
            MBEIRSet(MBEIR(folder), "cirr_task7", {"9:1": [Hit("7:1000005", 0.9)]})
        queries = MBEIRSet(MBEIR(folder), "cirr_task7", {"7:0": [Hit("7:77", 0.9)]})
        with pytest.raises(ValueError, match="query 7:0: the pool has no candidate '7:77' of the run"):
            queries[0]
