"""
Supervised fine-tuning on whole conversations: what the model wrote is learned, what it was shown is only read.

accelerate launch --config_file recipes/accelerate_configs/zero3.yaml \\
    -m vretrver_hf.training.sft --config recipes/v-retrver-7b/sft.yaml
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback
from trl import ModelConfig, SFTConfig, SFTTrainer

from ..data.conversations import Conversation, Conversations, Unusable, load_conversations
from ..images import ItemError
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
from ._passes import QuickPasses


if TYPE_CHECKING:
    from ..encoding import Encoder


@dataclasses.dataclass
class SFTScriptArguments(StageArguments):
    """
    What to learn from. For the settings of every stage see [`StageArguments`].

    Args:
        dataset_name (`str`):
            A folder of trajectories, a JSON, JSONL or parquet file of conversations, or a data set on the hub; see
            [`~vretrver_hf.data.conversations.load_conversations`].
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on, where `eval_strategy` is not `"no"`.
        eval_dataset_name (`str`, *optional*):
            Where the conversations to evaluate on come from; `dataset_name` by default.
        image_root (`str`, *optional*):
            Folder that picture paths start from and all pictures lie below; that of a local source by default.
    """

    stage: ClassVar[str] = "sft"

    dataset_name: str | None = dataclasses.field(default=None, metadata={"help": "Folder, file or hub data set."})
    dataset_train_split: str = dataclasses.field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = dataclasses.field(default="test", metadata={"help": "Split to evaluate on."})
    eval_dataset_name: str | None = dataclasses.field(
        default=None, metadata={"help": "Folder, file or hub data set to evaluate on; dataset_name by default."}
    )
    image_root: str | None = dataclasses.field(
        default=None, metadata={"help": "Folder that picture paths start from and all pictures lie below."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dataset_name:
            raise ValueError("set dataset_name: a folder of trajectories, a file of conversations or a hub data set")


@dataclasses.dataclass
class ConversationSFTConfig(SFTConfig):
    """
    TRL's settings. What differs: conversations longer than `max_length` are dropped and never cut, and without it the
    limit is what the model can read; only the model's own tokens are learned, whatever `assistant_only_loss` says.
    """

    max_length: int | None = dataclasses.field(
        default=None, metadata={"help": "Longer conversations are dropped; the model's own limit by default."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing or self.padding_free:
            raise ValueError("packing and padding_free do not work with pictures; turn them off")
        # The collator makes everything of a row's index, so TRL is neither to prepare nor to remove columns.
        self.assistant_only_loss = False
        self.remove_unused_columns = False
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}


class ConversationCollator:
    """
    Makes batches of conversations when they are needed, pixels included.

    Args:
        conversations (`dict[str, Conversations]`):
            The conversations by the name of their split.
        encoder (`Encoder`):
            Of the model that learns them.
        pad_to_multiple_of (`int`, *optional*):
            Lengths are multiples of this.
    """

    def __init__(
        self,
        conversations: Mapping[str, Sequence[Conversation]],
        encoder: Encoder,
        pad_to_multiple_of: int | None = None,
    ):
        self._conversations, self._encoder = conversations, encoder
        self._multiple = pad_to_multiple_of or 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return self.collate([self._conversations[row["split"]][row["index"]] for row in rows])

    def collate(self, conversations: Sequence[Conversation]) -> dict[str, torch.Tensor]:
        """The inputs of the model, padded on the right; tokens that are not learned have the label -100."""
        images = [image for conversation in conversations for image in conversation.images]
        unseen = [] if images else self._unseen_picture()
        length = max(len(conversation.token_ids) for conversation in conversations) + len(unseen)
        shape = len(conversations), -(-length // self._multiple) * self._multiple
        input_ids = torch.full(shape, self._padding)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, -100)
        for i, conversation in enumerate(conversations):
            tokens = torch.tensor(conversation.token_ids)
            count = len(tokens)
            input_ids[i, :count] = tokens
            attention_mask[i, :count] = 1
            labels[i, :count] = torch.where(torch.tensor(conversation.mask).bool(), tokens, -100)
        if unseen:
            images = [Image.new("RGB", (2 * self._encoder.factor, 2 * self._encoder.factor))]
            input_ids[-1, -len(unseen) :] = torch.tensor(unseen)
        # Sizes were fitted to the budget before, so resizing here could only disagree with the pads.
        pixels = self._encoder.processor.image_processor(images, do_resize=False, return_tensors="pt")
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "mm_token_type_ids": (input_ids == self._encoder.image_pad).int(),
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": pixels["image_grid_thw"],
        }

    @property
    def _padding(self) -> int:
        padding = self._encoder.tokenizer.pad_token_id
        return self._encoder.end_of_turn if padding is None else padding

    def _unseen_picture(self) -> list[int]:
        """
        A picture behind the end of the last row, which nothing attends to. With sharded weights (ZeRO-3, FSDP) a
        process whose batch has no picture would skip the vision tower and leave the others waiting for it.
        """
        return [self._encoder.image_pad] * 4


class ConversationTrainer(QuickPasses, ExactResume, SFTTrainer):
    """TRL's trainer; a run that goes on has the checkpoint's weights, and passes start fewer kernels."""


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the settings and trains."""
    trainer = train(*parse((SFTScriptArguments, ConversationSFTConfig, ModelConfig), argv))
    trainer.accelerator.end_training()  # a process group that is not ended may abort at exit


