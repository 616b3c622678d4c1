"""PackCollator: a list of packs, encoded samples or processor outputs -> forward kwargs.

The batch has only names transformers knows at its top, so an unpatched model computes the same
loss, only slower; all the rest travels in one nested dict, `mmpack`, which the patched model's hook
takes. Host-side integers stay numpy or int there: Trainer moves tensors to the device and nothing
else, and whatever lies on the host can be asked for free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from mmpack import _native, buffers, images, reference
from mmpack.assemble import assemble, concatenate
from mmpack.buffers import as_tensor
from mmpack.encode import encode_samples
from mmpack.hf.families import Tower, inner_model, tower_of
from mmpack.readers import read_samples
from mmpack.types import IGNORE, EncodedSample, Float32, Int64, Pack
from mmpack.vision import VisionSpec

_PIXELS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}  # and grids


class PackCollator:
    """Data collator for a Hugging Face Trainer; whatever it gets becomes one packed row.

    It takes a list of

    - `Pack`s, the items of a `PackedDataset` (use `per_device_train_batch_size=1`);
    - `EncodedSample`s;
    - outputs of a Qwen-VL processor, one sample each: dicts with `input_ids`, `labels`,
      `pixel_values` and `image_grid_thw`; or raw rows as `read_samples` takes them (TRL hands
      those on). Both need `processor=`.

    The batch holds `input_ids (1, T)`, `labels (1, T)`, `shift_labels (1, L)`,
    `logits_to_keep (L,)`, `position_ids (4, 1, T)`, `pixel_values (P, C * t * p * p)` float32 equal
    to transformers' image processor, `image_grid_thw (I, 3)`, `use_cache=False` (a stock Trainer
    leaves the cache on, and with a cache transformers mixes packed samples without a word) and
    `mmpack={...}`. T tokens, L supervised tokens, P patches, I images.

    Videos are `pixel_values_videos` and `video_grid_thw`, as transformers has them; with timestamps a grid
    is one temporal patch.

    With `pixels="uint8"` the `pixel_values` are the pack's own bytes, (P, C * p * p) uint8: an eighth
    of what float32 takes from the worker to the device; a video's, (P, C * t * p * p), are a quarter. The patched model's patch embedding normalises
    them, an unpatched model cannot read them; hence `model=`.

    Qwen2.5-VL's and Qwen3-VL's towers need more indices than a pack has, which differ by model: windows,
    or places in a table of positions. They are made here, in the worker; hence `model=` too.

    Args:
        processor: a transformers Qwen-VL processor, or (tokenizer, VisionSpec).
        model: the model the batches are for, for Qwen2-VL with float32 pixels not needed; asked what
            its tower is and whether it is patched, and not kept.
        pixels: "float32" or "uint8".
        full_logits: leave `logits_to_keep` and `shift_labels` away, so that the model returns the logits
            of every token, in the places of `labels`: for `compute_metrics`, `compute_loss_func`. It
            costs the memory of (1, T, V) logits.
        pad_to: fill T up to a multiple of this with a last segment without labels, so that text has
            one shape (`torch.compile`); as a rule the capacity. Patches stay as many as there are.

    Raises:
        ValueError: uint8 pixels without a patched model, a model that is not supported, or `pad_to`
            below 1.
    """

    def __init__(
        self,
        processor: Any = None,
        *,
        model: nn.Module | None = None,
        pixels: Literal["float32", "uint8"] = "float32",
        full_logits: bool = False,
        pad_to: int | None = None,
    ) -> None:
        if pixels not in ("float32", "uint8"):
            raise ValueError(f"pixels must be 'float32' or 'uint8', got {pixels!r}")
        if pixels == "uint8" and not _is_patched(model):
            told = "none was passed" if model is None else f"{type(model).__name__} is not patched"
            raise ValueError(
                f"pixels='uint8' needs a patched model to read them, {told}; "
                "PackCollator(model=patch_model(model), pixels='uint8')"
            )
        if pad_to is not None and pad_to < 1:
            raise ValueError(f"pad_to must be positive, got {pad_to}")
        self.pixels = pixels
        self.full_logits = full_logits
        self.pad_to = pad_to
        self.tower = Tower() if model is None else tower_of(inner_model(model))
        if processor is None or isinstance(processor, tuple):
            self.tokenizer, self.vision = processor or (None, None)
        else:
            config = None if model is None else inner_model(model).config
            self.tokenizer, self.vision = processor, VisionSpec.from_processor(processor, config)

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        if all(isinstance(feature, Pack) for feature in features):
            pack = concatenate(features)
            pixel_values = _pixel_values(pack, self.pixels)
        elif all(isinstance(feature, EncodedSample) for feature in features):
            pack = assemble(features)
            pixel_values = _pixel_values(pack, self.pixels)
        elif not all(isinstance(feature, Mapping) for feature in features):
            kinds = sorted({type(feature).__name__ for feature in features})
            raise ValueError(
                "PackCollator takes Packs, EncodedSamples, processor outputs or rows (dicts), all of "
                f"one kind; got {kinds}"
            )
        elif self.vision is None:
            raise ValueError(
                "processor outputs and raw rows can be packed only with their processor: "
                "PackCollator(processor=processor)"
            )
        elif all("input_ids" not in feature for feature in features):
            samples = encode_samples(read_samples(features), self.tokenizer, self.vision)
            pack = assemble(list(samples))
            pixel_values = _pixel_values(pack, self.pixels)
        elif self.pixels == "uint8" and any(
            _has(feature, name) for feature in features for name in _PIXELS
        ):
            raise ValueError(
                "processor outputs hold float pixel_values; pass Packs, EncodedSamples or raw rows for "
                "pixels='uint8', or leave it away"
            )
        else:
            samples = [_from_processor(f, n, self.vision) for n, f in enumerate(features)]
            pack = assemble(samples, pixels=False)
            pixel_values = {}
            for name in _PIXELS:
                parts = [torch.as_tensor(f[name]) for f in features if _has(f, name)]
                if parts:
                    pixel_values[name] = torch.cat(parts)
        if self.pad_to is not None:
            pack = _padded(pack, -len(pack.input_ids) % self.pad_to)
        batch = _batch(pack, pixel_values, self.tower)
        if isinstance(features[-1], Pack) and features[-1].resume is not None:
            batch["mmpack"]["resume"] = features[-1].resume  # of a stream: after its last pack
        if self.full_logits:
            del batch["shift_labels"], batch["logits_to_keep"]
        return batch


def _padded(pack: Pack, num_tokens: int) -> Pack:
    """The pack with a last segment of that many tokens without labels."""
    if not num_tokens:
        return pack
    filler = EncodedSample.filler(num_tokens, pack.vision)
    return concatenate([pack, assemble([filler], pixels=pack.pixels is not None)])


def _is_patched(model: nn.Module | None) -> bool:
    from mmpack.hf.models import is_patched  # here: the patch's self-test collates

    return model is not None and is_patched(model)


def _pixel_values(pack: Pack, pixels: str) -> dict[str, torch.Tensor]:
    """`pixel_values` of the images and `pixel_values_videos`, each where there are any."""
    num_images, values = pack.num_images, {}
    counts = {"images": num_images, "videos": len(pack.grid_thw) - num_images}
    arrays = (pack.pixels, pack.video_pixels)
    for name, (kind, count), patches in zip(_PIXELS, counts.items(), arrays):
        if not count:
            continue
        if patches is None:
            raise ValueError(f"the pack has {count} {kind} but was assembled without pixels")
        if pixels == "float32":
            num_values = pack.vision.patch_values * pack.vision.temporal_patch_size
            floats = buffers.empty((len(patches), num_values), np.float32)
            patches = images.normalize_patches(patches, pack.vision, out=floats)
        values[name] = as_tensor(patches)
    return values


def _batch(pack: Pack, pixel_values: dict[str, torch.Tensor], tower: Tower) -> dict[str, Any]:
    supervised = as_tensor(pack.supervised_index).long()
    labels = as_tensor(pack.labels)
    batch: dict[str, Any] = {
        "input_ids": as_tensor(pack.input_ids)[None],  # first: Trainer reads its size
        "labels": labels[None],
        "shift_labels": labels[supervised + 1][None],
        "logits_to_keep": supervised,
        "position_ids": as_tensor(pack.position_ids)[:, None],
        "use_cache": False,
    }
    grids = as_tensor(pack.grid_thw).split([pack.num_images, len(pack.grid_thw) - pack.num_images])
    for (name, grid_name), grid_thw in zip(_PIXELS.items(), grids):
        if name in pixel_values:
            batch |= {name: pixel_values[name], grid_name: grid_thw}
    grid_order, grid_offsets = _grids_by_segment(pack)
    rule = None
    if pack.num_images < len(pack.grid_thw):
        video = pack.vision.video_spec
        rule = (video.has_timestamps, video.tokens_per_second)
    batch["mmpack"] = {
        "offsets": tuple(map(int, pack.cu_seqlens)),  # ints: torch.compile takes arrays for tensors
        "cu_seqlens": as_tensor(pack.cu_seqlens),
        "max_seqlen": pack.max_seqlen,
        "segment_ids": as_tensor(pack.segment_ids),
        "tiles": as_tensor(pack.tiles),
        "supervised_offsets": tuple(
            map(int, np.searchsorted(pack.supervised_index, pack.cu_seqlens))
        ),
        "supervised_index": supervised,
        "feature_index": as_tensor(pack.feature_index),
        "feature_token": as_tensor(pack.feature_token),
        "text_order": as_tensor(pack.text_order),
        "text_id_offsets": as_tensor(pack.text_id_offsets),
        "num_patches": len(pack.vision_position_ids),
        "grid_thw": tuple(
            tuple(map(int, grid)) for grid in pack.grid_thw[grid_order]
        ),  # by segment
        "grid_offsets": tuple(map(int, grid_offsets)),
        "video_rule": rule,
        "vision_offsets": tuple(map(int, pack.vision_cu_seqlens)),
        "vision_cu_seqlens": as_tensor(pack.vision_cu_seqlens),
        "vision_max_seqlen": pack.vision_max_seqlen,
        "vision_segment_ids": as_tensor(pack.vision_segment_ids),
        "vision_tiles": as_tensor(pack.vision_tiles),
        "vision_position_ids": as_tensor(pack.vision_position_ids),
    }
    if pixel_values and tower.window_side is not None:
        batch["mmpack"] |= _in_windows(pack, tower.window_side)
    if pixel_values and tower.table_side is not None:
        index, weight = reference.interpolated_positions(
            pack.vision_position_ids, pack.grid_thw, tower.table_side
        )
        batch["mmpack"]["position_index"] = torch.from_numpy(index)
        # The floats' bits: FSDP2 and DeepSpeed cast floating inputs to bf16.
        batch["mmpack"]["position_weight_bits"] = torch.from_numpy(weight.view(np.int32))
    if any(values.dtype == torch.uint8 for values in pixel_values.values()):
        # Python floats: tensors of them would be cast to bf16 with the inputs
        batch["mmpack"]["normalization"] = (pack.vision.image_mean, pack.vision.image_std)
    return batch


def _in_windows(pack: Pack, side: int) -> dict[str, Any]:
    """What a windowed tower takes, and the pack's features and positions in the order it gives them."""
    merged = pack.vision.merge_size**2
    order, cu_seqlens = reference.window_order(
        pack.vision_position_ids, pack.vision_segment_ids, pack.vision.merge_size, side
    )
    place = np.empty_like(order)
    place[order] = np.arange(len(order), dtype=np.int32)
    is_text = pack.feature_index < 0
    positions = pack.vision_position_ids.reshape(-1, merged, 2)[order].reshape(-1, 2)
    arrays = {
        "feature_index": np.where(is_text, np.int32(-1), place[pack.feature_index]),
        "feature_token": pack.feature_token[order],
        "vision_position_ids": positions,
        "window_order": order,
        "window_cu_seqlens": cu_seqlens,
        "window_segment_ids": reference.segment_ids(cu_seqlens),
        "window_tiles": _native.attention_tiles(cu_seqlens, False),
    }
    return {
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        "window_offsets": tuple(map(int, cu_seqlens)),
        "window_max_seqlen": int(np.diff(cu_seqlens).max()),
    }


