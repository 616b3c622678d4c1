"""Private interfaces of transformers, accelerate, torch and DeepSpeed that mmpack relies on.

Only this file uses their private names or imports from inside transformers and accelerate. CONTRACTS says what
breaks if a name changes, including keywords and attributes that other files of `mmpack/hf` use directly;
`tests/test_compat.py` checks each of them on a new version of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import is_causal_conv1d_available, is_flash_linear_attention_available
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

CONTRACTS = {  # interface -> what breaks without it; tests/test_compat.py checks each
    # The vision tower
    "tower: cu_seqlens, position_ids":
        "images of a pack would see each other, or have other positions",
    "tower: max_seqlen":
        "flash attention would synchronize with the device for the longest image in every step",
    "tower: window_index, cu_window_seqlens, max_window_seqlen":
        "Qwen2.5-VL's pixels, already permuted, would be permuted into windows again",
    "tower: interp_indices, interp_weights":
        "Qwen3-VL's learned positions would be computed twice, in loops that synchronize with the device",
    "tower: permute_input_for_window_attn":
        "Qwen2.5-VL's features would be permuted twice; its index must be named window_index",
    "tower: other keywords reach the attention":
        "the tower's attention would not get the pack",
    "tower: pooler_output, deepstack_features":
        "features would not be found in the tower's output",
    "tower: patch_embed, blocks, attn, merger, fullatt_block_indexes":
        "nothing could be bound on the tower",
    "vision attention: qkv, proj, num_heads, scaling":
        "the forward bound on vision attention would fail",
    "vision attention: apply_rotary_pos_emb_vision":
        "patches would have other positions than in the stock tower",
    "vision: get_vision_window_index":
        "windows would differ from the stock tower's",
    "vision: get_vision_interpolation_indices_and_weights":
        "learned positions would differ from the stock tower's",
    # The text model
    "text: the registered attention gets scaling, dropout and mmpack":
        "text attention would cross segments",
    "text: sdpa_attention_forward, sdpa_mask":
        "generation with a patched model would differ from stock",
    "text: q_proj, k_proj, v_proj, o_proj, head_dim, scaling, attention_dropout":
        "impl='triton' would fail in text attention",
    "text: rotary_emb.inv_freq, attention_scaling, mrope_section":
        "impl='triton' would rotate by other angles",
    "text: visual_pos_masks, deepstack_visual_embeds":
        "deepstack's features would not reach Qwen3-VL's text layers",
    "text: _deepstack_process":
        "deepstack's features would be added by a mask, which synchronizes with the device",
    "text: linear_attn, layer_types":
        "Qwen3.5's Gated DeltaNets would not be found, and segments would share their states",
    "text: Gated DeltaNet's kernels get seq_idx, cu_seqlens, cu_seqlens_cpu":
        "segments would share states where the kernels are installed, and in an unpatched Qwen3.5",
    "text: Gated DeltaNet's projections, conv1d, A_log, dt_bias, norm, out_proj, sizes":
        "ranks that share a pack could not run it on some of its heads",
    "config: _attn_implementation":
        "unpatch_model could not restore the attention",
    "config: _name_or_path":
        "the model's and the data's normalization would not be compared",
    # The model with the head
    "inner model: visual, language_model, layers, self_attn":
        "patch_model would not find what it patches",
    "head: loss_function, _loss_function":
        "a packed batch would get the stock loss, and unpatching would not find ours",
    "head: accepts_loss_kwargs":
        "Trainer would weight micro-batches equally, whatever their supervised tokens",
    "torch: hook tables":
        "hooks would stay on an unpatched model, and modules with hooks would count as plain",
    "torch: FSDP2's hooks are of torch.distributed.fsdp":
        "a head that is an FSDP2 group of its own would keep its logits",
    "torch: all_to_all_single_autograd":
        "ranks that share a pack could not exchange tokens, or would get no gradients from each other",
    "torch: _device_types, _get_backend, options._timeout":
        "ranks that share a pack would wait for each other as long as torch's default, not ddp_timeout",
    "torch: _is_replica":
        "nn.DataParallel would split packs instead of being refused",
    # Loading
    "checkpoints: get_model_conversion_mapping, rename_source_key":
        "Qwen2-VL's and Qwen2.5-VL's weights would not be restored (transformers issue 43701)",
    "checkpoints: TRAINER_STATE_NAME":
        "every checkpoint would count as incomplete",
    # Trainer and accelerate
    "Trainer: callback_handler.callbacks":
        "reporters would not get the pack/ values",
    "Trainer: train_dataset is read when it trains":
        "accelerate would repeat packs when ranks have different numbers of them",
    "Trainer: get_eval_dataloader, get_test_dataloader":
        "with context parallelism, the ranks of a group would evaluate different packs",
    "Trainer: arguments are read when it trains":
        "packs would be in Trainer's order, and a diverged run would log 0.0",
    "Trainer: _get_num_items_in_batch, model_accepts_loss_kwargs, label_smoother":
        "a loss with weights would be divided by the number of labels, which PackedLoss refuses",
    "Trainer: get_tp_size; accelerate: parallelism_config.non_data_parallel_size":
        "weights of ranks that share a batch would be counted several times",
    "accelerate: remainder, end_of_dataloader":
        "eval_loss would count packs that accelerate repeats twice",
    "accelerate: deals batches to ranks in turn":
        "the ranks of a context group would get different packs",
    "accelerate: base_dataloader":
        "a resumed stream would draw different random numbers",
    "accelerate: IterableDatasetShard.num_processes, process_index":
        "every rank would skip most of its stream",
    "accelerate: AcceleratedOptimizer.scaler":
        "float16 overflows would end a run as divergence",
    "accelerate: AcceleratorState.distributed_type":
        "weights that FSDP or DeepSpeed load would be reported missing",
}  # fmt: skip

WINDOW_METHOD = "permute_input_for_window_attn"  # Qwen2.5-VL's tower
DEEPSTACK_METHOD = "_deepstack_process"  # Qwen3-VL's text model


def tower_keywords(pack: MmpackDict, has_windows: bool, has_table: bool) -> dict[str, Any]:
    """Keywords, from a batch's `mmpack` dict, that a stock tower would otherwise compute from `grid_thw`."""
    keywords = {
        "cu_seqlens": pack["vision_cu_seqlens"],
        "max_seqlen": pack["vision_max_seqlen"],
        "position_ids": pack["vision_position_ids"],
    }
    if has_windows:
        keywords |= {
            "window_index": pack["window_order"][:0],  # no permutation
            "cu_window_seqlens": pack["window_cu_seqlens"],
            "max_window_seqlen": pack["window_max_seqlen"],
        }
    if has_table:
        weights = pack["position_weight_bits"].view(torch.float32)
        keywords |= {"interp_indices": pack["position_index"], "interp_weights": weights}
    return keywords