def train(
    script_args: SFTScriptArguments,
    training_args: ConversationSFTConfig,
    model_args: ModelConfig,
    callbacks: Sequence[TrainerCallback] = (),
) -> ConversationTrainer:
    """
    Trains a model and saves it to `output_dir`, with all that `Reranker.from_pretrained` needs to play it.

    A run that was stopped goes on from its last checkpoint in `output_dir`.

    Args:
        script_args (`SFTScriptArguments`):
            What to learn from.
        training_args (`ConversationSFTConfig`):
            How to train.
        model_args (`ModelConfig`):
            What to train, as a whole or with an adapter.
        callbacks (sequence of `TrainerCallback`, *optional*):
            Told of everything that the trainer does.

    Returns:
        `ConversationTrainer`: the trainer, when it is done.
    """
    check_push(script_args)
    model, encoder = load_model(model_args, training_args)
    # The models decline the number of learned tokens, which TRL's loss divides by all the same. With it every token
    # weighs the same, however a step's conversations are spread over micro-batches and processes.
    model.accepts_loss_kwargs = True
    adapter = lora_config(model_args, script_args)
    if adapter is None:
        freeze(model, script_args)
    conversations = _open(script_args, training_args, encoder)
    limit = model.config.get_text_config().max_position_embeddings
    limit = limit if training_args.max_length is None else min(limit, training_args.max_length)
    rows = {name: screen(conversations[name], name, limit, training_args) for name in conversations}
    trainer = ConversationTrainer(
        model=model,
        args=training_args,
        data_collator=ConversationCollator(conversations, encoder, training_args.pad_to_multiple_of),
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval"),
        processing_class=encoder.processor,
        peft_config=adapter,
        callbacks=[*callbacks, ProtocolCallback(script_args)],
    )
    trainer.accelerator.print(f"Training {describe(trainer.model)}")
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args))
    save_trained(trainer, encoder, model_args, script_args)
    return trainer


def screen(conversations: Conversations, name: str, max_length: int, training_args: SFTConfig) -> Dataset:
    """
    Goes through all conversations once, drops those that cannot be learned from and prints how many and why. Each
    process takes its share, and `dataset_num_proc` workers each.

    Args:
        conversations (`Conversations`):
            The conversations.
        name (`str`):
            Name of their split.
        max_length (`int`):
            Most tokens of a conversation.
        training_args (`SFTConfig`):
            The trainer's settings.

    Returns:
        `datasets.Dataset`: a row for each that is kept, with its `split`, `index` and `length`.

    Raises:
        `ValueError`: if none is left.
    """
    rank, world = training_args.process_index, training_args.world_size
    share = Dataset.from_dict({"index": list(range(rank, len(conversations), world))})
    checked = share.map(
        lambda row: _check(conversations, row["index"], max_length),
        num_proc=training_args.dataset_num_proc,
        desc=f"Reading {name} conversations",
        new_fingerprint=f"screened-{name}-{rank}",  # nothing is cached: files behind the rows may change
    )
    found = sorted(gather_object(checked.to_list()), key=lambda row: row["index"])
    kept = [row for row in found if not row["reason"]]
    summary = _summary(name, found, kept, max_length)
    if not kept:
        raise ValueError(summary)
    if rank == 0:
        print(summary)
    return Dataset.from_list([{"split": name, "index": row["index"], "length": row["length"]} for row in kept])


def _open(
    script_args: SFTScriptArguments, training_args: ConversationSFTConfig, encoder: Encoder
) -> dict[str, Conversations]:
    sources = {"train": (script_args.dataset_name, script_args.dataset_train_split)}
    if training_args.eval_strategy != "no":
        sources["eval"] = script_args.eval_dataset_name or script_args.dataset_name, script_args.dataset_test_split
    preset = script_args.make_preset()
    with training_args.main_process_first(desc="opening the data set"):
        return {
            name: load_conversations(source, encoder, preset, split, script_args.image_root)
            for name, (source, split) in sources.items()
        }


def _check(conversations: Conversations, index: int, max_length: int) -> dict[str, Any]:
    """How long a conversation is, or why it cannot be learned from."""
    row = {"length": 0, "source": "", "reason": "", "message": ""}
    try:
        conversation = conversations[index]
    except ItemError as error:
        return {**row, "reason": "a picture cannot be read", "message": str(error)}
    except Unusable as error:
        return {**row, "reason": error.reason, "message": str(error)}
    row |= {"length": len(conversation.token_ids), "source": conversation.source}
    if len(conversation.token_ids) > max_length:
        row |= {"reason": "too long", "message": f"number {index} has {len(conversation.token_ids)} tokens"}
    return row


def _summary(name: str, found: list[dict[str, Any]], kept: list[dict[str, Any]], max_length: int) -> str:
    lines = [f"{name}: {len(kept):,} of {len(found):,} conversations kept, at most {max_length:,} tokens"]
    if kept:
        lengths = [row["length"] for row in kept]
        stored = sum(row["source"] == "stored" for row in kept)
        lines[0] += f"; {min(lengths):,} to {max(lengths):,} tokens, {sum(lengths) / len(lengths):,.0f} in the mean"
        lines[0] += f"; {stored:,} in the tokens that were sampled, {len(kept) - stored:,} rendered from text"
    for reason, count in collections.Counter(row["reason"] for row in found if row["reason"]).most_common():
        first = next(row["message"] for row in found if row["reason"] == reason)
        lines.append(f"  {count:,} dropped, {reason}; the first: {first}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
