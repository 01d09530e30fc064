"""Reranking examples out of the art: one query, a few candidates, one positive, and rules that keep them fair."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable

from art import TEST_ARTIST, TRAIN_ARTISTS, Art
from concepts import Concept, as_query, as_tag_query, may_be_confused
from examples import SPLITS, Drawing, Entry, Example


TASKS = ("t2i", "i2i", "i2t")
"""Text to image, image to image by another artist, image to text."""
SPLIT_SEED = 0
"""What is held out never depends on the seed of the examples."""

HELD_OUT_COMBINATIONS = 0.12
HELD_OUT_CONCEPTS = 0.10
MAX_HELD_OUT_VARIANTS = 20
"""Larger families (couples, plain people) stay in training, or attributes would vanish with them."""

SAME_BASE, SAME_SUBGROUP = 0.5, 0.3
"""Shares of the negatives that are another variant of the positive, and its neighbours; the rest is random.
Where no variant can compete, a neighbour does, and where none can, anything."""
TAG_SHARE, SHORT_SHARE = 0.15, 0.3
"""Shares of text queries by keywords, and of default-skinned positives whose skin is left unsaid."""
RARE_TAG = 8
"""A keyword may be a query if no more than this many base concepts carry it."""


def split_codes(concepts: dict[str, Concept], split: str, seed: int = SPLIT_SEED) -> frozenset[str]:
    """
    The codes that may be positives in a split.

    Training sees nothing but "train" codes, be it as positive, negative or text. "test_combination" holds out codes
    of two or more attributes whose base and whose every attribute training shows in other combinations;
    "test_concept" holds out base concepts with all their variants; "test_artist" asks for what training showed, drawn
    by an artist whom it did not show.

    Args:
        concepts (`dict[str, Concept]`): All concepts.
        split (`str`): One of `SPLITS`.
        seed (`int`, *optional*, defaults to 0): Chooses what is held out.

    Returns:
        `frozenset[str]`: Codes.
    """
    held_out_bases = _held_out_bases(concepts, seed)
    concept_codes = frozenset(code for code, concept in concepts.items() if concept.base in held_out_bases)
    combination_codes = _held_out_combinations(concepts, held_out_bases, seed)
    train_codes = frozenset(concepts) - concept_codes - combination_codes
    return {
        "train": train_codes,
        "test_combination": combination_codes,
        "test_concept": concept_codes,
        "test_artist": train_codes,
    }[split]


def pictures(art: Art, concepts: dict[str, Concept], split: str) -> list[Drawing]:
    """
    The pictures that may be positives in a split, for captioning and the like.

    A held-out picture that looks like one which training shows under another name is left out of the test splits.

    Args:
        art (`Art`): The pictures.
        concepts (`dict[str, Concept]`): All concepts.
        split (`str`): One of `SPLITS`.

    Returns:
        `list[Drawing]`: Sorted by artist, then code.
    """
    codes, seen = split_codes(concepts, split), split_codes(concepts, "train")
    artists = (TEST_ARTIST,) if split == "test_artist" else TRAIN_ARTISTS
    return [
        Drawing(artist, code)
        for artist in artists
        if artist in art.codes
        for code in sorted(codes.intersection(art.codes[artist]))
        if code in seen or not art.twins(artist, code) & seen
    ]


def make_examples(
    art: Art,
    concepts: dict[str, Concept],
    task: str,
    split: str,
    n: int,
    seed: int,
    num_candidates: int = 5,
) -> list[Example]:
    """
    Draw examples; the same arguments give the same examples on every machine.

    Args:
        art (`Art`): The pictures.
        concepts (`dict[str, Concept]`): All concepts.
        task (`str`): One of `TASKS`.
        split (`str`): One of `SPLITS`.
        n (`int`): Number of examples.
        seed (`int`): Seed of the draw; what is held out does not depend on it.
        num_candidates (`int`, *optional*, defaults to 5): Candidates a query, the positive included.

    Returns:
        `list[Example]`: The examples.
    """
    return ExampleMaker(art, concepts, task, split, num_candidates).make(n, seed)


class ExampleMaker:
    """
    Draws examples of one task and split; keep it to draw again and again.

    All candidates of a query are by one artist, so that style gives nothing away.

    Args:
        art (`Art`): The pictures.
        concepts (`dict[str, Concept]`): All concepts.
        task (`str`): One of `TASKS`.
        split (`str`): One of `SPLITS`.
        num_candidates (`int`, *optional*, defaults to 5): Candidates a query, the positive included.
        hardness (`float`, *optional*, defaults to 1.0): Factor of the shares of hard negatives; 0 draws all at random.

    Raises:
        ValueError: Unknown task or split, or no picture is left to ask for.
    """

    def __init__(
        self,
        art: Art,
        concepts: dict[str, Concept],
        task: str,
        split: str,
        num_candidates: int = 5,
        hardness: float = 1.0,
    ) -> None:
        if task not in TASKS or split not in SPLITS:
            raise ValueError(f"task {task!r} must be one of {TASKS} and split {split!r} one of {SPLITS}")
        self.art, self.concepts, self.task, self.split = art, concepts, task, split
        self.num_candidates = num_candidates
        self.hardness = hardness
        self._pools = _Pools(art, concepts, _negative_codes(concepts, split))
        self._tags = _rare_tags(concepts)
        self._positives = [
            (artist, code, others)
            for artist, code in pictures(art, concepts, split)
            if (others := self._query_artists(artist, code))
        ]
        if not self._positives:
            raise ValueError(f"no picture can be asked for in {task}, {split}")
        by_base: dict[str, list] = {}
        for positive in self._positives:
            by_base.setdefault(concepts[positive[1]].base, []).append(positive)
        self._by_base = list(by_base.values())

    def make(self, n: int, seed: int) -> list[Example]:
        """
        Draw examples.

        Args:
            n (`int`): How many.
            seed (`int`): Seed of the draw.

        Returns:
            `list[Example]`: The examples.

        Raises:
            ValueError: An artist drew too little for that many fair candidates.
        """
        rng = random.Random(f"{seed}/{self.task}/{self.split}")
        make_one = {"t2i": self._text_to_image, "i2i": self._image_to_image, "i2t": self._image_to_text}[self.task]
        return [make_one(rng, f"{self.task}-{self.split}-{seed}-{number:06d}") for number in range(n)]

    def _query_artists(self, artist: str, code: str) -> tuple[str, ...]:
        """Who may draw the query for this positive: for "i2i" another training artist."""
        if self.task != "i2i":
            return (artist,)
        art, codes = self.art, TRAIN_ARTISTS
        return tuple(other for other in codes if other != artist and other in art.codes and art.has(other, code))

    def _draw_positive(self, rng: random.Random) -> tuple[str, Concept, str]:
        """Half of the positives uniform over pictures, half over base concepts: most pictures are skin variants."""
        choices = self._positives
        if rng.random() < 0.5:
            choices = _pick(self._by_base, rng)
        artist, code, query_artists = _pick(choices, rng)
        return artist, self.concepts[code], _pick(query_artists, rng)

    def _text_to_image(self, rng: random.Random, qid: str) -> Example:
        artist, concept, _ = self._draw_positive(rng)
        text, ignore, tags = self._word(concept, rng)
        banned = {concept.code, *self.art.twins(artist, concept.code)}
        chosen = self._negatives(artist, concept, banned, rng, ignore, tags)
        return self._example(qid, rng, concept, chosen, artist, Entry(text, None, concept.code))

    def _image_to_image(self, rng: random.Random, qid: str) -> Example:
        artist, concept, query_artist = self._draw_positive(rng)
        twins = (self.art.twins(by, concept.code) for by in (artist, query_artist))
        banned = {concept.code}.union(*twins)
        chosen = self._negatives(artist, concept, banned, rng)
        query = Entry(None, Drawing(query_artist, concept.code), concept.code)
        return self._example(qid, rng, concept, chosen, artist, query)

    def _image_to_text(self, rng: random.Random, qid: str) -> Example:
        artist, concept, _ = self._draw_positive(rng)
        banned = {concept.code, *self.art.twins(artist, concept.code)}
        chosen = self._negatives(artist, concept, banned, rng)
        query = Entry(None, Drawing(artist, concept.code), concept.code)
        return self._example(qid, rng, concept, chosen, artist, query)

    def _word(self, concept: Concept, rng: random.Random) -> tuple[str, tuple[str, ...], list[str]]:
        """A text query, the attributes that it leaves unsaid, and the keywords that it uses."""
        tags = self._tags.get(concept.code)
        if tags and rng.random() < TAG_SHARE:
            tags = rng.sample(tags, min(len(tags), 1 + int(rng.random() * 2)))
            return as_tag_query(tags, rng), (), tags
        if concept.short_captions and rng.random() < SHORT_SHARE:
            return as_query(_pick(concept.short_captions, rng), rng), ("skin",), []
        return as_query(_pick(concept.captions, rng), rng), (), []

    def _negatives(
        self,
        artist: str,
        concept: Concept,
        banned: set[str],
        rng: random.Random,
        ignore: tuple[str, ...] = (),
        tags: Iterable[str] = (),
    ) -> list[Concept]:
        pools, chosen = self._pools, []
        for _ in range(self.num_candidates - 1):
            kind, other = rng.random(), None
            if kind < self.hardness * SAME_BASE:
                other = _draw_fair(pools.base[artist, concept.base], concept, banned, rng, ignore, tags)
            if other is None and kind < self.hardness * (SAME_BASE + SAME_SUBGROUP):
                other = _draw_fair(pools.subgroup[artist, concept.subgroup], concept, banned, rng, ignore, tags)
            if other is None:
                other = _draw_fair(pools.all[artist], concept, banned, rng, ignore, tags, tries=200)
            if other is None:
                raise ValueError(f"{artist} drew too little to put {self.num_candidates - 1} beside {concept.name!r}")
            chosen.append(other)
            banned.add(other.code)
            banned.update(self.art.twins(artist, other.code))
        return chosen

    def _example(
        self,
        qid: str,
        rng: random.Random,
        concept: Concept,
        negatives: list[Concept],
        artist: str,
        query: Entry,
    ) -> Example:
        position = int(rng.random() * self.num_candidates)
        shown = [*negatives[:position], concept, *negatives[position:]]
        if self.task == "i2t":
            style = int(rng.random() * 3)  # one wording for all, as in a catalogue
            candidates = [Entry(_worded(other.captions, style), None, other.code) for other in shown]
        else:
            candidates = [Entry(None, Drawing(artist, other.code), other.code) for other in shown]
        relevance = [_relevance(concept, other) for other in shown]
        return Example(qid, self.task, self.split, query, candidates, position, relevance)


class _Pools:
    """Concepts by artist, by (artist, base) and by (artist, subgroup)."""

    def __init__(self, art: Art, concepts: dict[str, Concept], codes: frozenset[str]) -> None:
        self.all: dict[str, list[Concept]] = {}
        self.base: dict[tuple[str, str], list[Concept]] = {}
        self.subgroup: dict[tuple[str, str], list[Concept]] = {}
        for artist, drawn in art.codes.items():
            for concept in (concepts[code] for code in sorted(codes.intersection(drawn))):
                self.all.setdefault(artist, []).append(concept)
                self.base.setdefault((artist, concept.base), []).append(concept)
                self.subgroup.setdefault((artist, concept.subgroup), []).append(concept)


def _negative_codes(concepts: dict[str, Concept], split: str) -> frozenset[str]:
    """Training sees nothing held out; a test of concepts may show anything; the others show no held-out concept."""
    if split == "train":
        return split_codes(concepts, "train")
    if split == "test_concept":
        return frozenset(concepts)
    return frozenset(concepts) - split_codes(concepts, "test_concept")


def _draw_fair(
    pool: list[Concept],
    concept: Concept,
    banned: set[str],
    rng: random.Random,
    ignore: tuple[str, ...],
    tags: Iterable[str],
    tries: int = 8,
) -> Concept | None:
    size, draw = len(pool), rng.random
    for _ in range(tries if size > 1 else 0):  # the positive alone is no pool
        other = pool[int(draw() * size)]
        if other.code in banned or may_be_confused(concept, other, ignore):
            continue
        if any(tag in other.keywords or tag in other.name for tag in tags):
            continue
        return other
    return None


def _worded(captions: tuple[str, ...], style: int) -> str:
    """The last wording is the plain name, the first a phrase; some have another phrase between them."""
    if style == 2:
        return captions[-1]
    return captions[style] if len(captions) == 3 else captions[0]


def _relevance(concept: Concept, other: Concept) -> int:
    if other is concept:
        return 3
    if other.base == concept.base:
        return 2
    return int(other.subgroup == concept.subgroup)


def _rare_tags(concepts: dict[str, Concept]) -> dict[str, list[str]]:
    """Code to the keywords that say something about it; none for a stated skin tone, which no keyword tells."""
    bases: dict[str, set[str]] = {}
    for concept in concepts.values():
        for tag in concept.tags:
            bases.setdefault(tag, set()).add(concept.base)
    return {
        code: [tag for tag in concept.tags if tag.islower() and len(bases[tag]) <= RARE_TAG]
        for code, concept in concepts.items()
        if concept.attributes.get("skin", "yellow") == "yellow"
    }


def _held_out_bases(concepts: dict[str, Concept], seed: int) -> frozenset[str]:
    variants: dict[str, list[Concept]] = {}
    for concept in concepts.values():
        variants.setdefault(concept.base, []).append(concept)
    return frozenset(
        base
        for base, members in variants.items()
        if len(members) <= MAX_HELD_OUT_VARIANTS
        and all(member.attributes.keys() <= {"skin", "gender"} for member in members)
        and _fraction(f"{seed}/concept/{base}") < HELD_OUT_CONCEPTS
    )


def _held_out_combinations(concepts: dict[str, Concept], held_out_bases: frozenset[str], seed: int) -> frozenset[str]:
    held_out = {
        code
        for code, concept in concepts.items()
        if concept.base not in held_out_bases
        and len(concept.attributes) >= 2
        and _fraction(f"{seed}/combination/{code}") < HELD_OUT_COMBINATIONS
    }
    shown = {
        (concept.base, key, value)
        for code, concept in concepts.items()
        if code not in held_out
        for key, value in concept.attributes.items()
    }
    return frozenset(
        code
        for code in held_out
        if all((concepts[code].base, key, value) in shown for key, value in concepts[code].attributes.items())
    )


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, on any machine and in any process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _pick(choices, rng: random.Random):
    return choices[int(rng.random() * len(choices))]
