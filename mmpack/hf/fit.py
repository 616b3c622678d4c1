"""Whether data fits a model: token ids inside its table, its special ids, its patches, its normalisation.

All on the host, of integers that come with a batch: a kernel would read and write the memory behind the
table, and torch on a GPU would end the process with an assertion that names nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmpack.hf.compat import folder_of, whole_rows
from mmpack.packing.dataset import PackedDataset, id_range_of
from mmpack.types import EncodedSample
from mmpack.vision_spec import VisionSpec

_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_PATCHES = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")


def facts_of_data(vision: VisionSpec, has_pixels: bool = True) -> dict[str, Any]:
    """What data was encoded with, by a `VisionSpec`'s names; of text alone the special ids."""
    names = (*_IDS, *_PATCHES) if has_pixels else _IDS
    return {name: getattr(vision, name) for name in names}


def facts_of_model(config: Any) -> dict[str, Any]:
    """The same as a model's config says it, and where the model came from a folder, its image processor;
    None is not said."""
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
    """(mean, standard deviation) of the image processor in a folder, None where it says nothing."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            saved = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
            found = saved.get("image_processor", saved)
            return tuple(found["image_mean"]), tuple(found["image_std"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None, None


def num_ids(base: Any) -> int:
    """Rows of an inner model's token embedding, whole where ranks hold parts of it."""
    embedding = base.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None:  # a wrapper's
        rows = whole_rows(embedding.weight)
    return int(rows)


def check_facts(model: dict[str, Any], data: dict[str, Any]) -> None:
    """Refuse to train a model on data encoded for another one.

    Args:
        model, data: what `facts_of_model` and `facts_of_data` gave.

    Raises:
        ValueError: a special id, a patch size or the normalisation differs; names both values.
    """
    for name, of_data in data.items():
        if model[name] is not None and model[name] != of_data:
            raise ValueError(
                f"the model has {name} {model[name]}, the data was packed with {of_data}; pack it with "
                "the tokenizer and processor of this model"
            )


def check_ids(rows: int, ids: tuple[int, int], samples: Iterable[EncodedSample] = ()) -> None:
    """Refuse token ids that the model's table has no row for.

    Args:
        rows: of the table.
        ids: (smallest, largest), labels that count among them.
        samples: which have them, to name one in the error.

    Raises:
        ValueError: one is outside; names it.
    """
    smallest, largest = ids
    if 0 <= smallest and largest < rows:
        return
    wrong = smallest if smallest < 0 else largest
    advice = "encode it with the tokenizer of this model"
    if wrong > 0:
        advice += f", or give the model the tokenizer's tokens: model.resize_token_embeddings({wrong + 1})"
    raise ValueError(
        f"{_row_outside(samples, rows)} has the token id {wrong}, the model's table has {rows} rows; {advice}"
    )


def check_fit(base: Any, dataset: PackedDataset) -> None:
    """Both checks before training, of a whole data set.

    Raises:
        ValueError: the data is of another model; names file and row of an id that is outside.
    """
    check_facts(facts_of_model(base.config), facts_of_data(dataset.vision))
    ids = dataset.id_range()
    if ids is not None:
        check_ids(num_ids(base), ids, dataset.samples)


def _row_outside(samples: Iterable[EncodedSample], rows: int) -> str:
    """The first sample with an id the table has no row for, in words."""
    for sample in samples:
        smallest, largest = id_range_of(sample)
        if smallest < 0 or largest >= rows:
            return f"row {sample.row} of {sample.source}"
    return "the batch"
