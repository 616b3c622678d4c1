"""A small Python object of every rank."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gathered(mine: T) -> list[T]:
    """`mine` of every rank, in their order, on every rank. A collective; one process alone gets its own back.

    Args:
        mine: any object that can be pickled. It is copied, as `torch.distributed.all_gather_object` does.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    ranks: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return ranks
