"""Context parallelism: what the ranks that share a pack exchange (`mmpack.packing.context_part` says what each
has).

Until attention a token needs no other, so each rank embeds its own tokens. The tower runs on a rank's own images,
and its features go to the ranks whose tokens show them. Around attention, ranks exchange tokens for heads and back
(DeepSpeed-Ulysses, arXiv 2309.14509): each attends over the whole pack, within its segments, with some of the
heads.

Every rank takes part in every exchange, in one order, forward and backward, also with nothing to give.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from mmpack import reference
from mmpack.hf.compat import all_to_all, timeout_of
from mmpack.hf.embedding import at_placeholders
from mmpack.hf.mmpack_dict import ContextDict, MmpackDict
from mmpack.packing.context_group import ContextGroup

_groups: dict[
    tuple[int, str | None], tuple[Any, Any]
] = {}  # (size, backend) -> (its world, this rank's)


def check_heads(config: Any, size: int) -> None:
    """Refuse a group among which a model's heads cannot be divided.

    Args:
        config: the model's config.
        size: ranks of a group.

    Raises:
        ValueError: names the heads and the size.
    """
    text = config.text_config
    for heads, key_heads in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        many, few = getattr(text, heads, None), getattr(text, key_heads, None)
        if many is None or few is None:
            continue
        if many % size:
            raise ValueError(
                f"{many} heads ({heads}) do not divide among the {size} ranks of a context group; choose a size "
                f"that divides {many}"
            )
        if few % size and size % few:
            raise ValueError(
                f"{few} heads ({key_heads}) and the {size} ranks of a context group do not divide each other; "
                f"choose a size that divides {few}, or a multiple of it that divides {many}"
            )


def join(config: Any, context: ContextGroup) -> None:
    """Refuse a model that a group cannot share, and make the group's process groups if torch.distributed is
    initialized: before the first forward, as a compiled one cannot.

    Raises:
        ValueError: `check_heads`, `check_router` or `process_group` does.
    """
    check_heads(config, context.size)
    check_router(config)
    if dist.is_available() and dist.is_initialized():
        host_group(context)


def process_group(context: ContextGroup) -> Any:
    """The process group of this rank's context group: made at the first call, which all ranks of the world must
    make, with the world's timeout, and kept.

    Raises:
        ValueError: there are no ranks, or this rank has another place in its group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"context parallelism needs ranks, and torch.distributed is not initialized; start {context.size} or "
            f"a multiple of processes: torchrun --nproc_per_node {context.size}, or accelerate launch"
        )
    world, rank = dist.get_world_size(), dist.get_rank()
    place = ContextGroup.of(rank, world, context.size)
    if place != context:
        raise ValueError(
            f"global rank {rank} is at place {place.rank} of its context group of {place.size} ranks, but the "
            f"model was patched for place {context.rank}; pass patch_model(context=ContextGroup.of(rank, world, "
            f"size))"
        )
    return dist.group.WORLD if context.size == world else _subgroup(context.size)


def host_group(context: ContextGroup) -> Any:
    """A process group like `process_group`, but of gloo, for what hosts tell each other without asking their
    devices. The first call is one that all ranks of the world must make."""
    group = process_group(context)
    return group if dist.get_backend(group) == "gloo" else _subgroup(context.size, "gloo")


def _subgroup(size: int, backend: str | None = None) -> Any:
    of_world, group = _groups.get((size, backend), (None, None))
    if of_world is not dist.group.WORLD:
        timeout = timeout_of(dist.group.WORLD)
        group, _ = dist.new_subgroups(size, timeout=timeout, backend=backend)
        _groups[size, backend] = dist.group.WORLD, group
    return group


def check_router(config: Any, asked: bool | None = None) -> None:
    """Refuse a router's auxiliary loss, of a model's config or `asked` for with a batch.

    Raises:
        ValueError: it is asked for.
    """
    if asked or getattr(config.text_config, "output_router_logits", False):
        raise ValueError(
            "output_router_logits asks for the router's auxiliary loss, which is no sum over the tokens that "
            "ranks share under context parallelism; leave it out, or set config.text_config.output_router_logits "
            "= False"
        )


