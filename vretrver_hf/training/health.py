"""Says in plain words when a reinforcement-learning run goes wrong in one of the known ways."""

from __future__ import annotations

import collections
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = logging.getLogger(__name__)

_TERM = re.compile(r"(?:evidence|rewards)/(.+)/std")
_TOTAL = "rewards/evidence/std"  # of the sum of the terms, about which `frac_reward_zero_std` says more
_TOOL = "evidence/tool/std"
_PINNED = 0.95
_SAME = 1e-6  # TRL's standard deviations are float32


class HealthCallback(TrainerCallback):
    """
    Watches what a GRPO run logs and warns, once, when something has been wrong for `n` steps; again only after it has
    been right for `n` steps.

    | what | read from |
    |---|---|
    | a reward term has no variance | `evidence/*/std` of [`EvidenceReward`], `rewards/*/std` of TRL |
    | all rollouts of each group earn the same | `frac_reward_zero_std` of TRL |
    | nobody calls a tool | `evidence/call_rate`, or `tools/call_frequency` of TRL |
    | the mean number of calls is 95 % of the budget or more | `evidence/calls`, or `tools/call_frequency` of TRL |
    | control tokens or tags repeat | `evidence/repeated_tokens` |
    | malformed outputs become more | `evidence/malformed` |
    | cut-off completions become more | `completions/clipped_ratio` of TRL |

    A metric that is not logged is not watched. A share becomes more when its mean over `n` steps has risen by `rise`
    over the lowest such mean so far.

    Args:
        n (`int`, *optional*, defaults to 20):
            Steps over which something must last.
        max_calls (`int`, *optional*):
            The preset's budget of calls; without it nothing can be said about it.
        rise (`float`, *optional*, defaults to 0.2):
            By how much the share of malformed or cut-off outputs may rise.
        repeats (`float`, *optional*, defaults to 0.05):
            Share of outputs with repeated control tokens from which on they are reported.
        tools (`bool`, *optional*, defaults to `True`):
            Whether rollouts have tools; where none has, nothing is said about calls and what they are paid.

    Example:

    ```python
    trainer = GRPOTrainer(model, EvidenceReward("need"), callbacks=[HealthCallback(max_calls=2)], ...)
    ```
    """

    def __init__(
        self,
        n: int = 20,
        max_calls: int | None = None,
        rise: float = 0.2,
        repeats: float = 0.05,
        tools: bool = True,
    ):
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if max_calls is not None and max_calls < 1:
            raise ValueError(f"max_calls must be at least 1 or None, got {max_calls}")
        if not 0 < rise <= 1 or not 0 < repeats <= 1:
            raise ValueError(f"rise and repeats must lie in (0, 1], got {rise} and {repeats}")
        self.n = n
        self.max_calls = max_calls
        self.rise = rise
        self.repeats = repeats
        self.tools = tools
        self._alarms: dict[str, _Alarm] = {}
        self._shares: dict[str, _Share] = collections.defaultdict(lambda: _Share(n))
        self._last_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Evaluations and the summary at the end are logged too, without a loss.
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        steps, self._last_step = state.global_step - self._last_step, state.global_step
        values = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        for name, wrong, message in self._lasting(values):
            self._report(name, wrong, steps, message, after=self.n)
        for name, what, advice in _SHARES:
            if name in values and (mean := self._shares[name].update(values[name], steps)) is not None:
                lowest = self._shares[name].lowest
                message = f"{mean:.0%} of the outputs {what}, up from {lowest:.0%}: {advice}"
                self._report(name, mean >= lowest + self.rise, steps, message, after=1)  # the mean is of n steps

    def _lasting(self, values: Mapping[str, float]) -> Iterator[tuple[str, bool, str]]:
        """What is wrong once it lasts: its name, whether it is so now, and how to say it."""
        for name, std in values.items():
            term = _TERM.fullmatch(name)
            if term is not None and name != _TOTAL and (self.tools or name != _TOOL):
                yield name, std < _SAME, _constant(term[1], values.get(name.removesuffix("std") + "mean"))
        if "frac_reward_zero_std" in values:
            yield "groups", values["frac_reward_zero_std"] > 1 - _SAME, _EQUAL_GROUPS
        if self.tools:
            yield from self._calls(values)
        if "evidence/repeated_tokens" in values:
            share = values["evidence/repeated_tokens"]
            yield "repeats", share >= self.repeats, _REPEATS.format(f"{share:.0%}")

    def _calls(self, values: Mapping[str, float]) -> Iterator[tuple[str, bool, str]]:
        frequency = values.get("tools/call_frequency")
        rate = values.get("evidence/call_rate", frequency)
        if rate is not None:
            yield "no calls", rate == 0, _NO_CALLS
        calls = values.get("evidence/calls", frequency)
        if calls is not None and self.max_calls is not None:
            yield "all calls", calls >= _PINNED * self.max_calls, _ALL_CALLS.format(self.max_calls)

    def _report(self, name: str, wrong: bool, steps: int, message: str, after: int) -> None:
        alarm = self._alarms.setdefault(name, _Alarm(after, self.n))
        if alarm.update(wrong, steps):
            logger.warning("Over the last %d steps, %s.", max(alarm.wrong_for, self.n), message)


