"""The cost of a sample: FLOPs of a training step, forward and backward, computed from a model's config.

Packs with the same number of tokens do not take the same time: an image token passes through the vision tower as
four patches before it reaches the language model, and attention grows with the square of a segment's length.
`plan_packs(cost=...)` balances these costs.

Only matrix products are counted, with two operations per multiply-add, as in `torch.utils.flop_counter`: linear
layers (forward, input gradient, weight gradient), the patch convolution and attention. The backward of attention
counts 2.5x its forward, because flash kernels recompute the scores. Text attention counts the causal triangle, n
(n + 1) / 2 scores for n tokens, as a varlen kernel computes it (torch's counter counts the square); vision
attention counts whole images, or windows in Qwen2.5-VL. Norms, activations, softmax, rotations and recomputation
by gradient checkpointing are not counted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mmpack.families import FAMILIES, Family
from mmpack.packing.sized_samples import are_sized
from mmpack.types import EncodedSample, Int64

PARTS = ("vision", "merger", "language")


def sample_flops(
    config: Any,
    num_tokens: ArrayLike,
    num_supervised: ArrayLike,
    grid_thw: ArrayLike,
    image_offsets: ArrayLike,
    *,
    frozen: Collection[str] = (),
) -> Int64:
    """FLOPs of a training step for each of N samples.

    Args:
        config: the model's config: a transformers config, or a mapping as in `config.json`.
        num_tokens: (N,) tokens, placeholders included.
        num_supervised: (N,) tokens with a loss; only these reach the head.
        grid_thw: (I, 3) patches of each image: frames, height, width.
        image_offsets: (N + 1,) images of sample n are `image_offsets[n] : image_offsets[n + 1]`.
        frozen: parts that are not trained: "vision" (patch embedding and blocks), "merger" (including deepstack's)
            or "language" (embedding, layers and head). A frozen part has no weight gradients. It propagates
            gradients if a part below it is trained, also in text-only samples, which share packs with images;
            otherwise it has no backward.

    Returns:
        (N,) int64 FLOPs.

    Raises:
        ValueError: the model family or a part is unknown, the config lacks a size, or array shapes do not match.
    """
    family = _checked(config, frozen)
    n = np.asarray(num_tokens, dtype=np.int64)
    supervised = np.asarray(num_supervised, dtype=np.int64)
    grids = np.asarray(grid_thw, dtype=np.int64).reshape(-1, 3)
    offsets = np.asarray(image_offsets, dtype=np.int64)
    if supervised.shape != n.shape or offsets.shape != (len(n) + 1,) or offsets[-1] != len(grids):
        raise ValueError(
            f"{len(n)} num_tokens need {len(n)} num_supervised and {len(n) + 1} image_offsets, the last of which "
            f"is the number of grids; got {len(supervised)}, {len(offsets)} and {len(grids)} grids"
        )
    vision_trained, merger_trained, language_trained = (part not in frozen for part in PARTS)
    features_need_grad = vision_trained or merger_trained

    # FLOPs of a linear layer per multiply-add: 2 forward, 2 input gradient, 2 weight gradient.
    text_linear = 2 * (1 + language_trained + (language_trained or features_need_grad))
    text = _value(config, "text_config", default=config)
    head, linear, attention = _text_sizes(family, text)
    flops: Int64 = text_linear * (linear * n + head * supervised)
    # scores and their product with the values, 2 FLOPs each over n (n + 1) / 2 pairs
    forward = 2 * attention * n * (n + 1)
    flops += forward * 7 // 2 if language_trained or features_need_grad else forward
    if family.has_linear_attention:
        flops += _delta_rule(text, n, language_trained or features_need_grad)
    if len(grids):
        sums = np.concatenate([[0], image_flops(config, grids, frozen).cumsum()])
        flops += sums[offsets[1:]] - sums[offsets[:-1]]
    return flops


def image_flops(config: Any, grid_thw: ArrayLike, frozen: Collection[str] = ()) -> Int64:
    """FLOPs of a training step in the vision tower and its mergers, for each of I grids: the part of
    `sample_flops` that is spent once for images that a pack shows several times.

    Args:
        config, frozen: as in `sample_flops`.
        grid_thw: (I, 3) patches of each image: frames, height, width.

    Returns:
        (I,) int64 FLOPs.

    Raises:
        ValueError: as in `sample_flops`.
    """
    family = _checked(config, frozen)
    grids = np.asarray(grid_thw, dtype=np.int64).reshape(-1, 3)
    vision_trained, merger_trained = "vision" not in frozen, "merger" not in frozen
    block_linear = 6 if vision_trained else 2
    patch_linear = 4 if vision_trained else 2  # pixels have no gradient
    merger_linear = 2 * (
        1 + merger_trained + (vision_trained or merger_trained)
    )  # its norm comes first
    embed, block, merge, merged, depth, width = _vision_sizes(
        family, _value(config, "vision_config")
    )
    patches = grids.prod(axis=1)
    flops: Int64 = patches * (patch_linear * embed + block_linear * depth * block)
    flops += patches // merged * merger_linear * merge
    forward = 4 * width * _vision_pairs(family, _value(config, "vision_config"), grids)
    flops += forward * 7 // 2 if vision_trained else forward
    return flops


def _checked(config: Any, frozen: Collection[str]) -> Family:
    """The model's family."""
    unknown = sorted(set(frozen) - set(PARTS))
    if unknown:
        raise ValueError(f"--frozen (frozen) has {unknown}; the parts are {', '.join(PARTS)}")
    model_type = _value(config, "model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"no costs for model_type {model_type!r}, only for {', '.join(FAMILIES)}; leave out --config (cost)"
        )
    return FAMILIES[model_type]


def costs_of(samples: Sequence[EncodedSample], config: Any, frozen: Collection[str] = ()) -> Int64:
    """(N,) int64 FLOPs of a training step on each sample; see `sample_flops`.

    Args:
        samples: a list or an `EncodedStore`, which knows its sizes without reading samples.
        config: the model's config, a transformers config or a mapping.
        frozen: parts that are not trained: "vision", "merger" or "language".

    Raises:
        ValueError: as in `sample_flops`.
    """
    if are_sized(samples):
        shapes: tuple[ArrayLike, ...] = (samples.num_supervised, *samples.grids())
    else:
        grids = [sample.grid_thw for sample in samples]
        shapes = (
            [sample.num_supervised for sample in samples],
            np.concatenate([np.empty((0, 3), dtype=np.int32), *grids]),
            np.cumsum([0, *map(len, grids)]),
        )
    return sample_flops(config, sizes_of(samples)[0], *shapes, frozen=frozen)


def sizes_of(samples: Sequence[EncodedSample]) -> tuple[Int64, Int64]:
    """(num_tokens, num_patches), each (N,)."""
    if are_sized(samples):  # a store knows its sizes without reading samples
        return samples.num_tokens.copy(), samples.num_patches.copy()
    pairs = [(sample.num_tokens, sample.num_patches) for sample in samples]
    sizes = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return sizes[:, 0].copy(), sizes[:, 1].copy()


def _text_sizes(family: Family, text: Any) -> tuple[int, int, int]:
    """(multiply-adds per token of the head, of all layers' linears; attention width, summed over the layers)."""
    hidden, heads = _value(text, "hidden_size"), _value(text, "num_attention_heads")
    head_dim = _value(text, "head_dim", default=None) or hidden // heads
    kv_heads = _value(text, "num_key_value_heads", default=None) or heads
    layers, (sparse, experts) = _value(text, "num_hidden_layers"), _experts(text)
    deltas = _num_deltas(text) if family.has_linear_attention else 0
    products = 3 if family.has_linear_attention else 2  # queries and output, and the output's gate
    linear = (layers - deltas) * hidden * head_dim * (products * heads + 2 * kv_heads)
    if deltas:
        heads_v, key, value = _delta_sizes(text)
        mixed = 2 * _value(text, "linear_num_key_heads") * key + heads_v * value
        linear += deltas * hidden * (mixed + 2 * heads_v * value + 2 * heads_v)
        linear += deltas * mixed * _value(text, "linear_conv_kernel_dim")
    if layers > sparse:
        linear += (layers - sparse) * 3 * hidden * _value(text, "intermediate_size")
    if sparse:  # the router, the chosen experts, and the one that all tokens share, with its gate
        chosen = _value(text, "num_experts_per_tok") * _value(text, "moe_intermediate_size")
        shared = _value(text, "shared_expert_intermediate_size", default=None) or 0
        linear += sparse * hidden * (experts + 3 * chosen + 3 * shared + bool(shared))
    return hidden * _value(text, "vocab_size"), linear, (layers - deltas) * heads * head_dim


def _num_deltas(text: Any) -> int:
    """Number of layers that are Gated DeltaNets."""
    return sum(kind == "linear_attention" for kind in _value(text, "layer_types"))


def _delta_sizes(text: Any) -> tuple[int, int, int]:
    """(value heads; head dims of keys and values) of a Gated DeltaNet; key heads are repeated."""
    names = ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    heads, key, value = (int(_value(text, name)) for name in names)
    return heads, key, value


def _delta_rule(text: Any, n: Int64, needs_grad: bool) -> Int64:
    """FLOPs of the matrix products of all Gated DeltaNets' rules, which take 64 tokens at once."""
    heads, key, value = _delta_sizes(text)
    chunks, size = -(-n // 64), 64
    state = size * key * value  # a product with the state, per chunk
    forward: Int64 = chunks * (3 * state + size**2 * (2 * key + value))
    if needs_grad:  # also of the triangular system; the first state is zero, the last one unused
        forward += chunks * (2 * state + size**2 * (5 * key + 3 * value)) + (chunks - 1) * 4 * state
    return 2 * _num_deltas(text) * heads * forward


def _experts(text: Any) -> tuple[int, int]:
    """(number of layers with experts, by the rule of transformers' decoder layer; number of experts)."""
    names = ("num_experts", "num_local_experts")  # in published configs; written by transformers 5
    experts = next((n for name in names if (n := _value(text, name, default=None))), 0)
    if not experts:
        return 0, 0
    step = _value(text, "decoder_sparse_step", default=1)
    dense = _value(text, "mlp_only_layers", default=None) or ()
    layers = range(_value(text, "num_hidden_layers"))
    return sum(layer not in dense and (layer + 1) % step == 0 for layer in layers), experts


def _vision_sizes(family: Family, vision: Any) -> tuple[int, int, int, int, int, int]:
    """(multiply-adds per patch of the patch embedding, per patch of a block's linears, per feature of the mergers;
    patches per feature; number of blocks; width)."""
    merged = _value(vision, "spatial_merge_size") ** 2
    depth = _value(vision, "depth")
    width, out = _value(vision, family.tower_width), _value(vision, family.feature_width)
    if family.mlp_width is None:
        inner = int(width * _value(vision, "mlp_ratio"))
    else:
        inner = _value(vision, family.mlp_width)
    block = family.mlp_products * width * inner
    mergers = 1
    if family.has_deepstack:
        mergers += len(_value(vision, "deepstack_visual_indexes"))
    channels = _value(vision, "in_channels", default=None) or _value(vision, "in_chans")
    patch_values = (
        channels * _value(vision, "temporal_patch_size") * _value(vision, "patch_size") ** 2
    )
    merge = mergers * (width * merged) * (width * merged + out)
    return patch_values * width, block + 4 * width**2, merge, merged, depth, width


def _vision_pairs(family: Family, vision: Any, grids: Int64) -> Int64:
    """(I,) pairs of patches that attend to each other, summed over blocks; attention is within frames."""
    frames, height, width = grids.T
    whole: Int64 = frames * (height * width) ** 2
    depth = int(_value(vision, "depth"))
    if not family.has_windows:
        return depth * whole
    merge = int(_value(vision, "spatial_merge_size"))
    side = _value(vision, "window_size") // merge // _value(vision, "patch_size")  # in features

    def squares(length: Int64) -> Int64:
        """Sum of the squared window lengths along a side."""
        total: Int64 = length // side * side**2 + (length % side) ** 2
        return total

    windows: Int64 = frames * squares(height // merge) * squares(width // merge) * merge**4
    full = len(_value(vision, "fullatt_block_indexes"))
    return full * whole + (depth - full) * windows


_REQUIRED = object()


def _value(config: Any, name: str, default: Any = _REQUIRED) -> Any:
    """A value from a config, an object or a mapping."""
    if isinstance(config, Mapping):
        value = config.get(name, default)
    else:
        value = getattr(config, name, default)
    if value is _REQUIRED:
        raise ValueError(
            f"the config has no {name}; load it with transformers, which fills in defaults: "
            "AutoConfig.from_pretrained(FOLDER)"
        )
    return value
