"""mmpack: token packing for training vision-language models of the Qwen2-VL family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from mmpack import _native as _native
except ImportError as error:
    raise ImportError(
        "mmpack's C++ core is not built; run: pip install --no-build-isolation --no-deps -e ."
    ) from error

from mmpack.boxes import relative_boxes, resized_boxes
from mmpack.data.encoder import Encoder
from mmpack.data.readers import Reader
from mmpack.errors import BadRow, RowError, Skip
from mmpack.media_options import MediaOptions
from mmpack.packing.assemble import assemble
from mmpack.packing.context_group import ContextGroup
from mmpack.packing.cost import costs_of
from mmpack.packing.pack_stats import busiest, cost_floor, rank_imbalance
from mmpack.packing.plan import plan_packs
from mmpack.packing.prompt import render_prompt
from mmpack.types import (
    EncodedSample,
    ImageRef,
    Message,
    Pack,
    PackPlan,
    Sample,
    VideoRef,
)
from mmpack.video_spec import VideoSpec
from mmpack.vision_spec import VisionSpec

if TYPE_CHECKING:
    from mmpack.packing.dataset import PackedDataset
    from mmpack.packing.stream import PackStream

__all__ = [
    "BadRow",
    "ContextGroup",
    "EncodedSample",
    "Encoder",
    "ImageRef",
    "MediaOptions",
    "Message",
    "Pack",
    "PackPlan",
    "PackStream",
    "PackedDataset",
    "Reader",
    "RowError",
    "Sample",
    "Skip",
    "VideoRef",
    "VideoSpec",
    "VisionSpec",
    "assemble",
    "busiest",
    "cost_floor",
    "costs_of",
    "plan_packs",
    "rank_imbalance",
    "relative_boxes",
    "render_prompt",
    "resized_boxes",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "PackedDataset":  # these two need torch
        from mmpack.packing.dataset import PackedDataset

        return PackedDataset
    if name == "PackStream":
        from mmpack.packing.stream import PackStream

        return PackStream
    raise AttributeError(f"module 'mmpack' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
