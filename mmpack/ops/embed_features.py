"""Token embedding and insertion of features at placeholders in one pass, and its backward.

    out[t] = features[feature_index[t]]   where feature_index[t] >= 0
             weight[input_ids[t]]         elsewhere

Forward: one program per token selects its row's pointer, reads the row and writes it; bit-exact. transformers
(embed, cat, mask, masked_scatter) moves about nine times as many bytes.

Backward: one launch for both gradients. A feature's gradient is the sum over the tokens that it was inserted at
(`feature_token`, `feature_offsets`): a copy for one token, else added in their order, in float32. A table row's
gradient is the sum over its tokens, which are sorted by id in runs of at most MAX_RUN tokens (`text_order`,
`text_id_offsets`): one program per run adds in a fixed order, in float32; ids with several runs leave partial
sums, which a second launch adds. All indices are made on the CPU. No atomics, no sort, no host sync: two backward
passes give the same bits. Placeholders are not read, while `embedding_dense_backward` sorts them and adds up their
zeros.

Bytes per column in bf16: forward 4 T, one launch; backward 4 T, plus 2 V to clear a new table gradient, three
launches. Not measured on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmpack.ops.arguments import check_indices, on_its_device
from mmpack.ops.embed_features_kernels import (
    _embed_features_bwd_kernel,
    _embed_features_bwd_partials_kernel,
    _embed_features_fwd_kernel,
)
from mmpack.types import MAX_RUN

# T = tokens, F = features, M = placeholders, V = table rows, D = hidden size, R = runs of one id
MAX_COPY_D = 8192  # elements of a row copied at once, with all loads before the first store
BLOCK_D = 1024  # elements of a row summed at once: 128 threads x 8 two-byte elements (16 bytes)
BLOCK_R = 4  # rows of a run read at once
NUM_WARPS = 4


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

    `indices` is (feature_token, feature_offsets, text_order, text_id_offsets); the gradient of a part with empty
    offsets is not written. Rows of ids in the text are overwritten, or added to with `accumulate`; other rows are
    not changed.
    """
    feature_token, feature_offsets, text_order, text_id_offsets = indices
    D = dout_TD.shape[1]
    num_runs = max(0, len(text_id_offsets) - 1)
    num_programs = num_runs + max(0, len(feature_offsets) - 1)
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
        feature_offsets,
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
    feature_offsets: Tensor,
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
    feature_offsets: Tensor,
    text_order: Tensor,
    text_id_offsets: Tensor,
    num_rows: int,
    padding_idx: int,
) -> tuple[Tensor, Tensor]:
    dweight = dout.new_zeros(num_rows, dout.shape[1])
    dfeatures = dout.new_empty(max(0, len(feature_offsets) - 1), dout.shape[1])
    indices = (feature_token, feature_offsets, text_order, text_id_offsets)
    embed_features_bwd(dout, dweight, dfeatures, input_ids, indices, padding_idx)
    return dweight, dfeatures


@_embed_features_backward.register_fake
def _(dout, input_ids, feature_token, feature_offsets, order, offsets, num_rows, padding_idx):
    F, D = max(0, len(feature_offsets) - 1), dout.shape[1]
    return dout.new_empty(num_rows, D), dout.new_empty(F, D)


def _save_for_backward(ctx, inputs, output):
    input_ids, _, weight, _, *indices, padding_idx = inputs
    ctx.save_for_backward(input_ids, *indices)
    ctx.num_rows, ctx.padding_idx = weight.shape[0], padding_idx


def _backward(ctx, dout):
    input_ids, feature_token, feature_offsets, text_order, text_id_offsets = ctx.saved_tensors
    needs_weight, needs_features = ctx.needs_input_grad[2:4]
    if not needs_weight:
        text_order, text_id_offsets = text_order[:0], text_id_offsets[:0]
    dweight, dfeatures = _embed_features_backward(
        dout,
        input_ids,
        feature_token,
        feature_offsets if needs_features else feature_offsets[:0],
        text_order,
        text_id_offsets,
        ctx.num_rows if needs_weight else 0,
        ctx.padding_idx,
    )
    gradients = (dweight if needs_weight else None, dfeatures if needs_features else None)
    return None, None, *gradients, None, None, None, None, None


_embed_features.register_autograd(_backward, setup_context=_save_for_backward)


def _check(input_ids_T, weight_VD, features_FD, indices):
    T, D = len(input_ids_T), weight_VD.shape[1]
    F, M = max(0, len(indices["feature_offsets"]) - 1), len(indices["feature_token"])
    if features_FD.shape != (F, D):
        raise ValueError(
            f"features must be {(F, D)} to fill {M} placeholders, got {tuple(features_FD.shape)}"
        )
    if features_FD.dtype != weight_VD.dtype:
        raise ValueError(f"features are {features_FD.dtype}, the table is {weight_VD.dtype}")
    if len(indices["feature_index"]) != T:
        raise ValueError(f"{T} input_ids but {len(indices['feature_index'])} feature indices")
    num_text = len(indices["text_order"])
    if num_text != T - M:
        raise ValueError(
            f"text_order must have {T - M} entries for {T} tokens, {M} of them placeholders, got {num_text}"
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
    feature_offsets: Tensor,
    text_order: Tensor,
    text_id_offsets: Tensor,
    padding_idx: int | None = None,
) -> Tensor:
    """Embed tokens and insert vision features at their placeholders: (T, D), out of place.

    Equal to transformers' `embed_tokens(input_ids).masked_scatter(is_placeholder, features)`. Differentiable in
    `weight_VD` and `features_FD`; deterministic; a table row's gradient is rounded once, from a float32 sum, and
    so is that of a feature at several placeholders.

    Args:
        input_ids_T: (T,) integer ids below V. Not checked, because that would synchronize with the device.
        feature_index_T: (T,) int32: index of the feature at each token, -1 for text.
        weight_VD: (V, D) embedding table.
        features_FD: (F, D) vision features, same dtype and device.
        feature_token, feature_offsets: (M,) and (F + 1,) int32, the inverse of `feature_index_T`: the tokens of
            each feature, and the offsets of the features in them.
        text_order, text_id_offsets: (T - M,) and (R + 1,) int32: text tokens sorted by id, and offsets of their
            runs of one id and at most MAX_RUN tokens. All indices are fields of `mmpack.Pack`.
        padding_idx: an id without gradient, as in `torch.nn.Embedding`.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the device cannot run the kernel.
    """
    indices = {
        "feature_index": feature_index_T,
        "feature_token": feature_token,
        "feature_offsets": feature_offsets,
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
        feature_offsets,
        text_order,
        text_id_offsets,
        -1 if padding_idx is None else padding_idx,
    )
