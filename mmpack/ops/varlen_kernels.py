"""Attention within segments in Triton: forward and a deterministic backward over a list of tiles.

A tile is at most TILE rows of one segment, or several short segments that fit into TILE rows together
(`mmpack.reference.attention_tiles`), so segments of a few tokens share a block and no tile is empty. One program
processes one block of rows of one head, longest tiles first: the GPU schedules programs in order, so short ones
fill the gaps at the end. Blocks of keys that all rows see are not masked; in other blocks, a row sees the columns
between its bounds: its segment's, or up to itself if causal. One kernel serves text and vision.

q, k and v are read by TMA descriptors over (T, columns), where a head is a range of columns, so a view into a
fused projection is read without a copy. A head dim that is not a power of two is split (80 = 64 + 16); columns
that the parts have in excess (72 is read as 64 + 16: eight of the next head's) are zero in one operand of each
product. The backward recomputes the scores from the saved log-sum-exp, once for dq (which also computes `delta` =
rowsum(out * dout)) and once for dk and dv, whose programs add up a group's query heads in order: no atomics, so
two backward passes give the same bits.

Infinities and NaN stay in their segment. 0 x inf is NaN, so a product must not contain rows of other segments,
even where p is 0. A tile of one long segment moves its last block back into the segment. A tile of whole segments
checks its sums, one FFMA each; if any is not finite, it repeats its rows one by one, slowly, and reads only what
each row sees.

Bytes: q, k, v and out once; k and v again from the L2 cache for each block of rows. FLOPs of a causal segment of n
rows and H heads: 2 n^2 K H forward; the backward's seven products take 3.5 times that. Not measured on a GPU yet.
Based on FlashAttention-2 (Dao, 2023, arXiv 2307.08691).
"""

import triton
import triton.language as tl

# T = tokens, H = query heads, G = query heads per key head, K = head dim <= D0 + D1
_OF_ANY_PACK = {
    "do_not_specialize": ["T"],
    "do_not_specialize_on_alignment": ["segment_ids_ptr", "cu_seqlens_ptr"],
}
BLOCK_BY_ROW = tl.constexpr(16)  # rows read at once where numbers are not finite


