"""A ranking as a web page: what was asked, what the model looked at and thought, and the order it came to."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import jinja2
from PIL import Image

from .images import ImageRef, ItemError
from .parsing import parse_turn
from .protocol import Preset
from .tools import VisualTools
from .trajectory import Turn


if TYPE_CHECKING:
    from .agent import Event
    from .items import Item
    from .ranking import Ranking
    from .trajectory import Trajectory

# Longest sides of the embedded pictures, in pixels: beside a number, on a card, and as evidence.
_ICON, _CARD, _EVIDENCE = 96, 256, 512
_SHOWN = 288  # longest side of evidence on the page, in CSS pixels

_STATUS = {
    "ok": "Every answer named each of its candidates once.",
    "repaired": "An answer was incomplete or repeated itself and was mended. No candidate was lost.",
    "fallback": "At least one window had no usable answer, and its candidates kept the order they had.",
}
_FINISH = {
    "no_answer": "It ended without an answer: calls and turns were used up.",
    "length": "It ended without an answer: the context was full.",
    "cancelled": "It was cancelled before it answered.",
    "error": "It failed before it answered.",
}


def ranking_html(ranking: Ranking) -> str:
    """
    Renders a ranking with its evidence as one self-contained HTML page.

    The page loads nothing and runs nothing: styles are inline and pictures are embedded, reduced. Whatever an item or
    the model wrote is shown as text. A picture that can no longer be read is said to be missing.

    Args:
        ranking (`Ranking`):
            What [`Reranker.rank`] returned.

    Returns:
        `str`: the page, to be written as UTF-8.
    """
    view = _view(ranking)
    return _render("trace.html.jinja", title=f"Ranking for {_shorten(ranking.query.text or 'a picture')}", view=view)


def rankings_html(
    rankings: Sequence[Ranking],
    *,
    title: str = "Rankings",
    headings: Sequence[str] | None = None,
    positives: Sequence[int] | None = None,
) -> str:
    """
    Renders several rankings, each with its evidence, as one self-contained HTML page with an overview in front.

    Args:
        rankings (sequence of `Ranking`):
            What [`Reranker.rank`] returned.
        title (`str`, *optional*, defaults to `"Rankings"`):
            Title of the page.
        headings (sequence of `str`, *optional*):
            What each ranking is called; `"Ranking 1"` and so on by default.
        positives (sequence of `int`, *optional*):
            0-based index of each query's right candidate. The page then says which rankings have it first.

    Returns:
        `str`: the page, to be written as UTF-8.

    Raises:
        `ValueError`: if `headings` or `positives` are not one for each ranking.
    """
    headings = headings if headings is not None else [f"Ranking {number + 1}" for number in range(len(rankings))]
    rights = positives if positives is not None else [None] * len(rankings)
    views = [_view(*each) for each in zip(rankings, headings, rights, strict=True)]
    score = None
    if positives is not None:
        score = f"{sum(view.verdict == 'right' for view in views)} of {len(views)} right"
    return _render("rankings.html.jinja", title=title, views=views, score=score)


def ranking_fragment(ranking: Ranking, *, title: str = "", positive: int | None = None, key: str = "") -> str:
    """
    Renders a ranking with its evidence as a piece of a page whose styles are [`trace_css`].

    Args:
        ranking (`Ranking`):
            What [`Reranker.rank`] returned.
        title (`str`, *optional*, defaults to `""`):
            A heading above it.
        positive (`int`, *optional*):
            0-based index of the right candidate, to say whether it came first.
        key (`str`, *optional*, defaults to `""`):
            Prefix of the ids in it, where a page shows several.
    """
    return _render("fragment.html.jinja", view=_view(ranking, positive=positive), title=title, key=key)


def items_fragment(query: Item, candidates: Sequence[Item]) -> str:
    """Renders a query and its candidates as a piece of a page whose styles are [`trace_css`]."""
    return _render("items.html.jinja", cards=_cards(query, candidates))


def trace_css() -> str:
    """The styles of traces; they touch nothing outside of an element of the class `vretrver`."""
    return _environment().get_template("trace.css").render()


class LiveTrace:
    """
    A ranking under way, as a piece of a page whose styles are [`trace_css`].

    Args:
        query (`Item`):
            The query.
        candidates (sequence of `Item`):
            The candidates.
        preset (`Preset`):
            The protocol that is played; says what a box means.
    """

    def __init__(self, query: Item, candidates: Sequence[Item], preset: Preset):
        self._cards = _cards(query, candidates)
        self._preset = preset
        self._windows: list[_LiveWindow] = []
        self._turn = Turn("assistant", [], "")

    def add(self, event: Event) -> bool:
        """Takes in what just happened; returns whether it is to be shown at once."""
        if event.kind == "window":
            self._windows.append(_LiveWindow([self._cards[index + 1] for index in event.order or ()]))
        elif event.kind == "thought":
            self._turn.thought = event.text
        elif event.kind == "call":
            self._turn.call, self._turn.kind = event.call, "call"
        elif event.kind == "observation":
            self._observe(event)
        else:
            self._answer(event)
        return event.kind in ("window", "observation", "answer")

    def html(self, note: str = "") -> str:
        """What happened so far, with a `note` below."""
        return _render("live.html.jinja", windows=self._windows, note=note)

    def _observe(self, event: Event) -> None:
        window, turn = self._windows[-1], self._take_turn()
        turn.kind, turn.valid = turn.kind or "malformed", event.valid
        observation = Turn("observation", [], event.text or "", images=list(event.refs), valid=event.valid)
        step = _step(turn, observation, [self._cards[0], *window.shown], self._preset)
        for picture in step.pictures:
            image = picture.card.item.load_image()
            picture.fill(image, _reduce(image, _EVIDENCE))
        step.thought = turn.thought
        window.steps.append(step)

    def _answer(self, event: Event) -> None:
        window, turn = self._windows[-1], self._take_turn()
        window.best_first = [(place + 1, window.shown[place]) for place in event.order or ()]
        headline = "Answers" if event.status != "fallback" else "Gives no usable answer"
        raw = json.dumps([number for number, _ in window.best_first]) if event.status == "ok" else None
        window.steps.append(_Step(turn.thought, "answer", headline, raw, event.text, None, []))

    def _take_turn(self) -> Turn:
        turn, self._turn = self._turn, Turn("assistant", [], "")
        return turn


@dataclasses.dataclass
class _View:
    """A ranking as the templates show it."""

    heading: str
    query: _Card
    candidates: list[_Card]
    windows: list[_Window]
    places: list[_Place]
    status: str
    status_text: str
    costs: list[tuple[str, str]]
    right: _Place | None = None

    @property
    def verdict(self) -> str:
        return "" if self.right is None else "right" if self.right.rank == 1 else "wrong"

    @property
    def verdict_text(self) -> str:
        if self.right is None:
            return ""
        place = "first" if self.right.rank == 1 else f"only at place {self.right.rank}"
        return f"{self.verdict.capitalize()}: {self.right.card.name}, which fits the query, came {place}."


@dataclasses.dataclass
class _Card:
    """The query (`number` 0) or a candidate (numbered from 1, in input order)."""

    number: int
    item: Item
    icon: str | None = None
    picture: str | None = None
    size: tuple[int, int] | None = None
    missing: str | None = None

    @property
    def name(self) -> str:
        return f"candidate {self.number}" if self.number else "the query"

    @property
    def id(self) -> str | None:
        """The caller's own id; one that was made of the position would only repeat it."""
        return None if self.item.id == str(self.number - 1) else self.item.id

    @property
    def alt(self) -> str:
        text = f": {_shorten(self.item.text)}" if self.item.text else ""
        return f"Picture of {self.name}{text}"


