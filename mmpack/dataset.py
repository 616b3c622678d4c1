"""PackedDataset: a map-style data set whose items are packs.

Item i is pack i of the plan, assembled when it is asked for; in DataLoader workers that is where
images are decoded. Map-style on purpose: accelerate shards the items, and resuming skips them
without decoding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mmpack.assemble import assemble
from mmpack.encode import encode_samples
from mmpack.plan import OnOverflow, plan_packs
from mmpack.readers import read_samples
from mmpack.truncate import truncate_sample
from mmpack.types import EncodedSample, Int64, Pack, PackPlan, Sample
from mmpack.vision import VisionSpec


class PackedDataset(Dataset[Pack]):
    """Packs of encoded samples, by index.

    Train with `per_device_train_batch_size=1`: one item is one full row.

    Attributes:
        samples: the encoded samples, a list or an `EncodedStore`.
        plan: which of them share a pack.
    """

    def __init__(self, samples: Sequence[EncodedSample], plan: PackPlan) -> None:
        self.samples = samples
        self.plan = plan
        self._truncated = set(plan.truncated.tolist())
        self._patch_capacity = plan.patch_capacity

    @classmethod
    def from_samples(
        cls,
        samples: Sequence[EncodedSample],
        capacity: int,
        *,
        patch_capacity: int | None = None,
        on_overflow: OnOverflow = "error",
        seed: int = 0,
    ) -> PackedDataset:
        """Plan the samples into packs of at most `capacity` tokens (and `patch_capacity` patches).

        `on_overflow` says what becomes of a longer sample: "error"; "drop", listed in
        `plan.dropped`; "truncate", cut by `truncate_sample` and listed in `plan.truncated`, or
        dropped if the cut takes its whole answer.

        Raises:
            ValueError: a sample is too long and `on_overflow` is "error"; names file and row.
        """
        return cls(samples, plan_samples(samples, capacity, patch_capacity, on_overflow, seed))

    @classmethod
    def from_files(
        cls,
        data: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | Iterable[Sample],
        processor: Any,
        capacity: int,
        *,
        media_dir: str | os.PathLike[str] | None = None,
        patch_capacity: int | None = None,
        on_overflow: OnOverflow = "error",
        train_on_prompt: bool = False,
        mask_history: bool = False,
    ) -> PackedDataset:
        """Read, encode and plan data files, in memory.

        Args:
            data: a file, a folder or several, see `read_samples`; or the samples themselves, for
                what `read_samples` can be told beyond `media_dir`.
            processor: a transformers Qwen-VL processor, or (tokenizer, VisionSpec).
            capacity: tokens a pack may hold.
            media_dir: folder of relative image paths; by default the folder of each file.
            patch_capacity, on_overflow: see `from_samples`.
            train_on_prompt, mask_history: see `mmpack.encode.encode_samples`.

        Raises:
            ValueError: a row that cannot be used; names file and row.
        """
        if isinstance(processor, tuple):
            tokenizer, vision = processor
        else:
            tokenizer, vision = processor, VisionSpec.from_processor(processor)
        if not isinstance(data, (str, os.PathLike)):
            data = list(data)
        if isinstance(data, list) and data and isinstance(data[0], Sample):
            samples: Iterable[Sample] = data
        else:
            samples = read_samples(data, media_dir=media_dir)
        encoded = encode_samples(
            samples, tokenizer, vision, train_on_prompt=train_on_prompt, mask_history=mask_history
        )
        return cls.from_samples(
            list(encoded), capacity, patch_capacity=patch_capacity, on_overflow=on_overflow
        )

    @classmethod
    def from_store(cls, folder: str | os.PathLike[str]) -> PackedDataset:
        """Open what `mmpack pack --out FOLDER` wrote."""
        from mmpack.store import open_store  # here: data sets in memory do not need `datasets`

        return cls(open_store(folder), PackPlan.load(Path(folder) / "plan.npz"))

    @property
    def vision(self) -> VisionSpec:
        """The spec all samples were encoded with."""
        return self.samples[0].vision

    def __len__(self) -> int:
        return self.plan.num_packs

    def __getitem__(self, index: int) -> Pack:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        numbers = self.plan.samples_of(index % len(self)).tolist()
        return assemble([self._sample(number) for number in numbers])

    def _sample(self, number: int) -> EncodedSample:
        sample = self.samples[number]
        if number in self._truncated:
            return truncate_sample(sample, self.plan.capacity, self._patch_capacity)
        return sample


def plan_samples(
    samples: Sequence[EncodedSample],
    capacity: int,
    patch_capacity: int | None,
    on_overflow: OnOverflow,
    seed: int,
) -> PackPlan:
    """`plan_packs` for samples at hand, so that truncation is planned at its exact length."""
    num_tokens, num_patches = sizes_of(samples)
    too_long = num_tokens > capacity
    if patch_capacity is not None:
        too_long |= num_patches > patch_capacity
    overflow = np.flatnonzero(too_long).tolist()
    truncated = []
    if overflow and on_overflow == "error":
        longest = max(overflow, key=lambda n: (int(num_tokens[n]), int(num_patches[n])))
        sample = samples[longest]
        room = f"{capacity:,} tokens"
        if patch_capacity is not None:
            room += f" and {patch_capacity:,} patches"
        raise ValueError(
            f"{len(overflow)} of {len(samples)} samples are too long for a pack of {room}; row "
            f"{sample.row} of {sample.source} has {num_tokens[longest]:,} tokens and "
            f"{num_patches[longest]:,} patches. Raise the capacity, or choose to drop or truncate"
        )
    if on_overflow == "truncate":
        for number in overflow:
            cut = truncate_sample(samples[number], capacity, patch_capacity)
            if cut.is_supervised:  # else it keeps its size and is dropped
                num_tokens[number], num_patches[number] = cut.num_tokens, cut.num_patches
                truncated.append(number)
    plan = plan_packs(
        num_tokens,
        capacity,
        num_patches=num_patches,
        patch_capacity=patch_capacity,
        seed=seed,
        on_overflow="drop" if on_overflow == "truncate" else on_overflow,
    )
    return replace(plan, truncated=np.array(truncated, dtype=np.int64))


def sizes_of(samples: Sequence[EncodedSample]) -> tuple[Int64, Int64]:
    """(num_tokens, num_patches), each (N,)."""
    if hasattr(samples, "num_tokens"):  # a store knows without opening its samples
        return samples.num_tokens.copy(), samples.num_patches.copy()
    pairs = [(sample.num_tokens, sample.num_patches) for sample in samples]
    sizes = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return sizes[:, 0].copy(), sizes[:, 1].copy()
