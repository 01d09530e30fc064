"""A conversation as it is written down: what was shown, what was written, and what the real tools gave back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cases import Case
from rows import Picture

from vretrver_hf.protocol import Preset, format_answer, format_call, format_turn, last_word
from vretrver_hf.tools import Observation


THOUGHT_TOKENS = 24
"""Most tokens of a thought."""


class Record:
    """
    The conversation about one case so far.

    Args:
        case (`Case`):
            The query and its candidates.
        preset (`Preset`):
            The protocol.
        use_tools (`bool`):
            Whether the prompt offers tools.
        count_tokens (`Callable[[str], int]`):
            Length of a text for the model.
    """

    def __init__(self, case: Case, preset: Preset, use_tools: bool, count_tokens: Callable[[str], int]):
        self.case, self.preset, self.use_tools, self._count_tokens = case, preset, use_tools, count_tokens
        self.messages: list[dict[str, Any]] = case.messages(preset, use_tools)
        """As [`RowMaker.row`] takes them."""
        self.pictures: list[Picture] = case.pictures(self.messages)
        """Of all image blocks, in order."""
        self.calls_left = preset.max_calls
        self.warned = False
        """Whether the last word was spoken."""
        self._tools = case.tools(preset)

    def brief(self, *thoughts: str) -> str:
        """The first of some wordings, longest first, that is short enough for a thought."""
        return next((text for text in thoughts if self._count_tokens(text) <= THOUGHT_TOKENS), thoughts[-1])

    def call(self, thought: str, name: str, arguments: dict[str, Any], loss: bool = True) -> Observation:
        """
        A thought and a call, and what comes back.

        Args:
            thought (`str`): The thought.
            name (`str`): Of the tool.
            arguments (`dict`): Of the call.
            loss (`bool`, *optional*, defaults to `True`): Whether the turn is to be learned.
        """
        self._say(format_turn(thought, format_call(name, arguments)), loss)
        if self.calls_left == 0:
            self.warned = True
            observation = Observation(last_word(len(self.case.candidates)), [], False)
        else:
            self.calls_left -= 1
            observation = self._tools.call(name, arguments)
        blocks = [{"type": "text", "text": observation.text}] + [{"type": "image"} for _ in observation.refs]
        self.messages.append({"role": "user", "content": blocks})
        self.pictures += [self.case.sides[ref.index].view.shown(ref) for ref in observation.refs]
        return observation

    def answer(self, thought: str, order: list[int]) -> None:
        """A last thought and a ranking, 0-based."""
        self._say(format_turn(thought, format_answer(order)), True)

    def _say(self, text: str, loss: bool) -> None:
        self.messages.append({"role": "assistant", "content": text, "loss": loss})
