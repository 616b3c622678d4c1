"""PackCollator: a list of packs, encoded samples or processor outputs -> forward kwargs.

What becomes of a pack, names transformers knows and the `mmpack` dict, is in `mmpack.hf.forward_kwargs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from mmpack.data.encode import encode_samples
from mmpack.data.readers import read_samples
from mmpack.hf.fit import check_ids, num_ids
from mmpack.hf.forward_kwargs import PIXELS, batch_of, compact_batch_of, pixel_values_of
from mmpack.hf.model_parts import TowerSpec, inner_model, tower_of
from mmpack.hf.model_patch import is_patched
from mmpack.packing.assemble import assemble, concatenate
from mmpack.packing.compact import compact, concatenate_compact
from mmpack.types import IGNORE, CompactPack, EncodedSample, Float32, Pack
from mmpack.vision_spec import VisionSpec


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
    of what float32 takes from the worker to the device; a video's, (P, C * t * p * p), are a quarter. The
    patched model's patch embedding normalises them, an unpatched model cannot read them; hence `model=`.

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
        assemble: "host", or "device": batches are compact, `input_ids (1, n)` with one marker an image
            and `position_ids (4, 1, 0)`, and the patched model's hook lets the device expand them, to the
            same bits. Set `assemble = "device"` on the `PackedDataset` or `PackStream` too.

    Raises:
        ValueError: uint8 pixels or assembly on the device without a patched model, a model that is not
            supported, or `pad_to` below 1; in a call, items that make no batch, each counted and named.
    """

    def __init__(
        self,
        processor: Any = None,
        *,
        model: nn.Module | None = None,
        pixels: Literal["float32", "uint8"] = "float32",
        full_logits: bool = False,
        pad_to: int | None = None,
        assemble: Literal["host", "device"] = "host",
    ) -> None:
        for name, value, choices in (
            ("pixels", pixels, ("float32", "uint8")),
            ("assemble", assemble, ("host", "device")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be {choices[0]!r} or {choices[1]!r}, got {value!r}")
        asked = "pixels='uint8'" if pixels == "uint8" else "assemble='device'"
        if (pixels == "uint8" or assemble == "device") and (model is None or not is_patched(model)):
            told = "none was passed" if model is None else f"{type(model).__name__} is not patched"
            raise ValueError(
                f"{asked} needs a patched model to take the batches, {told}; "
                f"PackCollator(model=patch_model(model), {asked})"
            )
        if pad_to is not None and pad_to < 1:
            raise ValueError(f"pad_to must be positive, got {pad_to}")
        self.pixels = pixels
        self.full_logits = full_logits
        self.pad_to = pad_to
        self.assemble = assemble
        base = None if model is None else inner_model(model)
        self.tower = TowerSpec() if base is None else tower_of(base)
        self._num_ids = None if base is None else num_ids(base)
        if processor is None or isinstance(processor, tuple):
            self.tokenizer, self.vision = processor or (None, None)
        else:
            config = None if base is None else base.config
            self.tokenizer, self.vision = processor, VisionSpec.from_processor(processor, config)

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        pack, values = self._join(features)
        if self.pad_to is not None:
            pack = _padded(pack, -pack.num_tokens % self.pad_to)
        if isinstance(pack, Pack):
            batch = batch_of(pack, values, self.tower)
        else:
            batch = compact_batch_of(pack, values, self.tower)
        segments = [_num_segments(feature) for feature in features]
        batch["mmpack"]["items"] = (0, *accumulate(segments))  # an item's segments
        if self._num_ids is not None:  # here, as a compiled model asks the host nothing
            samples = [f for f in features if isinstance(f, EncodedSample)]
            check_ids(self._num_ids, batch["mmpack"]["id_range"], samples)
        resume = getattr(features[-1], "resume", None)
        if resume is not None:
            batch["mmpack"]["resume"] = resume  # of a stream: after its last pack
        if self.full_logits:
            del batch["shift_labels"], batch["logits_to_keep"]
        return batch

    def _join(self, features: Sequence[Any]) -> tuple[Pack | CompactPack, dict[str, torch.Tensor]]:
        """One pack, and its pixels as the model takes them."""
        pack: Pack | CompactPack
        if all(isinstance(feature, Pack) for feature in features):
            if self.assemble == "device":
                raise ValueError(
                    "the packs are assembled already; for PackCollator(assemble='device') set "
                    "`assemble = 'device'` on the PackedDataset or PackStream too"
                )
            pack = concatenate(features)
        elif all(isinstance(feature, CompactPack) for feature in features):
            if self.assemble == "host":
                raise ValueError(
                    "the packs are left for the device to assemble, which the batch must say: "
                    "PackCollator(model=model, assemble='device')"
                )
            pack = concatenate_compact(features)
        elif all(isinstance(feature, EncodedSample) for feature in features):
            pack = self._assemble(features)
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
        elif any("input_ids" in feature for feature in features):
            samples = [_from_processor(f, n, self.vision) for n, f in enumerate(features)]
            return self._assemble(samples, pixels=False), self._processed_pixels(features)
        else:
            samples = list(encode_samples(read_samples(features), self.tokenizer, self.vision))
            pack = self._assemble(samples)
        return pack, pixel_values_of(pack, self.pixels)

    def _assemble(
        self, samples: Sequence[EncodedSample], pixels: bool = True
    ) -> Pack | CompactPack:
        if self.assemble == "device":
            return compact(samples, pixels=pixels)
        return assemble(samples, pixels=pixels)

    def _processed_pixels(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        parts = {
            name: [torch.as_tensor(f[name]) for f in features if _has(f, name)] for name in PIXELS
        }
        values = {name: torch.cat(tensors) for name, tensors in parts.items() if tensors}
        if values and self.pixels == "uint8":
            raise ValueError(
                "processor outputs hold float pixel_values; pass Packs, EncodedSamples or raw rows for "
                "pixels='uint8', or leave it away"
            )
        return values


def _num_segments(feature: Any) -> int:
    if isinstance(feature, Pack):
        return len(feature.cu_seqlens) - 1
    return len(feature.offsets) - 1 if isinstance(feature, CompactPack) else 1


def _padded(pack: Pack | CompactPack, num_tokens: int) -> Pack | CompactPack:
    """The pack with a last segment of that many tokens without labels."""
    if not num_tokens:
        return pack
    filler, pixels = [EncodedSample.filler(num_tokens, pack.vision)], pack.pixels is not None
    if isinstance(pack, CompactPack):
        return concatenate_compact([pack, compact(filler, pixels=pixels)])
    return concatenate([pack, assemble(filler, pixels=pixels)])


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
        PIXELS.items(), (vision.image_token_id, vision.video_token_id), ("image", "video")
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
        media=(),
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
