"""`mmpack.json`, a store's manifest: the `VisionSpec` of its samples and what they were made from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmpack.store.records import check_record, damaged, read_json, write_record
from mmpack.video_spec import VideoSpec
from mmpack.vision_spec import VisionSpec

FORMAT = 6
_POSITIVE, _ID = range(1, 1 << 31), range(1 << 31)
_VIDEO = {
    "min_pixels": range(1, 1 << 63),
    "max_pixels": range(1, 1 << 63),
    "fps": float,
    "min_frames": _POSITIVE,
    "max_frames": _POSITIVE,
    "budgets_clip": bool,
    "tokens_per_second": (None, float),
    "has_timestamps": bool,
}
_VISION = {
    "min_pixels": range(1, 1 << 63),
    "max_pixels": range(1, 1 << 63),
    "patch_size": _POSITIVE,
    "merge_size": _POSITIVE,
    "temporal_patch_size": _POSITIVE,
    "image_mean": [float],
    "image_std": [float],
    "resizer": str,
    "video": (None, _VIDEO),
    "image_token_id": _ID,
    "video_token_id": _ID,
    "vision_start_token_id": _ID,
    "vision_end_token_id": _ID,
}
# What we write into "about"; who writes a store of their own may leave it out, or add to it.
_ABOUT = {
    "begun?": int,  # time.time_ns()
    "files?": {str: [int, int, str]},  # bytes, time of change in ns, SHA-256
    "made from?": {str: str},
    "media folders?": [str],
    "part?": str,
    "chunks?": [[range(2), range(1 << 31)]],  # whether there are samples, and how many bad rows
    "tokenizer?": str,
    "capacity?": range(1, 1 << 63),
    "patch_capacity?": (None, range(1, 1 << 63)),
    "max_image_share?": (None, float),
    "on_overflow?": str,
    "plan_seed?": range(1 << 64),
    "config?": (None, str),
    "frozen?": [str],
    ...: None,
}
_RECORD = {
    "format": int,
    "vision": _VISION,
    "about": _ABOUT,
    "checksum": range(1 << 32),
    "id range": (None, [int, int]),  # the smallest and the largest token id
}


def write_manifest(
    folder: Path,
    vision: VisionSpec,
    about: dict[str, Any],
    checksum: int,
    id_range: tuple[int, int] | None,
) -> None:
    """Write it; `checksum` is that of all of `samples.arrow`, `id_range` of the token ids in it."""
    saved = {"format": FORMAT, "vision": asdict(vision), "about": about, "checksum": checksum}
    saved["id range"] = id_range
    write_record(folder / "mmpack.json", saved)


def read_manifest(folder: Path) -> tuple[VisionSpec, dict[str, Any]]:
    """(spec, what `write_manifest` wrote).

    Raises:
        ValueError: there is none, one of another format, or one that is damaged or does not fit the schema.
    """
    path = folder / "mmpack.json"
    try:
        saved = read_json(path)
    except (OSError, ValueError) as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error})"
        raise ValueError(
            f"{folder} holds no finished store; make one with mmpack pack{reason}"
        ) from None
    if not isinstance(saved, dict) or "format" not in saved:
        raise ValueError(f"{path} is not mmpack's; make a store with mmpack pack")
    if saved["format"] != FORMAT:
        raise ValueError(
            f"{folder} has store format {saved['format']!a:.20}, not {FORMAT}; pack again with "
            "--overwrite"
        )
    saved = check_record(path, saved, _RECORD)
    try:
        vision = _vision_of(saved["vision"])
    except ValueError as error:
        raise damaged(path, error) from None
    return vision, saved


def _vision_of(saved: dict[str, Any]) -> VisionSpec:
    """A spec from its fields, of which the schema has been looked at.

    Raises:
        ValueError: they make no sense together.
    """
    vision: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()
    }
    if vision["video"] is not None:
        vision["video"] = VideoSpec(**vision["video"])
    spec = VisionSpec(**vision)
    if not len(spec.image_mean) == len(spec.image_std) > 0 or 0 in spec.image_std:
        raise ValueError("image_mean and image_std are no normalisation of channels")
    return spec
