"""Context parallelism under a stock Trainer: the ranks of a group train and evaluate on the same packs.

The group is that of the patched model (`patch_model(context=...)`). accelerate deals batches to ranks in turn, so
a data set that repeats every batch for the ranks of a group (`EvenPacks`) needs nothing else of Trainer; a
`PackStream` is sharded over groups. The supervised tokens of a pack are divided among its ranks, so counts of them
add up over all ranks, as without groups, and so do losses and gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import Trainer

from mmpack.hf.compat import num_replicas
from mmpack.hf.context_parallel import check_part, check_same_packs, join
from mmpack.hf.gather import gathered
from mmpack.hf.model_parts import inner_model
from mmpack.hf.model_patch import context_of, is_patched
from mmpack.packing.context_group import ContextGroup
from mmpack.packing.dataset import PackedDataset
from mmpack.packing.even_packs import EvenPacks
from mmpack.packing.stream import PackStream

ALONE = ContextGroup(0, 1)


def group_of(model: nn.Module | None) -> ContextGroup:
    """The ranks that a patched model shares each pack with; a group of this rank alone for other models."""
    return (None if model is None else context_of(model)) or ALONE


def check_known(model: nn.Module, group: ContextGroup) -> None:
    """
    Raises:
        ValueError: the model's group is not `group`, for which a callback has prepared the Trainer.
    """
    found = group_of(model)
    if found == group:
        return
    if group == ALONE:
        raise ValueError(
            f"the model shares packs over {found.size} ranks (patch_model(context=...)), of which PackingCallback "
            "did not know; patch the model first, then PackingCallback(dataset).attach(trainer)"
        )
    raise ValueError(
        f"PackingCallback was attached for {group}, but the model is now patched for "
        f"{'a rank with packs of its own' if found == ALONE else found}; patch the model once, then make the "
        "Trainer and PackingCallback(dataset).attach(trainer)"
    )


def join_group(
    trainer: Trainer, dataset: PackedDataset | PackStream, watches: bool
) -> ContextGroup:
    """Check that a Trainer can train the ranks of its model's group on the same packs, and make it evaluate so.
    A collective of all ranks where torch.distributed is initialized.

    Args:
        trainer: a Trainer before it trains.
        dataset: the data of its `PackingCallback`.
        watches: whether attention to images is to be recorded.

    Returns:
        The group; nothing is checked or changed for one of a single rank.

    Raises:
        ValueError: an argument does not apply with context parallelism, or the model's group is another rank's.
    """
    group = group_of(trainer.model)
    if group.size == 1:
        return group
    args = trainer.args
    place = ContextGroup.of(args.process_index, args.world_size, group.size)
    if place != group:
        raise ValueError(
            f"the model's context group has rank {group.rank} of {group.size}, but process {args.process_index} "
            f"of {args.world_size} is rank {place.rank} of its group; use ContextGroup.of(RANK, WORLD_SIZE, "
            f"{group.size}) with the numbers that torchrun gives"
        )
    if trainer.train_dataset is not dataset:
        raise ValueError(
            "Trainer's train_dataset is not the data set passed to PackingCallback, so ranks of a context group "
            "would get different packs; pass the same one"
        )
    if watches:
        _refuse("attention_every", "a rank sees a part of the heads", "leave it out")
    _check_images(dataset)
    join(inner_model(trainer.model).config, group)
    _check_options(trainer)
    _share_evaluation(trainer, group)
    return group


def _check_images(dataset: PackedDataset | PackStream) -> None:
    if dataset.on_bad_image == "drop":
        _refuse(
            "on_bad_image='drop'",
            "a rank of a group that cannot read a file would have another pack than the others",
            "find broken images first (mmpack check --decode, mmpack pack --decode --on-error skip)",
        )


def _check_options(trainer: Any) -> None:
    """Refuse options of a Trainer that need more than a rank's part of a pack, or deal batches otherwise."""
    args = trainer.args
    for name in ("compute_metrics", "compute_loss_func"):
        if getattr(trainer, name) is not None:
            _refuse(name, "a rank has the labels of its part of a pack only", "leave it out")
    if not args.average_tokens_across_devices:
        _refuse(
            "average_tokens_across_devices=False",
            "the loss of a pack is divided by the supervised tokens of all of its ranks",
            "leave it out",
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name):
            _refuse(
                f"accelerator_config {name}=True", "accelerate would cut batches", "leave it out"
            )
    if num_replicas(trainer) > 1:
        _refuse(
            "accelerate's parallelism_config",
            "it would deal batches to ranks in another way than mmpack's groups",
            "leave one of them out",
        )


