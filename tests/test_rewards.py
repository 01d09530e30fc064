from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import socket

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vretrver_hf.chat_templates import RESPONSE_TEMPLATE
from vretrver_hf.protocol import format_answer, format_call, format_turn
from vretrver_hf.rewards import REWARD_PRESETS, EvidenceReward, RewardTerms, RolloutFacts
from vretrver_hf.trajectory import Trajectory, Turn


PRESETS = sorted(REWARD_PRESETS)
N = 7
CALL = format_turn("2 or 3?", format_call("select_images", {"target_images": [2, 3]}))

# exp(-(k-1)²/2) by hand
RANK_TERM = {1: 1.0, 2: 0.6065306597126334, 3: 0.1353352832366127, 4: 0.011108996538242306, 5: 0.00033546262790251185}
RANK_TERM |= {6: 3.726653172078671e-06, 7: 1.522997974471263e-08}


def answer(k: int, positive: int = 2, n: int = N) -> str:
    """A turn that ranks `positive` k-th."""
    others = [index for index in range(n) if index != positive - 1]
    order = [*others[: k - 1], positive - 1, *others[k - 1 :]]
    return format_turn("compared", format_answer(order))


def rollout(k: int, calls: int = 0, tools: bool = True) -> RolloutFacts:
    return RolloutFacts("\n".join([CALL] * calls + [answer(k)]), [2], N, calls, tools)


def approx(total, form, rank, tool) -> RewardTerms:
    return RewardTerms(*(pytest.approx(value, abs=1e-12) for value in (total, form, rank, tool)))


class TestPaper:
    @pytest.mark.parametrize(
        ("k", "calls", "total", "tool"),
        [
            (1, 0, 1.0, 0.0),
            (1, 1, 1.2, 0.2),  # the most there is
            (1, 2, 1.1, 0.1),  # 0.2 for looking, 0.1 for the second call
            (1, 4, 0.9, -0.1),
            (2, 0, 0.2 + 0.8 * 0.6065306597126334, 0.0),
            (2, 1, 0.2 + 0.8 * 0.6065306597126334, 0.0),  # looked, in vain
            (2, 3, 0.2 + 0.8 * 0.6065306597126334 - 0.2, -0.2),
            (5, 0, 0.2 + 0.8 * 0.00033546262790251185, 0.0),
            (6, 0, 0.2, 0.0),  # beyond K_r
            (7, 1, 0.2, 0.0),
        ],
    )
    def test_by_hand(self, k, calls, total, tool):
        rank = RANK_TERM[k] if k <= 5 else 0.0
        facts = rollout(k, calls)
        assert EvidenceReward().score(facts.completion, [2], N, calls) == approx(total, 1.0, rank, tool)

    def test_is_the_default(self):
        assert EvidenceReward().settings == EvidenceReward("paper").settings == REWARD_PRESETS["paper"]


class TestRelease:
    @pytest.mark.parametrize(
        ("k", "calls", "share", "total", "tool"),
        [
            (1, 0, 0.0, 1.0, 0.0),  # curiosity pays only who looked
            (1, 1, 0.125, 1.0 + 0.6 * 0.475, 0.6 * 0.475),
            (1, 1, 0.6, 1.0, 0.0),
            (1, 1, 1.0, 1.0, 0.0),  # above the target nothing is taken away
            (1, 3, 0.5, 1.0 + 0.06 - 0.1, 0.06 - 0.1),
            (6, 0, 0.5, 0.3 + 0.7 * 3.726653172078671e-06, 0.0),  # there is no K_r
            (3, 1, 0.1, 0.3 + 0.7 * 0.1353352832366127 + 0.3, 0.3),
            (7, 20, 1.0, -0.5, -0.95),  # clipped from -0.65
        ],
    )
    def test_by_hand(self, k, calls, share, total, tool):
        facts = rollout(k, calls)
        terms = EvidenceReward("release").score(facts.completion, [2], N, calls, group_call_share=share)
        assert terms == approx(total, 1.0, RANK_TERM[k], tool)

    def test_curiosity_asks_for_no_form(self):
        assert EvidenceReward("release").score("", [2], N, 1, group_call_share=0.1) == approx(0.3, 0.0, 0.0, 0.3)

    def test_clips_above(self):
        reward = EvidenceReward("release", curiosity_weight=2.0)
        assert reward.score(rollout(1, 1).completion, [2], N, 1, group_call_share=0.1).total == 1.5  # from 2.0

    @pytest.mark.parametrize("share", [None, -0.1, 1.1, math.nan])
    def test_needs_the_share(self, share):
        with pytest.raises(ValueError, match="needs group_call_share"):
            EvidenceReward("release").score(answer(1), [2], N, 0, group_call_share=share)

    def test_the_share_is_the_groups(self):
        terms = EvidenceReward("release").score_group([rollout(1, 2), rollout(1), rollout(2), rollout(3, 0, False)])
        assert [one.tool for one in terms] == [pytest.approx(0.6 * 0.35 - 0.05), 0, 0, 0]


