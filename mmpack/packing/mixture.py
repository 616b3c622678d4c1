"""Mixtures: an epoch of several data sets, in given shares, from their sizes alone.

Each source is an endless row of passes over its samples, every pass in another order. An epoch takes the next part
of each row: as many tokens as the source's share of the epoch (or samples, if shares are of samples). So an epoch
is a pure function of seed and epoch, and over any number of epochs all samples of a source are drawn equally
often, up to one. Of an epoch that would need more packs than allowed, the last few that were drawn are left out
(`Mixture.plan`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mmpack.data.limits import MAX_COUNT
from mmpack.errors import integer, is_number
from mmpack.packing.loss_weights import MIX_MARK
from mmpack.packing.pack_stats import share_spread
from mmpack.packing.plan import assigned, quantised
from mmpack.packing.stream_select import hashed
from mmpack.types import Int64, PackPlan

By = Literal["tokens", "samples"]
_CANDIDATES = 256  # packs that the next one is chosen from
_OLDEST = (
    8  # each such pack is the one that waits longest, so that no unusual ones are left for the end
)


@dataclass(frozen=True)
class MixSource:
    """One source of a mixture.

    Attributes:
        name: its name. share: of the epoch's tokens or samples, 0 to 1.
        numbers: (n,) its planned samples' numbers among all samples of the mixture.
        sizes: (n,) what the share is of: tokens of each sample, or ones.
        budget: the sum of sizes that an epoch takes.
    """

    name: str
    share: float
    numbers: Int64
    sizes: Int64
    budget: int

    @property
    def passes(self) -> float:
        """How often an epoch goes through the source."""
        return self.budget / int(self.sizes.sum())

    @property
    def is_whole(self) -> bool:
        """Whether an epoch is a whole number of passes."""
        return self.budget % int(self.sizes.sum()) == 0

    def samples_of(self, epoch: int, seed: int) -> Int64:
        """Numbers of the samples in an epoch, in the order of their passes; a sample that starts in the part of an
        epoch belongs to it."""
        begin, end = epoch * self.budget, (epoch + 1) * self.budget
        total = int(self.sizes.sum())
        parts = []
        for number in range(begin // total, -(-end // total)):
            salt = zlib.crc32(repr((seed, self.name, number)).encode()) << 32
            keys = hashed(range(len(self.numbers)), salt)
            order = np.argsort(keys, kind="stable")
            sizes = self.sizes[order]
            starts = number * total + np.cumsum(sizes) - sizes
            parts.append(self.numbers[order[(begin <= starts) & (starts < end)]])
        return np.concatenate(parts)


@dataclass(frozen=True)
class Mixture:
    """What the epochs of a mixture are made of.

    Attributes:
        sources: see `MixSource`.
        by: what the shares are of.
        union: all samples of the sources, in the packs of their own plans.
        seed: decides orders of passes, and packs.
    """

    sources: tuple[MixSource, ...]
    by: By
    union: PackPlan
    seed: int

    def plan(self, epoch: int, num_packs: int | None = None) -> PackPlan:
        """The packs of an epoch: a sample may be in several of them.

        Args:
            epoch: from 0.
            num_packs: the most packs. An epoch that needs more is cut: the last samples of the sources whose
                epochs are not whole passes are left out of it, of each at most its share of what is cut; the one
                with the most tokens loses at least a sample.
        """
        chosen = [source.samples_of(epoch, self.seed) for source in self.sources]
        while True:
            seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0])
            plan = assigned(replace(self.union, sample_index=np.concatenate(chosen)), seed)
            if num_packs is None or plan.num_packs <= num_packs:
                return self._evenly_ordered(plan, seed)
            chosen = self._shortened(chosen, (plan.num_packs - num_packs) * plan.capacity // 2)

    def _shortened(self, chosen: list[Int64], tokens: int) -> list[Int64]:
        """The samples of an epoch without the last ones of sources that are not whole: of each as many as this
        many tokens are divided among them, rounded down to samples; of the largest rounded up, at least one."""
        partial = [
            n for n, source in enumerate(self.sources) if not source.is_whole and len(chosen[n])
        ]
        if (
            not partial
        ):  # the sizes of whole passes are those of every epoch, and so is their number of packs
            raise ValueError(
                "an epoch of the mixture has more packs than the first; pack its sources again"
            )
        ends = {n: np.cumsum(self.union.num_tokens[chosen[n]][::-1]) for n in partial}
        sizes = {n: int(ends[n][-1]) for n in partial}
        largest = max(partial, key=lambda n: sizes[n])
        kept = list(chosen)
        for n in partial:
            share = tokens * sizes[n] // max(1, sum(sizes.values()))
            count = int(np.searchsorted(ends[n], share, side="right"))
            if n == largest:
                count = int(np.searchsorted(ends[n], max(1, share))) + 1
            kept[n] = chosen[n][: max(0, len(chosen[n]) - count)]
        return kept

    def tokens_of(self, plan: PackPlan) -> Int64:
        """(sources, packs) tokens of each source in each pack."""
        part = np.zeros(len(plan.num_tokens), dtype=np.int64)
        rows = []
        for source in self.sources:
            part[:] = 0
            part[source.numbers] = plan.num_tokens[source.numbers]
            rows.append(plan.totals(part))
        return np.stack(rows)

    def _evenly_ordered(self, plan: PackPlan, seed: int) -> PackPlan:
        """The plan with its packs in an order in which the sources' shares are the same everywhere."""
        order = even_order(self.tokens_of(plan), seed)
        offsets = plan.bin_offsets
        lengths = np.diff(offsets)[order]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return replace(
            plan,
            sample_index=plan.sample_index[np.repeat(offsets[order], lengths) + within],
            bin_offsets=np.cumsum([0, *lengths]),
            pack_tokens=plan.pack_tokens[order],
        )

    def report(self, plan: PackPlan) -> list[dict[str, Any]]:
        """For each source: its share of tokens as asked or as it follows (`share`), samples, passes, and
        percentiles `p10`, `p50`, `p90` of its share of a pack."""
        lines = []
        for source in self.sources:
            tokens = np.zeros_like(plan.num_tokens)
            tokens[source.numbers] = plan.num_tokens[source.numbers]
            is_own = np.isin(plan.sample_index, source.numbers)
            lines.append(
                {
                    "name": source.name,
                    "asked": round(source.share, 6),
                    "by": self.by,
                    "samples": len(source.numbers),
                    "drawn": int(is_own.sum()),
                    "passes": round(source.passes, 4),
                    "tokens": int(tokens[plan.sample_index].sum()),
                    **share_spread(plan, tokens),
                }
            )
        return lines


