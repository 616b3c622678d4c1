"""Token embedding and insertion of features at placeholders in one pass, and its backward.

    out[t] = features[feature_index[t]]   where feature_index[t] >= 0
             weight[input_ids[t]]         elsewhere

Forward: one program per token selects its row's pointer, reads the row and writes it; bit-exact. transformers
(embed, cat, mask, masked_scatter) moves about nine times as many bytes.

Backward: one launch for both gradients. A feature's gradient is a gather by `feature_token`. A table row's
gradient is the sum over its tokens, which are sorted by id in runs of at most MAX_RUN tokens (`text_order`,
`text_id_offsets`, made on the CPU): one program per run adds in a fixed order, in float32; ids with several runs
leave partial sums, which a second launch adds. No atomics, no sort, no host sync: two backward passes give the
same bits. Placeholders are not read, while `embedding_dense_backward` sorts them and adds up their zeros.

Bytes per column in bf16: forward 4 T, one launch; backward 4 T, plus 2 V to clear a new table gradient, three
launches. Not measured on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmpack.ops.arguments import check_indices, on_its_device
from mmpack.types import MAX_RUN

# T = tokens, F = features, V = table rows, D = hidden size, R = runs of one id
MAX_COPY_D = 8192  # elements of a row copied at once, with all loads before the first store
BLOCK_D = 1024  # elements of a row summed at once: 128 threads x 8 two-byte elements (16 bytes)
BLOCK_R = 4  # rows of a run read at once
NUM_WARPS = 4


@triton.jit
def _copy_row(to_ptr, from_ptr, D: tl.constexpr, COPY_D: tl.constexpr):
    for d in tl.static_range(0, D, COPY_D):
        offs_d = d + tl.arange(0, COPY_D)
        mask_d = offs_d < D
        tl.store(to_ptr + offs_d, tl.load(from_ptr + offs_d, mask=mask_d), mask=mask_d)


@triton.jit
def _embed_features_fwd_kernel(
    out_ptr,
    input_ids_ptr,
    feature_index_ptr,
    weight_ptr,
    features_ptr,
    weight_stride,
    features_stride,
    D: tl.constexpr,
    COPY_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    f = tl.load(feature_index_ptr + t).to(tl.int64)
    token_id = tl.load(input_ids_ptr + t).to(tl.int64)
    row_ptr = tl.where(
        f >= 0, features_ptr + f * features_stride, weight_ptr + token_id * weight_stride
    )
    _copy_row(out_ptr + t * D, row_ptr, D, COPY_D)


@triton.jit
def _run_id(run, num_runs, input_ids_ptr, text_order_ptr, text_id_offsets_ptr):
    """The id of a run; -1 before the first and after the last."""
    inside = (run >= 0) & (run < num_runs)
    first = tl.load(text_id_offsets_ptr + run, mask=inside, other=0)
    token = tl.load(text_order_ptr + first, mask=inside, other=0)
    return tl.load(input_ids_ptr + token, mask=inside, other=-1).to(tl.int64)


@triton.jit
def _partial_slot(start, is_last, MAX_RUN: tl.constexpr):
    """The row of a run's partial sum. Full runs of one id start MAX_RUN tokens from each other, and each id has
    one last run, so in MAX_RUN aligned tokens at most one full run and one last run start."""
    return 2 * (start // MAX_RUN) + is_last.to(tl.int32)


@triton.jit(do_not_specialize=["num_runs", "padding_idx"])
def _embed_features_bwd_kernel(
    dweight_ptr,
    partial_ptr,
    dfeatures_ptr,
    dout_ptr,
    input_ids_ptr,
    text_order_ptr,
    text_id_offsets_ptr,
    feature_token_ptr,
    dout_stride,
    num_runs,
    padding_idx,
    D: tl.constexpr,
    MAX_RUN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    COPY_D: tl.constexpr,
):
    run = tl.program_id(0)  # runs before features, so that long ones start early
    if run >= num_runs:
        f = (run - num_runs).to(tl.int64)
        t = tl.load(feature_token_ptr + f).to(tl.int64)
        _copy_row(dfeatures_ptr + f * D, dout_ptr + t * dout_stride, D, COPY_D)
    else:
        start = tl.load(text_id_offsets_ptr + run)
        end = tl.load(text_id_offsets_ptr + run + 1)
        token_id = _run_id(run, num_runs, input_ids_ptr, text_order_ptr, text_id_offsets_ptr)
        before = _run_id(run - 1, num_runs, input_ids_ptr, text_order_ptr, text_id_offsets_ptr)
        after = _run_id(run + 1, num_runs, input_ids_ptr, text_order_ptr, text_id_offsets_ptr)
        is_last = after != token_id
        is_whole = is_last & (before != token_id)
        slot = _partial_slot(start, is_last, MAX_RUN).to(tl.int64)
        for d in tl.static_range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            acc = tl.zeros([BLOCK_D], ACC)
            for n in range(start, end, BLOCK_R):
                offs_r = n + tl.arange(0, BLOCK_R)
                mask_r = offs_r < end
                t = tl.load(text_order_ptr + offs_r, mask=mask_r, other=0).to(tl.int64)
                rows = tl.load(
                    dout_ptr + t[:, None] * dout_stride + offs_d[None, :],
                    mask=mask_r[:, None] & mask_d[None, :],
                    other=0.0,
                )
                acc += tl.sum(rows.to(ACC), axis=0)
            if is_whole:
                if token_id != padding_idx:
                    dweight_row = dweight_ptr + token_id * D + offs_d
                    if ACCUMULATE:
                        acc += tl.load(dweight_row, mask=mask_d, other=0.0).to(ACC)
                    tl.store(dweight_row, acc.to(dweight_ptr.dtype.element_ty), mask=mask_d)
            else:
                tl.store(partial_ptr + slot * D + offs_d, acc, mask=mask_d)


@triton.jit(do_not_specialize=["num_runs", "padding_idx"])
def _embed_features_bwd_partials_kernel(
    dweight_ptr,
    partial_ptr,
    input_ids_ptr,
    text_order_ptr,
    text_id_offsets_ptr,
    num_runs,
    padding_idx,
    D: tl.constexpr,
    MAX_RUN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """The first run of an id with several runs adds up their partial sums, in order."""
    run = tl.program_id(0)
    token_id = _run_id(run, num_runs, input_ids_ptr, text_order_ptr, text_id_offsets_ptr)
    before = _run_id(run - 1, num_runs, input_ids_ptr, text_order_ptr, text_id_offsets_ptr)
    after = _run_id(run + 1, num_runs, input_ids_ptr, text_order_ptr, text_id_offsets_ptr)
    if (before != token_id) & (after == token_id) & (token_id != padding_idx):
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        acc = tl.zeros([BLOCK_D], ACC)
        first = run
        while first >= 0:
            runs = first + tl.arange(0, BLOCK_R)
            ids = _run_id(runs, num_runs, input_ids_ptr, text_order_ptr, text_id_offsets_ptr)
            next_ids = _run_id(
                runs + 1, num_runs, input_ids_ptr, text_order_ptr, text_id_offsets_ptr
            )
            same = ids == token_id
            start = tl.load(text_id_offsets_ptr + runs, mask=same, other=0)
            slot = _partial_slot(start, next_ids != token_id, MAX_RUN).to(tl.int64)
            rows = tl.load(
                partial_ptr + slot[:, None] * D + offs_d[None, :],
                mask=same[:, None] & mask_d[None, :],
                other=0.0,
            )
            acc += tl.sum(rows, axis=0)
            first = tl.where(tl.sum(same.to(tl.int32), axis=0) == BLOCK_R, first + BLOCK_R, -1)
        dweight_row = dweight_ptr + token_id * D + offs_d
        if ACCUMULATE:
            acc += tl.load(dweight_row, mask=mask_d, other=0.0).to(ACC)
        tl.store(dweight_row, acc.to(dweight_ptr.dtype.element_ty), mask=mask_d)


def copy_width(D):  # elements of a row copied at once
    return min(triton.next_power_of_2(D), MAX_COPY_D)


@on_its_device
def embed_features_fwd(input_ids_T, feature_index_T, weight_VD, features_FD):
    """(T, D) in one launch; arguments are not checked again."""
    T, D = len(input_ids_T), weight_VD.shape[1]
    out_TD = weight_VD.new_empty(T, D)
    if T and D:
        weight_VD, features_FD = _rows(weight_VD), _rows(features_FD)
        _embed_features_fwd_kernel[(T,)](
            out_TD,
            input_ids_T,
            feature_index_T,
            weight_VD,
            features_FD,
            weight_VD.stride(0),
            features_FD.stride(0),
            D,
            copy_width(D),
            num_warps=NUM_WARPS,
        )
    return out_TD


@on_its_device
def embed_features_bwd(
    dout_TD, dweight_VD, dfeatures_FD, input_ids_T, indices, padding_idx, accumulate=False
):
    """Write both gradients in two launches; arguments are not checked again.

    `indices` is (feature_token, text_order, text_id_offsets); the gradient of an empty part is not written. Rows
    of ids in the text are overwritten, or added to with `accumulate`; other rows are not changed.
    """
    feature_token, text_order, text_id_offsets = indices
    D = dout_TD.shape[1]
    num_runs = max(0, len(text_id_offsets) - 1)
    num_programs = num_runs + len(feature_token)
    if not num_programs or not D:
        return
    dout_TD = _rows(dout_TD)
    dtype = torch.promote_types(dout_TD.dtype, torch.float32)  # for sums
    partial = dout_TD.new_empty(2 * triton.cdiv(len(text_order), MAX_RUN), D, dtype=dtype)
    text = (input_ids_T, text_order, text_id_offsets)
    options = {
        "MAX_RUN": MAX_RUN,
        "BLOCK_R": BLOCK_R,
        "BLOCK_D": BLOCK_D,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "ACCUMULATE": accumulate,
        "num_warps": NUM_WARPS,
    }
    _embed_features_bwd_kernel[(num_programs,)](
        dweight_VD,
        partial,
        dfeatures_FD,
        dout_TD,
        *text,
        feature_token,
        dout_TD.stride(0),
        num_runs,
        padding_idx,
        D,
        COPY_D=copy_width(D),
        **options,
    )
    if num_runs > 1:
        _embed_features_bwd_partials_kernel[(num_runs, triton.cdiv(D, BLOCK_D))](
            dweight_VD, partial, *text, num_runs, padding_idx, D, **options
        )


def _rows(x):
    """x with its last dimension contiguous; rows may have any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("mmpack::embed_features", mutates_args=())
