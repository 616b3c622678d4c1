"""A folder or a config -> the model to train."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, set_seed

from mmpack.data.processor_folder import load_config
from mmpack.families import FAMILIES


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
