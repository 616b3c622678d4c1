"""What the packs of a data set are made of, in numbers, for resuming."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from mmpack.packing.mixed_samples import MixedSamples
from mmpack.packing.split_documents import SplitSamples
from mmpack.store.row_checksum import contents_checksum
from mmpack.types import PackPlan


def fingerprint_of(
    samples: Any, plan: PackPlan, source_weights: Mapping[str, float]
) -> dict[str, Any]:
    """`PackedDataset.fingerprint` of these samples and this plan."""
    vision = json.loads(json.dumps(asdict(samples[0].vision))) if len(samples) else {}
    return {
        "capacity": plan.capacity,
        "patch capacity": plan.patch_capacity,
        "seed of the plan": plan.seed,
        "samples": len(samples),
        "packs": plan.num_packs,
        "checksum of their sizes": checksum(plan.num_tokens, plan.num_patches),
        "checksum of their costs": checksum(plan.cost),
        "source weights": dict(source_weights),
        **_contents(samples),
        **{f"the spec's {name}": value for name, value in vision.items()},
        "checksum of the plan": checksum(
            plan.sample_index, plan.bin_offsets, plan.truncated, plan.unit
        ),
    }


def _contents(samples: Any) -> dict[str, Any]:
    """Checksums of the samples' contents; those of a mixture are with its sources."""
    if isinstance(samples, MixedSamples):
        return {}
    if isinstance(samples, SplitSamples):
        cuts = checksum(samples.sample_of, samples.bounds)
        return {**_contents(samples.samples), "checksum of their cuts": cuts}
    known = getattr(samples, "contents", None)  # of a store
    return {"checksum of the samples": contents_checksum(samples) if known is None else known}


def checksum(*arrays: Any) -> int:
    total = 0
    for array in arrays:
        total = zlib.crc32(b"" if array is None else np.ascontiguousarray(array).tobytes(), total)
    return total
