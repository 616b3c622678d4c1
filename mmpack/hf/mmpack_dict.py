"""The `mmpack` dict of a batch: every key, its content, its writer and its readers.

Plain dicts at run time. Tensors move to the device with the batch. All else stays on the host as Python ints,
tuples and bytes: Trainer moves only tensors, and torch.compile would treat arrays as tensors. There are no
floating-point tensors, because FSDP2 and DeepSpeed would cast them to bf16. Letters as in DESIGN.md; a "place" is
the index of a token, a "row" a token whose prediction is supervised. After a semicolon: files that read the key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypedDict

import torch

Int32 = Annotated[torch.Tensor, torch.int32]
Int64 = Annotated[torch.Tensor, torch.int64]


class EveryBatch(TypedDict):
    """The keys of every batch; `forward_kwargs` writes them in the worker."""

    offsets: tuple[int, ...]  # S + 1, `cu_seqlens` on the host; model_patch, attention, callbacks
    max_seqlen: int  # of a segment; attention
    supervised_offsets: tuple[int, ...]  # S + 1, segment offsets in the rows; callbacks, evaluation
    supervised_index: Int64  # (L,) the rows, `logits_to_keep`; attention_share
    num_patches: int  # P; model_patch, forward_kwargs (on the device)
    grid_thw: tuple[tuple[int, int, int], ...]  # I, segment by segment; model_patch, callbacks
    grid_offsets: tuple[int, ...]  # S + 1, segment offsets in `grid_thw`; callbacks
    grid_is_new: tuple[bool, ...]  # I, whether no grid before shows the same image; throughput
    vision_grid_thw: Int64  # (U, 3) grids of the pixels; tower, forward_kwargs (on the device)
    video_rule: tuple[bool, float | None] | None  # see `model_parts.check_videos`; model_patch
    vision_offsets: tuple[int, ...]  # frames + 1, offsets in the patches; attention, forward_kwargs
    vision_max_seqlen: int  # patches of the largest frame; tower, attention
    id_range: tuple[int, int]  # smallest and largest id, including labels; collator, model_patch
    facts: dict[str, Any]  # what the data was encoded with, `fit.facts_of_data`; model_patch


class CompactDict(TypedDict):
    """What the device needs to expand a compact pack of n ids; written and read by `forward_kwargs`; model_patch
    reads `sizes`."""

    offsets: Int32  # (S + 1,) segment offsets in the n ids
    markers: Int32  # (I,) places in the n ids
    grid_thw: Int32  # (I, 3) in marker order
    temporal_step_bits: Int32  # (I,) bits of float32: positions per temporal patch
    shown: Int32  # (I, 3) which markers show the same, `CompactPack.shown`
    sizes: tuple[int, int, int, int, int]  # T, M, F, R and the number of text tiles
    num_vision_tiles: int
    video_id: int  # token id of a video's marker
    merge_size: int


class SentDict(TypedDict):
    """Which features of its tower a rank sends, by names that `embedding.at_placeholders` reads: the n rows that
    are sent are the "tokens"."""

    feature_index: Int32  # (n,) feature of each row, to rank 0 first
    feature_token: Int32  # (n,) rows of the features, one feature's together
    feature_offsets: Int32  # (F + 1,) features' offsets in `feature_token`; of a blank image if there is no other


class ContextDict(TypedDict, total=False):
    """A rank's part of a pack; written by forward_kwargs."""

    rank: int  # place in the group; context_parallel
    size: int  # ranks of the group; context_parallel
    tokens: tuple[int, ...]  # of each rank; context_parallel, model_patch
    checksum: int  # of the whole pack; completed by weight_count; context_parallel
    is_compared: bool  # with the other ranks'; written by context_ranks; model_patch
    rows: tuple[int, int]  # begin and end of the rows in the whole pack's; weight_count
    supervised_offsets: tuple[int, ...]  # S + 1, as above, in the whole pack's rows; throughput
    weight: float  # sum of the whole pack's weights; written by weight_count if not all 1; loss, evaluation
    # With images or videos in the pack.
    sent: SentDict  # context_parallel
    sent_sizes: tuple[int, ...]  # features to each rank; context_parallel
    received_sizes: tuple[int, ...]  # features from each rank; context_parallel
    group: Any  # process group; written by the model's hook; context_parallel


