"""The kernels of `embed_features`; what they compute is described there."""

import triton
import triton.language as tl

# T = tokens, F = features, V = table rows, D = hidden size, R = runs of one id


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
    feature_offsets_ptr,
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
        first = tl.load(feature_offsets_ptr + f)
        end = tl.load(feature_offsets_ptr + f + 1)
        dfeatures_row = dfeatures_ptr + f * D
        if end == first + 1:
            t = tl.load(feature_token_ptr + first).to(tl.int64)
            _copy_row(dfeatures_row, dout_ptr + t * dout_stride, D, COPY_D)
        else:
            for d in tl.static_range(0, D, BLOCK_D):
                offs_d = d + tl.arange(0, BLOCK_D)
                mask_d = offs_d < D
                acc = tl.zeros([BLOCK_D], ACC)
                for n in range(first, end):  # in order
                    t = tl.load(feature_token_ptr + n).to(tl.int64)
                    row = tl.load(dout_ptr + t * dout_stride + offs_d, mask=mask_d, other=0.0)
                    acc += row.to(ACC)
                tl.store(
                    dfeatures_row + offs_d, acc.to(dfeatures_ptr.dtype.element_ty), mask=mask_d
                )
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
