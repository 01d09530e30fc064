"""TRL's stock trainer and ours with a model that says what a test wrote down; everything around the words is real."""

from __future__ import annotations

import functools

from scripted import turn_ids
from tiny_models import make_model
from trl import GRPOConfig, GRPOTrainer

from vretrver_hf import Item
from vretrver_hf.data.examples import RerankExample
from vretrver_hf.environment import RerankEnvironment, stock_arguments, training_dataset
from vretrver_hf.protocol import format_answer, format_call, format_turn, get_preset
from vretrver_hf.rewards import EvidenceReward


PRESET = get_preset("foveated", overview_pixels=64 * 64, inspect_pixels=128 * 128, max_calls=2)
CROP = format_call("crop_image", {"bbox_2d": [0.2, 0.0, 0.7, 0.5], "target_image": 1})
SELECT = format_call("select_images", {"target_images": [1, 3]})
MISUSE = format_call("select_images", {"target_images": [2]})  # candidate 2 has no picture
ANSWER = format_turn("so", format_answer([1, 0, 2]))

# Each begins in its own words, by which the scripted trainer knows it again.
SCRIPTS = {
    "answers at once": [ANSWER],
    "looks twice": [format_turn("look", CROP), format_turn("and", SELECT), ANSWER],
    "misuses a tool": [format_turn("hm", MISUSE), ANSWER],
    # Two calls are paid for, the third gets the last word, and the fourth turn is the last in any case.
    "never stops calling": [format_turn("see", CROP), format_turn("and", SELECT)] + [format_turn("more", CROP)] * 2,
}


def make_example(picture, query_id: str = "q") -> RerankExample:
    candidates = [Item(image=picture(90, 120)), Item(text="b"), Item(text="c", image=picture(150, 80))]
    return RerankExample(query_id, Item(text=f"query {query_id}"), candidates, positives=[1])


class ScriptedTrainer(GRPOTrainer):
    """The stock trainer with a model that says what it is told; everything around the words is TRL's."""

    def __init__(self, *args, scripts, encoder, **kwargs):
        self.scripts = [[turn_ids(encoder, text) for text in script] for script in scripts]
        self.scripted_encoder = encoder
        self.batches: list = []
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        encoder = self.scripted_encoder
        said = []
        for row, ids in enumerate(prompt_ids):
            text = encoder.tokenizer.decode(ids)
            spoken = text.count("<|im_start|>assistant") - 1
            begun = [script for script in self.scripts if encoder.decode(script[0]) in text]
            script = begun[0] if spoken else self.scripts[row]
            closing = [] if script[spoken][-1] == encoder.end_of_turn else [encoder.end_of_turn]
            said.append(script[spoken] + closing)
        return said, None

    def _generate_and_score_completions(self, inputs):
        self.batches.append(super()._generate_and_score_completions(inputs))
        return self.batches[-1]


def scripted_trainer(family, prepared, examples, scripts, output_dir, **arguments):
    processor, encoder = prepared
    settings = {
        "per_device_train_batch_size": len(scripts),
        "num_generations": len(scripts),
        "max_completion_length": 2000,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        **stock_arguments(encoder, PRESET, max_turn_tokens=200),
        **arguments,
    }
    return ScriptedTrainer(
        make_model(family, processor),
        reward_funcs=EvidenceReward("paper"),
        args=GRPOConfig(str(output_dir), **settings),
        train_dataset=training_dataset(examples, PRESET),
        processing_class=processor,
        environment_factory=functools.partial(RerankEnvironment, encoder, PRESET),
        scripts=scripts,
        encoder=encoder,
    )


def stock_form(trajectory, encoder) -> tuple[list[int], list[int]]:
    """The agent loop's tokens; in the stock trainer the model itself writes the end mark behind a call."""
    ids, mask = list(trajectory.token_ids), list(trajectory.mask)
    for place, token in enumerate(ids[:-1]):
        if token == encoder.end_of_call and mask[place]:
            mask[place + 1] = 1
    return ids, mask


def read_rows(batch) -> list[tuple[list[int], list[int]]]:
    """Tokens and loss mask of each rollout of a trainer's batch, padding left out."""
    rows = []
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        is_token = batch["completion_mask"][row].bool()
        completion = batch["completion_ids"][row][is_token].tolist()
        mask = batch["tool_mask"][row][is_token].tolist()
        rows.append((prompt + completion, [0] * len(prompt) + mask))
    return rows
