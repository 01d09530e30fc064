"""What the stages share: their settings, loading, freezing and adapters, going on after a stop, and saving."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import is_flash_attn_2_available, is_kernels_available
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from .. import chat_templates, hub
from ..encoding import Encoder
from ..engines.base import Sampling
from ..environment import prepare_processor
from ..protocol import Preset, get_preset
from ..reranker import save_config
from ._record import write_record


if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
"""Folder beside a trained model that keeps its LoRA weights, which the model itself has merged in."""

_PROJECTOR = ("merger.", "deepstack_merger_list.")
"""How the names of a vision model's weights begin that map into the language model; all others are its tower."""


@dataclasses.dataclass
class StageArguments:
    """
    Settings of every stage, beside those of TRL.

    Args:
        preset (`str`, *optional*, defaults to `"release"`):
            The protocol to train: `"release"` or `"foveated"`.
        preset_overrides (`dict` or `str`, *optional*):
            Settings of the preset to replace, such as `{"overview_pixels": 50176}`; JSON on the command line.
        window (`int`, *optional*, defaults to 20):
            Candidates that the trained model is to compare at a time; saved beside it.
        stride (`int`, *optional*, defaults to 10):
            Step from a window to the next; saved beside the model.
        max_turn_tokens (`int`, *optional*, defaults to 1024):
            Most tokens that the trained model may write in one turn; saved beside it.
        tools (`bool`, *optional*, defaults to `True`):
            Whether the trained model may call tools; saved beside it.
        freeze_vision_tower (`bool`, *optional*, defaults to `True`):
            Whether the vision tower stays as it is. LoRA touches it only where this is off.
        freeze_projector (`bool`, *optional*, defaults to `True`):
            The same for the layers that map the tower's output into the language model.
        push_to (`str`, *optional*):
            Repository on the hub, `"owner/name"`, where the finished model goes, with its card; private where it is
            new. Whether it may is found out before the training.
        license (`str`, *optional*):
            Short name of the licence for `push_to`.
    """

    stage: ClassVar[str] = ""

    preset: str = dataclasses.field(default="release", metadata={"help": "Protocol to train: release or foveated."})
    preset_overrides: dict[str, Any] | str | None = dataclasses.field(
        default=None, metadata={"help": "Settings of the preset to replace, as JSON."}
    )
    window: int = dataclasses.field(default=20, metadata={"help": "Candidates compared at a time, when it is used."})
    stride: int = dataclasses.field(default=10, metadata={"help": "Step between windows, when it is used."})
    max_turn_tokens: int = dataclasses.field(default=1024, metadata={"help": "Most tokens of one turn of the model."})
    tools: bool = dataclasses.field(default=True, metadata={"help": "Whether the trained model may call tools."})
    freeze_vision_tower: bool = dataclasses.field(default=True, metadata={"help": "Leave the vision tower as it is."})
    freeze_projector: bool = dataclasses.field(
        default=True, metadata={"help": "Leave the layers between vision tower and language model as they are."}
    )

    push_to: str | None = dataclasses.field(
        default=None, metadata={"help": "Repository on the hub for the finished model, owner/name."}
    )
    license: str | None = dataclasses.field(default=None, metadata={"help": "Licence of the model for push_to."})

    def __post_init__(self) -> None:
        if self.push_to is not None and not self.license:
            raise ValueError("push_to needs a license, by its short name on the hub, such as apache-2.0")
        if isinstance(self.preset_overrides, str):
            try:
                self.preset_overrides = json.loads(self.preset_overrides)
            except ValueError as error:
                raise ValueError(f"preset_overrides is not valid JSON ({error}): {self.preset_overrides}") from error
        if not isinstance(self.preset_overrides, (dict, type(None))):
            raise ValueError(f"preset_overrides must be a mapping, got {self.preset_overrides!r}")
        self.make_preset()  # what cannot work is refused before a model is loaded

    def make_preset(self) -> Preset:
        """The protocol that these settings describe."""
        return get_preset(self.preset, **(self.preset_overrides or {}))

    def save(self, folder: str | Path) -> None:
        """Writes `reranker_config.json`, so that the model in `folder` is played as it was trained."""
        sampling = Sampling(max_turn_tokens=self.max_turn_tokens)
        save_config(folder, self.make_preset(), self.window, self.stride, sampling, self.tools)


