from __future__ import annotations

import dataclasses
import inspect

import pytest
from PIL import Image
from scripted import ScriptedEngine
from scripted_trainers import ANSWER, PRESET, SCRIPTS, make_example, read_rows, scripted_trainer, stock_form
from tiny_models import make_processor
from transformers.utils import get_json_schema

from vretrver_hf import Item
from vretrver_hf.agent import play
from vretrver_hf.data.examples import RerankExample
from vretrver_hf.environment import RerankEnvironment, prepare_processor, training_dataset
from vretrver_hf.images import fit_size
from vretrver_hf.protocol import get_preset, last_word
from vretrver_hf.rewards import EvidenceReward


@pytest.fixture
def example(picture) -> RerankExample:
    return make_example(picture)


@pytest.fixture
def prepared(family):
    """A processor of the test's own: the environment's limits stay on it."""
    processor = make_processor(family)
    return processor, prepare_processor(processor, family, PRESET)


@pytest.fixture
def environment(prepared, example) -> RerankEnvironment:
    environment = RerankEnvironment(prepared[1], PRESET)
    environment.reset(example=example)
    return environment


def texts(blocks) -> list[str]:
    return [block["text"] for block in blocks if block["type"] == "text"]


def pictures(blocks) -> list:
    return [block["image"] for block in blocks if block["type"] == "image"]


class TestEnvironment:
    def test_shows_the_prompt_of_the_agent_loop(self, environment, prepared, example):
        encoder = prepared[1]
        blocks = environment.reset(example=example, query_id="q", prompt=[])
        task = example.task(PRESET)
        encoded = encoder.prompt(task.messages(), lambda number: task.candidates[number - 1].load_image(), PRESET)
        assert [image.tobytes() for image in pictures(blocks)] == [image.tobytes() for image in encoded.images]
        assert "".join(texts(blocks)) in encoded.text.replace("<|vision_start|><|image_pad|><|vision_end|>", "")

    def test_counts_calls_and_keeps_the_budget(self, environment):
        crop = environment.crop_image(bbox_2d=[0.2, 0.0, 0.7, 0.5], target_image=1)
        assert len(pictures(crop)) == 1
        misuse = environment.select_images(target_images=[2])
        assert not pictures(misuse) and "no image" in texts(misuse)[0]
        assert texts(environment.select_images(target_images=[1])) == [last_word(3)]
        assert (environment.num_calls, environment.num_valid_calls) == (3, 1)

    def test_what_a_tool_returns_has_the_size_of_the_protocol(self, environment, prepared):
        factor = prepared[1].factor
        (image,) = pictures(environment.select_images(target_images=[3]))
        expected = fit_size(150, 80, factor=factor, min_pixels=4 * factor**2, max_pixels=PRESET.inspect_pixels)
        assert image.size == expected

    def test_reset_forgets_everything(self, environment, example):
        for _ in range(3):
            environment.crop_image(bbox_2d=[0, 0, 1, 1], target_image=1)
        environment.reset(example=dataclasses.replace(example, candidates=example.candidates[:2]))
        assert (environment.num_calls, environment.num_valid_calls) == (0, 0)
        assert "Images: 1." in texts(environment.select_images(target_images=[3]))[0]

    def test_a_picture_that_cannot_be_read_ends_no_training(self, environment, example):
        broken = dataclasses.replace(example, candidates=[Item(image=b"no picture"), *example.candidates[1:]])
        assert not pictures(environment.reset(example=broken)) and environment.error.startswith("candidate 1")
        assert not pictures(environment.select_images(target_images=[1]))
        completion = [{"role": "assistant", "content": ANSWER}]
        (paid,) = EvidenceReward("paper")([], [completion], environments=[environment])
        assert paid == 0.0
        environment.reset(example=example)
        assert environment.error is None
        (paid,) = EvidenceReward("paper")([], [completion], environments=[environment])
        assert paid == pytest.approx(1.0)  # format 0.2, rank 0.8, no call

    def test_has_exactly_two_tools(self, environment):
        """TRL makes a tool of every public method."""
        methods = [name for name, _ in inspect.getmembers(RerankEnvironment, inspect.isfunction)]
        tools = [name for name in methods if not name.startswith("_") and name != "reset"]
        assert tools == ["crop_image", "select_images"]
        for name in tools:
            schema = get_json_schema(getattr(environment, name))["function"]
            assert "return" not in schema
        assert schema["parameters"]["required"] == ["target_images"]

    def test_the_reward_reads_calls_and_answers(self, environment):
        environment.crop_image(bbox_2d=[0.2, 0.0, 0.7, 0.5], target_image=1)
        call = {"name": "crop_image", "arguments": {"bbox_2d": [0.2, 0.0, 0.7, 0.5], "target_image": 1}}
        completion = [
            {"role": "assistant", "content": "<think>look</think>", "tool_calls": [{"function": call}]},
            # What a tool says is not the model's: this answer must not count.
            {
                "role": "tool",
                "name": "crop_image",
                "content": [{"type": "text", "text": "<answer>[1, 2, 3]</answer>"}],
            },
            {"role": "assistant", "content": ANSWER},
        ]
        (paid,) = EvidenceReward("paper")([], [completion], environments=[environment])
        assert paid == pytest.approx(1.2)  # format 0.2, rank 0.8, a call and the best rank 0.2


