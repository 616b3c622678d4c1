"""Packs in TRL's SFTTrainer: `PackedSFTTrainer` (docs/sft_trainer.md).

TRL wants rows to tokenize and a collator of its own kind, and counts tokens by the shape of `position_ids`. The
subclass gives its constructor one placeholder row, then puts packs in its place. Model, optimizer, adapters,
callbacks, checkpoints, model card and the head that scores tokens in tiles are TRL's; packs, batches, epochs,
resuming and checks are mmpack's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmpack.data.model_folder import local_path
from mmpack.data.processor_folder import load_tokenizer
from mmpack.hf.callbacks import PackingCallback
from mmpack.hf.collator import PackCollator
from mmpack.hf.compat import folder_of
from mmpack.hf.evaluation import loss_name, num_real_items
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.hf.model_patch import patch_model
from mmpack.hf.processor_files import ProcessorFiles
from mmpack.hf.throughput import useful_tokens
from mmpack.ops.supervised_cross_entropy import denominator
from mmpack.packing.dataset import PackedDataset
from mmpack.packing.stream import PackStream

try:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
except ModuleNotFoundError as error:
    if error.name not in ("trl", "datasets"):
        raise
    raise ModuleNotFoundError(
        f"mmpack.integrations.trl needs {error.name}, which is not installed; pip install trl",
        name=error.name,
    ) from None
try:
    from trl.trainer.utils import add_fused_lm_head as _  # noqa: F401
except ImportError:
    raise ImportError(
        f"mmpack.integrations.trl needs TRL 1.16 or later, whose trainer scores tokens in its head; TRL "
        f"{version('trl')} is installed: pip install -U trl"
    ) from None

__all__ = ["PackedSFTTrainer"]

FUSED = "fused_lm_head"  # the keyword that makes TRL's forward score tokens

NAMES = {  # name of TRL's -> what breaks without it; tests/test_trl.py checks each
    "forward: fused_lm_head": "the model would return logits of the supervised tokens, without entropy",
    "output: loss, log_probs, entropy, is_top1, label_mask, aux_loss":
        "weights of the loss would not apply, and entropy and accuracy would not be logged",
    "SFTTrainer: aux_loss_enabled, router_aux_loss_coef":
        "the load balancing loss of a mixture of experts would not be added",
    "SFTTrainer: _save_checkpoint": "num_tokens would begin at 0 in a resumed run",
    "SFTConfig: dataset_kwargs['skip_prepare_dataset']":
        "evaluate(eval_dataset=...) would try to tokenize packs",
    "add_fused_lm_head: calls the model's base_model, with its hooks":
        "the model would not see that a batch is packed",
}  # fmt: skip

_ENCODED = "the packs are encoded; "
# Options that would do nothing, or not what they say: (why, what to do instead).
REFUSED_OPTIONS = {
    "packing": ("packs are planned before the trainer is made", "leave it out"),
    "packing_strategy": ("packs are planned before the trainer is made", "leave it out"),
    "eval_packing": ("eval_dataset holds packs", "leave it out"),
    "padding_free": ("a pack has no padding", "leave it out"),
    "truncation_mode": (
        _ENCODED + "rows are cut when they are packed",
        "pack with --on-overflow truncate",
    ),
    "dataset_text_field": (
        _ENCODED + "fields are chosen when rows are packed",
        "pack with --column",
    ),
    "dataset_kwargs": (_ENCODED + "no row is prepared", "leave it out"),
    "dataset_num_proc": (_ENCODED + "no row is prepared", "pack with --jobs"),
    "shuffle_dataset": (
        "the plan determines the order of packs, a new one in every epoch",
        "leave it out",
    ),
    "chat_template_path": (
        _ENCODED + "another template would not apply to them",
        "pack with a tokenizer that has it",
    ),
    "eos_token": (
        _ENCODED + "turns end as the chat template says",
        "set eos_token of the tokenizer and eos_token_id of the model's generation_config",
    ),
    "pad_token": ("a pack has no padding", "leave it out"),
    "assistant_only_loss": (
        "labels were made when rows were packed: of the assistant's text, unless --train-on-prompt",
        "leave it out",
    ),
    "completion_only_loss": (
        "labels were made when rows were packed: of the completion, unless --train-on-prompt",
        "leave it out",
    ),
    "label_smoothing_factor": (
        "it needs the logits of every token, and TRL's head makes none",
        "leave it out",
    ),
}
_REFUSED_ARGUMENTS = {
    "formatting_func": "the packs are encoded, so no row is formatted; leave it out",
    "compute_loss_func": "it needs the logits of every token, and TRL's head makes none; leave it out, or use "
    "transformers' Trainer with PackCollator(full_logits=True)",
    "model_init": "TRL takes none; leave it out",
}

Packs = PackedDataset | PackStream


class PackedSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer` on packs.

    Loss and gradients of a step are those of a stock Trainer on the same packs, whose equal is the weighted loss of
    the rows alone. Rows are not tokenized, cut or packed here, so options of `SFTConfig` about rows are refused.
    The rest of `SFTConfig`, `peft_config`, `quantization_config`, `callbacks` and `optimizers` do as in TRL.

    In the log, over all ranks: `num_tokens`, the tokens trained on since the run began, without filler and empty
    packs, also after resuming; `entropy` and `mean_token_accuracy`, means over all supervised tokens since the last
    log, or of the evaluated set, each counted once (TRL averages over batches). `eval_loss` and `pack/` values are
    `PackingCallback`'s.

    Args:
        model: a name or folder, as TRL loads it, or a model. It is patched (`patch_model`).
        args: an `SFTConfig`. `max_length` may be None, the default or the packs' capacity. `pad_to_multiple_of`
            becomes the collator's `pad_to`.
        train_dataset: a `PackedDataset`, a `PackStream`, or a folder of `mmpack pack`.
        eval_dataset: the same, or a dict of them.
        data_collator: a `PackCollator` with other options than `PackCollator(model=model)`.
        options: other arguments of `SFTTrainer`. Without `processing_class`, the model's tokenizer and processor files
            are saved beside the trained one, with the pixel budget of the packs, as by `mmpack train`. A `PackingCallback` in `callbacks` is attached in place of a
            default one.

    Raises:
        ValueError: an argument or option does not apply to packs; the sentence names it.
        TypeError: a data set holds no packs.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: SFTConfig | None = None,
        *,
        train_dataset: Packs | str | os.PathLike[str],
        eval_dataset: Any = None,
        data_collator: PackCollator | None = None,
        **options: Any,
    ) -> None:
        args = SFTConfig() if args is None else args
        train = _packs(train_dataset, "train_dataset")
        held_out: Any = None
        if isinstance(eval_dataset, Mapping):
            held_out = {
                name: _packs(data, f"eval_dataset[{name!r}]") for name, data in eval_dataset.items()
            }
        elif eval_dataset is not None:
            held_out = _packs(eval_dataset, "eval_dataset")
        check_options(args, options, train.capacity)
        check_loss(args, train, data_collator)
        evaluated = held_out.values() if isinstance(held_out, dict) else [held_out]
        if any(isinstance(data, PackStream) for data in (train, *evaluated)):
            # TRL does this for an IterableDataset: accelerate would split batches.
            args.accelerator_config.dispatch_batches = False
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        callbacks = list(options.pop("callbacks", None) or [])
        own = [one for one in callbacks if isinstance(one, PackingCallback)]
        if len(own) > 1 or any(one.dataset is not train for one in own):
            raise ValueError(
                "callbacks has a PackingCallback of another data set; pass one PackingCallback(train_dataset), or none"
            )
        if isinstance(model, nn.Module):
            patch_model(model)
        files = None
        if options.get("processing_class") is None and isinstance(train, PackedDataset):
            name = model if isinstance(model, str) else folder_of(model.config)
            folder = local_path(name or ".")
            options["processing_class"] = load_tokenizer(folder)
            files = ProcessorFiles(folder, train.vision)
        placeholder = Dataset.from_list([{"input_ids": [0], "labels": [0]}])
        super().__init__(
            model=model,
            args=args,
            data_collator=PackCollator(),
            train_dataset=placeholder,
            eval_dataset=None if held_out is None else placeholder,
            callbacks=[one for one in callbacks if one not in own],
            **options,
        )
        patch_model(self.model)
        if files is not None:
            self.processing_class = files  # what is saved beside the model
        self.model_accepts_loss_kwargs = True
        self.data_collator = data_collator or PackCollator(
            model=self.model, pad_to=args.pad_to_multiple_of
        )
        self.train_dataset, self.eval_dataset = train, held_out
        head = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        head.register_forward_hook(PackedScores(args.loss_type == "dft"), with_kwargs=True)
        self.metrics = TokenMetrics(self.model)
        (own[0] if own else PackingCallback(train)).attach(self)
        self.add_callback(self.metrics)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """transformers' loss of TRL's forward, whose output `PackedScores` completes.

        TRL's own would ignore weights of the loss, and read four numbers per batch from the device.
        """
        if "mmpack" not in inputs:
            raise ValueError(
                "the batch is not PackCollator's; evaluate packs: evaluate(PackedDataset.from_files(...))"
            )
        asked = {**inputs, FUSED: True}
        if self.aux_loss_enabled:
            asked["output_router_logits"] = True
        loss, outputs = Trainer.compute_loss(self, model, asked, True, num_items_in_batch)
        if self.aux_loss_enabled:  # a mean per micro-batch, as in TRL
            is_summed = num_items_in_batch is not None
            steps = self.current_gradient_accumulation_steps if is_summed else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        self.metrics.take(outputs, inputs)
        if return_outputs:
            with torch.no_grad():
                outputs = model(**{name: x for name, x in inputs.items() if name != "labels"})
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        name = loss_name(logs)
        if name is not None:
            prefix = name.removesuffix("loss")
            logs.update({f"{prefix}{key}": one for key, one in self.metrics.pop("eval").items()})
        elif "loss" in logs:
            logs.update(self.metrics.pop("train"))
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.state.stateful_callbacks[TokenMetrics.NAME] = self.metrics.state()
        super()._save_checkpoint(model, trial)


class PackedScores:
    """A forward hook on the model with TRL's head: the loss of a packed batch, from the log-probabilities, with the
    weights of its rows; reports the rows' losses to `pack/loss/`."""

    applies_weights = True  # `mmpack.hf.loss` refuses weights otherwise

    def __init__(self, is_dft: bool) -> None:
        self.is_dft = is_dft

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        pack: MmpackDict | None = kwargs.get("mmpack")
        if pack is None or not kwargs.get(FUSED):
            return
        log_probs_L, is_row = of_rows(output.log_probs, kwargs), of_rows(output.label_mask, kwargs)
        losses_L = -log_probs_L
        take = pack.get("take_losses")
        if take is not None:
            take(losses_L.detach())
        weights_L = is_row.to(losses_L.dtype)
        if "loss_weight_bits" in pack:
            if self.is_dft:
                raise ValueError(
                    "the batch has weights of the loss, which loss_type='dft' does not apply; train without weights, "
                    "or with loss_type='nll'"
                )
            bits = pack["loss_weight_bits"].to(losses_L.device)
            weights_L = weights_L * bits.view(torch.float32)
        if self.is_dft:  # arXiv 2508.05629, equation 9: the probability is a constant factor
            losses_L = losses_L * log_probs_L.exp().detach()
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
    """(L,) a field of TRL's output at the supervised rows; with full_logits, TRL scores every token but the last."""
    whole = values[0]
    return whole if "shift_labels" in batch else whole[batch["mmpack"]["supervised_index"]]


