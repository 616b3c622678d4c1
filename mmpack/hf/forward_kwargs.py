"""A pack -> keyword arguments of a forward.

The top level has only names that transformers knows, so an unpatched model computes the same loss, only slower, if
no image is shared between segments (`PackCollator` of a patched model does that); or, if it has Gated DeltaNets,
refuses the batch (`compat.linear_keywords`).
All else is in one nested dict, `mmpack`, for the patched model's hook (`mmpack.hf.mmpack_dict`).

A compact pack's batch has `input_ids (1, n)` with one marker per image and empty `position_ids (4, 1, 0)`, on
which an unpatched model fails at once. The hook calls `assemble_on_device` to expand it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mmpack import _native, reference
from mmpack.data import images
from mmpack.hf.compat import (
    get_vision_interpolation_indices_and_weights,
    get_vision_window_index,
    linear_keywords,
)
from mmpack.hf.fit import facts_of_data
from mmpack.hf.mmpack_dict import CompactDict, ContextDict, MmpackDict
from mmpack.hf.model_parts import TowerSpec
from mmpack.packing import worker_buffers
from mmpack.packing.compact import CompactPack
from mmpack.packing.context_part import ContextPart
from mmpack.packing.worker_buffers import as_ints, as_tensor
from mmpack.types import Int32, Int64, Pack
from mmpack.vision_spec import VisionSpec

PIXELS = {
    "pixel_values": "image_grid_thw",
    "pixel_values_videos": "video_grid_thw",
}  # pixels -> grids


class PartEmbeds:
    """The `inputs_embeds` of a rank's part of a pack. The patched model replaces them; an unpatched one, which
    would train on the part as if it were a pack, raises when it reads them.

    Raises:
        ValueError: when read.
    """

    @property
    def shape(self) -> Any:
        raise ValueError(
            "the batch is a rank's part of a pack, which only a model patched with its context can read; call "
            "patch_model(model, context=...), or make PackCollator(model=model) anew after unpatch_model"
        )

    device = dtype = shape


def pixel_values_of(
    stills: images.Patches, clips: images.Patches, vision: VisionSpec, pixels: str
) -> dict[str, torch.Tensor]:
    """`pixel_values` from patches of images and `pixel_values_videos` from patches of videos, if there are any."""
    values = {}
    for name, patches in zip(PIXELS, (stills, clips)):
        if not len(patches):
            continue
        if pixels == "float32":
            num_values = vision.patch_values * vision.temporal_patch_size
            floats = worker_buffers.empty((len(patches), num_values), np.float32)
            values[name] = as_tensor(images.normalize_patches(patches, vision, out=floats))
        else:
            values[name] = as_tensor(patches)
    return values


def batch_of(
    pack: Pack,
    values: dict[str, torch.Tensor],
    tower: TowerSpec,
    part: ContextPart | None = None,
) -> dict[str, Any]:
    """The batch of an assembled pack, or of a rank's part of it; `values` are its pixels."""
    first_token = pack.grid_token
    by_segment = np.argsort(first_token)
    grid_offsets = np.searchsorted(first_token[by_segment], pack.cu_seqlens)
    is_new = np.zeros(len(by_segment), dtype=bool)
    is_new[np.unique(pack.vision_index[by_segment], return_index=True)[1]] = True
    batch = _batch(pack, values, pack.grid_thw[by_segment], grid_offsets, is_new, part)
    pack = pack if part is None else part.pack
    batch["input_ids"] = as_tensor(pack.input_ids)[None]
    batch["position_ids"] = as_tensor(pack.position_ids)[:, None]
    for name in (
        "cu_seqlens",
        "segment_ids",
        "tiles",
        "feature_index",
        "feature_token",
        "feature_offsets",
        "text_order",
        "text_id_offsets",
        "vision_cu_seqlens",
        "vision_segment_ids",
        "vision_tiles",
        "vision_position_ids",
    ):
        batch["mmpack"][name] = as_tensor(getattr(pack, name))
    if values and tower.window_side is not None:
        order, windows = _windows(pack.vision_grid_thw, pack.vision, tower.window_side)
        batch["mmpack"] |= windows
        if part is None:
            batch["mmpack"] |= _in_windows(batch["mmpack"], order)
        else:  # the features that the tower gives are those to be sent
            sent = batch["mmpack"]["context"]["sent"]
            places = {"vision_position_ids": batch["mmpack"]["vision_position_ids"]}
            for name, tensor in _in_windows({**sent, **places}, order).items():
                (sent if name in sent else batch["mmpack"])[name] = tensor
    if values and tower.table_side is not None:
        index, weight = get_vision_interpolation_indices_and_weights(
            torch.from_numpy(pack.vision_grid_thw),
            tower.table_side,
            align_corners=True,
            spatial_merge_size=pack.vision.merge_size,
        )
        batch["mmpack"]["position_index"] = index.int()
        batch["mmpack"]["position_weight_bits"] = weight.view(torch.int32)
    if tower.has_linear_attention:
        batch |= linear_keywords(batch["mmpack"])
    return batch


