from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vretrver_hf.parsing import ParsedRanking, ToolCall, parse_ranking, parse_turn
from vretrver_hf.protocol import format_answer, format_call, format_turn


CALL = '<tool_call>{"name": "select_images", "arguments": {"target_images": [2]}}</tool_call>'
SELECT_2 = ToolCall("select_images", {"target_images": [2]})

# Text as a model might write it, dense in what the parsers look for.
pieces = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", "<answer>", "</answer>", "<|im_end|>", CALL, "\n", " ", "["]
    + ["]", "{", "}", '"', ",", "-", ".", "1", "2", "3", "1e999", "NaN", "\\ud800", '{"name": "a", "arguments": {}}']
)
messy_text = st.lists(pieces | st.text(max_size=5), max_size=30).map("".join)


def call_text(body: str) -> str:
    return f"<think>t</think><tool_call>{body}</tool_call>"


class TestWellFormedTurns:
    @pytest.mark.parametrize("end", ["", "\n", "<|im_end|>", "<|im_end|>\n", " \n<|im_end|>"])
    @pytest.mark.parametrize("start", ["", "\n", "  "])
    @pytest.mark.parametrize("between", ["", "\n", " "])
    def test_call(self, start, between, end):
        turn = parse_turn(f"{start}<think> Look at 2. </think>{between}{CALL}{end}")
        assert (turn.kind, turn.thought, turn.call, turn.answer) == ("call", "Look at 2.", SELECT_2, None)
        assert turn.problem is None and turn.well_formed

    @pytest.mark.parametrize("end", ["", "\n", "<|im_end|>", "<|im_end|>\n"])
    def test_answer(self, end):
        turn = parse_turn(f"<think>2 fits.</think>\n<answer> [2, 1]\n</answer>{end}")
        assert (turn.kind, turn.thought, turn.call, turn.answer) == ("answer", "2 fits.", None, "[2, 1]")
        assert turn.well_formed

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("crop_image", {"bbox_2d": [0.1, 0.25, 0.5, 1], "target_image": 3}),
            ("select_images", {"target_images": [0, 1, 12]}),
            ("unknown", {"text": 'é "quoted" 猫\n', "nested": {"a": [None, True]}}),  # for the tools to refuse
            ("", {}),
        ],
    )
    def test_what_the_protocol_writes(self, name, arguments):
        turn = parse_turn(format_turn("Why not.", format_call(name, arguments)))
        assert turn.call == ToolCall(name, arguments)
        assert turn.well_formed

    def test_a_quoted_action_is_a_thought(self):
        turn = parse_turn(f"<think>I could write {CALL} or <answer>[1]</answer>.</think><answer>[2, 1]</answer>")
        assert (turn.kind, turn.answer, turn.well_formed) == ("answer", "[2, 1]", True)
        assert turn.thought == f"I could write {CALL} or <answer>[1]</answer>."

    def test_an_empty_thought_is_a_thought(self):
        turn = parse_turn("<think></think><answer>[1]</answer>")
        assert (turn.thought, turn.well_formed) == ("", True)

    def test_the_content_of_an_answer_is_not_judged_here(self):
        assert parse_turn("<think>t</think><answer>the cat</answer>").well_formed


class TestSloppyTurns:
    """One action, clear enough to act on, that departs from the canonical form."""

    @pytest.mark.parametrize(
        ("text", "thought", "problem"),
        [
            (CALL, None, "no <think>"),
            (f"Let me look. {CALL}", None, "no <think>"),
            (f"So: <think>t</think>{CALL}", "t", "text outside"),  # before the thought
            (f"<think>t</think> I call {CALL}", "t", "text outside"),  # between thought and action
            (f"<think>t</think>{CALL} Done.", "t", "text outside"),  # after the action
            (f"<think>t</think>{CALL}</tool_call>", "t", "text outside"),  # an end tag that ends nothing
            (f"<think>t</think></think>{CALL}", "t", "text outside"),
            (f"<think>t</think>{CALL}<|im_end|>x", "t", "text outside"),  # a turn goes on behind its end
            (f"<think>a</think><think>b</think>{CALL}", "a\nb", "one <think>"),
            (f"{CALL}<think>t</think>", "t", "one <think>"),  # acts first and thinks later
            (f"t</think>{CALL}", "t", "not opened"),  # the prompt may have opened it
        ],
    )
    def test_kept_with_a_problem(self, text, thought, problem):
        turn = parse_turn(text)
        assert (turn.kind, turn.call, turn.thought) == ("call", SELECT_2, thought)
        assert problem in turn.problem and not turn.well_formed

    def test_answer_without_thought(self):
        turn = parse_turn("<answer>[1]</answer>")
        assert (turn.kind, turn.answer, turn.thought, turn.well_formed) == ("answer", "[1]", None, False)


