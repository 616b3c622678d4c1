"""`eval_loss`: the mean over all supervised tokens of the set, each counted once, or with its weight (of rows,
turns, sources and the collator's `loss_reduction`), as in training.

Trainer's `eval_loss` is a mean over batches of means over tokens. It depends on how samples are packed, batched
and distributed over ranks, an empty pack counts as much as a full one, and accelerate repeats packs from the start
of the set if ranks would have different numbers of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from mmpack.hf.compat import forward_hooks, remainder_of
from mmpack.hf.gather import gathered
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.hf.source_losses import SourceLosses, mean_losses
from mmpack.hf.trainer_checks import check_evaluation, tell_evaluation
from mmpack.ops.supervised_cross_entropy import supervised_cross_entropy
from mmpack.packing.even_packs import EvenPacks


@dataclass
class _Batch:
    loss: torch.Tensor
    num_items: Any  # the loss's divisor; None: the sum of the batch's weights
    pack: MmpackDict
    rows: tuple[torch.Tensor, torch.Tensor] | None  # logits (1, L, V), labels (1, L)
    losses: torch.Tensor | None  # (L,) of its rows, if the loss tells them


class EvalHook:
    """A forward hook that keeps a model's last packed batch in evaluation mode, and the losses of its rows, for
    which `before` is a forward pre-hook.

    Args:
        keeps_rows: keep its logits where the loss does not tell its rows' losses, so that repeated packs of a
            batch can be left out.
    """

    def __init__(self, keeps_rows: bool) -> None:
        self.keeps_rows = keeps_rows
        self._last: _Batch | None = None
        self._losses: torch.Tensor | None = None

    def before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Ask the loss of a batch for the losses of its rows."""
        self._losses, pack = None, kwargs.get("mmpack")
        if model.training or pack is None:
            return None
        return args, {**kwargs, "mmpack": {**pack, "take_losses": self._keep}}

    def _keep(self, losses_L: torch.Tensor) -> None:
        self._losses = losses_L

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        pack, loss = kwargs.get("mmpack"), getattr(output, "loss", None)
        if model.training or pack is None or loss is None:
            return
        rows, labels = getattr(output, "logits", None), kwargs.get("shift_labels")
        is_kept = self.keeps_rows and self._losses is None
        kept = (rows, labels) if is_kept and rows is not None and labels is not None else None
        own = loss.detach().clone()  # Trainer multiplies the loss in place by the number of ranks
        self._last = _Batch(own, kwargs.get("num_items_in_batch"), pack, kept, self._losses)

    def take(self) -> _Batch | None:
        """Return the batch and forget it."""
        last, self._last = self._last, None
        return last


def _hook_of(model: nn.Module, keeps_rows: bool) -> EvalHook:
    """The model's hook, registered if it has none; all Trainers of a model share it."""
    for hook in forward_hooks(model):
        if isinstance(hook, EvalHook):
            hook.keeps_rows |= keeps_rows
            return hook
    hook = EvalHook(keeps_rows)
    model.register_forward_pre_hook(hook.before, with_kwargs=True)
    model.register_forward_hook(hook, with_kwargs=True)
    return hook


