"""Runs the vision tower on a pack, with indices computed on the host.

Qwen2.5-VL's tower permutes its hidden states into windows and its features back. For a pack, the pixels are
permuted instead, which need no gradient, and positions come permuted. The features stay in window order, in which
`feature_index` counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from mmpack import reference
from mmpack.hf import attention, uint8_pixels
from mmpack.hf.compat import WINDOW_METHOD, is_sharded, tower_keywords
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.hf.model_parts import family_of

Binding = tuple[nn.Module, str, Callable[..., Any]]  # module, method, stock method -> new one


def pixels_and_grids(batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch's pixels (P, values) and their grids (U, 3), images before videos, for one call of the tower. If
    uint8 images and videos are mixed, the images are repeated in every frame, as the worker does for floats."""
    pack: MmpackDict = batch["mmpack"]
    names = ("pixel_values", "pixel_values_videos")
    parts = [batch[name] for name in names if batch.get(name) is not None]
    if len(parts) == 1:
        return parts[0], pack["vision_grid_thw"]
    stills, clips = parts
    if stills.dtype == torch.uint8:
        channels = len(pack["normalization"][0])
        stills = uint8_pixels.in_every_frame(stills, channels, clips.shape[1])
    return torch.cat([stills, clips]), pack["vision_grid_thw"]


def run_tower(
    base: Any, pixel_values: torch.Tensor, grid_thw: torch.Tensor, pack: MmpackDict
) -> list[torch.Tensor]:
    """Features (F, D) in the order of `pack["feature_index"]`: first those for the embeddings, then deepstack's,
    one per text layer.

    Args:
        base: a patched inner model.
        pixel_values: (P, values) floats, or uint8, in merge order.
        grid_thw: (U, 3) patches of each distinct image and video.
        pack: the batch's `mmpack` dict.
    """
    tower, family = base.visual, family_of(base)
    if pixel_values.dtype == torch.uint8:
        tower.patch_embed.normalization = pack["normalization"]
        tower.patch_embed.choice = {name: pack.get(name, {}) for name in ("impl", "tuned")}
    else:
        pixel_values = pixel_values.type(tower.dtype)
    if family.has_windows:
        order = pack["window_order"]
        features = pixel_values.unflatten(0, (-1, tower.spatial_merge_unit))
        pixel_values = features.index_select(0, order).flatten(0, 1)
    output = tower(
        pixel_values,
        grid_thw=grid_thw,
        mmpack=pack,
        **tower_keywords(pack, family.has_windows, family.has_position_table),
    )
    return [output.pooler_output, *getattr(output, "deepstack_features", [])]


def run_on_nothing(base: Any, impl: str) -> list[torch.Tensor]:
    """Run the tower on zeros, one feature's patches made on the device; returns what `run_tower` does, for this
    feature."""
    config, device = base.visual.config, base.visual.device
    num_patches = config.spatial_merge_size**2
    patch_values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    cu_seqlens = torch.arange(2, dtype=torch.int32, device=device) * num_patches
    no_int32 = torch.zeros(num_patches, dtype=torch.int32, device=device)
    segments = {
        "offsets": (0, num_patches),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": num_patches,
        "segment_ids": no_int32,
        "tiles": cu_seqlens.repeat(1, 2),  # one tile: the rows of its segment
    }
    pack: Any = {
        "impl": impl,
        **{f"{kind}_{name}": x for kind in ("vision", "window") for name, x in segments.items()},
        "vision_position_ids": torch.zeros(num_patches, 2, dtype=torch.long, device=device),
        "window_order": no_int32[:1],
        "position_index": no_int32[:, None].expand(-1, 4),
        "position_weight_bits": no_int32[:, None].repeat(1, 4),
    }
    zeros = torch.zeros(num_patches, patch_values, dtype=base.visual.dtype, device=device)
    grid_thw = torch.ones(1, 3, dtype=torch.long, device=device)
    return run_tower(base, zeros, grid_thw, pack)


def is_trained(tower: nn.Module) -> bool:
    """Whether the tower needs gradients; a frozen one must save nothing for the backward pass, although
    `enable_input_require_grads` makes the outputs of its embedding require gradients."""
    return any(parameter.requires_grad for parameter in tower.parameters())


def must_run(tower: nn.Module) -> bool:
    """Whether the tower must run without images, because other ranks wait for its gradients (DDP) or its shards
    (FSDP, ZeRO-3)."""
    return is_trained(tower) or any(is_sharded(parameter) for parameter in tower.parameters())


def bindings(base: Any) -> list[Binding]:
    """The methods to bind on the tower."""
    tower, has_windows = base.visual, family_of(base).has_windows
    bound: list[Binding] = [(tower.patch_embed, "forward", uint8_pixels.patch_embed_forward)]
    for number, block in enumerate(tower.blocks):
        is_whole = not has_windows or number in tower.fullatt_block_indexes
        segments = "vision" if is_whole else "window"
        bound.append((block.attn, "forward", partial(attention.vision_forward, segments=segments)))
    if has_windows:
        bound.append((tower, WINDOW_METHOD, _stay_in_order))
    return bound


def _stay_in_order(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The permutation to bind: does nothing if `run_tower` has already permuted."""

    def permute(
        self: nn.Module, input_tensor: torch.Tensor, window_index: torch.Tensor, seq_len: int
    ) -> torch.Tensor:
        if not len(window_index):
            return input_tensor
        return stock(self, input_tensor, window_index, seq_len)

    return permute


def keep_merged(merger: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
    """Forward hook on a windowed tower's merger: keeps its output before the tower permutes it back."""
    merger.merged = [output]


def give_merged(
    tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any | None:
    """Forward hook on a windowed tower: returns the merger's output instead of the permuted features. Done here so
    that wrappers of the tower (FSDP2) see it as the output."""
    merged = tower.merger.merged.pop()
    if kwargs.get("mmpack") is None:
        return None
    output.pooler_output = merged
    return output


def add_deepstack(
    text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook on the text model: passes deepstack's features and the tokens they are added to."""
    pack = kwargs.get("mmpack")
    if pack is None or "deepstack" not in pack:
        return None
    pack = dict(pack)
    features = pack.pop("deepstack")  # layers do not need them
    where = {"visual_pos_masks": pack["feature_token"], "deepstack_visual_embeds": features}
    return args, {**kwargs, **where, "mmpack": pack}


def deepstack_by_index(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The `_deepstack_process` to bind: adds features by index; calls the stock method for a mask."""

    def process(
        self: nn.Module,
        hidden_states: torch.Tensor,
        visual_pos_masks: torch.Tensor,
        visual_embeds: torch.Tensor,
    ) -> torch.Tensor:
        if visual_pos_masks.dtype == torch.bool:
            return stock(self, hidden_states, visual_pos_masks, visual_embeds)
        features_FD = visual_embeds.to(hidden_states.device, hidden_states.dtype)
        return reference.add_features(hidden_states[0], features_FD, visual_pos_masks)[None]

    return process
