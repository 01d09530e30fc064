"""What a rollout is paid: for its form, for where it ranks the right candidate, and for looking.

Three presets share one form. With `k` the 1-based rank of the best-ranked positive and `N` the number of valid tool
calls, the paper's reward (Evidence-Aligned Policy Optimization) is

    R        = α·r_format + β·r_rank + r_tool                                  α = 0.2, β = 0.8
    r_format = ½·[well-formed <think> and <answer>] + ½·[the answer is a list of integers]
    r_rank   = exp(−(k − 1)² / 2σ²), and 0 where k > K_r or the answer is invalid    σ = 1, K_r = 5
    r_tool   = η·[k = 1]·[N > 0] − ρ·max(0, N − τ)                             η = 0.2, ρ = 0.1, τ = 1

`"release"`, the reward of the released code, has α = 0.3, β = 0.7, no K_r, no η, ρ = 0.05, pays a rollout that made a
valid call `0.6·max(0, 0.6 − share of its group's rollouts that made one)`, and clips R to [−0.5, 1.5].

`"need"` is ours. The paper's η pays one call on every query, needed or not. Here a call earns η only where the
rollouts of the group that made no valid call rank worse, by their mean r_rank, than those that made one; and a share
of each group is played without tools, so that there is something to compare with.

How text is read is ours in all three, so that only a ranking is paid as one. The first half of r_format asks for the
whole output to be well-formed: turns of one thought and one call, then a turn of one thought and one answer, and
nothing around them. The second half asks for a JSON list of integers in the last turn's answer. k exists only where
the output is well-formed and the list a true permutation of the candidates; otherwise r_rank is 0 and η is not paid,
while extra calls still cost. A malformed output thus never earns more than the worst well-formed one with as many
calls (and, under `"release"`, in the same group: its payment for calls asks for no form).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .parsing import ParsedTurn, parse_ranking, parse_turn


if TYPE_CHECKING:
    from .trajectory import Trajectory

_END_OF_TURN = "<|im_end|>"
_THOUGHT_OR_END_OF_CALL = re.compile(r"<think>.*?(?:</think>|\Z)|</tool_call>", re.DOTALL)
_INTEGER = r"[ \t\r\n]*-?(?:0|[1-9]\d{0,17})[ \t\r\n]*"
_INTEGER_LIST = re.compile(rf"[ \t\r\n]*\[{_INTEGER}(?:,{_INTEGER})*\][ \t\r\n]*")
_REPEATED = re.compile(r"(<\|[^|<>\s]{1,64}\|>|</?(?:think|tool_call|answer)>)\s*\1")

# Means of equal numbers may differ in their last bits, by how many they are.
_AS_WELL = 1e-9

_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """
    The numbers of a reward; the letters are those of the module's formulas.

    Args:
        format_weight (`float`, *optional*, defaults to 0.2):
            α, weight of the format term.
        rank_weight (`float`, *optional*, defaults to 0.8):
            β, weight of the rank term.
        sigma (`float`, *optional*, defaults to 1.0):
            σ, how quickly the rank term falls with the rank.
        cutoff (`int`, *optional*, defaults to 5):
            K_r, last rank that is paid; `None` pays all.
        tool_bonus (`float`, *optional*, defaults to 0.2):
            η, for a right ranking that looked.
        bonus_only_if_needed (`bool`, *optional*, defaults to `False`):
            Pays η only where the group's rollouts without calls rank worse than those with calls.
        call_cost (`float`, *optional*, defaults to 0.1):
            ρ, price of each valid call beyond the free ones.
        free_calls (`int`, *optional*, defaults to 1):
            τ, calls that cost nothing.
        curiosity_weight (`float`, *optional*, defaults to 0.0):
            Weight of the released code's payment for a valid call in a group that calls too seldom.
        target_call_share (`float`, *optional*, defaults to 0.6):
            Share of a group's rollouts with a valid call from which on that payment is 0.
        bounds (`tuple[float, float]`, *optional*):
            Limits of the total.
        no_tool_share (`float`, *optional*, defaults to 0.0):
            Share of each group that the trainer should play without tools; see [`EvidenceReward.num_without_tools`].
    """

    format_weight: float = 0.2
    rank_weight: float = 0.8
    sigma: float = 1.0
    cutoff: int | None = 5
    tool_bonus: float = 0.2
    bonus_only_if_needed: bool = False
    call_cost: float = 0.1
    free_calls: int = 1
    curiosity_weight: float = 0.0
    target_call_share: float = 0.6
    bounds: tuple[float, float] | None = None
    no_tool_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("format_weight", "rank_weight", "tool_bonus", "call_cost", "free_calls", "curiosity_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"sigma must be finite and positive, got {self.sigma}")
        if self.cutoff is not None and self.cutoff < 1:
            raise ValueError(f"cutoff must be at least 1 or None, got {self.cutoff}")
        if not 0 <= self.target_call_share <= 1:
            raise ValueError(f"target_call_share must lie in [0, 1], got {self.target_call_share}")
        if not 0 <= self.no_tool_share < 1:
            raise ValueError(f"no_tool_share must lie in [0, 1), got {self.no_tool_share}")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds must be a lower and a higher number, got {self.bounds}")


REWARD_PRESETS: dict[str, RewardSettings] = {
    "paper": RewardSettings(),
    "release": RewardSettings(
        format_weight=0.3,
        rank_weight=0.7,
        cutoff=None,
        tool_bonus=0.0,
        call_cost=0.05,
        curiosity_weight=0.6,
        bounds=(-0.5, 1.5),
    ),
    "need": RewardSettings(bonus_only_if_needed=True, no_tool_share=0.25),
}


@dataclasses.dataclass(frozen=True)
class RolloutFacts:
    """
    What a reward needs to know of one rollout.

    Args:
        completion (`str`, *optional*):
            The model's own text of the whole trajectory: its turns, joined by newlines, observations left out. `None`
            from an environment, which sees calls only: then it is put together from what the trainer parsed.
        positives (`list[int]`):
            Numbers of the relevant candidates as the prompt counts them, from 1; at least one.
        num_candidates (`int`):
            Number of candidates.
        valid_tool_calls (`int`):
            Tool calls that were carried out.
        tools (`bool`, *optional*, defaults to `True`):
            Whether the model was given tools.
    """

    completion: str | None
    positives: list[int]
    num_candidates: int
    valid_tool_calls: int
    tools: bool = True


@dataclasses.dataclass(frozen=True)
class RewardTerms:
    """
    The reward of one rollout and what it is made of.

    Args:
        total (`float`):
            The weighted sum, clipped where the preset clips.
        format (`float`):
            The format term, in [0, 1], before its weight.
        rank (`float`):
            The rank term, in [0, 1], before its weight.
        tool (`float`):
            The tool term, as it is added.
    """

    total: float
    format: float
    rank: float
    tool: float


class EvidenceReward:
    """
    Scores rollouts, alone, by the group, or as a reward function of TRL's `GRPOTrainer`.

    As a reward function it takes each rollout's [`RolloutFacts`] from the column `rollout_facts`; else from the
    `facts` of the trainer's `environments`, such as [`~vretrver_hf.environment.RerankEnvironment`]; else from the
    columns `positives` and `num_candidates`, of rollouts without tools. Presets that compare rollouts also need to
    know which belong together: by a column `query_id`, or by `qid` in the released column `extra_info`. What is
    compared is gathered over all ranks first, so a group may straddle them.

    It logs, by `log_metric`, over the whole batch:

    | metric | meaning |
    |---|---|
    | `evidence/{format,rank,tool}/{mean,std}` | the terms |
    | `evidence/top1` | share of rollouts that rank a positive first |
    | `evidence/malformed` | share whose ranking cannot be paid: output not well-formed, or no permutation |
    | `evidence/repeated_tokens` | share that writes a control token or a tag twice in a row |
    | `evidence/call_rate` | of the rollouts that had tools: share with a valid call |
    | `evidence/calls` | of the rollouts that had tools: mean number of valid calls |
    | `evidence/calls_needed` | (`"need"`) share of groups whose rollouts without calls rank worse |

    and, by `log_extra`, each rollout's terms and number of calls for the table of completions.

    Args:
        preset (`str`, *optional*, defaults to `"paper"`):
            `"paper"`, `"release"` or `"need"`.
        **overrides:
            Single settings of [`RewardSettings`] to replace.

    Example:

    ```python
    >>> from vretrver_hf.rewards import EvidenceReward

    >>> reward = EvidenceReward("paper")
    >>> reward.score("<think>2 is red.</think><answer>[2, 1, 3]</answer>", [2], 3, valid_tool_calls=1)
    RewardTerms(total=1.2, format=1.0, rank=1.0, tool=0.2)
    >>> reward.score("<think>2 is red.</think><answer>[2]</answer>", [2], 3, valid_tool_calls=1)
    RewardTerms(total=0.2, format=1.0, rank=0.0, tool=0.0)

    ```
    """

    __name__ = "evidence"  # TRL logs the total as `rewards/evidence/mean`

    def __init__(self, preset: str = "paper", **overrides: Any):
        if preset not in REWARD_PRESETS:
            raise ValueError(f"unknown reward preset {preset!r}: choose from {sorted(REWARD_PRESETS)}")
        known = [field.name for field in dataclasses.fields(RewardSettings)]
        if unknown := sorted(set(overrides) - set(known)):
            raise ValueError(f"unknown reward settings {unknown}; choose from {known}")
        self.preset = preset
        self.settings = dataclasses.replace(REWARD_PRESETS[preset], **overrides)

    @property
    def compares_rollouts(self) -> bool:
        """Whether a rollout's reward depends on the others of its group."""
        return self.settings.curiosity_weight > 0 or self.settings.bonus_only_if_needed

    def num_without_tools(self, num_generations: int) -> int:
        """
        How many rollouts of a group should be played without tools.

        At least one and never all where the preset's `no_tool_share` is positive and the group has two or more.
        """
        if self.settings.no_tool_share == 0 or num_generations < 2:
            return 0
        return min(max(1, round(self.settings.no_tool_share * num_generations)), num_generations - 1)

    def score(
        self,
        completion: str,
        positives: Sequence[int],
        num_candidates: int,
        valid_tool_calls: int,
        group_call_share: float | None = None,
        calls_needed: bool = False,
    ) -> RewardTerms:
        """
        The reward of one rollout.

        Args:
            completion (`str`):
                The model's own text of the whole trajectory, observations left out.
            positives (sequence of `int`):
                Numbers of the relevant candidates, from 1. Of several the best-ranked counts.
            num_candidates (`int`):
                Number of candidates.
            valid_tool_calls (`int`):
                Tool calls that were carried out.
            group_call_share (`float`, *optional*):
                Share of the group's rollouts with a valid call, this one included. Preset `"release"` needs it.
            calls_needed (`bool`, *optional*, defaults to `False`):
                Whether the group's rollouts without calls rank worse than those with. Preset `"need"` pays η only
                then.

        Raises:
            `ValueError`: on labels that fit no candidate, and where a group fact is missing.
        """
        facts = RolloutFacts(completion, list(positives), num_candidates, valid_tool_calls)
        return self._terms(_judge(facts), group_call_share, calls_needed)

    def score_trajectory(
        self,
        trajectory: Trajectory,
        positive_indices: Sequence[int],
        group_call_share: float | None = None,
        calls_needed: bool = False,
    ) -> RewardTerms:
        """
        The reward of a recorded trajectory.

        Args:
            trajectory (`Trajectory`):
                The record.
            positive_indices (sequence of `int`):
                0-based places of the relevant candidates in the trajectory's window.
            group_call_share (`float`, *optional*), calls_needed (`bool`, *optional*, defaults to `False`):
                See [`EvidenceReward.score`].
        """
        numbers = [index + 1 for index in positive_indices]
        facts = RolloutFacts(trajectory.completion, numbers, trajectory.num_candidates, trajectory.num_valid_calls)
        return self._terms(_judge(facts), group_call_share, calls_needed)

    def score_group(self, rollouts: Sequence[RolloutFacts]) -> list[RewardTerms]:
        """
        The rewards of all rollouts of one query, which are compared with one another where the preset compares.

        Example:

        ```python
        >>> from vretrver_hf.rewards import EvidenceReward, RolloutFacts

        >>> right, wrong = "<think>t</think><answer>[1, 2]</answer>", "<think>t</think><answer>[2, 1]</answer>"
        >>> looked, guessed = RolloutFacts(right, [1], 2, 1), RolloutFacts(wrong, [1], 2, 0, tools=False)
        >>> [terms.tool for terms in EvidenceReward("need").score_group([looked, guessed])]
        [0.2, 0.0]
        >>> [terms.tool for terms in EvidenceReward("need").score_group([looked, looked])]  # nothing to compare with
        [0.0, 0.0]

        ```
        """
        return self._group_terms([_judge(facts) for facts in rollouts])

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """
        The totals of this rank's rollouts: the signature of a TRL reward function.

        Args:
            prompts (sequence):
                What TRL passes; not read.
            completions (sequence):
                Texts or lists of messages, read only where the columns bring no facts.
            log_metric (`Callable`, *optional*), log_extra (`Callable`, *optional*):
                Where to log.
            **columns:
                The data set's columns, repeated for each rollout, and what else TRL passes.
        """
        rollouts = _rollouts(completions, columns)
        seen = [_judge(facts, key) for facts, key in zip(rollouts, _query_keys(columns, len(rollouts)), strict=True)]
        everyones, start = _gather(seen)
        groups = list(self._groups(everyones))
        terms = [term for group in groups for term in self._group_terms(group)]
        mine = terms[start : start + len(seen)]
        if log_metric is not None:
            for name, value in self._metrics(everyones, terms, groups).items():
                log_metric(name, value)
        if log_extra is not None:
            for name in ("format", "rank", "tool"):
                log_extra(name, [getattr(term, name) for term in mine])
            log_extra("calls", [one.calls for one in seen])
        return [term.total for term in mine]

    def _terms(self, seen: _Judged, call_share: float | None, calls_needed: bool) -> RewardTerms:
        settings = self.settings
        rank = self._rank_term(seen)
        tool = self._curiosity(seen, call_share)
        if seen.best == 1 and seen.calls and (calls_needed or not settings.bonus_only_if_needed):
            tool += settings.tool_bonus
        tool -= settings.call_cost * max(0, seen.calls - settings.free_calls)
        total = settings.format_weight * seen.format + settings.rank_weight * rank + tool
        if settings.bounds is not None:
            total = min(max(total, settings.bounds[0]), settings.bounds[1])
        return RewardTerms(total, seen.format, rank, tool)

    def _rank_term(self, seen: _Judged) -> float:
        if seen.best is None or (self.settings.cutoff is not None and seen.best > self.settings.cutoff):
            return 0.0
        return math.exp(-((seen.best - 1) ** 2) / (2 * self.settings.sigma**2))

    def _curiosity(self, seen: _Judged, call_share: float | None) -> float:
        if self.settings.curiosity_weight == 0:
            return 0.0
        if call_share is None or not 0 <= call_share <= 1:
            raise ValueError(
                f"preset {self.preset!r} needs group_call_share, the share of the group's rollouts with a valid call, "
                f"in [0, 1]; got {call_share}"
            )
        missing = max(0.0, self.settings.target_call_share - call_share)
        return self.settings.curiosity_weight * missing if seen.calls else 0.0

    def _group_terms(self, group: Sequence[_Judged]) -> list[RewardTerms]:
        call_share = statistics.fmean(one.calls > 0 for one in group) if group else 0.0
        calls_needed = self._calls_needed(group)
        return [self._terms(one, call_share, calls_needed) for one in group]

    def _calls_needed(self, group: Sequence[_Judged]) -> bool:
        """Only rankings are compared: a malformed output says nothing about what looking is worth."""
        ranked = [one for one in group if one.best is not None]
        looked = [self._rank_term(one) for one in ranked if one.calls]
        guessed = [self._rank_term(one) for one in ranked if not one.calls]
        return bool(looked and guessed) and statistics.fmean(looked) - statistics.fmean(guessed) > _AS_WELL

    def _groups(self, seen: Sequence[_Judged]) -> Iterator[Sequence[_Judged]]:
        """Groups stand together and are equally large; neighbours may ask the same query twice."""
        if not self.compares_rollouts:
            yield seen
            return
        if any(one.key is None for one in seen):
            raise ValueError(
                f"preset {self.preset!r} compares the rollouts of a query: the data set needs a column 'query_id', or "
                "'extra_info' with a 'qid', so that a group can be told from the next"
            )
        size = math.gcd(*_run_lengths([one.key for one in seen]))
        for start in range(0, len(seen), size or 1):
            yield seen[start : start + size]

    def _metrics(
        self, seen: Sequence[_Judged], terms: Sequence[RewardTerms], groups: Sequence[Sequence[_Judged]]
    ) -> dict[str, float]:
        metrics = {}
        for name in ("format", "rank", "tool"):
            values = [getattr(term, name) for term in terms]
            metrics[f"evidence/{name}/mean"] = statistics.fmean(values)
            metrics[f"evidence/{name}/std"] = statistics.pstdev(values)
        metrics["evidence/top1"] = statistics.fmean(one.best == 1 for one in seen)
        metrics["evidence/malformed"] = statistics.fmean(one.best is None for one in seen)
        metrics["evidence/repeated_tokens"] = statistics.fmean(one.repeats for one in seen)
        if able := [one for one in seen if one.tools]:
            metrics["evidence/call_rate"] = statistics.fmean(one.calls > 0 for one in able)
            metrics["evidence/calls"] = statistics.fmean(one.calls for one in able)
        if self.settings.bonus_only_if_needed:
            metrics["evidence/calls_needed"] = statistics.fmean(map(self._calls_needed, groups))
        return metrics


