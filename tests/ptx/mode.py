"""`pytest --emulate`: the tests that need a GPU run on the emulator, in the same process, on CPU tensors.

    pytest --emulate -m gpu tests/test_varlen_attention.py

Triton chooses between its interpreter and its compiler when kernels are imported, so one process cannot have both:
tests of the interpreter are skipped here.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

# Tests that talk to a device itself, which the emulator is not.
NEED_A_DEVICE = {
    "test_a_long_pack_on_the_gpu": "the sizes are of a GPU: minutes in the emulator",
    "test_a_step_on_the_gpu_waits_for_nothing": "CUDA itself says what waits for it",
}


class EmulatedDevice(str):
    """Where tensors of the emulator are: torch takes it for "cpu", tests that ask see a GPU."""

    type = "cuda"


DEVICE: Any = EmulatedDevice("cpu")


def add_options(parser):
    group = parser.getgroup("emulator")
    group.addoption("--emulate", action="store_true", help="run tests of GPUs on the PTX emulator")
    group.addoption(
        "--emulate-late",
        action="store_true",
        help="copies and products no earlier than they are waited for",
    )
    group.addoption("--emulate-warps", type=int, metavar="SEED", help="warps in random order")
    group.addoption(
        "--emulate-races", action="store_true", help="find missing barriers; implies late"
    )
    group.addoption(
        "--emulate-arch", type=int, default=90, metavar="N", help="80 for sm_80; default 90"
    )


def start(config):
    """Put the emulator behind Triton; returns its driver."""
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
    import triton

    from mmpack.ops import arguments
    from ptx.driver import Driver, Order

    option = config.getoption
    late = option("emulate_late") or option("emulate_races")
    order = Order(late, option("emulate_warps"), option("emulate_races"))
    driver = Driver(option("emulate_arch"), order)
    triton.runtime.driver.set_active(driver)
    arguments.runs_kernels = lambda device: True
    return driver


def choose(items):
    """Skip what cannot run here."""
    for item in items:
        name = item.originalname
        if not (item.get_closest_marker("gpu") or item.get_closest_marker("emulated")):
            item.add_marker(pytest.mark.skip(reason="--emulate runs tests of GPUs only"))
        elif name in NEED_A_DEVICE:
            item.add_marker(pytest.mark.skip(reason=f"the emulator cannot: {NEED_A_DEVICE[name]}"))
