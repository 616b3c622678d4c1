"""Model folders as Qwen publishes them -> tokenizer, spec and config.

Paths are local (`mmpack.data.model_folder`). The functions import transformers, so that `import mmpack` does not.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mmpack.families import family_of_processor, video_rule
from mmpack.video_spec import BICUBIC
from mmpack.vision_spec import VisionSpec

IMAGE_DEFAULTS: dict[str, Any] = {  # of transformers' `Qwen2VLImageProcessorPil`
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "resample": BICUBIC,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
NO_NETWORK = {"local_files_only": True, "trust_remote_code": False}  # nor code from the folder


def load_processor(folder: str | os.PathLike[str], config: Any = None) -> tuple[Any, VisionSpec]:
    """(tokenizer, VisionSpec) from a local folder; arguments and errors as in `Encoder.from_folder`."""
    tokenizer = load_tokenizer(folder)
    image_processor = image_settings(Path(folder))
    if config is None and (Path(folder) / "config.json").is_file():
        config = load_config(folder)
    video_processor = _video_processor(Path(folder), config)
    return tokenizer, VisionSpec.from_parts(image_processor, tokenizer, video_processor, config)


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer of a folder, with its chat template.

    Raises:
        ValueError: the folder lacks one of them.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **NO_NETWORK)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no Qwen-VL tokenizer: {error}") from None
    if tokenizer.chat_template is None:
        template = Path(folder) / "chat_template.json"  # as in Qwen2-VL's repositories
        if not template.is_file():
            raise ValueError(
                f"{folder} has no chat template; use an Instruct model's folder, or add chat_template.json"
            )
        tokenizer.chat_template = json.loads(template.read_text(encoding="utf-8"))["chat_template"]
    return tokenizer


def image_settings(folder: Path) -> SimpleNamespace:
    """The settings of a folder's image processor, read as transformers' class reads them: importing the class
    takes longer than importing torch.

    Raises:
        ValueError: there are none, or they are not a Qwen-VL image processor's.
    """
    nested, own = folder / "processor_config.json", folder / "preprocessor_config.json"
    try:
        settings = None
        if nested.is_file():
            settings = json.loads(nested.read_text(encoding="utf-8")).get("image_processor")
        if settings is None:
            settings = json.loads(own.read_text(encoding="utf-8"))
        size = dict(settings.get("size") or IMAGE_DEFAULTS["size"])
        edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}  # older names
        size |= {edges[name]: settings[name] for name in edges if settings.get(name) is not None}
        if missing := [name for name in edges.values() if name not in size]:
            raise ValueError(f"size has no {missing[0]}")
    except FileNotFoundError:
        raise ValueError(f"{folder} has no Qwen-VL image processor: no {own.name}") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} has no Qwen-VL image processor: {said}") from None
    return SimpleNamespace(**{**IMAGE_DEFAULTS, **settings, "size": size})


def _video_processor(folder: Path, config: Any) -> SimpleNamespace | None:
    """The settings of a folder's video processor, from the files where transformers looks for them. None for
    Qwen2.5-VL without its config, which defines positions in time."""
    settings: dict[str, Any] = {}
    for name, part in {
        "preprocessor_config.json": None,
        "video_preprocessor_config.json": None,
        "processor_config.json": "video_processor",
    }.items():
        if (folder / name).is_file():
            saved = json.loads((folder / name).read_text(encoding="utf-8"))
            found = saved if part is None else saved.get(part)
            settings = (
                found | {"processor_class": saved.get("processor_class")} if found else settings
            )
    family = family_of_processor(settings.get("processor_class"))
    if config is None and family.has_timed_positions:
        return None
    kind = settings.get("video_processor_type") or family.video.processor
    try:
        rule = video_rule(kind)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    defaults: dict[str, Any] = {
        "size": {"shortest_edge": rule.min_pixels, "longest_edge": rule.max_pixels},
        "min_frames": rule.min_frames,
        "max_frames": rule.max_frames,
    }
    merged = {**defaults, **settings, "video_processor_type": kind}
    edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}  # older names
    given = {edges[name]: merged[name] for name in edges if merged.get(name) is not None}
    size = {**(merged["size"] or defaults["size"]), **given}
    return SimpleNamespace(**{**merged, "size": size})


def load_config(path: str | os.PathLike[str]) -> Any:
    """A model's config from its folder or `config.json`, with transformers' defaults.

    Raises:
        ValueError: there is no config.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, **NO_NETWORK)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} has no model config: {error}") from None
