"""Tensors in, tensors out: Triton kernels and what makes them differentiable. No mmpack type here."""

from mmpack.ops.accumulate_embedding_grad import accumulate_embedding_grad
from mmpack.ops.embed_features import embed_features

__all__ = ["accumulate_embedding_grad", "embed_features"]
