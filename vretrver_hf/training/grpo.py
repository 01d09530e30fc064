"""
Reinforcement learning (GRPO) on whole rollouts: what the model wrote is rewarded, what it was shown is only read.

accelerate launch --config_file recipes/accelerate_configs/zero2.yaml \\
    -m vretrver_hf.training.grpo --config recipes/v-retrver-7b/grpo.yaml
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils.data import Sampler
from transformers import AutoConfig, AutoProcessor
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from ..data.examples import load_examples
from ..encoding import collapse_pads
from ..engines.base import Sampling
from ..engines.transformers import TransformersEngine
from ..environment import RerankEnvironment, prepare_processor, training_dataset
from ..images import MAX_IMAGE_TOKENS, MIN_IMAGE_TOKENS
from ..protocol import Preset, get_preset
from ..rewards import EvidenceReward
from ..trajectory import write_jsonl
from ..vision import equal_pictures_once
from ._common import (
    ExactResume,
    ProtocolCallback,
    StageArguments,
    check_push,
    describe,
    freeze,
    last_checkpoint,
    load_model,
    lora_config,
    parse,
    save_trained,
)
from ._features import FeatureCache
from ._passes import QuickPasses, base_model
from ._rollouts import RecordedEnvironment, Rollout, play_rollouts, unseen_picture, with_unseen_picture
from ._sharding import whole_weights
from .health import HealthCallback


if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

    from ..data.examples import Examples, RerankExample
    from ..encoding import Encoder

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class EvidenceGRPOConfig(GRPOConfig):
    """
    TRL's settings of GRPO and those of the project's own rollouts.

    Args:
        max_sessions (`int`, *optional*, defaults to 16):
            Most rollouts of a process in one batch; memory for keys and values grows with it.
        prefill_tokens (`int`, *optional*, defaults to 8192):
            Most tokens of one prefill batch.
        trajectories_steps (`int`, *optional*, defaults to 50):
            Saves the first process's trajectories every so many steps, from the first on, to
            `output_dir/trajectories`; 0 never.
        log_multimodal (`bool`, *optional*, defaults to `False`):
            As in TRL, where it is on: every picture would be gathered over all processes in every step.
    """

    max_sessions: int = dataclasses.field(default=16, metadata={"help": "Most rollouts of a process in one batch."})
    prefill_tokens: int = dataclasses.field(default=8192, metadata={"help": "Most tokens of one prefill batch."})
    trajectories_steps: int = dataclasses.field(
        default=50, metadata={"help": "Save trajectories every so many steps; 0 never."}
    )
    log_multimodal: bool = dataclasses.field(
        default=False, metadata={"help": "Gather every picture in every step, for the logs."}
    )


@dataclasses.dataclass
class GRPOScriptArguments(StageArguments):
    """
    What to train on and what to pay. For the settings of every stage see [`StageArguments`].

    Args:
        dataset_name (`str`):
            A parquet or JSONL file, a folder of parquet files or a data set on the hub, in the released row schema;
            see [`~vretrver_hf.data.examples.load_examples`].
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on, where `eval_strategy` is not `"no"`.
        eval_dataset_name (`str`, *optional*):
            Where the examples to evaluate on come from; `dataset_name` by default.
        image_root (`str`, *optional*):
            Folder that picture paths start from and all pictures lie below; that of a local source by default.
        reward (`str`, *optional*, defaults to `"paper"`):
            Preset of [`EvidenceReward`]: `"paper"`, `"release"` or `"need"`.
        reward_overrides (`dict` or `str`, *optional*):
            Settings of the reward to replace, such as `{"sigma": 2.0}`; JSON on the command line.
    """

    stage: ClassVar[str] = "grpo"

    dataset_name: str | None = dataclasses.field(default=None, metadata={"help": "File, folder or hub data set."})
    dataset_train_split: str = dataclasses.field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = dataclasses.field(default="test", metadata={"help": "Split to evaluate on."})
    eval_dataset_name: str | None = dataclasses.field(
        default=None, metadata={"help": "File, folder or hub data set to evaluate on; dataset_name by default."}
    )
    image_root: str | None = dataclasses.field(
        default=None, metadata={"help": "Folder that picture paths start from and all pictures lie below."}
    )
    reward: str = dataclasses.field(default="paper", metadata={"help": "Reward preset: paper, release or need."})
    reward_overrides: dict[str, Any] | str | None = dataclasses.field(
        default=None, metadata={"help": "Settings of the reward to replace, as JSON."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dataset_name:
            raise ValueError("set dataset_name: a file or folder of examples, or a hub data set")
        if isinstance(self.reward_overrides, str):
            try:
                self.reward_overrides = json.loads(self.reward_overrides)
            except ValueError as error:
                raise ValueError(f"reward_overrides is not valid JSON ({error}): {self.reward_overrides}") from error
        if not isinstance(self.reward_overrides, (dict, type(None))):
            raise ValueError(f"reward_overrides must be a mapping, got {self.reward_overrides!r}")
        self.make_reward()  # what cannot work is refused before a model is loaded

    def make_reward(self) -> EvidenceReward:
        """The reward that these settings describe."""
        return EvidenceReward(self.reward, **(self.reward_overrides or {}))


class EvidenceGRPOTrainer(QuickPasses, ExactResume, GRPOTrainer):
    """
    TRL's GRPO trainer for reranking with pictures and tools.

    Five methods of TRL 1.16 are overridden, and nothing else but how a checkpoint is loaded ([`ExactResume`]) and how
    a pass is computed ([`QuickPasses`]):

    - `_generate`, to run the project's own agent loop. TRL's processes all pictures and prefills the whole
      conversation again in every turn, runs tools one by one, ends a rollout without a word at a malformed turn, gives
      a turn no limit of its own, and lets a sampled picture pad take every picture out of the batch. With `use_vllm`
      TRL's loop runs as it is, with [`RerankEnvironment`]: malformed turns get no answer, there are no rollouts
      without tools, and neither trajectories nor the metrics `rollouts/*`.
    - `_generate_single_turn`, for vLLM only. TRL hands vLLM prompts whose pads are expanded; in colocate mode vLLM
      expands them once more (TRL issue 6294). And vLLM keeps what the vision tower made of a picture under old
      weights (TRL issue 7198). It also takes its limits of a picture's size from the model folder and not from the
      processor that TRL was given, so in colocate mode it is told them ([`SizedLLM`]).
    - `_get_tool_suffix_ids`, for vLLM only: a turn stops behind its call, and its end mark is not learnt, as in the
      project's own loop.
    - `_get_train_sampler`, since TRL's sampler draws each epoch's order from what the epochs before left of its
      generator: a run that goes on in a later epoch would meet the first one's order again.
    - `_generate_and_score_completions`, so that equal pictures are processed once ([`equal_pictures_once`]), or not at
      all where the tower is frozen ([`FeatureCache`]).

    Where the vision tower and its projector are frozen, each picture passes them once a step ([`FeatureCache`]).

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            A Qwen2.5-VL or Qwen3-VL model.
        reward_funcs (`EvidenceReward`, callable or list of them, *optional*):
            `EvidenceReward("paper")` by default. If its preset asks for it, the last rollouts of each group are played
            without tools. Other functions get the rollouts' records in `environments`, as `environment.trajectory`.
        args ([`EvidenceGRPOConfig`], *optional*):
            The settings.
        train_dataset (sequence of `RerankExample`):
            What to train on, such as [`~vretrver_hf.data.examples.load_examples`] gives it.
        eval_dataset (sequence of `RerankExample`, *optional*):
            What to evaluate with.
        processing_class (`ProcessorMixin`, *optional*):
            The model's processor; it gets this project's chat template and the protocol's limits of a picture's size.
        preset (`str` or `Preset`, *optional*, defaults to `"release"`):
            The protocol to train.
        max_turn_tokens (`int`, *optional*, defaults to 1024):
            Most tokens of one model turn.
        tools (`bool`, *optional*, defaults to `True`):
            Whether the model may call tools.
        **kwargs:
            Further arguments of `GRPOTrainer`: `callbacks`, `optimizers`, `peft_config`, …

    Example:

    ```python
    >>> from vretrver_hf.data.examples import load_examples
    >>> from vretrver_hf.rewards import EvidenceReward
    >>> from vretrver_hf.training.grpo import EvidenceGRPOConfig, EvidenceGRPOTrainer

    >>> trainer = EvidenceGRPOTrainer(
    ...     "V-Retrver/V-Retrver-RFT-7B",
    ...     EvidenceReward("paper"),
    ...     EvidenceGRPOConfig("out", num_generations=8),
    ...     load_examples("train.parquet"),
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP

    ```
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: EvidenceReward | Callable[..., Any] | list[Callable[..., Any]] | None = None,
        args: EvidenceGRPOConfig | None = None,
        train_dataset: Sequence[RerankExample] | None = None,
        eval_dataset: Sequence[RerankExample] | None = None,
        processing_class: ProcessorMixin | None = None,
        preset: str | Preset = "release",
        max_turn_tokens: int = 1024,
        tools: bool = True,
        **kwargs: Any,
    ):
        args = args or EvidenceGRPOConfig("grpo")
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs or EvidenceReward("paper")]
        self.preset = get_preset(preset)
        self.sampling = Sampling(args.temperature, args.top_p, args.top_k or 0, max_turn_tokens)
        evidence = [reward for reward in rewards if isinstance(reward, EvidenceReward)]
        self._evidence, self._with_tools = evidence, tools
        _check(args, evidence, tools)
        if processing_class is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            processing_class = AutoProcessor.from_pretrained(name)
        config = AutoConfig.from_pretrained(model) if isinstance(model, str) else model.config
        folder_limits = dict(processing_class.image_processor.size)
        self.encoder = prepare_processor(processing_class, config.model_type, self.preset)
        args.max_tool_calling_iterations = self.preset.max_calls + 1
        if args.use_vllm:
            # A pad that the model writes would stand for a picture that there is not.
            unwanted = self.encoder.tokenizer.convert_ids_to_tokens(self.encoder.suppressed_ids)
            limits = {"max_tokens": max_turn_tokens, "bad_words": unwanted}
            # A call ends the turn, and `_get_tool_suffix_ids` closes it: the model never learns to write the end mark.
            limits["stop_token_ids"] = [self.encoder.end_of_call]
            args.generation_kwargs = {**limits, **(args.generation_kwargs or {})}
        super().__init__(
            model=model,
            reward_funcs=rewards,
            args=args,
            train_dataset=None if train_dataset is None else training_dataset(train_dataset, self.preset),
            eval_dataset=None if eval_dataset is None else training_dataset(eval_dataset, self.preset),
            processing_class=processing_class,
            environment_factory=partial(
                RerankEnvironment if args.use_vllm else RecordedEnvironment, self.encoder, self.preset
            ),
            **kwargs,
        )
        if self._dist.fsdp_version == 1 and not args.use_vllm:
            raise ValueError(
                "the project's own rollouts need whole weights, and FSDP's first version gives them only within its "
                "own forward pass: set fsdp_version to 2 in the launch configuration, or use_vllm"
            )
        tower = base_model(self.model).model.visual
        self._tower_is_trained = any(weight.requires_grad for weight in tower.parameters())
        self._saved_step: int | None = None
        if args.use_vllm and args.vllm_mode == "server" and self._tower_is_trained:
            raise ValueError(
                "a vLLM server goes on using what the vision tower made of a picture under old weights: freeze the "
                "tower, or set vllm_mode: colocate"
            )
        if args.use_vllm and args.vllm_mode == "server":
            _check_limits(folder_limits, self.preset, self.encoder)
        elif args.use_vllm:
            self.vllm_generation.llm = SizedLLM(self.vllm_generation.llm, processing_class.image_processor.size)
        # A reference model, with a tower of its own, reads the same pictures, and must be given their pixels.
        cached = not args.use_vllm and not self._tower_is_trained and self.ref_model is None
        self.features = FeatureCache(tower, processing_class.image_processor) if cached else None

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """TRL 1.16 calls this for a batch, whose groups show the same pictures; see the class."""
        once = equal_pictures_once(self.processing_class.image_processor)
        with once if self.features is None else self.features.numbered():
            return super()._generate_and_score_completions(inputs)

    def _generate(self, prompts: list) -> tuple[Any, ...]:
        """TRL 1.16 calls this for completions and all it knows about them; see the class for why it is replaced."""
        if self.use_vllm:
            return super()._generate(prompts)
        mode = "train" if self.model.training else "eval"
        rollouts = self._play(mode)
        self._save_trajectories(mode, rollouts)
        self._log_rollouts(mode, rollouts)
        logprobs = [rollout.logprobs for rollout in rollouts]
        images = [rollout.images or None for rollout in rollouts] if any(r.images for r in rollouts) else None
        return (
            [rollout.prompt_ids for rollout in rollouts],
            [rollout.completion_ids for rollout in rollouts],
            [rollout.mask for rollout in rollouts],
            [rollout.messages for rollout in rollouts],
            logprobs if all(values is not None for values in logprobs) else None,
            {},
            images,
            # TRL reads these only as a sign that the pictures are not those of the prompts alone, upon which it takes
            # pads and pictures as they are instead of rendering the prompts anew.
            images or [],
        )

    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> Any:
        """TRL 1.16 calls this for each turn of its own loop; see the class for what vLLM needs."""
        if self.use_vllm and self.vllm_mode == "colocate":
            if self._tower_is_trained and self.state.global_step != self._last_loaded_step:
                self.vllm_generation.llm.llm_engine.reset_encoder_cache()
            prompt_ids = [collapse_pads(ids, self.encoder.image_pad) for ids in prompt_ids]
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _get_tool_suffix_ids(self, tool_messages: list[dict[str, Any]]) -> list[int]:
        """TRL 1.16 calls this for what follows a turn with a call, which it takes to be closed; see the class."""
        return [self.encoder.end_of_turn, *super()._get_tool_suffix_ids(tool_messages)]

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        """TRL 1.16 calls this for the order of the rows; see the class for why each epoch's is drawn by its number."""
        return _EpochSampler(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def _play(self, mode: str) -> list[Rollout]:
        group = self.num_generations if mode == "train" else self.num_generations_eval
        with_tools = group - max((reward.num_without_tools(group) for reward in self._evidence), default=0)
        first = self.accelerator.process_index * len(self.environments)
        tasks = []
        for number, environment in enumerate(self.environments, start=first):
            environment.tools = self._with_tools and number % group < with_tools
            tasks.append(environment.example.task(self.preset, sample=number % group, tools=environment.tools))
        # Every step draws anew, and a run that goes on from a checkpoint draws what it would have drawn.
        seed = 2 * ((self.args.seed << 32) + self.state.global_step) + (mode == "eval")
        sampling = dataclasses.replace(self.sampling, seed=seed)
        with self._policy() as model:
            engine = TransformersEngine(model, self.processing_class, self.args.max_sessions, self.args.prefill_tokens)
            if self.features is not None:
                engine.features = self.features.begin(mode)
            rollouts = play_rollouts(engine, tasks, sampling, self.max_completion_length)
            is_mixed = any(rollout.images for rollout in rollouts) and not all(rollout.images for rollout in rollouts)
            if is_mixed and self.features is not None:
                self.features.pictures[mode].tower_output([unseen_picture(self.encoder)])
        for environment, rollout in zip(self.environments, rollouts, strict=True):
            environment.trajectory = rollout.trajectory
        tower_is_shared = self._tower_is_trained and (self._dist.is_zero3 or self._dist.is_fsdp)
        if is_mixed or tower_is_shared:
            rollouts = [
                rollout if rollout.images else with_unseen_picture(rollout, self.encoder) for rollout in rollouts
            ]
        return rollouts

    @contextlib.contextmanager
    def _policy(self) -> Iterator[PreTrainedModel]:
        """The bare model as it stands, for reading only and in the precision of the loss."""
        with (
            whole_weights(self.model_wrapped, self.accelerator, self.args.gradient_checkpointing_kwargs) as model,
            torch.no_grad(),
            self.accelerator.autocast(),
        ):
            was_training = model.training
            try:
                yield base_model(model)
            finally:
                model.train(was_training)

    def _save_trajectories(self, mode: str, rollouts: Sequence[Rollout]) -> None:
        every, step = self.args.trajectories_steps, self.state.global_step
        if mode == "eval" or not every or step % every or not self.accelerator.is_main_process:
            return
        folder = Path(self.args.output_dir, "trajectories")
        folder.mkdir(parents=True, exist_ok=True)
        # A step may make its rollouts in several goes; a step that is done again, after a stop, makes its file anew.
        goes_on, self._saved_step = step == self._saved_step, step
        path = folder / f"step-{step:06d}.jsonl"
        write_jsonl(path, [rollout.trajectory for rollout in rollouts], append=goes_on)

    def _log_rollouts(self, mode: str, rollouts: Sequence[Rollout]) -> None:
        """The metrics that TRL's `_generate` logs, under its names, and ours."""
        ends = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        facts = torch.tensor(
            [_facts(rollout, ends) for rollout in rollouts], dtype=torch.float64, device=self.accelerator.device
        )
        columns = dict(zip(_FACTS, self.accelerator.gather(facts).unbind(1), strict=True))
        total = {name: column.sum().item() for name, column in columns.items()}
        lengths, is_cut = columns["sampled"], columns["is_cut"].bool()
        if mode == "train":
            self.state.num_input_tokens_seen += int(total["prompt"] + total["sampled"])
        self._metrics[mode]["num_tokens"] = [self.state.num_input_tokens_seen]
        complete = lengths[~is_cut] if not is_cut.all() else torch.zeros(1)
        calls, turns, count = total["calls"], total["turns"], len(lengths)
        metrics = {
            "completions/mean_length": lengths.mean().item(),
            "completions/min_length": lengths.min().item(),
            "completions/max_length": lengths.max().item(),
            "completions/clipped_ratio": total["is_cut"] / count,
            "completions/mean_terminated_length": complete.mean().item(),
            "completions/min_terminated_length": complete.min().item(),
            "completions/max_terminated_length": complete.max().item(),
            "tools/call_frequency": calls / count,
            "tools/failure_frequency": 1 - total["valid_calls"] / calls if calls else 0.0,
            "rollouts/turns": turns / count,
            "rollouts/malformed_turns": total["malformed_turns"] / turns if turns else 0.0,
            "rollouts/tokens_read": total["read"] / count,
            "rollouts/pictures": total["pictures"] / count,
            **{f"rollouts/{name}": total[name] / count for name in (*_FINISHES, *_STATUSES)},
        }
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)


