"""Rules of the examples of all eight tasks, on the small set that the tests draw and on the real one."""

from __future__ import annotations

import copy
import doctest
import json
import random
import re
from collections import Counter


import emoji_data  # noqa: F401  # isort: skip (makes the recipe importable)

import concepts as concepts_module
import edits
import knowledge
import pytest
import splits
import wordings
from art import TEST_ARTIST, TRAIN_ARTISTS, Art
from concepts import load_concepts, may_be_confused
from edits import Features, Words, count_edits
from examples import SPLITS, Example
from facts import FACTS, country_name
from questions import ASKED
from splits import shown_codes, split_codes, splits_of
from tasks import TASKS, make_examples, make_maker
from wordings import FACT_TEXTS, FLAG_AND, OF_COUNTRY, QUERIES, WHICH_COUNTRY, Wording


pytest_plugins = ["emoji_data"]

SETS = [(task, split) for task in TASKS for split in splits_of(task)]
N = 400
WORDINGS = [
    (name, wording)
    for name, value in sorted(vars(wordings).items())
    for wording in (value.values() if isinstance(value, dict) else [value])
    if isinstance(wording, Wording)
]


def names_of(example: Example) -> list[str]:
    """Codes that stand anywhere in an example."""
    pictures = [entry.image.code for entry in example.entries if entry.image]
    return pictures + [entry.code for entry in example.entries if entry.code]


@pytest.fixture(scope="module")
def draw(art, concepts):
    """Draws examples once for all tests."""
    drawn: dict[tuple, list[Example]] = {}

    def draw(task: str, split: str, count: int = N) -> list[Example]:
        if (task, split, count) not in drawn:
            drawn[task, split, count] = make_examples(art, concepts, task, split, count, seed=7)
        return drawn[task, split, count]

    return draw


@pytest.fixture(scope="module")
def features(concepts) -> Features:
    return Features(concepts)


@pytest.mark.parametrize(("task", "split"), SETS)
class TestEveryTask:
    def test_exactly_one_candidate_is_right(self, draw, task, split):
        for example in draw(task, split):
            assert len(example.candidates) == len(set(example.candidates)) == len(example.relevance) == 5
            assert example.relevance.index(3) == example.positive and example.relevance.count(3) == 1
            assert set(example.relevance) <= {0, 1, 2, 3} and example.kind
            shown = [(entry.image and entry.image.code, entry.text) for entry in example.candidates]
            assert len(set(shown)) == 5

    def test_it_has_the_task_s_sides(self, draw, task, split):
        query, answer = re.fullmatch(r"(i?t?)2(i?t?)", task).groups()
        for example in draw(task, split):
            for entry, sides in ((example.query, query), *((entry, answer) for entry in example.candidates)):
                assert (entry.image is not None, entry.text is not None) == ("i" in sides, "t" in sides)

    def test_no_picture_looks_like_another(self, draw, art, task, split):
        for example in draw(task, split):
            pictures = {entry.image for entry in example.candidates if entry.image}
            assert len({art.image(*picture).tobytes() for picture in pictures}) == len(pictures)
            for picture in pictures:
                assert art.twins(*picture).isdisjoint(other.code for other in pictures)

    def test_all_candidates_are_by_one_artist(self, draw, task, split):
        for example in draw(task, split):
            artists = {entry.image.artist for entry in example.candidates if entry.image}
            assert len(artists) == ("i" in task.partition("2")[2])
            drawn_by = artists or {entry.image.artist for entry in [example.query] if entry.image}
            assert drawn_by <= ({TEST_ARTIST} if split == "test_artist" else set(TRAIN_ARTISTS))

    def test_a_split_shows_what_it_may(self, draw, concepts, task, split):
        """Training shows no held-out code, be it as positive, negative or text; see `splits.py` for the others."""
        shown = shown_codes(concepts, split)
        for example in draw(task, split):
            assert shown.issuperset(names_of(example)), example

    def test_training_reads_no_held_out_name(self, draw, concepts, features, task, split):
        if split != "train":
            return
        unseen = [concepts[code] for code in split_codes(concepts, "test_concept")]
        names = {features.roles[one.base] for one in unseen if one.base in features.roles}
        names |= {country_name(one) for one in unseen if one.country}
        names |= {one.country.facts["capital"] for one in unseen if one.country and "capital" in one.country.facts}
        names |= {one.gloss for one in unseen if one.gloss}
        for example in draw(task, split):
            assert names.isdisjoint(entry.text for entry in example.entries), example

    def test_positives_are_uniform_and_negatives_hard(self, draw, task, split):
        examples = draw(task, split)
        counts = Counter(example.positive for example in examples)
        assert all(abs(counts[place] - N / 5) < 40 for place in range(5))  # 5 standard deviations
        assert sum(1 in e.relevance or 2 in e.relevance for e in examples) > 0.8 * N

    def test_twice_is_the_same_and_another_seed_is_not(self, draw, art, concepts, task, split):
        examples = draw(task, split)
        assert make_examples(art, concepts, task, split, N, seed=7) == examples
        assert make_examples(art, concepts, task, split, 20, seed=8) != examples[:20]
        assert len({example.qid for example in examples}) == N

    def test_json_round_trip(self, draw, task, split):
        for example in draw(task, split)[:20]:
            assert Example.from_dict(json.loads(json.dumps(example.to_dict()))) == example

    def test_any_number_of_candidates_and_any_hardness(self, art, concepts, task, split):
        maker = make_maker(art, concepts, task, split)
        for count in (2, 3, 8):
            for hardness in (0.0, 1.0):
                other = copy.copy(maker)
                other.num_candidates, other.hardness = count, hardness
                for example in other.make(40, 1):
                    assert len(set(example.candidates)) == count and example.relevance[example.positive] == 3
        assert maker.num_candidates == 5

    def test_texts_are_short(self, draw, task, split):
        for example in draw(task, split):
            assert len((example.query.text or "").split()) <= 28, example.query.text
            assert all(len((entry.text or "").split()) <= 22 for entry in example.candidates)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", ["t2i", "i2i", "i2t"])
