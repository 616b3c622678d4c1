"""Rows to a batch as others do it: decoding, processing and padding in the collator."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmpack.assemble import assemble
from mmpack.types import EncodedSample, Sample
from mmpack.vision import VisionSpec


def processor_of(tokenizer: Any, spec: VisionSpec) -> Any:
    """transformers' Qwen2-VL processor by Pillow; its video half needs torchvision and is left out."""
    import transformers

    class WithoutVideo(transformers.Qwen2VLProcessor):
        def check_argument_for_proper_class(self, name, argument):
            if name == "video_processor" and argument is None:
                return type(None)
            return super().check_argument_for_proper_class(name, argument)

    WithoutVideo.__name__ = "Qwen2VLProcessor"
    return WithoutVideo(
        image_processor=transformers.Qwen2VLImageProcessorPil(
            size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}
        ),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=tokenizer.chat_template,
    )


def chat_of(sample: Sample) -> list[dict[str, Any]]:
    """A conversation as transformers' chat templates take it."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in message.content
            ],
        }
        for message in sample.messages
    ]


def transformers_collator(processor: Any) -> Callable[[Sequence[Sample]], dict[str, Any]]:
    """The training script of transformers' documentation: chat template, processor, padding, labels
    without padding and images."""
    tokenizer = processor.tokenizer
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        texts, pictures = [], []
        for sample in samples:
            texts.append(processor.apply_chat_template(chat_of(sample), tokenize=False))
            pictures += [Image.open(image.path) for image in sample.images]
        batch = processor(text=texts, images=pictures or None, padding=True, return_tensors="pt")
        labels = batch["input_ids"].clone()
        labels[(labels == tokenizer.pad_token_id) | (labels == image_token)] = -100
        return {**batch, "labels": labels}

    return collate


def llamafactory_collator(
    processor: Any, model: Any
) -> Callable[[Sequence[EncodedSample]], dict[str, Any]]:
    """`MultiModalDataCollatorForSeq2Seq`, which gets tokenised rows and the paths of their images."""
    os.environ.setdefault("DISABLE_VERSION_CHECK", "1")
    audio = types.ModuleType("torchaudio")  # it is imported, and not used for images
    audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules.setdefault("torchaudio", audio)
    from llamafactory.data.collator import MultiModalDataCollatorForSeq2Seq
    from llamafactory.data.template import TEMPLATES

    processor.video_processor = processor.image_processor  # it is asked for, and not used either
    # It would resize by itself before the processor does, to other grids than ours: left out.
    pixels = {"image_max_pixels": 1 << 40, "image_min_pixels": 1}
    for name, value in {**pixels, "crop_to_patches": False, "image_do_pan_and_scan": False}.items():
        setattr(processor, name, value)
    collate = MultiModalDataCollatorForSeq2Seq(
        tokenizer=processor.tokenizer,
        model=model,
        template=TEMPLATES["qwen2_vl"],
        processor=processor,
        pad_to_multiple_of=8,
        label_pad_token_id=-100,
    )

    def collate_rows(samples: Sequence[EncodedSample]) -> dict[str, Any]:
        features = []
        for sample in samples:
            alone = assemble([sample], pixels=False)  # what its preprocessing leaves: ids, expanded
            features.append(
                {
                    "input_ids": alone.input_ids.tolist(),
                    "attention_mask": np.ones_like(alone.input_ids).tolist(),
                    "labels": alone.labels.tolist(),
                    "images": [image.path for image in sample.images] or None,
                }
            )
        return collate(features)

    return collate_rows
