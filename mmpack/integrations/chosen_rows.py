"""Some rows of data files: the first of each data set, and a part held out for evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, Literal

import numpy as np

from mmpack.data.file_formats import read_rows
from mmpack.data.readers import RowGroup


@dataclass(frozen=True)
class RowChoice:
    """Which rows of data sets are used; by default all.

    Attributes:
        max_samples: rows of each data set, the first ones; None: all.
        val_size: rows held out of all data sets together: a share below 1, or a number; 0: none.
        seed: of the random choice of the held out rows, which are those of `datasets.Dataset.train_test_split`.
        part: the rows that are not held out, or those that are; None: no row is held out.
    """

    max_samples: int | None
    val_size: float
    seed: int
    part: Literal["train", "eval"] | None = None

    def training(self) -> RowChoice:
        """Of these rows those to train on."""
        return replace(self, part=None if self.val_size <= 0 else "train")

    def evaluation(self) -> RowChoice:
        """Of these rows those held out."""
        return replace(self, part="eval")

    def as_record(self) -> dict[str, str]:
        """What says which rows these are, for a store's record of what it was made from."""
        if self.max_samples is None and self.part is None:
            return {}
        held_out = "" if self.part is None else f", val_size {self.val_size}, seed {self.seed}"
        return {"max_samples and val_size": f"{self.max_samples}{held_out}: {self.part}"}

    def of(self, groups_of: Sequence[Sequence[RowGroup]]) -> list[RowGroup]:
        """The groups of all data sets, reduced to these rows.

        Args:
            groups_of: the files of each data set, from `Reader.groups`. They are read here once to count their
                rows.

        Raises:
            ValueError: so many rows would be held out that none, or all, are left; or an entry limits its rows,
                which applies when packs are planned and thus after this choice.
        """
        groups = [group for one in groups_of for group in one]
        if self.max_samples is None and self.part is None:
            return groups
        self._check_limits(groups)
        masks = []
        for one in groups_of:
            left = math.inf if self.max_samples is None else self.max_samples
            for group in one:
                assert group.file is not None
                place = np.arange(sum(1 for _ in read_rows(group.file)))
                masks.append(place < left)
                left -= len(place)
        kept = np.flatnonzero(np.concatenate(masks))
        if self.part is not None:
            held_out = self._held_out(len(kept))
            dropped = held_out if self.part == "train" else np.setdiff1d(range(len(kept)), held_out)
            ends = np.cumsum([len(mask) for mask in masks])[:-1]
            everything = np.concatenate(masks)
            everything[kept[dropped]] = False
            masks = np.split(everything, ends)
        return [group._replace(rows=_Rows(group.rows, mask)) for group, mask in zip(groups, masks)]

    def _check_limits(self, groups: Sequence[RowGroup]) -> None:
        option = "max_samples" if self.part is None else "val_size"
        for limit in (group.limit for group in groups if group.limit is not None):
            name = "num_samples" if limit.num_samples else "max_samples"
            raise ValueError(
                f"{option} does not apply to {limit.files}, whose entry has {name}: rows would be chosen by "
                f"{option} first, and {name} would then leave others than in LLaMA-Factory; leave one of them "
                "out, or write the rows to use to a file of their own"
            )

    def _held_out(self, num_rows: int) -> Any:
        size = self.val_size
        count = 0  # of NaN
        if size > 0:
            count = int(min(size, num_rows)) if size > 1 else math.ceil(size * num_rows)
        if not 0 < count < num_rows:
            raise ValueError(
                f"val_size: {size} holds {count} of {num_rows} rows out; use a share between 0 and 1, or a number "
                "of rows above 1"
            )
        return np.random.default_rng(self.seed).permutation(num_rows)[:count]


class _Rows:
    """The rows of a file where a mask is true."""

    def __init__(self, rows: Any, mask: Any) -> None:
        self._rows, self._mask = rows, mask

    def __iter__(self) -> Iterator[Any]:
        return compress(self._rows, self._mask)
