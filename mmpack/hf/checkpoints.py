"""Resuming in a stock Trainer: the weights it does not load, and packs it cannot know are others.

Trainer's checkpoint holds weights, optimizer, scheduler, random states and, in `trainer_state.json`, the
step. It loads weights by name with `strict=False`; Qwen2-VL and Qwen2.5-VL save theirs under the names
of their first release, so nothing is restored and a warning is all one sees (transformers issue 43701).

Which packs come next follows from the step alone: under `PackingCallback` step s of epoch e trains on the
packs from s * n to (s + 1) * n of `plan_epoch(plan, e)`, n being ranks x packs of a batch x accumulated
batches, however these share n. Trainer skips by number, so no pack is made to be thrown away.
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

from mmpack.hf.checkpoint_files import KEY, lacking
from mmpack.hf.compat import (
    WeightRenaming,
    get_model_conversion_mapping,
    loads_whole_checkpoints,
)
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.packing.dataset import EvenPacks, PackedDataset
from mmpack.packing.plan import plan_epoch

_log = logging.getLogger(__name__)


class FinishedError(ValueError):
    """A run that has made all its steps was resumed; Trainer would make one more."""


class WeightKeeper:
    """Lets a model load checkpoints under the names they are saved with, and knows what came.

    It is a hook of `load_state_dict`, and so in all of Trainer's ways to load: on resuming, shard by
    shard, and of the best model at the end. Names are mapped by `from_pretrained`'s own rules.
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
        """See that what was loaded since the last time is the whole model; nothing loaded is nothing.

        FSDP and DeepSpeed load what they saved, all of it and under its own names.

        Raises:
            ValueError: weights of the checkpoint have no place in the model, or the other way round.
        """
        if loads_whole_checkpoints():
            return
        parameters = dict(model.named_parameters(remove_duplicate=False))
        came = {id(parameters[name]) for name in self._came if name in parameters}  # tied ones: one
        missing = [name for name, p in model.named_parameters() if id(p) not in came]
        unknown = sorted(self._unknown)
        self._came, self._unknown = set(), set()
        if missing or unknown:
            raise ValueError(
                f"the checkpoint is of another model: {len(missing)} of {len(parameters)} weights are not "
                f"in it ({', '.join(missing[:3]) or '-'}), {len(unknown)} in it have no place "
                f"({', '.join(unknown[:3]) or '-'}); resume with the model it was saved from, given to "
                "Trainer as `model`"
            )


