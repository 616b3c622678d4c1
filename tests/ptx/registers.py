"""Threads, their registers, and the operands of instructions.

A register is one array over the threads that run together. It has the dtype of its last writer; readers view it.
"""

from __future__ import annotations

import re

import numpy as np

from ptx.faults import Fault, Unknown
from ptx.parser import Kernel

DTYPES = {
    "pred": np.dtype(bool),
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "bf16": np.dtype("u2"),  # numpy has none; decoded where it is computed with
}
UNSIGNED = {1: DTYPES["pred"], **{bits: DTYPES[f"u{bits}"] for bits in (8, 16, 32, 64)}}
POISON = 0xCDCDCDCDCDCDCDCD  # of lanes that an instruction did not write, and of unwritten memory
SHARED_BASE = 1024  # where a CTA's shared memory begins, as on sm_90
PARAMETER_BASE = 1 << 40


class Threads:
    """Threads that run together, of one CTA or of several: `block` numbers the CTA of each thread.

    `launch` has what they share: parameters, tensor maps and global memory. `shared` is their CTAs' shared memory.
    """

    def __init__(self, kernel: Kernel, launch, shared, tid, block, ctaid):
        self.kernel, self.launch, self.shared = kernel, launch, shared
        self.tid, self.block, self.ctaid = tid, block, ctaid
        self.n = len(tid)
        self.lane = (tid % 32).astype(np.uint32)
        self.registers = [None] * len(kernel.widths)
        self.everyone = np.ones(self.n, bool)
        self.pcs = np.zeros(self.n, np.int64)
        self.alive, self.waiting = self.everyone.copy(), np.zeros(self.n, bool)
        self.is_blocked = False  # its last wait found nothing
        self.wgmma = Groups(launch.late)
        self.copies = Groups(launch.late)

    def spread(self, value):
        """A value per thread."""
        return value if value.shape == (self.n,) else np.broadcast_to(value, (self.n,))


class Groups:
    """Asynchronous work in groups that are waited for in order: done at once, or no earlier than it must be."""

    def __init__(self, late):
        self.late, self.open, self.committed = late, [], []

    def add(self, job):
        if self.late:
            self.open.append(job)
        else:
            job()

    def commit(self, mask):
        if self.late:
            _by_all(mask)
            self.committed.append(self.open)
            self.open = []

    def wait(self, pending, mask):
        """Until at most that many groups are pending."""
        if self.late:
            _by_all(mask)
        while len(self.committed) > pending:
            for job in self.committed.pop(0):
                job()

    def is_idle(self):
        return not self.open and not any(self.committed)


def _by_all(mask):
    if mask is not None:
        raise Unknown("groups of asynchronous work by a part of the threads that run together")


