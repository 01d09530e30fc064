"""Trains `vretrver-tiny` from scratch: an ordinary Qwen2.5-VL of 12 million weights, on openly licensed drawings.

Stage 0 trains everything on captions and on choices among candidates. SFT then teaches the protocol on whole
trajectories, vision tower frozen. The clock is the schedule: each stage ends when its minutes are over, the learning
rate falls with the time that is left, and the last weights are always saved.

    python recipes/emoji/build_data.py …
    python recipes/emoji/tokenizer.py --out recipes/emoji/data/processor
    python recipes/emoji/train_tiny.py --out outputs/tiny --minutes 20 all

On several GPUs, `torchrun --nproc-per-node 4 recipes/emoji/train_tiny.py …`: each step's rows are shared out.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from art import TEST_ARTIST
from choices import choice_share
from evaluate import SETS
from intervals import wilson
from locating import PLACE_WEIGHT
from model import embed_parts, fused_norms, losses_of, make_model, num_parameters, tiny_config
from muon import Muon
from preset import MAX_TURN_TOKENS, PRESET, STRIDE, WINDOW
from rows import Batch, share_pictures
from stages import FIRST_ROWS, MATCH_WEIGHT, Feed, Source
from team import Team
from torch import Tensor
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from vretrver_hf.engines.base import Sampling
from vretrver_hf.reranker import save_config


SHARD = "14MB"
STAGE0_ROWS = 1024
"""Rows of a step of stage 0."""
CHOICES_MINUTES = 0.25
"""Time that is kept free for the look at direct answers."""
PRINT_SECONDS, CHECKPOINT_SECONDS = 5.0, 60.0
_LAYERS = re.compile(r"\.(?:layers|blocks|merger)\.")

_WORKERS = max(1, (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 2)

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@dataclasses.dataclass(frozen=True)
class Plan:
    """
    How a stage is trained.

    Args:
        stage (`str`):
            `"stage0"` or `"sft"`.
        minutes (`float`):
            Wall-clock time of its training.
        lr (`float`):
            Highest learning rate.
        warmup (`float`, *optional*, defaults to 0.03):
            Share of the time in which the rate rises.
        weight_decay (`float`, *optional*, defaults to 0.05):
            For matrices only.
        max_steps (`int`, *optional*):
            Ends the stage earlier.
    """

    stage: str
    minutes: float
    lr: float
    warmup: float = 0.03
    weight_decay: float = 0.05
    max_steps: int | None = None

    def rate(self, progress: float) -> float:
        """Learning rate when `progress` of the time has passed: a linear rise, then half a cosine down to nothing."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - self.warmup) / (1 - self.warmup))))


class Paused(Exception):
    """The time of this process is over, that of the stage is not."""


