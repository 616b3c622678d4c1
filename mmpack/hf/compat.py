"""What mmpack takes of transformers, accelerate, torch's modules and DeepSpeed that they do not promise.

No other file has a private name of theirs, or imports from inside transformers and accelerate. CONTRACTS says of
each name what breaks when it changes, also of keywords and attributes that other files of `mmpack/hf` use by their
plain names; `tests/test_compat.py` checks them on a new version of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.trainer import TRAINER_STATE_NAME
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_window_index,
)

from mmpack.hf.mmpack_dict import MmpackDict

__all__ = [
    "TRAINER_STATE_NAME",
    "AttentionMaskInterface",
    "WeightRenaming",
    "apply_rotary_pos_emb_vision",
    "get_model_conversion_mapping",
    "get_vision_interpolation_indices_and_weights",
    "get_vision_window_index",
    "sdpa_attention_forward",
    "sdpa_mask",
]

CONTRACTS = {  # what is leaned on -> what breaks without it; checked one by one in tests/test_compat.py
    # The vision tower
    "tower: cu_seqlens, position_ids":
        "images of a pack would see each other, or stand at other places",
    "tower: max_seqlen":
        "flash attention would ask the device for the longest image in every step",
    "tower: window_index, cu_window_seqlens, max_window_seqlen":
        "Qwen2.5-VL's windows would be stock's, on pixels that are permuted already",
    "tower: interp_indices, interp_weights":
        "Qwen3-VL's learned positions would be computed twice, by loops that ask the device",
    "tower: permute_input_for_window_attn":
        "Qwen2.5-VL's features would be permuted twice; it must get its index as window_index",
    "tower: other keywords reach the attention":
        "the attention bound on the tower would not get the pack",
    "tower: pooler_output, deepstack_features":
        "features would not be found in the tower's output",
    "tower: patch_embed, blocks, attn, merger, fullatt_block_indexes":
        "nothing could be bound on the tower",
    "vision attention: qkv, proj, num_heads, scaling":
        "the forward bound on vision attention would fail",
    "vision attention: apply_rotary_pos_emb_vision":
        "patches would stand at other places than in the stock tower",
    "vision: get_vision_window_index":
        "windows would not be those of the stock tower",
    "vision: get_vision_interpolation_indices_and_weights":
        "learned positions would not be those of the stock tower",
    # The text model
    "text: the registered attention gets scaling, dropout and mmpack":
        "text attention would see over segments",
    "text: sdpa_attention_forward, sdpa_mask":
        "generation with a patched model would not be stock's",
    "text: q_proj, k_proj, v_proj, o_proj, head_dim, scaling, attention_dropout":
        "impl='triton' would fail in text attention",
    "text: rotary_emb.inv_freq, attention_scaling, mrope_section":
        "impl='triton' would rotate by other angles",
    "text: visual_pos_masks, deepstack_visual_embeds":
        "deepstack's features would not reach Qwen3-VL's text layers",
    "text: _deepstack_process":
        "deepstack's features would be added by a mask, which asks the device",
    "config: _attn_implementation":
        "patch_model could not put the attention back",
    "config: _name_or_path":
        "the normalisation of the model's folder would not be compared with the data's",
    # The model with the head
    "inner model: visual, language_model, layers, self_attn":
        "patch_model would not find what it patches",
    "head: loss_function, _loss_function":
        "a packed batch would get the stock loss, and unpatching not find ours",
    "head: accepts_loss_kwargs":
        "Trainer would weigh micro-batches alike, whatever their supervised tokens",
    "torch: hook tables":
        "hooks would stay on an unpatched model, and a module with hooks be taken for a bare one",
    "torch: _is_replica":
        "nn.DataParallel would cut packs instead of being refused",
    # Loading
    "checkpoints: get_model_conversion_mapping, rename_source_key":
        "Qwen2-VL's and Qwen2.5-VL's weights would not be restored (transformers issue 43701)",
    "checkpoints: TRAINER_STATE_NAME":
        "every checkpoint would be taken for a torn one",
    # Trainer and accelerate
    "Trainer: callback_handler.callbacks":
        "reporters would not get the pack/ values",
    "Trainer: train_dataset is read when it trains":
        "accelerate would repeat packs where ranks have unequally many",
    "Trainer: arguments are read when it trains":
        "the order of packs would be Trainer's, and a run that diverges log 0.0",
    "accelerate: remainder, end_of_dataloader":
        "eval_loss would count the packs twice that accelerate repeats",
    "accelerate: base_dataloader":
        "a resumed stream would draw other random numbers",
    "accelerate: IterableDatasetShard.num_processes, process_index":
        "every rank would leave out most of its stream",
    "accelerate: AcceleratedOptimizer.scaler":
        "float16's overflows would end a run as divergence",
    "accelerate: AcceleratorState.distributed_type":
        "weights that FSDP or DeepSpeed load would be called missing",
}  # fmt: skip

WINDOW_METHOD = "permute_input_for_window_attn"  # of Qwen2.5-VL's tower
DEEPSTACK_METHOD = "_deepstack_process"  # of Qwen3-VL's text model


def tower_keywords(pack: MmpackDict, has_windows: bool, has_table: bool) -> dict[str, Any]:
    """What a stock tower takes instead of computing it from `grid_thw`, of a batch's `mmpack` dict."""
    keywords = {
        "cu_seqlens": pack["vision_cu_seqlens"],
        "max_seqlen": pack["vision_max_seqlen"],
        "position_ids": pack["vision_position_ids"],
    }
    if has_windows:
        keywords |= {
            "window_index": pack["window_order"][:0],  # nothing to permute, nothing to take back
            "cu_window_seqlens": pack["window_cu_seqlens"],
            "max_window_seqlen": pack["window_max_seqlen"],
        }
    if has_table:
        weights = pack["position_weight_bits"].view(torch.float32)
        keywords |= {"interp_indices": pack["position_index"], "interp_weights": weights}
    return keywords