class SizedLLM:
    """
    A vLLM that takes pictures at the size that the protocol gave them, whatever its model folder says.

    Args:
        llm (`vllm.LLM`):
            What everything is passed on to.
        size (mapping):
            The image processor's limits, `shortest_edge` and `longest_edge`, in pixels of a picture.
    """

    def __init__(self, llm: Any, size: Mapping[str, int]):
        self._llm = llm
        self._limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def generate(self, prompts: Sequence[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        sized = [
            {**prompt, "mm_processor_kwargs": self._limits} if "multi_modal_data" in prompt else prompt
            for prompt in prompts
        ]
        return self._llm.generate(sized, *args, **kwargs)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the settings and trains."""
    trainer = train(*parse((GRPOScriptArguments, EvidenceGRPOConfig, ModelConfig), argv))
    trainer.accelerator.end_training()  # a process group that is not ended may abort at exit


def train(
    script_args: GRPOScriptArguments,
    training_args: EvidenceGRPOConfig,
    model_args: ModelConfig,
    callbacks: Sequence[TrainerCallback] = (),
) -> EvidenceGRPOTrainer:
    """
    Trains and saves a model. A run that was stopped goes on from its last checkpoint.

    Args:
        script_args (`GRPOScriptArguments`):
            What to train on and what to pay.
        training_args (`EvidenceGRPOConfig`):
            How to train.
        model_args (`ModelConfig`):
            What to train, as a whole or with an adapter.
        callbacks (sequence of `TrainerCallback`, *optional*):
            Told of everything that the trainer does.

    Returns:
        `EvidenceGRPOTrainer`: the trainer, when it is done.
    """
    check_push(script_args)
    model, encoder = load_model(model_args, training_args)
    adapter = lora_config(model_args, script_args)
    if adapter is None:
        freeze(model, script_args)
    preset = script_args.make_preset()
    examples = _open(script_args, training_args)
    trainer = EvidenceGRPOTrainer(
        model=model,
        reward_funcs=script_args.make_reward(),
        args=training_args,
        train_dataset=examples["train"],
        eval_dataset=examples.get("eval"),
        processing_class=encoder.processor,
        preset=preset,
        max_turn_tokens=script_args.max_turn_tokens,
        tools=script_args.tools,
        peft_config=adapter,
        callbacks=[
            *callbacks,
            HealthCallback(max_calls=preset.max_calls or None, tools=script_args.tools),
            ProtocolCallback(script_args),
        ],
    )
    trainer.accelerator.print(f"Training {describe(trainer.model)}")
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args))
    save_trained(trainer, encoder, model_args, script_args)
    return trainer


def _open(script_args: GRPOScriptArguments, training_args: EvidenceGRPOConfig) -> dict[str, Examples]:
    sources = {"train": (script_args.dataset_name, script_args.dataset_train_split)}
    if training_args.eval_strategy != "no":
        sources["eval"] = script_args.eval_dataset_name or script_args.dataset_name, script_args.dataset_test_split
    with training_args.main_process_first(desc="opening the data set"):
        return {
            name: load_examples(source, split, script_args.image_root) for name, (source, split) in sources.items()
        }


def _check(args: EvidenceGRPOConfig, rewards: Sequence[EvidenceReward], tools: bool) -> None:
    """Refuses what would be ignored or could not work."""
    if args.remove_unused_columns:
        raise ValueError("remove_unused_columns would remove the examples; turn it off")
    if args.use_vllm:
        if not tools:
            raise ValueError("with use_vllm the model is always given tools")
        if any(reward.num_without_tools(args.num_generations) for reward in rewards):
            raise ValueError(
                "a share of rollouts without tools cannot be played with use_vllm; set no_tool_share to 0"
            )
        return
    neutral = {"min_p": (None, 0.0), "repetition_penalty": (1.0,), "generation_kwargs": (None, {})}
    neutral |= {"chat_template_kwargs": (None, {}), "use_transformers_continuous_batching": (False,)}
    neutral |= {"cache_implementation": (None,), "ds3_gather_for_generation": (True,)}
    if ignored := [name for name, values in neutral.items() if getattr(args, name) not in values]:
        raise ValueError(f"without use_vllm, the project's own rollouts know nothing of {', '.join(ignored)}; unset")
    every = args.steps_per_generation * args.num_iterations
    saved_every = args.save_steps * args.gradient_accumulation_steps  # below 1, save_steps is a share of the run
    if args.save_strategy == "steps" and args.save_steps >= 1 and saved_every % every:
        logger.warning(
            "save_steps=%s lies within a batch of rollouts (steps_per_generation x num_iterations = %d backward "
            "passes): a run that goes on from such a checkpoint draws new rollouts and ends elsewhere",
            args.save_steps,
            every,
        )


def _check_limits(size: Mapping[str, int], preset: Preset, encoder: Encoder) -> None:
    """Refuses a server that would resize the protocol's pictures; only a very long one may still exceed its budget."""
    square = encoder.factor**2
    budgets = [preset.overview_pixels, preset.inspect_pixels or MAX_IMAGE_TOKENS * square]
    most = max(budget for budget in budgets if budget is not None)
    if size["shortest_edge"] > MIN_IMAGE_TOKENS * square or size["longest_edge"] < most:
        raise ValueError(
            f"a vLLM server takes its limits of a picture's size from the model folder, {size['shortest_edge']} to "
            f"{size['longest_edge']} pixels, and would resize the protocol's pictures, {MIN_IMAGE_TOKENS * square} to "
            f"{most} pixels: serve a folder whose processor was saved after prepare_processor, as every stage here "
            "saves it, or set vllm_mode: colocate"
        )


class _EpochSampler(Sampler):
    """Draws the order of an epoch by its number alone, and that of the first as TRL does."""

    def __init__(self, sampler: Sampler, epoch: Callable[[], int]):
        self._sampler = sampler
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self._sampler.shuffle:
            self._sampler.generator.manual_seed(self._sampler.seed + self._epoch())
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


_FINISHES = ("answer", "no_answer", "length", "error")
_STATUSES = ("ok", "repaired", "fallback")
_FACTS = ("prompt", "sampled", "read", "is_cut", "pictures", "turns", "malformed_turns", "calls", "valid_calls")
_FACTS += (*_FINISHES, *_STATUSES)


def _facts(rollout: Rollout, ends: Sequence[int]) -> list[int]:
    """What is logged of a rollout, in the order of `_FACTS`."""
    trajectory = rollout.trajectory
    sampled, turns = sum(rollout.mask), trajectory.assistant_turns
    return [
        len(rollout.prompt_ids),
        sampled,
        len(rollout.completion_ids) - sampled,
        rollout.completion_ids[-1] not in ends,
        len(rollout.images),
        len(turns),
        sum(turn.kind == "malformed" for turn in turns),
        trajectory.num_calls,
        trajectory.num_valid_calls,
        *(trajectory.finish == finish for finish in _FINISHES),
        *(trajectory.status == status for status in _STATUSES),
    ]


if __name__ == "__main__":
    main()