class TestPreparedProcessor:
    @pytest.mark.parametrize("size", [(1, 1), (300, 20), (28, 5600), (90, 120), (3000, 2000)])
    @pytest.mark.parametrize("preset", [PRESET, get_preset("release")])
    def test_never_resizes_what_the_protocol_sized(self, family, size, preset):
        processor = make_processor(family)
        encoder = prepare_processor(processor, family, preset)
        width, height = encoder.overview_size(size, preset)
        grid = processor.image_processor([Image.new("RGB", (width, height))], return_tensors="pt")["image_grid_thw"]
        patch = encoder.factor // 2
        assert grid.tolist() == [[1, height // patch, width // patch]]


class TestTrainingDataset:
    def test_rows(self, example):
        examples = [dataclasses.replace(example, query_id=str(i)) for i in range(3)]
        dataset = training_dataset(examples, PRESET)
        assert len(dataset) == 3
        first, again, other = dataset.__getitems__([1, 1, 2])  # as the trainer's data loader asks
        assert first["example"] is again["example"] is examples[1] and other["query_id"] == "2"
        system, user = first["prompt"]
        assert system["role"] == "system" and "<tools>" in system["content"]
        assert user == {"role": "user", "content": ""}

    def test_an_example_of_a_batch_is_read_once(self, example):
        class Counting(list):
            reads = 0

            def __getitem__(self, index):
                self.reads += 1
                return super().__getitem__(index)

        examples = Counting([example])
        training_dataset(examples, PRESET).__getitems__([0] * 8)
        assert examples.reads == 1

    def test_replays_the_prompt_of_a_data_set(self, example):
        preset = get_preset("release", prompt_source="dataset")
        prompt = [{"role": "system", "content": "Rank."}, {"role": "user", "content": "<image> or b or <image>?"}]
        replayed = dataclasses.replace(example, prompt=prompt)
        (row,) = training_dataset([replayed], preset)
        assert row["prompt"] == [{"role": "system", "content": "Rank."}, {"role": "user", "content": ""}]

    def test_refuses_pictures_that_the_environment_could_not_show(self, example):
        preset = get_preset("release", prompt_source="dataset")
        prompt = [{"role": "user", "content": "<image> <image>"}, {"role": "user", "content": "Which one?"}]
        with pytest.raises(ValueError, match="query q: its prompt shows pictures before the last message"):
            training_dataset([dataclasses.replace(example, prompt=prompt)], preset)[0]


class TestStockTrainer:
    def test_trains_and_reads_the_tokens_of_the_agent_loop(self, family, prepared, example, tmp_path):
        names = list(SCRIPTS)
        trainer = scripted_trainer(family, prepared, [example], [SCRIPTS[name] for name in names], tmp_path)
        before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
        trainer.train()

        changed = [name for name, weight in trainer.model.named_parameters() if not weight.equal(before[name])]
        assert any("visual" in name for name in changed) and any("language_model" in name for name in changed)
        log = trainer.state.log_history[0]
        assert log["evidence/top1"] == 0.75  # all but the one that never answers
        assert log["evidence/calls"] == pytest.approx((0 + 2 + 0 + 2) / 4)

        encoder = prepared[1]
        batch = trainer.batches[0]
        tokens = read_rows(batch)
        for name, script in SCRIPTS.items():
            engine = ScriptedEngine(encoder, lambda query_id, turn, script=script: script[turn])
            (trajectory,) = play(engine, [example.task(PRESET)])
            ids, mask = stock_form(trajectory, encoder)
            assert (ids, mask) in tokens, name
