"""Asynchronous copies: cp.async, TMA in two dimensions, and the mbarriers that say when TMA is done.

"Early" copies are done when they are issued, "late" ones not before somebody waits for them: a missing wait, or a
buffer that is overwritten too soon, shows in one of the two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ptx.faults import Fault, Unknown
from ptx.registers import PARAMETER_BASE, SHARED_BASE

SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # cuTensorMapEncodeTiled's number -> bytes


def swizzled(addresses, span):
    """Where TMA and wgmma find a byte: bits 4 to 6 of the address, exclusive or with bits 7 to 9."""
    bits = {0: 0, 16: 0, 32: 1, 64: 3, 128: 7}[span]
    return addresses ^ (addresses >> 7 & bits) << 4


@dataclass
class TensorMap:
    """What cuTensorMapEncodeTiled gets, with its limits; `address` is in the emulator's global memory or, until a
    launch knows that, on the host. Shape and strides in elements."""

    address: int
    swizzle: int
    element_size: int
    block: list[int]
    shape: list[int]
    strides: list[int]
    is_padded_with_nan: bool

    def __post_init__(self):
        inner = self.block[-1] * self.element_size
        pitches = [stride * self.element_size for stride in self.strides[:-1]]
        problems = {
            "the base is not 16-byte aligned": self.address % 16,
            "a box has more than 256 rows or columns": not all(0 < n <= 256 for n in self.block),
            "a row of the box is no multiple of 16 bytes": inner % 16,
            "a stride is no multiple of 16 bytes": any(pitch % 16 for pitch in pitches),
            "a stride is 2^40 bytes or more": any(pitch >= 1 << 40 for pitch in pitches),
            "a size is 0 or above 2^32": not all(0 < n <= 1 << 32 for n in self.shape),
            "a row of the box exceeds the swizzle": inner > (SWIZZLES[self.swizzle] or inner),
        }
        for problem, is_there in problems.items():
            if is_there:
                raise Fault(f"cuTensorMapEncodeTiled refuses this: {problem}. {self}")
        if len(self.block) != 2 or self.is_padded_with_nan:
            raise Unknown(f"tensor maps of {len(self.block)} dimensions, or padded with NaN")


class Barrier:
    """An mbarrier: `arrivals` and bytes that its phase still expects."""

    def __init__(self, count):
        self.count = self.arrivals = count
        self.bytes, self.phase, self.copies, self.is_polled = 0, 0, [], False

    def arrive(self, num_bytes):
        if not self.arrivals:
            raise Fault("more arrivals at a barrier than it was made for")
        self.bytes += num_bytes
        self.arrivals -= 1
        self.end_phase()

    def end_phase(self):
        if not self.arrivals and not self.bytes:
            self.arrivals, self.phase = self.count, 1 - self.phase

    def is_done(self, parity):
        """Whether the phase of this parity is over. Late copies are done for those who ask a second time: who asks
        once and goes on does not wait."""
        if self.phase == parity and self.copies:
            if self.is_polled:
                waiting, self.copies = self.copies, []
                for copy in waiting:
                    copy()
            self.is_polled = not self.is_polled
        return self.phase != parity


def _barrier(t, lane, address):
    """The barrier that a thread asks or arrives at."""
    key = int(t.block[lane]), int(address)
    if t.shared.race_check:
        t.shared.race_check.reads(*_touched(t, lane, address))
    if key not in t.shared.barriers:
        raise Fault(f"a barrier at {address - SHARED_BASE} that is not initialized")
    return t.shared.barriers[key]


def _touched(t, lane, address):
    lanes = np.array([lane])
    return t.shared.places(0, np.array([address]), 8, "barrier"), 8, t, lanes


def _active(t, mask):
    return range(t.n) if mask is None else np.flatnonzero(mask).tolist()


def make_mbarrier(parts, operands, code):
    kind = parts[1]
    if kind in ("init", "inval"):
        address = code.address(operands[0])
        count = code.read(operands[1], "u32") if kind == "init" else None

        def change(t, mask):
            addresses = address(t)
            for lane in _active(t, mask):
                key = int(t.block[lane]), int(addresses[lane])
                touched = _touched(t, lane, addresses[lane])
                if t.shared.race_check:
                    t.shared.race_check.writes(*touched)
                if count:
                    t.shared.barriers[key] = Barrier(int(t.spread(count(t))[lane]))
                else:
                    barrier = t.shared.barriers.pop(key, None)
                    if barrier is None or barrier.copies:
                        raise Fault(
                            "a barrier ends that is not there, or while copies to it are under way"
                        )

        return change
    if kind == "arrive":
        if (
            not set(parts[2:]) <= {"expect_tx", "shared", "shared::cta", "b64"}
            or operands[0] != "_"
        ):
            raise KeyError(parts)
        address = code.address(operands[1])
        num_bytes = code.read(operands[2] if "expect_tx" in parts else "0", "u32")

        def arrive(t, mask):
            addresses, expected = address(t), t.spread(num_bytes(t))
            for lane in _active(t, mask):
                _barrier(t, lane, addresses[lane]).arrive(int(expected[lane]))

        return arrive
    if kind not in ("try_wait", "test_wait") or "parity" not in parts:
        raise KeyError(parts)
    write, address, parity = (
        code.write(operands[0]),
        code.address(operands[1]),
        code.read(operands[2], "u32"),
    )

    def wait(t, mask):
        addresses, parities, seen = address(t), t.spread(parity(t)), {}
        is_done = np.ones(t.n, bool)
        for lane in _active(t, mask):
            key = int(t.block[lane]), t.tid[lane] // 32, int(addresses[lane]), int(parities[lane])
            if key not in seen:
                barrier = _barrier(t, lane, addresses[lane])
                of = key[0], *key[2:]
                if of not in seen:
                    seen[of] = barrier.is_done(key[3])
                seen[key] = seen[of]
            is_done[lane] = seen[key]
        t.is_blocked = not is_done.all()
        write(t, is_done, mask)

    return wait


def make_cp(parts, operands, code):
    """cp.async of 4, 8 or 16 bytes, or of zeros; and TMA."""
    if parts[2:4] == ("bulk", "tensor"):
        return _make_tma(parts, operands, code)
    if parts[1:] in (("async", "commit_group"), ("async", "wait_group"), ("async", "wait_all")):
        if parts[2] == "commit_group":
            return lambda t, mask: t.copies.commit(mask)
        pending = int(operands[0], 0) if operands else 0

        def wait(t, mask):
            if parts[2] == "wait_all":
                t.copies.commit(mask)
            t.copies.wait(pending, mask)

        return wait
    if not set(parts[1:]) <= {"async", "ca", "cg", "shared", "shared::cta", "global"}:
        raise KeyError(parts)
    target, source, size = code.address(operands[0]), code.address(operands[1]), int(operands[2], 0)
    length = code.read(operands[3], "u32") if len(operands) > 3 else None

    def copy(t, mask):
        lanes = np.arange(t.n) if mask is None else np.flatnonzero(mask)
        targets, sources = target(t)[lanes], source(t)[lanes]
        lengths = t.spread(length(t))[lanes] if length else np.full(len(lanes), size)
        if ((lengths != 0) & (lengths != size)).any():
            raise Unknown("cp.async of a part")

        if t.shared.race_check:
            t.shared.race_check.writes(t.shared.places(0, targets, size, "write"), size, t, lanes)

        def run():
            words = np.zeros((len(lanes), max(1, size // 8)), f"u{min(size, 8)}")
            if lengths.any():
                words[lengths != 0] = t.launch.memory.load(sources[lengths != 0], size)
            t.shared.store(t, lanes, targets, words, size)

        t.copies.add(run)

    return copy


def _make_tma(parts, operands, code):
    known = (
        "cp",
        "async",
        "bulk",
        "tensor",
        "2d",
        "shared::cta",
        "global",
        "mbarrier::complete_tx::bytes",
    )
    if tuple("shared::cta" if part == "shared::cluster" else part for part in parts) != known:
        raise KeyError(parts)
    found = re.fullmatch(
        r"\[\s*([%\w]+)\s*,\s*\{\s*([%\w-]+)\s*,\s*([%\w-]+)\s*\}\s*\]", operands[1]
    )
    if not found:
        raise Unknown(f"TMA of {operands[1]}")
    target, barrier = code.address(operands[0]), code.address(operands[2])
    tensor_map, x, y = (
        code.read(found[1], "s64"),
        code.read(found[2], "s32"),
        code.read(found[3], "s32"),
    )

    def copy(t, mask):
        values = [t.spread(value) for value in (target(t), barrier(t), tensor_map(t), x(t), y(t))]
        for lane in _active(t, mask):
            address, at_barrier, of_map, column, row = (int(value[lane]) for value in values)
            done = _barrier(t, lane, at_barrier)
            of = t.launch.maps.get(of_map - PARAMETER_BASE)
            if of is None:
                raise Fault("TMA of something that is no tensor map")
            if address % 128:
                raise Fault("the target of TMA is not 128-byte aligned")
            chunks = address + np.arange(0, of.block[0] * of.block[1] * of.element_size, 16)
            chunks = swizzled(chunks, SWIZZLES[of.swizzle])
            chunks = t.shared.chunks(int(t.block[lane]), chunks, "TMA")
            if t.shared.race_check:
                t.shared.race_check.copy_begins(chunks, int(t.tid[lane]) // 32)
            job = _tma_job(t, chunks, of, column, row, done)
            if t.launch.late:
                done.copies.append(job)
            else:
                job()

    return copy


def _tma_job(t, chunks, of, x, y, barrier):
    """Copies a box whose corner is at column x of row y; what lies outside of the tensor is 0."""
    rows, columns = of.block
    size = of.element_size
    width = columns * size

    def run():
        box = np.zeros((rows, width), np.uint8)
        top, bottom = max(y, 0), min(y + rows, of.shape[0])
        left, right = max(x, 0), min(x + columns, of.shape[1])
        if top < bottom and left < right:
            word = next(
                n for n in (16, 8, 4, 2, 1) if (left * size | (right - left) * size) % n == 0
            )
            row_begins = of.address + np.arange(top, bottom) * (of.strides[0] * size) + left * size
            places = row_begins[:, None] + np.arange(0, (right - left) * size, word)
            words = t.launch.memory.load(places.reshape(-1), word)
            inside = box[top - y : bottom - y, (left - x) * size : (right - x) * size]
            inside[:] = words.view(np.uint8).reshape(inside.shape)
        t.shared.view16[chunks] = box.reshape(-1, 16).view(np.uint64)
        barrier.bytes -= rows * width
        barrier.end_phase()

    return run