def _embed_features(
    input_ids: Tensor,
    feature_index: Tensor,
    weight: Tensor,
    features: Tensor,
    feature_token: Tensor,
    text_order: Tensor,
    text_id_offsets: Tensor,
    padding_idx: int,
) -> Tensor:
    return embed_features_fwd(input_ids, feature_index, weight, features)


@_embed_features.register_fake
def _(input_ids, feature_index, weight, *rest):
    return weight.new_empty(len(input_ids), weight.shape[1])


@torch.library.custom_op("mmpack::embed_features_backward", mutates_args=())
def _embed_features_backward(
    dout: Tensor,
    input_ids: Tensor,
    feature_token: Tensor,
    text_order: Tensor,
    text_id_offsets: Tensor,
    num_rows: int,
    padding_idx: int,
) -> tuple[Tensor, Tensor]:
    dweight = dout.new_zeros(num_rows, dout.shape[1])
    dfeatures = dout.new_empty(len(feature_token), dout.shape[1])
    indices = (feature_token, text_order, text_id_offsets)
    embed_features_bwd(dout, dweight, dfeatures, input_ids, indices, padding_idx)
    return dweight, dfeatures


@_embed_features_backward.register_fake
def _(dout, input_ids, feature_token, text_order, text_id_offsets, num_rows, padding_idx):
    D = dout.shape[1]
    return dout.new_empty(num_rows, D), dout.new_empty(len(feature_token), D)


