"""The self-test of isolation: changing the first segment must not change the second by a bit.

If segments leak (a cache left on, a lost mask, an attention implementation replaced later), training is silently
wrong. So each patched model is tested once: at patch time, where a leak also unpatches it, or at the first packed
forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from mmpack.hf.fit import facts_of_model
from mmpack.hf.forward_kwargs import batch_of, pixel_values_of
from mmpack.hf.model_parts import family_of, tower_of
from mmpack.packing.assemble import assemble
from mmpack.types import EncodedSample
from mmpack.vision_spec import VisionSpec


def check_isolation(base: Any) -> None:
    """Run two small packs that differ only in their first segment, in text and image.

    Args:
        base: a patched inner model with its weights in place.

    Raises:
        RuntimeError: the second segment's hidden states differ.
    """
    vision = _vision_spec(base.config)
    special = (
        vision.vision_start_token_id,
        vision.image_token_id,
        vision.video_token_id,
        vision.vision_end_token_id,
    )
    text_ids = [token_id for token_id in range(19) if token_id not in special]
    samples = [_sample(text_ids[n : n + 5], vision) for n in (0, 5, 10)]
    modes = [(module, module.training) for module in base.modules()]
    device = base.device
    for module in base.modules():
        module.training = _is_quantized(module)
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            one = _second_segment(base, samples[0], samples[2], 0)
            other = _second_segment(base, samples[1], samples[2], 255)
    finally:
        for module, training in modes:
            module.training = training
    if _differ(one, other, family_of(base).has_experts):
        raise RuntimeError(
            "packed segments see each other: changing the first segment changed the second one's hidden "
            f"states by up to {(one - other).abs().max():.1e}. Was an attention implementation or a "
            "module's forward replaced? Patch the model last, and do not change its attention afterwards"
        )


def _is_quantized(module: nn.Module) -> bool:
    """Whether the module is bitsandbytes', whose 4-bit layers rewrite their weights when they are evaluated on a
    CPU, so that they could not be trained any more. In training mode they compute the same."""
    return type(module).__module__.partition(".")[0] == "bitsandbytes"


def _differ(one: torch.Tensor, other: torch.Tensor, has_experts: bool) -> bool:
    """Whether hidden states differ by a bit; with experts, by more than half the digits in the norm. The number of
    tokens per expert depends on the other segment, and matrix products may round differently by size."""
    if not has_experts:
        return not torch.equal(one, other)
    one, other, eps = one.float(), other.float(), torch.finfo(one.dtype).eps
    return bool((one - other).norm() > eps**0.5 * one.norm())


def _second_segment(
    base: Any, first: EncodedSample, second: EncodedSample, shade: int
) -> torch.Tensor:
    pack = assemble([first, second], pixels=False)
    pixels = np.full((len(pack.vision_position_ids), pack.vision.patch_values), 100, dtype=np.uint8)
    pixels[: first.num_patches] = shade
    values = pixel_values_of(pixels, pixels[:0], pack.vision, "float32")
    batch = batch_of(pack, values, tower_of(base))
    batch = _to_device(batch, base.device)
    batch["mmpack"]["context"] = None  # whole, on every rank
    batch["mmpack"]["facts"] = facts_of_model(base.config)  # the test's normalization is arbitrary
    for name in ("labels", "shift_labels", "logits_to_keep"):  # for the outer model
        del batch[name]
    hidden: torch.Tensor = base(**batch).last_hidden_state
    return hidden[0, int(pack.cu_seqlens[1]) :].nan_to_num()


def _sample(text_ids: list[int], vision: VisionSpec) -> EncodedSample:
    """A sample of text, an image with one feature, text."""
    image = [vision.vision_start_token_id, vision.image_token_id, vision.vision_end_token_id]
    input_ids = np.array([*text_ids[:3], *image, *text_ids[3:]], dtype=np.int32)
    grid = np.array([[1, vision.merge_size, vision.merge_size]], dtype=np.int32)
    return EncodedSample(input_ids, input_ids, grid, (), vision)


def _vision_spec(config: Any) -> VisionSpec:
    tower = config.vision_config
    return VisionSpec(
        min_pixels=1,
        max_pixels=1,
        patch_size=tower.patch_size,
        merge_size=tower.spatial_merge_size,
        temporal_patch_size=tower.temporal_patch_size,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
    )


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {name: _to_device(item, device) for name, item in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value