class Operands:
    """Makes readers and writers of a kernel's operands, once per instruction."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        # Names by whether the instruction that writes them has a guard; `is_guarded` is of the one in the making.
        self.written: dict[bool, set[str]] = {False: set(), True: set()}
        self.is_guarded = False
        self.places = {name: place for place, name in enumerate(kernel.widths)}
        self.parameters = {p.name: PARAMETER_BASE + p.offset for p in kernel.parameters}

    def read(self, operand: str, kind: str):
        """threads -> its values as "s32", "pred", "f32" ..., of shape (n,), or (1,) for a constant.

        A wider register gives its low bits.
        """
        dtype = DTYPES[kind]
        if operand in self.places:
            return self._read_register(operand, dtype)
        special = _SPECIAL.get(operand)
        if special:
            return lambda t: special(t).astype(dtype)
        value = self._constant(operand, dtype)
        return lambda t: value

    def _read_register(self, name, dtype):
        place, width = self.places[name], self.kernel.widths[name]
        bits = 1 if dtype.kind == "b" else 8 * dtype.itemsize
        if bits > width:
            raise Unknown(f"{name} of {width} bits read as {dtype}")

        def stored(t):
            value = t.registers[place]
            if value is None:
                if name in self.written[False] - self.written[True]:
                    raise Fault(f"{name} is read before it is written")
                # LLVM leaves undefined what nobody uses, guards leave out what no thread of a warp uses.
                value = np.full(t.n, _poison(UNSIGNED[width]))
            return value

        def read(t):
            value = stored(t)
            return value if value.dtype == dtype else value.view(dtype)

        def read_low(t):
            return stored(t).view(UNSIGNED[width]).astype(UNSIGNED[bits]).view(dtype)

        return read if bits == width else read_low

    def _constant(self, operand, dtype):
        if operand in self.parameters:
            value = self.parameters[operand]
        elif operand == "global_smem":
            value = SHARED_BASE
        elif re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            return np.array([int(operand[2:], 16)], np.uint32).view(dtype)
        elif re.fullmatch(r"0[dD][0-9a-fA-F]{16}", operand):
            return np.array([int(operand[2:], 16)], np.uint64).view(dtype)
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            value = int(operand.rstrip("U"), 0)
        else:
            raise Unknown(f"the operand {operand!r}")
        if dtype.kind == "b":
            return np.array([bool(value)])
        bits = 8 * dtype.itemsize
        return np.array([value & ((1 << bits) - 1)], UNSIGNED[bits]).view(dtype)

    def write(self, operand: str):
        """(threads, values, mask or None) -> into the register; "_" takes anything."""
        if operand == "_":
            return lambda t, value, mask: None
        if operand not in self.places:
            raise Unknown(f"the destination {operand!r}")
        place, dtype = self.places[operand], UNSIGNED[self.kernel.widths[operand]]
        poison = _poison(dtype)
        self.written[self.is_guarded].add(operand)

        def write(t, value, mask):
            if value.dtype.itemsize != dtype.itemsize or (value.dtype.kind == "b") != (
                dtype.kind == "b"
            ):
                # A narrow value in a wide register is extended by its sign, if it has one.
                value = value.astype(f"i{dtype.itemsize}" if value.dtype.kind == "i" else dtype)
            if mask is not None:
                old = t.registers[place]
                value = np.where(
                    mask, value.view(dtype), poison if old is None else old.view(dtype)
                )
            elif value.shape != (t.n,):
                value = np.repeat(value, t.n)
            t.registers[place] = value

        return write

    def address(self, operand: str):
        """threads -> the addresses of "[%rd1 + 4]", int64 of shape (n,)."""
        found = re.fullmatch(r"\[\s*([%\w$@]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not found:
            raise Unknown(f"the address {operand!r}")
        base, offset = found[1], int(found[2] or 0)
        kind = "u32" if self.kernel.widths.get(base) == 32 else "s64"
        read = self.read(base, kind)
        return lambda t: t.spread(read(t)).astype(np.int64) + offset


def _poison(dtype):
    return np.array(POISON & ((1 << 8 * dtype.itemsize) - 1), np.uint64).astype(dtype)


_SPECIAL = {
    "%tid.x": lambda t: t.tid,
    "%tid.y": lambda t: np.zeros_like(t.tid),
    "%tid.z": lambda t: np.zeros_like(t.tid),
    "%ntid.x": lambda t: np.full_like(t.tid, t.kernel.num_threads),
    "%laneid": lambda t: t.lane,
    **{f"%ctaid.{'xyz'[axis]}": lambda t, axis=axis: t.ctaid[axis] for axis in range(3)},
    **{
        f"%nctaid.{'xyz'[axis]}": lambda t, axis=axis: np.full_like(t.tid, t.launch.grid[axis])
        for axis in range(3)
    },
}


def decode_half(bits, kind):
    """uint16 of bf16 or f16 -> float32"""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def encode_half(values, kind):
    """float32 -> uint16 of bf16 or f16, to the nearest, ties to even"""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)
