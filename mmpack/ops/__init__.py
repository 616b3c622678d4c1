"""Differentiable ops on tensors, most with Triton kernels. They do not use mmpack's types.

Without Triton (it exists for Linux only), the ops that can fall back on a library are still available.
"""

from importlib.util import find_spec

from mmpack.ops.block_mask import block_mask
from mmpack.ops.patch_embed import patch_embed
from mmpack.ops.supervised_cross_entropy import supervised_cross_entropy
from mmpack.ops.supervised_linear_cross_entropy import supervised_linear_cross_entropy
from mmpack.ops.varlen_attention import varlen_attention

__all__ = [
    "block_mask",
    "patch_embed",
    "supervised_cross_entropy",
    "supervised_linear_cross_entropy",
    "varlen_attention",
]

if find_spec("triton"):
    # Not used by the model patch, only for loops that manage their own gradients. It saves clearing V x D numbers
    # per micro-batch, 1.1 GB for Qwen2-VL-7B's table in bf16 (computed, not measured on a GPU).
    from mmpack.ops.accumulate_embedding_grad import accumulate_embedding_grad
    from mmpack.ops.assembly.assemble_patches import assemble_patches
    from mmpack.ops.assembly.assemble_sequence import assemble_sequence
    from mmpack.ops.assembly.attention_tiles import attention_tiles
    from mmpack.ops.assembly.dense_mask import dense_mask
    from mmpack.ops.cast_patches import cast_patches
    from mmpack.ops.embed_features import embed_features
    from mmpack.ops.mrope import apply_mrope

    __all__ += [
        "accumulate_embedding_grad",
        "apply_mrope",
        "assemble_patches",
        "assemble_sequence",
        "attention_tiles",
        "cast_patches",
        "dense_mask",
        "embed_features",
    ]


def __dir__() -> list[str]:
    return __all__
