"""What `mmpack pack` and `mmpack train` need of transformers: load, check that it fits, train."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    HfArgumentParser,
    Qwen2VLImageProcessorPil,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mmpack.dataset import PackedDataset
from mmpack.hf.callbacks import PackingCallback
from mmpack.hf.collator import PackCollator
from mmpack.hf.models import patch_model
from mmpack.vision import VisionSpec


def load_processor(
    folder: str | os.PathLike[str], max_pixels: int | None = None, resizer: str = "pillow"
) -> tuple[Any, VisionSpec]:
    """(tokenizer, VisionSpec) from a folder as Qwen publishes them.

    The image processor's settings alone are needed, so this works where torchvision, which
    transformers' own processor asks for, is not installed.

    Raises:
        ValueError: the folder lacks a tokenizer, a chat template or `preprocessor_config.json`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no Qwen-VL tokenizer and image processor: {error}"
        ) from None
    if tokenizer.chat_template is None:
        template = Path(folder) / "chat_template.json"  # where Qwen2-VL was published with it
        if not template.is_file():
            raise ValueError(f"{folder} has no chat template")
        tokenizer.chat_template = json.loads(template.read_text(encoding="utf-8"))["chat_template"]
    vision = replace(VisionSpec.from_parts(image_processor, tokenizer), resizer=resizer)
    return tokenizer, vision if max_pixels is None else replace(vision, max_pixels=max_pixels)


def load_model(model: str | None, config: str | None, seed: int) -> nn.Module:
    """A model from a folder, or with random weights from a config file."""
    if (model is None) == (config is None):
        raise ValueError("pass --model FOLDER, or --config FILE for random weights")
    if model is not None:
        return AutoModelForImageTextToText.from_pretrained(model)
    set_seed(seed)
    return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(config))


def load_config(path: str | os.PathLike[str]) -> Any:
    """A model's config from its folder or `config.json`, with transformers' defaults.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no model config: {error}") from None


def check_fit(model: nn.Module, vision: VisionSpec) -> None:
    """Refuse to train a model on data encoded for another one.

    Raises:
        ValueError: a token id, the patch or the merge size differs; names both values.
    """
    config = model.config
    tower = config.vision_config
    pairs = {
        "image_token_id": (config.image_token_id, vision.image_token_id),
        "vision_start_token_id": (config.vision_start_token_id, vision.vision_start_token_id),
        "patch_size": (tower.patch_size, vision.patch_size),
        "merge_size": (tower.spatial_merge_size, vision.merge_size),
        "temporal_patch_size": (tower.temporal_patch_size, vision.temporal_patch_size),
    }
    for name, (of_model, of_data) in pairs.items():
        if of_model != of_data:
            raise ValueError(
                f"the model has {name} {of_model}, the data was packed with {of_data}; pack it with "
                "the tokenizer and processor of this model"
            )


def parse_training_arguments(options: Sequence[str]) -> TrainingArguments:
    """`TrainingArguments` from command line options; every option of transformers works.

    One pack a step is the default, as a pack is a full batch already.
    """
    defaults = ["--per_device_train_batch_size", "1", "--logging_steps", "1", "--report_to", "none"]
    if not any(option.startswith(("--output_dir", "--output-dir")) for option in options):
        defaults += ["--output_dir", "mmpack-output"]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([*defaults, *options])
    return args


def train(model: nn.Module, dataset: PackedDataset, args: TrainingArguments) -> dict[str, Any]:
    """Patch the model, train it on the packs in a stock Trainer and save it.

    Returns:
        `steps`, `first_loss`, `last_loss`, `seconds`.
    """
    check_fit(model, dataset.vision)
    patch_model(model)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=PackCollator(model=model),
        callbacks=[PackingCallback(dataset)],
    )
    output = trainer.train()
    if args.save_strategy != "no":
        trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": output.global_step,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "seconds": round(output.metrics["train_runtime"], 3),
    }
