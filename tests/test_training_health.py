from __future__ import annotations

import json
import logging

import pytest
from datasets import Dataset
from tiny_models import make_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerControl, TrainerState
from trl import GRPOConfig, GRPOTrainer

from vretrver_hf.protocol import format_answer, format_call, format_turn
from vretrver_hf.rewards import EvidenceReward, RolloutFacts
from vretrver_hf.training.health import HealthCallback


HEALTHY = {
    "loss": 0.01,
    "evidence/format/mean": 0.9,
    "evidence/format/std": 0.2,
    "evidence/rank/mean": 0.6,
    "evidence/rank/std": 0.3,
    "evidence/tool/mean": 0.1,
    "evidence/tool/std": 0.1,
    "rewards/evidence/std": 0.4,
    "rewards/length/std": 0.2,
    "frac_reward_zero_std": 0.1,
    "evidence/call_rate": 0.5,
    "evidence/calls": 0.7,
    "evidence/malformed": 0.05,
    "evidence/repeated_tokens": 0.01,
    "completions/clipped_ratio": 0.02,
    "tools/call_frequency": 0.6,
}


class Run:
    """Feeds logs to a callback as a trainer does and keeps what it says."""

    def __init__(self, caplog, every: int = 1, **settings):
        self.callback = HealthCallback(**settings)
        self.state = TrainerState()
        self.every = every
        self._caplog = caplog
        caplog.set_level(logging.WARNING)
        self.callback.on_train_begin(None, self.state, TrainerControl())

    def log(self, times: int = 1, **changed) -> list[str]:
        """What is said while `times` logs come, with names as in `HEALTHY` but for `_` instead of `/`."""
        names = {name.replace("/", "_"): name for name in HEALTHY}
        logs = HEALTHY | {names.get(name, name): value for name, value in changed.items()}
        self._caplog.clear()
        for _ in range(times):
            self.state.global_step += self.every
            self.callback.on_log(None, self.state, TrainerControl(), logs=dict(logs))
        return [record.getMessage() for record in self._caplog.records]


CONDITIONS = [
    ({"evidence_rank_std": 0.0}, "the reward term 'rank' has had no variance"),
    ({"evidence_tool_std": 3e-8}, "the reward term 'tool' has had no variance"),  # float32 noise
    ({"rewards_length_std": 0.0}, "the reward term 'length' has had no variance"),  # somebody's own
    ({"frac_reward_zero_std": 1.0}, "all rollouts of each group have earned the same"),
    ({"evidence_call_rate": 0.0}, "no rollout has made a valid tool call"),
    ({"evidence_calls": 2.0}, "nearly their whole budget of tool calls (2)"),
    ({"evidence_calls": 1.95}, "nearly their whole budget of tool calls (2)"),
    ({"evidence_repeated_tokens": 0.2}, "repeated a control token or a tag back to back (now 20% of them)"),
]