def compact_batch_of(
    pack: CompactPack, values: dict[str, torch.Tensor], tower: TowerSpec
) -> dict[str, Any]:
    """The batch of a compact pack, for `assemble_on_device`; `values` are its pixels."""
    is_new = pack.shown[:, 1] == 0
    batch = _batch(pack, values, pack.marker_thw, pack.grid_offsets, is_new)
    batch["input_ids"] = as_tensor(pack.input_ids)[None]
    batch["position_ids"] = torch.empty(4, 1, 0, dtype=torch.int64)
    compact: CompactDict = {
        "offsets": as_tensor(pack.offsets),
        "markers": as_tensor(pack.markers),
        "grid_thw": as_tensor(pack.marker_thw),
        "temporal_step_bits": as_tensor(pack.temporal_step.view(np.int32)),
        "shown": as_tensor(pack.shown),
        "sizes": (
            len(pack.labels),
            pack.num_placeholders,
            pack.num_features,
            pack.num_runs,
            pack.num_tiles,
        ),
        "num_vision_tiles": pack.num_vision_tiles,
        "video_id": pack.vision.video_token_id,
        "merge_size": pack.vision.merge_size,
    }
    batch["mmpack"]["compact"] = compact
    if values and tower.window_side is not None:
        order, windows = _windows(pack.vision_grid_thw, pack.vision, tower.window_side)
        batch["mmpack"] |= {**windows, "window_order": order}
    return batch


def assemble_on_device(
    batch: dict[str, Any], pack: MmpackDict, table_side: int | None
) -> tuple[dict[str, Any], MmpackDict]:
    """Expand a batch of `compact_batch_of` on the device; returns (batch, `mmpack` dict) equal to `batch_of`'s.

    Args:
        table_side: side of the tower's position table, if it has one.
    """
    from mmpack.ops import assemble_patches, assemble_sequence  # late: Triton may be missing

    compact, merge_size = pack["compact"], pack["compact"]["merge_size"]
    made = assemble_sequence(
        batch["input_ids"][0],
        compact["offsets"],
        compact["markers"],
        compact["grid_thw"],
        compact["temporal_step_bits"].view(torch.float32),
        compact["shown"],
        compact["sizes"],
        video_id=compact["video_id"],
        merge_size=merge_size,
    )
    tokens = {
        "input_ids": made.pop("input_ids")[None],
        "position_ids": made.pop("position_ids")[:, None],
    }
    whole: Any = {**pack, **made}
    del whole["compact"]
    if any(batch.get(name) is not None for name in PIXELS):
        grid_thw = pack["vision_grid_thw"]
        places = assemble_patches(
            grid_thw,
            len(pack["vision_offsets"]) - 1,
            pack["num_patches"],
            compact["num_vision_tiles"],
            merge_size=merge_size,
        )
        whole |= {f"vision_{name}": tensor for name, tensor in places.items()}
        if "window_order" in whole:
            whole |= _in_windows(whole, whole["window_order"])
        if table_side is not None:
            whole |= _interpolated(whole["vision_position_ids"], grid_thw, table_side)
    return {**batch, **tokens}, whole


