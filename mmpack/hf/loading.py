"""A folder, a name on the Hugging Face Hub or a config -> the model to train."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, set_seed

from mmpack.data.model_folder import local_path
from mmpack.data.processor_folder import NO_NETWORK, load_config
from mmpack.families import FAMILIES


def load_model(
    model: str | None, config: str | None, seed: int, dtype: str = "float32"
) -> nn.Module:
    """Load a model from a folder or the Hub, or make one with random weights from a config.

    Weights are converted to `dtype`. Models are published in bfloat16, which keeps 8 bits of a weight; at a
    learning rate of 1e-5, nearly every update would be rounded away.

    Args:
        model, config: one of them: a path or a name, see `mmpack.data.model_folder.local_path`.

    Raises:
        ValueError: both or neither are given, there is no such model, or its family is not supported.
    """
    if (model is None) == (config is None):
        raise ValueError("pass --model FOLDER, or --config FILE for random weights")
    path = local_path(str(model or config), weights=model is not None)
    loaded = load_config(path)
    if loaded.model_type not in FAMILIES:
        raise ValueError(
            f"{path} is of model_type {loaded.model_type!r}; supported: {', '.join(FAMILIES)}"
        )
    if model is not None:
        pretrained: nn.Module = AutoModelForImageTextToText.from_pretrained(
            path, dtype=getattr(torch, dtype), **NO_NETWORK
        )
        return pretrained
    set_seed(seed)
    random: nn.Module = AutoModelForImageTextToText.from_config(loaded, dtype=getattr(torch, dtype))
    return random