class MmpackDict(EveryBatch, total=False):
    """All keys that a batch may have, from the collator to the attention of the last layer."""

    # Text; written by forward_kwargs, on the host or, for a compact batch, on the device.
    cu_seqlens: Int32  # (S + 1,) segment offsets; attention, attention_share
    segment_ids: Int32  # (T,) segment of a token; attention, attention_share
    tiles: Int32  # (n, 4) rows of attention per program, `Pack.tiles`; attention
    feature_index: Int32  # (T,) feature of a token or -1; embedding, attention_share
    feature_token: (
        Int32  # (M,) places of the features, one feature's together; embedding, tower (deepstack)
    )
    feature_offsets: Int32  # (F + 1,) features' offsets in `feature_token`; embedding, model_patch
    text_order: Int32  # (T - M,) places of text sorted by id; embedding
    text_id_offsets: Int32  # (R + 1,) runs of one id in `text_order`; embedding

    # The same for the frames of images and videos; on the device, only if there are any.
    vision_cu_seqlens: Int32  # (frames + 1,); tower, attention
    vision_segment_ids: Int32  # (P,); attention
    vision_tiles: Int32  # (n, 4); attention
    vision_position_ids: Int64  # (P, 2) row and column of a patch; tower, rotary

    # With pixels, for a tower with windows (Qwen2.5-VL). Features, patches, their positions and all indices of
    # features are then in window order.
    window_order: Int32  # (F,) index of the feature in the pack; tower, model_patch
    window_cu_seqlens: Int32  # (windows + 1,) offsets in the patches; tower, attention
    window_segment_ids: Int32  # (P,); attention
    window_tiles: Int32  # (n, 4); attention
    window_offsets: tuple[int, ...]  # windows + 1, `window_cu_seqlens` on the host; attention
    window_max_seqlen: int  # patches of the largest window; tower, attention

    # With pixels, for a tower with a position table (Qwen3-VL).
    position_index: Int32  # (P, 4) rows of the table to interpolate; tower, model_patch
    position_weight_bits: Int32  # (P, 4) their weights, as bits of float32; tower

    normalization: tuple[tuple[float, ...], tuple[float, ...]]  # uint8 pixels' mean and std; tower
    compact: CompactDict  # until expanded; forward_kwargs, model_patch
    # A rank's part of a pack. `offsets`, `cu_seqlens`, `segment_ids`, `tiles`, `max_seqlen` and grids segment by
    # segment are then of the whole pack; the rest is of this rank's tokens, rows and frames. None: the self-test.
    context: ContextDict | None  # model_patch, attention, linear_attention, loss

    # Written by the collator.
    loss_weight_bits: Int32  # (L,) the rows' loss weights, bits of float32; absent: all 1; loss
    loss_weight_sums: tuple[
        float, ...
    ]  # S sums of the weights; absent: all 1; loss_denominator, evaluation
    sources: tuple[str, ...]  # of the rows, each once; source_losses
    source_rows: (
        Int32  # (L,) the number in `sources` of each row's, if there are several; source_losses
    )
    source_sums: tuple[float, ...]  # the sum of the weights of each source; source_losses
    is_counted: (
        bool  # the loss's denominator is the sum of weights; written by loss_denominator; loss
    )
    items: tuple[int, ...]  # items + 1, item offsets in the segments; evaluation
    resume: bytes  # stream only: `PackSamples.resume` of the last item; stream_state

    # Written by the model's hooks.
    impl: str  # from `patch_model`; op_choice
    tuned: dict[str, dict[torch.dtype, str]]  # with impl "auto", `op_choice.Choice`; op_choice
    rotary: tuple[Any, ...]  # where our kernel rotates, `rotary.rotations` of the text; rotary
    vision_rotary: tuple[Any, ...]  # the same for the tower; rotary
    head: tuple[Any, torch.Tensor]  # state of a head that is to score, (1, L) labels; head
    deepstack: Sequence[torch.Tensor]  # (M, D) features for each text layer (Qwen3-VL); tower
    take_losses: Callable[..., None]  # `SourceLosses.take`; written by callbacks; loss
    watch: Callable[..., None]  # `AttentionShare.take`, in recorded steps; attention
