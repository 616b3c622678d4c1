"""What `PackingCallback` refuses or says about a Trainer before it trains or evaluates on packs.

The command line cannot run into these: `mmpack train` patches the model, keeps float32 weights, and trains on one
pack per batch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from mmpack.errors import counted
from mmpack.families import FAMILIES
from mmpack.hf.collator import PackCollator
from mmpack.hf.compat import loads_whole_checkpoints
from mmpack.hf.model_parts import find_inner
from mmpack.hf.model_patch import is_patched
from mmpack.packing.dataset import PackedDataset
from mmpack.packing.even_packs import EvenPacks
from mmpack.packing.stream import PackStream

_log = logging.getLogger(__name__)


def check_arguments(args: TrainingArguments) -> None:
    """Refuse arguments under which a step would not train on its planned packs, and those that packs ignore.

    Raises:
        ValueError: names the argument.
    """
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size would change the packs per step while training; set "
            "per_device_train_batch_size, or pack with a smaller capacity"
        )
    if args.data_seed is not None:
        raise ValueError(
            "data_seed does not apply, because the plan determines the order of packs; leave it out, or plan with "
            "another seed (--plan-seed, seed)"
        )
    if args.dataloader_drop_last:
        raise ValueError(
            "dataloader_drop_last=True would leave packs out of an evaluation, and training drops none; leave it "
            "out"
        )
    if args.dataloader_num_workers and not getattr(args, "dataloader_in_order", True):
        raise ValueError(
            "dataloader_in_order=False would train on packs in the order in which workers finish, which a resumed "
            "run cannot continue; leave it out"
        )


def check_trainer(trainer: Trainer, of_callback: PackedDataset | PackStream) -> None:
    """Refuse a Trainer that trains on other packs than the callback's, whose epochs nobody would set (a data set
    that wraps the callback's is not known and passes), or `compute_metrics` that would not have all logits.

    Raises:
        ValueError: it is another `PackedDataset` or `PackStream`, or the collator leaves logits out.
    """
    of_trainer = trainer.train_dataset
    if isinstance(of_trainer, (PackedDataset, PackStream)) and of_trainer is not of_callback:
        raise ValueError(
            f"PackingCallback is for {of_callback!r}, but Trainer's train_dataset is another, {of_trainer!r}; "
            "pass the same to both"
        )
    _check_metrics(trainer)


def check_collator(collator: Any, model: nn.Module) -> None:
    """Refuse a collator that cannot read packs, or whose batches the model cannot; warn if the model is not
    patched.

    A collator of one's own, or around `PackCollator`, is not known and passes.

    Raises:
        ValueError: it is one of transformers' or TRL's, or makes batches for patched models only; the model is an
            unpatched Qwen3.5.
    """
    collator = getattr(
        collator, "data_collator", collator
    )  # Trainer's, which removes unused columns
    kind = collator if hasattr(collator, "__name__") else type(collator)
    if str(kind.__module__).partition(".")[0] in ("transformers", "trl"):
        raise ValueError(
            f"Trainer's data_collator is {kind.__name__}, which cannot make batches of packs; pass "
            "data_collator=PackCollator(model=model)"
        )
    base = find_inner(model)
    if base is None or is_patched(model):
        return
    advice = "call patch_model(model) before the Trainer is made"
    if isinstance(collator, PackCollator):
        for name, value in (
            ("pixels", "uint8"),
            ("assemble", "device"),
            ("loss_reduction", "sample"),
            ("loss_reduction", "sqrt"),
        ):
            if getattr(collator, name) == value:
                raise ValueError(
                    f"Trainer's model is not patched, but PackCollator({name}={value!r}) makes batches for a "
                    f"patched model; {advice}"
                )
        if collator.is_patched:
            raise ValueError(
                "Trainer's model is not patched, but its PackCollator was made for a patched one, so an image "
                f"that several rows show is in the batch once; {advice}, or pass PackCollator(model=model) of "
                f"this model"
            )
    family = FAMILIES.get(base.config.model_type)
    if family is not None and family.has_linear_attention:
        raise ValueError(
            "Trainer's model is not patched, and its Gated DeltaNet layers would mix the segments of a pack; "
            f"{advice}"
        )
    _log.warning(
        "the model is not patched: stock transformers trains it on packs, which is slower, and with "
        "gradient_accumulation_steps it may weight each pack equally, however many supervised tokens it has; %s",
        advice,
    )


def _check_metrics(trainer: Trainer) -> None:
    """Refuse `compute_metrics` on logits of supervised tokens only, which stand beside the labels of every token.

    Raises:
        ValueError: the collator leaves logits out.
    """
    collator = trainer.data_collator
    if trainer.compute_metrics is None or trainer.args.prediction_loss_only:
        return
    if isinstance(collator, PackCollator) and not collator.full_logits:
        raise ValueError(
            "compute_metrics would get the labels of every token but the logits of supervised tokens only; pass "
            "PackCollator(full_logits=True), or prediction_loss_only=True to evaluate the loss alone"
        )


def tell_batch_size(option: str, size: int, capacity: int) -> None:
    """Warn if several packs are put into one row; `option` is the argument that says how many."""
    if size > 1:
        _log.warning(
            "%s=%d puts %d packs, up to %s tokens, into each batch, and one pack of %s tokens is a full batch; "
            "pass %s=1%s",
            option,
            size,
            size,
            f"{size * capacity:,}",
            f"{capacity:,}",
            option,
            f" and gradient_accumulation_steps={size} for as many packs per step"
            if "train" in option
            else "",
        )


def tell_evaluation(data: Any, size: int) -> bool:
    """Warn if an evaluation puts several packs into a batch, which Trainer's default of 8 does. `data` is a data
    set or a dict of them; returns whether there are packs in it."""
    for one in data.values() if isinstance(data, Mapping) else [data]:
        one = one.dataset if isinstance(one, EvenPacks) else one
        if isinstance(one, PackedDataset | PackStream):
            tell_batch_size("per_device_eval_batch_size", size, one.capacity)
            return True
    return False


def tell_unseen(weights: Mapping[str, float], seen: set[str]) -> None:
    """Name sources with a weight of which this rank trained on no sample; a stream's are not known before."""
    for name in weights.keys() - seen:
        _log.warning(
            "no sample of the source %r, which has a weight (source_weights), was in this rank's packs; it had %s",
            name,
            ", ".join(map(repr, sorted(seen)[:12])),
        )


