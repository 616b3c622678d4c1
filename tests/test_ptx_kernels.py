"""The emulator on attention's kernels: what it notices if something is taken out of their PTX, and launches'
limits."""

import re

import numpy as np
import pytest
import torch

from mmpack import reference
from mmpack.ops import varlen_attention, varlen_kernels

pytestmark = pytest.mark.emulated
WAITS = r"@!complete bra\.uni waitLoop;|wgmma\.wait_group\.sync\.aligned \d+;|cp\.async\.wait_group\s+\d+;"
BARRIERS = r"bar\.sync\s+0;"
KERNELS = [f"_varlen_attention_{name}_kernel" for name in ("fwd", "bwd_dq", "bwd_dkv")]
FORWARD = KERNELS[0]


class Case:
    """Forward and backward of a long and two short segments."""

    def __init__(self, K, lengths=(150, 20, 40)):
        offsets = np.cumsum([0, *lengths])
        inputs = [torch.randn(offsets[-1], 1, K).bfloat16() for _ in range(4)]
        *self.inputs, self.dout = inputs
        tiles = reference.attention_tiles(offsets, causal=True), reference.segment_ids(offsets)
        self.how = {"causal": True, "scale": K**-0.5, "tiles": tuple(map(torch.from_numpy, tiles))}
        self.cu_seqlens, self.longest = torch.tensor(offsets, dtype=torch.int32), max(lengths)
        self.exact = self.run("reference", [x.double() for x in self.inputs])

    def run(self, impl="triton", inputs=None, with_backward=True):
        """The output; and the gradients of q, k and v."""
        inputs = [x.detach().requires_grad_(with_backward) for x in inputs or self.inputs]
        pack = (*inputs, self.cu_seqlens, self.longest)
        out = varlen_attention(*pack, **self.how, impl=impl)
        if not with_backward:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, inputs, self.dout.to(out.dtype))]

    def is_right(self, kernel):
        """Whether what the kernel makes is as near to the exact result as bf16 allows."""
        found = self.run(with_backward=kernel != FORWARD)
        return all((x - y).norm() < 5e-3 * y.norm() for x, y in zip(found, self.exact))


def load_again():
    for name in KERNELS:
        getattr(varlen_kernels, name).device_caches.clear()


@pytest.fixture
def driver(emulated, monkeypatch):
    """The emulator, looking for races; kernels are loaded again before and after."""
    from ptx.driver import Order

    monkeypatch.setattr(emulated, "order", Order(late=True, check_races=True))
    monkeypatch.setattr(emulated, "edit", emulated.edit)
    load_again()
    yield emulated
    load_again()


def numbers_of(driver, case, kernel, pattern):
    """Which matches of a pattern in a kernel's PTX the case executes: some are for data that it does not have."""
    driver.programs.clear()
    load_again()
    assert case.is_right(kernel)
    (program,) = (p for p in driver.programs.values() if kernel in p.kernel.name)
    found = [
        step for step in program.steps if re.match(pattern, re.sub(r"@\d+", "", step.text) + ";")
    ]
    return [number for number, step in enumerate(found) if step.times]


def is_noticed(driver, case, kernel, pattern, numbers):
    """Whether it shows if the matches with these numbers are taken out."""
    from ptx.faults import Fault

    def edit(ptx):
        if kernel in ptx:
            places = list(re.finditer(pattern, ptx))
            for place in (places[number] for number in sorted(numbers, reverse=True)):
                ptx = ptx[: place.start()] + ptx[place.end() :]
        return ptx

    driver.edit = edit
    load_again()
    try:
        return not case.is_right(kernel)
    except Fault:
        return True
    finally:
        driver.edit = lambda ptx: ptx


@pytest.mark.parametrize(
    ("K", "kernel"),
    [
        pytest.param(K, f"_varlen_attention_{name}_kernel", marks=marks, id=f"{name}-{K}")
        for name in ("fwd", "bwd_dq", "bwd_dkv")
        for K in (64, 80, 128)
        for marks in [() if (name, K) == ("fwd", 64) else pytest.mark.slow]
    ],
)
def test_a_barrier_or_wait_that_is_taken_out_is_noticed(K, kernel, driver):
    """Every wait; and of the barriers, taken out one after the other as long as nothing is noticed, most: Triton
    has one before each copy of a thread that makes several in turn, where one would do."""
    case = Case(K)
    waits = numbers_of(driver, case, kernel, WAITS)
    barriers = numbers_of(driver, case, kernel, BARRIERS)
    assert len(barriers) > 5 and len(waits) > 2
    unnoticed = [n for n in waits if not is_noticed(driver, case, kernel, WAITS, {n})]
    assert not unnoticed
    spared = set()
    for number in barriers:
        if not is_noticed(driver, case, kernel, BARRIERS, {*spared, number}):
            spared.add(number)
    assert len(spared) <= len(barriers) / 2, (spared, barriers)


@pytest.mark.parametrize(
    "order", [{"late": True}, {"warp_seed": 1}, {"warp_seed": 2, "late": True}], ids=str
)
def test_results_do_not_depend_on_the_order(order, emulated, monkeypatch):
    from ptx.driver import Order

    case = Case(64)
    expected = case.run()
    monkeypatch.setattr(emulated, "order", Order(**order))
    for ours, other in zip(case.run(), expected):
        assert torch.equal(ours, other)


def test_a_launch_has_limits(driver, monkeypatch):
    from ptx import driver as drivers
    from ptx.faults import Fault
    from triton.runtime.errors import OutOfResources

    case = Case(64)
    kernel = varlen_kernels._varlen_attention_fwd_kernel
    real = type(kernel).__getitem__
    monkeypatch.setattr(type(kernel), "__getitem__", lambda self, grid: real(self, (1, 65536)))
    with pytest.raises(Fault, match="a grid of .1, 65536, 1.: at most"):
        case.run()
    monkeypatch.undo()
    monkeypatch.setitem(drivers.MAX_SHARED, 90, 48 * 1024)
    monkeypatch.setattr(driver, "device", 1)  # Triton asks each device once
    with pytest.raises(OutOfResources, match="Required: .*, Hardware limit: 49152"):
        case.run()