def even_order(tokens: Int64, seed: int) -> Int64:
    """Order packs so that the shares of their sources are the same in every part of an epoch.

    From packs in hashed order, the next one is that of 256 with which all so far are closest to the epoch's
    shares; every eighth is the one that waits longest.

    Args:
        tokens: (sources, packs) tokens of each source in each pack.

    Returns:
        (packs,) numbers of the packs.
    """
    num_packs = tokens.shape[1]
    by_hash = np.argsort(hashed(range(num_packs), seed), kind="stable")
    if num_packs == 0 or len(tokens) == 1:
        return by_hash
    values = tokens[:, by_hash].T
    # Excess tokens of each source, in units of 1 / all tokens: exact in integers would overflow, but each is
    # rounded once, and sums are kept small by the choice.
    whole = int(values.sum())
    excess = np.rint(values - values.sum(axis=1, keepdims=True) * (values.sum(axis=0) / whole))
    waiting = np.arange(min(_CANDIDATES, num_packs))
    candidates, sums = excess[waiting], np.zeros(len(tokens))
    order, next_one = [], len(waiting)
    for number in range(num_packs):
        if number % _OLDEST == _OLDEST - 1:
            place = int(waiting.argmin())
        else:
            place = int(np.square(candidates + sums).sum(axis=1).argmin())
        sums += candidates[place]
        order.append(int(waiting[place]))
        if next_one < num_packs:
            waiting[place], candidates[place] = next_one, excess[next_one]
            next_one += 1
        else:
            waiting = np.delete(waiting, place)
            candidates = np.delete(candidates, place, axis=0)
    return by_hash[order]


