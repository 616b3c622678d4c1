"""Embeds a pack's tokens and inserts its features: in one kernel if the embedding is plain, else in two steps.

An embedding module may be more than a table lookup: LoRA, NEFTune and `enable_input_require_grads` add hooks,
FSDP2 and ZeRO-3 shard its weight. Then the module itself is called, and features are inserted afterwards. This is
decided at call time, not at patch time.
"""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch
from torch import nn

from mmpack import reference
from mmpack.hf.compat import all_hooks, is_sharded
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.hf.op_choice import impl_for

Module = TypeVar("Module", bound=nn.Module)


def embed(
    embedding: nn.Module,
    input_ids_T: torch.Tensor,
    features_FD: torch.Tensor | None,
    pack: MmpackDict,
) -> torch.Tensor:
    """(T, D) embeddings in the table's dtype, with features inserted."""
    if is_plain(embedding) and impl_for(pack, "embedding", embedding.weight.dtype) == "triton":
        from mmpack.ops import embed_features

        weight_VD = embedding.weight
        if features_FD is None:
            features_FD = weight_VD.new_empty(0, weight_VD.shape[1])
        return embed_features(
            input_ids_T,
            pack["feature_index"],
            weight_VD,
            features_FD.to(weight_VD.device, weight_VD.dtype),
            feature_token=pack["feature_token"],
            feature_offsets=pack["feature_offsets"],
            text_order=pack["text_order"],
            text_id_offsets=pack["text_id_offsets"],
            padding_idx=embedding.padding_idx,
        )
    embeds_TD: torch.Tensor = embedding(input_ids_T[None])[0]
    if features_FD is None:
        return embeds_TD
    features_MD = at_placeholders(features_FD.to(embeds_TD.device, embeds_TD.dtype), pack)
    return reference.insert_features(embeds_TD, features_MD, pack["feature_token"])


def at_placeholders(features_FD: torch.Tensor, pack: MmpackDict) -> torch.Tensor:
    """(M, D) the feature of each placeholder, in the order of `pack["feature_token"]`."""
    return reference.repeat_features(
        features_FD, pack["feature_index"], pack["feature_token"], pack["feature_offsets"]
    )


def is_plain(embedding: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether calling the module only reads rows of its weight."""
    return (
        is_bare(embedding, nn.Embedding)
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding.sparse
        and not is_sharded(embedding.weight)
    )


def is_bare(module: nn.Module, cls: type[Module]) -> TypeGuard[Module]:
    """Whether a module is exactly of this class, without hooks other than DeepSpeed's gathering."""
    return (
        type(module) is cls
        and "forward" not in vars(module)
        and all(
            getattr(hook, "__module__", "").startswith("deepspeed.") for hook in all_hooks(module)
        )
    )