def gathered(mine: Any) -> Sequence[Any]:
    """A small object of every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return ranks


def check_options(args: SFTConfig, options: Mapping[str, Any], capacity: int) -> None:
    """Refuse options of `SFTConfig` and arguments of `SFTTrainer` that do not apply to packs.

    Raises:
        ValueError: names the first one.
    """
    if not isinstance(args, SFTConfig):
        raise ValueError(
            f"args is a {type(args).__name__}; pass a trl.SFTConfig, which takes the same options"
        )
    defaults = {field.name: field.default for field in fields(args)}
    for name, (why, advice) in REFUSED_OPTIONS.items():
        value = getattr(args, name, defaults.get(name))
        if value != defaults.get(name) and value != {"skip_prepare_dataset": True}:
            raise ValueError(f"SFTConfig({name}={value!r}) does not apply: {why}; {advice}")
    if args.max_length not in (None, defaults["max_length"], capacity):
        raise ValueError(
            f"SFTConfig(max_length={args.max_length}) does not apply: the packs have up to {capacity:,} tokens; pass "
            f"max_length=None, or pack with --capacity {args.max_length}"
        )
    for name, sentence in _REFUSED_ARGUMENTS.items():
        if options.get(name) is not None:
            raise ValueError(f"{name} does not apply: {sentence}")


def check_loss(args: SFTConfig, train: Packs, collator: PackCollator | None) -> None:
    """Refuse a collator that is not mmpack's, and options of it and of the loss that contradict each other.

    Raises:
        ValueError: names them.
    """
    if collator is not None and not isinstance(collator, PackCollator):
        raise ValueError(
            f"data_collator is {collator!r}, which makes no batches of packs; leave it out, or pass a PackCollator"
        )
    multiple = args.pad_to_multiple_of
    if collator is not None and multiple is not None and collator.pad_to != multiple:
        raise ValueError(
            f"SFTConfig(pad_to_multiple_of={multiple}) does not apply to the PackCollator passed; pass "
            f"PackCollator(pad_to={multiple})"
        )
    if args.loss_type == "dft":
        reduction = "token" if collator is None else collator.loss_reduction
        if train.source_weights or reduction != "token":
            found = "source_weights" if train.source_weights else f"loss_reduction={reduction!r}"
            raise ValueError(
                f"loss_type='dft' does not apply weights of the loss, and there are {found}; leave them out, or pass "
                "loss_type='nll'"
            )


def _packs(data: Any, name: str) -> Packs:
    """The packs of an argument; a folder is opened."""
    if isinstance(data, str | os.PathLike):
        return PackedDataset.from_store(data)
    if isinstance(data, PackedDataset | PackStream):
        return data
    if isinstance(data, Mapping):
        raise TypeError(
            f"{name} is a dict, which only eval_dataset may be; pack its files together: mmpack pack FILE FILE"
        )
    raise TypeError(
        f"{name} is a {type(data).__name__}, which holds no packs; pass a PackedDataset "
        "(PackedDataset.from_files), a PackStream or a folder of mmpack pack. For rows, use TRL's SFTTrainer with "
        "PackCollator(encoder)"
    )
