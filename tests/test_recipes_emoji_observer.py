"""The ideal observer: what it sees is what the model sees, its arithmetic, and the aims that the scenes keep."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import emoji_data  # makes the recipe importable
import numpy as np
import pytest
from examples import Drawing, Placed, Scene
from intervals import wilson
from observer import (
    BOX_ERROR,
    CONDITIONS,
    FOUND,
    KINDS,
    NOISE,
    OTHER_NOISES,
    SPLITS,
    Finder,
    Observer,
    Sight,
    examples_of,
    imperfect_box,
    judge,
    log_likelihoods,
    log_odds,
    look,
    measure,
    overview_ref,
    right_box,
    table,
    templates_of,
    window_of,
)
from PIL import Image
from preset import PRESET
from scenes import SIDE, SceneMaker, draw_scene
from searching import BOX_SIDES
from test_recipes_emoji_scenes import small_scenes  # noqa: F401

from vretrver_hf.encoding import Encoder
from vretrver_hf.images import ImageRef
from vretrver_hf.tools import VisualTools


@pytest.fixture(scope="module")
def maker(small_scenes) -> SceneMaker:
    return SceneMaker(*small_scenes, "detail")


@pytest.fixture(scope="module")
def examples(maker):
    return maker.make(60, seed=1)


class TestArithmetic:
    def test_log_likelihoods(self):
        """(3, 4) is 5 from the template (0, 0): -25 / (2 * 25) with noise 5; from itself it is 0."""
        seen = np.array([[3.0, 4.0], [0.0, 0.0]])
        templates = np.array([[[0.0, 0.0]], [[3.0, 4.0]]])
        assert np.allclose(log_likelihoods(seen, templates, 5.0), [[-0.5, 0.0], [0.0, -0.5]])

    def test_positions_are_averaged(self):
        """Of two positions one fits exactly and the other is hopeless: half the likelihood."""
        assert np.allclose(log_likelihoods(np.zeros((1, 1)), np.array([[[0.0], [900.0]]]), 5.0), [[-math.log(2)]])

    def test_log_odds(self):
        """Likelihoods 0.6 and 0.2, then 0.1 and 0.1."""
        odds = log_odds(np.log([[0.6, 0.2], [0.1, 0.1]]), 0)
        assert np.allclose(np.exp(odds), [0.75, 0.5])

    def test_wilson(self):
        assert np.allclose(wilson(50, 100), (0.40383, 0.59617), atol=1e-5)
        assert np.allclose(wilson(20, 20), (0.83887, 1), atol=1e-5)
        assert wilson(0, 2)[0] == 0 and wilson(20, 20)[1] == 1  # not -1e-17, which is printed as -0.0 %

    @pytest.mark.parametrize(
        ("thing", "ref", "window"),
        [
            ((120, 240, 36), ImageRef(0, 84, 84), (9, 19, 14, 24)),  # 10 to 13 across, 20 to 23 down
            ((126, 240, 36), ImageRef(0, 84, 84), (9, 19, 15, 24)),  # 10.5 to 13.5 across
            ((0, 972, 36), ImageRef(0, 84, 84), (0, 80, 4, 84)),  # at the edge
            ((120, 240, 36), ImageRef(0, 112, 112, (100, 200, 212, 312)), (19, 39, 57, 77)),
            ((120, 240, 36), ImageRef(0, 112, 112, (500, 500, 612, 612)), (0, 0, 0, 0)),  # out of view
        ],
    )
    def test_windows(self, thing, ref, window):
        assert window_of(Placed(Drawing("noto", "a"), *thing), ref) == window


class TestPixels:
    def test_the_overview_has_the_size_that_the_encoder_gives_it(self):
        size = Encoder.overview_size(SimpleNamespace(factor=28), (SIDE, SIDE), PRESET)
        ref = overview_ref(SIDE)
        assert (ref.width, ref.height) == size == (84, 84)

    @pytest.mark.parametrize("condition", CONDITIONS)
    def test_a_template_in_the_right_position_is_what_is_seen(self, small_scenes, examples, condition):
        art = small_scenes[0]
        for example in examples[:8]:
            scene = example.candidates[0].image
            target = scene.objects[scene.target]
            ref, picture = self._shown(art, scene, condition)
            left, top, right, bottom = window = window_of(target, ref)
            (template,) = templates_of(art, [target.drawing], target, ref, window, positions=1)
            seen = np.asarray(picture, float)[top:bottom, left:right].ravel()
            assert len(seen) and np.abs(seen - template[0]).max() <= 2

    def _shown(self, art, scene: Scene, condition: str) -> tuple[ImageRef, Image.Image]:
        picture, target = Image.fromarray(draw_scene(art, scene)), scene.objects[scene.target]
        if condition == "overview":
            return overview_ref(SIDE), overview_ref(SIDE).render(picture)
        tools = VisualTools(None, [picture], preset=PRESET)
        box = right_box(target)
        if condition == "loose crop":
            box = [max(0.0, value - 0.02) for value in box[:2]] + [min(1.0, value + 0.03) for value in box[2:]]
        seen = tools.select_images([1]) if condition == "select" else tools.crop_image(box, 1)
        return seen.refs[0], seen.images[0]

    def test_a_template_beside_the_right_position_is_not(self, small_scenes, examples):
        art, scene = small_scenes[0], examples[0].candidates[0].image
        target = scene.objects[scene.target]
        ref = overview_ref(SIDE)
        window = window_of(target, ref)
        right, moved = (
            templates_of(art, [target.drawing], target, ref, window, error, positions=1)[0, 0]
            for error in ((0.0, 0.0), (0.5, 0.0))
        )
        ahead = templates_of(art, [target.drawing], target._replace(left=target.left - 6), ref, window, positions=1)
        assert np.abs(right - moved).max() > 10
        assert np.abs(ahead[0, 0] - moved).max() <= 2  # half a pixel is six of the scene's

    def test_four_images_at_once_are_the_same_as_one_by_one(self, small_scenes, examples):
        pictures = [Image.fromarray(draw_scene(small_scenes[0], entry.image)) for entry in examples[0].candidates]
        tools = VisualTools(None, pictures, preset=PRESET)
        together = tools.select_images([1, 2, 3, 4]).images
        for number, image in enumerate(together, start=1):
            assert tools.select_images([number]).images[0].tobytes() == image.tobytes()
        assert not tools.select_images([1, 2, 3, 4, 5]).valid

    def test_imperfect_boxes(self):
        rng = random.Random(0)
        for left, top in ((0, 0), (480, 300), (960, 960)):
            for _ in range(200):
                x1, y1, x2, y2 = imperfect_box(Placed(Drawing("noto", "a"), left, top, 48), rng)
                assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
                assert max(x2 - x1, y2 - y1) <= BOX_SIDES[1] + 0.011
                if left == 480:  # not cut off by an edge
                    assert min(x2 - x1, y2 - y1) >= BOX_SIDES[0] - 0.011
                    assert abs((x1 + x2) / 2 - 0.5) <= BOX_ERROR + 0.011
                    assert abs((y1 + y2) / 2 - 324 / 1008) <= BOX_ERROR + 0.011


class TestObserver:
    def test_with_little_noise_it_is_always_right_and_with_much_it_guesses(self, small_scenes, maker):
        quiet, loud = (Observer(small_scenes[0], noise) for noise in (4.0, 1e5))
        examples, rng = maker.make(100, seed=2), random.Random(0)
        crops = ("crop", "loose crop")
        assert all(quiet.observe(example, condition, rng) for example in examples[:20] for condition in crops)
        guesses = sum(loud.observe(example, "crop", rng) for example in examples)
        assert 4 <= guesses <= 40  # 20 +- 4, five standard deviations

    def test_who_looks_closer_sees_more(self, small_scenes, maker):
        right = dict.fromkeys(CONDITIONS, 0)
        for example in maker.make(60, seed=4):
            rng = random.Random(example.qid)
            sights = look(small_scenes[0], example, rng)
            for condition in CONDITIONS:
                right[condition] += judge(sights, condition, example.positive, 40.0, rng) == example.positive
        assert right["overview"] < right["select"] < right["crop"] == 60
        assert right["loose crop"] >= 58

    def test_a_seed_decides(self, small_scenes, examples):
        observer = Observer(small_scenes[0])
        first, again = ([observer.observe(e, "select", random.Random(0)) for e in examples[:30]] for _ in range(2))
        assert first == again and 0 < sum(first) < 30

    @pytest.mark.parametrize(("doubt", "picked"), [(0.0, 4), (3.0, 1)])
    def test_the_least_likely_is_not_selected(self, doubt, picked):
        """
        Five candidates, one value each; the asked drawing gives 0 and all others 1. A second look shows the asked
        drawing in candidate 4 alone. If the first look spoke against it, it gets no second look, and what the second
        look says a little for decides.
        """
        templates = np.array([0.0, 1.0, 1.0, 1.0, 1.0]).reshape(5, 1, 1)
        first = np.array([[0.5], [0.5], [0.5], [0.6], [0.5 + doubt]])
        if not doubt:
            first[0] = 3.5  # then another one is left out
        second = np.array([[1.0], [0.4], [1.0], [1.0], [-2.0]])
        sights = {"overview": Sight(first, templates, 4.0), "select": Sight(second, templates, 5.0)}
        sights = {name: _quiet(sight) for name, sight in sights.items()}
        assert judge(sights, "select", 0, 1.0, random.Random(0)) == picked

    def test_it_finds_the_family(self, small_scenes, maker):
        finder, rng = Finder(small_scenes[0], maker), random.Random(0)
        examples = [example for example in maker.make(60, seed=5) if example.kind.endswith("/blob")]
        assert all(finder.find(example, 1.0, rng) for example in examples)
        found = sum(finder.find(example, 1e5, rng) for example in examples)
        assert found < len(examples) / 2  # among sixteen things it can but guess


def _quiet(sight: Sight) -> Sight:
    """The same without noise."""

    class Quiet(Sight):
        def log_likelihoods(self, noise, rng):
            return log_likelihoods(self.seen, self.templates, noise)

    return Quiet(sight.seen, sight.templates, sight.pixels)


class TestFigures:
    @pytest.fixture
    def rows(self, small_scenes, maker):
        return [row for kind in KINDS[:3] for row in measure(small_scenes[0], maker, kind, 8)]

    def test_rows(self, rows, small_scenes, maker):
        assert len(rows) == 3 * (len(CONDITIONS) + 1) * (1 + len(OTHER_NOISES))
        for row in rows:
            assert row["interval"] == wilson(round(row["right"] * row["n"]), row["n"])
            assert row["n"] == 8 or (row["condition"] == FOUND and row["n"] < 8)
        assert measure(small_scenes[0], maker, KINDS[0], 8) == [row for row in rows if row["kind"] == KINDS[0]]

    def test_table(self, rows):
        lines = table(rows).splitlines()
        assert len(lines) == 2 + 3 * (len(CONDITIONS) + 1)
        assert len({line.count("|") for line in lines}) == 1
        assert "crop of every candidate" in table(rows)

    def test_examples_of_a_kind(self, maker):
        examples = examples_of(maker, "detail/face", 30)
        assert len(examples) == len({example.qid for example in examples}) == 30
        assert all(example.kind.startswith("detail/face/") for example in examples)


class TestAims:
    """The committed table, which `observer.py` measured on the real data."""

    @pytest.fixture
    def right(self):
        rows = json.loads((emoji_data.RECIPE / "results" / "observer.json").read_text(encoding="utf-8"))
        assert min(row["n"] for row in rows if row["condition"] != FOUND) >= 1000
        return {(row["split"], row["kind"], row["condition"], row["noise"]): row["right"] for row in rows}

    @pytest.mark.parametrize("split", SPLITS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_detail_needs_a_crop_and_an_overview_does_not(self, right, split, kind):
        shares = {condition: right[split, kind, condition, NOISE] for condition in CONDITIONS}
        assert min(shares["crop"], shares["loose crop"]) >= 0.95
        if kind == "overview":
            assert shares["overview"] >= 0.95
        else:
            assert shares["overview"] <= 0.35 and shares["select"] < 0.6
            assert right[split, kind, FOUND, NOISE] >= 0.9
