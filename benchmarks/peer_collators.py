"""Collators of other packages: rows to a batch, decoding and processing, then padding or joining."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmpack.packing.assemble import assemble
from mmpack.types import EncodedSample, Sample
from mmpack.vision_spec import VisionSpec


def processor_of(tokenizer: Any, spec: VisionSpec) -> Any:
    """transformers' Qwen2-VL processor with Pillow, without its video part, which needs torchvision."""
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
    """A conversation in the form of transformers' chat templates."""
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
    """As in the training script of transformers' documentation: chat template, processor, padding, labels without
    padding and images."""
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
    """`MultiModalDataCollatorForSeq2Seq`, on tokenized rows and the paths of their images."""
    os.environ.setdefault("DISABLE_VERSION_CHECK", "1")
    audio = types.ModuleType("torchaudio")  # imported, but not used for images
    audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules.setdefault("torchaudio", audio)
    from llamafactory.data.collator import MultiModalDataCollatorForSeq2Seq
    from llamafactory.data.template import TEMPLATES

    processor.video_processor = processor.image_processor  # required, but not used either
    # Disable its own resize before the processor's, which would give other grids than ours.
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
            alone = assemble(
                [sample], pixels=False
            )  # the output of its preprocessing: expanded ids
            features.append(
                {
                    "input_ids": alone.input_ids.tolist(),
                    "attention_mask": np.ones_like(alone.input_ids).tolist(),
                    "labels": alone.labels.tolist(),
                    "images": [image.path for image in sample.media] or None,
                }
            )
        return collate(features)

    return collate_rows


Row = dict[str, torch.Tensor]


def veomni_alone() -> None:
    """Import VeOmni's data modules without running its `__init__` files, whose kernels need one version of
    transformers and other packages; parts for videos and URLs are replaced by stand-ins."""
    if "veomni" in sys.modules:
        return
    for name in ("veomni", "veomni.data", "veomni.ops"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
    videos: Any = types.ModuleType("veomni.data.multimodal.video_utils")
    # Imported by the image modules, but not called for images.
    videos.fetch_videos = videos.fetch_videos_metadata = None
    sys.modules[videos.__name__] = videos
    sys.modules.setdefault("requests", types.ModuleType("requests"))


def veomni_pack(
    model: Any,
) -> Callable[[Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]], Row]:
    """A packed row of expanded samples (input_ids, labels, image_grid_thw): the part of `process_sample_qwen_vl`
    that handles ids, then `MainCollator`, without the hook that lists the tower's segments."""
    veomni_alone()
    from veomni.data.data_collator import MainCollator

    collate, image_token = MainCollator(), model.config.image_token_id

    def pack(samples: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Row:
        rows = []
        for ids, labels, grids in samples:
            ids, mask = ids.to(torch.long, copy=True), torch.ones(len(ids), dtype=torch.long)
            row = {
                "attention_mask": mask,
                "labels": labels.long(),
                "image_mask": ids == image_token,
            }
            row["video_mask"] = ids == model.config.video_token_id
            types_of = torch.zeros_like(ids)
            types_of[row["image_mask"]] = 1
            types_of[row["video_mask"]] = 2
            asked = {"input_ids": ids[None], "attention_mask": mask[None]}
            asked |= {"mm_token_type_ids": types_of[None], "video_grid_thw": None}
            asked["image_grid_thw"] = grids if len(grids) else None
            row["position_ids"] = model.get_rope_index(**asked)[0].squeeze().clone()
            ids[row["image_mask"]] = 0
            ids[row["video_mask"]] = 0
            row |= {"input_ids": ids, "mm_token_type_ids": types_of}
            rows.append(row | ({"image_grid_thw": grids} if len(grids) else {}))
        return collate(rows)

    return pack


def veomni_collator(processor: Any, model: Any) -> Callable[[Sequence[Sample]], Row]:
    """Rows to a packed row: `process_sample_qwen_vl` on each, then `MainCollator`. The only peer here that packs
    images. The caller chooses the rows; VeOmni's own loader fills packs as it reads. Its template adds a second
    system message to a row that has one."""
    veomni_alone()
    from veomni.data.chat_template import Qwen2VLChatTemplate
    from veomni.data.data_collator import MainCollator
    from veomni.data.data_transform import process_sample_qwen_vl
    from veomni.data.multimodal import PREPROCESSOR_REGISTRY

    def parts_of(messages: Any, **_: Any) -> list[list[Any]]:
        """A template that keeps all images; its built-in ones keep one image per message."""
        return [
            [m.role, *(("text", p) if isinstance(p, str) else ("image", None) for p in m.content)]
            for m in messages
        ]

    def positions(**row: Any) -> Row:
        """The result of the model's `get_position_id_func`."""
        return {"position_ids": model.model.get_rope_index(**row)[0].squeeze(1)}

    PREPROCESSOR_REGISTRY.register("samples", parts_of)
    template, collate = Qwen2VLChatTemplate(processor), MainCollator()
    known = {"processor": processor, "chat_template": template, "source_name": "samples"}
    known["position_id_func"] = positions

    def collate_rows(samples: Sequence[Sample]) -> Row:
        rows: list[Row] = []
        for sample in samples:
            row = {"conversations": sample.messages, "images": [i.path for i in sample.images]}
            rows += process_sample_qwen_vl(row, **known)
        return collate(rows)

    return collate_rows