@dataclasses.dataclass(frozen=True)
class _Judged:
    """A rollout as it was read; small, since it travels to every rank. `best` is k, `None` where there is none."""

    key: Any
    format: float
    best: int | None
    calls: int
    tools: bool
    repeats: bool


def _judge(facts: RolloutFacts, key: Any = None) -> _Judged:
    n = facts.num_candidates
    if not facts.positives or not all(1 <= number <= n for number in facts.positives):
        raise ValueError(f"positives must be candidate numbers from 1 to {n}, at least one; got {facts.positives}")
    if facts.valid_tool_calls < 0:
        raise ValueError(f"valid_tool_calls must not be negative, got {facts.valid_tool_calls}")
    turns = [parse_turn(text) for text in _split_turns(facts.completion)]
    well_formed = _well_formed(turns)
    listed = _INTEGER_LIST.fullmatch(turns[-1].answer or "") is not None
    ranking = parse_ranking(facts.completion, n)
    best = None
    if well_formed and ranking.status == "ok":
        best = 1 + min(ranking.order.index(number - 1) for number in facts.positives)
    repeats = _REPEATED.search(facts.completion) is not None
    return _Judged(key, 0.5 * well_formed + 0.5 * listed, best, facts.valid_tool_calls, facts.tools, repeats)