# Ranks of rollouts of one query.
ROLLS = st.lists(st.integers(1, N), min_size=1, max_size=4)


def mean_rank_term(ranks: list[int]) -> float:
    return sum(RANK_TERM[k] for k in ranks if k <= 5) / len(ranks)


class TestNeed:
    """Who looked (`1 call`) and who did not, and whether looking is paid."""

    @pytest.mark.parametrize(
        ("looked", "guessed", "paid"),
        [
            ([1], [2], True),
            ([1], [1], False),
            ([1, 1, 1], [1], False),
            ([1, 2], [1], False),  # who looked ranks worse
            ([1, 2], [2], True),
            ([1, 3], [2], False),  # (1 + 0.135) / 2 = 0.568 < 0.607
            ([1, 1], [], False),  # nothing to compare with
            ([], [1, 2], False),
            ([1, 6], [7, 7], True),
            ([6], [7], False),  # both unpaid, so the one is no worse than the other
            ([1, 2, 2, 2], [2], True),
            ([1, 5] * 3, [1, 5], False),  # equal means, but for their last bits
        ],
    )
    def test_bonus(self, looked, guessed, paid):
        group = [rollout(k, 1) for k in looked] + [rollout(k, 0, False) for k in guessed]
        tools = [terms.tool for terms in EvidenceReward("need").score_group(group)]
        assert tools == [0.2 if paid and k == 1 else 0.0 for k in looked] + [0.0] * len(guessed)

    def test_a_rollout_that_could_have_called_counts_like_one_that_could_not(self):
        for tools in (True, False):
            assert EvidenceReward("need").score_group([rollout(1, 1), rollout(2, 0, tools)])[0].tool == 0.2

    def test_malformed_outputs_are_not_compared(self):
        """A guess that was cut off does not make looking needed, nor does a cut-off look make it useless."""
        broken = RolloutFacts("<think>hm", [2], N, 0)
        assert EvidenceReward("need").score_group([rollout(1, 1), broken, rollout(1)])[0].tool == 0
        broken = dataclasses.replace(broken, valid_tool_calls=1)
        assert EvidenceReward("need").score_group([rollout(1, 1), broken, rollout(2)])[0].tool == 0.2

    def test_more_calls_than_one_still_cost(self):
        assert EvidenceReward("need").score_group([rollout(1, 3), rollout(2)])[0].tool == pytest.approx(0.0)

    def test_alone(self):
        reward = EvidenceReward("need")
        looked = rollout(1, 1).completion
        assert reward.score(looked, [2], N, 1).total == 1.0
        assert reward.score(looked, [2], N, 1, calls_needed=True).total == pytest.approx(1.2)
        assert reward.score(answer(1), [2], N, 0, calls_needed=True).total == 1.0

    @settings(deadline=None)
    @given(ROLLS, ROLLS, st.integers(1, 3))
    def test_a_call_pays_only_where_it_helps(self, looked, guessed, calls):
        group = [rollout(k, calls) for k in looked] + [rollout(k) for k in guessed]
        helps = mean_rank_term(looked) > mean_rank_term(guessed) + 1e-9
        tools = [terms.tool for terms in EvidenceReward("need", call_cost=0.0).score_group(group)]
        assert tools == [0.2 if helps and k == 1 else 0.0 for k in looked] + [0.0] * len(guessed)

    @settings(deadline=None)
    @given(ROLLS, ROLLS, st.integers(1, N), st.integers(1, 3))
    def test_a_needless_call_never_pays_more_than_none(self, looked, guessed, k, calls):
        """At equal rank, where the rollouts without calls rank as well."""
        assume(mean_rank_term([k, *guessed]) >= mean_rank_term([k, *looked]))
        group = [rollout(k, calls), rollout(k), *(rollout(k, 1) for k in looked), *(rollout(k) for k in guessed)]
        called, not_called, *_ = EvidenceReward("need").score_group(group)
        assert called.total <= not_called.total

    @given(st.integers(2, N), st.integers(1, 2))
    def test_a_needed_call_does(self, guess, calls):
        called, not_called = EvidenceReward("need").score_group([rollout(1, calls), rollout(guess)])
        assert called.total >= 1.1 > 1.0 > not_called.total

    @pytest.mark.parametrize(("size", "count"), [(1, 0), (2, 1), (3, 1), (4, 1), (8, 2), (16, 4)])
    def test_num_without_tools(self, size, count):
        assert EvidenceReward("need").num_without_tools(size) == count
        assert EvidenceReward("paper").num_without_tools(size) == 0

    def test_some_play_with_tools(self):
        assert EvidenceReward("need", no_tool_share=0.99).num_without_tools(4) == 3