def linear_keywords(pack: MmpackDict) -> dict[str, Any]:
    """Keywords, from a batch's `mmpack` dict, with which a stock Gated DeltaNet begins each segment anew, if its
    kernels are installed; otherwise it refuses them (transformers 5.17: ignores them)."""
    return {"cu_seq_lens_q": pack["cu_seqlens"], "seq_idx": pack["segment_ids"][None]}


def has_linear_kernels(both: bool = True) -> bool:
    """Whether flash-linear-attention and causal-conv1d are installed, by which a Gated DeltaNet then runs on a
    GPU; with `both=False`, whether one of them is."""
    installed = is_flash_linear_attention_available(), is_causal_conv1d_available()
    return all(installed) if both else any(installed)


def attention_name(config: Any) -> str:
    """The attention implementation of a config."""
    name: str = config._attn_implementation
    return name


def attention_of(config: Any) -> Callable[..., Any]:
    """The registered attention function of a config."""
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[attention_name(config)]
    return function


def folder_of(config: Any) -> str | None:
    """The folder or name that a config was loaded from; None if it was not loaded."""
    return getattr(config, "_name_or_path", None) or None


def own_loss(head: nn.Module) -> Any:
    """The loss set on a model through its `loss_function`; None: it has its class's."""
    return vars(head).get("_loss_function")


