"""Which samples of a buffer make the next pack of a stream.

A stream cannot be planned whole: there are some hundred samples to choose from, and the next ones come
when these have left. So a pack has to be full, to cost what packs cost on all ranks, and to leave a
buffer from which the next can be made. The oldest sample is always taken, so none waits for more packs
than there are samples in the buffer.

1. Dear samples (images), in a random order, while their cost above that of as many cheap tokens stays
   below the pack's share; cheap ones (text), in a random order, where they fit.
2. Search: one or none leaves, up to two enter, the best of all such moves, some times. What is small
   is tokens of room times the mean cost of a token, plus how far the cost is from its target.

All is integer arithmetic and a fixed hash, so the same buffer gives the same pack on every machine.
The search looks at some 20,000 pairs a round: 2 to 4 ms a pack on one core.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

from mmpack.types import Int64

_ROUNDS = 8
_CLOSE = 1000  # within a thousandth of the target nothing is left to gain
_PULL = 100  # a pack takes one part in this of what the buffer has too much of, see `choose`
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
        num_tokens, cost, num_patches: (B,) of the samples in the buffer, the oldest first; each fits.
        limits: tokens and patches a pack may hold.
        target: what the pack should cost.
        price: cost of a token of room that is left empty.
        keys: (B,) decide the order samples are tried in.

    Returns:
        Places in the buffer, ascending; 0 is among them.
    """
    pack = _Pack(num_tokens, cost, num_patches, limits, target, price)
    order = np.argsort(keys, kind="stable")
    order = order[order != 0]
    rate = cost // np.maximum(num_tokens, 1)
    cheap = int(np.sort(rate)[len(rate) // 10])
    excess = cost - cheap * num_tokens
    goal = target - cheap * limits[0]
    is_dear = excess * (2 * limits[0]) > num_tokens * max(
        goal, 1
    )  # half of what packs have a token
    pack.add(0)
    left = goal - int(excess[0])
    for place in order[is_dear[order]]:
        if excess[place] <= left and pack.fits(place):
            pack.add(place)
            left -= int(excess[place])
    for place in order[~is_dear[order]]:
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
    """`select` for a pack that costs what packs have cost so far, and a little of what the buffer has
    more; `so_far` are tokens and cost of all samples that have entered it.

    Were the target the buffer's own mean, packs would follow every group of dear rows; were it the
    mean of all, the buffer would in the end hold only dear or only cheap ones.
    """
    capacity, all_tokens, all_cost = limits[0], max(1, so_far[0]), so_far[1]
    held_tokens, held_cost = int(tokens.sum()), int(cost.sum())
    target = all_cost * capacity // all_tokens
    target += (held_cost - all_cost * held_tokens // all_tokens) // _PULL
    if is_ending and held_tokens < 2 * capacity:  # what is left is shared out
        target = held_cost // max(1, -(-held_tokens // capacity))
    price = all_cost // all_tokens
    return select(tokens, cost, patches, limits=limits, target=target, price=price, keys=keys)


def choose_packs(
    num_tokens: Int64, cost: Int64, capacity: int, *, buffer: int = 200, seed: int = 0
) -> Iterator[tuple[list[int], int]]:
    """The packs a stream of samples of these sizes would have, for who has no samples: the samples'
    numbers, and how many were read until the pack came."""
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
    """A pack being made."""

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
        self.room = np.array([*limits, target])  # what is missing to the target may be negative
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
        """Make the best move; False where none is better than staying."""
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
    """A number for every value, random as far as one can see: splitmix64 of value and seed."""
    mixed = np.array(values, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64(seed & (2**64 - 1))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    numbers: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return numbers