WELL_FORMED = [
    answer(1),
    f"{CALL}\n{answer(1)}",
    f"{CALL}\n{CALL}\n{answer(1)}",
    f"{CALL}<|im_end|>\n{answer(1)}<|im_end|>",  # the end marks were kept
    f"{CALL}\n{CALL}<|im_end|>\n{answer(1)}\n<|im_end|>\n",
    format_turn(f"I could write {CALL.partition('</think>')[2]}", format_answer([1, 0, 2, 3, 4, 5, 6])),  # a quotation
    format_turn("or <answer>[1, 2]</answer>?", format_answer([1, 0, 2, 3, 4, 5, 6])),
]

MALFORMED = [
    ("", 0.0),
    ("2 fits best.", 0.0),
    (CALL, 0.0),  # no answer
    (format_answer([1, 0, 2, 3, 4, 5, 6]), 0.5),  # no thought
    (f"{CALL}\n{format_answer([1, 0, 2, 3, 4, 5, 6])}", 0.5),
    (f"So: {answer(1)}", 0.5),  # text outside
    (f"{answer(1)} Good luck.", 0.5),
    (f"{CALL} {answer(1)} Good luck.", 0.5),
    (f"Hm.\n{answer(1)}", 0.5),  # a first turn without action
    (f"Hm.<|im_end|>\n{answer(1)}", 0.5),
    (f"<|im_end|>\n{answer(1)}", 0.5),  # an empty first turn
    (f"<think>I wonder\n{answer(1)}", 0.5),  # a thought cut off by the end of its turn
    (f"<think>I wonder<|im_end|>\n{answer(1)}", 0.5),
    (
        f"<think>Write {CALL.partition('</think>')[2]}\n{answer(1)}",
        0.5,
    ),  # stopped in the thought, at the call's end tag
    (f'<think>t</think><tool_call>{{"name": "crop\n{answer(1)}', 0.0),  # a call cut off
    (f"<think>t</think><tool_call>crop(2)</tool_call>\n{answer(1)}", 0.5),  # a call that is no JSON
    (f"{CALL.partition('</think>')[2]}\n{answer(1)}", 0.5),  # a call without a thought
    (f"{answer(1)}\n{CALL}", 0.0),  # calls behind its answer
    (f"{answer(2)}\n{answer(1)}", 0.0),  # two answers: which?
    (f"{answer(2)}<|im_end|>\n{answer(1)}", 0.5),
    (f"compared</think>{format_answer([1, 0, 2, 3, 4, 5, 6])}", 0.5),  # the prompt opened the thought
    (answer(1).removesuffix("</answer>"), 0.0),  # cut off
    (f"{answer(1)}<|im_start|>user", 0.5),  # plays the user
]