def _split_turns(completion: str) -> list[str]:
    """
    The turns of a trajectory's text: one ends at its end mark, where that was kept, or at a call's end tag.

    Neither of them bounds an empty turn between two calls, so that one passes unseen.
    """
    turns = []
    for text in completion.rstrip().removesuffix(_END_OF_TURN).split(_END_OF_TURN):
        start = 0
        for match in _THOUGHT_OR_END_OF_CALL.finditer(text):
            if match[0] == "</tool_call>":
                turns.append(text[start : match.end()])
                start = match.end()
        if start == 0 or text[start:].strip():
            turns.append(text[start:])
    return turns


def _well_formed(turns: Sequence[ParsedTurn]) -> bool:
    kinds = [turn.kind for turn in turns]
    if kinds != ["call"] * (len(turns) - 1) + ["answer"] or not all(turn.well_formed for turn in turns):
        return False
    # A thought that was left open ends, in the joined text, with the thought of the next turn.
    return not any("<think>" in (turn.thought or "") for turn in turns)


def _rollouts(completions: Sequence[Any], columns: Mapping[str, Any]) -> list[RolloutFacts]:
    if columns.get("rollout_facts") is not None:
        return list(columns["rollout_facts"])
    environments = columns.get("environments") or []
    if environments and all(hasattr(environment, "facts") for environment in environments):
        return [_facts_of(*pair) for pair in zip(environments, completions, strict=True)]
    if "positives" in columns and "num_candidates" in columns:
        rows = zip(completions, columns["positives"], columns["num_candidates"], strict=True)
        return [_facts_without_tools(*row) for row in rows]
    raise ValueError(
        "no facts about the rollouts: give the column 'rollout_facts', environments with 'facts', or the columns "
        f"'positives' and 'num_candidates'; there are {sorted(columns)}"
    )


