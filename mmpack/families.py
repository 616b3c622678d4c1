"""The model families, one record each. To add a family, add a record here, and code for anything new in it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class VideoRule:
    """Settings of a family's video processor: the defaults of its class in transformers, which cannot be imported
    without torchvision.

    Attributes:
        processor: the name of the class.
        min_pixels, max_pixels: the area of a frame; with `budgets_clip`, of all sampled frames together.
        min_frames, max_frames: the number of sampled frames.
        budgets_clip: the pixel budget is for the whole clip, and sampled frames span it from first to last.
        has_timestamps: each temporal patch has its own run of placeholders, after its time.
    """

    processor: str
    min_pixels: int
    max_pixels: int
    min_frames: int = 4
    max_frames: int = 768
    budgets_clip: bool = False
    has_timestamps: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """Properties of one model family; the names of sizes are fields of its config's `vision_config`.

    Attributes:
        processor: class name of its processor, the `processor_class` in its folders.
        video: settings of its video processor.
        has_timed_positions: a video's M-RoPE positions follow time (`tokens_per_second`).
        is_interleaved: rotary frequencies alternate between t, h and w; else they are three sections.
        has_windows: most blocks of the tower attend within windows, and features come out in window order.
        has_position_table: the tower adds learned positions, interpolated to each image's grid.
        has_deepstack: features of inner blocks are added after the first text layers.
        has_experts: text tokens are routed to experts, so matrix products vary in length with the routing.
        has_linear_attention: most text layers are Gated DeltaNets, which pass a state from token to token and know
            no positions; the others gate the output of their attention.
        tower_width, feature_width: names of the tower's width and of its features' width.
        mlp_width: name of the hidden width of a block's MLP; None: `tower_width` times `mlp_ratio`.
        mlp_products: number of linear layers in a block's MLP, 3 if it is gated.
    """

    processor: str
    video: VideoRule
    has_timed_positions: bool = False
    is_interleaved: bool = False
    has_windows: bool = False
    has_position_table: bool = False
    has_deepstack: bool = False
    has_experts: bool = False
    has_linear_attention: bool = False
    tower_width: str = "hidden_size"
    feature_width: str = "out_hidden_size"
    mlp_width: str | None = "intermediate_size"
    mlp_products: int = 2


_FRAMES = VideoRule(
    processor="Qwen2VLVideoProcessor",
    min_pixels=128 * 28 * 28,
    max_pixels=768 * 28 * 28,
)
_CLIPS = VideoRule(
    processor="Qwen3VLVideoProcessor",
    min_pixels=128 * 32 * 32,
    max_pixels=768 * 32 * 32,
    budgets_clip=True,
    has_timestamps=True,
)
_QWEN3_VL = Family(
    processor="Qwen3VLProcessor",
    video=_CLIPS,
    is_interleaved=True,
    has_position_table=True,
    has_deepstack=True,
)
_QWEN3_5 = replace(_QWEN3_VL, has_deepstack=False, has_linear_attention=True)
FAMILIES = {  # by `model_type` of the config
    "qwen2_vl": Family(
        processor="Qwen2VLProcessor",
        video=_FRAMES,
        tower_width="embed_dim",
        feature_width="hidden_size",
        mlp_width=None,
    ),
    "qwen2_5_vl": Family(
        processor="Qwen2_5_VLProcessor",
        video=_FRAMES,
        has_timed_positions=True,
        has_windows=True,
        mlp_products=3,
    ),
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": replace(_QWEN3_VL, has_experts=True),
    "cosmos3_omni": _QWEN3_VL,  # NVIDIA's Cosmos 3 reasoner, a Qwen3-VL by another name
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": replace(_QWEN3_5, has_experts=True),
}


def family_of_processor(name: str | None) -> Family:
    """The family with this processor class; the first family if the name is None or unknown."""
    named = (family for family in FAMILIES.values() if family.processor == name)
    return next(named, next(iter(FAMILIES.values())))


def video_rule(processor: str) -> VideoRule:
    """The settings of the video processor with this class name.

    Raises:
        ValueError: no family has it; the message lists the supported classes.
    """
    rules = {family.video.processor: family.video for family in FAMILIES.values()}
    if processor not in rules:
        raise ValueError(
            f"the video processor is a {processor}; use one of {', '.join(rules)} (video_processor_type)"
        )
    return rules[processor]
