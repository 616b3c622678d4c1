"""EvenPacks: a data set's packs, as many on every rank."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from mmpack.data.chunks import item_at
from mmpack.errors import counted
from mmpack.packing.dataset import PackedDataset
from mmpack.packing.pack_samples import PackSamples


class EvenPacks(Dataset[PackSamples]):
    """The packs of a data set, followed by empty ones up to a multiple of `multiple`; the data set itself is not
    changed.

    Attributes:
        dataset: the data set; its attributes apply.
        multiple: ranks times packs per batch, see `PackedDataset.append_empty_packs`.
    """

    def __init__(self, dataset: PackedDataset, multiple: int) -> None:
        self.dataset = dataset
        self.multiple = multiple

    def __repr__(self) -> str:
        return f"EvenPacks({self.dataset!r}, {counted(len(self), 'pack')} with the empty ones)"

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.multiple) * self.multiple

    def __getitem__(self, index: Any) -> Any:
        return item_at(index, len(self), self._pack, "pack")

    def _pack(self, index: int) -> PackSamples:
        return self.dataset[index] if index < len(self.dataset) else self.dataset.empty_pack()