def check_part(context: ContextGroup | None, pack: MmpackDict) -> None:
    """Refuse the batch of a collator that was made for another `context` than the model's.

    Raises:
        ValueError: it was, and names both.
    """
    over = pack.get("context")
    made_for = None if over is None else ContextGroup(over["rank"], over["size"])
    if made_for != context and ("context" not in pack or over is not None):  # not the self-test's
        raise ValueError(
            f"the batch is for {made_for or 'a rank with packs of its own'}, but the model is patched for "
            f"{context or 'a rank with packs of its own'}; make PackCollator(model=model) after "
            "patch_model(model, context=...)"
        )


def check_same_packs(context: ContextGroup, packs: Sequence[MmpackDict]) -> None:
    """Refuse ranks of a group that have parts of different packs. A collective of the group's hosts, which wait
    for each other and for no device.

    Args:
        packs: the `mmpack` dicts of one or more batches, the next ones of every rank.

    Raises:
        ValueError: they do.
    """
    sums = [pack["context"]["checksum"] for pack in packs]  # type: ignore[index]
    mine = torch.tensor(sums[0] if len(sums) == 1 else zlib.crc32(repr(sums).encode()))
    ranks = [torch.empty_like(mine) for _ in range(context.size)]
    dist.all_gather(ranks, mine, group=host_group(context))
    found = [int(one) for one in ranks]
    if len(set(found)) > 1:
        raise ValueError(
            f"the {context.size} ranks of a context group have parts of different packs (checksums "
            f"{', '.join(f'{one:08x}' for one in found)}); "
            "give all ranks of a group the same packs in the same order. A stream that leaves out rows "
            "(on_error) packs others where a rank cannot read a file: mmpack check --decode on every machine"
        )


def exchange_features(features_FD: torch.Tensor, over: ContextDict) -> torch.Tensor:
    """A tower's features (F, D) -> those that this rank's tokens show, by sender."""
    sent: Any = over["sent"]
    rows = at_placeholders(features_FD, sent)
    by_rank = reference.insert_features(torch.empty_like(rows), rows, sent["feature_token"])
    return exchange(by_rank, over["received_sizes"], over["sent_sizes"], over)


def to_heads(parts: Sequence[torch.Tensor], over: ContextDict) -> list[torch.Tensor]:
    """This rank's tokens with all heads -> all tokens with this rank's heads, in one exchange.

    Args:
        parts: tensors (n, H, K) of n own tokens, each with H and K of its own. If there are fewer heads than
            ranks, ranks share them: each gets a copy.

    Returns:
        A tensor (T, max(H / size, 1), K) for each.
    """
    size, n = over["size"], len(parts[0])
    by_rank = []
    for x_nHK in parts:
        if x_nHK.shape[1] < size:
            x_nHK = x_nHK.repeat_interleave(size // x_nHK.shape[1], dim=1)
        by_rank.append(x_nHK.unflatten(1, (size, -1)).flatten(2).transpose(0, 1))
    widths = [x.shape[2] for x in by_rank]
    rows = torch.cat(by_rank, dim=2).flatten(0, 1)  # (size * n, sum of widths)
    received = exchange(rows, over["tokens"], (n,) * size, over).split(widths, dim=1)
    return [x.unflatten(1, (-1, part.shape[2])) for x, part in zip(received, parts)]


def to_tokens(x_THK: torch.Tensor, over: ContextDict) -> torch.Tensor:
    """All tokens with this rank's heads -> this rank's tokens with all heads, (n, H, K)."""
    size, tokens = over["size"], over["tokens"]
    n = tokens[over["rank"]]
    rows = exchange(x_THK, (n,) * size, tokens, over)
    by_token: torch.Tensor = rows.unflatten(0, (size, n)).transpose(0, 1).flatten(1, 2)
    return by_token


def of_rank(heads: torch.Tensor, over: ContextDict) -> torch.Tensor:
    """This rank's part of a weight whose first dimension is heads, as `to_heads` deals them."""
    if len(heads) < over["size"]:
        heads = heads.repeat_interleave(over["size"] // len(heads), dim=0)
    part: torch.Tensor = heads.unflatten(0, (over["size"], -1))[over["rank"]]
    return part


def exchange(
    rows: torch.Tensor, received: Sequence[int], sent: Sequence[int], over: ContextDict
) -> torch.Tensor:
    """Rows to the other ranks and from them, differentiable. All exchanges go through here.

    Args:
        rows: the rows for rank 0, then for rank 1, ...
        received, sent: rows from and to each rank.
    """
    return all_to_all(rows.contiguous(), list(received), list(sent), over["group"])
