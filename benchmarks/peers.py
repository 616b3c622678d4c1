"""What others do, each behind one function. A peer that is not installed is left out, never faked."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def transformers_insertion(
    input_ids_T: torch.Tensor,
    weight_VD: torch.Tensor,
    features: list[torch.Tensor],
    image_token_id: int,
) -> torch.Tensor:
    """Token embedding and feature insertion as `Qwen2VLModel.forward` does it (transformers 5.23): the
    features of every image joined, placeholders counted and checked, `masked_scatter`."""
    embeds = F.embedding(input_ids_T[None], weight_VD)
    joined = torch.cat(features, dim=0).to(embeds.device, embeds.dtype)
    mask = input_ids_T[None] == image_token_id
    num_tokens = mask.sum()
    if not num_tokens * embeds.shape[-1] == joined.numel():
        raise ValueError(f"{num_tokens} placeholders but {joined.shape[0]} features")
    return embeds.masked_scatter(mask[..., None], joined)[0]


def index_copy_insertion(
    input_ids_T: torch.Tensor,
    weight_VD: torch.Tensor,
    features_FD: torch.Tensor,
    feature_token: torch.Tensor,
) -> torch.Tensor:
    """The best of plain torch: embedding, then the rows by index. What `patch_model` does by itself."""
    embeds = F.embedding(input_ids_T, weight_VD)
    return embeds.index_copy(0, feature_token.long(), features_FD)