def _constant(term: str, mean: float | None) -> str:
    now = "" if mean is None else f" (now {mean:.3g})"
    return (
        f"the reward term '{term}' has had no variance: it was the same for every rollout{now}, so nothing was "
        "learned from it. This is fine where no rollout could do better; otherwise read some completions, and let "
        "them differ more (temperature, num_generations, other queries)"
    )


_EQUAL_GROUPS = (
    "all rollouts of each group have earned the same, so the model was taught nothing: the queries are too easy or "
    "too hard for it, or its rollouts too much alike"
)
_NO_CALLS = (
    "no rollout has made a valid tool call: the model does not look any more, and what is never tried cannot be "
    "learned. Check that the prompt shows the tools and that the reward pays for using them; a model that never "
    "called one needs examples of it first"
)
_ALL_CALLS = (
    "rollouts have spent nearly their whole budget of tool calls ({}), whatever the query: the model calls out of "
    "habit. Let calls cost more, or pay only for needed ones (reward preset 'need')"
)
_REPEATS = (
    "outputs have repeated a control token or a tag back to back (now {} of them): the model is coming apart. Lower "
    "the learning rate or go back to an earlier checkpoint; where it was so from the start, the chat template or the "
    "end-of-turn token is wrong"
)
_SHARES = (
    (
        "evidence/malformed",
        "were malformed",
        "their ranking earns nothing. Read some; lower the learning rate if the form falls apart, or raise "
        "max_completion_length if they are cut off",
    ),
    (
        "completions/clipped_ratio",
        "were cut off",
        "they grow into the limit and end without an answer. Raise max_completion_length, or see what fills it",
    ),
)


class _Alarm:
    """Rings once when something has been wrong for `after` steps; is set again when it has been right for `n`."""

    def __init__(self, after: int, n: int):
        self.wrong_for = 0
        self._right_for = 0
        self._after = after
        self._n = n
        self._rung = False

    def update(self, wrong: bool, steps: int) -> bool:
        self.wrong_for = self.wrong_for + steps if wrong else 0
        self._right_for = 0 if wrong else self._right_for + steps
        if self._right_for >= self._n:
            self._rung = False
        rings = wrong and self.wrong_for >= self._after and not self._rung
        self._rung = self._rung or rings
        return rings


class _Share:
    """A share's mean over the last `n` steps, and the lowest it has been."""

    def __init__(self, n: int):
        self.lowest = 1.0
        self._n = n
        self._covered = 0
        self._logged: collections.deque[tuple[float, int]] = collections.deque()

    def update(self, value: float, steps: int) -> float | None:
        """The mean, or `None` before `n` steps are known."""
        self._logged.append((value, steps))
        self._covered += steps
        while self._covered - self._logged[0][1] >= self._n:
            self._covered -= self._logged.popleft()[1]
        if self._covered < self._n:
            return None
        mean = sum(value * steps for value, steps in self._logged) / self._covered
        self.lowest = min(self.lowest, mean)
        return mean
