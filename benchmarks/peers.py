"""Operations of other packages, one function each. A peer that is not installed is skipped, never imitated."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from mmpack import VisionSpec


def transformers_insertion(
    input_ids_T: torch.Tensor,
    weight_VD: torch.Tensor,
    features: list[torch.Tensor],
    image_token_id: int,
) -> torch.Tensor:
    """Token embedding and feature insertion as in `Qwen2VLModel.forward` (transformers 5.23): features of all
    images are joined, placeholders counted and checked, then `masked_scatter`."""
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
    """The best plain torch version: embedding, then the rows by index, as in `patch_model` by default, which also
    repeats the features of images that several markers show."""
    embeds = F.embedding(input_ids_T, weight_VD)
    return embeds.index_copy(0, feature_token.long(), features_FD)


def dense_mask_attention(
    q_THK: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask_TT: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Packing with sdpa in transformers: one (T, T) mask, and keys repeated for each query head
    (`sdpa_attention_forward` repeats them if there is a mask)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT[None, None], scale=scale)
    return out[0].transpose(0, 1)


def per_image_attention(
    q_PHK: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """`VisionAttention.forward` without flash attention: reads lengths from the device and calls sdpa once per
    image, in every layer."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    parts = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in parts), scale=scale)
        for parts in zip(*(x.split(lengths) for x in (q_PHK, k, v)))
    ]
    return torch.cat([part[0].transpose(0, 1) for part in parts])


def rope_index_model(vision: VisionSpec) -> Any:
    """A minimal `Qwen2VLModel` with the right special ids."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    return Qwen2VLModel(
        Qwen2VLConfig(
            text_config={
                **text,
                **heads,
                **rope,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "pad_token_id": 0,
            },
            vision_config={"depth": 1, "embed_dim": 8, "hidden_size": 8, "num_heads": 1},
            image_token_id=vision.image_token_id,
            video_token_id=vision.video_token_id,
            vision_start_token_id=vision.vision_start_token_id,
            vision_end_token_id=vision.vision_end_token_id,
        )
    )


def rope_index_pack(
    model: Any, samples: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """A packed row of expanded samples (input_ids, labels, image_grid_thw), as a collator can make it with
    transformers (5.23): `get_rope_index` on each sample with images, then everything joined."""
    positions = []
    for ids, _, grids in samples:
        places = torch.arange(len(ids)).expand(4, -1)
        if len(grids):  # for text, all four rows are the same
            is_image = (ids == model.config.image_token_id).int()[None]
            rope, _ = model.get_rope_index(ids[None], is_image, image_grid_thw=grids)
            places = torch.cat([places[:1], rope[:, 0]])
        positions.append(places)
    lengths = torch.tensor([0, *[len(ids) for ids, _, _ in samples]])
    return {
        "input_ids": torch.cat([ids for ids, _, _ in samples]),
        "labels": torch.cat([labels for _, labels, _ in samples]),
        "position_ids": torch.cat(positions, dim=1),
        "image_grid_thw": torch.cat([grids for _, _, grids in samples]),
        "cu_seqlens": lengths.cumsum(0, dtype=torch.int32),
    }


def conv3d_patch_embed(pixel_values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Patch embedding as in `PatchEmbed.forward` (transformers 5.23): a Conv3d with a single step over float32
    `pixel_values` cast to its weight's dtype."""
    patches = pixel_values.view(-1, *weight.shape[1:]).to(weight.dtype)
    return F.conv3d(patches, weight, stride=weight.shape[2:]).view(-1, len(weight))


def linear_patch_embed(pixel_values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same as one product, which equals a convolution without overlap."""
    return F.linear(pixel_values.to(weight.dtype), weight.flatten(1))


def transformers_rope(
    q_THK: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rotary_pos_emb` on the output of a layer's projections, given cos and sin (T, K)."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

    heads_first = [x[None].transpose(1, 2) for x in (q_THK, k)]
    rotated = apply_rotary_pos_emb(*heads_first, cos[None], sin[None])
    return tuple(x[0].transpose(0, 1) for x in rotated)


def transformers_vision_rope(
    q_THK: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rotary_pos_emb_vision`, which casts to float32 and back."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    return apply_rotary_pos_emb_vision(q_THK, k, cos, sin)


def liger_mrope(
    q_THK: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sections: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Liger's op on the same, given cos and sin of all three axes (3, 1, T, K). Some versions write into q and k,
    so repeated calls rotate further; this does not change the time."""
    from liger_kernel.transformers.qwen2vl_mrope import liger_multimodal_rotary_pos_emb as rope

    heads_first = [x[None].transpose(1, 2) for x in (q_THK, k)]
    return tuple(x[0].transpose(0, 1) for x in rope(*heads_first, cos, sin, sections))
