"""Resuming in a stock Trainer: restores weights that it does not load, and refuses to continue on other packs.

Trainer's checkpoint holds weights, optimizer, scheduler, random states and, in `trainer_state.json`, the step. It
loads weights by name with `strict=False`; Qwen2-VL and Qwen2.5-VL save theirs under the names of their first
release, so nothing is restored and only a warning is logged (transformers issue 43701).

The next packs follow from the step alone: under `PackingCallback`, step s of epoch e trains on packs s * n to
(s + 1) * n of `plan_epoch(plan, e)`, where n = ranks x packs per batch x accumulated batches; ranks that share
packs (`ContextGroup`) count once. Only the product n matters. Trainer skips by index, so skipped packs are never
assembled.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from mmpack.errors import counted
from mmpack.hf.checkpoint_files import KEY, lacking
from mmpack.hf.compat import (
    WeightRenaming,
    get_model_conversion_mapping,
    loads_whole_checkpoints,
)
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.packing.context_group import ContextGroup
from mmpack.packing.dataset import PackedDataset
from mmpack.packing.even_packs import EvenPacks

_BY_HAND = "PackingCallback was not attached; use PackingCallback(dataset).attach(trainer)"
_log = logging.getLogger(__name__)


class FinishedError(ValueError):
    """A finished run was resumed; Trainer would train one more step."""


class WeightKeeper:
    """Maps the names of a checkpoint's weights to the model's, and records which weights were loaded.

    It is a hook of `load_state_dict`, so it covers every way Trainer loads: on resuming, shard by shard, and for
    the best model at the end. Names are mapped by the rules of `from_pretrained`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self._came: set[str] = set()
        self._unknown: set[str] = set()
        model.register_load_state_dict_pre_hook(self._rename)

    def _rename(
        self, model: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *rest: Any
    ) -> None:
        own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        own |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
        for name in list(state_dict):
            found = name
            for rule in self._renamings:
                if found in own:
                    break
                found, _ = rule.rename_source_key(found)
            if found in own and found not in state_dict:
                state_dict[found] = state_dict.pop(name)
            (self._came if found in own else self._unknown).add(found)

    def check(self, model: nn.Module) -> None:
        """Check that all weights were loaded since the last call. FSDP and DeepSpeed are not checked: they load
        what they saved, under the same names.

        Raises:
            ValueError: the checkpoint lacks weights of the model, or has others.
        """
        if loads_whole_checkpoints():
            return
        parameters = dict(model.named_parameters(remove_duplicate=False))
        came = {
            id(parameters[name]) for name in self._came if name in parameters
        }  # tied weights count once
        missing = [name for name, p in model.named_parameters() if id(p) not in came]
        unknown = sorted(self._unknown)
        self._came, self._unknown = set(), set()
        if missing or unknown:
            raise ValueError(
                f"the checkpoint belongs to another model: {len(missing)} of {len(parameters)} weights missing "
                f"({', '.join(missing[:3]) or '-'}), {len(unknown)} unknown ({', '.join(unknown[:3]) or '-'}); "
                "resume with the model it was saved from, passed to Trainer as `model`"
            )