@dataclasses.dataclass
class _Picture:
    """A picture that a tool showed; for a region also the whole picture, with the region marked."""

    card: _Card
    label: str
    ref: ImageRef
    preset: Preset
    requested: Any = None
    seen: str | None = None
    whole: str | None = None
    asked_box: tuple[int, int, int, int] | None = None

    def fill(self, image: Image.Image, reduced: Image.Image) -> None:
        self.seen = _data_url(_reduce(self.ref.render(image), _EVIDENCE))
        if self.ref.box is not None:
            self.whole = _data_url(reduced)
            self.asked_box = _asked_box(self.requested, image, self.preset)

    @property
    def seen_size(self) -> tuple[int, int]:
        return _fit(self.ref.width, self.ref.height)

    @property
    def whole_size(self) -> tuple[int, int]:
        return _fit(*self.card.size) if self.card.size else (0, 0)


@dataclasses.dataclass
class _Step:
    """A turn of the model and what it was shown in return."""

    thought: str | None
    kind: str
    headline: str
    raw: str | None
    note: str | None
    reply: str | None
    pictures: list[_Picture]


@dataclasses.dataclass
class _Window:
    trajectory: Trajectory
    shown: list[_Card]
    steps: list[_Step]
    ending: str | None
    best_first: list[tuple[int, _Card]]

    @property
    def renumbered(self) -> bool:
        """Whether the numbers that the model uses differ from the candidates' numbers on this page."""
        return any(card.number != number for number, card in enumerate(self.shown, start=1))


