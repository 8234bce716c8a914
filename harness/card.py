"""The device that tools will run on: the one at hand, or one that is not here and only its size is known."""

from __future__ import annotations

from typing import NamedTuple

import psutil

from harness.errors import LoopError
from harness.runner import has_accelerator, nvml_handles

GIVES = 1.024e9  # bytes that a card gives for each GB of its name: 8 GiB less what the driver keeps
SHARE = 0.8  # of a machine's memory that one run may count on
BF16_SINCE = (8, 0)  # compute capability


class Card(NamedTuple):
    """A device.

    Attributes:
        name: for people.
        memory: bytes that it gives.
        gpu: no CPU.
        bf16: computes in bfloat16.
    """

    name: str
    memory: int
    gpu: bool
    bf16: bool


def of_size(gigabytes: float) -> Card:
    """A GPU of so many GB that need not be here, of a generation that knows bfloat16."""
    return Card(f"a GPU of {gigabytes:g} GB", int(gigabytes * GIVES), True, True)


def at_hand() -> Card:
    """The first GPU of this machine, or its CPU where there is none.

    Raises:
        LoopError: there is an accelerator whose size nobody tells.
    """
    if handles := nvml_handles():
        import pynvml

        name = pynvml.nvmlDeviceGetName(handles[0])
        total = int(pynvml.nvmlDeviceGetMemoryInfo(handles[0]).total)
        capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handles[0]))
        return Card(f"one {name}", int(total * GIVES / 2**30), True, capability >= BF16_SINCE)
    if has_accelerator():
        raise LoopError("this machine's accelerator does not tell its memory: give --vram GB")
    total = psutil.virtual_memory().total
    return Card(f"a CPU with {total / 2**30:.0f} GB of memory", int(total * SHARE), False, False)