class TestWhatLasts:
    @pytest.mark.parametrize(("change", "words"), CONDITIONS)
    def test_is_said_once_after_n_steps(self, caplog, change, words):
        run = Run(caplog, n=5, max_calls=2)
        assert run.log(10) == []
        assert run.log(4, **change) == []
        (said,) = run.log(1, **change)
        assert said.startswith("Over the last 5 steps, ") and words in said
        assert run.log(20, **change) == []

    @pytest.mark.parametrize(("change", "words"), CONDITIONS)
    def test_is_said_again_after_it_recovered(self, caplog, change, words):
        run = Run(caplog, n=5, max_calls=2)
        assert len(run.log(5, **change)) == 1  # from the start
        assert run.log(4) + run.log(9, **change) == []  # 4 steps are no recovery
        assert run.log(5) + run.log(4, **change) == []
        assert len(run.log(1, **change)) == 1

    def test_nothing_is_said_about_calls_where_there_are_no_tools(self, caplog):
        quiet = {"evidence_tool_std": 0.0, "evidence_call_rate": None, "evidence_calls": None}
        quiet |= {"tools_call_frequency": 0.0}
        assert Run(caplog, n=5, max_calls=2, tools=False).log(20, **quiet) == []
        said = Run(caplog, n=5, max_calls=2).log(20, **quiet)
        assert len(said) == 2 and "'tool' has had no variance" in said[0] and "no rollout has made" in said[1]
        assert len(Run(caplog, n=5, tools=False).log(20, evidence_rank_std=0.0)) == 1  # the rest is watched

    def test_steps_count_and_not_logs(self, caplog):
        run = Run(caplog, every=10, n=25)
        assert run.log(2, evidence_rank_std=0.0) == []
        (said,) = run.log(1, evidence_rank_std=0.0)
        assert said.startswith("Over the last 30 steps, ")

    def test_a_resumed_run_counts_from_where_it_resumes(self, caplog):
        run = Run(caplog, n=5)
        run.state.global_step = 1000
        run.callback.on_train_begin(None, run.state, TrainerControl())
        assert run.log(4, evidence_rank_std=0.0) == []
        assert len(run.log(1, evidence_rank_std=0.0)) == 1

    @pytest.mark.parametrize(
        "change",
        [
            {"rewards_evidence_std": 0.0},  # of the total, which frac_reward_zero_std stands for
            {"evidence_rank_std": None},  # TRL's word for no value
            {"evidence_calls": 5.0},  # nobody said what the budget is
            {"evidence_call_rate": 0.001},
            {"tools_call_frequency": 0.0},  # counts rollouts that were given no tools
            {"evidence_repeated_tokens": 0.04},
            {"completions_clipped_ratio": 0.2},
        ],
    )
    def test_nothing_to_say(self, caplog, change):
        assert Run(caplog, n=2).log(20) + Run(caplog, n=2).log(20, **change) == []

    def test_without_our_reward(self, caplog):
        """What TRL logs itself is enough for the calls."""
        run = Run(caplog, n=2, max_calls=2)
        without = {name.replace("/", "_"): None for name in HEALTHY if name.startswith("evidence/")}
        assert "no rollout has made" in run.log(2, **without, tools_call_frequency=0.0)[0]
        assert "budget" in run.log(2, **without, tools_call_frequency=2.0)[0]

    def test_only_training_and_only_on_one_rank(self, caplog):
        run = Run(caplog, n=1)
        wrong = {"evidence/rank/std": 0.0}
        for logs in ({"eval_loss": 1.0, **wrong}, {"train_loss": 1.0, "train_runtime": 9.0, **wrong}, None):
            run.state.global_step += 1
            run.callback.on_log(None, run.state, TrainerControl(), logs=logs)
        assert caplog.records == []
        run.state.is_world_process_zero = False
        assert run.log(5, evidence_rank_std=0.0) == []


class TestSharesThatRise:
    RATES = [("completions_clipped_ratio", "were cut off"), ("evidence_malformed", "were malformed")]

    @pytest.mark.parametrize(("name", "words"), RATES)
    def test_is_said_once(self, caplog, name, words):
        run = Run(caplog, n=4)
        assert run.log(4, **{name: 0.5}) + run.log(4, **{name: 0.1}) + run.log(2, **{name: 0.4}) == []
        (said,) = run.log(1, **{name: 0.4})  # the mean of 0.1, 0.4, 0.4, 0.4 is 0.325, which is 0.225 above 0.1
        assert said.startswith("Over the last 4 steps, ") and f"32% of the outputs {words}, up from 10%" in said
        assert run.log(20, **{name: 0.9}) == []

    @pytest.mark.parametrize(("name", "words"), RATES)
    def test_is_said_again_after_it_recovered(self, caplog, name, words):
        run = Run(caplog, n=4)
        assert len(run.log(4, **{name: 0.1}) + run.log(4, **{name: 0.9})) == 1
        assert run.log(10, **{name: 0.1}) == []
        assert len(run.log(4, **{name: 0.9})) == 1

    def test_one_bad_step_is_no_rise(self, caplog):
        run = Run(caplog, n=10)
        assert run.log(10) + run.log(1, evidence_malformed=1.0) + run.log(10) == []

    def test_high_from_the_start_is_no_rise(self, caplog):
        assert Run(caplog, n=2).log(20, evidence_malformed=0.9) == []

    def test_steps_weigh_and_not_logs(self, caplog):
        run = Run(caplog, every=10, n=20)
        assert run.log(2, evidence_malformed=0.1) + run.log(1, evidence_malformed=0.4) == []  # a mean of 0.25
        assert "40% of the outputs" in run.log(1, evidence_malformed=0.4)[0]