@dataclasses.dataclass
class _LiveWindow:
    shown: list[_Card]
    steps: list[_Step] = dataclasses.field(default_factory=list)
    best_first: list[tuple[int, _Card]] = dataclasses.field(default_factory=list)

    @property
    def renumbered(self) -> bool:
        return any(card.number != number for number, card in enumerate(self.shown, start=1))


@dataclasses.dataclass
class _Place:
    rank: int
    card: _Card

    @property
    def movement(self) -> str:
        places = self.card.number - self.rank
        return f"up {places}" if places > 0 else f"down {-places}" if places else "unmoved"


def _view(ranking: Ranking, heading: str = "", positive: int | None = None) -> _View:
    cards = _numbered(ranking.query, ranking.candidates)
    windows = [_window(trajectory, cards) for trajectory in ranking.trajectories]
    _fill_pictures(cards, [picture for window in windows for step in window.steps for picture in step.pictures])
    places = [_Place(rank, cards[index + 1]) for rank, index in enumerate(ranking.order, start=1)]
    return _View(
        heading=heading,
        query=cards[0],
        candidates=cards[1:],
        windows=windows,
        places=places,
        status=ranking.status,
        status_text=_status_text(ranking),
        costs=_costs(ranking.trajectories),
        right=None if positive is None else places[ranking.order.index(positive)],
    )


def _numbered(query: Item, candidates: Sequence[Item]) -> list[_Card]:
    return [_Card(number, item) for number, item in enumerate([query, *candidates])]


def _cards(query: Item, candidates: Sequence[Item]) -> list[_Card]:
    cards = _numbered(query, candidates)
    _fill_pictures(cards, [])
    return cards


def _window(trajectory: Trajectory, cards: Sequence[_Card]) -> _Window:
    shown = [cards[index + 1] for index in trajectory.candidate_indices]
    preset = Preset.from_dict(trajectory.preset)
    turns = trajectory.turns
    steps = []
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        if turn.role == "assistant":
            observation = following if following is not None and following.role == "observation" else None
            steps.append(_step(turn, observation, [cards[0], *shown], preset))
    ending = None if trajectory.finish == "answer" else " ".join([_FINISH[trajectory.finish], trajectory.error or ""])
    best_first = [(place + 1, shown[place]) for place in trajectory.order]
    return _Window(trajectory, shown, steps, ending, best_first)


