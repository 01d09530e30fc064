"""The exact tokens that the bundled model was trained to read and write. A change here is a change of the wire format.

python tests/test_golden.py    # writes the files anew: only together with a model that was trained on them
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor

from vretrver_hf import Item, VisualTools
from vretrver_hf.encoding import Encoder
from vretrver_hf.protocol import (
    build_messages,
    format_answer,
    format_call,
    format_turn,
    get_preset,
    last_word,
    malformed_observation,
)
from vretrver_hf.reranker import bundled_model
from vretrver_hf.tools import Observation


GOLDEN = Path(__file__).parent / "golden"


def conversation(preset: str) -> dict[str, list[int]]:
    """Every kind of turn, by name."""
    encoder = Encoder(AutoProcessor.from_pretrained(bundled_model()), "qwen2_5_vl")
    settings = get_preset(preset, overview_pixels=85 * 85, inspect_pixels=141 * 141)
    pictures = [None, Image.new("RGB", (168, 168), "red"), None, Image.new("RGB", (336, 168), "blue")]
    candidates = [Item(image=pictures[1]), Item(text="a fox"), Item(text="a hen", image=pictures[3])]
    tools = VisualTools(pictures[0], pictures[1:], preset=settings, factor=encoder.factor)
    messages = build_messages(Item(text="a red fox"), candidates, settings)
    crop = {"bbox_2d": [0.25, 0.25, 0.75, 0.75], "target_image": 3}
    written = {
        "call": format_turn("3 may fit.", format_call("crop_image", crop)),
        "answer": format_turn("3 fits best.", format_answer([2, 0, 1])),
    }
    read = {
        "crop": tools.call("crop_image", crop),
        "select": tools.call("select_images", {"target_images": [1, 3]}),
        "text-only": tools.call("select_images", {"target_images": [2]}),
        "malformed": Observation(malformed_observation("nothing to act on"), [], False),
        "last word": Observation(last_word(3), [], False),
    }
    return {
        "prompt": encoder.prompt(messages, pictures.__getitem__, settings).token_ids,
        **{name: encoder.tokenizer.encode(text, add_special_tokens=False) for name, text in written.items()},
        **{name: encoder.observation(observation).token_ids for name, observation in read.items()},
    }


@pytest.mark.parametrize("preset", ["foveated", "release"])
def test_the_wire_format_stands(preset):
    expected = json.loads((GOLDEN / f"{preset}.json").read_text(encoding="utf-8"))
    assert conversation(preset) == expected


if __name__ == "__main__":
    for name in ("foveated", "release"):
        ids = json.dumps(conversation(name)).replace("], ", "],\n")
        (GOLDEN / f"{name}.json").write_text(ids + "\n", encoding="utf-8")
