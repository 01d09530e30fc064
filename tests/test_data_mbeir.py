from __future__ import annotations

import json
import zipfile

import pytest
from mbeir_files import KINDS, write_jsonl, write_mbeir

from vretrver_hf.data.mbeir import MBEIR, Pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_mbeir(tmp_path_factory.mktemp("mbeir"), {**{n: f"set{n}" for n in KINDS}, 0: "mscoco"})


@pytest.fixture
def mbeir(folder):
    return MBEIR(folder)


class TestQueries:
    @pytest.mark.parametrize("number", KINDS)
    def test_every_kind_of_task(self, mbeir, number):
        task = f"{'mscoco' if number == 0 else f'set{number}'}_task{number}"
        queries, pool = list(mbeir.queries(task)), mbeir.pool(task)
        asked, given = KINDS[number]
        assert mbeir.queries(task).query_ids == [f"{number}:{q}" for q in range(4)]
        assert [query.query_id for query in queries] == [f"{number}:{q}" for q in range(4)]
        for place, query in enumerate(queries):
            assert query.modality == asked and query.instruction is None and query.instructed == query.item
            assert (query.item.text is not None, query.item.image is not None) == ("text" in asked, "image" in asked)
            assert f"{number}:{10**6 + place}" in query.relevant
            for did in query.relevant:
                item = pool[did]
                assert item.id == did
                assert (item.text is not None, item.image is not None) == ("text" in given, "image" in given)
                if item.image is not None:
                    assert item.load_image().size == (30, 30)

    def test_a_grade_of_zero_is_not_relevant(self, mbeir):
        query = mbeir.queries("set7_task7")[0]
        assert query.relevant == {"7:1000000": 1, "7:1000029": 1}

    def test_tasks(self, mbeir):
        assert mbeir.tasks() == ["mscoco_task0", *(f"set{n}_task{n}" for n in KINDS if n)]


class TestInstructions:
    def test_the_first(self, mbeir):
        first = mbeir.instructions()
        queries = list(mbeir.queries("set7_task7", first))
        assert {query.instruction for query in queries} == {"Find it."} and first.name == "first"
        assert queries[1].instructed.text == "Find it. query 1" and queries[1].item.text == "query 1"

    def test_a_picture_alone_gets_the_instruction_as_its_text(self, mbeir):
        query = mbeir.queries("set4_task4", mbeir.instructions())[0]
        assert query.item.text is None
        assert query.instructed.text == "Find it." and query.instructed.image == query.item.image

    def test_a_seeded_draw_depends_on_seed_and_query_alone(self, mbeir):
        drawn = [[q.instruction for q in mbeir.queries("set1_task1", mbeir.instructions(s))] for s in range(8)]
        assert drawn[3] == [q.instruction for q in mbeir.queries("set1_task1", mbeir.instructions(3))]
        assert {wording for row in drawn for wording in row} == {"Find it.", "Search for set1."}
        assert mbeir.instructions(3).name == "seed 3"

    def test_none_for_such_a_query(self, mbeir):
        with pytest.raises(ValueError, match="no instructions for text → text of data set 7"):
            mbeir.instructions().choose("7:0", "text", "text")

    def test_quotation_marks_are_text(self, folder, tmp_path):
        (tmp_path / "query").mkdir()
        (tmp_path / "instructions").mkdir()
        path = tmp_path / "instructions" / "query_instructions.tsv"
        path.write_text('a\tb\tc\td\te\ntext\timage\tname\t9\tFind "it.\tor this"\n')
        assert MBEIR(tmp_path).instructions().prompts["text", "image", "9"] == ['Find "it.', 'or this"']
        path.write_text("a\tb\tc\td\te\ntext\timage\tname\t9\n")
        with pytest.raises(ValueError, match="line 2: prompts are missing"):
            MBEIR(tmp_path).instructions()


