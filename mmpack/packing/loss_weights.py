"""Weights of a pack's supervised rows: those of its samples, and the reduction of the loss.

The loss of an optimizer step is the sum of weight * cross entropy over its rows, divided by the sum of the
weights. `mmpack.reference.loss_weights` is the specification.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from mmpack.data.path_patterns import without_number
from mmpack.data.row_weights import RANGE, is_weight
from mmpack.errors import is_number
from mmpack.types import IGNORE, EncodedSample, Float32

MIX_MARK = "::"  # between a source's name in a mixture and a sample's file
LossReduction = Literal["token", "sample", "sqrt"]


def check_reduction(reduction: Any) -> None:
    """
    Raises:
        ValueError: it is not a `LossReduction`.
    """
    if reduction not in get_args(LossReduction):
        raise ValueError(
            f"--loss-reduction (loss_reduction) must be 'token', 'sample' or 'sqrt', got {reduction!r}"
        )


def loss_weights(samples: Sequence[EncodedSample], reduction: LossReduction) -> Float32 | None:
    """The weights of a pack's supervised rows.

    Args:
        reduction: "token": every token counts once. "sample": every sample does, so its tokens are multiplied by 1
            / its number of supervised tokens. "sqrt": by 1 / the square root of that number (InternVL's square
            averaging). A split document is one sample.

    Returns:
        (L,) float32, rounded once from float64; None: every row counts once.

    Raises:
        ValueError: a supervised token has a weight that is not a positive number; the message gives file and row.
    """
    if reduction == "token" and all(sample.weights is None for sample in samples):
        return None
    parts = []
    for sample in samples:
        vision, ids = sample.vision, sample.input_ids
        is_row = sample.labels != IGNORE
        is_row &= (ids != vision.image_token_id) & (ids != vision.video_token_id)
        is_row[:1] = False
        num_rows = int(is_row.sum())
        part = np.ones(num_rows)
        if sample.weights is not None:
            part *= sample.weights[is_row]
            if not ((part > 0) & np.isfinite(part)).all():
                bad = part[~((part > 0) & np.isfinite(part))][0]
                raise ValueError(
                    f"row {sample.row} of {sample.source}: a token's weight is {bad:g}; weights must be positive "
                    "numbers, and a token without loss has the label -100"
                )
        if reduction != "token" and num_rows:
            num_rows = sample.of_document or num_rows
            part /= num_rows if reduction == "sample" else np.sqrt(num_rows)
        parts.append(part)
    return np.concatenate(parts).astype(np.float32)


def source_name(file: str) -> str:
    """The source of a data file: its name, without the number of a shard; in a mixture, the name of the source
    there."""
    mixed, mark, _ = file.partition(MIX_MARK)
    if mark:
        return mixed
    return without_number(file)


def with_weight(sample: EncodedSample, weight: float) -> EncodedSample:
    """The sample with its tokens' weights multiplied by a number."""
    own = np.ones(len(sample.input_ids)) if sample.weights is None else sample.weights
    return replace(sample, weights=(own * weight).astype(np.float32))


def check_source_weights(weights: Mapping[str, float], sources: Iterable[str] | None) -> None:
    """
    Args:
        sources: the names of the data's files; None: not known.

    Raises:
        ValueError: a weight is not a positive number, none of the samples are of its source, or all would have the
            same weight.
    """
    for name, weight in weights.items():
        if not is_number(weight) or not is_weight(weight):
            raise ValueError(
                f"--source-weight (source_weights) of {name!r} is {weight!r}, not a number {RANGE}; to leave a "
                "source out, leave its files out of the data"
            )
    known = sorted(set(map(source_name, set(sources)))) if weights and sources is not None else []
    for name in weights:
        if known and name not in known:
            raise ValueError(
                f"--source-weight (source_weights) names {name!r}, but the data's sources are "
                f"{', '.join(map(repr, known[:12]))}{', ...' if len(known) > 12 else ''}; use one of these names"
            )
    if known and len({weights.get(name, 1) for name in known}) == 1:
        raise ValueError(
            f"--source-weight (source_weights) gives every source of the data ({len(known)}) one weight, which "
            "changes nothing; leave it out, or give sources different weights"
        )