NO_RANKING = [
    ("[2]", 1.0),  # the right one alone
    ("[2, 2, 2, 2, 2, 2, 2]", 1.0),
    ("[2, 1, 3, 4, 5, 6]", 1.0),  # one is missing
    ("[2, 1, 3, 4, 5, 6, 8]", 1.0),  # a foreign number
    ("[2, 1, 3, 4, 5, 6, 7, 7]", 1.0),
    ("[0, 2, 1, 3, 4, 5, 6, 7]", 1.0),  # 0 is the query
    ("[-2, 1, 3, 4, 5, 6, 7]", 1.0),
    ("[]", 0.5),  # no integer in it
    ("2, 1, 3, 4, 5, 6, 7", 0.5),
    ("[2, 1, 3, 4, 5, 6, 7", 0.5),
    ("[2, 1, 3, 4, 5, 6, 7,]", 0.5),
    ("[[2, 1, 3, 4, 5, 6, 7]]", 0.5),
    ("[2.0, 1, 3, 4, 5, 6, 7]", 0.5),
    ('["2", "1", "3", "4", "5", "6", "7"]', 0.5),
    ("[02, 1, 3, 4, 5, 6, 7]", 0.5),  # no JSON
    ("[true, 2, 3, 4, 5, 6, 7]", 0.5),
    ("(2) the red one", 0.5),
    ("", 0.5),
    ("[" * 100_000, 0.5),
    ("[" + "9" * 10_000 + "]", 0.5),
]


class TestReading:
    @pytest.mark.parametrize("text", WELL_FORMED)
    def test_well_formed(self, text):
        assert EvidenceReward().score(text, [2], N, 0) == approx(1.0, 1.0, 1.0, 0.0)

    @pytest.mark.parametrize(("text", "form"), MALFORMED)
    def test_malformed(self, text, form):
        """Ranks 2 first, in whatever is left of an answer, and looked; earns half the form at most."""
        assert EvidenceReward().score(text, [2], N, 1) == approx(0.2 * form, form, 0.0, 0.0)

    @pytest.mark.parametrize(("body", "form"), NO_RANKING)
    def test_no_permutation(self, body, form):
        text = format_turn("t", f"<answer>{body}</answer>")
        assert EvidenceReward().score(text, [2], N, 1) == approx(0.2 * form, form, 0.0, 0.0)

    def test_the_best_ranked_positive_counts(self):
        text = format_turn("t", "<answer>[4, 3, 1, 2]</answer>")
        scored = {
            positives: EvidenceReward().score(text, positives, 4, 0).rank for positives in [(2,), (1, 2), (2, 3)]
        }
        assert scored == {(2,): RANK_TERM[4], (1, 2): RANK_TERM[3], (2, 3): RANK_TERM[2]}
        assert EvidenceReward().score(text, [1, 2, 3, 4], 4, 0).rank == 1.0

    def test_the_example_of_a_single_candidate(self):
        assert EvidenceReward().score("<think></think><answer>[1]</answer>", [1], 1, 0).total == 1.0

    def test_a_trajectory(self):
        turns = [Turn("prompt", [1], "which?"), Turn("assistant", [2], CALL, kind="call", call={}, valid=True)]
        turns += [Turn("observation", [3], "<answer>[1]</answer>", valid=True), Turn("assistant", [4], answer(2))]
        trajectory = Trajectory("q", N, list(range(N)), {}, turns)
        # 0-based: index 1 is the candidate numbered 2. What the model was shown is not its own text.
        assert EvidenceReward().score_trajectory(trajectory, [1]).rank == RANK_TERM[2]
        assert EvidenceReward().score_trajectory(trajectory, [0]) == approx(1.2, 1, 1, 0.2)
        terms = EvidenceReward("release").score_trajectory(trajectory, [0], group_call_share=0.1)
        assert terms == approx(1.3, 1, 1, 0.3)
        assert EvidenceReward("need").score_trajectory(trajectory, [0], calls_needed=True).tool == 0.2

    @pytest.mark.parametrize("positives", [[], [0], [8], [2, 8], [-1]])
    def test_labels_that_fit_no_candidate(self, positives):
        with pytest.raises(ValueError, match="positives must be candidate numbers from 1 to 7"):
            EvidenceReward().score(answer(1), positives, N, 0)

    def test_a_negative_number_of_calls(self):
        with pytest.raises(ValueError, match="valid_tool_calls"):
            EvidenceReward().score(answer(1), [2], N, -1)