class TestPool:
    def test_any_order_and_what_is_not_there(self, mbeir):
        pool = mbeir.pool("set1_task1")
        assert len(pool) == 30 and pool["1:1000029"].text == "Candidates: 29 of 1"
        assert "1:1000000" in pool and "1:5" not in pool and "5" not in pool and 5 not in pool
        with pytest.raises(KeyError, match="has no candidate '1:5'"):
            pool["1:5"]

    def test_iterates_in_the_order_of_the_file(self, mbeir):
        pool = mbeir.pool("set2_task2")
        assert [item.id for item in pool] == list(pool.ids()) == [f"2:{10**6 + n}" for n in range(30)]
        assert [item.id for item in pool.slice(28, 40)] == ["2:1000028", "2:1000029"]

    def test_the_global_pool_holds_all(self, mbeir):
        pool = mbeir.pool()
        assert len(pool) == 8 * 30 and pool["8:1000003"].text == "Candidates: 3 of 8"

    def test_mscoco_has_a_pool_for_the_test_split_alone(self, mbeir):
        assert mbeir.pool_path("mscoco_task0").name == "mbeir_mscoco_task0_test_cand_pool.jsonl"

    def test_pictures_in_an_archive(self, folder, tmp_path):
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            archive.write(folder / "mbeir_images/0/3.png", "mbeir_images/0/3.png")
        item = MBEIR(folder, tmp_path / "images.zip").pool("mscoco_task0")["0:1000003"]
        assert isinstance(item.image, bytes) and item.load_image().size == (30, 30)

    @pytest.mark.parametrize(
        ("rows", "reason"),
        [
            ([{"did": "1:1", "txt": "a"}, {"did": "1:1", "txt": "b"}], "two candidates have the did '1:1'"),
            ([{"did": "1:1", "txt": "a"}, {"did": "one", "txt": "b"}], "line 2: did must be 'data set:number'"),
            ([{"txt": "a"}], "line 1: did must be"),
            (["a"], "line 1: did must be"),
        ],
    )
    def test_rows_that_cannot_be_used(self, tmp_path, rows, reason):
        write_jsonl(tmp_path / "pool.jsonl", rows)
        with pytest.raises(ValueError, match=reason):
            Pool(tmp_path / "pool.jsonl")

    def test_an_empty_candidate_is_named_when_it_is_read(self, tmp_path):
        write_jsonl(tmp_path / "pool.jsonl", [{"did": "1:1", "txt": "", "img_path": None}])
        with pytest.raises(ValueError, match="candidate 1:1: txt and img_path are both empty"):
            Pool(tmp_path / "pool.jsonl")["1:1"]


class TestMistakes:
    def test_no_mbeir(self, tmp_path):
        with pytest.raises(ValueError, match="holds no M-BEIR"):
            MBEIR(tmp_path)

    def test_no_such_task(self, mbeir):
        with pytest.raises(ValueError, match="mbeir_cirr_task7_test.*there are mscoco_task0, set1_task1"):
            list(mbeir.queries("cirr_task7"))
        with pytest.raises(ValueError, match="task cirr_task7 has no candidate pool"):
            mbeir.pool("cirr_task7")

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"qid": None}, "line 2: qid must be a string, got None"),
            (
                {"query_modality": "video"},
                "line 2: query_modality must be one of text, image, image,text, got 'video'",
            ),
            ({"query_txt": "", "query_img_path": None}, "line 2: query_txt and query_img_path are both empty"),
        ],
    )
    def test_a_query_that_cannot_be_used(self, tmp_path, change, reason):
        folder = write_mbeir(tmp_path, {7: "cirr"})
        path = folder / "query/test/mbeir_cirr_task7_test.jsonl"
        rows = [json.loads(line) for line in path.open()]
        rows[1] |= change
        write_jsonl(path, rows)
        with pytest.raises(ValueError, match=reason):
            list(MBEIR(folder).queries("cirr_task7"))

    def test_a_task_without_a_number(self, tmp_path):
        folder = write_mbeir(tmp_path, {7: "cirr"})
        for name in ("query/test/mbeir_{}_test.jsonl", "qrels/test/mbeir_{}_test_qrels.txt"):
            (folder / name.format("cirr_task7")).rename(folder / name.format("cirr_task5"))
        with pytest.raises(ValueError, match="does not end in the number of an M-BEIR task"):
            list(MBEIR(folder).queries("cirr_task5"))