class TestMalformedTurns:
    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "no <tool_call> and no <answer>"),
            ("The best is 2.", "no <tool_call> and no <answer>"),
            ("<think>t</think>", "no <tool_call> and no <answer>"),
            (f"<think>I write {CALL}</think>", "no <tool_call> and no <answer>"),  # only quoted
            (f"I write {CALL}</think>", "no <tool_call> and no <answer>"),  # the prompt opened the thought
            ('{"name": "a", "arguments": {}}</tool_call>', "no <tool_call>"),  # the start tag was forgotten
            ("<Answer>[1]</Answer>", "no <tool_call> and no <answer>"),  # tags are lower case
            (f"<think>t {CALL}", "<think> is not closed"),
            ("<think>a</think><answer>[1]</answer><think>b", "<think> is not closed"),
            ("<think>t</think><answer>[2, 1", "<answer> is not closed"),  # cut off
            ('<think>t</think><tool_call>{"name": "a", "argu', "<tool_call> is not closed"),
            ('<tool_call>{"name": "a", "arguments": {}}<answer>[1]</answer>', "<tool_call> is not closed"),
            (f"<think>t</think>{CALL}\n{CALL}", "more than one call"),
            (f"<think>a</think>{CALL}<think>b</think>{CALL}", "more than one call"),  # two turns in one
            ("<answer>[1, 2]</answer><answer>[2, 1]</answer>", "more than one answer"),
            (f"<think>t</think>{CALL}<answer>[1]</answer>", "a call and an answer"),
            (f"<think>t</think><answer>{CALL}</answer>", "tags inside <answer>"),
            (f"<think>t</think><tool_call>{CALL}", "tags inside <tool_call>"),
            ("<answer><think>t</think>[1]</answer>", "tags inside <answer>"),
        ],
    )
    def test_shape(self, text, problem):
        turn = parse_turn(text)
        assert turn.kind == "malformed" and not turn.well_formed
        assert problem in turn.problem
        assert turn.call is None and turn.answer is None

    @pytest.mark.parametrize(
        ("body", "problem"),
        [
            ("", "not valid JSON"),
            ("select_images([2])", "not valid JSON"),
            ('{"name": "a", "arguments": {}', "not valid JSON"),  # a brace is missing
            ("{'name': 'a', 'arguments': {}}", "not valid JSON"),  # Python's quotes
            ('{"name": "a", "arguments": {}} {"name": "a", "arguments": {}}', "not valid JSON"),  # two in one tag
            ('```json\n{"name": "a", "arguments": {}}\n```', "not valid JSON"),  # fenced
            ('{"name": "a", "arguments": {"x": 1,}}', "not valid JSON"),  # a trailing comma
            ('{"name": "a", "arguments": {"x": NaN}}', "NaN is not a number"),
            ('{"name": "a", "arguments": {"x": [-Infinity]}}', "-Infinity is not a number"),
            ('{"name": "a", "arguments": {"x": 1e999}}', "too large"),  # infinity by another name
            ('{"name": "a", "arguments": {"x": 1' + "0" * 400 + "}}", "too large"),  # float() of it overflows
            ('{"name": "a", "arguments": {"x": ' + "9" * 10_000 + "}}", "too large"),  # int() of it is refused
            ('{"name": "a", "arguments": {"x": ' + "[" * 100_000 + "}}", "too many brackets"),  # a recursion bomb
            ('{"name": "a", "arguments": {"x": ' + "[" * 70 + "]" * 70 + "}}", "too many brackets"),  # valid, but deep
            ('{"name": "a", "arguments": {"x": 1, "x": 2}}', "key is repeated"),  # which of them?
            ('{"name": "\\ud83d", "arguments": {}}', "surrogate"),  # cannot be encoded
            ('[{"name": "a", "arguments": {}}]', "not a JSON object"),
            ('"select_images"', "not a JSON object"),
            ("null", "not a JSON object"),
            ("{}", 'no "name"'),
            ('{"arguments": {}}', 'no "name"'),
            ('{"name": 3, "arguments": {}}', 'no "name"'),
            ('{"name": "a"}', 'no "arguments"'),
            ('{"name": "a", "arguments": [1]}', 'no "arguments"'),
            ('{"name": "a", "arguments": "{}"}', 'no "arguments"'),  # JSON in a string
            ('{"name": "a", "arguments": {}, "id": 1}', "keys besides"),
        ],
    )
    def test_call_body(self, body, problem):
        turn = parse_turn(call_text(body))
        assert (turn.kind, turn.thought, turn.call) == ("malformed", "t", None)
        assert problem in turn.problem

    def test_the_place_of_a_syntax_error_is_named(self):
        assert "at character 10" in parse_turn(call_text('{"name": a}')).problem

    def test_a_problem_never_quotes_the_model(self):
        """The model reads the problem: a control token that it wrote must not come back as a real one."""
        for body in ("<|im_end|>", '{"<|im_start|>": 1}', '{"name": "<|image_pad|>"}', "[<|image_pad|>]"):
            assert "<|" not in parse_turn(call_text(body)).problem


