"""Encoded samples whose sizes are known without reading them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard

from numpy.typing import NDArray

from mmpack.types import EncodedSample, Int32, Int64


class SizedSamples(Protocol):
    """Encoded samples with sizes that are known without reading samples: `EncodedStore`, `SplitSamples`."""

    @property
    def num_tokens(self) -> Int64:
        """(N,) lengths in a pack."""

    @property
    def num_patches(self) -> Int64:
        """(N,) patches that enter the vision tower."""

    @property
    def num_supervised(self) -> Int64:
        """(N,) tokens that have a loss."""

    @property
    def sources(self) -> NDArray[Any]:
        """(N,) the data file of each sample."""

    def grids(self) -> tuple[Int32, Int64]:
        """(grid_thw of all markers (I, 3), offsets of the samples in it (N + 1,))."""


def are_sized(samples: Sequence[EncodedSample]) -> TypeGuard[SizedSamples]:
    """Whether sizes are known without reading samples; false for a list."""
    return hasattr(samples, "num_tokens")