def remove_own_loss(head: Any) -> None:
    """Remove the loss set through `loss_function`."""
    del head._loss_function


def is_replica(module: nn.Module) -> bool:
    """Whether a module is a replica made by `nn.DataParallel`."""
    return getattr(module, "_is_replica", False)


def forward_hooks(module: nn.Module) -> list[Any]:
    """A module's forward hooks."""
    return list(module._forward_hooks.values())


def all_hooks(module: nn.Module) -> list[Any]:
    """A module's forward and backward hooks."""
    tables = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return [hook for table in tables for hook in table.values()]


def remove_hook(module: nn.Module, hook_id: Any) -> None:
    """Remove a forward hook or pre-hook by its handle's id, which copies of the module share."""
    for table in (
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
    ):
        table.pop(hook_id, None)


def all_to_all(
    rows: torch.Tensor, received: list[int], sent: list[int], group: Any
) -> torch.Tensor:
    """Rows to and from every rank of a process group, with a gradient; `received` and `sent` are rows by rank."""
    out = all_to_all_single_autograd(rows, received, sent, group)
    return out.wait() if hasattr(out, "wait") else out  # on the device; the host goes on


def timeout_of(group: Any) -> timedelta | None:
    """How long the collectives of a process group wait for its other ranks; None: its backend does not tell."""
    backends = [group._get_backend(device) for device in group._device_types]
    known = [getattr(getattr(one, "options", None), "_timeout", None) for one in backends]
    return max((one for one in known if one is not None), default=None)


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether a parameter is sharded over ranks, by FSDP2 or ZeRO-3."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def whole_numel(parameter: Any) -> int:
    """The unsharded size of a parameter, also under ZeRO-3, which leaves an empty one."""
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())


def whole_rows(parameter: Any) -> int:
    """The unsharded number of rows of a parameter, also under ZeRO-3."""
    return int(getattr(parameter, "ds_shape", parameter.shape)[0])


def loads_whole_checkpoints() -> bool:
    """Whether FSDP or DeepSpeed loads the weights, which it saved completely and under the same names."""
    return AcceleratorState().distributed_type in ("FSDP", "DEEPSPEED")


def callbacks_of(trainer: Any) -> list[Any]:
    """A Trainer's own list of callbacks, in calling order."""
    callbacks: list[Any] = trainer.callback_handler.callbacks
    return callbacks


def bind_count(trainer: Any, count: Callable[[list[Any], torch.device], Any]) -> None:
    """Bind `count` on a Trainer in place of its count of a step's labels."""
    trainer._get_num_items_in_batch = count


def stock_count(trainer: Any, batches: list[Any], device: torch.device) -> Any:
    """A Trainer's own count of a step's labels."""
    return type(trainer)._get_num_items_in_batch(trainer, batches, device)


def num_replicas(trainer: Any) -> int:
    """How many ranks share a batch (tensor, context and sequence parallelism)."""
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    replicas: int = 1 if parallelism is None else parallelism.non_data_parallel_size
    return max(replicas, int(trainer.get_tp_size()))


def has_scaler(optimizer: Any) -> bool:
    """Whether steps with overflowing gradients are skipped, as with float16."""
    return getattr(optimizer, "scaler", None) is not None


def remainder_of(loader: Any) -> int | None:
    """The number of items in the last batch, over all ranks, that are not repeated from the start of the set.
    None: this is not the last batch, or nothing is repeated."""
    remainder: int = getattr(loader, "remainder", -1)
    is_last = getattr(loader, "end_of_dataloader", False)
    return remainder if is_last and remainder > 0 else None


def base_loader(loader: Any) -> Any:
    """The DataLoader inside accelerate's wrapper."""
    return getattr(loader, "base_dataloader", loader)


def take_whole(shard: Any) -> None:
    """Make accelerate's `IterableDatasetShard` pass everything it reads to this rank."""
    shard.num_processes, shard.process_index = 1, 0