class Trainer:
    """
    Trains one stage against the clock.

    Args:
        model (`Qwen2_5_VLForConditionalGeneration`):
            The model, in fp32 on its device.
        table (`Tensor`):
            All stored pictures, on the same device.
        plan (`Plan`):
            How to train.
        checkpoint (`Path`, *optional*):
            File for what a resumed run needs.
        pause_at (`float`, *optional*):
            Value of `time.monotonic()` at which to write the checkpoint and raise [`Paused`]; the schedule stays as it
            is.
        team (`Team`, *optional*):
            Who trains along; nobody by default.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        table: Tensor,
        plan: Plan,
        checkpoint: Path | None = None,
        pause_at: float = math.inf,
        team: Team | None = None,
    ):
        self.model, self.table, self.plan, self.checkpoint = model, table, plan, checkpoint
        self.pause_at, self.device = pause_at, table.device
        self.team = team or Team(self.device.type)
        self.step, self.spent = 0, 0.0
        model.model.visual.requires_grad_(plan.stage == "stage0")
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizers = _make_optimizers(model, plan, self.device)

    def resume(self) -> bool:
        """Continues from the checkpoint, if there is one; the time that was spent counts."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.spent = state["step"], state["spent"]
        return True

    def train(self, batches: Iterator[list[Batch]]) -> list[float]:
        """
        Trains until the time is over.

        Args:
            batches (iterator of `list[Batch]`):
                Each step's rows, in parts.

        Returns:
            `list[float]`: the mean loss of each interval between two prints.
        """
        plan, begun = self.plan, time.monotonic() - self.spent
        (seconds,) = self.team.agree(60 * plan.minutes)
        meter, history = _Meter(self.device), []
        saved = self.spent
        self.model.train()
        while plan.max_steps is None or self.step < plan.max_steps:
            self.spent, pausing = self.team.agree(time.monotonic() - begun, time.monotonic() > self.pause_at)
            if self.spent >= seconds:
                break
            progress = self.spent / seconds
            rate = plan.rate(progress)
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] = rate
            self._step(next(batches), meter)
            self.step += 1
            if self.team.leads and meter.seconds > PRINT_SECONDS:
                history.append(meter.report(plan.stage, progress, self.step, rate))
            if self.spent - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = self.spent
            if pausing:
                self.save()
                raise Paused(f"paused in {plan.stage} after step {self.step}; go on with --resume")
        if self.team.leads and meter.steps:
            history.append(meter.report(plan.stage, 1.0, self.step, 0.0))
        self.save()
        return history

    def save(self) -> None:
        """Writes the checkpoint."""
        if self.checkpoint is None or not self.team.leads:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "spent": self.spent,
        }
        partial = self.checkpoint.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def _step(self, parts: list[Batch], meter: _Meter) -> None:
        total = float(sum(part.weights.sum() for part in parts))
        parts, groups = share_pictures(parts)
        parts, groups = [part.to(self.device) for part in parts], [group.to(self.device) for group in groups]
        augment = self.plan.stage == "stage0"
        with self._autocast():
            embeds = embed_parts(self.model, parts, groups, self.table, augment)
        # Cut off here, so that one part's activations at a time are in memory; what is left out goes back at the end.
        inputs = embeds.detach().requires_grad_()
        pieces = inputs.split([part.ids.numel() for part in parts])
        for batch, piece in zip(parts, pieces, strict=True):
            with self._autocast():
                losses, logits = losses_of(self.model, piece.view(*batch.ids.shape, -1), batch)
            loss = (losses * batch.weights).sum() / total
            loss.backward()
            meter.add(batch, logits.detach(), loss.detach())
        embeds.backward(inputs.grad)
        self.team.average_gradients(self.weights)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        meter.steps += 1

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")


class _Meter:
    """Running figures between two prints; kept on the device, so that no step waits for them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._reset()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def add(self, batch: Batch, logits: Tensor, loss: Tensor) -> None:
        right = logits.argmax(-1) == batch.ids.flatten()[batch.targets]
        kinds = (batch.weights > MATCH_WEIGHT, batch.weights == MATCH_WEIGHT, batch.weights == PLACE_WEIGHT)
        counts = (count for kind in kinds for count in (right & kind, kind))
        self._sums += torch.stack([loss, *(count.sum() for count in counts)]).double()
        self.rows += len(batch.ids)
        self.tokens += batch.ids.numel()

    def report(self, stage: str, progress: float, step: int, rate: float) -> float:
        loss, *counts = self._sums.tolist()
        loss /= self.steps
        choices, matches, places = (
            hits / max(1, count) for hits, count in zip(counts[::2], counts[1::2], strict=True)
        )
        seconds = self.seconds
        print(
            f"{stage:6s} {progress:6.1%}  step {step:5d}  loss {loss:.4f}  choices {choices:6.2%}  "
            f"matches {matches:6.2%}  places {places:6.2%}  "
            f"lr {rate:.2e}  {self.rows / seconds:7.0f} rows/s  {self.tokens / seconds / 1e6:.2f} M tokens/s",
            flush=True,
        )
        self._reset()
        return loss

    def _reset(self) -> None:
        self._sums = torch.zeros(7, dtype=torch.float64, device=self.device)
        self.steps = self.rows = self.tokens = 0
        self._begun = time.monotonic()


def save_model(model: Qwen2_5_VLForConditionalGeneration, processor_dir: Path, out: Path) -> None:
    """
    Writes what `Reranker.from_pretrained` loads: bf16 weights, tokenizer, processor, chat template and preset.

    Args:
        model (`Qwen2_5_VLForConditionalGeneration`):
            The model; it stays as it is.
        processor_dir (`Path`):
            Folder of the processor.
        out (`Path`):
            Folder to write.
    """
    state = {name: value.to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}
    copy = Qwen2_5_VLForConditionalGeneration._from_config(model.config, dtype=torch.bfloat16)
    copy.load_state_dict(state)
    copy.generation_config = model.generation_config
    copy.save_pretrained(out, max_shard_size=SHARD)
    AutoProcessor.from_pretrained(processor_dir).save_pretrained(out)
    save_config(out, PRESET, WINDOW, STRIDE, Sampling(max_turn_tokens=MAX_TURN_TOKENS))


def load_table(source: Source, device: torch.device) -> Tensor:
    """All artists' pictures one after another, uint8, (pictures, height, width, 3)."""
    artists = list(source.art.codes)
    return torch.cat([torch.from_numpy(np.array(source.art.pixels(artist))).to(device) for artist in artists])


