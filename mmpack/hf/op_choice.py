"""Which implementation each op of a model uses with `patch_model(impl="auto")`: what `mmpack tune` found on this
GPU.

A model has one shape class per role: text attention, attention in the tower and its windows, rotary embedding of
both, the embedding of tokens and of uint8 patches, and the loss, of kept logits or in the head. The dtype is only
known in the forward (autocast, mixed precision), so a choice is one implementation per role and dtype. Where
nothing was measured, a library's ops run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from mmpack.families import FAMILIES
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.ops.tuning import ShapeClass, Table, machine, read_table
from mmpack.ops.varlen_attention import IMPLEMENTATIONS, why_not_installed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Choice = dict[str, dict[torch.dtype, str]]  # role -> dtype -> implementation
_log = logging.getLogger(__name__)


def roles_of(
    config: Any, context_size: int = 1
) -> dict[str, tuple[str, tuple[tuple[str, int], ...]]]:
    """Each role's op and sizes (`ShapeClass`), from a model's config. Of `context_size` ranks that share a pack,
    each has a part of the heads of text attention."""
    family, text, tower = FAMILIES[config.model_type], config.text_config, config.vision_config
    heads, key_heads = text.num_attention_heads, text.num_key_value_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    of_rank = {"H": heads // context_size, "Hk": max(key_heads // context_size, 1), "K": head_dim}
    tower_heads = tower.num_heads
    tower_width = getattr(tower, family.tower_width)
    tower_dim = tower_width // tower_heads
    in_text = {"H": heads, "Hk": key_heads, "K": head_dim}
    in_tower = {"H": tower_heads, "Hk": tower_heads, "K": tower_dim}
    table = {"V": text.vocab_size, "D": text.hidden_size}
    patch = {
        "E": tower_width,
        "C": tower.in_channels,
        "t": tower.temporal_patch_size,
        "p": tower.patch_size,
    }
    full = {**in_tower, "causal": 0, "window": 0}
    sections = text.rope_parameters.get("mrope_section")
    roles: dict[str, tuple[str, dict[str, int]]] = {
        "attention": ("varlen_attention", {**of_rank, "causal": 1, "window": 0}),
        "vision_attention": ("varlen_attention", full),
        "vision_rotary": ("apply_mrope", {**in_tower, **_sections((tower_dim // 4,) * 2)}),
        "patches": ("patch_embed", patch),
        "embedding": ("embed_features", table),
        "loss": ("supervised_cross_entropy", {"V": text.vocab_size}),
        "head": ("supervised_linear_cross_entropy", table),
    }
    if sections:  # published configs have them; otherwise they are constants of the model's class
        interleaved = _sections(tuple(sections), family.is_interleaved)
        roles["rotary"] = ("apply_mrope", {**in_text, **interleaved})
    if family.has_windows:
        side = tower.window_size // tower.patch_size
        roles["window_attention"] = ("varlen_attention", {**full, "window": side * side})
    return {role: (op, tuple(sizes.items())) for role, (op, sizes) in roles.items()}


def _sections(sections: tuple[int, ...], is_interleaved: bool = False) -> dict[str, int]:
    padded = (*sections, 0, 0, 0)
    return {**{f"S{n}": padded[n] for n in range(3)}, "interleaved": int(is_interleaved)}


def shape_classes(
    config: Any, dtype: torch.dtype = torch.bfloat16, context_size: int = 1
) -> list[ShapeClass]:
    """What `mmpack tune` measures for a model that computes in `dtype`; the embedding also in float32, in which
    mixed precision keeps weights.

    Args:
        config: the model's config.
        context_size: ranks that share each pack.

    Raises:
        ValueError: the model's family is not supported.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"a model of model_type {config.model_type!r} has no packs; supported: {', '.join(FAMILIES)}"
        )
    found: dict[ShapeClass, None] = {}  # in order, without those that two roles share
    for role, (op, sizes) in roles_of(config, context_size).items():
        for one in (dtype, torch.float32) if role == "embedding" else (dtype,):
            found[ShapeClass(op, _name(one), sizes)] = None
    return list(found)


def choose(config: Any, table: Table, context_size: int = 1) -> Choice:
    """The choice for each role and dtype that was measured."""
    choice: Choice = {}
    if not table:
        return choice
    for role, (op, sizes) in roles_of(config, context_size).items():
        for dtype in DTYPES:
            measured = table.get(str(ShapeClass(op, _name(dtype), sizes)))
            if measured is not None:
                choice.setdefault(role, {})[dtype] = measured.choice
    return choice


def table_here(device: torch.device) -> Table:
    """What was measured on this machine and can be used; empty on a CPU."""
    if device.type != "cuda":
        return {}
    with torch.cuda.device(device):
        return usable(read_table(machine()))


def usable(table: Table) -> Table:
    """A table without implementations that can no longer be imported, each named in a warning."""
    for measured in table.values():
        for name in [name for name in measured.seconds if name in IMPLEMENTATIONS]:
            if why := why_not_installed(name):
                _log.warning("%s was measured here, but cannot be used: %s", name, why)
                del measured.seconds[name]
    return table


def tell_choice(
    choice: Choice, device: torch.device, ranks: int = 1, context_size: int = 1
) -> None:
    """Log what was chosen on the GPUs of all ranks, of which `context_size` share each pack, or how to choose."""
    if device.type != "cuda":
        return
    if choice:
        _log.info("ops by `mmpack tune`: %s", ", ".join(in_words(choice)))
        if context_size > 1 and "attention" not in choice:
            _log.warning(
                "attention uses a library, because it was not measured for the heads of a rank of a context "
                "group; `mmpack tune MODEL --context-size %d` does that",
                context_size,
            )
        return
    _log.warning(
        "impl='auto' uses library ops, because nothing was measured for this model on %s; `mmpack tune MODEL` "
        "does that, and impl='libraries' needs no measurement",
        "this GPU" if ranks == 1 else "the GPU of every rank",
    )


def in_words(choice: Choice) -> list[str]:
    """One text per role and dtype."""
    record = as_record(choice)
    return [f"{name} {impl}" for name, impl in record.items()]


def as_record(choice: Choice) -> dict[str, str]:
    """A choice as JSON, for checkpoints: "attention bfloat16" -> "triton"."""
    return {
        f"{role} {_name(dtype)}": impl
        for role, by_dtype in choice.items()
        for dtype, impl in by_dtype.items()
    }


def impl_for(pack: MmpackDict | Mapping[str, Any], role: str, dtype: torch.dtype) -> str:
    """The implementation for a role and the dtype it computes in; "auto" means a library's."""
    impl: str = pack.get("impl", "auto")
    if impl != "auto" or "tuned" not in pack:
        return impl
    chosen: str = pack["tuned"].get(role, {}).get(dtype, "auto")
    return chosen


def compute_dtype(value: torch.Tensor) -> torch.dtype:
    """The dtype that layers compute in: under autocast its dtype, whatever arrives (rope makes q and k
    float32)."""
    device = value.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return value.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