def _facts_of(environment: Any, completion: str | Sequence[Mapping[str, Any]]) -> RolloutFacts:
    facts = environment.facts
    return facts if facts.completion is not None else dataclasses.replace(facts, completion=_own_text(completion))


def _facts_without_tools(
    completion: str | Sequence[Mapping[str, Any]], positives: Sequence[int], num_candidates: int
) -> RolloutFacts:
    if not isinstance(completion, str) and any(message.get("tool_calls") for message in completion):
        raise ValueError(
            "the completions hold tool calls, and only an environment knows which of them were carried out: give the "
            "column 'rollout_facts' or environments with 'facts'"
        )
    return RolloutFacts(_own_text(completion), list(positives), num_candidates, 0, tools=False)


def _own_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """What the model wrote, put together again from the messages that TRL parsed it into."""
    if isinstance(completion, str):
        return completion
    return "\n".join(_written(message) for message in completion if message["role"] == "assistant")


def _written(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(block.get("text") or "" for block in content)
    # Whether a call is one is for the parser to say, so it goes back as it came, and behind all other text.
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return text + "".join(f"\n<tool_call>\n{call}\n</tool_call>" for call in calls)


def _query_keys(columns: Mapping[str, Any], count: int) -> list[Any]:
    if "query_id" in columns:
        return list(columns["query_id"])
    return [(info or {}).get("qid") for info in columns.get("extra_info", [None] * count)]


def _gather(mine: list[_Value]) -> tuple[list[_Value], int]:
    """Everybody's values in the order of the ranks, and where this rank's begin."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    ranks = gather_object([mine])
    place = PartialState().process_index
    return [value for values in ranks for value in values], sum(len(values) for values in ranks[:place])


def _run_lengths(keys: Sequence[Any]) -> list[int]:
    starts = [index for index in range(len(keys)) if index == 0 or keys[index] != keys[index - 1]]
    return [end - start for start, end in zip(starts, [*starts[1:], len(keys)], strict=True)]
