"""Checks that data fits a model: range of token ids, special ids, patch sizes, normalization.

On the host, from integers in the batch: with ids out of range, a kernel would access memory behind the table, and
torch on a GPU would abort with an assertion that does not name the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmpack.hf.compat import folder_of, whole_rows
from mmpack.packing.dataset import PackedDataset
from mmpack.types import EncodedSample
from mmpack.vision_spec import VisionSpec

_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_PATCHES = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")


def facts_of_data(vision: VisionSpec, has_pixels: bool = True) -> dict[str, Any]:
    """What data was encoded with, by the names in `VisionSpec`; for text without images, only the special ids."""
    names = (*_IDS, *_PATCHES) if has_pixels else _IDS
    return {name: getattr(vision, name) for name in names}


def facts_of_model(config: Any) -> dict[str, Any]:
    """The same facts from a model's config and, if the model was loaded from a folder, its image processor's
    normalization. None: unknown."""
    tower, folder = config.vision_config, folder_of(config)
    mean, std = _normalization(folder) if folder else (None, None)
    return {
        **{name: getattr(config, name, None) for name in _IDS},
        "patch_size": tower.patch_size,
        "merge_size": tower.spatial_merge_size,
        "temporal_patch_size": tower.temporal_patch_size,
        "image_mean": mean,
        "image_std": std,
    }


def _normalization(folder: str) -> tuple[Any, Any]:
    """(mean, standard deviation) of the image processor in a folder; None: unknown."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            saved = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
            found = saved.get("image_processor", saved)
            return tuple(found["image_mean"]), tuple(found["image_std"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None, None


def num_ids(base: Any) -> int:
    """The number of rows in an inner model's token embedding, also if it is sharded."""
    embedding = base.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None:  # wrapped
        rows = whole_rows(embedding.weight)
    return int(rows)


def check_facts(model: dict[str, Any], data: dict[str, Any]) -> None:
    """Refuse to train a model on data encoded for another one.

    Args:
        model, data: results of `facts_of_model` and `facts_of_data`.

    Raises:
        ValueError: a special id, a patch size or the normalization differs; names both values.
    """
    for name, of_data in data.items():
        if model[name] is not None and model[name] != of_data:
            raise ValueError(
                f"the model has {name} {model[name]}, but the data was packed with {of_data}; pack it with "
                "this model's tokenizer and processor"
            )


def check_ids(rows: int, ids: tuple[int, int], samples: Iterable[EncodedSample] = ()) -> None:
    """Refuse token ids that the model's embedding has no row for.

    Args:
        rows: number of rows in the embedding.
        ids: (smallest, largest), including supervised labels.
        samples: those with the ids, to name one in the error.

    Raises:
        ValueError: an id is out of range; names it and its row.
    """
    smallest, largest = ids
    if 0 <= smallest and largest < rows:
        return
    wrong = smallest if smallest < 0 else largest
    advice = "encode it with this model's tokenizer"
    if wrong > 0:
        advice += f", or enlarge the embedding: model.resize_token_embeddings({wrong + 1})"
    raise ValueError(
        f"{_row_outside(samples, rows)} has token id {wrong}, but the model's embedding has {rows} rows; {advice}"
    )


def check_fit(base: Any, dataset: PackedDataset) -> None:
    """Check a whole data set before training.

    Raises:
        ValueError: the data was encoded for another model; names file and row of an id out of range.
    """
    check_facts(facts_of_model(base.config), facts_of_data(dataset.vision))
    ids = dataset.id_range()
    if ids is not None:
        check_ids(num_ids(base), ids, dataset.samples)


def _row_outside(samples: Iterable[EncodedSample], rows: int) -> str:
    """The first sample with an id out of range, in words."""
    for sample in samples:
        smallest, largest = sample.id_range
        if smallest < 0 or largest >= rows:
            return f"row {sample.row} of {sample.source}"
    return "the batch"
