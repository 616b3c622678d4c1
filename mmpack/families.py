"""The model families, one record each. A new family is an entry here and the code for what is new in it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class VideoRule:
    """What a family's video processor does; defaults of its class in transformers, whose file cannot be
    imported without torchvision.

    Attributes:
        processor: the name of the class.
        min_pixels, max_pixels: a frame's area; with `budgets_clip` the area of all sampled frames together.
        min_frames, max_frames: of a sampled video.
        budgets_clip: the budget is the whole clip's, and frames are spread from the first to the last.
        has_timestamps: a video's temporal patches are runs of placeholders of their own, behind their
            times.
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
    """What one family is to mmpack; names are those of its config's `vision_config`.

    Attributes:
        processor: the name of its processor's class, which its folders have as `processor_class`.
        video: what its video processor does.
        has_timed_positions: a video's M-RoPE positions follow its seconds (`tokens_per_second`).
        is_interleaved: in rotary frequencies t, h and w alternate; else they are three sections.
        has_windows: most of the tower's blocks attend within windows, and its features come out window by
            window.
        has_position_table: the tower adds learned positions, interpolated to each image's grid.
        has_deepstack: features of inner blocks are added after the first text layers.
        has_experts: text tokens are routed to experts, whose products are as long as their tokens.
        tower_width, feature_width: names of the width of the tower, and of its features.
        mlp_width: the name of the width inside a block's MLP; None: `tower_width` times `mlp_ratio`.
        mlp_products: linear layers of a block's MLP, 3 if it is gated.
    """

    processor: str
    video: VideoRule
    has_timed_positions: bool = False
    is_interleaved: bool = False
    has_windows: bool = False
    has_position_table: bool = False
    has_deepstack: bool = False
    has_experts: bool = False
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
}


def family_of_processor(name: str | None) -> Family:
    """The family whose processor's class has that name; of folders that name none, the first family's."""
    named = (family for family in FAMILIES.values() if family.processor == name)
    return next(named, next(iter(FAMILIES.values())))


def video_rule(processor: str) -> VideoRule:
    """What the video processor whose class has that name does.

    Raises:
        ValueError: no family has it; lists those there are.
    """
    rules = {family.video.processor: family.video for family in FAMILIES.values()}
    if processor not in rules:
        raise ValueError(f"the video processor is a {processor}; read are {', '.join(rules)}")
    return rules[processor]