def attention_name(config: Any) -> str:
    """The attention implementation of a config."""
    name: str = config._attn_implementation
    return name


def attention_of(config: Any) -> Callable[..., Any]:
    """The registered attention function of a config."""
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[attention_name(config)]
    return function


def folder_of(config: Any) -> str | None:
    """The folder, or the name, that a config was loaded from; None where it was not."""
    return getattr(config, "_name_or_path", None) or None


def own_loss(head: nn.Module) -> Any:
    """The loss that was set on a model through its `loss_function`; None: it has its class's."""
    return vars(head).get("_loss_function")


def remove_own_loss(head: Any) -> None:
    """Take back what was set through `loss_function`."""
    del head._loss_function


def is_replica(module: nn.Module) -> bool:
    """Whether a module is a copy that `nn.DataParallel` has made."""
    return getattr(module, "_is_replica", False)


def forward_hooks(module: nn.Module) -> list[Any]:
    """The forward hooks of a module."""
    return list(module._forward_hooks.values())


def all_hooks(module: nn.Module) -> list[Any]:
    """Hooks of a module's forward and backward."""
    tables = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return [hook for table in tables for hook in table.values()]


def remove_hook(module: nn.Module, hook_id: Any) -> None:
    """Take a forward hook or pre-hook away, by its handle's id, which a copy of the module has too."""
    for table in (
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
    ):
        table.pop(hook_id, None)


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether a parameter is one rank's part: FSDP2's or ZeRO-3's."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def whole_numel(parameter: Any) -> int:
    """Numbers in a parameter, also where ZeRO-3 has left an empty shell."""
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())


def whole_rows(parameter: Any) -> int:
    """Rows of a parameter, also where ZeRO-3 has left an empty shell."""
    return int(getattr(parameter, "ds_shape", parameter.shape)[0])


def loads_whole_checkpoints() -> bool:
    """Whether FSDP or DeepSpeed loads weights, all that it has saved and under its own names."""
    return AcceleratorState().distributed_type in ("FSDP", "DEEPSPEED")


def callbacks_of(trainer: Any) -> list[Any]:
    """A Trainer's callbacks, in the order they are called; the list itself."""
    callbacks: list[Any] = trainer.callback_handler.callbacks
    return callbacks


def has_scaler(optimizer: Any) -> bool:
    """Whether a step whose gradients overflow is left out, as with float16."""
    return getattr(optimizer, "scaler", None) is not None


def remainder_of(loader: Any) -> int | None:
    """Of the last batch of all ranks, how many items are not repeated from the start of the set; None: this is
    not the last batch, or none are."""
    remainder: int = getattr(loader, "remainder", -1)
    is_last = getattr(loader, "end_of_dataloader", False)
    return remainder if is_last and remainder > 0 else None


def base_loader(loader: Any) -> Any:
    """The DataLoader in accelerate's."""
    return getattr(loader, "base_dataloader", loader)


def take_whole(shard: Any) -> None:
    """Make accelerate's `IterableDatasetShard` give all that it reads to this rank."""
    shard.num_processes, shard.process_index = 1, 0
