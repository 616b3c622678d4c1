"""Instructions of a warp: shuffles, votes, reductions, and matrices of 8 x 8 between registers and shared memory.

All 32 threads of a warp take part, or none.
"""

from __future__ import annotations

import numpy as np

from ptx.faults import Fault
from ptx.parser import names_of


def whole_warps(t, mask):
    """Numbers of the warps in which all threads are in `mask`; Fault if some warp is there in part."""
    if mask is None:
        return np.arange(t.n // 32)
    inside = mask.reshape(-1, 32)
    if (inside.any(1) != inside.all(1)).any():
        raise Fault("a part of a warp executes what its threads must execute together")
    return np.flatnonzero(inside.all(1))


def make_shfl(parts, operands, code):
    sync, mode, kind = parts[1:]
    target, _, found = operands[0].partition("|")
    write, write_found = code.write(target), code.write(found) if found else None
    value, by, clamp = (code.read(operand, "u32") for operand in operands[1:4])
    if sync != "sync" or kind != "b32" or mode not in ("bfly", "up", "down", "idx"):
        raise KeyError(parts)

    def shuffle(t, mask):
        whole_warps(t, mask)
        values = t.spread(value(t)).view(np.uint32).reshape(-1, 32)
        step, limits = (t.spread(x(t)).reshape(-1, 32).astype(np.int64) for x in (by, clamp))
        lane, segment = np.arange(32)[None, :], limits >> 8 & 31
        low = lane & segment
        high = low | (limits & 31 & ~segment)
        step = step & 31
        if mode == "bfly":
            source = lane ^ step
        elif mode == "idx":
            source = low | (step & ~segment)
        else:
            source = lane - step if mode == "up" else lane + step
        is_inside = source >= high if mode == "up" else source <= high
        source = np.where(is_inside, source, lane)
        write(t, np.take_along_axis(values, source, 1).reshape(-1), mask)
        if write_found:
            write_found(t, is_inside.reshape(-1), mask)

    return shuffle


def make_elect(parts, operands, code):
    target, _, is_leader = operands[0].partition("|")
    write, write_leader = code.write(target), code.write(is_leader)

    def elect(t, mask):
        whole_warps(t, mask)
        write(t, np.zeros(t.n, np.uint32), mask)
        write_leader(t, t.lane == 0, mask)

    return elect


def make_redux(parts, operands, code):
    reduce = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
    }[parts[2]]
    write, value = code.write(operands[0]), code.read(operands[1], parts[3])

    def reduction(t, mask):
        whole_warps(t, mask)
        values = t.spread(value(t)).reshape(-1, 32)
        write(t, np.repeat(reduce.reduce(values, axis=1, dtype=values.dtype), 32), mask)

    return reduction


def make_vote(parts, operands, code):
    sync, how, kind = parts[1:]
    is_negated = operands[1].startswith("!")
    write, value = code.write(operands[0]), code.read(operands[1].lstrip("!"), "pred")
    result = {
        "any": lambda votes: votes.any(1),
        "all": lambda votes: votes.all(1),
        "ballot": lambda votes: (votes << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32),
    }[how]

    def vote(t, mask):
        whole_warps(t, mask)
        votes = t.spread(value(t)).reshape(-1, 32) != is_negated
        write(t, np.repeat(result(votes), 32), mask)

    return vote


def make_matrix(parts, operands, code):
    """ldmatrix and stmatrix of 1, 2 or 4 matrices of 16-bit numbers. Thread l of a warp has row l // 4, columns
    2 (l % 4) and 2 (l % 4) + 1 of each; the first 8 threads have the first one's row addresses, and so on."""
    is_load, is_transposed = parts[0] == "ldmatrix", "trans" in parts
    if not set(parts[1:]) <= {
        "sync",
        "aligned",
        "m8n8",
        "x1",
        "x2",
        "x4",
        "trans",
        "shared",
        "shared::cta",
        "b16",
    }:
        raise KeyError(parts)
    count = next(int(part[1:]) for part in parts if part in ("x1", "x2", "x4"))
    registers, place = operands if is_load else reversed(operands)
    names, address = names_of(registers), code.address(place)

    def lanes_and_addresses(t, mask):
        warps = whole_warps(t, mask)
        lanes = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        return warps, lanes, address(t)[lanes]

    if is_load:
        writers = [code.write(name) for name in names]

        def load(t, mask):
            warps, lanes, addresses = lanes_and_addresses(t, mask)
            words = t.shared.load(t, lanes, addresses, 16)
            matrices = words.view(np.uint16).reshape(len(warps), count, 8, 8)
            if is_transposed:
                matrices = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2))
            pairs = matrices.reshape(len(warps), count, 64).view(np.uint32)
            for number, write in enumerate(writers):
                out = np.zeros((t.n // 32, 32), np.uint32)
                out[warps] = pairs[:, number]
                write(t, out.reshape(-1), mask)

        return load
    readers = [code.read(name, "u32") for name in names]

    def store(t, mask):
        warps, lanes, addresses = lanes_and_addresses(t, mask)
        pairs = [t.spread(read(t)).reshape(-1, 32)[warps] for read in readers]
        matrices = np.stack(pairs, axis=1).view(np.uint16).reshape(len(warps), count, 8, 8)
        if is_transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(matrices).view(np.uint64).reshape(-1, 2)
        t.shared.store(t, lanes, addresses, words, 16)

    return store


WARP_STEPS = {
    "shfl": make_shfl,
    "elect": make_elect,
    "redux": make_redux,
    "vote": make_vote,
    "ldmatrix": make_matrix,
    "stmatrix": make_matrix,
}