def _batch(
    pack: Pack | CompactPack,
    values: dict[str, torch.Tensor],
    grid_thw: Int64 | Int32,
    grid_offsets: Any,
    is_new: Any,
    part: ContextPart | None = None,
) -> dict[str, Any]:
    """The part of the batch that both kinds share; `grid_thw` (I, 3) and `is_new` (I,), whether nothing before
    shows the same, by segment; `grid_offsets` (S + 1,)."""
    own: Pack | CompactPack = pack
    begin, end, start = 0, len(pack.supervised_index), 0
    if part is not None:
        own, (begin, end), start = part.pack, part.rows, part.start
    rows = pack.supervised_index[begin:end].astype(np.int64)
    shift_labels = torch.from_numpy(pack.labels[rows + 1])  # the last one may be of the next rank
    supervised = torch.from_numpy(rows - start)
    supervised_offsets = np.searchsorted(pack.supervised_index, pack.cu_seqlens)
    batch: dict[str, Any] = {
        "input_ids": None,  # first, because Trainer reads its size
        "labels": as_tensor(own.labels)[None],
        "shift_labels": shift_labels[None],
        "logits_to_keep": supervised,
        "position_ids": None,
        "use_cache": False,
    }
    grids = as_tensor(pack.grid_thw).split([pack.num_images, len(pack.grid_thw) - pack.num_images])
    if part is not None:
        num_videos = len(own.vision_grid_thw) - part.num_still_frames
        grids = as_tensor(own.vision_grid_thw).split([part.num_still_frames, num_videos])
    for (name, grid_name), grids_of_kind in zip(PIXELS.items(), grids):
        if name in values:
            batch |= {name: values[name], grid_name: grids_of_kind}
    rule = None
    if pack.num_images < len(pack.grid_thw):
        video = pack.vision.video_spec
        rule = (video.has_timestamps, video.tokens_per_second)
    payload: MmpackDict = {
        "offsets": as_ints(pack.cu_seqlens),
        "max_seqlen": pack.max_seqlen,
        "supervised_offsets": as_ints(supervised_offsets.clip(begin, end) - begin),
        "supervised_index": supervised,
        "num_patches": int(own.vision_cu_seqlens[-1]),
        "grid_thw": as_ints(grid_thw),
        "grid_offsets": as_ints(grid_offsets),
        "grid_is_new": tuple(map(bool, is_new)),
        "vision_grid_thw": as_tensor(own.vision_grid_thw),
        "video_rule": rule,
        "vision_offsets": as_ints(own.vision_cu_seqlens),
        "vision_max_seqlen": own.vision_max_seqlen,
        "id_range": _id_range(pack.input_ids, shift_labels.numpy()),
        "facts": facts_of_data(pack.vision, len(grid_thw) > 0),
    }
    if any(patches.dtype == torch.uint8 for patches in values.values()):
        payload["normalization"] = (pack.vision.image_mean, pack.vision.image_std)
    if part is not None:
        payload["context"] = _context(part)
        batch["inputs_embeds"] = PartEmbeds()
    batch["mmpack"] = payload
    return batch


def _context(part: ContextPart) -> ContextDict:
    """The `context` entry of a rank's part."""
    context: ContextDict = {
        "rank": part.group.rank,
        "size": part.group.size,
        "tokens": as_ints(np.diff(part.tokens)),
        "checksum": part.checksum,
        "rows": part.rows,
        "supervised_offsets": as_ints(
            np.searchsorted(part.pack.supervised_index, part.pack.cu_seqlens)
        ),
        "weight": float(len(part.pack.supervised_index)),
    }
    if len(part.pack.grid_thw):
        context |= {
            "sent": {
                "feature_index": as_tensor(part.sent_index),
                "feature_token": as_tensor(part.sent_row),
                "feature_offsets": as_tensor(part.sent_offsets),
            },
            "sent_sizes": as_ints(part.sent),
            "received_sizes": as_ints(part.received),
        }
    return context