@pytest.mark.parametrize(
    "bad",
    [{"n": 0}, {"max_calls": 0}, {"rise": 0.0}, {"rise": 20}, {"repeats": 0.0}],  # 20 is no share
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        HealthCallback(**bad)


class TestInARealRun:
    """Real trainer, real reward, real logs; what the model "says" in each step is written down."""

    CALL = format_turn("look", format_call("select_images", {"target_images": [1]}))

    def run(self, tmp_path, script, preset: str = "paper", **settings) -> list[dict]:
        tokenizer = make_tokenizer("qwen2_5_vl")
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=512, **size)

        def rollouts(prompts, trainer):
            facts = [script(trainer.state.global_step, place) for place in range(len(prompts))]
            ids = [tokenizer.encode(fact.completion + "<|im_end|>") for fact in facts]
            prompt_ids = [tokenizer.encode(prompt) for prompt in prompts]
            return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": None, "rollout_facts": facts}

        arguments = GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=256,
            max_steps=6,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            Qwen2ForCausalLM(config),
            EvidenceReward(preset),
            arguments,
            Dataset.from_list([{"prompt": f"q{i}", "query_id": str(i)} for i in range(8)]),
            processing_class=tokenizer,
            callbacks=[HealthCallback(**settings)],
            rollout_func=rollouts,
        )
        trainer.train()
        return trainer.state.log_history

    def answer(self, place: int, turns: list[str], calls: int, tools: bool = True) -> RolloutFacts:
        """Rollouts of a group rank differently."""
        order = [0, 1, 2] if place % 2 else [1, 2, 0]
        text = "\n".join([*turns, format_turn("t", format_answer(order))])
        return RolloutFacts(text, [1], 3, calls, tools)

    def test_a_healthy_run_is_silent(self, tmp_path, caplog):
        def script(step, place):
            if place == 3:
                return RolloutFacts("hm", [1], 3, 0)
            return self.answer(place, [self.CALL] * (place % 2), place % 2)

        caplog.set_level(logging.WARNING, "vretrver_hf")
        history = self.run(tmp_path, script, n=3, max_calls=2)
        assert [record.getMessage() for record in caplog.records if record.name.startswith("vretrver_hf")] == []
        # The names that are read are those that are logged; a run without environment and a second reward lacks two.
        assert set(HEALTHY) - {"tools/call_frequency", "rewards/length/std"} <= set(history[0])
        assert history[0]["evidence/malformed"] == history[0]["evidence/call_rate"] == 0.25
        json.dumps(history)

    def test_a_run_that_goes_wrong(self, tmp_path, caplog):
        def script(step, place):
            if step < 3:  # all rank alike and call nothing
                return self.answer(0, [], 0)
            if place < 2:
                return RolloutFacts("<think><think>", [1], 3, 0)
            return self.answer(place, [self.CALL] * 2, 2)

        caplog.set_level(logging.WARNING, "vretrver_hf")
        self.run(tmp_path, script, "need", n=3, max_calls=2)
        said = [record.getMessage() for record in caplog.records if record.name.startswith("vretrver_hf")]
        expected = ["'format'", "'rank'", "'tool'", "each group", "no rollout has made", "malformed", "repeated a"]
        for words in expected:
            assert sum(words in message for message in said) == 1, words
        assert len(said) == len(expected)
