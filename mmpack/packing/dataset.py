"""PackedDataset: a map-style data set whose items are packs.

Item i is the samples of pack i in the epoch's plan. The collator opens their images and assembles them, in a
DataLoader worker if there are workers. The data set is map-style so that accelerate can shard items and skip them
when resuming. Every epoch has the same number of packs, with different samples in each. The epoch is in shared
memory, which is the only way to reach persistent workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch.utils.data import Dataset

from mmpack.data.chunks import item_at
from mmpack.data.encoder import Encoder
from mmpack.data.progress import progress, row_progress
from mmpack.data.readers import limits_of, media_folders
from mmpack.data.remote_roots import require_local
from mmpack.errors import counted, counting, integer, pack_limits
from mmpack.pack_html import plan_counts
from mmpack.packing.cost import sizes_of
from mmpack.packing.fingerprint import fingerprint_of
from mmpack.packing.held_out import part_of, within_limits
from mmpack.packing.overflow import OnOverflow, check_split
from mmpack.packing.pack_samples import PackSamples
from mmpack.packing.pack_source import PackSource
from mmpack.packing.plan import plan_epoch
from mmpack.packing.plan_samples import plan_samples
from mmpack.packing.sized_samples import are_sized
from mmpack.packing.split_documents import SplitSamples, split_samples
from mmpack.packing.truncate import truncate_sample
from mmpack.types import IGNORE, EncodedSample, PackPlan, Sample
from mmpack.vision_spec import VisionSpec

if TYPE_CHECKING:
    from mmpack.packing.mixed_dataset import MixedDataset


class PackedDataset(PackSource, Dataset[PackSamples]):
    """Packs of encoded samples, by index: an item is the samples of one pack, for `PackCollator`.

    Train with `per_device_train_batch_size=1`: one item fills one row.

    Attributes:
        samples: the encoded samples, a list or an `EncodedStore`.
        plan: which samples share a pack in epoch 0.
        capacity: maximum tokens per pack.
        num_empty: number of empty packs at the end, see `append_empty_packs`.
        on_bad_image: what to do with a sample whose image can no longer be decoded when its pack is made. "raise"
            (default): an error that gives file and row, also from DataLoader workers. "drop": leave its segment
            out of the pack, log a warning and count it.
        max_bad: the largest share of samples with images or videos that may be dropped, 0.05 by default. From
            1,000 samples on, a larger share is an error that counts the reasons.
        media_folders: folders, or URLs, that must contain image and video files when they are opened, links
            resolved; None: any local folder. `from_store` and `from_files` set the folders that the rows were
            read with.
        source_weights: name of a data file -> factor of its samples' loss, see `PackSource`; they are not saved.
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
        group_images: bool = False,
    ) -> PackedDataset:
        """Plan samples into packs.

        Args:
            samples: a list, or an `EncodedStore`.
            capacity: maximum tokens per pack.
            cost: the config of the model to train, or (N,) numbers (from `costs_of` if parts of the model are
                frozen). Packs then also cost the same, so that data-parallel ranks do not wait for each other.
            patch_capacity: maximum vision patches per pack.
            on_overflow: what to do with a sample longer than a pack: "error"; "drop" it and list it in
                `plan.dropped`; "truncate" it with `truncate_sample` and list it in `plan.truncated`, or drop it if
                no answer is left (both log how many and name the first); "split" (documents only) it into pieces,
                which `samples` then holds, see `mmpack.packing.split_documents`.
            seed: decides the packs and their order.
            group_images: plan samples that show the same image together: a pack runs the vision tower once for
                each image, so fewer patches enter it. The samples of a step are then less mixed. Costs given as
                numbers count an image for each of its samples.

        Raises:
            ValueError: a sample is too long and `on_overflow` is "error", a conversation would be split, or an
                image is too large to split around; the message gives file and row.
        """
        if on_overflow == "split":
            samples, on_overflow = split_samples(samples, capacity, patch_capacity), "error"
        limits = capacity, patch_capacity
        plan = plan_samples(samples, *limits, on_overflow, seed, cost, group_images=group_images)
        return cls(samples, plan)

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
        group_images: bool = False,
        jobs: int | None = 1,
    ) -> PackedDataset:
        """Read, encode and plan data files, in memory; `save` writes the data set to disk.

        A terminal or a notebook shows a progress bar; `logging.getLogger("mmpack").setLevel(logging.ERROR)`
        switches it off.

        Args:
            data: a file, a folder, a list of these, or rows, as in `Encoder.read`; or `Sample`s.
            encoder: an `Encoder`, or a transformers Qwen-VL processor.
            capacity: maximum tokens per pack.
            cost: the model's config, for packs that cost the same; see `from_samples`.
            patch_capacity, on_overflow, seed, group_images: see `from_samples`.
            jobs: processes that encode rows (`Sample`s are encoded in this one). None: one per core, if the rows
                take more than a few seconds. Other processes need pyarrow and import the script, which must
                have `if __name__ == "__main__":`.

        Raises:
            ValueError: a row cannot be used and the encoder's `on_error` is "raise"; the message gives file and
                row. Or too many were skipped.
        """
        capacity, patch_capacity = pack_limits(capacity, patch_capacity)  # before all is read
        encoder = Encoder.of(encoder, cost)
        check_split(on_overflow, encoder.stage)
        encoder = replace(encoder, on_error=counting(encoder.on_error))  # one count of bad rows
        given = data if isinstance(data, (str, os.PathLike)) else list(data)
        limits: dict[str, tuple[int, int]] = {}
        folders, total = None, None if isinstance(given, (str, os.PathLike)) else len(given)
        samples: Sequence[EncodedSample]
        if isinstance(given, list) and given and isinstance(given[0], Sample):
            with progress("encoding", total) as bar:
                samples = list(bar.each(encoder.encode(given)))
        else:
            groups = list(encoder.groups(given))
            folders, limits = media_folders(groups), limits_of(groups)
            with row_progress("encoding", groups, total=total) as (groups, bar):
                if jobs == 1:
                    samples = list(bar.each(encoder.encode(encoder.read_groups(groups))))
                else:
                    from mmpack.store.build import encoded_rows  # here: it needs Arrow

                    samples = encoded_rows(groups, encoder, jobs, bar.update)
        if on_overflow == "split":
            samples, on_overflow = split_samples(samples, capacity, patch_capacity), "error"
        used = within_limits(samples, limits)
        how = on_overflow, seed, cost
        plan = plan_samples(
            samples, capacity, patch_capacity, *how, group_images=group_images, side=used
        )
        dataset = cls(samples, plan if used.all() else part_of(plan, used))
        dataset.media_folders = folders
        return dataset

    @classmethod
    def from_store(
        cls,
        folder: str | os.PathLike[str],
        on_changed_data: Literal["raise", "warn"] = "raise",
        split: Literal["train", "val"] | None = None,
    ) -> PackedDataset:
        """Open a folder written by `mmpack pack --out FOLDER`.

        Args:
            folder: the packed folder; FOLDER:val is its split "val", as on the command line.
            split: "val": the rows that `mmpack pack --val-size` held out; "train": all others (default).
            on_changed_data: if a data file has changed since packing: "raise" an error, or "warn" in the log and
                use the samples as packed. Data files may be deleted.

        Raises:
            ValueError: the folder has no store, a damaged one or only a part, a data file has changed, or
                FOLDER:val and `split` contradict each other.
        """
        from mmpack.packing.stored_plan import open_samples  # here: only stores need Arrow

        samples, plan, folders = open_samples(folder, on_changed_data, split)
        dataset = cls(samples, plan)
        dataset.media_folders = folders
        return dataset

    @classmethod
    def mixed(
        cls,
        sources: Mapping[str, tuple[PackedDataset | str | os.PathLike[str], float]],
        cost: Any = None,
        *,
        by: Literal["tokens", "samples"] = "tokens",
        epoch_tokens: int | None = None,
        seed: int = 0,
    ) -> MixedDataset:
        """Mix data sets in given shares, without encoding anything again.

        By default an epoch is as long as it takes for the source with the most tokens (or samples) per weight to
        occur once; the others repeat, in whole passes of another order each and a part of one, which the next
        epoch continues. So samples of a source are drawn equally often, up to one; an epoch that would need more
        packs than the first leaves the last few that it drew out. Packs are ordered so that the sources' shares
        are about the same in all parts of an epoch.

        Args:
            sources: name -> (data set, weight). A data set is a folder, as in `from_store`, or a `PackedDataset`;
                all have the same capacities, `VisionSpec` and tokenizer. Its `media_folders` hold for its rows;
                `source_weights`, `on_bad_image` and `max_bad` are set on the mixture. Names appear in the log
                (`pack/loss/NAME`), and in errors before the file (`NAME::train.json`).
            cost: as in `from_samples`: the model's config, or (N,) numbers for the samples of all sources.
            by: whether weights are shares of "tokens" or of "samples".
            epoch_tokens: tokens of an epoch.
            seed: decides which samples come when, and the packs.

        Raises:
            ValueError: a weight is not a positive number, sources were not packed alike, or one has options that
                are the mixture's; names the difference.
        """
        from mmpack.packing.mixed_dataset import MixedDataset  # here: it needs this module

        return MixedDataset(sources, cost, by=by, epoch_tokens=epoch_tokens, seed=seed)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the samples and their plan, which `from_store` opens as an equal data set.

        Image and video files stay where they are; images in memory are written too. `media_folders` is kept,
        `on_bad_image`, `max_bad` and `source_weights` are not.

        Args:
            folder: a new one, or empty. It appears complete or not at all.

        Raises:
            ValueError: there are no samples, the folder is not empty, or it is of several with other media
                folders.
            OSError: it cannot be written.
        """
        from mmpack.store.atomic_folder import published  # here: only stores need Arrow
        from mmpack.store.encoded_store import write_store
        from mmpack.store.manifest import About
        from mmpack.store.plan_file import save_plan

        if not len(self.samples):
            raise ValueError("there are no samples to save")
        require_local(folder, "the packed folder")
        out = Path(folder)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is not empty; save to another folder")
        samples, folders = self.samples, self.media_folders
        if len({repr(one and one.names) for one in self._media_of.values()}) > 1:
            raise ValueError(
                "the sources have media folders of their own, a store has one list; save each source"
            )
        about = About(media_folders=None if folders is None else tuple(folders))
        out.parent.mkdir(parents=True, exist_ok=True)
        with published(out, replaces=False) as partial:
            if isinstance(samples, SplitSamples):
                samples.save(partial)
                samples = samples.samples
            write_store(partial, samples, self.vision, about)
            save_plan(self.plan, partial)

    @property
    def vision(self) -> VisionSpec:
        """The spec that all samples were encoded with."""
        return self.samples[0].vision

    def _sources(self) -> Iterable[str]:
        samples: Any = self.samples
        return samples.sources if are_sized(samples) else {one.source for one in samples}

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose plan items come from, also in running workers.

        The plan depends only on the epoch. Under Trainer, `mmpack.hf.PackingCallback` calls this.
        """
        self._epoch[0] = integer(epoch, "epoch")

    def epoch_plan(self, epoch: int) -> PackPlan:
        """The plan of an epoch, from 0; a pure function of `plan` and the epoch."""
        return plan_epoch(self.plan, epoch)

    def append_empty_packs(self, multiple: int) -> None:
        """Append empty packs until the number of items is a multiple of `multiple`, the number of ranks times
        packs per batch; ranks that share packs (`ContextGroup`) count once.

        Otherwise accelerate evens out ranks by repeating packs of other ranks. An empty pack is the smallest
        sample without its labels; its loss and gradients are zero.
        """
        multiple = integer(multiple, "multiple")
        if multiple < 1:
            raise ValueError(f"multiple must be positive, got {multiple}")
        self.num_empty = -self.plan.num_packs % multiple

    def fingerprint(self) -> dict[str, Any]:
        """Settings, counts and checksums that determine the packs of every epoch, for JSON.

        Data sets with equal fingerprints have equal packs: ids, labels, grids, temporal steps, file and row of
        every sample, paths of images and videos, and the bytes of those in memory. No file is opened. A list and
        the store that `save` wrote of it have equal fingerprints, unless the list holds PIL images. A store's
        checksum is stored, so a million samples take milliseconds; for a list all samples are read.
        """
        return fingerprint_of(self.samples, self.plan, self.source_weights)

    def id_range(self) -> tuple[int, int] | None:
        """(smallest, largest) token id of all samples, including supervised labels; recorded in a store, computed
        for a list. None if there are no samples, or the store has no record."""
        samples: Any = self.samples
        while isinstance(samples, SplitSamples):
            samples = samples.samples
        if hasattr(samples, "id_range"):
            known: tuple[int, int] | None = samples.id_range
            return known
        ranges = [sample.id_range for sample in samples]
        return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None

    def __repr__(self) -> str:
        empty = f", {counted(self.num_empty, 'empty pack')} at the end" if self.num_empty else ""
        return f"PackedDataset({plan_counts(self.plan)}{empty})"

    def __len__(self) -> int:
        return self.plan.num_packs + self.num_empty

    @overload
    def __getitem__(self, index: int) -> PackSamples: ...
    @overload
    def __getitem__(self, index: slice) -> list[PackSamples]: ...
    def __getitem__(self, index: int | slice) -> PackSamples | list[PackSamples]:
        return item_at(index, len(self), self._pack, "pack")  # type: ignore[no-any-return]

    def _pack(self, index: int) -> PackSamples:
        if index >= self.plan.num_packs:
            return self.empty_pack()
        epoch = int(self._epoch[0])
        if self._planned[0] != epoch:
            self._planned = (epoch, self._current_plan(epoch))
        plan = self._planned[1]
        if index >= plan.num_packs:
            return self.empty_pack()
        numbers = plan.samples_of(index).tolist()
        return self._item([self._sample(number) for number in numbers])

    def _current_plan(self, epoch: int) -> PackPlan:
        """The plan of the epoch that was set."""
        return self.epoch_plan(epoch)

    @cached_property
    def _smallest(self) -> int:
        """The planned sample with the fewest patches, then tokens."""
        num_tokens, num_patches = (
            sizes[self.plan.sample_index] for sizes in sizes_of(self.samples)
        )
        return int(self.plan.sample_index[np.lexsort((num_tokens, num_patches))[0]])

    def empty_pack(self) -> PackSamples:
        """The smallest sample without its labels."""
        sample = self._sample(self._smallest)
        return self._item([replace(sample, labels=np.full_like(sample.labels, IGNORE))])

    def _sample(self, number: int) -> EncodedSample:
        sample = self.samples[number]
        if number in self._truncated:
            return truncate_sample(sample, self.plan.capacity, self._patch_capacity)
        return sample