class Run:
    """
    What the stages of one command share: the clock, the pictures, the workers and the model.

    Args:
        out (`Path`):
            Folder for the model and its checkpoints.
        source (`Source`):
            Makes the rows.
        minutes (`float`):
            Wall-clock time of everything, from now on.
        workers (`int`):
            Processes that make rows.
        evaluate (`int`):
            Cases of each look at direct answers; 0 skips it.
        resume (`bool`):
            Whether stages go on from their checkpoints.
        max_steps (`int`, *optional*):
            Ends each stage earlier.
        pause_after (`float`, *optional*):
            Minutes from now after which to pause.
        device_type (`str`):
            Where to train: `"cuda"` or `"cpu"`.
    """

    def __init__(
        self,
        out: Path,
        source: Source,
        minutes: float,
        workers: int,
        evaluate: int,
        resume: bool,
        max_steps: int | None,
        pause_after: float | None,
        device_type: str,
    ):
        self.out, self.source, self.evaluate, self.resume, self.max_steps = out, source, evaluate, resume, max_steps
        self.minutes = minutes
        self._end = time.monotonic() + 60 * minutes
        self._pause_at = math.inf if pause_after is None else time.monotonic() + 60 * pause_after
        self.out.mkdir(parents=True, exist_ok=True)
        self.feed = Feed(source, workers)  # its workers are forked, so before anything touches the device
        self.team = Team(device_type)
        device = self.team.device
        if device_type == "cuda":
            _reserve_memory(device)
            torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, slowly, for each shape of a batch
        self.table = load_table(source, device)
        tokenizer = AutoProcessor.from_pretrained(source.processor).tokenizer
        self.model = make_model(tiny_config(tokenizer), source.seed).to(device)
        if self.team.leads:
            count, pictures = num_parameters(self.model), len(self.table)
            where = f"{self.team.size} × {device_type}, {workers} workers each"
            print(f"{count:,} weights, {pictures:,} pictures, {where}", flush=True)

    def minutes_left(self, reserve: float = 0.0) -> float:
        """Minutes until the end, less a reserve for what comes after."""
        return max(0.0, (self._end - time.monotonic()) / 60 - (reserve if self.evaluate else 0.0))

    def load(self, folder: Path) -> None:
        """Takes the weights of a saved model."""
        loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model.load_state_dict(loaded.state_dict())

    def train(self, plan: Plan, batch_size: int, name: str, first: int = 0) -> None:
        """Trains a stage, from batch number `first` on, and saves the model under `name`."""
        checkpoint = self.out / f"checkpoint-{plan.stage}.pt"
        trainer = Trainer(self.model, self.table, plan, checkpoint, self._pause_at, self.team)
        if self.resume and trainer.resume() and self.team.leads:
            print(f"{plan.stage}: going on after step {trainer.step}, {trainer.spent / 60:.1f} minutes")
        try:
            start = first + trainer.step
            trainer.train(self.feed.batches(plan.stage, batch_size, start, self.team.rank, self.team.size))
        except Paused as pause:
            self.close()
            if self.team.leads:
                print(pause)
            raise typer.Exit from pause
        if self.team.leads:
            save_model(self.model, self.source.processor, self.out / name)

    def test_choices(self) -> None:
        """Prints how often direct answers are right on held-out cases."""
        if not self.team.leads:
            return
        self.model.eval()
        for task, split in SETS:
            if self.evaluate and (split != "test_artist" or TEST_ARTIST in self.source.art.codes):
                cases = self.source.evaluation(task, split, self.evaluate)
                share = choice_share(self.model, self.table, self.source, cases)
                low, high = wilson(round(share * len(cases)), len(cases))
                print(
                    f"direct answers, {task} {split}: {share:.1%} [{low:.1%}, {high:.1%}], n {len(cases)}", flush=True
                )

    def close(self) -> None:
        """Ends the workers, and the group of processes once all are here."""
        self.feed.close()
        self.team.wait()
        self.team.close()