class TestMatching:
    def test_nothing_else_fits(self, draw, art, concepts, task, split):
        positives = split_codes(concepts, split)
        for example in draw(task, split):
            codes = [entry.code for entry in example.candidates]
            positive = concepts[codes[example.positive]]
            assert positive.code in positives and example.query.code == positive.code
            others = [code for code in codes if code != positive.code]
            assert len(others) == 4 and not any(may_be_confused(positive, concepts[code]) for code in others), example
            if example.query.image:  # nothing may look like the query in the query artist's own hand
                assert art.twins(*example.query.image).isdisjoint(others)

    def test_pictures_match_across_artists(self, draw, task, split):
        if task == "i2i":
            for example in draw(task, split):
                artists = {entry.image.artist for entry in example.candidates}
                assert example.query.image.artist in set(TRAIN_ARTISTS) - artists


class TestQueries:
    def test_a_query_fits_no_negative(self, draw, concepts):
        """Every name, short name and keyword in a query belongs to the positive alone."""
        kinds = Counter()
        for example in draw("t2i", "train", 3000):
            shown = [concepts[entry.code] for entry in example.candidates]
            positive, text = shown.pop(example.positive), example.query.text
            kind = example.kind.partition("/")[0]
            kinds[kind] += 1
            if kind == "describe":
                assert text in {query.format(wording) for query in QUERIES.train for wording in positive.captions}
            elif kind == "short":
                assert text in {
                    query.format(wording) for query in QUERIES.train for wording in positive.short_captions
                }
                assert not any(may_be_confused(positive, other, ("skin",)) for other in shown)
            else:
                used = [tag for tag in positive.tags if tag in text]
                assert used and all(any(tag not in other.tags for tag in used) for other in shown)
                assert all(other.base != positive.base for other in shown)
        assert all(kinds[kind] > 30 for kind in ("describe", "short", "keywords")), kinds

    def test_text_candidates_share_one_wording(self, draw, concepts):
        names = {concept.captions[-1] for concept in concepts.values() if len(concept.captions) > 1}
        phrases = {text for concept in concepts.values() for text in concept.captions[:-1]}
        for example in draw("i2t", "train", 500):
            texts = [entry.text for entry in example.candidates]
            assert names.isdisjoint(texts) or phrases.isdisjoint(texts)

    def test_a_paraphrase_is_another_wording_of_the_positive_alone(self, draw, concepts):
        found = [example for example in draw("t2t", "train") if example.kind.startswith("paraphrase")]
        for example in found:
            concept = concepts[example.query.code]
            asked = [wording for wording in concept.captions if wording in example.query.text]
            right = example.candidates[example.positive].text
            assert right in concept.captions and asked and set(asked) != {right}
            for entry in example.candidates:
                assert entry.code == concept.code or not may_be_confused(concept, concepts[entry.code])
        assert len(found) > 50

    def test_unknown_names_and_empty_art_are_refused(self, small_data):
        art, concepts = Art.load(small_data), load_concepts(small_data)
        with pytest.raises(ValueError, match="task 'i2v' must be one of"):
            make_examples(art, concepts, "i2v", "train", 1, 0)
        with pytest.raises(ValueError, match="split 'test_artist' one of its own"):
            make_examples(art, concepts, "t2t", "test_artist", 1, 0)
        nothing = Art(small_data, {"noto": []}, {"noto": {}})
        with pytest.raises(ValueError, match="nothing can be asked for in t2i, train: 0 pictures fit it"):
            make_examples(nothing, concepts, "t2i", "train", 1, 0)
        few = Art(small_data, {"noto": ["1f414", "1f416"]}, {"noto": {}})
        with pytest.raises(ValueError, match="noto drew too little"):
            make_examples(few, concepts, "t2i", "train", 5, 0)