class Evaluation:
    """`PackingCallback`'s part: sums the losses of an evaluation on one rank."""

    def __init__(self, model: nn.Module, args: TrainingArguments) -> None:
        self._args = args
        self._batch_size = args.eval_batch_size
        self._hook = _hook_of(model, args.world_size > 1 and self._batch_size > 1)
        self._sources = SourceLosses()
        self._is_told = not args.should_log
        self._loader: Any = None
        self._sums: list[torch.Tensor] = []
        self._weight = 0.0
        self._has_sources = True  # of all batches so far
        self._times = 1.0  # how often Trainer counts each pack

    def tell(self, data: Any) -> None:
        """Warn, once, if several packs of the data make a batch."""
        self._is_told = self._is_told or tell_evaluation(data, self._batch_size)

    def count(self, loader: Any) -> None:
        """Count the batch that the loader just yielded and the model just evaluated.

        Raises:
            ValueError: some of its packs are repeats, whose share of the loss is unknown.
        """
        batch = self._hook.take()
        if batch is None:
            return
        if loader is not self._loader:  # a new evaluation; the last one may have been interrupted
            self._loader, self._sums, self._weight = loader, [], 0.0
            self._sources.pop()
            self._has_sources = True
            data = getattr(loader, "dataset", None)
            self.tell(data)
            check_evaluation(data, self._args)
            self._times = 1.0
            if isinstance(data, EvenPacks) and len(data.dataset):
                self._times = len(data) / len(data.dataset)
        supervised, ends = batch.pack["supervised_offsets"], batch.pack["items"]
        num_items = num_real_items(loader, len(ends) - 1, self._args)
        tokens = supervised[ends[num_items]] if num_items < len(ends) - 1 else supervised[-1]
        if not tokens:
            return  # empty, or all repeated
        sums = batch.pack.get("loss_weight_sums")
        weight = tokens if sums is None else sum(sums[: ends[num_items]])
        if tokens == supervised[-1]:
            if batch.losses is not None:
                self._sources.take(batch.losses)
            self._has_sources &= self._sources.count([batch.pack])
            divisor = batch.num_items
            if divisor is None:  # a pack of several ranks has a divisor for all of them
                context = batch.pack.get("context")
                divisor = weight if context is None else context["weight"]
            self._sums.append((batch.loss.double() * divisor).reshape(()))
        elif batch.losses is not None or batch.rows is not None:
            self._has_sources = False  # of some rows only
            self._sums.append(_sum_of(batch, tokens))
        else:
            raise ValueError(
                "accelerate repeats packs in the last batch, and with full_logits their share of the loss is "
                "unknown; set per_device_eval_batch_size=1"
            )
        self._weight += weight

    def correct(self, *metrics: dict[str, Any]) -> None:
        """Replace Trainer's loss in an evaluation's metrics by the mean over all ranks, add `eval_loss/NAME` of
        each source if there are several, and reset the sums. A collective. Other metrics, and those of a set
        without supervised tokens, are unchanged; but packs that several ranks share count once in
        `samples_per_second`."""
        name = loss_name(metrics[0])
        if name is None:
            return
        speed = f"{name.removesuffix('loss')}samples_per_second"
        for one in metrics if self._times != 1 else ():
            if speed in one:
                one[speed] = round(one[speed] / self._times, 3)
        loss, sources = self._pop()
        for one in metrics if loss is not None else ():
            if name in one:
                one[name] = loss
                one.update({f"{name}/{source}": value for source, value in sources.items()})

    def _pop(self) -> tuple[float | None, dict[str, float]]:
        loss = float(torch.stack(self._sums).sum()) if self._sums else 0.0
        found = self._sources.pop()
        mine: Any = (loss, self._weight, found if self._has_sources else None)
        self._loader, self._sums, self._weight, self._times = None, [], 0.0, 1.0
        ranks = gathered(mine)
        weight = sum(one for _, one, _ in ranks)
        sources = (
            {} if None in [one for *_, one in ranks] else mean_losses(one for *_, one in ranks)
        )
        return (sum(loss for loss, *_ in ranks) / weight if weight else None), sources


def _sum_of(batch: _Batch, tokens: int) -> torch.Tensor:
    """() float64: the weighted sum of the losses of a batch's first rows."""
    weights = None
    if "loss_weight_bits" in batch.pack:
        weights = batch.pack["loss_weight_bits"][:tokens].to(batch.loss.device).view(torch.float32)
    if batch.losses is not None:
        losses = batch.losses[:tokens].double()
        return (losses if weights is None else losses * weights).sum()
    assert batch.rows is not None
    logits, labels = (x.flatten(0, 1)[:tokens].to(batch.loss.device) for x in batch.rows)
    return supervised_cross_entropy(logits, labels, 1, weights_L=weights).double()


def num_real_items(loader: Any, num_items: int, args: TrainingArguments) -> int:
    """The number of items, of an evaluated batch of this rank, that accelerate did not repeat from the start of
    the set."""
    remainder = remainder_of(loader)
    if args.world_size == 1 or remainder is None:
        return num_items
    mine: int = remainder - args.process_index * args.eval_batch_size
    return min(max(mine, 0), num_items)


def loss_name(logs: dict[str, Any]) -> str | None:
    """The name of the loss in an evaluation's metrics; None: these are not an evaluation's."""
    for name in logs:
        if name.endswith("_loss") and f"{name.removesuffix('_loss')}_runtime" in logs:
            return name if name != "train_loss" else None
    return None