def mixture_of(
    plans: Mapping[str, tuple[PackPlan, float]],
    costs: NDArray[Any] | None,
    by: By,
    epoch_tokens: int | None,
    seed: int,
) -> Mixture:
    """Put the samples of several plans into one mixture.

    Args:
        plans: name -> (plan, weight). The plans have the same capacities.
        costs: (N,) cost of each sample of all plans, or None.
        by: whether weights are shares of tokens or of samples.
        epoch_tokens: tokens of an epoch; None: as many as make the source with the most tokens (or samples) per
            weight occur once.

    Raises:
        ValueError: a weight is not a positive number, or an epoch is too short or too long.
    """
    if by not in get_args(By):
        raise ValueError(f"--mix-by (by) must be 'tokens' or 'samples', got {by!r}")
    seed = integer(seed, "seed")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    check_weights({name: weight for name, (_, weight) in plans.items()})
    first = next(iter(plans.values()))[0]
    if epoch_tokens is not None:
        epoch_tokens = integer(epoch_tokens, "--epoch-tokens (epoch_tokens)")
    if epoch_tokens is not None and epoch_tokens < first.capacity:
        raise ValueError(
            f"--epoch-tokens (epoch_tokens) must be at least the tokens of a pack, {first.capacity:,}, got "
            f"{epoch_tokens:,}"
        )
    weights = [Fraction(float(weight)) for _, weight in plans.values()]
    shares = [weight / sum(weights) for weight in weights]
    offset, found = 0, []
    for name, (plan, _) in plans.items():
        numbers = np.sort(plan.sample_index)
        tokens = plan.num_tokens[numbers]
        if not tokens.sum():
            raise ValueError(f"the source {name!r} of a mixture has no tokens in its packs")
        found.append((name, numbers + offset, tokens if by == "tokens" else np.ones_like(tokens)))
        offset += len(plan.num_tokens)
    totals = [int(sizes.sum()) for _, _, sizes in found]
    whole = max(Fraction(total) / share for total, share in zip(totals, shares))
    if epoch_tokens is not None:
        per_unit = [
            Fraction(int(plan.num_tokens[np.sort(plan.sample_index)].sum()), total)
            for (plan, _), total in zip(plans.values(), totals)
        ]
        whole = Fraction(epoch_tokens) / sum(
            (share * one for share, one in zip(shares, per_unit)), Fraction()
        )
    budgets = [max(1, round(share * whole)) for share in shares]
    sources = tuple(
        MixSource(*one, budget=budget)
        for one, budget in zip(
            (
                (name, float(share), numbers, sizes)
                for (name, numbers, sizes), share in zip(found, shares)
            ),
            budgets,
        )
    )
    drawn = [one.budget * len(one.numbers) // int(one.sizes.sum()) for one in sources]
    if sum(drawn) > MAX_COUNT:
        most = sources[drawn.index(max(drawn))].name
        raise ValueError(
            f"an epoch of the mixture has more than {MAX_COUNT:,} samples; give {most!r} a smaller share of --mix "
            "(sources), or pass a smaller --epoch-tokens (epoch_tokens)"
        )
    union = union_of([plan for plan, _ in plans.values()])
    union = replace(union, cost=None if costs is None else _epoch_costs(costs, sources), seed=seed)
    mixture = Mixture(sources, by, union, seed)
    if not any(len(source.samples_of(0, seed)) for source in sources):
        raise ValueError(
            "an epoch of the mixture has no samples; raise --epoch-tokens (epoch_tokens)"
        )
    return mixture


def union_of(plans: Sequence[PackPlan]) -> PackPlan:
    """The packs of several plans, one plan after the other, without costs. The plans have the same capacities."""
    first = plans[0]
    starts = np.cumsum([0, *(len(plan.num_tokens) for plan in plans)])
    counts = np.concatenate([np.diff(plan.bin_offsets) for plan in plans])
    patches = [plan.num_patches for plan in plans if plan.num_patches is not None]

    def numbers(name: str) -> Int64:
        return np.concatenate([getattr(plan, name) + start for plan, start in zip(plans, starts)])

    return PackPlan(
        sample_index=numbers("sample_index"),
        bin_offsets=np.cumsum([0, *counts]),
        pack_tokens=np.concatenate([plan.pack_tokens for plan in plans]),
        capacity=first.capacity,
        patch_capacity=first.patch_capacity,
        dropped=numbers("dropped"),
        truncated=numbers("truncated"),
        num_tokens=np.concatenate([plan.num_tokens for plan in plans]),
        num_patches=np.concatenate(patches) if patches else None,
        cost=None,
        seed=first.seed,
        unused=numbers("unused"),
    )


def _epoch_costs(costs: NDArray[Any], sources: Sequence[MixSource]) -> Int64:
    """Costs as integers whose sum over an epoch is about 2^52."""
    total = sum(source.passes * math.fsum(costs[source.numbers]) for source in sources)
    return quantised(costs, len(costs), total)


def check_pairs(sources: Any) -> None:
    """
    Raises:
        ValueError: they are not name -> (source, weight), or see `check_weights`.
    """
    if not isinstance(sources, Mapping):
        raise ValueError(
            f"a mixture is a dict, name -> (source, weight), got a {type(sources).__name__}"
        )
    for name, one in sources.items():
        if not (isinstance(one, (tuple, list)) and len(one) == 2):
            raise ValueError(
                f"the source {name!r} of a mixture must be (source, weight), got a {type(one).__name__}"
            )
    check_weights({name: weight for name, (_, weight) in sources.items()})


def check_weights(weights: Mapping[str, float]) -> None:
    """
    Raises:
        ValueError: there are none, a name is not usable, or a weight is not a positive number.
    """
    if not weights:
        raise ValueError("a mixture needs at least one source")
    for name, weight in weights.items():
        if not isinstance(name, str) or not name or MIX_MARK in f"{name}:":
            raise ValueError(
                f"a source's name must be a text without {MIX_MARK}, also not ending with :, got {name!r}"
            )
        if not is_number(weight) or not (0 < weight < math.inf):
            raise ValueError(
                f"--mix (sources): the weight of {name!r} is {weight!r}, not a positive number; to leave a source "
                "out, leave it out of the data"
            )


def check_alike(sources: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Args:
        sources: name -> settings. A setting that a source does not have is not known of it.

    Raises:
        ValueError: two sources differ in a setting; names the settings with both values.
    """
    first: dict[str, str] = {}  # the first source that has a setting
    for name, settings in sources.items():
        differ = [
            one
            for one, value in settings.items()
            if sources[first.setdefault(one, name)][one] != value
        ]
        if differ:
            other = first[differ[0]]
            same = [one for one in differ if first[one] == other]
            listed = ", ".join(
                one
                if one == "the tokenizer"
                else f"{one} {sources[other][one]} and {settings[one]}"
                for one in same[:4]  # a tokenizer's value is a checksum
            )
            raise ValueError(
                f"the sources {other!r} and {name!r} of a mixture were not packed alike, they differ in {listed}; "
                "pack one of them again as the other"
            )
