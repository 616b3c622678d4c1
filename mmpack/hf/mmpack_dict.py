"""The `mmpack` dict of a batch: every key, what it holds, who writes it and who reads it.

Plain dicts at run time. Tensors go to the device with the batch; all else stays on the host as Python ints, tuples
and bytes, because Trainer moves tensors and nothing else, and torch.compile would take arrays for tensors. There are
no floating tensors: FSDP2 and DeepSpeed would cast them to bf16. Letters as in DESIGN.md; "places" are numbers of
tokens, "rows" tokens whose prediction is supervised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypedDict

import torch

Int32 = Annotated[torch.Tensor, torch.int32]
Int64 = Annotated[torch.Tensor, torch.int64]


class EveryBatch(TypedDict):
    """What every batch holds; written by `forward_kwargs`, in the worker."""

    offsets: tuple[int, ...]  # S + 1, `cu_seqlens` on the host; model_patch, attention, callbacks
    max_seqlen: int  # of a segment; attention
    supervised_offsets: tuple[int, ...]  # S + 1, of the segments in the rows; callbacks, evaluation
    supervised_index: Int64  # (L,) the rows, `logits_to_keep`; attention_share
    num_patches: int  # P; model_patch, forward_kwargs (on the device)
    grid_thw: tuple[tuple[int, int, int], ...]  # I, segment by segment; model_patch, callbacks
    grid_offsets: tuple[int, ...]  # S + 1, of the segments in `grid_thw`; callbacks
    video_rule: tuple[bool, float | None] | None  # of videos, `families.check_videos`; model_patch
    vision_offsets: tuple[int, ...]  # frames + 1, in the patches; attention, forward_kwargs
    vision_max_seqlen: int  # patches of the largest frame; tower, attention
    id_range: tuple[int, int]  # smallest and largest id, labels too; collator, model_patch
    facts: dict[str, Any]  # what the data was encoded with, `fit.facts_of_data`; model_patch


class CompactDict(TypedDict):
    """What the device assembles a compact pack of; written and read by `forward_kwargs`, and by model_patch
    `sizes`. n ids before expansion."""

    offsets: Int32  # (S + 1,) of the segments in the n ids
    markers: Int32  # (I,) places among the n ids
    grid_thw: Int32  # (I, 3) in marker order
    temporal_step_bits: Int32  # (I,) float32's bits: positions from one temporal patch to the next
    sizes: tuple[int, int, int, int]  # T, F, R and tiles of the text
    num_vision_tiles: int
    video_id: int  # of a video's marker
    merge_size: int


class MmpackDict(EveryBatch, total=False):
    """All that a batch may hold, on its way from the collator to the attention of the last layer."""

    # Written by forward_kwargs. Of the text: on the host, or by the device where the batch is compact.
    cu_seqlens: Int32  # (S + 1,) segment offsets; attention, attention_share
    segment_ids: Int32  # (T,) segment of a token; attention, attention_share
    tiles: Int32  # (n, 4) rows of attention a program takes, `Pack.tiles`; attention
    feature_index: Int32  # (T,) feature of a token or -1; embedding, attention_share
    feature_token: Int32  # (F,) place of a feature; embedding, tower (deepstack)
    text_order: Int32  # (T - F,) places of text sorted by id; embedding
    text_id_offsets: Int32  # (R + 1,) runs of one id in `text_order`; embedding

    # The same of the frames of images and videos. Of text alone the device makes none.
    vision_cu_seqlens: Int32  # (frames + 1,); tower, attention
    vision_segment_ids: Int32  # (P,); attention
    vision_tiles: Int32  # (n, 4); attention
    vision_position_ids: Int64  # (P, 2) row and column of a patch; tower, rotary

    # With pixels, for a tower with windows (Qwen2.5-VL). Features, patches and their positions are then in the
    # order of the windows, `feature_index` and the like too.
    window_order: Int32  # (F,) feature that stands there in the pack; tower, model_patch
    window_cu_seqlens: Int32  # (windows + 1,) offsets in the patches; tower, attention
    window_segment_ids: Int32  # (P,); attention
    window_tiles: Int32  # (n, 4); attention
    window_offsets: tuple[int, ...]  # windows + 1, `window_cu_seqlens` on the host; attention
    window_max_seqlen: int  # patches of the largest window; tower, attention

    # With pixels, for a tower with a table of positions (Qwen3-VL).
    position_index: Int32  # (P, 4) rows of the table to mix; tower, model_patch
    position_weight_bits: Int32  # (P, 4) their weights, float32's bits; tower

    normalization: tuple[tuple[float, ...], tuple[float, ...]]  # uint8 pixels' mean and std; tower
    compact: CompactDict  # until the hook has let the device assemble; forward_kwargs, model_patch

    # Written by the collator.
    items: tuple[int, ...]  # items + 1, of the batch's items in the segments; evaluation
    resume: bytes  # of a stream, `PackSamples.resume` of the last item; stream_state

    # Written by the model's hooks, for what runs below them.
    impl: str  # of `patch_model`; attention
    rotary: tuple[Any, ...]  # with impl "triton", `rotary.rotations` of the text; rotary
    vision_rotary: tuple[Any, ...]  # the same of the tower; rotary
    deepstack: Sequence[torch.Tensor]  # (F, D) features a text layer each (Qwen3-VL); tower
    watch: Callable[
        ..., None
    ]  # by callbacks in steps that are watched, `AttentionShare.take`; attention