def _save_for_backward(ctx, inputs, output):
    input_ids, _, weight, _, feature_token, text_order, text_id_offsets, padding_idx = inputs
    ctx.save_for_backward(input_ids, feature_token, text_order, text_id_offsets)
    ctx.num_rows, ctx.padding_idx = weight.shape[0], padding_idx


def _backward(ctx, dout):
    input_ids, feature_token, text_order, text_id_offsets = ctx.saved_tensors
    needs_weight, needs_features = ctx.needs_input_grad[2:4]
    if not needs_weight:
        text_order, text_id_offsets = text_order[:0], text_id_offsets[:0]
    dweight, dfeatures = _embed_features_backward(
        dout,
        input_ids,
        feature_token if needs_features else feature_token[:0],
        text_order,
        text_id_offsets,
        ctx.num_rows if needs_weight else 0,
        ctx.padding_idx,
    )
    gradients = (dweight if needs_weight else None, dfeatures if needs_features else None)
    return None, None, *gradients, None, None, None, None


_embed_features.register_autograd(_backward, setup_context=_save_for_backward)


def _check(input_ids_T, weight_VD, features_FD, indices):
    T, D = len(input_ids_T), weight_VD.shape[1]
    F = len(indices["feature_token"])
    if features_FD.shape != (F, D):
        raise ValueError(
            f"features must be {(F, D)} to fill {F} placeholders, got {tuple(features_FD.shape)}"
        )
    if features_FD.dtype != weight_VD.dtype:
        raise ValueError(f"features are {features_FD.dtype}, the table is {weight_VD.dtype}")
    if len(indices["feature_index"]) != T:
        raise ValueError(f"{T} input_ids but {len(indices['feature_index'])} feature indices")
    num_text = len(indices["text_order"])
    if num_text != T - F:
        raise ValueError(
            f"text_order must have {T - F} entries for {T} tokens and {F} features, got {num_text}"
        )
    for name, tensor in {"input_ids": input_ids_T, "features": features_FD}.items():
        if tensor.device != weight_VD.device:
            raise ValueError(f"{name} are on {tensor.device}, the table is on {weight_VD.device}")
    check_indices(indices, weight_VD.device)


