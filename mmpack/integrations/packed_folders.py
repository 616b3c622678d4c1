"""Folders that `mmpack pack` wrote, as the data sets of another framework's trainer."""

from __future__ import annotations

import os

from mmpack.packing.dataset import PackedDataset
from mmpack.store.manifest import packed_split


def open_packs(name: str | os.PathLike[str], is_training: bool = False) -> PackedDataset:
    """The packs of FOLDER, or of FOLDER:val the rows that `mmpack pack --val-size` held out.

    Raises:
        ValueError: rows held out are to be trained on, or what `PackedDataset.from_store` refuses.
    """
    word = os.fspath(name)
    folder, split = packed_split(word) or (word, "train")
    if is_training and split == "val":
        raise ValueError(
            f"{word} are the rows held out for evaluation; train on {folder}, and evaluate {word}"
        )
    return PackedDataset.from_store(folder, split=split)