@triton.jit
def _tile(tiles_ptr, block, BLOCK: tl.constexpr, TILE: tl.constexpr, MIRROR: tl.constexpr):
    """(begin, end) of a block of rows, (begin, end) of its segment, and whether several segments share the tile.

    MIRROR takes the tile at the same distance from its segment's end as the listed tile is from its beginning. The
    listed tiles with the most keys before them become those with the most queries after them, so one order serves
    both."""
    tile = block // (TILE // BLOCK)
    begin = tl.load(tiles_ptr + 4 * tile)
    end = tl.load(tiles_ptr + 4 * tile + 1)
    segment_begin = tl.load(tiles_ptr + 4 * tile + 2)
    segment_end = tl.load(tiles_ptr + 4 * tile + 3)
    is_shared = (begin == segment_begin) & (end == segment_end)
    if MIRROR:
        last = tl.maximum(segment_end - segment_begin - 1, 0) // TILE
        begin = segment_begin + (last - (begin - segment_begin) // TILE) * TILE
        end = tl.minimum(begin + TILE, segment_end)
    begin += block % (TILE // BLOCK) * BLOCK
    return begin, tl.minimum(begin + BLOCK, end), segment_begin, segment_end, is_shared


@triton.jit
def _keys(begin, end, segment_begin, segment_end, is_shared, CAUSAL: tl.constexpr):
    """(end of the keys that any of the rows sees, end of the keys that all rows see)."""
    keys_end = end if CAUSAL else segment_end
    whole_end = begin + 1 if CAUSAL else segment_end
    if is_shared:
        whole_end = segment_begin
    return keys_end, whole_end


@triton.jit
def _load(desc0, desc1, row, column, D0: tl.constexpr, D1: tl.constexpr):
    """A block of rows of one head, in two parts."""
    x0 = desc0.load([row, column])
    x1 = desc1.load([row, column + D0]) if D1 else 0.0
    return x0, x1


@triton.jit
def _zero_beyond(x0, x1, K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The two parts of rows of a head, with zeros in columns from K on."""
    if D0 + D1 > K:
        if D1:
            x1 = tl.where((D0 + tl.arange(0, D1) < K)[None, :], x1, 0.0)
        else:
            x0 = tl.where((tl.arange(0, D0) < K)[None, :], x0, 0.0)
    return x0, x1


@triton.jit
def _dot(a0, a1, b0, b1, D1: tl.constexpr):
    """a @ b.T in float32; a and b are in two parts."""
    out = tl.dot(a0, b0.T, input_precision="ieee")
    if D1:
        out = tl.dot(a1, b1.T, out, input_precision="ieee")
    return out


@triton.jit
def _add_dot(acc0, acc1, a, b0, b1, D1: tl.constexpr):
    """acc + a @ b; b and acc are in two parts."""
    acc0 = tl.dot(a, b0, acc0, input_precision="ieee")
    if D1:
        acc1 = tl.dot(a, b1, acc1, input_precision="ieee")
    return acc0, acc1


@triton.jit
def _bounds(segment_ids_ptr, cu_seqlens_ptr, rows, T):
    """(begin, end) of the segment of each row of the pack."""
    segment = tl.load(segment_ids_ptr + rows, mask=rows < T, other=0)
    begin = tl.load(cu_seqlens_ptr + segment, mask=rows < T, other=0)
    return begin, tl.load(cu_seqlens_ptr + segment + 1, mask=rows < T, other=0)


@triton.jit
def _within_segment(at, segment_end, is_shared, BLOCK: tl.constexpr):
    """Where to read the block at `at`: moved back if it would leave the segment. Rows before `at` are then to be
    masked. Only segments longer than a tile, and so than a block, have a tile of their own."""
    return at if is_shared else tl.minimum(at, segment_end - BLOCK)


@triton.jit
def _is_finite(x0, x1, D1: tl.constexpr):
    """Whether all sums are finite: 0 times any of them is 0."""
    zero = tl.sum(x0 * 0.0)
    if D1:
        zero += tl.sum(x1 * 0.0)
    return zero == 0.0


@triton.jit
def _store(ptr, x0, x1, rows, end, head, H, K, D0: tl.constexpr, D1: tl.constexpr):
    """Store one head's rows before `end` into a contiguous (T, H, K)."""
    row_ptr = ptr + (rows.to(tl.int64) * H + head)[:, None] * K
    d0 = tl.arange(0, D0)[None, :]
    tl.store(row_ptr + d0, x0.to(ptr.dtype.element_ty), mask=(rows < end)[:, None] & (d0 < K))
    if D1:
        d1 = D0 + tl.arange(0, D1)[None, :]
        tl.store(row_ptr + d1, x1.to(ptr.dtype.element_ty), mask=(rows < end)[:, None] & (d1 < K))


@triton.jit
def _rows(ptr, rows, end, stride, K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows before `end` of one head in float32, zeros after it."""
    d = tl.arange(0, 2 * D0 if D1 else D0)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + d
    return tl.load(at, mask=(rows < end)[:, None] & (d < K), other=0.0).to(tl.float32)


@triton.jit
def _row(ptr, row, stride, K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """One row of one head, as (1, columns) in float32."""
    return _rows(ptr, row + tl.arange(0, 1), row + 1, stride, K, D0, D1)


@triton.jit
def _store_row(ptr, x, row, head, H, K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Store one row of one head into a contiguous (T, H, K)."""
    d = tl.arange(0, 2 * D0 if D1 else D0)[None, :]
    rows = (row + tl.arange(0, 1)).to(tl.int64)
    at = ptr + (rows * H + head)[:, None] * K + d
    tl.store(at, x.to(ptr.dtype.element_ty), mask=d < K)


@triton.jit(**_OF_ANY_PACK)
def _varlen_attention_fwd_kernel(
    out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc,
    tiles_ptr, segment_ids_ptr, cu_seqlens_ptr, T, q_stride, k_stride, v_stride, q_step, k_step,
    v_step, scale_log2,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    head = item % H
    begin, end, segment_begin, segment_end, is_shared = _tile(tiles_ptr, item // H, BM, TILE, False)
    if begin < end:
        rows = begin + tl.arange(0, BM)
        q0, q1 = _load(q0_desc, q1_desc, begin, head * q_step, D0, D1)
        q0, q1 = _zero_beyond(q0, q1, K, D0, D1)
        acc0 = tl.zeros([BM, D0], tl.float32)
        acc1 = tl.zeros([BM, D1], tl.float32) if D1 else 0.0
        peak = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        keys_end, whole_end = _keys(begin, end, segment_begin, segment_end, is_shared, CAUSAL)
        first, behind = _bounds(segment_ids_ptr, cu_seqlens_ptr, rows, T)
        if CAUSAL:
            behind = rows + 1
        for n in tl.range(segment_begin, keys_end, BN, num_stages=STAGES):
            at = _within_segment(n, segment_end, is_shared, BN)
            k0, k1 = _load(k0_desc, k1_desc, at, head // G * k_step, D0, D1)
            scores = _dot(q0, q1, k0, k1, D1)
            if n + BN > whole_end:
                columns = (at + tl.arange(0, BN))[None, :]
                sees = (columns >= tl.maximum(first, n)[:, None]) & (columns < behind[:, None])
                scores = tl.where(sees, scores, -float("inf"))
            # Maxima are taken before scaling, so that scaling and shifting are one FFMA per score.
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            seen_peak = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # no key so far
            p = tl.exp2(scores * scale_log2 - (seen_peak * scale_log2)[:, None])
            # Exactly 1 while the peak stays: a rounding error here would accumulate over blocks.
            rescale = tl.exp2((peak - seen_peak) * scale_log2)
            total = total * rescale + tl.sum(p, 1)
            acc0 *= rescale[:, None]
            if D1:
                acc1 *= rescale[:, None]
            v0, v1 = _load(v0_desc, v1_desc, at, head // G * v_step, D0, D1)
            acc0, acc1 = _add_dot(acc0, acc1, p.to(v0.dtype), v0, v1, D1)
            peak = new_peak
        repeat = False
        if is_shared:
            repeat = not _is_finite(acc0, acc1, D1)
        acc0 /= total[:, None]
        if D1:
            acc1 /= total[:, None]
        _store(out_ptr, acc0, acc1, rows, end, head, H, K, D0, D1)
        lse = peak * scale_log2 + tl.log2(total)
        tl.store(lse_ptr + head * T + rows, lse, mask=rows < end)
        if repeat:
            tl.debug_barrier()
            for row in range(begin, end):
                first_key, behind_key = _bounds(segment_ids_ptr, cu_seqlens_ptr, row, T)
                if CAUSAL:
                    behind_key = row + 1
                q = _row(q_ptr + head * q_step, row, q_stride, K, D0, D1)
                lse_row = tl.load(lse_ptr + head * T + row)
                out = tl.zeros_like(q)
                for n in range(first_key, behind_key, BLOCK_BY_ROW):
                    keys = n + tl.arange(0, BLOCK_BY_ROW)
                    k = _rows(k_ptr + head // G * k_step, keys, behind_key, k_stride, K, D0, D1)
                    v = _rows(v_ptr + head // G * v_step, keys, behind_key, v_stride, K, D0, D1)
                    p = tl.exp2(tl.sum(q * k, 1) * scale_log2 - lse_row)
                    out += tl.sum(tl.where(keys < behind_key, p, 0.0)[:, None] * v, 0)[None, :]
                _store_row(out_ptr, out, row, head, H, K, D0, D1)


@triton.jit(**_OF_ANY_PACK)
def _varlen_attention_bwd_dq_kernel(
    dq_ptr, delta_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, dout_ptr, q0_desc, q1_desc, k0_desc, k1_desc,
    v0_desc, v1_desc, out0_desc, out1_desc, dout0_desc, dout1_desc, tiles_ptr, segment_ids_ptr,
    cu_seqlens_ptr, T, q_stride, k_stride, v_stride, dout_stride, q_step, k_step, v_step, dout_step,
    out_step, scale, scale_log2,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    head = item % H
    begin, end, segment_begin, segment_end, is_shared = _tile(tiles_ptr, item // H, BM, TILE, False)
    if begin < end:
        rows = begin + tl.arange(0, BM)
        out0, out1 = _load(out0_desc, out1_desc, begin, head * out_step, D0, D1)
        dout0, dout1 = _load(dout0_desc, dout1_desc, begin, head * dout_step, D0, D1)
        dout0, dout1 = _zero_beyond(dout0, dout1, K, D0, D1)
        delta = tl.sum(out0.to(tl.float32) * dout0.to(tl.float32), 1)
        if D1:
            delta += tl.sum(out1.to(tl.float32) * dout1.to(tl.float32), 1)
        tl.store(delta_ptr + head * T + rows, delta, mask=rows < end)
        lse = tl.load(lse_ptr + head * T + rows, mask=rows < end, other=float("inf"))
        q0, q1 = _load(q0_desc, q1_desc, begin, head * q_step, D0, D1)
        q0, q1 = _zero_beyond(q0, q1, K, D0, D1)
        dq0 = tl.zeros([BM, D0], tl.float32)
        dq1 = tl.zeros([BM, D1], tl.float32) if D1 else 0.0
        keys_end, whole_end = _keys(begin, end, segment_begin, segment_end, is_shared, CAUSAL)
        first, behind = _bounds(segment_ids_ptr, cu_seqlens_ptr, rows, T)
        if CAUSAL:
            behind = rows + 1
        for n in tl.range(segment_begin, keys_end, BN, num_stages=STAGES):
            at = _within_segment(n, segment_end, is_shared, BN)
            k0, k1 = _load(k0_desc, k1_desc, at, head // G * k_step, D0, D1)
            p = tl.exp2(_dot(q0, q1, k0, k1, D1) * scale_log2 - lse[:, None])
            if n + BN > whole_end:
                columns = (at + tl.arange(0, BN))[None, :]
                sees = (columns >= tl.maximum(first, n)[:, None]) & (columns < behind[:, None])
                p = tl.where(sees, p, 0.0)
            v0, v1 = _load(v0_desc, v1_desc, at, head // G * v_step, D0, D1)
            ds = p * (_dot(dout0, dout1, v0, v1, D1) - delta[:, None])
            dq0, dq1 = _add_dot(dq0, dq1, ds.to(k0.dtype), k0, k1, D1)
        repeat = False
        if is_shared:
            repeat = not _is_finite(dq0, dq1, D1)
        dq0 *= scale
        if D1:
            dq1 *= scale
        _store(dq_ptr, dq0, dq1, rows, end, head, H, K, D0, D1)
        if repeat:
            tl.debug_barrier()
            for row in range(begin, end):
                first_key, behind_key = _bounds(segment_ids_ptr, cu_seqlens_ptr, row, T)
                if CAUSAL:
                    behind_key = row + 1
                q = _row(q_ptr + head * q_step, row, q_stride, K, D0, D1)
                dout = _row(dout_ptr + head * dout_step, row, dout_stride, K, D0, D1)
                lse_row = tl.load(lse_ptr + head * T + row)
                delta_row = tl.load(delta_ptr + head * T + row)
                dq = tl.zeros_like(q)
                for n in range(first_key, behind_key, BLOCK_BY_ROW):
                    keys = n + tl.arange(0, BLOCK_BY_ROW)
                    k = _rows(k_ptr + head // G * k_step, keys, behind_key, k_stride, K, D0, D1)
                    v = _rows(v_ptr + head // G * v_step, keys, behind_key, v_stride, K, D0, D1)
                    p = tl.exp2(tl.sum(q * k, 1) * scale_log2 - lse_row)
                    ds = p * (tl.sum(dout * v, 1) - delta_row)
                    dq += tl.sum(tl.where(keys < behind_key, ds, 0.0)[:, None] * k, 0)[None, :]
                _store_row(dq_ptr, dq * scale, row, head, H, K, D0, D1)


@triton.jit(**_OF_ANY_PACK)
def _varlen_attention_bwd_dkv_kernel(
    dk_ptr, dv_ptr, lse_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, dout_ptr, q0_desc, q1_desc, k0_desc,
    k1_desc, v0_desc, v1_desc, dout0_desc, dout1_desc, tiles_ptr, segment_ids_ptr, cu_seqlens_ptr,
    T, q_stride, k_stride, v_stride, dout_stride, q_step, k_step, v_step, dout_step, scale,
    scale_log2,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv. Scores and their gradients are transposed: keys by queries."""
    item = tl.program_id(0)
    head = item % (H // G)
    begin, end, segment_begin, segment_end, is_shared = _tile(
        tiles_ptr, item // (H // G), BN, TILE, CAUSAL
    )
    if begin < end:
        columns = begin + tl.arange(0, BN)
        k0, k1 = _load(k0_desc, k1_desc, begin, head * k_step, D0, D1)
        v0, v1 = _load(v0_desc, v1_desc, begin, head * v_step, D0, D1)
        k0, k1 = _zero_beyond(k0, k1, K, D0, D1)
        v0, v1 = _zero_beyond(v0, v1, K, D0, D1)
        dk0 = tl.zeros([BN, D0], tl.float32)
        dv0 = tl.zeros([BN, D0], tl.float32)
        dk1 = tl.zeros([BN, D1], tl.float32) if D1 else 0.0
        dv1 = tl.zeros([BN, D1], tl.float32) if D1 else 0.0
        first, behind = _bounds(segment_ids_ptr, cu_seqlens_ptr, columns, T)
        if CAUSAL:
            first = columns
        queries_begin = begin if CAUSAL else segment_begin
        whole_begin = begin + BN - 1 if CAUSAL else segment_begin  # queries from here see all keys
        if is_shared:
            whole_begin = segment_end
        steps = tl.cdiv(segment_end - queries_begin, BM)
        for step in tl.range(0, G * steps, num_stages=STAGES):
            # A division less, and its registers, where heads have no groups.
            query_head = head * G + step // steps if G > 1 else head
            m = queries_begin + (step % steps if G > 1 else step) * BM
            at = _within_segment(m, segment_end, is_shared, BM)
            rows = at + tl.arange(0, BM)
            q0, q1 = _load(q0_desc, q1_desc, at, query_head * q_step, D0, D1)
            # Rows of the block before and rows after the segment have lse = inf, so p = 0.
            row = query_head * T + rows
            is_new = (rows >= m) & (rows < segment_end)
            lse = tl.load(lse_ptr + row, mask=is_new, other=float("inf"))
            p = tl.exp2(_dot(k0, k1, q0, q1, D1) * scale_log2 - lse[None, :])
            if m < whole_begin:
                sees = (rows[None, :] >= first[:, None]) & (rows[None, :] < behind[:, None])
                p = tl.where(sees, p, 0.0)
            dout0, dout1 = _load(dout0_desc, dout1_desc, at, query_head * dout_step, D0, D1)
            dv0, dv1 = _add_dot(dv0, dv1, p.to(dout0.dtype), dout0, dout1, D1)
            dp = _dot(v0, v1, dout0, dout1, D1)
            delta = tl.load(delta_ptr + row, mask=is_new, other=0.0)
            ds = p * (dp - delta[None, :])
            dk0, dk1 = _add_dot(dk0, dk1, ds.to(q0.dtype), q0, q1, D1)
        repeat = False
        if is_shared:
            repeat = not (_is_finite(dk0, dk1, D1) and _is_finite(dv0, dv1, D1))
        dk0 *= scale
        if D1:
            dk1 *= scale
        _store(dk_ptr, dk0, dk1, columns, end, head, H // G, K, D0, D1)
        _store(dv_ptr, dv0, dv1, columns, end, head, H // G, K, D0, D1)
        if repeat:
            tl.debug_barrier()
            for column in range(begin, end):
                first_query, behind_query = _bounds(segment_ids_ptr, cu_seqlens_ptr, column, T)
                if CAUSAL:
                    first_query = column
                k = _row(k_ptr + head * k_step, column, k_stride, K, D0, D1)
                v = _row(v_ptr + head * v_step, column, v_stride, K, D0, D1)
                dk, dv = tl.zeros_like(k), tl.zeros_like(v)
                for query_head in range(head * G, head * G + G):
                    for m in range(first_query, behind_query, BLOCK_BY_ROW):
                        rows = m + tl.arange(0, BLOCK_BY_ROW)
                        q_head, dout_head = (
                            q_ptr + query_head * q_step,
                            dout_ptr + query_head * dout_step,
                        )
                        q = _rows(q_head, rows, behind_query, q_stride, K, D0, D1)
                        dout = _rows(dout_head, rows, behind_query, dout_stride, K, D0, D1)
                        row = query_head * T + rows
                        sees = rows < behind_query
                        lse = tl.load(lse_ptr + row, mask=sees, other=float("inf"))
                        p = tl.exp2(tl.sum(k * q, 1) * scale_log2 - lse)
                        delta = tl.load(delta_ptr + row, mask=sees, other=0.0)
                        ds = p * (tl.sum(v * dout, 1) - delta)
                        dv += tl.sum(p[:, None] * dout, 0)[None, :]
                        dk += tl.sum(ds[:, None] * q, 0)[None, :]
                _store_row(dk_ptr, dk * scale, column, head, H // G, K, D0, D1)
                _store_row(dv_ptr, dv, column, head, H // G, K, D0, D1)