@pytest.mark.parametrize("module", [concepts_module, edits, knowledge, splits], ids=lambda module: module.__name__)
def test_what_docstrings_show(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


# --- wordings --------------------------------------------------------------------------------------------------------


def _pattern(template: str) -> str:
    return re.sub(r"\\\{\d?\\\}", ".+", re.escape(template))


def _literal_words(templates: tuple[str, ...]) -> set[str]:
    return {word for template in templates for word in re.findall(r"[a-z]+", re.sub(r"\{\d?\}", "", template).lower())}


class TestWordings:
    @pytest.mark.parametrize(("name", "wording"), WORDINGS)
    def test_held_out_wordings_are_other_wordings(self, name, wording):
        assert wording.train and wording.held_out and not set(wording.train) & set(wording.held_out)
        slots = {tuple(sorted(re.findall(r"\{\d?\}", template))) for template in wording.train + wording.held_out}
        assert len(slots) == 1

    def test_held_out_wordings_are_made_of_words_that_training_reads(self):
        known = _literal_words(tuple(template for _, wording in WORDINGS for template in wording.train))
        for name, wording in WORDINGS:
            assert _literal_words(wording.held_out) <= known, name

    def test_training_never_reads_a_held_out_wording(self, draw):
        held_out = {template for _, wording in WORDINGS for template in wording.held_out}
        patterns = [re.compile(_pattern(template)) for template in sorted(held_out)]
        count = 0
        for task in TASKS:
            for example in draw(task, "train", 800):
                for text in {entry.text for entry in example.entries} - {None}:
                    assert not any(pattern.fullmatch(text) for pattern in patterns), text
                count += 1
        assert count > 5000

    def test_held_out_combinations_are_asked_for_in_held_out_words_only(self, draw):
        templates = [template for _, wording in WORDINGS for template in wording.held_out]
        patterns = [re.compile(_pattern(template)) for template in templates]
        for task in ("t2i", "t2t", "t2it", "it2t", "it2i", "it2it"):
            for example in draw(task, "test_combination"):
                # Two orders are joined by "and": either is held out.
                texts = {example.query.text, example.query.text.split(" and ")[0], example.query.text.lower()}
                assert any(pattern.fullmatch(text) for pattern in patterns for text in texts), example.query.text

    def test_what_else_is_tested_is_asked_for_in_training_s_words(self, draw):
        templates = {template for _, wording in WORDINGS for template in wording.held_out}
        patterns = [re.compile(_pattern(template)) for template in sorted(templates)]
        for task in TASKS:
            for split in set(splits_of(task)) & {"test_concept", "test_artist"}:
                texts = [example.query.text or "" for example in draw(task, split)]
                assert not any(pattern.fullmatch(text) for pattern in patterns for text in texts)

    def test_text_candidates_of_held_out_combinations_are_worded_anew(self, draw, concepts):
        for example in draw("i2t", "test_combination"):
            positive = example.candidates[example.positive]
            concept = concepts[positive.code]
            assert positive.text in concept.held_out_captions and positive.text not in concept.captions


# --- facts -----------------------------------------------------------------------------------------------------------


def _fact_kind(example: Example) -> str | None:
    group, _, kind = example.kind.partition("/")
    kind = kind.partition("/")[0]
    return kind if group in ("fact", "ask") and kind in FACTS else None


class TestFacts:
    @pytest.mark.parametrize("split", SPLITS)
    def test_one_country_satisfies_the_question(self, draw, concepts, split):
        if split == "test_artist":
            return
        found = [e for e in draw("t2t", split) if e.kind.startswith("fact") and e.kind.endswith("/of")]
        for example in found:
            kind = _fact_kind(example)
            flags = [concepts[entry.code] for entry in example.candidates]
            value = flags[example.positive].country.facts[kind]
            assert value in example.query.text
            assert [flag.country.has(kind, value) for flag in flags].count(True) == 1
            assert [entry.text for entry in example.candidates] == [country_name(flag) for flag in flags]
        assert len(found) > 20

    @pytest.mark.parametrize(("task", "split"), [s for s in SETS if s[0] in ("t2t", "it2t")])
    def test_one_answer_is_true_of_the_country(self, draw, concepts, task, split):
        found = [e for e in draw(task, split) if _fact_kind(e) and not e.kind.endswith("/of")]
        for example in found:
            country, kind = concepts[example.query.code].country, _fact_kind(example)
            texts = [entry.text for entry in example.candidates]
            assert [country.has(kind, text) for text in texts].count(True) == 1
            assert texts[example.positive] == country.facts[kind]
        assert len(found) > 10

    @pytest.mark.parametrize(("task", "split"), [s for s in SETS if s[0] in ("t2it", "it2it")])
    def test_picture_and_fact_are_both_needed(self, draw, concepts, task, split):
        found = [e for e in draw(task, split) if e.kind.startswith("fact")]
        for example in found:
            flag = concepts[example.query.code]
            right = FACT_TEXTS[_fact_kind(example)].format(flag.country.facts[_fact_kind(example)])
            parts = [(entry.code == flag.code, entry.text == right) for entry in example.candidates]
            assert parts.count((True, True)) == 1 and parts[example.positive] == (True, True)
            assert parts.count((True, False)) and parts.count((False, True))  # neither part alone tells
            assert example.relevance == [3 if all(part) else 2 if any(part) else 0 for part in parts]
        assert len(found) > 10

    @pytest.mark.parametrize("split", ["train", "test_combination", "test_concept"])
    def test_held_out_countries_are_those_of_held_out_concepts(self, draw, concepts, split):
        held_out = split_codes(concepts, "test_concept")
        for task in ("t2t", "it2t", "t2it", "it2it"):
            for example in draw(task, split):
                if _fact_kind(example):
                    code = example.query.code or example.candidates[example.positive].code
                    assert (code in held_out) == (split == "test_concept")

    def test_flags_that_look_alike_are_not_asked_about(self, draw, art, concepts):
        for split in splits_of("it2t"):
            for example in draw("it2t", split):
                if concepts[example.query.code].country and _fact_kind(example):
                    assert not art.twins(*example.query.image)

    def test_every_kind_of_fact_has_words(self):
        assert FACTS.keys() == WHICH_COUNTRY.keys() == OF_COUNTRY.keys() == FLAG_AND.keys() == FACT_TEXTS.keys()


class TestDefinitions:
    @pytest.mark.parametrize(("task", "split"), [s for s in SETS if s[0] in ("t2t", "it2t", "t2it", "it2it")])
    def test_no_other_candidate_is_defined(self, draw, concepts, task, split):
        found = [e for e in draw(task, split) if "definition" in e.kind]
        for example in found:
            word = concepts[example.query.code]
            glosses = {concept.gloss for concept in concepts.values() if concept.gloss}
            assert word.gloss == example.candidates[example.positive].text or example.kind == "definition/name"
            for place, entry in enumerate(example.candidates):
                other = concepts[entry.code]
                if other is not word:
                    assert other.code not in word.kinds and word.code not in other.kinds
                    assert other.gloss != word.gloss and not may_be_confused(word, other)
                elif place != example.positive:  # its picture beside the definition of something else
                    assert entry.text in glosses - {word.gloss}
        assert len(found) > 20

    def test_a_kind_of_it_never_competes(self, small_data):
        """Guide dogs are dogs: whoever asks for a definition of either must not be offered the other."""
        art, concepts = Art.load(small_data), load_concepts(small_data)
        assert concepts["1f414"].kinds == {"1f415"}
        examples = make_examples(art, concepts, "t2t", "train", 2000, 3)
        found = [e for e in examples if "definition" in e.kind and e.query.code in ("1f414", "1f415")]
        assert found
        assert not [e for e in found if {"1f414", "1f415"} <= {entry.code for entry in e.candidates}]


# --- questions about a picture ---------------------------------------------------------------------------------------


class TestQuestions:
    @pytest.mark.parametrize("split", SPLITS)
    def test_answers_are_distinct_and_one_is_true(self, draw, concepts, features, split):
        kinds = Counter()
        for example in draw("it2t", split):
            kind = example.kind.removeprefix("ask/")
            if kind not in ASKED:
                continue
            kinds[kind] += 1
            concept, texts = concepts[example.query.image.code], [entry.text for entry in example.candidates]
            right = texts[example.positive]
            expected = {
                "skin": f"{concept.attributes.get('skin')} skin",
                "left skin": f"{concept.attributes.get('skin', '').split(', ')[0]} skin",
                "right skin": f"{concept.attributes.get('skin', '').split(', ')[-1]} skin",
                "hair": f"{concept.attributes.get('hair')} hair".replace("bald hair", "bald"),
                "members": concept.noun.removeprefix("a family of "),
                "phase": concept.noun,
                "role": features.roles.get(concept.base),
            }.get(kind, concept.attributes.get(kind))
            assert right == expected and texts.count(right) == 1
        assert len(kinds) >= 2

    def test_some_negatives_are_true_but_answer_another_question(self, draw, concepts):
        found = 0
        for example in draw("it2t", "train", 800):
            texts = [entry.text for entry in example.candidates]
            skin = concepts[example.query.code].attributes.get("skin")
            found += example.kind == "ask/role" and f"{skin} skin" in texts
        assert found > 10


# --- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_a_message_needs_its_picture_and_its_text(draw, concepts, split):
    found = [example for example in draw("t2it", split) if example.kind.startswith("message")]
    for example in found:
        right = example.candidates[example.positive]
        assert right.code == example.query.code and right.text.split()[-1] in example.query.text
        parts = [(entry.code == right.code, entry.text == right.text) for entry in example.candidates]
        assert parts.count((True, True)) == 1 and parts.count((True, False)) and parts.count((False, True))
        for entry in example.candidates:
            assert entry.code == right.code or not may_be_confused(concepts[right.code], concepts[entry.code])
    assert len(found) > 50


# --- edits -----------------------------------------------------------------------------------------------------------


EDITED = [s for s in SETS if s[0] in ("it2i", "it2t", "it2it")]


def _changed(features: Features, example: Example) -> set[str]:
    before, after = (features.of[code] for code in (example.query.code, example.candidates[example.positive].code))
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


class TestEdits:
    @pytest.mark.parametrize(("task", "split"), EDITED)
    def test_one_or_two_things_change_and_one_candidate_has_it_all(self, draw, art, concepts, features, task, split):
        found = [example for example in draw(task, split) if example.kind.startswith("edit")]
        for example in found:
            source, target = example.query.code, example.candidates[example.positive].code
            # Who changes what they are may not face anywhere any more.
            assert 1 <= len(_changed(features, example) - {"facing", "hair"} or _changed(features, example)) <= 2
            assert not art.twins(*example.query.image)
            for entry in example.candidates:
                if entry.code != target:
                    assert features.differing(target, entry.code) > 0
                    assert not features.may_be_confused(target, entry.code)
                assert entry.image is None or entry.image.artist == example.query.image.artist
            assert features.structure[source] == features.structure[target] != ""
        assert len(found) > 40

    @pytest.mark.parametrize("split", SPLITS)
    def test_words_and_picture_are_both_needed(self, draw, features, split):
        """Mostly, another candidate fits the picture, and another fits the words."""
        by_words, by_picture, as_before, count = 0, 0, 0, 0
        for example in draw("it2i", split):
            target = features.of[example.candidates[example.positive].code]
            keys = _changed(features, example)
            if features.structure[example.query.code] not in ("person", "pair", "hand"):
                continue
            others = [features.of[e.code] for i, e in enumerate(example.candidates) if i != example.positive]
            by_words += any(all(other.get(key) == target.get(key) for key in keys) for other in others)
            kept = target.keys() - keys
            by_picture += any(all(other.get(key) == target[key] for key in kept) for other in others)
            as_before += example.query.code in [entry.code for entry in example.candidates]
            count += 1
        assert by_words > 0.55 * count and by_picture > 0.8 * count
        assert 0.4 * count < as_before < 0.85 * count

    def test_having_much_in_common_gives_little_away(self, draw, features):
        """Whoever picks the candidate that is most like the others is rarely right (chance is 20 %)."""
        right = 0.0
        examples = draw("it2i", "train", 1000)
        for example in examples:
            codes = [entry.code for entry in example.candidates]
            sums = [sum(features.differing(one, other) for other in codes) for one in codes]
            best = [place for place, total in enumerate(sums) if total == min(sums)]
            right += (example.positive in best) / len(best)
        assert right / len(examples) < 0.4

    def test_held_out_targets_and_pairs(self, draw, concepts, features):
        combinations = split_codes(concepts, "test_combination")
        pairs, steps = ({split: set() for split in SPLITS} for _ in range(2))
        for split in SPLITS:
            for example in draw("it2i", split, 1500):
                target = example.candidates[example.positive].code
                if features.structure[target] in edits.SKINNED:
                    assert (target in combinations) == (split == "test_combination")
                    continue
                asked = steps if features.structure[target] in edits.STEPPED else pairs
                asked[split].add((example.query.code, target))
        assert pairs["train"] and pairs["test_combination"]
        assert not pairs["test_combination"] & (pairs["train"] | pairs["test_artist"])
        assert steps["test_combination"] & steps["train"]  # a step's pair is no combination: its wording is held out

    def test_held_out_concepts_change_within_themselves(self, draw, concepts):
        for example in draw("it2i", "test_concept"):
            base = concepts[example.query.code].base
            assert base == concepts[example.candidates[example.positive].code].base

    def test_texts_leave_skin_and_colour_to_the_picture(self, draw, concepts):
        found = [example for example in draw("it2it", "train") if example.kind.startswith("edit")]
        for example in found:
            for entry in example.candidates:
                attributes = concepts[entry.code].attributes
                assert "skin" not in entry.text
                assert attributes.get("colour", "–") not in entry.text

    @pytest.mark.parametrize(
        ("source", "target", "text"),
        [
            ("woman judge", "woman judge: dark skin tone", "like this, but with dark skin"),
            ("woman judge", "man judge", "like this, but as a man"),
            ("woman judge", "woman cook", "like this, but as a cook"),
            ("woman judge", "man cook", "like this, but as a man cook"),
            ("woman", "woman judge: light skin tone", "like this, but as a judge with light skin"),
            ("man: red hair", "woman: white hair", "like this, but as a woman with white hair"),
            ("man: red hair", "man: curly hair: dark skin tone", "like this, but with curly hair and dark skin"),
            ("handshake", "handshake: dark skin tone", "like this, but both with dark skin"),
            (
                "handshake: light, dark skin tone",
                "handshake: medium, dark skin tone",
                "like this, but with medium skin on the left",
            ),
            ("red circle", "blue circle", "like this, but in blue"),
            ("red circle", "red square", "like this, but as a square"),
            ("red circle", "orange square", "like this, but as an orange square"),
            ("three o’clock", "four-thirty", "the clock an hour and a half later"),
            ("one o’clock", "twelve-thirty", "the clock half an hour earlier"),
        ],
    )
    def test_words(self, small_data, source, target, text):
        features = Features(load_concepts(small_data))
        codes = {concept.name: code for code, concept in features.concepts.items()}
        one, other = codes[source], codes[target]
        before, after = features.of[one], features.of[other]
        keys = tuple(key for key in _ORDER if before.get(key, "") != after.get(key, ""))
        assert Words(features, "train").say(one, other, keys, _Middle()) == text

    def test_counts(self, small_data):
        """
        24 times with ten steps each. 12 circles and squares: five colours and one other shape each, or both. 25
        handshakes of stated skins: four others on either side, or both.
        """
        counts = count_edits(Art.load(small_data), load_concepts(small_data))
        assert counts["clock"] == (24 * 10, 0)
        assert counts["colour"] == (12 * (5 + 1), 12 * 5)
        assert counts["pair"] == (25 * (4 + 4), 25 * 4 * 4)


_ORDER = ("skin", "gender", "hair", "what", "facing", "left skin", "right skin", "colour", "time")


class _Middle(random.Random):
    """Chance that always takes the middle: no orders, and the third of five wordings."""

    def random(self) -> float:
        return 0.5