class TestSettings:
    def test_unknown_preset(self):
        with pytest.raises(ValueError, match="choose from .'need', 'paper', 'release'"):
            EvidenceReward("papper")

    def test_unknown_setting(self):
        with pytest.raises(ValueError, match="eta.*tool_bonus"):
            EvidenceReward("paper", eta=0.1)

    @pytest.mark.parametrize(
        "bad",
        [
            {"sigma": 0.0},  # a division by zero
            {"format_weight": -0.1},  # would pay malformed outputs more
            {"tool_bonus": math.nan},
            {"call_cost": math.inf},
            {"cutoff": 0},
            {"no_tool_share": 1.0},  # nobody would look
            {"target_call_share": 60},  # a share, not per cent
            {"bounds": (1.5, -0.5)},
        ],
    )
    def test_bad_setting(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad))):
            EvidenceReward("paper", **bad)

    def test_overrides(self):
        reward = EvidenceReward("paper", cutoff=None, sigma=2.0)
        assert reward.score(answer(7), [2], N, 0).rank == pytest.approx(math.exp(-36 / 8))


# What a model might write, dense in what is paid: whole turns, and debris within and between them.
ANSWERS = st.builds(answer, st.integers(1, N)) | st.lists(st.integers(-1, 9), max_size=8).map(
    lambda numbers: format_turn("t", f"<answer>{numbers}</answer>")
)
DEBRIS = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", "<|im_end|>"])
OUTPUTS = st.lists(ANSWERS | st.just(CALL) | DEBRIS | st.just("\n") | st.text(max_size=4), max_size=6).map("".join)

BAD_TURNS = [
    "hm",
    "<think>hm",
    "<think>hm</think>",
    CALL + "hm",
    "<think>t</think><tool_call>{",
    "<answer>[1]</answer>",
]
TURNS = st.lists(st.sampled_from([CALL, CALL, answer(1), answer(3), *BAD_TURNS]), max_size=4)


class TestProperties:
    @settings(deadline=None)
    @given(st.sampled_from(PRESETS), OUTPUTS, st.integers(0, 20), st.floats(0, 1), st.booleans())
    def test_no_malformed_output_scores_above_the_worst_well_formed_one(self, preset, text, calls, share, needed):
        reward = EvidenceReward(preset)
        terms = reward.score(text, [2], N, calls, share, needed)
        worst = min(reward.score(answer(k), [2], N, calls, share, needed).total for k in range(1, N + 1))
        if terms.format < 1:  # then it even scores below, unless both are clipped
            assert terms.rank == 0 and (terms.total < worst or worst == -0.5)
        if terms.rank == 0:  # no permutation
            assert terms.total <= worst

    @settings(deadline=None)
    @given(st.sampled_from(PRESETS), OUTPUTS, st.integers(0, 6), st.floats(0, 1), st.booleans())
    def test_the_gold_trajectory_earns_the_maximum(self, preset, text, calls, share, needed):
        reward = EvidenceReward(preset)
        gold = reward.score(f"{CALL}\n{answer(1)}", [2], N, 1, share, needed)
        assert reward.score(text, [2], N, calls, share, needed).total <= gold.total

    def test_the_maximum(self):
        gold = (f"{CALL}\n{answer(1)}", [2], N, 1)
        assert EvidenceReward("paper").score(*gold).total == pytest.approx(1.2)
        assert EvidenceReward("need").score(*gold, calls_needed=True).total == pytest.approx(1.2)
        assert EvidenceReward("release").score(*gold, group_call_share=1 / 8).total == pytest.approx(1.285)

    @settings(deadline=None)
    @given(TURNS, st.sampled_from(["\n", "<|im_end|>\n"]))
    def test_only_a_whole_well_formed_ranking_is_paid_as_one(self, turns, joint):
        """Wherever the bad turn stands, and whatever it leaves open for the next one to close."""
        ranks = bool(turns) and turns[-1] in (answer(1), answer(3)) and set(turns[:-1]) <= {CALL}
        assert (EvidenceReward().score(joint.join(turns), [2], N, 0).rank > 0) == ranks

    @settings(deadline=None)
    @given(st.sampled_from(PRESETS), st.permutations([(k, calls) for k in (1, 2, 7) for calls in (0, 1, 3)]))
    def test_the_order_within_a_group_does_not_matter(self, preset, group):
        scored = EvidenceReward(preset).score_group([rollout(k, calls) for k, calls in group])
        again = EvidenceReward(preset).score_group([rollout(k, calls) for k, calls in sorted(group)])
        assert dict(zip(group, scored, strict=True)) == dict(zip(sorted(group), again, strict=True))


