"""Long jobs as journals: one finished query a line, so that a job that is killed goes on where it stopped.

A journal is a folder: `settings.json` says what the job was begun with, and each process appends to a file of its own.
Together the files say which queries are done, whichever process did them, so a job may go on with another number of
processes. Results are made from the whole journal in the order of the queries: they do not depend on who did what
when, nor on how often the job was interrupted.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


try:
    import fcntl
except ImportError:  # on Windows nothing keeps a second process from writing the same file
    fcntl = None

_SETTINGS = "settings.json"
_WAIT = datetime.timedelta(days=30)


class JournalError(ValueError):
    """A journal that cannot be used. The message names the file, what is wrong and what to do."""


class Journal:
    """
    What a long job has finished, query by query.

    A line counts once it is whole: what a killed process left of its last line is dropped. A query that failed is
    noted with its error and does not count as finished, so the next run tries it again.

    Args:
        folder (`str` or `Path`):
            Where the journal is or will be.
        settings (mapping):
            What the results depend on, ready for JSON. A journal that was begun with other settings is refused.
        shard (`int`, *optional*, defaults to 0):
            Number of this process, which names the file it appends to.

    Raises:
        `JournalError`: if the journal was begun with other settings, is damaged, or another process writes it.

    Example:

    ```python
    >>> import tempfile
    >>> from vretrver_hf.journal import Journal

    >>> folder = tempfile.mkdtemp()
    >>> with Journal(folder, {"model": "m"}) as journal:
    ...     journal.append("q1", [2, 0, 1])
    >>> with Journal(folder, {"model": "m"}) as journal:
    ...     "q1" in journal, "q2" in journal, journal["q1"]
    (True, False, [2, 0, 1])

    ```
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any], shard: int = 0):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        _check_settings(self.folder, settings)
        self._path = self.folder / f"{shard:05d}.jsonl"
        self._file = open(self._path, "ab", buffering=0)
        self._places: dict[str, tuple[Path, int]] = {}
        self._failed: dict[str, str] = {}
        try:
            _lock(self._file, self._path)
            _drop_torn_line(self._path)
            self.refresh()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: str) -> Any:
        path, offset = self._places[key]
        with open(path, "rb") as file:
            file.seek(offset)
            return json.loads(file.readline())["value"]

    @property
    def errors(self) -> dict[str, str]:
        """What went wrong, for each query that failed and was not finished since."""
        return {key: error for key, error in self._failed.items() if key not in self._places}

    def append(self, key: str, value: Any) -> None:
        """
        Notes a finished query. When this returns, the line is on the disk.

        Args:
            key (`str`):
                Identifies the query.
            value:
                What came of it, ready for JSON.
        """
        if key in self._places:
            raise ValueError(f"{key!r} is already in {self.folder}")
        self._places[key] = (self._path, self._write({"key": key, "value": value}))

    def fail(self, key: str, error: str) -> None:
        """Notes that a query could not be finished, and why."""
        self._write({"key": key, "error": error})
        self._failed[key] = error

    def refresh(self) -> None:
        """Reads what all processes have written so far."""
        self._places.clear()
        self._failed.clear()
        for path in sorted(self.folder.glob("*.jsonl")):
            for offset, entry in _read(path):
                if "error" in entry:
                    self._failed[entry["key"]] = entry["error"]
                else:
                    self._places.setdefault(entry["key"], (path, offset))

    def close(self) -> None:
        self._file.close()

    def _write(self, entry: dict[str, Any]) -> int:
        """Appends a line and returns where it begins."""
        offset = os.fstat(self._file.fileno()).st_size
        # As ASCII: half a surrogate pair, as in the name of a broken file, has no UTF-8.
        rest = memoryview(json.dumps(entry, ensure_ascii=True).encode() + b"\n")
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())
        return offset


