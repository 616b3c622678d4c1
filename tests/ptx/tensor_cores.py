"""Products of matrices: wgmma of a warpgroup (sm_90a) and mma of a warp (sm_80), of bf16 and f16 with float32
sums.

A product of 16 terms is added up in float32, then added to the accumulator; a GPU's sum has fewer bits. As layouts
are PTX's: an accumulator of 64 rows has, in thread l of warp w, registers for rows 16 w + l // 4 (+ 8) and columns
8 c + 2 (l % 4) (+ 1).
"""

from __future__ import annotations

import re

import numpy as np

from ptx.asynchronous import swizzled
from ptx.faults import Fault, Unknown
from ptx.parser import names_of
from ptx.registers import decode_half
from ptx.warps import whole_warps

_K = 16


def make_wgmma(parts, operands, code):
    if parts[1] == "fence":
        return lambda t, mask: None
    if parts[1] == "commit_group":
        return lambda t, mask: t.wgmma.commit(mask)
    if parts[1] == "wait_group":
        pending = int(operands[0], 0)
        return lambda t, mask: t.wgmma.wait(pending, mask)
    shape, to, half = parts[4], parts[5], parts[6:]
    size = re.fullmatch(r"m64n(\d+)k16", shape)
    if (
        parts[1:4] != ("mma_async", "sync", "aligned")
        or to != "f32"
        or not size
        or half not in _HALVES
    ):
        raise KeyError(parts)
    N, half = int(size[1]), half[0]
    accumulator = [(code.read(name, "f32"), code.write(name)) for name in names_of(operands[0])]
    is_in_registers = operands[1].startswith("{")
    a = [code.read(name, "u32" if is_in_registers else "u64") for name in names_of(operands[1])]
    b, keep = code.read(operands[2], "u64"), code.read(operands[3], "pred")
    scale_a, scale_b = int(operands[4]), int(operands[5])
    transposed = [int(x) for x in operands[6:]]
    a_is_transposed = bool(not is_in_registers and transposed and transposed[0])
    b_is_transposed = bool(transposed and transposed[-1])
    if len(accumulator) != N // 2 or (scale_a, scale_b) != (1, 1):
        raise Unknown(
            f"wgmma {shape} with {len(accumulator)} registers, scales {scale_a} {scale_b}"
        )

    def issue(t, mask):
        warps = whole_warps(t, mask)
        groups = warps[::4] // 4
        if len(warps) % 4 or (warps.reshape(-1, 4) != groups[:, None] * 4 + np.arange(4)).any():
            raise Fault("wgmma by a part of a warpgroup")
        blocks = t.block[groups * 128]
        is_kept = t.spread(keep(t))[groups * 128]
        b_places = _chunks(t, _descriptors(t, b, groups), blocks, N, b_is_transposed)
        if is_in_registers:
            matrix = _a_of_registers(
                [t.spread(read(t)).reshape(-1, 128)[groups] for read in a], half
            )
        else:
            a_places = _chunks(t, _descriptors(t, a[0], groups), blocks, 64, a_is_transposed)

        read = [b_places] if is_in_registers else [a_places, b_places]
        if t.shared.race_check:
            for chunks in read:
                t.shared.race_check.wgmma_begins(chunks)

        def run():
            if t.shared.race_check:
                for chunks in read:
                    t.shared.race_check.wgmma_ends(chunks)
            left = matrix if is_in_registers else _matrix(t, a_places, half, a_is_transposed)
            right = _matrix(t, b_places, half, b_is_transposed)
            product = left @ right.transpose(0, 2, 1)
            # (group, warp, upper or lower 8 rows, row, 8 columns, pair of columns, which) -> a row per register
            fragments = product.reshape(-1, 4, 2, 8, N // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
            fragments = np.ascontiguousarray(fragments).reshape(N // 2, -1, 128)
            if is_kept.any():
                old = np.stack([read(t).reshape(-1, 128)[groups] for read, _ in accumulator])
                fragments += (
                    old if is_kept.all() else np.where(is_kept[:, None], old, np.float32(0))
                )
            if mask is not None:
                some, fragments = fragments, np.zeros((N // 2, t.n // 128, 128), np.float32)
                fragments[:, groups] = some
            for (_, write), values in zip(accumulator, fragments.reshape(N // 2, -1)):
                write(t, values, mask)

        t.wgmma.add(run)

    return issue


_HALVES = (("bf16", "bf16"), ("f16", "f16"))


def _descriptors(t, read, groups):
    values = t.spread(read(t)).reshape(-1, 128)[groups]
    if (values != values[:, :1]).any():
        raise Fault("the threads of a warpgroup have different descriptors of a matrix")
    return values[:, 0].astype(np.int64)


def _chunks(t, descriptors, blocks, rows, is_transposed):
    """Places of the 16-byte chunks of a (rows, 16) matrix: of 8 numbers along K, or along the rows if the matrix
    is transposed. Shape (groups, rows, 2) or (groups, 16, rows / 8)."""
    out = []
    for descriptor, block in zip(descriptors.tolist(), blocks.tolist()):
        start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        span = (16, 128, 64, 32)[descriptor >> 62 & 3]
        if descriptor >> 49 & 7:
            raise Unknown("wgmma descriptors with a base offset")
        if not is_transposed:
            row, chunk = np.arange(rows)[:, None], np.arange(2)
            along = leading if span == 16 else 16
            offsets = row // 8 * stride + row % 8 * span + chunk * along
        else:
            if span == 16:
                raise Unknown("wgmma of a transposed matrix without a swizzle")
            k, row = np.arange(_K)[:, None], np.arange(0, rows, 8)
            offsets = (
                row // (span // 2) * leading
                + row % (span // 2) * 2
                + k // 8 * stride
                + k % 8 * span
            )
        places = swizzled(start + offsets, span)
        out.append(t.shared.chunks(block, places, "wgmma"))
    return np.stack(out)


def _matrix(t, chunks, half, is_transposed):
    """(groups, rows, 16) float32"""
    words = t.shared.view16[chunks]
    numbers = words.reshape(*chunks.shape[:2], -1).view(np.uint16)
    values = decode_half(numbers, half)
    return values.transpose(0, 2, 1) if is_transposed else values


def _a_of_registers(registers, half):
    """Four registers of pairs -> (groups, 64, 16): thread l of warp w has rows 16 w + l // 4 (+ 8 in the odd
    registers) and columns 2 (l % 4), and 8 more in the last two."""
    pairs = np.stack(registers, axis=1)  # (groups, 4, 128)
    numbers = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, 2, 2, 4, 8, 4, 2)
    # (group, columns' half, rows' half, warp, row, pair, which) -> (group, warp, rows' half, row, columns' ...)
    ordered = numbers.transpose(0, 3, 2, 4, 1, 5, 6).reshape(-1, 64, _K)
    return decode_half(np.ascontiguousarray(ordered), half)


def make_mma(parts, operands, code):
    """mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}.{bf16,f16}.f32"""
    shape = ("sync", "aligned", "m16n8k16", "row", "col", "f32")
    if parts[1:7] != shape or parts[7:9] not in _HALVES or parts[9:] != ("f32",):
        raise KeyError(parts)
    half = parts[7]
    writers = [code.write(name) for name in names_of(operands[0])]
    a, b = ([code.read(name, "u32") for name in names_of(operand)] for operand in operands[1:3])
    c = [code.read(name, "f32") for name in names_of(operands[3])]

    def multiply(t, mask):
        whole_warps(t, mask)
        left = np.stack([t.spread(read(t)).view(np.uint32) for read in a]).view(np.uint16)
        # (columns' half, rows' half, warp, row, pair, which) -> (warp, 16, 16)
        left = left.reshape(2, 2, -1, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, _K)
        right = np.stack([t.spread(read(t)).view(np.uint32) for read in b]).view(np.uint16)
        # (rows' half, warp, column, pair, which) -> (warp, 16, 8)
        right = right.reshape(2, -1, 8, 4, 2).transpose(1, 0, 3, 4, 2).reshape(-1, _K, 8)
        old = np.stack([t.spread(read(t)) for read in c])
        product = decode_half(np.ascontiguousarray(left), half) @ decode_half(
            np.ascontiguousarray(right), half
        )
        # (warp, rows' half, row, pair, which) -> a row per register
        fragments = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        for write, values in zip(writers, fragments + old):
            write(t, values, mask)

    return multiply
