"""What the tiny model plays, in training and after."""

from __future__ import annotations

from vretrver_hf.protocol import get_preset


OVERVIEW_PIXELS = 85 * 85
INSPECT_PIXELS = 125 * 125
"""Squares come out at 84 and 112 pixels. Budgets of exactly those squares would not do: sizes are found by a square
root, which rounds some pictures down to the next 28 pixels. The second leaves room for crops that are not quite
square, which would lose a quarter of a side; it is just too small for 140 x 112."""
CROP_PADDING = 0.03
"""A crop shows this share of the picture more on each side than its box: what is small in a scene fills it all the
same, and a box may be a little off."""

PRESET = get_preset(
    "foveated", overview_pixels=OVERVIEW_PIXELS, inspect_pixels=INSPECT_PIXELS, crop_padding=CROP_PADDING
)
WINDOW, STRIDE = 8, 4
"""Candidates that it compares at a time, and the step between windows."""
MAX_TURN_TOKENS = 128
"""Most tokens of a turn; its own are half as long."""