@dataclasses.dataclass(frozen=True)
class Shard:
    """
    The part of a job that this process does.

    Args:
        index (`int`, *optional*, defaults to 0):
            Number of this process.
        count (`int`, *optional*, defaults to 1):
            Number of processes.
        device (`str`, *optional*):
            The device that is this process's own; `None` for a single process.
    """

    index: int = 0
    count: int = 1
    device: str | None = None

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def rows(self, total: int) -> range:
        """Every `count`-th of `total` rows. It depends on nothing else, so processes agree without a word."""
        return range(self.index, total, self.count)

    def leave(self) -> None:
        """Waits until all processes are here; then each goes on alone."""
        if self.count > 1:
            state = _partial_state()
            state.wait_for_everyone()
            state.destroy_process_group()


def current_shard() -> Shard:
    """
    What `accelerate launch` made of this process; the whole job where it was started by itself.

    Raises:
        `ImportError`: if there are several processes and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Shard()
    state = _partial_state()
    return Shard(state.process_index, state.num_processes, str(state.device))


def finished_entries(folder: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """
    What a job has finished so far, to be looked at by whoever is not part of it: nothing is locked or written.

    Args:
        folder (`str` or `os.PathLike`):
            A journal.

    Returns:
        iterator of `tuple`: key and value of each finished query, in the order in which each process finished them.

    Raises:
        `JournalError`: if there is no journal, or it is damaged.

    Example:

    ```python
    >>> import tempfile
    >>> from vretrver_hf.journal import Journal, finished_entries

    >>> folder = tempfile.mkdtemp()
    >>> with Journal(folder, {}) as journal:
    ...     journal.append("q1", [2, 0, 1])
    >>> dict(finished_entries(folder))
    {'q1': [2, 0, 1]}

    ```
    """
    if not (Path(folder) / _SETTINGS).is_file():
        raise JournalError(f"{folder} is no journal; name the folder `journal` of a job")
    seen: set[str] = set()
    for path in sorted(Path(folder).glob("*.jsonl")):
        for _, entry in _read(path):
            if "value" in entry and entry["key"] not in seen:
                seen.add(entry["key"])
                yield entry["key"], entry["value"]


def file_digest(*paths: str | os.PathLike[str]) -> str:
    """
    Tells files from others that stood in the same place before: what a journal's settings say of a job's source.

    All bytes are read, for a run or a pool may differ in a single line.

    Args:
        paths (`str` or `os.PathLike`):
            The files, in their order.

    Returns:
        `str`: their size together and a hash.
    """
    digest, size = hashlib.sha256(), 0
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
            size += file.tell()
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def _partial_state() -> Any:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError("several processes need accelerate: pip install accelerate") from error
    import torch

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()
    # A process that is done waits for the slowest, which may take longer than a collective's usual patience.
    return PartialState(cpu=on_cpu, timeout=_WAIT)


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / _SETTINGS
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    if not path.exists():
        # Each process writes the same, under a name of its own first: nobody reads half a file.
        draft = folder / f"{_SETTINGS}.{uuid.uuid4().hex}"
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise JournalError(f"{path} is damaged ({error}); delete {folder} to start afresh") from error
    changes = _changes(begun, json.loads(text))
    if changes:
        raise JournalError(
            f"{folder} was begun with other settings: {'; '.join(changes)}. To go on, use the old settings; "
            f"to start afresh, choose another output or delete {folder}"
        )


def _changes(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two trees of settings, leaf by leaf."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        prefix = f"{name}." if name else ""
        return [change for key in keys for change in _changes(old.get(key), new.get(key), f"{prefix}{key}")]
    return [] if old == new else [f"{name} was {json.dumps(old)} and is now {json.dumps(new)}"]


def _lock(file: Any, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise JournalError(f"another process is writing {path}; let it end or stop it first") from error
    except OSError:  # a file system without locks
        return


def _drop_torn_line(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))


def _read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines with where they begin. Another process may be in the middle of its last one."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
                key, _ = entry["key"], entry["error"] if "error" in entry else entry["value"]
                if not isinstance(key, str):
                    raise TypeError("its key is no string")
            except (ValueError, KeyError, TypeError) as error:
                raise JournalError(
                    f"{path}, line {number}: not an entry of a journal ({error!r}); delete the line to have its "
                    "query done again"
                ) from error
            yield offset, entry
            offset += len(line)


__all__ = ["Journal", "JournalError", "Shard", "current_shard", "file_digest", "finished_entries"]
