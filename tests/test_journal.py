from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vretrver_hf.journal import Journal, JournalError, Shard, current_shard, finished_entries


SETTINGS = {"model": "m", "sampling": {"temperature": 1.0, "seed": 0}}


def filled(folder: Path, *keys: str, shard: int = 0) -> Path:
    """A journal that holds these keys, each with its own name as value; returns the shard's file."""
    with Journal(folder, SETTINGS, shard) as journal:
        for key in keys:
            journal.append(key, {"is": key})
    return folder / f"{shard:05d}.jsonl"


class TestJournal:
    def test_what_was_appended_is_there_and_after_opening_it_again(self, tmp_path):
        with Journal(tmp_path / "new" / "journal", SETTINGS) as journal:
            assert "a" not in journal and len(journal) == 0
            journal.append("a", [1, {"b": None}])
            assert journal["a"] == [1, {"b": None}]
        with Journal(tmp_path / "new" / "journal", SETTINGS) as journal:
            assert "a" in journal and len(journal) == 1
            journal.append("b", "second")
            assert [journal["a"], journal["b"]] == [[1, {"b": None}], "second"]

    def test_a_finished_query_is_not_finished_again(self, tmp_path):
        with Journal(tmp_path, SETTINGS) as journal:
            journal.append("a", 1)
            with pytest.raises(ValueError, match="'a' is already in"):
                journal.append("a", 2)
            assert journal["a"] == 1

    def test_others_look_on_without_joining(self, tmp_path):
        filled(tmp_path, "b", "a")
        with Journal(tmp_path, SETTINGS, 1) as journal:  # whose files are locked
            journal.fail("c", "broken")
            journal.append("c", 3)
            journal.fail("d", "broken")
            before = sorted(tmp_path.iterdir())
            assert list(finished_entries(tmp_path)) == [("b", {"is": "b"}), ("a", {"is": "a"}), ("c", 3)]
        assert sorted(tmp_path.iterdir()) == before
        with pytest.raises(JournalError, match="elsewhere is no journal"):
            next(finished_entries(tmp_path / "elsewhere"))

    def test_text_that_no_encoding_takes(self, tmp_path):
        text = "half a pair \ud800, a line\nbreak, a separator \u2028, 漢字"
        with Journal(tmp_path, SETTINGS) as journal:
            journal.append(text, text)
        with Journal(tmp_path, SETTINGS) as journal:
            assert journal[text] == text

    def test_what_failed_is_not_finished(self, tmp_path):
        with Journal(tmp_path, SETTINGS) as journal:
            journal.fail("a", "no such file")
            journal.fail("b", "broken")
            assert "a" not in journal
        with Journal(tmp_path, SETTINGS) as journal:
            assert journal.errors == {"a": "no such file", "b": "broken"}
            journal.fail("b", "still broken")
            journal.append("a", "mended")
            assert journal.errors == {"b": "still broken"}
        with Journal(tmp_path, SETTINGS) as journal:
            assert journal.errors == {"b": "still broken"} and journal["a"] == "mended"

    def test_a_directory_that_cannot_be(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError):
            Journal(tmp_path / "file", SETTINGS)