def embed_features(
    input_ids_T: Tensor,
    feature_index_T: Tensor,
    weight_VD: Tensor,
    features_FD: Tensor,
    *,
    feature_token: Tensor,
    text_order: Tensor,
    text_id_offsets: Tensor,
    padding_idx: int | None = None,
) -> Tensor:
    """Embed tokens and insert vision features at their placeholders: (T, D), out of place.

    Equal to transformers' `embed_tokens(input_ids).masked_scatter(is_placeholder, features)`. Differentiable in
    `weight_VD` and `features_FD`; deterministic; a table row's gradient is rounded once, from a float32 sum.

    Args:
        input_ids_T: (T,) integer ids below V. Not checked, because that would synchronize with the device.
        feature_index_T: (T,) int32: index of the feature at each token, -1 for text.
        weight_VD: (V, D) embedding table.
        features_FD: (F, D) vision features, same dtype and device.
        feature_token: (F,) int32, the inverse of `feature_index_T`.
        text_order, text_id_offsets: (T - F,) and (R + 1,) int32: text tokens sorted by id, and offsets of their
            runs of one id and at most MAX_RUN tokens. All indices are fields of `mmpack.Pack`.
        padding_idx: an id without gradient, as in `torch.nn.Embedding`.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the device cannot run the kernel.
    """
    indices = {
        "feature_index": feature_index_T,
        "feature_token": feature_token,
        "text_order": text_order,
        "text_id_offsets": text_id_offsets,
    }
    _check(input_ids_T, weight_VD, features_FD, indices)
    return _embed_features(
        input_ids_T,
        feature_index_T,
        weight_VD,
        features_FD,
        feature_token,
        text_order,
        text_id_offsets,
        -1 if padding_idx is None else padding_idx,
    )