class PackKeeper:
    """`PackingCallback`'s part for a `PackedDataset`: which packs a step trains on, also of a resumed run."""

    def __init__(self, dataset: PackedDataset) -> None:
        self.dataset = dataset
        self._record: dict[str, Any] | None = None
        self._packs: EvenPacks | None = None

    def prepare(self, args: TrainingArguments) -> EvenPacks:
        """Keep the packs' order, which is random, different in every epoch, and the same for any number of
        ranks. Trainer's own depends on them and on torch's seed.

        Returns:
            What to train on: equally many packs on every rank.

        Raises:
            ValueError: an order was asked for that packs do not have.
        """
        if args.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"packs are planned, train_sampling_strategy={args.train_sampling_strategy!r} would undo it; "
                "leave it out"
            )
        args.train_sampling_strategy = "sequential"
        self._record = {
            "made of": self.dataset.fingerprint(),
            "ranks": args.world_size,
            "batch size": args.train_batch_size,
            "accumulated": args.gradient_accumulation_steps,
        }
        self._packs = EvenPacks(self.dataset, args.world_size * args.train_batch_size)
        return self._packs

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, dataloader: Any) -> None:
        """See that a resumed run continues with the packs that would have come next.

        Raises:
            ValueError: it would not; says what differs.
        """
        if not state.global_step:
            return
        then = state.stateful_callbacks.get(KEY)
        if self._record is None or then is None:
            raise ValueError(
                "the checkpoint was saved without PackingCallback, so its packs are not known"
                if then is None
                else "PackingCallback was added to a Trainer by hand; PackingCallback(dataset).attach(trainer)"
            )
        changed = describe_changes(then["made of"], self._record["made of"])
        if changed:
            raise ValueError(
                f"the checkpoint is of other packs: {changed}. To go on with these, start from its weights "
                "(from_pretrained) instead of resuming"
            )
        steps = [_packs_of_a_step(record) for record in (then, self._record)]
        if steps[0] != steps[1]:
            raise ValueError(
                f"the checkpoint's steps were {steps[0]} packs, {_product(then)}, these would be "
                f"{steps[1]}, {_product(self._record)}, and packs would be lost or trained on twice; choose "
                f"gradient_accumulation_steps so that the product is {steps[0]} again"
            )
        if args.ignore_data_skip and state.global_step % -(-then["made of"]["packs"] // steps[0]):
            raise ValueError(
                "ignore_data_skip would train on this epoch's packs again; leave it out, no pack is made "
                "to be skipped"
            )

    def on_epoch_begin(self, state: TrainerState) -> None:
        """Choose the epoch's packs, and leave in the state what they are made of.

        Raises:
            ValueError: the callback does not know what Trainer was made with.
        """
        if self._record is None:
            raise ValueError(
                "PackingCallback was added to a Trainer by hand; PackingCallback(dataset).attach(trainer)"
            )
        state.stateful_callbacks[KEY] = self._record
        # A run resumed within an epoch begins with its fraction; a finished one is a whole number.
        self.dataset.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def note_place(self, step: int, batch: int, pack: MmpackDict) -> None:
        """Nothing: a step's packs follow from its number."""

    def forget_places(self) -> None:
        """Nothing, too."""

    def place_of(self, step: int, batch: int | None, rank: int | None) -> str:
        """The packs and rows of a step, from 1, in words: of a rank's batch of it where that is known."""
        assert self._record is not None and self._packs is not None
        ranks, size = self._record["ranks"], self._record["batch size"]
        accumulated, num_packs = self._record["accumulated"], len(self._packs)
        epoch, place = divmod(step - 1, -(-num_packs // (ranks * size * accumulated)))
        first = place * accumulated * ranks * size
        packs = range(first, min(first + accumulated * ranks * size, num_packs))
        if batch is not None and rank is not None:
            first += (batch * ranks + rank) * size
            packs = range(first, first + size)
        plan = plan_epoch(self.dataset.plan, epoch)
        full = [pack for pack in packs if pack < plan.num_packs]
        rows: dict[str, list[int]] = {}
        for pack in full:
            for number in map(int, plan.samples_of(pack)):
                sample = self.dataset.samples[number]
                rows.setdefault(sample.source, []).append(sample.row)
        words = [f"rows {_first(found)} of {source}" for source, found in rows.items()]
        name = f"pack{'s' if len(full) > 1 else ''} {_first(full)} of epoch {epoch}"
        return f"{name}: {', '.join(words[:4])}{', ...' if len(words) > 4 else ''}"


def _first(numbers: Sequence[int], most: int = 12) -> str:
    """Numbers in words, many of them counted."""
    words = ", ".join(map(str, numbers[:most]))
    return words if len(numbers) <= most else f"{words} and {len(numbers) - most} more"


def check_unfinished(state: TrainerState) -> None:
    """Raises:
    FinishedError: no step is left.
    """
    if state.global_step >= state.max_steps:
        raise FinishedError(
            f"the checkpoint is of a run that has made its {state.max_steps} steps; raise max_steps or "
            "num_train_epochs to go on"
        )


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint of a run: `trainer.train(resume_from_checkpoint=...)`.

    A run that was killed while it saved leaves a torn folder, which `resume_from_checkpoint=True` would
    take. It is passed over with a warning in the log that says what is missing.

    Args:
        output_dir: the run's, with its `checkpoint-STEP` folders; it need not exist.

    Returns:
        Its folder, or None where there is none (yet).

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
        _log.warning("passed over %s: %s", path, why)
    return None


def check_checkpoint(folder: str | os.PathLike[str], ignored: str = "") -> None:
    """See that a checkpoint is whole; a file that is `ignored` may lack.

    Raises:
        ValueError: the folder is no complete checkpoint; says what is missing.
    """
    why = lacking(Path(folder), ignored)
    if why is not None:
        raise ValueError(
            f"{folder} is not a complete checkpoint: {why}. Name another one, or `last` for the newest that is"
        )


def describe_changes(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two records, in words; empty if nothing does."""
    names = [name for name in now if now[name] != then.get(name)]
    return ", ".join(f"{name} was {then.get(name)} and is {now[name]}" for name in names)


def _packs_of_a_step(record: dict[str, Any]) -> int:
    packs: int = record["ranks"] * record["batch size"] * record["accumulated"]
    return packs


def _product(record: dict[str, Any]) -> str:
    return (
        f"{record['ranks']} ranks x {record['batch size']} a batch x "
        f"{record['accumulated']} accumulated"
    )
