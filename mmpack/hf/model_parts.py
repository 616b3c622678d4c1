"""The parts of a model: inner model, family, vision tower, parameters by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmpack.families import FAMILIES, Family

PATCH = "_mmpack_patch"  # the attribute of a patched inner model that holds `model_patch._Patch`


@dataclass(frozen=True)
class TowerSpec:
    """What the collator computes for a model, beyond Qwen2-VL's: indices for its tower, and keywords.

    Attributes:
        window_side: side of an attention window in features; None: no windows.
        table_side: side of the learned position table; None: no table.
        has_linear_attention: the batch tells unpatched Gated DeltaNets where segments begin.
    """

    window_side: int | None = None
    table_side: int | None = None
    has_linear_attention: bool = False


def family_of(base: Any) -> Family:
    """The family of an inner model found by `inner_model`."""
    return FAMILIES[base.config.model_type]


def tower_of(base: Any) -> TowerSpec:
    """The `TowerSpec` of an inner model."""
    family, config = family_of(base), base.config.vision_config
    window_side = table_side = None
    if family.has_windows:
        window_side = config.window_size // config.spatial_merge_size // config.patch_size
    if family.has_position_table:
        table_side = int(config.num_position_embeddings**0.5)
    return TowerSpec(window_side, table_side, family.has_linear_attention)


def parts_of(model: nn.Module, base: Any) -> dict[str, list[nn.Parameter]]:
    """A model's parameters by the parts of `mmpack.packing.cost.sample_flops`: "vision", the tower without its
    mergers; "merger"; "language", all else, including heads and adapters."""
    tower = dict(base.visual.named_parameters())
    of_tower = {id(parameter) for parameter in tower.values()}
    return {
        "vision": [p for name, p in tower.items() if "merger" not in name],
        "merger": [p for name, p in tower.items() if "merger" in name],
        "language": [p for p in model.parameters() if id(p) not in of_tower],
    }


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Freeze parts of a model, named as in `parts_of`.

    Raises:
        ValueError: no parameter is left to train.
    """
    by_name = parts_of(model, inner_model(model))
    for name in parts:
        for parameter in by_name[name]:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"--frozen {' --frozen '.join(parts)} leaves nothing to train; leave one of them out"
        )


def check_videos(base: Any, rule: tuple[bool, float | None]) -> None:
    """Refuse videos encoded for another family.

    Args:
        base: an inner model.
        rule: the data's `has_timestamps` and `tokens_per_second` (`mmpack.video_spec.VideoSpec`).

    Raises:
        ValueError: the model's differ; names both.
    """
    per_second = getattr(base.config.vision_config, "tokens_per_second", None)
    ours = (family_of(base).video.has_timestamps, per_second)
    if ours != rule:
        raise ValueError(
            f"the model takes videos with has_timestamps={ours[0]} and tokens_per_second={ours[1]}, but these "
            f"were encoded with {rule[0]} and {rule[1]}; encode them with the model's processor and config: "
            "VisionSpec.from_processor(processor, model.config)"
        )


def find_inner(model: nn.Module) -> Any:
    """The module with `visual` and `language_model`, under any wrappers; None if there is none."""
    found = [m for m in model.modules() if hasattr(m, "visual") and hasattr(m, "language_model")]
    # transformers gives the outer model properties of the same names; the inner one comes last.
    return found[-1] if found else None


def inner_model(model: nn.Module) -> Any:
    """`find_inner`, which must belong to a supported family.

    Raises:
        ValueError: there is none, or it belongs to another family; lists those supported.
    """
    base = find_inner(model)
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"cannot patch {type(model).__name__} (model_type {model_type!r}); supported: "
            f"{', '.join(FAMILIES)}"
        )
    return base
