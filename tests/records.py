"""Examples with pictures, and trajectories that the real loop played on them."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scripted import ScriptedEngine

from vretrver_hf import Item
from vretrver_hf.agent import play
from vretrver_hf.data.conversations import TrajectoryRecord
from vretrver_hf.data.examples import RerankExample
from vretrver_hf.protocol import format_answer, format_call, format_turn, get_preset


OVERRIDES = {"overview_pixels": 64 * 64, "inspect_pixels": 128 * 128}
PRESET = get_preset("foveated", **OVERRIDES)
CROP = format_turn("is it 1?", format_call("crop_image", {"bbox_2d": [0.1, 0.1, 0.6, 0.7], "target_image": 1}))
SELECT = format_turn("both", format_call("select_images", {"target_images": [3, 1]}))
NO_SUCH = format_turn("zoom", format_call("zoom", {"target_image": 1}))
MALFORMED = "<think>I do not know.</think>"
ANSWER = format_turn("2 fits", format_answer([1, 0, 2]))
SCRIPTS = [[CROP, ANSWER], [ANSWER], [SELECT, NO_SUCH, ANSWER], [MALFORMED, SELECT, ANSWER]]


def noise(width: int, height: int, seed: int) -> Image.Image:
    """Any two of these differ in every region."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def make_example(number: int, pictures: bool = True) -> RerankExample:
    """A query, at odd numbers with a picture, and three candidates: text and picture, text only, picture only."""
    texts = ["a red door", "a blue door", None if pictures else "a door"]
    images = [noise(90 + 7 * number, 60, 10 * number + i) if pictures and i != 1 else None for i in range(3)]
    return RerankExample(
        query_id=f"q{number}",
        query=Item(text="a door", image=noise(70, 100, 10 * number + 5) if pictures and number % 2 else None),
        candidates=[Item(text=text, image=image) for text, image in zip(texts, images, strict=True)],
        positives=[1],
        data_source="doors",
    )


def make_records(encoder, examples, scripts=SCRIPTS, preset=PRESET, tools: bool = True) -> list[TrajectoryRecord]:
    """Each example with the trajectory of one of the scripts, in turn."""
    said = {example.query_id: scripts[i % len(scripts)] for i, example in enumerate(examples)}
    engine = ScriptedEngine(encoder, lambda query_id, turn: said[query_id][turn])
    trajectories = play(engine, [example.task(preset, tools=tools) for example in examples])
    return [TrajectoryRecord(*pair) for pair in zip(examples, trajectories, strict=True)]
