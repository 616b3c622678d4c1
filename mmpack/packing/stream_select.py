"""Selects the samples of a stream's next pack from its buffer.

A stream cannot be planned as a whole: there are a few hundred samples to choose from, and more arrive only as
these leave. So a pack must be full, cost the same as packs on all ranks, and leave a buffer from which the next
pack can be made. The oldest sample is always taken, so no sample waits for more packs than the buffer has samples.

1. Add costly samples (images) in random order, while their cost above that of the same number of cheap tokens
   stays below the pack's share; then cheap samples (text) in random order, if they fit.
2. Search: a move removes at most one sample and adds up to two; make the best of all moves, up to 8 times. The
   objective is unused tokens times the mean cost per token, plus the distance of the cost from its target.

Arithmetic is in integers, with a fixed hash, so the same buffer gives the same pack on every machine. The search
examines about 20,000 pairs per round: 2 to 4 ms per pack on one core.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

from mmpack.types import Int64

_ROUNDS = 8
_CLOSE = 1000  # stop within 1/1000 of the target
_PULL = 100  # a pack corrects 1/100 of the buffer's excess cost, see `choose`
_MAX = np.iinfo(np.int64).max


def select(
    num_tokens: Int64,
    cost: Int64,
    num_patches: Int64,
    *,
    limits: tuple[int, int],
    target: int,
    price: int,
    keys: NDArray[np.uint64],
) -> list[int]:
    """Choose the samples of a pack.

    Args:
        num_tokens, cost, num_patches: (B,) of the samples in the buffer, oldest first; each fits a pack.
        limits: maximum tokens and patches per pack.
        target: the pack's target cost.
        price: cost of an unused token.
        keys: (B,) random keys that order the samples.

    Returns:
        Indices into the buffer, ascending, including 0.
    """
    pack = _Pack(num_tokens, cost, num_patches, limits, target, price)
    order = np.argsort(keys, kind="stable")
    order = order[order != 0]
    rate = cost // np.maximum(num_tokens, 1)
    cheap = int(np.sort(rate)[len(rate) // 10])
    excess = cost - cheap * num_tokens
    goal = target - cheap * limits[0]
    # more than half of a pack's excess cost per token
    is_costly = excess * (2 * limits[0]) > num_tokens * max(goal, 1)
    pack.add(0)
    left = goal - int(excess[0])
    for place in order[is_costly[order]]:
        if excess[place] <= left and pack.fits(place):
            pack.add(place)
            left -= int(excess[place])
    for place in order[~is_costly[order]]:
        if pack.fits(place):
            pack.add(place)
    for _ in range(_ROUNDS):
        if not pack.improve():
            break
    return [int(place) for place in np.flatnonzero(pack.inside)]


def choose(
    tokens: Int64,
    cost: Int64,
    patches: Int64,
    limits: tuple[int, int],
    so_far: tuple[int, int],
    keys: NDArray[np.uint64],
    is_ending: bool,
) -> list[int]:
    """Call `select` with the mean cost of packs so far as target, plus a small part of the buffer's excess cost.
    `so_far` is (tokens, cost) of all samples that have entered the buffer.

    If the target were the buffer's mean, pack costs would follow every group of costly rows. If it were only the
    mean so far, the buffer would fill up with only costly or only cheap samples.
    """
    capacity, all_tokens, all_cost = limits[0], max(1, so_far[0]), so_far[1]
    held_tokens, held_cost = int(tokens.sum()), int(cost.sum())
    target = all_cost * capacity // all_tokens
    target += (held_cost - all_cost * held_tokens // all_tokens) // _PULL
    if is_ending and held_tokens < 2 * capacity:  # spread the rest over the last packs
        target = held_cost // max(1, -(-held_tokens // capacity))
    price = all_cost // all_tokens
    return select(tokens, cost, patches, limits=limits, target=target, price=price, keys=keys)


def choose_packs(
    num_tokens: Int64, cost: Int64, capacity: int, *, buffer: int = 200, seed: int = 0
) -> Iterator[tuple[list[int], int]]:
    """Simulate a stream from sizes alone; yields (sample indices, samples read so far) per pack."""
    held: list[int] = []
    tokens = spent = read = 0
    for number in count():
        while len(held) < buffer and read < len(num_tokens):
            tokens += int(num_tokens[read])
            spent += int(cost[read])
            held.append(read)
            read += 1
        if not held:
            return
        sizes = num_tokens[held], cost[held], np.zeros(len(held), dtype=np.int64)
        keys = hashed(held, (seed << 32) + number)
        is_ending = len(held) < buffer
        chosen = choose(*sizes, (capacity, 1), (tokens, spent), keys, is_ending)
        yield [held[place] for place in chosen], read
        taken = set(chosen)
        held = [n for place, n in enumerate(held) if place not in taken]


class _Pack:
    """A pack under construction."""

    def __init__(
        self,
        num_tokens: Int64,
        cost: Int64,
        num_patches: Int64,
        limits: tuple[int, int],
        target: int,
        price: int,
    ) -> None:
        self.sizes = np.stack([num_tokens, num_patches, cost])  # (3, B)
        self.room = np.array(
            [*limits, target]
        )  # tokens, patches, cost left; the last may be negative
        self.price = price
        self.target = target
        self.inside = np.zeros(len(cost), dtype=bool)

    def fits(self, place: int) -> bool:
        tokens, patches, _ = self.sizes[:, place]
        return bool(tokens <= self.room[0] and patches <= self.room[1])

    def add(self, place: int) -> None:
        self.inside[place] = True
        self.room -= self.sizes[:, place]

    def improve(self) -> bool:
        """Make the best move; False if no move is an improvement."""
        now = self.price * int(self.room[0]) + abs(int(self.room[2]))
        outside = np.flatnonzero(~self.inside)
        if now * _CLOSE < self.target or not len(outside):
            return False
        leaving = np.flatnonzero(self.inside)[1:]  # the oldest stays
        first, second = np.triu_indices(len(outside), 1)
        of = self.sizes[:, outside]
        none = np.zeros((3, 1), dtype=np.int64)
        out = np.concatenate([none, self.sizes[:, leaving]], axis=1)[:, :, None]
        entering = np.concatenate([none, of, of[:, first] + of[:, second]], axis=1)[:, None]
        room = self.room[:, None, None] + out - entering  # (3, leave, enter)
        value = self.price * room[0] + np.abs(room[2])
        value[(room[0] < 0) | (room[1] < 0)] = _MAX
        best = int(value.argmin())
        leave, enter = divmod(best, value.shape[1])
        if value[leave, enter] >= now:
            return False
        self.room = room[:, leave, enter].copy()
        if leave:
            self.inside[leaving[leave - 1]] = False
        if enter > len(outside):
            pair = enter - len(outside) - 1
            self.inside[outside[[first[pair], second[pair]]]] = True
        elif enter:
            self.inside[outside[enter - 1]] = True
        return True


def hashed(values: Sequence[int], seed: int) -> NDArray[np.uint64]:
    """A pseudo-random number per value: splitmix64 of value and seed."""
    mixed = np.array(values, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64(seed & (2**64 - 1))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    numbers: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return numbers