class TestTornLines:
    def test_whatever_is_left_of_the_last_line_is_dropped(self, tmp_path):
        path = filled(tmp_path, "a", "b")
        data = path.read_bytes()
        end_of_first = data.index(b"\n") + 1
        for cut in range(end_of_first, len(data)):  # the last cut has the whole entry, but not its line break
            path.write_bytes(data[:cut])
            with Journal(tmp_path, SETTINGS) as journal:
                assert "a" in journal and "b" not in journal
                journal.append("b", {"is": "b"})
            assert path.read_bytes() == data

    def test_zeros_as_a_power_cut_leaves_them(self, tmp_path):
        path = filled(tmp_path, "a")
        data = path.read_bytes()
        path.write_bytes(data + b"\0" * 100)
        with Journal(tmp_path, SETTINGS) as journal:
            assert len(journal) == 1
        assert path.read_bytes() == data

    def test_the_line_that_another_process_is_writing_is_left_alone(self, tmp_path):
        path = filled(tmp_path, "a", "b", shard=1)
        path.write_bytes(torn := path.read_bytes()[:-3])
        with Journal(tmp_path, SETTINGS, shard=0) as journal:
            assert "a" in journal and "b" not in journal
        assert path.read_bytes() == torn

    @pytest.mark.parametrize(
        "line",
        [
            b"{\n",  # no JSON
            b"[1]\n",  # no object
            b'{"value": 1}\n',  # no key
            b'{"key": 3, "value": 1}\n',  # a key that is no string
            b'{"key": "x"}\n',  # neither value nor error
            b"\n",  # nothing
            b"\xff\n",  # no UTF-8
        ],
    )
    def test_a_whole_line_that_is_no_entry_is_named(self, tmp_path, line):
        path = filled(tmp_path, "a")
        path.write_bytes(path.read_bytes() + line + b'{"key": "b", "value": 1}\n')
        with pytest.raises(JournalError, match=r"00000\.jsonl, line 2: not an entry of a journal.*delete the line"):
            Journal(tmp_path, SETTINGS)

    def test_killed_in_the_middle(self, tmp_path):
        """What the child says it has finished is there, whenever it is killed."""
        code = """
import sys
from vretrver_hf.journal import Journal
with Journal(sys.argv[1], {}) as journal:
    for number in range(10**6):
        if str(number) not in journal:
            journal.append(str(number), "x" * 5000)
            print(number, flush=True)
"""
        said = -1
        for _ in range(3):
            command = [sys.executable, "-c", code, str(tmp_path)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                for _ in range(20):
                    said = int(child.stdout.readline())
                child.send_signal(signal.SIGKILL)
                said = max([said, *map(int, child.stdout.read().split())])
        with Journal(tmp_path, {}) as journal:
            assert len(journal) - (said + 1) in (0, 1)  # one may be written and not yet said
            assert all(journal[str(number)] == "x" * 5000 for number in range(said + 1))


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({**SETTINGS, "model": "n"}, 'model was "m" and is now "n"'),
            ({**SETTINGS, "sampling": {"temperature": 0.5, "seed": 0}}, "sampling.temperature was 1.0 and is now 0.5"),
            ({**SETTINGS, "sampling": None}, 'sampling was {"seed": 0, "temperature": 1.0} and is now null'),
            ({**SETTINGS, "tools": False}, "tools was null and is now false"),
            ({"model": "m"}, "and is now null"),
            (
                {**SETTINGS, "sampling": {"temperature": 2.0, "seed": 3}},
                "seed was 0 and is now 3; sampling.temperature",
            ),
        ],
    )
    def test_other_settings_are_refused_and_named(self, tmp_path, settings, told):
        filled(tmp_path, "a")
        with pytest.raises(JournalError) as refused:
            Journal(tmp_path, settings)
        assert told in str(refused.value)
        assert f"to start afresh, choose another output or delete {tmp_path}" in str(refused.value)

    def test_the_same_settings_written_differently(self, tmp_path):
        Journal(tmp_path, {"a": (1, 2), "b": {"c": 1, "d": 2}}).close()
        Journal(tmp_path, {"b": {"d": 2, "c": 1}, "a": [1, 2]}).close()

    def test_damaged(self, tmp_path):
        filled(tmp_path, "a")
        (tmp_path / "settings.json").write_text("{")
        with pytest.raises(JournalError, match=r"settings\.json is damaged .* delete .* to start afresh"):
            Journal(tmp_path, SETTINGS)


class TestShards:
    def test_a_job_goes_on_with_another_number_of_processes(self, tmp_path):
        filled(tmp_path, "a", "d", shard=0)
        filled(tmp_path, "b", shard=1)
        filled(tmp_path, "c", shard=12)
        with Journal(tmp_path, SETTINGS) as journal:
            assert all(key in journal for key in "abcd")
            assert [journal[key]["is"] for key in "abcd"] == list("abcd")

    def test_refresh_sees_what_others_have_written_since(self, tmp_path):
        with Journal(tmp_path, SETTINGS, shard=0) as first, Journal(tmp_path, SETTINGS, shard=1) as second:
            first.append("a", 1)
            second.append("b", 2)
            second.fail("c", "broken")
            assert "b" not in first
            first.refresh()
            assert (first["a"], first["b"], first.errors) == (1, 2, {"c": "broken"})

    def test_what_one_process_failed_another_may_have_finished(self, tmp_path):
        with Journal(tmp_path, SETTINGS, shard=1) as journal:
            journal.fail("a", "broken")
        filled(tmp_path, "a", shard=0)
        with Journal(tmp_path, SETTINGS, shard=1) as journal:
            assert "a" in journal and journal.errors == {}

    def test_two_processes_do_not_write_one_file(self, tmp_path):
        with Journal(tmp_path, SETTINGS) as journal:
            with pytest.raises(JournalError, match=r"another process is writing .*00000\.jsonl"):
                Journal(tmp_path, SETTINGS)
            journal.append("a", 1)
        filled(tmp_path, "b")

    @given(total=st.integers(0, 200), count=st.integers(1, 20))
    def test_every_row_has_one_process(self, total, count):
        rows = [row for index in range(count) for row in Shard(index, count).rows(total)]
        assert sorted(rows) == list(range(total))

    def test_by_itself_a_process_does_everything(self, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        shard = current_shard()
        assert (shard.index, shard.count, shard.device, shard.is_main) == (0, 1, None, True)
        shard.leave()


def test_every_entry_is_one_line_of_ascii(tmp_path):
    path = filled(tmp_path, "ä\n", "b")
    lines = path.read_bytes().decode("ascii").splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["ä\n", "b"]
    assert os.listdir(tmp_path) and not [name for name in os.listdir(tmp_path) if name.startswith("settings.json.")]
