"""The coarse stage: embed queries and a pool, keep the nearest. Batched, resumable, FAISS through `datasets`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .data.trec import Hit
from .items import Item
from .journal import Journal, Shard


if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

Side = Literal["query", "candidate"]

CHUNK = 1_024
"""Items that are embedded between two notes in the journal."""

_QUERIES_AT_A_TIME = 1_024
_VECTORS_AT_A_TIME = 65_536


class Embedder(Protocol):
    """
    Makes vectors of items.

    Attributes:
        name (`str`): What it is, for the record.
    """

    name: str

    def encode(self, items: Sequence[Item], side: Side) -> np.ndarray:
        """
        Embeds items: text, image or both.

        Args:
            items (sequence of `Item`):
                The items.
            side (`str`):
                `"query"` or `"candidate"`, for embedders that tell them apart.

        Returns:
            `np.ndarray`: float32 of shape (items, dimensions), each of length 1.
        """


class SentenceTransformerEmbedder:
    """
    Any multimodal model of sentence-transformers.

    A model that takes text and image together gets them so; of one that takes each alone (CLIP) the two vectors are
    added, as UniIR's score fusion does.

    Args:
        model (`str`, `Path` or `SentenceTransformer`):
            Hub id, folder, or a loaded model.
        batch_size (`int`, *optional*, defaults to 32):
            Items at a time.
        options:
            Passed to `SentenceTransformer`: `device`, `revision`, `model_kwargs`, …

    Example:

    ```python
    embedder = SentenceTransformerEmbedder("sentence-transformers/clip-ViT-B-32", device="cuda")
    vectors = embedder.encode([Item(text="a cat"), Item(image="cat.png")], "candidate")
    ```
    """

    def __init__(self, model: str | Path | SentenceTransformer, batch_size: int = 32, **options: Any):
        from sentence_transformers import SentenceTransformer

        self.model = model if isinstance(model, SentenceTransformer) else SentenceTransformer(str(model), **options)
        self.name = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        self.batch_size = batch_size

    def encode(self, items: Sequence[Item], side: Side) -> np.ndarray:
        import numpy as np

        kinds: dict[tuple[bool, bool], list[int]] = {}
        for place, item in enumerate(items):
            kinds.setdefault((item.text is not None, item.image is not None), []).append(place)
        rows: dict[int, np.ndarray] = {}
        for (has_text, has_image), places in kinds.items():  # a batch of one kind each
            texts = [item.text for item in (items[p] for p in places)] if has_text else None
            images = [items[p].load_image() for p in places] if has_image else None
            rows.update(zip(places, self._encode(texts, images, side), strict=True))
        return normalised(np.stack([rows[place] for place in range(len(items))])) if rows else np.zeros((0, 0))

    def _encode(self, texts: list[Any] | None, images: list[Any] | None, side: Side) -> np.ndarray:
        if texts is None or images is None:
            return self._run(images if texts is None else texts, side)
        if self.model.supports(("text", "image")) or self.model.supports(("image", "text")):
            return self._run([{"text": t, "image": i} for t, i in zip(texts, images, strict=True)], side)
        return normalised(self._run(texts, side)) + normalised(self._run(images, side))

    def _run(self, inputs: list[Any], side: Side) -> np.ndarray:
        encode = self.model.encode_query if side == "query" else self.model.encode_document
        return encode(inputs, batch_size=self.batch_size, show_progress_bar=False, convert_to_numpy=True)


def load_embedder(name: str | Path, batch_size: int = 32, device: str | None = None, dtype: str = "auto") -> Embedder:
    """
    Loads an embedder.

    Args:
        name (`str` or `Path`):
            Hub id or folder. A Qwen-VL model that is not sentence-transformers' is taken for LamRA-Ret.
        batch_size (`int`, *optional*, defaults to 32):
            Items at a time.
        device (`str`, *optional*):
            Where it runs; a GPU where there is one.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Number format.

    Raises:
        `OSError`: if there is no such model.
    """
    from transformers.utils import cached_file

    missing = {"_raise_exceptions_for_missing_entries": False}
    if cached_file(str(name), "modules.json", **missing) is None:
        from .lamra import LamRAEmbedder

        return LamRAEmbedder.from_pretrained(name, batch_size=batch_size, device=device, dtype=dtype)
    return SentenceTransformerEmbedder(name, batch_size, device=device, model_kwargs={"dtype": dtype})


class Vectors(Sequence["np.ndarray"]):
    """
    Vectors on the disk in chunks, read where they are needed.

    Args:
        paths (sequence of `Path`):
            `.npy` files, in order.

    Raises:
        `ValueError`: if a file holds no vectors of the others' number of dimensions.
    """

    def __init__(self, paths: Sequence[Path]):
        import numpy as np

        self._parts = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
        for path, part in zip(paths, self._parts, strict=True):
            if part.ndim != 2 or part.shape[1] != self._parts[0].shape[1]:
                raise ValueError(f"{path} has the shape {part.shape}; expected (count, dimensions), all of one width")
        self._starts = np.cumsum([0, *map(len, self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        """A vector, or a block of them as float32."""
        import numpy as np

        if not isinstance(index, slice):
            return self[index : index + 1][0]
        start, stop, _ = index.indices(len(self))
        first, last = np.searchsorted(self._starts, [start, max(start, stop - 1)], side="right") - 1
        cuts = range(first, min(last, len(self._parts) - 1) + 1)
        blocks = [
            part[max(0, start - at) : max(0, stop - at)]
            for at, part in ((self._starts[i], self._parts[i]) for i in cuts)
        ]
        return np.concatenate(blocks).astype(np.float32) if blocks else np.zeros((0, 0), np.float32)


def embed(
    folder: str | os.PathLike[str],
    embedder: Embedder,
    items: Callable[[int, int], Iterable[Item]],
    count: int,
    side: Side,
    shard: Shard | None = None,
    chunk: int = CHUNK,
    on_chunk: Callable[[int], None] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Vectors | None:
    """
    Embeds items into files, chunk by chunk; chunks that are there already are left out, so a killed job goes on.

    Args:
        folder (`str` or `os.PathLike`):
            Where the vectors go.
        embedder (`Embedder`):
            Makes them.
        items (`Callable[[int, int], Iterable[Item]]`):
            Gives the items from one place to another, such as [`~vretrver_hf.data.mbeir.Pool.slice`].
        count (`int`):
            How many there are.
        side (`str`):
            `"query"` or `"candidate"`.
        shard (`Shard`, *optional*):
            Which of the chunks this process does; all by default.
        chunk (`int`, *optional*, defaults to 1,024):
            Items of a file.
        on_chunk (`Callable[[int], None]`, *optional*):
            Called with the number of items of each chunk as it is done.
        settings (mapping, *optional*):
            What else the vectors depend on, ready for JSON: the files that the items come from, the model's weights, …

    Returns:
        `Vectors`: all of them, or `None` where other processes are not ready yet.

    Raises:
        `JournalError`: if the folder was begun with another embedder, number of items or chunks, or other settings.
    """
    import numpy as np

    folder, shard = Path(folder), shard or Shard()
    starts = range(0, count, chunk)
    settings = {**(settings or {}), "embedder": embedder.name, "side": side, "count": count, "chunk": chunk}
    with Journal(folder / "journal", settings, shard.index) as journal:
        for number in shard.rows(len(starts)):
            start, path = starts[number], _chunk_path(folder, starts[number])
            if str(start) in journal:
                continue
            vectors = embedder.encode(list(items(start, min(start + chunk, count))), side)
            partial = path.with_suffix(".part")
            with open(partial, "wb") as file:
                np.save(file, vectors.astype(np.float32), allow_pickle=False)
            partial.replace(path)
            journal.append(str(start), len(vectors))
            if on_chunk is not None:
                on_chunk(len(vectors))
        journal.refresh()
        complete = all(str(start) in journal for start in starts)
    return Vectors([_chunk_path(folder, start) for start in starts]) if complete else None


def load_vectors(path: str | os.PathLike[str]) -> Vectors:
    """
    Vectors made before: a folder that [`embed`] filled, or a `.npy` file.

    Raises:
        `ValueError`: if there are none.
    """
    path = Path(path)
    paths = sorted(path.glob("[0-9]*.npy")) if path.is_dir() else [path]
    if not paths or not all(file.is_file() for file in paths):
        raise ValueError(f"{path} holds no vectors: name a .npy file, or a folder of them")
    return Vectors(paths)


@dataclasses.dataclass
class Index:
    """
    A pool's vectors, ready to be searched by inner product, which is the cosine for vectors of length 1.

    Args:
        ids (sequence of `str`):
            The candidates' ids, in the order of their vectors.
        vectors (`Vectors` or `np.ndarray`):
            Their vectors.
        factory (`str`, *optional*, defaults to `"Flat"`):
            FAISS index, as its factory writes it. `"Flat"` is exact; `"IVF4096,Flat"` and others trade that for speed.
        device (`int`, *optional*):
            Number of a GPU, -1 for all; the CPU by default.

    Raises:
        `ValueError`: if ids and vectors differ in number.

    Example:

    ```python
    >>> import numpy as np
    >>> from vretrver_hf.retrieval import Index

    >>> index = Index(["a", "b"], np.eye(2, dtype=np.float32))
    >>> [[hit.id for hit in hits] for hits in index.search(np.array([[0.6, 0.8]], np.float32), k=2)]
    [['b', 'a']]

    ```
    """

    ids: Sequence[str]
    vectors: Any
    factory: str = "Flat"
    device: int | None = None

    def __post_init__(self) -> None:
        import faiss
        from datasets import disable_progress_bars
        from datasets.search import FaissIndex

        if len(self.ids) != len(self.vectors):
            raise ValueError(f"{len(self.ids)} ids for {len(self.vectors)} vectors: they must go together")
        disable_progress_bars()
        self._index = FaissIndex(
            device=self.device, string_factory=self.factory, metric_type=faiss.METRIC_INNER_PRODUCT
        )
        train = None if self.factory.endswith("Flat") and "," not in self.factory else len(self.vectors)
        if len(self.vectors):
            self._index.add_vectors(self.vectors, batch_size=_VECTORS_AT_A_TIME, train_size=train)

    def search(self, queries: Any, k: int = 50) -> Iterator[list[Hit]]:
        """
        The nearest candidates of each query, with their scores, best first.

        Args:
            queries (`Vectors` or `np.ndarray`):
                The queries' vectors.
            k (`int`, *optional*, defaults to 50):
                How many.
        """
        import numpy as np

        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        for start in range(0, len(queries), _QUERIES_AT_A_TIME):
            block = np.ascontiguousarray(queries[start : start + _QUERIES_AT_A_TIME], np.float32)
            if not len(self.ids):
                yield from ([] for _ in block)
                continue
            scores, places = self._index.search_batch(block, min(k, len(self.ids)))
            for row, its_places in zip(scores, places, strict=True):
                # An index that looks at a part only pads with -1 what it did not find.
                yield [Hit(self.ids[p], float(s)) for s, p in zip(row, its_places, strict=True) if p >= 0]


def normalised(vectors: np.ndarray) -> np.ndarray:
    """The vectors at length 1; those of length 0 stay."""
    import numpy as np

    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def _chunk_path(folder: Path, start: int) -> Path:
    return folder / f"{start:010d}.npy"
