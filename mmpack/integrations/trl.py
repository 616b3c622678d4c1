"""Packs in TRL's SFTTrainer: `PackedSFTTrainer` (docs/sft_trainer.md).

TRL wants rows to tokenize and a collator of its own kind, and counts tokens by the shape of `position_ids`. The
subclass gives its constructor one placeholder row, then puts packs in its place. Model, optimizer, adapters,
callbacks, checkpoints, model card and the head that scores tokens in tiles are TRL's; packs, batches, epochs,
resuming and checks are mmpack's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from mmpack.data.model_folder import local_path
from mmpack.data.processor_folder import load_tokenizer
from mmpack.hf.callbacks import PackingCallback
from mmpack.hf.collator import PackCollator
from mmpack.hf.compat import folder_of
from mmpack.hf.context_ranks import group_of
from mmpack.hf.evaluation import loss_name
from mmpack.hf.model_patch import patch_model
from mmpack.hf.processor_files import ProcessorFiles
from mmpack.integrations.packed_folders import open_packs
from mmpack.integrations.trl_metrics import FUSED, PackedScores, TokenMetrics
from mmpack.packing.dataset import PackedDataset
from mmpack.packing.stream import PackStream
from mmpack.vision_spec import VisionSpec

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
        "name it in an entry of dataset_info.json, and pack with --dataset",
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

    Loss and gradients of a step are those of a stock Trainer on the same packs, whose equal is the weighted loss
    of the rows alone. Rows are not tokenized, cut or packed here, so options of `SFTConfig` about rows are
    refused. The rest of `SFTConfig`, `peft_config`, `quantization_config`, `callbacks` and `optimizers` do as in
    TRL.

    In the log, over all ranks: `num_tokens`, the tokens trained on since the run began, without filler and empty
    packs, also after resuming; `entropy` and `mean_token_accuracy`, means over all supervised tokens since the
    last log, or of the evaluated set, each counted once (TRL averages over batches). `eval_loss` and `pack/`
    values are `PackingCallback`'s.

    Args:
        model: a name or folder, as TRL loads it, or a model. It is patched (`patch_model`).
        args: an `SFTConfig`. `max_length` may be None, the default or the packs' capacity. `pad_to_multiple_of`
            becomes the collator's `pad_to`.
        train_dataset: a `PackedDataset`, a `PackStream`, or a folder of `mmpack pack`.
        eval_dataset: the same, or a dict of them.
        data_collator: a `PackCollator` with other options than `PackCollator(model=model)`.
        options: other arguments of `SFTTrainer`. Without `processing_class`, the model's tokenizer and processor
            files are saved beside the trained one, with the pixel budget of the packs, as by `mmpack train`; a
            model made from a config, and a stream of encoded samples, need one. A `PackingCallback` in `callbacks`
            is attached in place of a default one.

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
                "callbacks has a PackingCallback of another data set; pass one PackingCallback(train_dataset), or "
                "none"
            )
        if isinstance(model, nn.Module):
            if (size := group_of(model).size) > 1:
                raise ValueError(
                    f"the model shares packs over {size} ranks (patch_model(context=...)), which TRL's metrics "
                    "would count once per rank; use transformers' Trainer, or patch the model without context"
                )
            patch_model(model)
        files = None
        if options.get("processing_class") is None:
            folder, vision = files_of(model, train)
            options["processing_class"] = load_tokenizer(folder)
            files = ProcessorFiles(folder, vision)
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
        self.scores = PackedScores(head, args.loss_type == "dft")
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
        with self.scores:
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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self.scores.remove()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.scores.remove()

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
            f"SFTConfig(max_length={args.max_length}) does not apply: the packs have up to {capacity:,} tokens; "
            f"pass max_length=None, or pack with --capacity {args.max_length}"
        )
    for name, sentence in _REFUSED_ARGUMENTS.items():
        if options.get(name) is not None:
            raise ValueError(f"{name} does not apply: {sentence}")


def files_of(model: str | nn.Module, train: Packs) -> tuple[Path, VisionSpec]:
    """The folder of the model's tokenizer and processor, and what the packs were encoded with.

    Raises:
        ValueError: one of them is not known, so that `processing_class` is needed.
    """
    advice = "pass processing_class=AutoTokenizer.from_pretrained(FOLDER), which is saved beside the model"
    name = model if isinstance(model, str) else folder_of(model.config)
    folder = None if name is None else local_path(name)
    if folder is None or not folder.is_dir():
        raise ValueError(
            f"the model was made from a config, so no folder with its tokenizer is known; {advice}"
        )
    if train.vision is None:
        raise ValueError(
            "train_dataset is a PackStream of encoded samples, whose pixel budget is not known before they are "
            f"read; {advice}"
        )
    return folder, train.vision


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
                f"loss_type='dft' does not apply weights of the loss, and there are {found}; leave them out, or "
                "pass loss_type='nll'"
            )


def _packs(data: Any, name: str) -> Packs:
    """The packs of an argument; a folder is opened."""
    if isinstance(data, str | os.PathLike):
        return open_packs(data, is_training=name == "train_dataset")
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
