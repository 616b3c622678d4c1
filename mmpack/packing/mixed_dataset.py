"""MixedDataset: packs of a mixture, see `PackedDataset.mixed`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmpack.errors import MAX_BAD, integer
from mmpack.packing.cost import costs_of, sizes_of
from mmpack.packing.dataset import PackedDataset
from mmpack.packing.mixed_samples import MixedSamples
from mmpack.packing.mixture import By, check_alike, check_pairs, check_weights, mixture_of, union_of
from mmpack.packing.plan import quantised
from mmpack.packing.split_documents import unsplit
from mmpack.packing.stream import PackStream
from mmpack.packing.truncate import truncate_sample
from mmpack.types import PackPlan

_log = logging.getLogger(__name__)
_TEXT_SETTINGS = ("the tokenizer", "typed_tokens", "template_args")


class MixedDataset(PackedDataset):
    """Packs of a mixture; made by `PackedDataset.mixed`.

    An epoch is planned once, when `set_epoch` is called; workers find its plan in shared memory. Every epoch has
    as many packs as the first; if an epoch needs fewer, the last are empty.

    Attributes:
        mixture: the sources, and what an epoch takes of each.
    """

    samples: MixedSamples

    def __init__(
        self,
        sources: Mapping[str, tuple[PackedDataset | str | os.PathLike[str], float]],
        cost: Any = None,
        *,
        by: By = "tokens",
        epoch_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        check_pairs(sources)
        opened = {name: (_opened(source), weight) for name, (source, weight) in sources.items()}
        _check({name: one for name, (one, _) in opened.items()})
        samples = MixedSamples({name: one.samples for name, (one, _) in opened.items()})
        plans = {name: (_by_samples(one), weight) for name, (one, weight) in opened.items()}
        grouped = [name for name, (one, _) in opened.items() if one.plan.unit is not None]
        if grouped:
            _log.warning(
                f"packed with --group-images (group_images): {', '.join(grouped)}; a mixture plans each row by "
                "itself, so rows of one image are not kept together"
            )
        if isinstance(cost, Mapping) or hasattr(cost, "model_type"):
            cost = costs_of_sources([one for one, _ in opened.values()], cost)
        if cost is not None:
            quantised(cost, len(samples))  # refuses what is no cost
        costs = None if cost is None else np.asarray(cost)
        self.mixture = mixture_of(plans, costs, by, epoch_tokens, seed)
        super().__init__(samples, self.mixture.plan(0))
        self._of_sources = {name: one.fingerprint() for name, (one, _) in opened.items()}
        self._media_of = {name: one._media for name, (one, _) in opened.items()}
        most = sum(
            (int(source.passes) + 2) * len(source.numbers) for source in self.mixture.sources
        )
        # of the epoch planned last: number, samples, packs; offsets; samples
        self._shared = torch.zeros(3 + self.plan.num_packs + 1 + most, dtype=torch.int64)
        self._shared.share_memory_()
        self._publish(0, self.plan)

    def epoch_plan(self, epoch: int) -> PackPlan:
        """The plan of an epoch; a pure function of the sources, the seed and the epoch. It has at most
        `plan.num_packs` packs, and the samples of a source may be in several."""
        epoch = integer(epoch, "epoch")
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        return self.plan if epoch == 0 else self.mixture.plan(epoch, self.plan.num_packs)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose packs items come from, also in running workers, and plan it."""
        if epoch != int(self._shared[0]):
            self._publish(epoch, self.epoch_plan(epoch))
        super().set_epoch(epoch)

    def _publish(self, epoch: int, plan: PackPlan) -> None:
        values = (plan.bin_offsets, plan.sample_index)
        flat = torch.from_numpy(np.concatenate(values))
        self._shared[3 : 3 + len(flat)] = flat
        self._shared[:3] = torch.tensor([epoch, len(plan.sample_index), plan.num_packs])
        self._planned = (epoch, plan)

    def _current_plan(self, epoch: int) -> PackPlan:
        values = self._shared.numpy()
        planned, num_samples, num_packs = values[:3].tolist()
        if planned != epoch:  # an epoch that was set in another way
            return self.epoch_plan(epoch)
        offsets, index = np.split(values[3:][: num_packs + 1 + num_samples].copy(), [num_packs + 1])
        plan = replace(self.plan, sample_index=index, bin_offsets=offsets)
        return replace(plan, pack_tokens=plan.totals(plan.num_tokens))

    def report(self) -> list[dict[str, Any]]:
        """The sources in epoch 0, for JSON: name, share that was asked, samples, samples drawn, passes, tokens,
        share of all tokens, and percentiles of the share per pack."""
        return self.mixture.report(self.plan)

    def fingerprint(self) -> dict[str, Any]:
        """As of any `PackedDataset`; names the mixture, too."""
        parts = {
            f"{name} of {source}": value
            for source, found in self._of_sources.items()
            for name, value in found.items()
            if name.startswith("checksum of")
        }
        mixture = self.mixture
        return {
            "mixture": {source.name: source.share for source in mixture.sources},
            "shares of": mixture.by,
            "epoch": {source.name: source.budget for source in mixture.sources},
            **super().fingerprint(),
            **parts,
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Refuse: a mixture is not stored, because it is planned in a moment from the stores of its sources."""
        raise ValueError(
            "a mixture has no store of its own; save its sources, and mix them when training"
        )


def _opened(source: PackedDataset | str | os.PathLike[str]) -> PackedDataset:
    if isinstance(source, PackStream):
        raise ValueError(
            "a PackStream cannot be mixed, because its sizes are not known; mix its rows: "
            "PackStream({name: (rows, weight), ...}, ...), or pack them with mmpack pack"
        )
    return source if isinstance(source, PackedDataset) else PackedDataset.from_store(source)


def _by_samples(source: PackedDataset) -> PackPlan:
    """The plan of a source without units, with the patches of every sample by itself."""
    plan, patches = source.plan, source.plan.num_patches
    if plan.unit is not None and patches is not None:
        alone = sizes_of(source.samples)[1]
        alone[plan.truncated] = patches[plan.truncated]
        patches = alone
    return replace(plan, unit=None, num_patches=patches)


def joined(sources: Mapping[str, PackedDataset]) -> PackedDataset:
    """The packs of several data sets, one set after the other, for evaluation.

    Raises:
        ValueError: they were not packed alike; names the difference.
    """
    _check(sources)
    samples = MixedSamples({name: one.samples for name, one in sources.items()})
    dataset = PackedDataset(samples, union_of([_by_samples(one) for one in sources.values()]))
    dataset._media_of = {name: one._media for name, one in sources.items()}
    return dataset


def _check(sources: Mapping[str, PackedDataset]) -> None:
    """
    Raises:
        ValueError: there are no sources, a name is not usable, sources were not packed alike, or one has options
            that are the mixture's.
    """
    check_weights(dict.fromkeys(sources, 1))
    for name, one in sources.items():
        if isinstance(one, MixedDataset):
            raise ValueError(f"the source {name!r} is a mixture itself; mix its sources instead")
        if not len(one.samples):
            raise ValueError(f"the source {name!r} of a mixture has no samples")
        usual = {"source_weights": {}, "on_bad_image": "raise", "max_bad": MAX_BAD}
        for option, value in usual.items():
            if (found := getattr(one, option)) != value:
                raise ValueError(
                    f"the source {name!r} of a mixture has {option} {found!r}, which the mixture would not use; "
                    "set it on the mixture"
                )
    check_alike({name: _settings(one) for name, one in sources.items()})


def text_settings(dataset: PackedDataset) -> dict[str, Any]:
    """What its text was encoded with, as far as it is recorded; sources of a mixture have that in common."""
    samples: Any = dataset.samples
    parts = samples.parts.values() if isinstance(samples, MixedSamples) else [samples]
    store: Any = unsplit(next(iter(parts)))
    made_from = store.about.made_from if hasattr(store, "about") else {}
    return {name: made_from[name] for name in _TEXT_SETTINGS if name in made_from}


def _settings(dataset: PackedDataset) -> dict[str, Any]:
    """What sources must have in common."""
    text = text_settings(dataset)
    capacities = {
        "--capacity": dataset.capacity,
        "--patch-capacity": dataset.plan.patch_capacity,
    }
    spec = json.loads(json.dumps(asdict(dataset.vision)))
    return {**capacities, **{f"the spec's {name}": value for name, value in spec.items()}, **text}


def costs_of_sources(
    datasets: Sequence[PackedDataset], config: Any, frozen: Collection[str] = ()
) -> NDArray[Any]:
    """(N,) FLOPs of the samples of several data sets, as `costs_of`; of those that a plan cuts, as they are
    cut."""
    found = []
    for one in datasets:
        costs, plan = costs_of(one.samples, config, frozen), one.plan
        if cut := plan.truncated.tolist():
            limits = (plan.capacity, plan.patch_capacity)
            short = [truncate_sample(one.samples[number], *limits) for number in cut]
            costs[cut] = costs_of(short, config, frozen)
        found.append(costs)
    return np.concatenate(found)
