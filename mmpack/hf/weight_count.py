"""Weights of the loss in batches, and the denominator of an optimizer step: the sum of the weights of its rows.

Trainer counts labels. Under `PackingCallback`, a method bound on the trainer counts weights instead. In a loop of
one's own, `loss_denominator` does. A weighted batch whose denominator was counted otherwise is refused
(`mmpack.hf.loss`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from mmpack.hf.compat import bind_count, num_replicas, own_loss, stock_count
from mmpack.hf.context_ranks import compare_batches
from mmpack.hf.loss import PackedLoss
from mmpack.hf.mmpack_dict import ContextDict, MmpackDict
from mmpack.packing.context_part import rows_checksum
from mmpack.packing.loss_weights import LossReduction, loss_weights, source_name
from mmpack.types import EncodedSample


def weight_entries(
    samples: Sequence[EncodedSample],
    reduction: LossReduction,
    offsets: Sequence[int],
    context: ContextDict | None = None,
) -> dict[str, Any]:
    """The entries of the `mmpack` dict for the weights and the sources of a batch's segments.

    Args:
        offsets: S + 1 offsets of the segments in the supervised rows of the batch.
        context: of a rank's part of the samples; it gets the sum of the weights of all parts, and a checksum of
            all rows.

    Raises:
        ValueError: a weight is not a positive number.
    """
    lengths = np.diff(offsets)
    names = [source_name(sample.source) for sample in samples]
    rows_of = [name for name, length in zip(names, lengths) if length]
    sources = tuple(dict.fromkeys(rows_of))
    numbers = np.array([sources.index(name) for name in rows_of], dtype=np.int32)
    weights = loss_weights(samples, reduction)
    if context is not None:
        context["checksum"] = rows_checksum(context["checksum"], samples, weights)
    sums = lengths.astype(np.float64)
    entries: dict[str, Any] = {}
    if weights is not None:
        exact = weights.astype(np.float64)
        if context is not None:
            context["weight"] = float(exact.sum())
            begin, end = context["rows"]
            weights, exact = weights[begin:end].copy(), exact[begin:end]
        sums = np.array([exact[begin:end].sum() for begin, end in pairwise(offsets)])
        entries["loss_weight_bits"] = torch.from_numpy(weights.view(np.int32))
        entries["loss_weight_sums"] = tuple(map(float, sums))
    if len(sources) > 1:
        entries["source_rows"] = torch.from_numpy(np.repeat(numbers, lengths[lengths > 0]))
    by_source = np.bincount(numbers, sums[lengths > 0], minlength=len(sources))
    return {
        **entries,
        "sources": sources,
        "source_sums": tuple(map(float, by_source)),
    }


def loss_denominator(batches: Iterable[Mapping[str, Any]]) -> torch.Tensor:
    """The sum of the weights of all supervised rows of these batches of `PackCollator`; their number if they have
    no weights. For `model(**batch, num_items_in_batch=...)` in a loop of one's own.

    Args:
        batches: all micro-batches of an optimizer step. They are marked as counted. With several ranks, add up the
            ranks' sums, and multiply the loss by the number of ranks, because DDP averages gradients.

    Returns:
        A float64 scalar on the CPU. Nothing is read from the device.

    Raises:
        ValueError: a batch is not `PackCollator`'s.
    """
    if isinstance(batches, Mapping):
        raise ValueError(
            "loss_denominator takes a list of batches, this is one batch; pass [batch]"
        )
    total = 0.0
    for batch in batches:
        pack = batch.get("mmpack")
        if pack is None:
            raise ValueError(
                "loss_denominator takes batches of PackCollator, this one has no 'mmpack'"
            )
        pack["is_counted"] = True
        total += _total(pack)
    return torch.tensor(total, dtype=torch.float64)


def _total(pack: MmpackDict) -> float:
    if "loss_weight_sums" in pack:
        return sum(pack["loss_weight_sums"])
    return pack["supervised_offsets"][-1]


class WeightCount:
    """The denominator of a Trainer's steps, in place of its count of labels.

    Raises:
        ValueError: when called: the batches have weights that the Trainer would not apply.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._is_checked = False
        bind_count(trainer, self)

    def __call__(self, batch_samples: list[Any], device: torch.device) -> Any:
        trainer = self._trainer
        packs = [
            batch.get("mmpack") if isinstance(batch, Mapping) else None for batch in batch_samples
        ]
        if any(pack is not None and "loss_weight_bits" in pack for pack in packs):
            self._check()
        compare_batches(trainer.model, batch_samples)
        is_counted = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        if not is_counted or not packs or None in packs or num_replicas(trainer) > 1:
            return stock_count(trainer, batch_samples, device)
        total = float(loss_denominator(batch_samples))
        # filled on the device, because a copy from the host would synchronize with it
        count = torch.full((), total, dtype=torch.float64, device=device)
        if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
            count = trainer.accelerator.gather(count).sum()
        return count if _has_packed_loss(trainer.model) else count.float()

    def _check(self) -> None:
        if self._is_checked:
            return
        trainer = self._trainer
        args = trainer.args
        reason = advice = ""
        if not _has_packed_loss(trainer.model):
            reason = "the model's loss is not mmpack's"
            advice = "call patch_model(model) before the Trainer is made, and set no loss_function"
        elif not trainer.model_accepts_loss_kwargs:
            reason = "the Trainer averages micro-batches"
            advice = "call patch_model(model) before the Trainer is made"
        elif trainer.compute_loss_func is not None:
            reason = "compute_loss_func does not get them"
            advice = "leave it out"
        elif trainer.label_smoother is not None:
            reason = "label_smoothing_factor replaces the loss"
            advice = "leave it out"
        elif args.world_size > 1 and not args.average_tokens_across_devices:
            reason = "average_tokens_across_devices=False divides by each rank's own weights"
            advice = "leave it out"
        elif num_replicas(trainer) > 1:
            reason = "ranks share a batch (tensor, context or sequence parallelism)"
            advice = "use data parallelism"
        if reason:
            raise ValueError(
                f"the batch has weights of the loss, which would not apply: {reason}; {advice}, or train without "
                "weights and with loss_reduction='token'"
            )
        self._is_checked = True


def _has_packed_loss(model: nn.Module) -> bool:
    heads = (one for one in model.modules() if hasattr(one, "loss_function"))
    return any(isinstance(own_loss(head), PackedLoss) for head in heads)
