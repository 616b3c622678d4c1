"""PackCollator: a list of packs' samples, encoded samples or processor outputs -> forward kwargs.

It assembles the samples of a batch into one pack, in the DataLoader worker. `mmpack.hf.forward_kwargs` turns the
pack into keyword arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from mmpack.data.encoder import Encoder
from mmpack.errors import counted
from mmpack.hf.fit import check_ids, num_ids
from mmpack.hf.forward_kwargs import PIXELS, batch_of, compact_batch_of, pixel_values_of
from mmpack.hf.model_parts import TowerSpec, family_of, inner_model, tower_of
from mmpack.hf.model_patch import context_of, is_patched
from mmpack.hf.weight_count import weight_entries
from mmpack.packing import worker_buffers
from mmpack.packing.assemble import assemble, load_pixels
from mmpack.packing.compact import compact
from mmpack.packing.context_part import ContextPart, part_of
from mmpack.packing.left_out import joined_resume
from mmpack.packing.loss_weights import LossReduction, check_reduction
from mmpack.packing.pack_samples import PackSamples
from mmpack.types import IGNORE, EncodedSample, Float32
from mmpack.vision_spec import VisionSpec

_STOCK = ("float32", "host", "token")  # values that an unpatched model can have


class Batch(dict[str, Any]):
    """A batch of `PackCollator`: a dict for `model(**batch)` with `to` and `pin_memory`.

    Both move all tensors, also those of `mmpack`, whose host data (offsets, sizes, grids) stays as it is. Trainer,
    accelerate and torch's DataLoader call them.
    """

    def to(self, device: Any, non_blocking: bool = False) -> Batch:
        """A copy of the batch with all tensors on a device."""
        return Batch(_mapped(self, lambda one: one.to(device, non_blocking=non_blocking)))

    def pin_memory(self) -> Batch:
        """A copy of the batch with all tensors in pinned memory."""
        return Batch(_mapped(self, torch.Tensor.pin_memory))


def _mapped(values: Mapping[str, Any], move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return {
        name: move(value)
        if isinstance(value, torch.Tensor)
        else (_mapped(value, move) if isinstance(value, dict) else value)
        for name, value in values.items()
    }


class PackCollator:
    """Data collator for a Hugging Face Trainer: makes one packed row of a list of

    - items of a `PackedDataset` or `PackStream` (use `per_device_train_batch_size=1`);
    - `EncodedSample`s;
    - outputs of a Qwen-VL processor, one sample each: dicts with `input_ids`, `labels`, `pixel_values` and
      `image_grid_thw`; or raw rows as `Encoder.read` takes them (TRL passes those). Both need `encoder`.

    The batch holds `input_ids (1, T)`, `labels (1, T)`, `shift_labels (1, L)`, `logits_to_keep (L,)`,
    `position_ids (4, 1, T)`, `pixel_values (P, C * t * p * p)` float32 equal to transformers' image processor,
    `image_grid_thw (I, 3)`, `use_cache=False` (Trainer leaves the cache on, and with a cache transformers silently
    mixes packed samples) and `mmpack={...}`. T tokens, L supervised tokens, P patches, I images.

    Videos are `pixel_values_videos` and `video_grid_thw`, as in transformers; with timestamps, each temporal patch
    has its own grid.

    With `pixels="uint8"`, `pixel_values` are (P, C * p * p) uint8, an eighth of the bytes of float32, and
    `pixel_values_videos` (P, C * t * p * p), a quarter. The patched model's patch embedding normalizes them.

    With a patched `model`, the pixels of an image or a video that several markers show are there once
    (`mmpack.packing.shared_images`), and `image_grid_thw` has a row per marker all the same; P counts what is
    there.

    Qwen2.5-VL's, Qwen3-VL's and Qwen3.5's towers need extra indices that depend on the model (attention windows,
    rows of a position table). The worker computes them, given `model`. A Qwen3.5's batch also has `cu_seq_lens_q
    (S + 1,)` and `seq_idx (1, T)`, on which transformers raises if the model is not patched and
    flash-linear-attention and causal-conv1d are not both installed (before 5.24 it may ignore them). Without
    `model`, so has every batch that may be one: of data whose videos have timestamps. A Qwen3-VL does not read
    them.

    With a model that is patched for a place among ranks that share packs (`patch_model(context=...)`), a batch is
    this rank's part of the pack: its tokens, their labels and supervised rows, and the pixels of its frames, which
    alone are decoded; `image_grid_thw` and `video_grid_thw` have a row (1, h, w) per frame. `mmpack["context"]`
    says what goes where, and an unpatched model refuses the batch (`inputs_embeds`).

    Args:
        encoder: an `Encoder`, or a transformers Qwen-VL processor. An unusable raw row is always an error,
            whatever `on_error` says, because a batch must have all rows requested. Images of raw rows are in the
            encoder's `media_dir`, by default the current folder:
            `Encoder.from_processor(processor, media_dir=...)`.
        model: the model that the batches are for; optional for Qwen2-VL with float32 pixels and images that are
            not shared. It is inspected, not kept.
        pixels: "float32" or "uint8"; "uint8" needs a patched `model`.
        full_logits: leave out `logits_to_keep` and `shift_labels`, so that the model returns the logits of every
            token: for `compute_metrics` and `compute_loss_func`. Costs the memory of (1, T, V) logits.
        pad_to: pad T to a multiple of this with an unlabeled segment, so that text has one shape
            (`torch.compile`); usually the capacity. Patches are not padded.
        assemble: "host" or "device". "device" needs a patched `model`: batches are compact (`input_ids (1, n)`
            with one marker per image, `position_ids (4, 1, 0)`), and the model's hook expands them on the device,
            to the same bits.
        loss_reduction: "token": every supervised token counts once; "sample": every sample does, whatever its
            length; "sqrt": a sample of n supervised tokens counts sqrt(n) times (InternVL's square averaging).
            Weights of rows, turns and sources come on top, see `mmpack.packing.loss_weights`. Other values than
            "token" need a patched `model`, and so do weights.

    Raises:
        ValueError: uint8 pixels, assembly on the device, a reduction or weights without a patched model, an
            unsupported model, an unpatched Qwen3.5, `pad_to` below 1, or `full_logits` or assembly on the device
            for ranks that share packs. In a call: items that cannot form a batch; names the item.
    """

    def __init__(
        self,
        encoder: Any = None,
        *,
        model: nn.Module | None = None,
        pixels: Literal["float32", "uint8"] = "float32",
        full_logits: bool = False,
        pad_to: int | None = None,
        assemble: Literal["host", "device"] = "host",
        loss_reduction: LossReduction = "token",
    ) -> None:
        check_reduction(loss_reduction)
        for name, value, choices in (
            ("pixels", pixels, ("float32", "uint8")),
            ("assemble", assemble, ("host", "device")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be {choices[0]!r} or {choices[1]!r}, got {value!r}")
        given = {"pixels": pixels, "assemble": assemble, "loss_reduction": loss_reduction}
        asked = [f"{name}={value!r}" for name, value in given.items() if value not in _STOCK]
        self.is_patched = model is not None and is_patched(model)
        if asked and not self.is_patched:
            found = (
                "no model was passed" if model is None else f"{type(model).__name__} is not patched"
            )
            raise ValueError(
                f"{asked[0]} needs a patched model, but {found}; "
                f"pass PackCollator(model=patch_model(model), {asked[0]})"
            )
        base = None if model is None else inner_model(model)
        if base is not None and family_of(base).has_linear_attention and not is_patched(base):
            raise ValueError(
                f"{type(model).__name__} is not patched, and its Gated DeltaNet layers would mix the segments of "
                "a pack; pass PackCollator(model=patch_model(model))"
            )
        if pad_to is not None and pad_to < 1:
            raise ValueError(f"pad_to must be positive, got {pad_to}")
        self.context = None if model is None else context_of(model)
        for option, is_set, why in (
            (
                "full_logits=True",
                full_logits,
                "the label of a rank's last token is the next rank's",
            ),
            ("assemble='device'", assemble == "device", "the host says which rank gets what"),
        ):
            if self.context is not None and is_set:
                raise ValueError(
                    f"{option} does not work under context parallelism ({self.context}), because {why}; leave it "
                    "out, or patch the model without context"
                )
        self.pixels = pixels
        self.full_logits = full_logits
        self.pad_to = pad_to
        self.assemble = assemble
        self.loss_reduction = loss_reduction
        self.tower = TowerSpec() if base is None else tower_of(base)
        self._num_ids = None if base is None else num_ids(base)
        self._told = set[str]()  # fields of raw rows that are not read, named in the log
        self.encoder = None
        if encoder is not None:
            known = Encoder.of(encoder, None if base is None else base.config)
            self.encoder = replace(known, on_error="raise")

    def __repr__(self) -> str:
        words = [] if self.encoder is None else [repr(self.encoder)]
        for name, default in inspect.signature(PackCollator).parameters.items():
            value = getattr(self, name, default.default)
            if name != "encoder" and value != default.default:
                words.append(f"{name}={value!r}")
        return f"PackCollator({', '.join(words)})"

    def __call__(self, features: Sequence[Any]) -> Batch:
        segments, values = self._segments(features)
        samples = [sample for item in segments for sample in item]
        num_tokens = sum(sample.num_tokens for sample in samples)
        padded = max(num_tokens, self.context.size if self.context else 0)  # a token for each rank
        padded += -padded % (self.pad_to or 1)
        if padded > num_tokens:
            samples.append(EncodedSample.filler(padded - num_tokens, samples[0].vision))
        if self.assemble == "device":
            batch = compact_batch_of(compact(samples, worker_buffers.empty), values, self.tower)
        else:
            empty = worker_buffers.empty
            whole = assemble(samples, pixels=False, share_images=self.is_patched, empty=empty)
            tower = self.tower
            if self._num_ids is None:  # no model: it may be a hybrid
                may_be = whole.vision.video is not None and whole.vision.video.has_timestamps
                tower = replace(tower, has_linear_attention=may_be)
            part = None if self.context is None else part_of(whole, self.context)
            if part is not None and sum(map(len, values.values())) > len(part.patches):
                values = _of_part(values, part)  # pixels of all ranks
            batch = batch_of(whole, values, tower, part)
        pack = batch["mmpack"]
        offsets, context = pack["supervised_offsets"], pack.get("context")
        pack |= weight_entries(samples, self.loss_reduction, offsets, context)
        if "loss_weight_bits" in pack and not self.is_patched:
            first = next(sample for sample in samples if sample.weights is not None)
            raise ValueError(
                f"row {first.row} of {first.source} has a weight of the loss, which only a patched model applies; "
                "pass PackCollator(model=patch_model(model))"
            )
        batch["mmpack"]["items"] = (0, *accumulate(map(len, segments)))
        if self._num_ids is not None:  # here, because a compiled model runs no host checks
            check_ids(self._num_ids, batch["mmpack"]["id_range"], samples)
        resume = joined_resume(features)
        if resume is not None:
            batch["mmpack"]["resume"] = resume  # a stream's state after its last pack
        if self.full_logits:
            del batch["shift_labels"], batch["logits_to_keep"]
        return Batch(batch)

    def _segments(
        self, features: Sequence[Any]
    ) -> tuple[Sequence[Sequence[EncodedSample]], dict[str, torch.Tensor]]:
        """The samples of each feature, and all pixels in the model's format."""
        if all(isinstance(feature, (PackSamples, EncodedSample)) for feature in features):
            groups = [[f] if isinstance(f, EncodedSample) else f for f in features]
        elif not all(isinstance(feature, Mapping) for feature in features):
            kinds = sorted({type(feature).__name__ for feature in features})
            raise ValueError(
                "PackCollator takes items of a PackedDataset or PackStream and EncodedSamples, or dicts: "
                f"processor outputs or rows; got {kinds}"
            )
        elif self.encoder is None:
            raise ValueError(
                "processor outputs and raw rows need an encoder; pass PackCollator(processor) or "
                "PackCollator(encoder)"
            )
        elif any("input_ids" in feature for feature in features):
            samples = [_from_processor(f, n, self.encoder.vision) for n, f in enumerate(features)]
            return [[sample] for sample in samples], self._processed_pixels(features)
        else:
            read = self.encoder.read_groups(self.encoder.groups(features), self._told)
            try:
                groups = [[s] for s in self.encoder.encode(read)]
            except ValueError as error:
                if "(media_dir)" not in str(error):
                    raise
                raise ValueError(
                    f"{error}; rows of a PackCollator have their images in the current folder, unless its encoder "
                    "names another: PackCollator(Encoder.from_processor(processor, media_dir=FOLDER))"
                ) from error
        segments, buffer = load_pixels(groups, self.is_patched, worker_buffers.empty, self.context)
        vision = segments[0][0].vision
        return segments, pixel_values_of(buffer.stills, buffer.clips, vision, self.pixels)

    def _processed_pixels(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        parts = {
            name: [torch.as_tensor(f[name]) for f in features if _has(f, name)] for name in PIXELS
        }
        values = {name: torch.cat(tensors) for name, tensors in parts.items() if tensors}
        if values and self.pixels == "uint8":
            raise ValueError(
                "processor outputs have float pixel_values, not the bytes of pixels='uint8'; leave it out, or "
                "pass items of a PackedDataset, EncodedSamples or raw rows"
            )
        return values


def _of_part(values: dict[str, torch.Tensor], part: ContextPart) -> dict[str, torch.Tensor]:
    """The pixels of a rank's frames in those of a pack."""
    found, begin = {}, 0
    for name, pixels in values.items():
        own = part.patches[(part.patches >= begin) & (part.patches < begin + len(pixels))] - begin
        if len(own):
            found[name] = pixels[torch.from_numpy(own)]
        begin += len(pixels)
    return found


def _has(feature: Mapping[str, Any], name: str) -> bool:
    return feature.get(name) is not None and len(feature[name]) > 0


def _from_processor(feature: Mapping[str, Any], number: int, vision: VisionSpec) -> EncodedSample:
    """Collapse a processor's output to one marker per image; its pixels are not touched."""
    if feature.get("input_ids") is None:
        raise ValueError(
            f"feature {number} has no input_ids, but others do; do not mix kinds in a batch"
        )
    if feature.get("labels") is None:
        raise ValueError(f"feature {number} has no labels; mask the prompt with -100 and pass them")
    input_ids, labels = (_row(feature[name], name, number) for name in ("input_ids", "labels"))
    if len(input_ids) != len(labels):
        raise ValueError(
            f"feature {number} has {len(input_ids)} input_ids but {len(labels)} labels"
        )
    if feature.get("attention_mask") is not None:  # drop padding
        real = _row(feature["attention_mask"], "attention_mask", number) != 0
        input_ids, labels = input_ids[real], labels[real]
    grids, markers = [], []
    for (pixels, name), token_id, kind in zip(
        PIXELS.items(), (vision.image_token_id, vision.video_token_id), ("image", "video")
    ):
        grid_thw = np.empty((0, 3), dtype=np.int32)
        if _has(feature, pixels):
            if feature.get(name) is None:
                raise ValueError(f"feature {number} has {pixels} but no {name}; pass both")
            grid_thw = np.asarray(feature[name], dtype=np.int32).reshape(-1, 3)
        patches = int(grid_thw.astype(np.int64).prod(axis=-1).sum())
        if len(grid_thw) and len(feature[pixels]) != patches:
            raise ValueError(
                f"feature {number}: number of patches is {len(feature[pixels])} in {pixels}, but {patches} in "
                f"{name}"
            )
        if kind == "video" and len(grid_thw) and vision.video_spec.has_timestamps:
            grid_thw = np.insert(grid_thw[:, 1:].repeat(grid_thw[:, 0], axis=0), 0, 1, axis=1)
        num_features = vision.num_features(grid_thw)
        placeholders = np.flatnonzero(input_ids == token_id)
        if len(placeholders) != num_features.sum():
            raise ValueError(
                f"feature {number} has {counted(len(placeholders), f'{kind} placeholder')}, but "
                f"{num_features.sum()} features from {counted(len(grid_thw), kind)}; was it truncated?"
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
    """M-RoPE positions per temporal patch, of the images and then the videos."""
    steps = np.ones(sum(num_grids), dtype=np.float32)
    per_second = vision.video_spec.tokens_per_second if num_grids[1] else None
    if per_second is not None:
        seconds = feature.get("second_per_grid_ts")
        num_seconds = 0 if seconds is None else len(seconds)
        if num_seconds != num_grids[1]:
            raise ValueError(
                f"feature {number} has {counted(num_grids[1], 'video')} but {num_seconds} second_per_grid_ts; "
                "pass all outputs of the processor"
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