def _id_range(*arrays: Int64 | Int32) -> tuple[int, int]:
    """(smallest, largest) of token ids and supervised labels."""
    some = [array for array in arrays if len(array)]
    return min(int(array.min()) for array in some), max(int(array.max()) for array in some)


def _windows(grid_thw: Int64, vision: VisionSpec, side: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """(F,) int32 order of the features window by window, and the `mmpack` entries of a windowed tower."""
    window_size = side * vision.merge_size * vision.patch_size
    order, offsets = get_vision_window_index(
        torch.from_numpy(grid_thw), vision.merge_size, window_size, vision.patch_size
    )
    cu_seqlens = offsets.numpy()
    arrays = {
        "window_cu_seqlens": cu_seqlens,
        "window_segment_ids": reference.segment_ids(cu_seqlens),
        "window_tiles": _native.attention_tiles(cu_seqlens, False),
    }
    return order.int(), {
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        "window_offsets": as_ints(cu_seqlens),
        "window_max_seqlen": int(np.diff(cu_seqlens).max()),
    }


def _in_windows(pack: Mapping[str, Any], order_F: torch.Tensor) -> dict[str, torch.Tensor]:
    """The feature and position entries of an `mmpack` dict, in a windowed tower's order."""
    place_F = torch.empty_like(order_F)
    place_F[order_F.long()] = torch.arange(len(order_F), dtype=torch.int32, device=order_F.device)
    feature_T = pack["feature_index"]
    placed_T = place_F.index_select(0, feature_T.clamp_min(0))
    positions = pack["vision_position_ids"].unflatten(0, (len(order_F), -1))
    token_M, starts = pack["feature_token"], pack["feature_offsets"]
    times_F = starts.diff().index_select(0, order_F)
    offsets = torch.cat([starts[:1], times_F.cumsum(0, dtype=torch.int32)])
    # How far each feature's tokens move, token by token.
    back_F = starts.index_select(0, order_F) - offsets[:-1]
    back_M = back_F.repeat_interleave(times_F, output_size=len(token_M))
    at_M = torch.arange(len(token_M), dtype=torch.int32, device=order_F.device) + back_M
    return {
        "feature_index": torch.where(feature_T < 0, feature_T, placed_T),
        "feature_token": token_M.index_select(0, at_M),
        "feature_offsets": offsets,
        "vision_position_ids": positions.index_select(0, order_F).flatten(0, 1),
        "window_order": order_F,
    }


def _interpolated(
    place_P2: torch.Tensor, grid_thw: torch.Tensor, side: int
) -> dict[str, torch.Tensor]:
    """transformers' `get_vision_interpolation_indices_and_weights` for patches at rows and columns `place_P2`,
    with the same roundings. Reimplemented because that function synchronizes with the device twice."""
    sizes_P2 = grid_thw[:, 1:].repeat_interleave(grid_thw.prod(1), dim=0, output_size=len(place_P2))
    at = place_P2.float() * (side - 1) / (sizes_P2 - 1).clamp_min(1).float()
    taps = at.floor()[..., None] + torch.arange(2, dtype=torch.float32, device=at.device)
    weights = (1 - (at[..., None] - taps).abs()).clamp_min(0)
    rows, columns = taps.clamp(0, side - 1).int().unbind(1)
    row_weights, column_weights = weights.unbind(1)
    weight = row_weights[:, :, None] * column_weights[:, None]
    return {
        "position_index": (rows[:, :, None] * side + columns[:, None]).flatten(1),
        "position_weight_bits": weight.flatten(1).view(torch.int32),
    }
