"""mmpack: token packing for training vision-language models of the Qwen2-VL family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from mmpack import _native as _native
except ImportError as error:
    raise ImportError(
        "mmpack's C++ core is not built; run: pip install --no-build-isolation --no-deps -e ."
    ) from error

from mmpack.assemble import assemble
from mmpack.encode import encode_sample
from mmpack.plan import plan_packs
from mmpack.prompt import render_prompt
from mmpack.readers import read_samples
from mmpack.types import CompactPack, EncodedSample, Pack, PackPlan, Sample
from mmpack.video_spec import VideoSpec
from mmpack.vision import VisionSpec

if TYPE_CHECKING:
    from mmpack.dataset import PackedDataset
    from mmpack.stream import PackStream

__all__ = [
    "CompactPack",
    "EncodedSample",
    "Pack",
    "PackPlan",
    "PackStream",
    "PackedDataset",
    "Sample",
    "VideoSpec",
    "VisionSpec",
    "assemble",
    "encode_sample",
    "plan_packs",
    "read_samples",
    "render_prompt",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "PackedDataset":  # these two need torch
        from mmpack.dataset import PackedDataset

        return PackedDataset
    if name == "PackStream":
        from mmpack.stream import PackStream

        return PackStream
    raise AttributeError(f"module 'mmpack' has no attribute {name!r}")