class Log:
    """The two functions that TRL hands to a reward function."""

    def __init__(self):
        self.metrics: dict[str, float] = {}
        self.extra: dict[str, list] = {}

    def call(self, reward, completions, **columns):
        return reward(
            prompts=["p"] * len(completions),
            completions=completions,
            completion_ids=[[0]] * len(completions),
            trainer_state=None,
            log_metric=self.metrics.__setitem__,
            log_extra=self.extra.__setitem__,
            **columns,
        )


class TestAsRewardFunction:
    BATCH = [rollout(1, 1), rollout(2, 0, False), rollout(1, 2), rollout(1, 0), RolloutFacts("", [2], N, 0)]

    def test_facts(self):
        log = Log()
        totals = log.call(EvidenceReward(), [""] * 5, rollout_facts=self.BATCH)
        assert totals == pytest.approx([1.2, 0.2 + 0.8 * RANK_TERM[2], 1.1, 1.0, 0.0])
        assert log.extra == {
            "format": [1, 1, 1, 1, 0],
            "rank": [1, RANK_TERM[2], 1, 1, 0],
            "tool": [0.2, 0, pytest.approx(0.1), 0, 0],
            "calls": [1, 0, 2, 0, 0],
        }
        assert log.metrics == {
            "evidence/format/mean": 0.8,
            "evidence/format/std": pytest.approx(0.4),
            "evidence/rank/mean": pytest.approx((3 + RANK_TERM[2]) / 5),
            "evidence/rank/std": pytest.approx(0.3915, abs=1e-4),
            "evidence/tool/mean": pytest.approx(0.06),
            "evidence/tool/std": pytest.approx(0.08),
            "evidence/top1": 0.6,
            "evidence/malformed": 0.2,
            "evidence/repeated_tokens": 0.0,
            "evidence/call_rate": 0.5,  # of the four that had tools
            "evidence/calls": 0.75,
        }

    def test_without_logging(self):
        assert EvidenceReward()(["p"], [""], rollout_facts=[rollout(1)]) == [1.0]

    def test_groups_are_found_by_query(self):
        group = [rollout(1, 1), rollout(2)]
        other = [rollout(1, 1), rollout(1)]
        columns = {"rollout_facts": group + other, "query_id": ["a", "a", "b", "b"]}
        log = Log()
        assert log.call(EvidenceReward("need"), [""] * 4, **columns)[0::2] == pytest.approx([1.2, 1.0])
        assert log.metrics["evidence/calls_needed"] == 0.5
        # The released column does as well, and two groups of one query stay two.
        columns = {"rollout_facts": group + other * 2, "extra_info": [{"qid": "a"}] * 2 + [{"qid": "b"}] * 4}
        assert log.call(EvidenceReward("need"), [""] * 6, **columns)[0::2] == pytest.approx([1.2, 1.0, 1.0])

    @pytest.mark.parametrize("preset", ["release", "need"])
    @pytest.mark.parametrize("columns", [{}, {"extra_info": [None, {}]}])
    def test_groups_that_cannot_be_found(self, preset, columns):
        with pytest.raises(ValueError, match="query_id"):
            EvidenceReward(preset)(["p"] * 2, [""] * 2, rollout_facts=[rollout(1)] * 2, **columns)

    def test_columns(self):
        """Rollouts without tools need no environment."""
        answers = [answer(1), [{"role": "assistant", "content": [{"type": "text", "text": answer(2)}]}]]
        log = Log()
        totals = log.call(EvidenceReward(), answers, positives=[[2], [2, 5]], num_candidates=[N, N], environments=None)
        assert totals == pytest.approx([1.0, 0.2 + 0.8 * RANK_TERM[2]])
        assert "evidence/call_rate" not in log.metrics

    def test_no_facts(self):
        with pytest.raises(ValueError, match="rollout_facts.*there are .*'completion_ids'"):
            Log().call(EvidenceReward(), [answer(1)])

    def test_columns_cannot_tell_which_calls_were_valid(self):
        call = {"type": "function", "function": {"name": "select_images", "arguments": {"target_images": [1]}}}
        messages = [{"role": "assistant", "content": "<think>t</think>", "tool_calls": [call]}]
        with pytest.raises(ValueError, match="only an environment knows"):
            EvidenceReward()(["p"], [messages], positives=[[2]], num_candidates=[N])

    def test_repeated_tokens(self):
        texts = ["<|vision_start|><|vision_start|>", "</think>\n</think>", "<think>a<think>", answer(1) + "<|im_end|>"]
        log = Log()
        log.call(EvidenceReward(), texts, positives=[[2]] * 4, num_candidates=[N] * 4)
        assert log.metrics["evidence/repeated_tokens"] == 0.5


