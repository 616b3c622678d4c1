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
from mmpack.types import IGNORE, EncodedSample, Int64, Pack
from mmpack.vision import VisionSpec


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

    With `pixels="uint8"` the `pixel_values` are the pack's own bytes, (P, C * p * p) uint8: an eighth
    of what float32 takes from the worker to the device. The patched model's patch embedding normalises
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
            self.tokenizer, self.vision = processor, VisionSpec.from_processor(processor)

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
        elif self.pixels == "uint8" and any(_has_images(feature) for feature in features):
            raise ValueError(
                "processor outputs hold float pixel_values; pass Packs, EncodedSamples or raw rows for "
                "pixels='uint8', or leave it away"
            )
        else:
            samples = [_from_processor(f, n, self.vision) for n, f in enumerate(features)]
            pack = assemble(samples, pixels=False)
            parts = [torch.as_tensor(f["pixel_values"]) for f in features if _has_images(f)]
            pixel_values = torch.cat(parts) if parts else None
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


def _pixel_values(pack: Pack, pixels: str) -> torch.Tensor | None:
    if not len(pack.grid_thw):
        return None
    if pack.pixels is None:
        raise ValueError(
            f"the pack has {len(pack.grid_thw)} images but was assembled without pixels"
        )
    if pixels == "uint8":
        return as_tensor(pack.pixels)
    num_values = pack.vision.patch_values * pack.vision.temporal_patch_size
    floats = buffers.empty((len(pack.pixels), num_values), np.float32)
    return as_tensor(images.normalize_patches(pack.pixels, pack.vision, out=floats))


def _batch(pack: Pack, pixel_values: torch.Tensor | None, tower: Tower) -> dict[str, Any]:
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
    if pixel_values is not None:
        batch["pixel_values"] = pixel_values
        batch["image_grid_thw"] = as_tensor(pack.grid_thw)
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
        "grid_thw": tuple(tuple(map(int, grid)) for grid in pack.grid_thw),
        "image_offsets": tuple(map(int, _image_offsets(pack))),
        "vision_offsets": tuple(map(int, pack.vision_cu_seqlens)),
        "vision_cu_seqlens": as_tensor(pack.vision_cu_seqlens),
        "vision_max_seqlen": pack.vision_max_seqlen,
        "vision_segment_ids": as_tensor(pack.vision_segment_ids),
        "vision_tiles": as_tensor(pack.vision_tiles),
        "vision_position_ids": as_tensor(pack.vision_position_ids),
    }
    if pixel_values is not None and tower.window_side is not None:
        batch["mmpack"] |= _in_windows(pack, tower.window_side)
    if pixel_values is not None and tower.table_side is not None:
        index, weight = reference.interpolated_positions(
            pack.vision_position_ids, pack.grid_thw, tower.table_side
        )
        batch["mmpack"]["position_index"] = torch.from_numpy(index)
        # The floats' bits: FSDP2 and DeepSpeed cast floating inputs to bf16.
        batch["mmpack"]["position_weight_bits"] = torch.from_numpy(weight.view(np.int32))
    if pixel_values is not None and pixel_values.dtype == torch.uint8:
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


def _image_offsets(pack: Pack) -> Int64:
    """(S + 1,) offsets of the segments in the images."""
    ends = pack.vision.num_features(pack.grid_thw).cumsum()
    last_token = pack.feature_token[ends - 1]
    offsets: Int64 = np.searchsorted(last_token, pack.cu_seqlens)
    return offsets


def _has_images(feature: Mapping[str, Any]) -> bool:
    return feature.get("pixel_values") is not None and len(feature["pixel_values"]) > 0


def _from_processor(feature: Mapping[str, Any], number: int, vision: VisionSpec) -> EncodedSample:
    """A processor's output back to one marker per image; pixels are left where they are."""
    if feature.get("input_ids") is None:
        raise ValueError(
            f"feature {number} has no input_ids, others have; batch one kind at a time"
        )
    if feature.get("labels") is None:
        raise ValueError(f"feature {number} has no labels; mask the prompt with -100 and pass them")
    if feature.get("pixel_values_videos") is not None:
        raise ValueError(f"feature {number} has a video; videos are not supported yet")
    input_ids, labels = (_row(feature[name], name, number) for name in ("input_ids", "labels"))
    if len(input_ids) != len(labels):
        raise ValueError(
            f"feature {number} has {len(input_ids)} input_ids but {len(labels)} labels"
        )
    if feature.get("attention_mask") is not None:  # padding needs no place in a pack
        real = _row(feature["attention_mask"], "attention_mask", number) != 0
        input_ids, labels = input_ids[real], labels[real]
    if _has_images(feature):
        grid_thw = np.asarray(feature["image_grid_thw"], dtype=np.int32).reshape(-1, 3)
    else:
        grid_thw = np.empty((0, 3), dtype=np.int32)

    num_features = vision.num_features(grid_thw)
    placeholders = np.flatnonzero(input_ids == vision.image_token_id)
    if len(placeholders) != num_features.sum():
        raise ValueError(
            f"feature {number} has {len(placeholders)} image placeholders but its {len(grid_thw)} "
            f"images have {num_features.sum()} features; was it truncated?"
        )
    patches = int(grid_thw.astype(np.int64).prod(axis=-1).sum())
    if len(grid_thw) and len(feature["pixel_values"]) != patches:
        raise ValueError(
            f"feature {number} has {len(feature['pixel_values'])} patches in pixel_values but its "
            f"grids have {patches}"
        )
    keep = np.ones(len(input_ids), dtype=bool)
    keep[placeholders] = False
    keep[placeholders[np.cumsum(num_features) - num_features]] = True
    return EncodedSample(
        input_ids=input_ids[keep].astype(np.int32),
        labels=np.where(input_ids == vision.image_token_id, IGNORE, labels)[keep].astype(np.int32),
        grid_thw=grid_thw,
        images=(),
        vision=vision,
        source="processor outputs",
        row=number,
    )


def _row(values: Any, name: str, number: int) -> np.ndarray:
    row = np.asarray(values)
    if row.ndim == 2 and len(row) == 1:  # processors add a batch dimension
        row = row[0]
    if row.ndim != 1:
        raise ValueError(f"feature {number} must be one sample, its {name} has shape {row.shape}")
    return row
