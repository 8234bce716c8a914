"""One thread of arithmetic: the models here are so small that more of them only wait for one another."""

from __future__ import annotations

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # of what is imported or started from here on
if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(1)