def compare_batches(model: nn.Module, batches: Iterable[Any]) -> None:
    """Refuse a step's batches that are no parts for this model, or of other packs than those of the ranks that
    share them: before the forward, which may be a compiled graph without checks. A collective of a group's hosts.

    Raises:
        ValueError: they are.
    """
    context = context_of(model)
    packs = [b["mmpack"] for b in batches if isinstance(b, Mapping) and "mmpack" in b]
    for pack in packs if is_patched(model) else ():
        check_part(context, pack)
    if context is not None:
        check_same_packs(context, packs)
        for pack in packs:
            pack["context"]["is_compared"] = True


def count_once(group: ContextGroup, *metrics: dict[str, Any]) -> None:
    """Count packs that several ranks share once in the samples per second of Trainer's summary."""
    for one in metrics if group.size > 1 else ():
        if (name := "train_samples_per_second") in one:
            one[name] = round(one[name] / group.size, 3)


def seen_in_group(mine: set[str], group: ContextGroup) -> set[str]:
    """The union of a set over the ranks of this rank's group, whose parts of a pack have rows of different
    sources. A collective of all ranks if groups have several."""
    if group.size == 1:
        return mine
    ranks = gathered(mine)
    first = dist.get_rank() - group.rank
    return set().union(*ranks[first : first + group.size])


def _refuse(what: str, why: str, advice: str) -> None:
    raise ValueError(f"{what} does not apply with context parallelism: {why}; {advice}")


def _share_evaluation(trainer: Any, group: ContextGroup) -> None:
    """Make the ranks of a group evaluate the same packs, also of sets passed to `evaluate` and `predict`."""
    kind = type(trainer)

    def shared(data: Any) -> Any:
        if isinstance(data, Mapping):
            return {name: shared(one) for name, one in data.items()}
        if isinstance(data, EvenPacks):  # perhaps a user's, for other groups
            data = data.dataset
        if data is None:
            return data
        if not isinstance(data, PackedDataset):
            raise ValueError(
                f"eval_dataset is a {type(data).__name__}, of which the ranks of a context group would get "
                "different packs; evaluate a PackedDataset (PackedDataset.from_files)"
            )
        _check_images(data)
        size = trainer.args.eval_batch_size
        multiple = trainer.args.world_size // group.size * size
        return EvenPacks(data, multiple, context_size=group.size, batch_size=size)

    def get_eval_dataloader(eval_dataset: Any = None) -> Any:
        trainer.eval_dataset = shared(trainer.eval_dataset)  # it may have been set since
        if not isinstance(eval_dataset, str):
            eval_dataset = shared(eval_dataset)
        return kind.get_eval_dataloader(trainer, eval_dataset)

    def get_test_dataloader(test_dataset: Any) -> Any:
        return kind.get_test_dataloader(trainer, shared(test_dataset))

    def prediction_step(
        model: nn.Module, inputs: Any, prediction_loss_only: bool, *more: Any, **options: Any
    ) -> Any:
        if not prediction_loss_only:
            _refuse(
                "Trainer.predict with predictions",
                "a rank has the logits of its part of a pack only",
                "pass TrainingArguments(prediction_loss_only=True) for the loss of a set, or predict with a model "
                "patched without context",
            )
        compare_batches(trainer.model, [inputs])
        return kind.prediction_step(trainer, model, inputs, prediction_loss_only, *more, **options)

    trainer.eval_dataset = shared(trainer.eval_dataset)
    trainer.prediction_step = prediction_step
    trainer.get_eval_dataloader = get_eval_dataloader
    trainer.get_test_dataloader = get_test_dataloader
