"""Ranks use the same implementation of each op, and a resumed run those of its checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from mmpack.hf.checkpoints import describe_changes
from mmpack.hf.gather import gathered
from mmpack.hf.model_patch import context_of, patch_of, use_choice
from mmpack.hf.op_choice import (
    Choice,
    as_record,
    choose,
    in_words,
    roles_of,
    table_here,
    tell_choice,
)
from mmpack.ops.tuning import ShapeClass, Table, agreed

KEY = "mmpack_ops"  # in `TrainerState.stateful_callbacks`, beside `checkpoint_files.KEY`
_log = logging.getLogger(__name__)


def agree_on_ops(
    model: nn.Module, args: TrainingArguments, state: TrainerState, capacity: int
) -> None:
    """Choose the ops of a patched model for all ranks, and record them in the state. A collective.

    With impl "auto", an implementation is chosen if it is right on every rank, by its worst time. A resumed run
    takes what its checkpoint was trained with, if that is right here; otherwise a warning names what differs.

    Args:
        capacity: tokens of a pack.
    """
    patched = patch_of(model)
    if patched is None:
        return
    base, impl = patched
    device = torch.device(args.device)
    is_auto = impl == "auto"
    table = agreed(gathered(table_here(device) if is_auto else {}))
    context = context_of(model)
    size = 1 if context is None else context.size
    choice = choose(base.config, table, size)
    then = state.stateful_callbacks.get(KEY) if state.global_step else None
    if then is not None:
        now, roles = {"impl": impl, **as_record(choice)}, roles_of(base.config, size)
        choice, changed = _kept(roles, then, now, table)
        if changed and args.should_log:
            _log.warning(
                "the checkpoint was trained with other ops: %s; results agree up to rounding, not to the bit",
                changed,
            )
    is_new = use_choice(model, choice, device)
    state.stateful_callbacks[KEY] = {"impl": impl, **as_record(choice)}
    if is_auto and args.should_log:
        if is_new:
            tell_choice(choice, device, args.world_size, size)
        _tell_capacity(roles_of(base.config, size), choice, table, capacity)


def _kept(
    roles: Mapping[str, Any], then: dict[str, str], now: dict[str, str], table: Table
) -> tuple[Choice, str]:
    """(a checkpoint's choice as far as it is right here, what differs from it in words)."""
    kept: Choice = {}
    if now["impl"] == then["impl"] == "auto":
        for role, (op, sizes) in roles.items():
            for name in {*then, *now}:
                of_role, _, dtype = name.partition(" ")
                if of_role != role:
                    continue
                measured = table.get(str(ShapeClass(op, dtype, sizes)))
                right = set(measured.seconds) if measured is not None else set()
                impl = then.get(name)  # None: a library's, which is always there
                chosen = impl if impl is None or impl in right else now.get(name)
                if chosen is not None:
                    kept.setdefault(role, {})[getattr(torch, dtype)] = chosen
    used = {"impl": now["impl"], **as_record(kept)}
    names = sorted({*then, *used})
    library = dict.fromkeys(names, "a library's")
    return kept, describe_changes({**library, **then}, {**library, **used})


def _tell_capacity(roles: Mapping[str, Any], choice: Choice, table: Table, capacity: int) -> None:
    """Warn if packs are much larger or smaller than what was measured."""
    for role in choice:
        op, sizes = roles[role]
        for dtype in choice[role]:
            name = str(ShapeClass(op, str(dtype).removeprefix("torch."), sizes))
            measured = table.get(name)
            if measured is not None and not capacity / 2 < measured.tokens < 4 * capacity:
                _log.warning(
                    "ops were measured for packs of %s tokens, these have %s; `mmpack tune MODEL --capacity %d` "
                    "measures again (%s)",
                    f"{measured.tokens:,}",
                    f"{capacity:,}",
                    capacity,
                    ", ".join(in_words({role: choice[role]})),
                )
                return
