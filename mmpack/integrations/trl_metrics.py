"""Loss and metrics of packs from the scores that TRL's head makes: one hook on the model, one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmpack.hf.evaluation import num_real_items
from mmpack.hf.gather import gathered
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.hf.throughput import useful_tokens
from mmpack.ops.supervised_cross_entropy import denominator

FUSED = "fused_lm_head"  # the keyword that makes TRL's forward score tokens


class PackedScores:
    """A forward hook on the model with TRL's head: the loss of a packed batch, from the log-probabilities, with
    the weights of its rows; reports the rows' losses to `pack/loss/` and to evaluation.

    It comes before the hooks that read the loss, and acts while its trainer computes a loss (`with scores:`),
    because other trainers may share the model. The first loss puts it on the model, and `remove` takes it off.

    Attributes:
        applies_weights: whether it acts; `mmpack.hf.loss` refuses weights otherwise.
    """

    def __init__(self, model: nn.Module, is_dft: bool) -> None:
        self.is_dft, self.applies_weights = is_dft, False
        self._model = model
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> None:
        if self._handle is None:
            self._handle = self._model.register_forward_hook(self, with_kwargs=True, prepend=True)
        self.applies_weights = True

    def __exit__(self, *error: object) -> None:
        self.applies_weights = False

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        pack: MmpackDict | None = kwargs.get("mmpack")
        if pack is None or not kwargs.get(FUSED) or not self.applies_weights:
            return
        log_probs_L, is_row = of_rows(output.log_probs, kwargs), of_rows(output.label_mask, kwargs)
        losses_L = -log_probs_L
        weights_L = is_row.to(losses_L.dtype)
        if "loss_weight_bits" in pack:
            if self.is_dft:
                raise ValueError(
                    "the batch has weights of the loss, which loss_type='dft' does not apply; train without "
                    "weights, or with loss_type='nll'"
                )
            bits = pack["loss_weight_bits"].to(losses_L.device)
            weights_L = weights_L * bits.view(torch.float32)
        if self.is_dft:  # arXiv 2508.05629, equation 9: the probability is a constant factor
            losses_L = losses_L * log_probs_L.exp().detach()
        take = pack.get("take_losses")
        if take is not None:
            take(losses_L.detach())
        num_items = kwargs.get("num_items_in_batch")
        output.loss = (losses_L * weights_L).sum() / denominator(num_items, weights_L)


class TokenMetrics(TrainerCallback):
    """Sums of entropy, right predictions and tokens on one rank, for the log."""

    NAME = "PackedSFTTrainer"  # in a checkpoint's trainer_state.json

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sums: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        self._rows = {"train": 0, "eval": 0}
        self._tokens = 0  # on this rank, in this run
        self._before = 0  # on all ranks, before it was resumed
        self._last: tuple[torch.Tensor, MmpackDict] | None = None
        self._loader: Any = None

    def take(self, outputs: Any, inputs: Mapping[str, Any]) -> None:
        """Count a batch that the model just scored; in evaluation, when it is known which packs are repeats."""
        pack: MmpackDict = inputs["mmpack"]
        scores = (outputs.entropy.detach(), outputs.is_top1)
        both = torch.stack([of_rows(one, inputs).float() for one in scores])
        if not self._model.training:
            self._last = both, pack
            return
        self._tokens += useful_tokens(pack)
        self._add("train", both, pack["supervised_offsets"][-1])

    def _add(self, mode: str, both: torch.Tensor, num_rows: int) -> None:
        self._sums[mode].append(both[:, :num_rows].sum(dim=1, dtype=torch.float64))
        self._rows[mode] += num_rows

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._last is None:
            return
        (both, pack), self._last = self._last, None
        if eval_dataloader is not self._loader:  # the last evaluation may have been interrupted
            self._loader, self._sums["eval"], self._rows["eval"] = eval_dataloader, [], 0
        ends = pack["items"]
        num_items = num_real_items(eval_dataloader, len(ends) - 1, args)
        self._add("eval", both, pack["supervised_offsets"][ends[num_items]])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tokens, self._sums["train"], self._rows["train"] = 0, [], 0
        saved = state.stateful_callbacks.get(self.NAME, {}) if state.global_step else {}
        self._before = saved.get("attributes", {}).get("num_tokens", 0)

    def pop(self, mode: str) -> dict[str, float]:
        """The log values over all ranks since the last call, then reset. A collective; waits for the device."""
        sums, rows = self._sums[mode], self._rows[mode]
        self._sums[mode], self._rows[mode], self._loader = [], 0, None
        here: Any = torch.stack(sums).sum(dim=0).cpu().numpy() if sums else (0.0, 0.0)
        ranks = gathered((float(here[0]), float(here[1]), rows, self._tokens))
        entropy, right, rows, tokens = map(sum, zip(*ranks))
        values = {"num_tokens": float(self._before + tokens)}
        if rows:
            values |= {"entropy": entropy / rows, "mean_token_accuracy": right / rows}
        return values

    def state(self) -> dict[str, Any]:
        """What a resumed run continues from, as transformers keeps states of callbacks. A collective."""
        tokens = self._before + sum(gathered(self._tokens))
        return {"args": {}, "attributes": {"num_tokens": tokens}}


def of_rows(values: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """(L,) a field of TRL's output at the supervised rows; with full_logits, TRL scores every token but the
    last."""
    whole = values[0]
    return whole if "shift_labels" in batch else whole[batch["mmpack"]["supervised_index"]]