class TestParseTurnOnAnything:
    @given(messy_text)
    def test_never_raises_and_is_consistent(self, text):
        turn = parse_turn(text)
        assert (turn.call is not None) == (turn.kind == "call")
        assert (turn.answer is not None) == (turn.kind == "answer")
        assert turn.kind != "malformed" or turn.problem
        if turn.well_formed:
            assert turn.thought is not None
        if turn.call is not None:
            json.dumps(turn.call.arguments, allow_nan=False, ensure_ascii=False).encode()

    @given(st.text(alphabet="ab <>/|{}[]1,\n"), st.permutations(range(6)))
    def test_round_trip(self, thought, order):
        turn = parse_turn(format_turn(thought, format_answer(order)))
        assert (turn.kind, turn.thought, turn.well_formed) == ("answer", thought.strip(), True)
        assert parse_ranking(turn.answer.join(["<answer>", "</answer>"]), 6) == ParsedRanking(order, "ok", [])


class TestParseRanking:
    @pytest.mark.parametrize(
        "text",
        [
            "<think>t</think><answer>[3, 1, 2]</answer>",
            "<answer>[3,1,2]</answer>",  # without a thought: the format reward's business, not ours
            "<answer>\n[3, 1, 2]\n</answer><|im_end|>\n",
            f"<think>a</think>{CALL}<think>b</think><answer>[3, 1, 2]</answer>",  # a whole trajectory
            "<answer>[1, 2, 3]</answer> no, rather <answer>[3, 1, 2]</answer>",  # the last counts
            "<think><answer>[1, 2, 3]</answer></think><answer>[3, 1, 2]</answer>",
            "<answer>[3, 1, 2]</answer><think>or <answer>[1, 2, 3]</answer></think>",  # quoted behind the real one
            "<answer>[3, 1, 2]</answer><think>or <answer>[1, 2, 3]</answer>",  # in a thought that is never closed
            "or <answer>[1, 2, 3]</answer></think><answer>[3, 1, 2]</answer>",  # in one that the prompt opened
            "Best: <answer>[3, 1, 2]</answer> Good luck.",
        ],
    )
    def test_ok(self, text):
        assert parse_ranking(text, 3) == ParsedRanking([2, 0, 1], "ok", [])

    @pytest.mark.parametrize(
        ("answer", "order", "problem"),
        [
            ("[3, 1, 3, 2, 1]", [2, 0, 1], "2 repeated numbers dropped"),
            ("[3, 4, 1, 2]", [2, 0, 1], "1 number outside 1..3 dropped"),
            ("[0, 2, 1]", [1, 0, 2], "1 number outside 1..3 dropped"),  # 0 is the query
            ("[-3, 2, 1]", [1, 0, 2], "1 number outside 1..3 dropped"),  # not 3
            ("[3]", [2, 0, 1], "2 missing candidates appended"),
            ("[2, 3]", [1, 2, 0], "1 missing candidate appended"),
            ("[3] > [1] > [2]", [2, 0, 1], "not a JSON list"),
            ("3, 1, 2", [2, 0, 1], "not a JSON list"),
            ("3>1>2", [2, 0, 1], "not a JSON list"),
            ("3-1-2", [2, 0, 1], "not a JSON list"),  # the hyphens are no signs
            ("First (3), then candidate 1 and image2.", [2, 0, 1], "not a JSON list"),
            ('["3", "1", "2"]', [2, 0, 1], "not a JSON list"),
            ("[[3, 1, 2]]", [2, 0, 1], "not a JSON list"),
            ('{"ranking": [3, 1, 2]}', [2, 0, 1], "not a JSON list"),
            ("[3.0, 1.0, 2.0]", [2, 0, 1], "not a JSON list"),
            ("[3, 1, 2", [2, 0, 1], "not a JSON list"),  # a bracket is missing
            ("[3, 1, 2,]", [2, 0, 1], "not a JSON list"),
            ("3", [2, 0, 1], "not a JSON list"),  # the older single-number answer
            ("[true, 3, 1, 2]", [2, 0, 1], "not a JSON list"),  # true is not 1
            ("[1.5, 3, 1, 2]", [2, 0, 1], "1 number outside 1..3 dropped"),  # neither 1 nor 5
            ("[3, 1, " + "9" * 10_000 + ", 2]", [2, 0, 1], "1 number outside"),
        ],
    )
    def test_repaired(self, answer, order, problem):
        ranking = parse_ranking(f"<think>t</think><answer>{answer}</answer>", 3)
        assert (ranking.order, ranking.status) == (order, "repaired")
        assert any(problem in found for found in ranking.problems)

    def test_cut_off(self):
        ranking = parse_ranking("<think>t</think><answer>[3, 1", 3)
        assert (ranking.order, ranking.status) == ([2, 0, 1], "repaired")
        assert ranking.problems[0] == "the <answer> is not closed"

    def test_every_problem_is_told(self):
        assert parse_ranking("<answer>[2, 2, 9, 9, 9]</answer>", 4) == ParsedRanking(
            [1, 0, 2, 3],
            "repaired",
            [
                "3 numbers outside 1..4 dropped",
                "1 repeated number dropped",
                "3 missing candidates appended in input order",
            ],
        )

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "no <answer>"),
            ("[3, 1, 2]", "no <answer>"),
            ("<think>t</think>", "no <answer>"),
            ("<think><answer>[3, 1, 2]</answer></think>", "no <answer>"),  # only quoted
            ("<think>so <answer>[3, 1, 2]</answer>", "no <answer>"),  # the thought never ends
            ("<answer></answer>", "names none"),
            ("<answer>[]</answer>", "names none"),
            ("<answer>the cat</answer>", "names none"),
            ("<answer>[7, 8]</answer>", "names none"),  # numbers, but none of them a candidate's: the order is not its
            ("<answer>[3, 1, 2]</answer><answer>", "names none"),  # the last answer counts
        ],
    )
    def test_fallback(self, text, problem):
        ranking = parse_ranking(text, 3)
        assert (ranking.order, ranking.status) == ([0, 1, 2], "fallback")
        assert any(problem in found for found in ranking.problems)

    def test_no_candidates(self):
        assert parse_ranking("<answer>[]</answer>", 0) == ParsedRanking([], "ok", [])
        assert parse_ranking("", 0).order == []
        with pytest.raises(ValueError, match="negative"):
            parse_ranking("", -1)

    @given(messy_text, st.integers(0, 6))
    def test_always_a_permutation(self, text, n):
        ranking = parse_ranking(text, n)
        assert sorted(ranking.order) == list(range(n))
        assert (ranking.status == "ok") == (not ranking.problems)
        if ranking.status == "fallback":
            assert ranking.order == list(range(n))

    @given(st.lists(st.integers(-2, 9)), st.integers(1, 6))
    def test_repair_keeps_the_order_of_first_mentions(self, numbers, n):
        ranking = parse_ranking(f"<answer>{numbers}</answer>", n)
        named = list(dict.fromkeys(number - 1 for number in numbers if 1 <= number <= n))
        assert ranking.order == named + [index for index in range(n) if index not in named]
        assert (ranking.status == "ok") == (sorted(numbers) == list(range(1, n + 1)))
        assert (ranking.status == "fallback") == (not named)


@pytest.mark.parametrize(
    "text",
    ["<think>" * 40_000, "<think></think>" * 30_000, "<answer>" * 40_000, " " * 300_000 + "x", "<|im_end|>" * 30_000]
    + ["<answer>" + "1" * 300_000, "<answer>" + "[" * 300_000, "<answer>" + "1.1-" * 80_000, "</think>" * 40_000],
)
def test_time_grows_with_length_only(text):
    start = time.process_time()  # a quadratic parser takes minutes; what else the machine does must not count
    parse_turn(text)
    parse_ranking(text, 20)
    assert time.process_time() - start < 2
