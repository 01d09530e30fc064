"""
What training may show, and what is held out from it.

Every split measures one thing:

- "train" shows training codes and training wordings only, be it as positive, negative or text.
- "test_combination" holds out combinations and wordings. Its positives are codes of two or more attributes whose base
  and whose every attribute training shows in other combinations; its queries (and, where the candidates are texts, the
  candidates) are worded as training never words them, in words that training knows. Where there is no combination to
  hold out (a fact, a definition, a clock), the codes are training codes and the wording alone is held out.
- "test_concept" holds out base concepts with all their variants: pictures, names, facts and definitions. Its wordings
  are those of training.
- "test_artist" asks for what training shows in training's words, drawn by an artist whom it does not show. A task
  without pictures has no such split; details of scenes (times, keys, faces) in turn have no held-out concepts.

Negatives of "test_combination" and "test_artist" may be held-out combinations, but show no held-out base concept;
those of "test_concept" may be anything.
"""

from __future__ import annotations

import hashlib

from art import TEST_ARTIST, TRAIN_ARTISTS, Art
from concepts import Concept
from examples import SPLITS, Drawing


SPLIT_SEED = 0
"""What is held out never depends on the seed of the examples."""
HELD_OUT_COMBINATIONS = 0.12
HELD_OUT_CONCEPTS = 0.10
MAX_HELD_OUT_VARIANTS = 20
"""Larger families (couples, plain people) stay in training, or attributes would vanish with them."""


def splits_of(task: str) -> tuple[str, ...]:
    """
    The splits that a task or a kind of scene has.

    >>> splits_of("t2t"), splits_of("detail")
    (('train', 'test_combination', 'test_concept'), ('train', 'test_combination', 'test_artist'))
    """
    missing = {"t2t": "test_artist", "detail": "test_concept"}.get(task)
    return tuple(split for split in SPLITS if split != missing)


def split_codes(concepts: dict[str, Concept], split: str, seed: int = SPLIT_SEED) -> frozenset[str]:
    """
    The codes that may be positives in a split.

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


def known_codes(concepts: dict[str, Concept], split: str) -> frozenset[str]:
    """The codes that may be positives where there is no combination to hold out."""
    return split_codes(concepts, "train" if split == "test_combination" else split)


def shown_codes(concepts: dict[str, Concept], split: str) -> frozenset[str]:
    """The codes that may stand beside the positive."""
    if split == "train":
        return split_codes(concepts, "train")
    if split == "test_concept":
        return frozenset(concepts)
    return frozenset(concepts) - split_codes(concepts, "test_concept")


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
    return [
        Drawing(artist, code)
        for artist in split_artists(art, split)
        for code in sorted(codes.intersection(art.codes[artist]))
        if code in seen or not art.twins(artist, code) & seen
    ]


def split_artists(art: Art, split: str) -> tuple[str, ...]:
    """Who draws the pictures of a split, of those that are there."""
    artists = (TEST_ARTIST,) if split == "test_artist" else TRAIN_ARTISTS
    return tuple(artist for artist in artists if artist in art.codes)


def _held_out_bases(concepts: dict[str, Concept], seed: int) -> frozenset[str]:
    variants: dict[str, list[Concept]] = {}
    for concept in concepts.values():
        variants.setdefault(concept.base, []).append(concept)
    return frozenset(
        base
        for base, members in variants.items()
        if len(members) <= MAX_HELD_OUT_VARIANTS
        and all(member.attributes.keys() <= {"skin", "gender"} for member in members)
        and fraction(f"{seed}/concept/{base}") < HELD_OUT_CONCEPTS
    )


def _held_out_combinations(concepts: dict[str, Concept], held_out_bases: frozenset[str], seed: int) -> frozenset[str]:
    held_out = {
        code
        for code, concept in concepts.items()
        if concept.base not in held_out_bases
        and len(concept.attributes) >= 2
        and fraction(f"{seed}/combination/{code}") < HELD_OUT_COMBINATIONS
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


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, on any machine and in any process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