class PackKeeper:
    """`PackingCallback`'s part for a `PackedDataset`: which packs a step trains on, also in a resumed run."""

    def __init__(self, dataset: PackedDataset) -> None:
        self.dataset = dataset
        self._record: dict[str, Any] | None = None
        self._packs: EvenPacks | None = None

    def prepare(self, args: TrainingArguments, group: ContextGroup) -> EvenPacks:
        """Make Trainer keep the plan's order, which is random, differs in every epoch and does not depend on the
        number of ranks. Trainer's own order depends on ranks and torch's seed. Ranks of a group get the same
        packs.

        Returns:
            The data to train on, with equally many packs on every rank.

        Raises:
            ValueError: `train_sampling_strategy` asks for another order.
        """
        if args.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy={args.train_sampling_strategy!r} would reorder planned packs; leave "
                "it out"
            )
        args.train_sampling_strategy = "sequential"
        self._record = {
            "made of": self.dataset.fingerprint(),
            "ranks": args.world_size,
            "context size": group.size,
            "batch size": args.train_batch_size,
            "accumulated": args.gradient_accumulation_steps,
        }
        size = args.train_batch_size
        self._packs = EvenPacks(
            self.dataset,
            args.world_size // group.size * size,
            context_size=group.size,
            batch_size=size,
        )
        return self._packs

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, dataloader: Any) -> None:
        """Check that a resumed run continues with the packs that would have come next.

        Raises:
            ValueError: it would not; names what differs.
        """
        if self._record is not None:
            self._record["made of"]["loss reduction"] = reduction_of(dataloader)
        if not state.global_step:
            return
        then = state.stateful_callbacks.get(KEY)
        if self._record is None or then is None:
            raise ValueError(
                "the checkpoint was saved without PackingCallback, so its packs are unknown; start from its "
                "weights (mmpack train --model, from_pretrained) instead of resuming"
                if then is None
                else _BY_HAND
            )
        changed = describe_changes(then["made of"], self._record["made of"])
        if changed:
            raise ValueError(
                f"the checkpoint was trained on other packs or another loss: {changed}; to train on these, start "
                "from its weights (mmpack train --model, from_pretrained) instead of resuming"
            )
        steps = [_packs_of_a_step(record) for record in (then, self._record)]
        if steps[0] != steps[1]:
            raise ValueError(
                f"a step had {counted(steps[0], 'pack')} in the checkpoint ({_product(then)}) and has {steps[1]} "
                f"now ({_product(self._record)}), so packs would be skipped or repeated; set "
                f"gradient_accumulation_steps so that the product is {steps[0]}"
            )
        if args.ignore_data_skip and state.global_step % -(-then["made of"]["packs"] // steps[0]):
            raise ValueError(
                "ignore_data_skip would repeat this epoch's packs; leave it out: skipping packs costs nothing"
            )

    def on_epoch_begin(self, state: TrainerState) -> None:
        """Choose the epoch's packs, and record in the state what they are made of.

        Raises:
            ValueError: the callback was not attached to the Trainer.
        """
        if self._record is None:
            raise ValueError(_BY_HAND)
        state.stateful_callbacks[KEY] = self._record
        # The epoch is a fraction in a run resumed within an epoch, and a whole number after a finished one.
        self.dataset.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def left_out(self) -> dict[str, int]:
        """What this rank has left out so far, for the log."""
        return {"dropped_segments": self.dataset.num_dropped_segments}

    def note_place(self, step: int, batch: int, pack: MmpackDict) -> None:
        """Do nothing: a step's packs follow from its number."""

    def forget_places(self) -> None:
        """Do nothing."""

    def place_of(self, step: int, batch: int | None, rank: int | None) -> str:
        """The packs and rows of a step (from 1) in words; only those of one rank's batch where it is known."""
        assert self._record is not None and self._packs is not None
        groups, size = _groups(self._record), self._record["batch size"]
        per_step, num_packs = _packs_of_a_step(self._record), self._packs.num_packs
        epoch, place = divmod(step - 1, -(-num_packs // per_step))
        first = place * per_step
        packs = range(first, min(first + per_step, num_packs))
        if batch is not None and rank is not None:
            first += (batch * groups + rank // self._record["context size"]) * size
            packs = range(first, first + size)
        plan = self.dataset.epoch_plan(epoch)
        full = [pack for pack in packs if pack < plan.num_packs]
        rows: dict[str, list[int]] = {}
        for pack in full:
            for number in map(int, plan.samples_of(pack)):
                sample = self.dataset.samples[number]
                rows.setdefault(sample.source, []).append(sample.row)
        words = [f"rows {_first(found)} of {source}" for source, found in rows.items()]
        name = f"pack{'' if len(full) == 1 else 's'} {_first(full)} of epoch {epoch}"
        return f"{name}: {', '.join(words[:4])}{', ...' if len(words) > 4 else ''}"


def _first(numbers: Sequence[int], most: int = 12) -> str:
    """The first numbers in words, and how many follow."""
    words = ", ".join(map(str, numbers[:most]))
    return words if len(numbers) <= most else f"{words} and {len(numbers) - most} more"


def check_unfinished(state: TrainerState) -> None:
    """Raises:
    FinishedError: no step is left.
    """
    if state.global_step >= state.max_steps:
        raise FinishedError(
            f"the run has finished its {state.max_steps} steps; raise max_steps or num_train_epochs to continue"
        )


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Find the newest complete checkpoint of a run, for `trainer.train(resume_from_checkpoint=...)`.

    A run that was killed while saving leaves an incomplete folder, which `resume_from_checkpoint=True` would load.
    It is skipped, and a warning says what is missing.

    Args:
        output_dir: the run's folder, with its `checkpoint-STEP` folders; it need not exist.

    Returns:
        The checkpoint's folder, or None if there is none.

    Raises:
        OSError: the folder cannot be listed.
    """
    pattern, folder = re.compile(r"checkpoint-(\d+)"), Path(output_dir)
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := pattern.fullmatch(path.name))
    }
    for _, path in sorted(found.items(), reverse=True):
        why = lacking(path)
        if why is None:
            return str(path)
        _log.warning("skipped incomplete checkpoint %s: %s", path, why)
    return None


def check_checkpoint(folder: str | os.PathLike[str], ignored: str = "") -> None:
    """Check that a checkpoint is complete; the file `ignored` may be missing.

    Raises:
        ValueError: it is not; says what is missing.
    """
    why = lacking(Path(folder), ignored) if Path(folder).is_dir() else "there is no such folder"
    if why is not None:
        raise ValueError(
            f"{folder} is not a complete checkpoint: {why}; pass another one, or `last` for the newest complete "
            "one"
        )


def reduction_of(dataloader: Any) -> str | None:
    """The `loss_reduction` of a DataLoader's collator; None: it is not a `PackCollator`."""
    collator = getattr(dataloader, "collate_fn", None)
    collator = getattr(collator, "data_collator", collator)  # Trainer's, which removes columns
    return getattr(collator, "loss_reduction", None)


def describe_changes(then: dict[str, Any], now: dict[str, Any]) -> str:
    """The differences between two records in words; empty if there are none."""
    names = [name for name in now if now[name] != then.get(name)]
    return ", ".join(f"{name} was {then.get(name)} and is {now[name]}" for name in names)


def _packs_of_a_step(record: dict[str, Any]) -> int:
    packs: int = _groups(record) * record["batch size"] * record["accumulated"]
    return packs


def _groups(record: dict[str, Any]) -> int:
    """Ranks with packs of their own; those of a context group count once."""
    groups: int = record["ranks"] // record.get("context size", 1)
    return groups


def _product(record: dict[str, Any]) -> str:
    ranks, size = counted(record["ranks"], "rank"), record.get("context size", 1)
    if size > 1:
        ranks = f"{counted(_groups(record), 'group')} of {counted(size, 'rank')}"
    return f"{ranks} x {record['batch size']} per batch x {record['accumulated']} accumulated"
