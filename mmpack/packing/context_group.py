"""ContextGroup: the place of a rank among the ranks that share a pack (context parallelism)."""

from __future__ import annotations

from dataclasses import dataclass

from mmpack.errors import integer


@dataclass(frozen=True, slots=True)
class ContextGroup:
    """The place of a rank among the `size` ranks that share each pack.

    Consecutive global ranks form a group: global rank r is in group r // size, at place r % size. It holds no
    process group, so that it can be made, copied and pickled where there is none (DataLoader workers).

    Attributes:
        rank: this rank's place in its group, 0 to size - 1.
        size: ranks per group; 1: each rank has packs of its own.

    Raises:
        ValueError: `size` is below 1, or `rank` is not a place of the group.
    """

    rank: int
    size: int

    def __post_init__(self) -> None:
        for name in ("rank", "size"):
            object.__setattr__(self, name, integer(getattr(self, name), name))
        if self.size < 1:
            raise ValueError(f"a context group needs at least one rank, got size={self.size}")
        if not 0 <= self.rank < self.size:
            raise ValueError(
                f"rank {self.rank} is no place in a context group of {self.size} ranks (0 to {self.size - 1}); "
                "for the place of a global rank use ContextGroup.of(rank, world, size)"
            )

    @classmethod
    def of(cls, rank: int, world: int, size: int) -> ContextGroup:
        """The place of a global rank.

        Args:
            rank: the global rank (`RANK` of torchrun).
            world: the number of all ranks (`WORLD_SIZE`).
            size: ranks per group.

        Raises:
            ValueError: `world` is not a multiple of `size`, or `rank` is not below `world`.
        """
        if size < 1:
            raise ValueError(f"a context group needs at least one rank, got size={size}")
        if world % size:
            raise ValueError(
                f"{world} ranks do not divide into context groups of {size}; start a multiple of {size} ranks, or "
                f"choose a context size that divides {world}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is none of {world} ranks (0 to {world - 1})")
        return cls(rank % size, size)
