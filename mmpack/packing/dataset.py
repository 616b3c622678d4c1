"""PackedDataset: a map-style data set whose items are packs.

Item i is the samples of pack i of the epoch's plan; the collator opens their images and assembles them, in a
DataLoader worker where there are any. Map-style on purpose: accelerate shards the items, and resuming skips
them. Every epoch has as many packs, of other samples; its number lies in shared memory, because workers that
live on hear of nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from mmpack.data.encoder import Encoder
from mmpack.data.readers import media_folders
from mmpack.errors import counting
from mmpack.packing.cost import sizes_of
from mmpack.packing.overflow import OnOverflow
from mmpack.packing.pack_samples import PackSamples
from mmpack.packing.pack_source import PackSource
from mmpack.packing.plan import plan_epoch, plan_samples
from mmpack.packing.split_documents import SplitSamples, split_samples
from mmpack.packing.truncate import truncate_sample
from mmpack.types import IGNORE, EncodedSample, ImageRef, Media, PackPlan, Sample
from mmpack.vision_spec import VisionSpec

_log = logging.getLogger(__name__)


class PackedDataset(PackSource, Dataset[PackSamples]):
    """Packs of encoded samples, by index: an item is the samples of one pack, for `PackCollator`.

    Train with `per_device_train_batch_size=1`: one item is one full row.

    Attributes:
        samples: the encoded samples, a list or an `EncodedStore`.
        plan: which of them share a pack in epoch 0.
        capacity: tokens a pack may hold.
        num_empty: empty packs at the end, see `append_empty_packs`.
        on_bad_image: what becomes of a sample whose image cannot be decoded any more when its pack is
            made. "raise", the default: an error that names file and row, out of a DataLoader worker
            too. "drop": its segment leaves the pack, with a warning in the log, and is counted.
        max_bad: most of them, as a share of the samples with images or videos, 0.05 by default. From 1,000
            samples on, more are an error that counts the reasons.
        media_folders: the folders that files of images and videos must lie in when they are opened, links
            followed; None: anywhere. `from_store` and `from_files` set those the rows were read with.
    """

    def __init__(self, samples: Sequence[EncodedSample], plan: PackPlan) -> None:
        super().__init__()
        self.samples = samples
        self.plan = plan
        self.capacity = plan.capacity
        self.num_empty = 0
        self._truncated = set(plan.truncated.tolist())
        self._patch_capacity = plan.patch_capacity
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._planned = (0, plan)  # epoch, plan

    @classmethod
    def from_samples(
        cls,
        samples: Sequence[EncodedSample],
        capacity: int,
        cost: Any = None,
        *,
        patch_capacity: int | None = None,
        on_overflow: OnOverflow = "error",
        seed: int = 0,
    ) -> PackedDataset:
        """Plan the samples into packs of at most `capacity` tokens (and `patch_capacity` patches).

        With `cost` packs are planned to cost the same too, so that data-parallel ranks do not wait
        for each other: the config of the model to train, or (N,) numbers (`costs_of`, where parts of
        the model are frozen).

        `on_overflow` says what becomes of a longer sample: "error"; "drop", listed in
        `plan.dropped`; "truncate", cut by `truncate_sample` and listed in `plan.truncated`, or
        dropped if the cut takes its whole answer; "split", for documents: in pieces that `samples`
        then holds, see `mmpack.packing.split_documents`.

        Raises:
            ValueError: a sample is too long and `on_overflow` is "error", or an image is too large to
                split around; names file and row.
        """
        if on_overflow == "split":
            samples, on_overflow = split_samples(samples, capacity, patch_capacity), "error"
        return cls(
            samples, plan_samples(samples, capacity, patch_capacity, on_overflow, seed, cost)
        )

    @classmethod
    def from_files(
        cls,
        data: Any,
        encoder: Any,
        capacity: int,
        cost: Any = None,
        *,
        patch_capacity: int | None = None,
        on_overflow: OnOverflow = "error",
        seed: int = 0,
    ) -> PackedDataset:
        """Read, encode and plan data files, in memory.

        Args:
            data: a file, a folder, several, or rows, as `Encoder.read` takes them; or `Sample`s.
            encoder: an `Encoder`, or a transformers Qwen-VL processor.
            capacity: tokens a pack may hold.
            cost: the model's config, for packs that cost the same; see `from_samples`.
            patch_capacity, on_overflow, seed: see `from_samples`.

        Raises:
            ValueError: a row that cannot be used and the encoder's `on_error` is "raise"; names file and row.
                Or too many were skipped.
        """
        encoder = Encoder.of(encoder, cost)
        encoder = replace(encoder, on_error=counting(encoder.on_error))  # one count of bad rows
        given = data if isinstance(data, (str, os.PathLike)) else list(data)
        folders = None
        if isinstance(given, list) and given and isinstance(given[0], Sample):
            samples = iter(given)
        else:
            groups = list(encoder.groups(given))
            samples, folders = encoder.read_groups(groups), media_folders(groups)
        dataset = cls.from_samples(
            list(encoder.encode(samples)),
            capacity,
            cost,
            patch_capacity=patch_capacity,
            on_overflow=on_overflow,
            seed=seed,
        )
        dataset.media_folders = folders
        return dataset

    @classmethod
    def from_store(
        cls,
        folder: str | os.PathLike[str],
        on_changed_data: Literal["raise", "warn"] = "raise",
    ) -> PackedDataset:
        """Open what `mmpack pack --out FOLDER` wrote.

        Args:
            folder: the store.
            on_changed_data: the data files that it was made from have changed since: "raise", or
                "warn" in the log and give the samples as they were. Files that are gone are not missed.

        Raises:
            ValueError: no store there, one that is damaged or a part of one, or changed data.
        """
        from mmpack.store.encoded_store import (  # here: only stores need Arrow
            EncodedStore,
            changed_files,
            open_store,
        )
        from mmpack.store.plan_file import load_plan

        if on_changed_data not in ("raise", "warn"):
            raise ValueError(f"on_changed_data must be 'raise' or 'warn', got {on_changed_data!r}")
        store = open_store(folder)
        if changed := changed_files(store):
            text = f"{' and '.join(changed[:4])} changed since {folder} was packed"
            if on_changed_data == "raise":
                raise ValueError(
                    f"{text} ({len(changed)} of {len(store.about.files)} data files); pack again with "
                    "--overwrite, or train on the rows as they were with --on-changed-data warn "
                    "(on_changed_data='warn')"
                )
            _log.warning("%s; its samples are the rows as they were", text)
        samples: EncodedStore | SplitSamples = store
        if store.about.part is not None:
            raise ValueError(
                f"{folder} is part {store.about.part} of a store; join all with mmpack merge"
            )
        if not (Path(folder) / "plan.json").exists():
            raise ValueError(f"{folder} has no plan; pack again with --overwrite")
        if (Path(folder) / "pieces.json").exists():
            samples = SplitSamples.load(store, folder)
        plan = load_plan(folder)
        sizes = [(plan.num_tokens, samples.num_tokens)]
        if plan.num_patches is not None:
            sizes.append((plan.num_patches, samples.num_patches))
        for planned, known in sizes:
            if planned.shape == known.shape and plan.num_truncated:
                known = known.copy()
                known[plan.truncated] = planned[plan.truncated]
            if not np.array_equal(planned, known):
                raise ValueError(
                    f"{folder} has a plan of other samples; pack again with --overwrite"
                )
        dataset = cls(samples, plan)
        dataset.media_folders = store.about.media_folders
        return dataset

    @property
    def vision(self) -> VisionSpec:
        """The spec all samples were encoded with."""
        return self.samples[0].vision

    def set_epoch(self, epoch: int) -> None:
        """Choose the plan items come from, in workers that are already running too.

        A pure function of the epoch. Under Trainer, `mmpack.hf.PackingCallback` calls it.
        """
        self._epoch[0] = epoch

    def append_empty_packs(self, multiple: int) -> None:
        """Append as few empty packs as make the number of items a multiple of `multiple`.

        That is the number of ranks times the packs of a batch: without, accelerate evens ranks out
        with packs that other ranks train on too. An empty pack is the smallest sample without labels:
        its loss and gradients are zero.
        """
        if multiple < 1:
            raise ValueError(f"multiple must be positive, got {multiple}")
        self.num_empty = -self.plan.num_packs % multiple

    def fingerprint(self) -> dict[str, Any]:
        """What the packs of every epoch are made of, as JSON holds it: settings, counts and checksums.

        Data sets with equal ones have equal packs: ids, labels, grids, temporal steps, and what is recorded of
        images and videos (path, size, length; no file is opened). Of a store it is the checksum it has
        written down, so that a million samples take milliseconds; a list's samples are looked at, all of
        them.
        """
        plan = self.plan
        vision = json.loads(json.dumps(asdict(self.vision))) if len(self.samples) else {}
        return {
            "capacity": plan.capacity,
            "patch capacity": plan.patch_capacity,
            "seed of the plan": plan.seed,
            "samples": len(self.samples),
            "packs": plan.num_packs,
            "checksum of their sizes": _checksum(plan.num_tokens, plan.num_patches),
            "checksum of their costs": _checksum(plan.cost),
            **_contents(self.samples),
            **{f"the spec's {name}": value for name, value in vision.items()},
            "checksum of the plan": _checksum(plan.sample_index, plan.bin_offsets, plan.truncated),
        }

    def id_range(self) -> tuple[int, int] | None:
        """(smallest, largest) token id of all samples, labels that count among them: a store has them
        written down, of a list they are looked up. None: of no sample, or a store that does not say."""
        samples: Any = self.samples
        while isinstance(samples, SplitSamples):
            samples = samples.samples
        if hasattr(samples, "id_range"):
            known: tuple[int, int] | None = samples.id_range
            return known
        ranges = [id_range_of(sample) for sample in samples]
        return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None

    def __len__(self) -> int:
        return self.plan.num_packs + self.num_empty

    def __getitem__(self, index: int) -> PackSamples:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        index %= len(self)
        if index >= self.plan.num_packs:
            return self._empty_pack()
        epoch = int(self._epoch[0])
        if self._planned[0] != epoch:
            self._planned = (epoch, plan_epoch(self.plan, epoch))
        numbers = self._planned[1].samples_of(index).tolist()
        return self._item([self._sample(number) for number in numbers])

    @cached_property
    def _smallest(self) -> int:
        """The planned sample with the fewest patches, then tokens."""
        num_tokens, num_patches = (
            sizes[self.plan.sample_index] for sizes in sizes_of(self.samples)
        )
        return int(self.plan.sample_index[np.lexsort((num_tokens, num_patches))[0]])

    def _empty_pack(self) -> PackSamples:
        sample = self._sample(self._smallest)
        return self._item([replace(sample, labels=np.full_like(sample.labels, IGNORE))])

    def _sample(self, number: int) -> EncodedSample:
        sample = self.samples[number]
        if number in self._truncated:
            return truncate_sample(sample, self.plan.capacity, self._patch_capacity)
        return sample


class EvenPacks(Dataset[PackSamples]):
    """The packs of a data set, and as few empty ones behind them as make a multiple of `multiple`: the data
    set itself stays as it is for everybody else who reads it.

    Attributes:
        dataset: whose packs they are; what is set on it holds here too.
        multiple: ranks times packs of a batch, see `PackedDataset.append_empty_packs`.
    """

    def __init__(self, dataset: PackedDataset, multiple: int) -> None:
        self.dataset = dataset
        self.multiple = multiple

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.multiple) * self.multiple

    def __getitem__(self, index: int) -> PackSamples:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        index %= len(self)
        return self.dataset[index] if index < len(self.dataset) else self.dataset._empty_pack()


def id_range_of(sample: EncodedSample) -> tuple[int, int]:
    """(smallest, largest) token id of a sample, labels that count among them; (0, 0) of an empty one."""
    ids, labels = sample.input_ids, sample.labels
    if not len(ids):
        return 0, 0
    counting = labels[labels != IGNORE]
    if not len(counting):
        return int(ids.min()), int(ids.max())
    return int(min(ids.min(), counting.min())), int(max(ids.max(), counting.max()))


def _contents(samples: Any) -> dict[str, Any]:
    """What samples hold, as a checksum and where it is from."""
    if isinstance(samples, SplitSamples):
        cuts = _checksum(samples.sample_of, samples.bounds)
        return {**_contents(samples.samples), "checksum of their cuts": cuts}
    if hasattr(samples, "checksum"):
        return {"samples are in": "a store", "checksum of the store": samples.checksum}
    total = 0
    for sample in samples:
        step = sample.temporal_step
        for array in (sample.input_ids, sample.labels, sample.grid_thw, step):
            if array is not None:
                total = zlib.crc32(np.ascontiguousarray(array).data, total)
        media = [_identity(reference) for reference in sample.media]
        sizes = (len(sample.input_ids), len(sample.grid_thw), step is None, media)
        total = zlib.crc32(repr(sizes).encode(), total)
    return {"samples are in": "memory", "checksum of the samples": total}


def _identity(reference: Media) -> tuple[Any, ...]:
    """What is recorded of an image or a video; of one in no file the length of its bytes."""
    data = reference.data
    size = len(data) if isinstance(data, bytes) else getattr(data, "size", None)
    known = (reference.path, reference.size, size)
    if isinstance(reference, ImageRef):
        return known
    frames = tuple(_identity(frame) for frame in reference.frames)
    return (*known, frames, reference.num_frames, reference.fps)


def _checksum(*arrays: Any) -> int:
    total = 0
    for array in arrays:
        total = zlib.crc32(b"" if array is None else np.ascontiguousarray(array).tobytes(), total)
    return total
