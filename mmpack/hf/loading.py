"""Folders as Qwen publishes them -> tokenizer, spec, config and model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLImageProcessorPil,
    set_seed,
)

from mmpack.families import FAMILIES, family_of_processor, video_rule
from mmpack.vision_spec import VisionSpec

_NO_NETWORK = {"local_files_only": True, "trust_remote_code": False}  # nor code of the folder's


def load_processor(
    folder: str | os.PathLike[str],
    max_pixels: int | None = None,
    resizer: str = "pillow",
    config: Any = None,
    video: Mapping[str, Any] | None = None,
) -> tuple[Any, VisionSpec]:
    """(tokenizer, VisionSpec) from a folder as Qwen publishes them; returns what `PackedDataset.from_files`
    and `PackCollator` take for a processor.

    The processors' settings alone are needed, so this works where torchvision, which transformers' own
    processor asks for, is not installed.

    Args:
        folder: with `tokenizer.json`, a chat template and `preprocessor_config.json`.
        max_pixels, resizer: the spec's, over the folder's.
        config: the model's; by default the folder's, where it holds one.
        video: fields of `VideoSpec` over the folder's; None as a value leaves them.

    Raises:
        ValueError: the folder lacks a tokenizer, a chat template or `preprocessor_config.json`.
    """
    tokenizer = load_tokenizer(folder)
    try:
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no Qwen-VL image processor: {error}") from None
    if config is None and (Path(folder) / "config.json").is_file():
        config = load_config(folder)
    video_processor = _video_processor(Path(folder), config)
    vision = VisionSpec.from_parts(image_processor, tokenizer, video_processor, config)
    changes: dict[str, Any] = {"resizer": resizer}
    if max_pixels is not None:
        changes["max_pixels"] = max_pixels
    chosen = {name: value for name, value in (video or {}).items() if value is not None}
    if chosen and vision.video is None:
        raise ValueError(
            f"{folder} is of a Qwen2.5-VL, whose videos need the model's config; pass --config too"
        )
    if chosen and vision.video is not None:
        changes["video"] = replace(vision.video, **chosen)
    return tokenizer, replace(vision, **changes)


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer of a folder, with its chat template.

    Raises:
        ValueError: the folder lacks one of them.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(_local(folder), **_NO_NETWORK)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no Qwen-VL tokenizer: {error}") from None
    if tokenizer.chat_template is None:
        template = Path(folder) / "chat_template.json"  # where Qwen2-VL was published with it
        if not template.is_file():
            raise ValueError(f"{folder} has no chat template")
        tokenizer.chat_template = json.loads(template.read_text(encoding="utf-8"))["chat_template"]
    return tokenizer


def _video_processor(folder: Path, config: Any) -> SimpleNamespace | None:
    """The settings of a folder's video processor, where transformers looks for them. None for Qwen2.5-VL
    without its config, which says what time means."""
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
    defaults = {
        "size": {"shortest_edge": rule.min_pixels, "longest_edge": rule.max_pixels},
        "min_frames": rule.min_frames,
        "max_frames": rule.max_frames,
    }
    merged = {**defaults, **settings, "video_processor_type": kind}
    edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}  # the older names
    given = {edges[name]: merged[name] for name in edges if merged.get(name) is not None}
    return SimpleNamespace(**{**merged, "size": {**merged["size"], **given}})


def load_model(
    model: str | None, config: str | None, seed: int, dtype: str = "float32"
) -> nn.Module:
    """A model from a folder, or with random weights from a config file.

    Its weights are of `dtype`, whatever the folder has: in bfloat16, as models are published, 8 bits of a
    weight's value are kept, and at a learning rate of 1e-5 nearly every update rounds to nothing.
    """
    if (model is None) == (config is None):
        raise ValueError("pass --model FOLDER, or --config FILE for random weights")
    path = str(model or config)
    loaded = load_config(path)
    if loaded.model_type not in FAMILIES:
        raise ValueError(
            f"{path} is of model_type {loaded.model_type!r}; supported: {', '.join(FAMILIES)}"
        )
    if model is not None:
        pretrained: nn.Module = AutoModelForImageTextToText.from_pretrained(
            model, dtype=getattr(torch, dtype)
        )
        return pretrained
    set_seed(seed)
    random: nn.Module = AutoModelForImageTextToText.from_config(loaded, dtype=getattr(torch, dtype))
    return random


def load_config(path: str | os.PathLike[str]) -> Any:
    """A model's config from its folder or `config.json`, with transformers' defaults.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(_local(path), **_NO_NETWORK)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no model config: {error}") from None


def _local(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """A path that is there: transformers asks its hub for any other."""
    if not Path(path).exists():
        raise ValueError("there is no such file or folder here")
    return path
