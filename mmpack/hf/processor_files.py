"""Tokenizer and processor files beside a trained model: the files Qwen publishes, with the budgets trained on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmpack.data.encoder import Encoder
from mmpack.data.model_folder import local_path
from mmpack.data.processor_folder import load_tokenizer
from mmpack.families import family_of_processor
from mmpack.store.manifest import About
from mmpack.vision_spec import VisionSpec

_IMAGE, _VIDEO = "preprocessor_config.json", "video_preprocessor_config.json"
_BOTH = "processor_config.json"  # a newer layout, with both under these keys
_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "chat_template.jinja", _IMAGE, _VIDEO, _BOTH,
)  # fmt: skip


class ProcessorFiles:
    """Passed to Trainer as its `processing_class`, so that the run and every checkpoint contain the files.

    They are copied, not saved by a transformers object: its processor needs torchvision, and a copy loads as the
    original does. Only the pixel budgets, sampling rate and numbers of frames are replaced by those of `vision`.
    In a folder with the older and the newer layout, both get them.

    Args:
        folder: a local folder with tokenizer and processor, read here, at once.
        vision: the settings that the training data was encoded with.
    """

    model_input_names = ("input_ids",)  # Trainer reads the first

    def __init__(self, folder: Path, vision: VisionSpec) -> None:
        found = [folder / name for name in _NAMES if (folder / name).is_file()]
        self._files = {path.name: path.read_bytes() for path in found}
        self._set_budgets(vision)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the files. Trainer calls this on the rank that saves."""
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)

    def _set_budgets(self, vision: VisionSpec) -> None:
        both = self._read(_BOTH)
        own = self._read(_IMAGE)
        is_nested = "image_processor" in both
        image = both["image_processor"] if is_nested else own
        if "video_processor" in both:
            video, place = both["video_processor"], _BOTH
        elif _VIDEO in self._files:
            video, place = self._read(_VIDEO), _VIDEO
        else:  # it was read from the images' file, whose budget is now that of images
            video, place = dict(own or image), _VIDEO
            video.pop("image_processor_type", None)
            if not own and "processor_class" in both:
                video["processor_class"] = both["processor_class"]
        second = self._read(_VIDEO) if place == _BOTH else {}
        for settings in (image, own) if is_nested and own else (image,):  # a folder may have both
            _set_size(settings, vision.min_pixels, vision.max_pixels)
        for settings in (video, second) if second else (video,):
            if vision.video is None:
                break
            kind = family_of_processor(
                video.get("processor_class") or both.get("processor_class")
            ).video.processor
            settings.setdefault("video_processor_type", kind)
            for name in ("fps", "min_frames", "max_frames"):
                settings[name] = getattr(vision.video, name)
            _set_size(settings, vision.video.min_pixels, vision.video.max_pixels)
        if is_nested:
            self._write(_BOTH, both)
        if own or not is_nested:
            self._write(_IMAGE, own)
        self._write(place, both if place == _BOTH else video)
        if second:
            self._write(_VIDEO, second)

    def _read(self, name: str) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(self._files.get(name, b"{}"))
        return settings

    def _write(self, name: str, settings: dict[str, Any]) -> None:
        self._files[name] = f"{json.dumps(settings, indent=2)}\n".encode()


def _set_size(settings: dict[str, Any], low: int, high: int) -> None:
    """Set a processor's pixel budget, under the names that it uses: Qwen2-VL's repositories have older ones."""
    is_old = "min_pixels" in settings or "max_pixels" in settings
    if is_old:
        settings |= {"min_pixels": low, "max_pixels": high}
    if "size" in settings or not is_old:
        settings["size"] = {"shortest_edge": low, "longest_edge": high}


def recorded_files(about: About, vision: VisionSpec) -> tuple[ProcessorFiles | None, str]:
    """(files of the tokenizer that a store was packed with, why there are none). Nothing is downloaded."""
    without = "the run will be saved without tokenizer and processor"
    if about.tokenizer is None:
        return None, f"the store names no tokenizer; {without}"
    try:
        folder = local_path(about.tokenizer, download=False)
    except ValueError:
        return None, f"the tokenizer of the store is not at {about.tokenizer}; {without}"
    before = about.made_from.get("the tokenizer")  # None: `PackedDataset.save` does not know
    encoder = Encoder(load_tokenizer(folder), vision)
    if before is not None and before != encoder.settings()["the tokenizer"]:
        return None, f"{about.tokenizer} is not the tokenizer of the store; {without}"
    return ProcessorFiles(folder, vision), ""