class ProtocolCallback(TrainerCallback):
    """
    Saves the protocol's settings into each checkpoint.

    Args:
        arguments (`StageArguments`):
            The settings.
    """

    def __init__(self, arguments: StageArguments):
        self._arguments = arguments

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._arguments.save(Path(args.output_dir, f"checkpoint-{state.global_step}"))


class ExactResume:
    """
    To be mixed into a trainer, before it: weights of a checkpoint are loaded under the names they were saved by.

    transformers (5.17 to 5.23) saves Qwen2.5-VL under the names of its first release. `from_pretrained` translates
    them back but the trainer does not, so that nothing matches: training would go on, or end, with other weights than
    the checkpoint's and no more than a warning.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not self._load_translated(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_translated(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_translated(self, folder: str) -> bool:
        """Loads the weights of a whole model; adapters and sharded weights have formats of their own, which work."""
        if not isinstance(self.model, PreTrainedModel) or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return False
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())
        return True


def parse(classes: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """
    Settings from `--config` and the command line, which wins.

    Args:
        classes (sequence of dataclasses):
            What the settings are split into.
        argv (sequence of `str`, *optional*):
            The arguments; those of the process by default.

    Raises:
        `ValueError`: for a key in the YAML file that nothing knows.
    """
    return TrlParser(classes).parse_args_and_config(argv)


def load_model(model_args: ModelConfig, training_args: TrainingArguments) -> tuple[PreTrainedModel, Encoder]:
    """
    Loads a model and its processor, which gets this project's chat template.

    Without `attn_implementation`, flash attention is used where it is installed and the training runs in half
    precision on a GPU, and else PyTorch's own.

    Args:
        model_args (`ModelConfig`):
            Which model, and how.
        training_args (`TrainingArguments`):
            The trainer's settings; for `bf16`, `fp16` and `model_init_kwargs`.

    Raises:
        `ValueError`: if no model is named, its family has no chat template, a quantised model is to be trained
            without an adapter, or checkpoints are to be pushed to the hub.
    """
    name = model_args.model_name_or_path
    if not name:
        raise ValueError("set model_name_or_path: a model on the hub or a folder")
    quantization = get_quantization_config(model_args)
    if training_args.push_to_hub:
        raise ValueError(
            "push_to_hub uploads checkpoints, whose files would end up among those of the finished model; use "
            "push_to, which pushes that one when training is done"
        )
    if quantization is not None and not model_args.use_peft:
        raise ValueError("the weights of a quantised model cannot be trained; set use_peft: true")
    source = {"revision": model_args.model_revision, "trust_remote_code": False}
    family = AutoConfig.from_pretrained(name, **source).model_type
    if family not in chat_templates.families():
        raise ValueError(f"{name} is a {family!r} model; supported are {chat_templates.families()}")
    model = AutoModelForImageTextToText.from_pretrained(
        name,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation or _attention(model_args, training_args),
        quantization_config=quantization,
        **source,
        **(training_args.model_init_kwargs or {}),
    )
    return model, Encoder(AutoProcessor.from_pretrained(name, **source), family)


def freeze(model: PreTrainedModel, arguments: StageArguments) -> None:
    """Keeps the vision tower, the projector or both as they are."""
    for name, weight in model.model.visual.named_parameters():
        frozen = arguments.freeze_projector if _in_projector(name) else arguments.freeze_vision_tower
        weight.requires_grad_(not frozen)


def lora_config(model_args: ModelConfig, arguments: StageArguments) -> LoraConfig | None:
    """
    The adapter's settings, or `None` where there is none.

    Names such as `gate_proj` and the `all-linear` that stands in by default also fit layers of the vision model:
    they are left out there unless it is to be trained.
    """
    config = get_peft_config(model_args)
    if config is None:
        return None
    config.target_modules = model_args.lora_target_modules or "all-linear"
    projector = "|".join(map(re.escape, _PROJECTOR))
    if arguments.freeze_vision_tower and arguments.freeze_projector:
        config.exclude_modules = r"(.*\.)?visual\..*"
    elif arguments.freeze_vision_tower:
        config.exclude_modules = rf"(.*\.)?visual\.(?!{projector}).*"
    elif arguments.freeze_projector:
        config.exclude_modules = rf"(.*\.)?visual\.({projector}).*"
    return config


def describe(model: torch.nn.Module) -> str:
    """How many weights each part of the model has, and how many of them are trained."""
    counts: dict[str, list[int]] = {"language model": [0, 0], "vision tower": [0, 0], "projector": [0, 0]}
    for name, weight in model.named_parameters():
        _, is_vision, rest = name.rpartition("visual.")
        part = "language model" if not is_vision else "projector" if _in_projector(rest) else "vision tower"
        size = getattr(weight, "ds_numel", None) or weight.numel()  # ZeRO-3 leaves an empty piece in place of a weight
        counts[part][0] += size
        counts[part][1] += size * weight.requires_grad
    return "; ".join(f"{part} {trained:,} of {total:,}" for part, (total, trained) in counts.items())


def last_checkpoint(training_args: TrainingArguments) -> str | None:
    """
    Where to go on: the checkpoint that `resume_from_checkpoint` names, or else the last complete one in `output_dir`,
    so that a run that was killed goes on when it is started again. `resume_from_checkpoint=false` starts afresh.
    """
    asked = training_args.resume_from_checkpoint
    if str(asked).lower() == "false":
        return None
    if asked is not None and str(asked).lower() != "true":
        return str(asked)
    # The trainer's state is written last of all, so a checkpoint without it was cut off.
    states = Path(training_args.output_dir).glob("checkpoint-*/trainer_state.json")
    steps = {int(match[1]): state.parent for state in states if (match := _CHECKPOINT.fullmatch(state.parent.name))}
    if not steps:
        return None
    found = str(steps[max(steps)])
    logger.warning("going on from %s; set resume_from_checkpoint=false to start afresh", found)
    return found


def save_trained(trainer: Trainer, encoder: Encoder, model_args: ModelConfig, arguments: StageArguments) -> None:
    """
    Writes the model to `output_dir` as `Reranker.from_pretrained` and the next stage load it. LoRA weights are kept in
    the subfolder `adapter` and merged into a copy of the base model, which the first process loads into main memory.
    """
    folder = Path(trainer.args.output_dir)
    is_adapter = model_args.use_peft
    trainer.save_model(str(folder / ADAPTER if is_adapter else folder))
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        if is_adapter:
            _merge_adapter(model_args, folder)
            arguments.save(folder / ADAPTER)  # so that the adapter alone is played as it was trained
        # Whoever else plays the model, a vLLM server say, is not to resize what the protocol has sized.
        prepare_processor(encoder.processor, encoder.family, arguments.make_preset())
        encoder.processor.save_pretrained(folder)
        arguments.save(folder)
        write_record(trainer, model_args, arguments, folder)
        if arguments.push_to:
            push(folder, arguments.push_to, arguments.license)
    trainer.accelerator.wait_for_everyone()


def check_push(arguments: StageArguments) -> None:
    """
    Finds out before a training whether `push_to` may be pushed to.

    Raises:
        `HubError`: if the repository holds something already, the token is no good, or the hub cannot be reached.
    """
    if arguments.push_to is not None:
        with tempfile.TemporaryDirectory() as empty:
            hub.Push(arguments.push_to, "model", Path(empty)).check()


def push(folder: Path, repo_id: str, license: str | None) -> None:
    """Pushes a finished model. That the hub refuses is told and no error: the training must not be lost for it."""
    try:
        with hub.model_push(folder, repo_id, license=license) as ready:
            logger.warning("pushed to %s", ready.upload())
    except hub.HubError as error:
        logger.error("%s is complete but was not pushed: %s; use vretrver push model", folder, error)


_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def _attention(model_args: ModelConfig, training_args: TrainingArguments) -> str:
    is_half = training_args.bf16 or training_args.fp16 or model_args.dtype in ("bfloat16", "float16")
    on_gpu = training_args.device.type == "cuda"
    # Without flash-attn, transformers takes the same kernel through the kernels library.
    installed = is_flash_attn_2_available() or is_kernels_available()
    return "flash_attention_2" if is_half and on_gpu and installed else "sdpa"


def _in_projector(name: str) -> bool:
    return name.startswith(_PROJECTOR)


def _merge_adapter(model_args: ModelConfig, folder: Path) -> None:
    from peft import PeftModel
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # under ZeRO-3 it would make this process wait for the others to load their share
    base = AutoModelForImageTextToText.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, dtype=model_args.dtype
    )
    PeftModel.from_pretrained(base, folder / ADAPTER).merge_and_unload().save_pretrained(folder)
