"""What an example is: a query and its candidates, each text, a drawing, a scene of drawings, or text and a picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


TASKS = {"t2i": 0, "t2t": 1, "t2it": 2, "i2t": 3, "i2i": 4, "it2t": 6, "it2i": 7, "it2it": 8}
"""Name of a task (what the query is, 2, what the candidates are; t text, i picture, it both) to its M-BEIR number."""
SPLITS = ("train", "test_combination", "test_concept", "test_artist")


class Drawing(NamedTuple):
    """
    A rendered picture.

    Args:
        artist (`str`): Who drew it.
        code (`str`): What it shows: the code of a concept.
    """

    artist: str
    code: str


class Placed(NamedTuple):
    """
    A drawing in a scene.

    Args:
        drawing (`Drawing`): What stands there.
        left (`int`), top (`int`): Its upper left corner, in pixels of the scene.
        side (`int`): Its width and height, in pixels of the scene.
    """

    drawing: Drawing
    left: int
    top: int
    side: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2 in pixels of the scene."""
        return self.left, self.top, self.left + self.side, self.top + self.side


@dataclass(frozen=True, slots=True)
class Scene:
    """
    Drawings on white that do not overlap.

    Args:
        objects (`tuple[Placed, ...]`): What stands where.
        target (`int`): Index of the object that the question is about.
        side (`int`): Width and height of the scene in pixels.
    """

    objects: tuple[Placed, ...]
    target: int
    side: int


@dataclass(frozen=True, slots=True)
class Entry:
    """
    A query or a candidate.

    Args:
        text (`str`, *optional*): Its text.
        image (`Drawing` or `Scene`, *optional*): Its picture.
        code (`str`, *optional*): The concept that it stands for, where that is one; for a scene, the target's.
    """

    text: str | None = None
    image: Drawing | Scene | None = None
    code: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain JSON values."""
        image = self.image
        if isinstance(image, Scene):
            image = {"objects": image.objects, "target": image.target, "side": image.side}
        return {"text": self.text, "image": image, "code": self.code}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Entry:
        """The inverse of `to_dict`, after JSON too."""
        image = values["image"]
        if isinstance(image, dict):
            objects = tuple(Placed(Drawing(*drawing), *place) for drawing, *place in image["objects"])
            image = Scene(objects, image["target"], image["side"])
        elif image is not None:
            image = Drawing(*image)
        return cls(values["text"], image, values["code"])


@dataclass(slots=True)
class Example:
    """
    One query and its candidates.

    Args:
        qid (`str`): Unique name.
        task (`str`): One of `TASKS`.
        split (`str`): One of `SPLITS`.
        query (`Entry`): What is asked for.
        candidates (`list[Entry]`): Among what.
        positive (`int`): 0-based index of the right candidate.
        relevance (`list[int]`): 3 the positive, 2 another variant of it, 1 its subgroup, 0 anything else.
        kind (`str`, *optional*): What sort of question it is within the task, such as `"detail/clock"`.
    """

    qid: str
    task: str
    split: str
    query: Entry
    candidates: list[Entry]
    positive: int
    relevance: list[int] = field(default_factory=list)
    kind: str = ""

    @property
    def entries(self) -> list[Entry]:
        """The query and the candidates."""
        return [self.query, *self.candidates]

    def to_dict(self) -> dict[str, Any]:
        """The example as plain JSON values."""
        entries = {"query": self.query.to_dict(), "candidates": [entry.to_dict() for entry in self.candidates]}
        names = ("qid", "task", "split", "kind", "positive", "relevance")
        return {name: getattr(self, name) for name in names} | entries

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Example:
        """The inverse of `to_dict`, after JSON too."""
        candidates = [Entry.from_dict(entry) for entry in values["candidates"]]
        return cls(**values | {"query": Entry.from_dict(values["query"]), "candidates": candidates})
