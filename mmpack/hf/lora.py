"""LoRA for `mmpack train`: adapters on the linear layers of the text model, by PEFT."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn
from transformers import set_seed

from mmpack.data.model_folder import local_path, pinned
from mmpack.hf.model_parts import inner_model

# Parts whose weights LoRA leaves as they are. The text model is "trained", through adapters.
FROZEN = ("vision", "merger")


def add_lora(model: nn.Module, rank: int, name: str, seed: int) -> nn.Module:
    """The model with LoRA adapters of this rank, everything else frozen.

    Adapted are all `nn.Linear` layers in the text model's layers: projections of attention, of Gated DeltaNets and
    of MLPs. Not adapted: the vision tower, the merger, embeddings, the head, and the experts and routers of MoE
    layers, which are not linear modules. `lora_alpha` is twice the rank; there is no dropout.

    Args:
        name: what the model was loaded from, which the adapter's config records: an absolute path, or a name on
            the Hugging Face Hub with its commit.
        seed: determines the adapters' first values, on every rank alike.

    Raises:
        ValueError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ValueError(
            "--lora-rank needs peft, which is not installed; pip install peft"
        ) from None
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_targets(model))
    set_seed(seed)
    adapted: nn.Module = get_peft_model(model, config)
    source = pinned(name)
    if source.startswith("hf:"):
        config.base_model_name_or_path, _, config.revision = source[3:].partition("@")
    else:
        config.base_model_name_or_path = str(Path(local_path(name)).resolve())
    return adapted


def _targets(model: nn.Module) -> str:
    """A regular expression for the names of the adapted layers."""
    layers = inner_model(model).language_model.layers
    names = {
        name.rpartition(".")[2]
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear)
    }
    return rf"(.*\.)?language_model\.layers\.\d+\..*\.({'|'.join(map(re.escape, sorted(names)))})"
