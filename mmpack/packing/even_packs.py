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

    With context parallelism, every batch of packs occurs `context_size` times in a row. Whoever deals batches to
    ranks in turn (accelerate does), then gives the ranks of a `ContextGroup` the same packs.

    Attributes:
        dataset: the data set; its attributes apply.
        multiple: ranks (context parallelism: groups of ranks) times packs per batch, see
            `PackedDataset.append_empty_packs`.
        context_size: ranks that share each pack.
        batch_size: packs per batch of a rank.
    """

    def __init__(
        self, dataset: PackedDataset, multiple: int, *, context_size: int = 1, batch_size: int = 1
    ) -> None:
        if multiple % batch_size:
            raise ValueError(
                f"multiple must be one of batch_size, so that batches are full, got {multiple} and {batch_size}"
            )
        self.dataset = dataset
        self.multiple = multiple
        self.context_size = context_size
        self.batch_size = batch_size

    def __repr__(self) -> str:
        shared = f", for {self.context_size} ranks each" if self.context_size > 1 else ""
        return f"EvenPacks({self.dataset!r}, {counted(self.num_packs, 'pack')} with the empty ones{shared})"

    @property
    def num_packs(self) -> int:
        """The number of packs, with the empty ones, each counted once."""
        return -(-len(self.dataset) // self.multiple) * self.multiple

    def __len__(self) -> int:
        return self.num_packs * self.context_size

    def __getitem__(self, index: Any) -> Any:
        return item_at(index, len(self), self._pack, "pack")

    def _pack(self, index: int) -> PackSamples:
        batch, place = divmod(index, self.batch_size)
        number = batch // self.context_size * self.batch_size + place
        return self.dataset[number] if number < len(self.dataset) else self.dataset.empty_pack()
