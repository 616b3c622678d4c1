"""Adds the embedding table's gradient to an existing gradient.

Runs the backward kernels of `embed_features` in accumulating mode: only rows of ids in the text are read and
written, 3.8 bytes per element of the text in bf16. A new dense gradient and its accumulation move 8 V D bytes
more.
"""

import torch
from torch import Tensor

from mmpack.ops.arguments import check_indices
from mmpack.ops.embed_features import embed_features_bwd

# T = tokens, V = table rows, D = hidden size


@torch.library.custom_op("mmpack::accumulate_embedding_grad", mutates_args=("grad",))
def _accumulate_embedding_grad(
    grad: Tensor,
    dout: Tensor,
    input_ids: Tensor,
    text_order: Tensor,
    text_id_offsets: Tensor,
    padding_idx: int,
) -> None:
    indices = (text_order[:0], text_order[:0], text_order, text_id_offsets)
    embed_features_bwd(dout, grad, grad, input_ids, indices, padding_idx, accumulate=True)


@_accumulate_embedding_grad.register_fake
def _(grad, dout, input_ids, text_order, text_id_offsets, padding_idx):
    return None


def accumulate_embedding_grad(
    grad_VD: Tensor,
    dout_TD: Tensor,
    input_ids_T: Tensor,
    *,
    text_order: Tensor,
    text_id_offsets: Tensor,
    padding_idx: int | None = None,
) -> None:
    """Add the table's gradient of one step to `grad_VD` (a `.grad`, or a float32 `main_grad`) in place. Only rows
    of ids in the text are read and written: 3.8 bytes per element of the text, while a new gradient and its
    accumulation move 8 V D bytes more.

    For training loops that manage their own gradients. `patch_model` does not use it, because autograd does not
    see it: `torch.autograd.grad` and the weight's hooks get no gradient, so DDP and FSDP do not reduce it and
    gradient scaling does not check it. Call it once per step, before the optimizer step.

    Args:
        grad_VD: (V, D), any floating dtype, contiguous; sums are float32 and rounded once.
        dout_TD: (T, D), the gradient of `embed_features`' output.
        input_ids_T, text_order, text_id_offsets, padding_idx: as in `embed_features`.

    Raises:
        ValueError: shapes or devices do not match, or the device cannot run the kernel.
    """
    if not grad_VD.is_contiguous():
        raise ValueError(f"grad must be contiguous, got strides {grad_VD.stride()}")
    if dout_TD.shape != (len(input_ids_T), grad_VD.shape[1]):
        raise ValueError(
            f"dout must be {(len(input_ids_T), grad_VD.shape[1])}, one row per token, got {tuple(dout_TD.shape)}"
        )
    check_indices({"text_order": text_order, "text_id_offsets": text_id_offsets}, grad_VD.device)
    _accumulate_embedding_grad(
        grad_VD,
        dout_TD,
        input_ids_T,
        text_order,
        text_id_offsets,
        -1 if padding_idx is None else padding_idx,
    )