@app.callback()
def prepare(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the model and its checkpoints.")],
    data: Annotated[Path, typer.Option(help="Folder that build_data.py filled.")] = Path("recipes/emoji/data"),
    processor: Annotated[Path | None, typer.Option(help="Folder that tokenizer.py filled; DATA/processor.")] = None,
    minutes: Annotated[float, typer.Option(help="Wall-clock minutes of the command, evaluation included.")] = 9.0,
    workers: Annotated[int, typer.Option(help="Processes that make rows.")] = _WORKERS,
    evaluate: Annotated[int, typer.Option(help="Held-out cases a set for a look between the stages; 0 skips it.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the first weights and of all draws.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoints in OUT.")] = False,
    max_steps: Annotated[int | None, typer.Option(help="End each stage after so many steps at the latest.")] = None,
    pause_after: Annotated[
        float | None, typer.Option(help="Minutes after which to pause, for --resume later.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to train; cuda where there is one, else cpu.")] = "",
) -> None:
    source = Source(data, processor or data / "processor", seed)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    context.obj = lambda: Run(out, source, minutes, workers, evaluate, resume, max_steps, pause_after, where)


Rate = Annotated[float, typer.Option(help="Highest learning rate.")]
Size = Annotated[int, typer.Option(help="Rows of a step.")]


@app.command()
def stage0(
    context: typer.Context,
    base: Annotated[
        Path | None, typer.Option(help="Model to go on from instead of from scratch; give another --seed then.")
    ] = None,
    batch_size: Size = STAGE0_ROWS,
    lr: Rate = 1e-3,
) -> None:
    """Trains everything on captions and choices, from scratch by default; writes OUT/stage0."""
    with fused_norms():
        run = context.obj()
        first = 0
        if base is not None:
            run.load(base)
            first = math.ceil(FIRST_ROWS / batch_size)  # it has learned what the easy batches teach
        minutes = run.minutes_left(CHOICES_MINUTES)
        run.train(Plan("stage0", minutes, lr, max_steps=run.max_steps), batch_size, "stage0", first)
        run.test_choices()
        run.close()


@app.command()
def sft(
    context: typer.Context,
    base: Annotated[Path, typer.Option(help="Model to start from, as stage0 wrote it.")],
    batch_size: Size = 256,
    lr: Rate = 3e-4,
) -> None:
    """Teaches the protocol on whole trajectories, vision tower frozen; writes OUT/model."""
    with fused_norms():
        run = context.obj()
        run.load(base)
        run.train(Plan("sft", run.minutes_left(), lr, max_steps=run.max_steps), batch_size, "model")
        run.close()


@app.command(name="all")
def both(
    context: typer.Context,
    share: Annotated[float, typer.Option(help="Share of the training time that stage 0 gets.")] = 0.965,
    stage0_batch_size: Size = STAGE0_ROWS,
    stage0_lr: Rate = 1e-3,
    sft_batch_size: Size = 256,
    sft_lr: Rate = 3e-4,
) -> None:
    """Both stages in one go; writes OUT/stage0 and OUT/model."""
    with fused_norms():
        run = context.obj()
        minutes = share * run.minutes_left(CHOICES_MINUTES)
        run.train(Plan("stage0", minutes, stage0_lr, max_steps=run.max_steps), stage0_batch_size, "stage0")
        run.test_choices()
        minutes = min(run.minutes_left(), (1 - share) * run.minutes)
        run.train(Plan("sft", minutes, sft_lr, max_steps=run.max_steps), sft_batch_size, "model")
        run.close()


def _reserve_memory(device: torch.device, share: float = 0.8) -> None:
    """Takes memory in one piece for PyTorch's cache: batches differ in shape, and asking for each is slow."""
    free, _ = torch.cuda.mem_get_info(device)
    torch.empty(int(share * free), dtype=torch.uint8, device=device)


def _make_optimizers(model: torch.nn.Module, plan: Plan, device: torch.device) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices while everything is learned: it needs half of AdamW's rows. AdamW for the rest."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    matrices = {
        name: weight for name, weight in named if plan.stage == "stage0" and weight.ndim == 2 and _LAYERS.search(name)
    }
    rest = [weight for name, weight in named if name not in matrices]
    groups = [
        {"params": [weight for weight in rest if weight.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [weight for weight in rest if weight.ndim == 1], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.95), fused=device.type == "cuda")]
    return [*optimizers, Muon(matrices.values(), plan.lr, plan.weight_decay)] if matrices else optimizers


if __name__ == "__main__":
    app()
