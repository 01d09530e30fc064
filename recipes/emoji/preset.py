"""What the tiny model plays, in training and after."""

from __future__ import annotations

from vretrver_hf.protocol import get_preset


OVERVIEW_PIXELS = 85 * 85
INSPECT_PIXELS = 141 * 141
"""Squares come out at 84 and 140 pixels. Budgets of exactly those squares would not do: sizes are found by a square
root, which rounds some pictures down to the next 28 pixels."""

PRESET = get_preset("foveated", overview_pixels=OVERVIEW_PIXELS, inspect_pixels=INSPECT_PIXELS)
WINDOW, STRIDE = 8, 4
"""Candidates that it compares at a time, and the step between windows."""
MAX_TURN_TOKENS = 128
"""Most tokens of a turn; its own are half as long."""