@dataclasses.dataclass
class Environment:
    facts: RolloutFacts


class TestEnvironments:
    def test_facts_of_environments(self):
        environments = [Environment(rollout(1, 1)), Environment(rollout(2, 3))]
        totals = EvidenceReward()(["p"] * 2, [[], []], environments=environments)
        assert totals == pytest.approx([1.2, 0.2 + 0.8 * RANK_TERM[2] - 0.2])

    @pytest.mark.parametrize(
        ("turn", "form"),
        [
            (CALL, 1.0),
            (f"\n{CALL}\n", 1.0),
            (f"{CALL} That should do.", 0.5),  # text behind the call
            (f"{CALL}\n{CALL.partition('</think>')[2]}", 0.5),  # two calls in a turn
            (CALL.replace('"name"', '"nome"'), 0.5),
            ("<think>t</think><tool_call>{no json}</tool_call>", 0.5),  # stays text
        ],
    )
    def test_text_that_the_trainer_parsed(self, turn, form):
        """An environment sees calls only, so what the model wrote comes from the messages TRL made of it."""
        from tiny_models import make_tokenizer
        from trl.chat_template_utils import parse_response

        tokenizer = make_tokenizer("qwen2_5_vl")
        tokenizer.response_template = RESPONSE_TEMPLATE
        prefix = tokenizer.encode("<|im_start|>assistant\n")
        turns = [tokenizer.encode(f"{text}<|im_end|>") for text in (turn, answer(1))]
        messages = [parse_response(tokenizer, ids, prefix=prefix) for ids in turns]
        messages.insert(1, {"role": "tool", "content": [{"type": "text", "text": "Image 2: <answer>[1]</answer>"}]})
        log = Log()
        log.call(EvidenceReward(), [messages], environments=[Environment(RolloutFacts(None, [2], N, 1))])
        assert log.extra["format"] == [form]


def straddling() -> list[RolloutFacts]:
    """Three groups of four."""
    group = [rollout(1, 1), rollout(1, 2), rollout(2, 0, False), rollout(3, 0)]
    needless = [rollout(1, 1), rollout(2, 1), rollout(1, 0, False), rollout(1, 0)]
    broken = [RolloutFacts("", [2], N, 0), RolloutFacts(CALL, [2], N, 1), rollout(1, 1), rollout(7, 0, False)]
    return group + needless + broken


def score_part(preset: str, start: int, stop: int) -> tuple[list[float], dict[str, float]]:
    log = Log()
    columns = {"rollout_facts": straddling()[start:stop], "query_id": (["a"] * 4 + ["b"] * 4 + ["c"] * 4)[start:stop]}
    return log.call(EvidenceReward(preset), [""] * (stop - start), **columns), log.metrics


def score_on_a_rank(rank: int, port: int, results) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    from accelerate import PartialState

    state = PartialState(cpu=True)
    # Equal parts, of which each cuts a group in two, and unequal ones.
    bounds = {"equal": [(0, 6), (6, 12)][rank], "unequal": [(0, 3), (3, 12)][rank]}
    results.put((rank, {name: [score_part(preset, *part) for preset in PRESETS] for name, part in bounds.items()}))
    state.destroy_process_group()


class TestGroupsThatStraddleRanks:
    def test_score_as_on_one_rank(self):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        ranks = [context.Process(target=score_on_a_rank, args=(rank, port, results), daemon=True) for rank in range(2)]
        for process in ranks:
            process.start()
        parts = dict(results.get(timeout=120) for _ in ranks)
        for process in ranks:
            process.join(30)
        for place, preset in enumerate(PRESETS):
            whole, metrics = score_part(preset, 0, 12)
            for split in ("equal", "unequal"):
                (first, first_metrics), (second, second_metrics) = (parts[rank][split][place] for rank in range(2))
                assert first + second == whole
                assert first_metrics == second_metrics == metrics

    def test_a_cut_group_alone_would_score_differently(self):
        """The test above can fail: what a rank sees of a group is not the group."""
        for preset in ("need", "release"):
            assert score_part(preset, 0, 6)[0] + score_part(preset, 6, 12)[0] != score_part(preset, 0, 12)[0]
