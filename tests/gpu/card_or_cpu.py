"""Which device the tests in this folder use: the first card, or what `THINKSWITCH_TEST_DEVICE` says."""

from __future__ import annotations

import os

DEVICE = os.environ.get("THINKSWITCH_TEST_DEVICE", "cuda:0")
ON_A_CARD = DEVICE != "cpu"