def _step(turn: Turn, observation: Turn | None, numbered: Sequence[_Card], preset: Preset) -> _Step:
    requested = ((turn.call or {}).get("arguments") or {}).get("bbox_2d")
    pictures = [
        _Picture(numbered[ref.index], _label(ref.index, numbered), ref, preset, requested)
        for ref in (observation.images if observation else [])
    ]
    if turn.kind == "answer":
        headline, raw = "Answers", parse_turn(turn.text).answer
    elif turn.kind == "call":
        headline, raw = _call_headline(turn, pictures), json.dumps(turn.call, ensure_ascii=False)
    else:
        headline, raw = "Writes a turn that cannot be used", turn.text  # its thought, if any, included
    return _Step(
        thought=None if turn.kind == "malformed" else turn.thought,
        kind=turn.kind if turn.kind != "call" or turn.valid else "refused",
        headline=headline,
        raw=raw,
        note=turn.problem,
        reply=observation.text.strip() if observation and not pictures else None,
        pictures=pictures,
    )


def _call_headline(turn: Turn, pictures: Sequence[_Picture]) -> str:
    if not turn.valid or not pictures:
        return "Makes a call that is not carried out"
    names = [picture.label for picture in pictures]
    listed = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    return f"Looks at a region of {listed}" if pictures[0].ref.box else f"Looks again at {listed}"


def _label(number: int, numbered: Sequence[_Card]) -> str:
    card = numbered[number]
    return card.name if card.number == number else f"{card.name} (here number {number})"


def _fill_pictures(cards: Sequence[_Card], evidence: Sequence[_Picture]) -> None:
    """Decodes each original once and lets go of it before the next: only reduced pictures stay in memory."""
    for card in cards:
        if card.item.image is None:
            continue
        try:
            image = card.item.load_image()
        except ItemError as error:
            card.missing = str(error)
            continue
        reduced = _reduce(image, _EVIDENCE)
        card.size = image.size
        card.icon = _data_url(_reduce(reduced, _ICON))
        card.picture = _data_url(_reduce(reduced, _CARD) if card.number else reduced)
        for picture in evidence:
            if picture.card is card:
                picture.fill(image, reduced)


def _asked_box(requested: Any, image: Image.Image, preset: Preset) -> tuple[int, int, int, int] | None:
    """The region that the model asked for, in pixels of the original: what the tool would show without its padding."""
    unpadded = dataclasses.replace(preset, crop_padding=0.0)
    tools = VisualTools(None, [image], preset=unpadded, factor=1, inspect_pixels=_ICON**2)
    refs = tools.crop_image(requested, 1).refs
    return refs[0].box if refs else None


def _status_text(ranking: Ranking) -> str:
    if ranking.error is not None:
        return f"It failed: {ranking.error}"
    return _STATUS[ranking.status] if ranking.trajectories else "There was nothing to compare, so no model ran."


def _costs(trajectories: Sequence[Trajectory]) -> list[tuple[str, str]]:
    calls = sum(trajectory.num_calls for trajectory in trajectories)
    failed = calls - sum(trajectory.num_valid_calls for trajectory in trajectories)
    written = sum(trajectory.num_sampled_tokens for trajectory in trajectories)
    tokens = sum(trajectory.num_tokens for trajectory in trajectories)
    return [
        ("windows", str(len(trajectories))),
        ("tool calls", f"{calls} ({failed} not carried out)" if failed else str(calls)),
        ("tokens read", f"{tokens - written:,}"),
        ("tokens written", f"{written:,}"),
        ("seconds", f"{sum(trajectory.seconds for trajectory in trajectories):.1f}"),
    ]


def _reduce(image: Image.Image, side: int) -> Image.Image:
    scale = min(1.0, side / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, reducing_gap=2.0)


def _data_url(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _fit(width: int, height: int) -> tuple[int, int]:
    scale = _SHOWN / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _shorten(text: str, limit: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _render(template: str, **values: Any) -> str:
    page = _environment().get_template(template).render(**values)
    # An id may hold half a surrogate pair (a broken file name does), which no file can take.
    return page.encode("utf-8", "replace").decode("utf-8")


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("vretrver_hf", "assets"),
        autoescape=True,  # for every template, whatever its suffix: items and model are not trusted
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