def _grids_by_segment(pack: Pack) -> tuple[Int64, Int64]:
    """(order (I,), offsets (S + 1,)): the grids segment by segment, which feature order, images before
    videos, is not."""
    ends = pack.vision.num_features(pack.grid_thw).cumsum()
    last_token = pack.feature_token[ends - 1]
    order: Int64 = np.argsort(last_token)
    return order, np.searchsorted(last_token[order], pack.cu_seqlens)


def _has(feature: Mapping[str, Any], name: str) -> bool:
    return feature.get(name) is not None and len(feature[name]) > 0


def _from_processor(feature: Mapping[str, Any], number: int, vision: VisionSpec) -> EncodedSample:
    """A processor's output back to one marker per image; pixels are left where they are."""
    if feature.get("input_ids") is None:
        raise ValueError(
            f"feature {number} has no input_ids, others have; batch one kind at a time"
        )
    if feature.get("labels") is None:
        raise ValueError(f"feature {number} has no labels; mask the prompt with -100 and pass them")
    input_ids, labels = (_row(feature[name], name, number) for name in ("input_ids", "labels"))
    if len(input_ids) != len(labels):
        raise ValueError(
            f"feature {number} has {len(input_ids)} input_ids but {len(labels)} labels"
        )
    if feature.get("attention_mask") is not None:  # padding needs no place in a pack
        real = _row(feature["attention_mask"], "attention_mask", number) != 0
        input_ids, labels = input_ids[real], labels[real]
    grids, markers = [], []
    for (pixels, name), token_id, kind in zip(
        _PIXELS.items(), (vision.image_token_id, vision.video_token_id), ("image", "video")
    ):
        grid_thw = np.empty((0, 3), dtype=np.int32)
        if _has(feature, pixels):
            if feature.get(name) is None:
                raise ValueError(f"feature {number} has {pixels} but no {name}; pass both on")
            grid_thw = np.asarray(feature[name], dtype=np.int32).reshape(-1, 3)
        patches = int(grid_thw.astype(np.int64).prod(axis=-1).sum())
        if len(grid_thw) and len(feature[pixels]) != patches:
            raise ValueError(
                f"feature {number} has {len(feature[pixels])} patches in {pixels} but its "
                f"grids have {patches}"
            )
        if kind == "video" and len(grid_thw) and vision.video_spec.has_timestamps:
            grid_thw = np.insert(grid_thw[:, 1:].repeat(grid_thw[:, 0], axis=0), 0, 1, axis=1)
        num_features = vision.num_features(grid_thw)
        placeholders = np.flatnonzero(input_ids == token_id)
        if len(placeholders) != num_features.sum():
            raise ValueError(
                f"feature {number} has {len(placeholders)} {kind} placeholders but its {len(grid_thw)} "
                f"{kind}s have {num_features.sum()} features; was it truncated?"
            )
        grids.append(grid_thw)
        markers.append(placeholders[np.cumsum(num_features) - num_features])
    is_vision = np.isin(input_ids, (vision.image_token_id, vision.video_token_id))
    keep = ~is_vision
    keep[np.concatenate(markers)] = True
    order = np.argsort(np.concatenate(markers))
    return EncodedSample(
        input_ids=input_ids[keep].astype(np.int32),
        labels=np.where(is_vision, IGNORE, labels)[keep].astype(np.int32),
        grid_thw=np.concatenate(grids)[order],
        images=(),
        vision=vision,
        source="processor outputs",
        row=number,
        temporal_step=_steps(feature, [len(g) for g in grids], number, vision)[order],
    )


def _steps(
    feature: Mapping[str, Any], num_grids: Sequence[int], number: int, vision: VisionSpec
) -> Float32:
    """M-RoPE positions a temporal patch, of the images and then the videos."""
    steps = np.ones(sum(num_grids), dtype=np.float32)
    per_second = vision.video_spec.tokens_per_second if num_grids[1] else None
    if per_second is not None:
        seconds = feature.get("second_per_grid_ts")
        if seconds is None or len(seconds) != num_grids[1]:
            raise ValueError(
                f"feature {number} has {num_grids[1]} videos and not as many second_per_grid_ts; pass on "
                "what the processor gives"
            )
        steps[num_grids[0] :] = np.float32(per_second) * np.asarray(seconds, dtype=np.float32)
    return steps


def _row(values: Any, name: str, number: int) -> np.ndarray:
    row = np.asarray(values)
    if row.ndim == 2 and len(row) == 1:  # processors add a batch dimension
        row = row[0]
    if row.ndim != 1:
        raise ValueError(f"feature {number} must be one sample, its {name} has shape {row.shape}")
    return row