def check_evaluation(data: Any, args: TrainingArguments) -> None:
    """Refuse to evaluate a stream whose batches accelerate would split, or repeat on several ranks: it tells how
    many are repeated for data sets only. `data` is a data set or a dict of them.

    Raises:
        ValueError: it would.
    """
    sets = data.values() if isinstance(data, Mapping) else [data]
    if not any(isinstance(getattr(one, "dataset", one), PackStream) for one in sets):
        return
    if args.world_size > 1:
        raise ValueError(
            f"accelerate would repeat packs of the stream in eval_dataset to give all {args.world_size} ranks "
            "equally many, and eval_loss would count them twice; evaluate a PackedDataset "
            "(PackedDataset.from_files)"
        )
    if args.accelerator_config.dispatch_batches is not False:
        raise ValueError(
            "accelerate would split the batches of the stream in eval_dataset; pass "
            'TrainingArguments(accelerator_config={"dispatch_batches": False})'
        )


def tell_weights(model: nn.Module) -> None:
    """Warn if trained weights have 8 or 11 bits, in which small updates are lost. DeepSpeed keeps float32
    copies."""
    if loads_whole_checkpoints():
        return
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        low = [weight for weight in weights if weight.dtype == dtype]
        if low:
            name = str(dtype).removeprefix("torch.")
            _log.warning(
                "%s of %s to train are %s, which keeps %d bits of a value: updates below about 1/%d of it are "
                "lost, as most are at a learning rate of 1e-5; load the model with dtype=torch.float32 and pass "
                "TrainingArguments(bf16=True)",
                f"{len(low):,}",
                counted(len(weights), "weight"),
                name,
                bits,
                2**bits,
            )
