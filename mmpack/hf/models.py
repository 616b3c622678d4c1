"""patch_model / unpatch_model: a transformers Qwen2-VL learns to take packs.

Nothing of transformers is replaced. On the one model instance given, patching

- puts a forward pre-hook on the inner model: it runs the vision tower, embeds the tokens, puts the
  features at their places and passes `inputs_embeds` on; and a hook that cuts its output to the
  supervised rows where an outer forward leaves that to it;
- switches text attention to the registered "mmpack" (`mmpack.hf.attention`);
- binds a forward on each vision attention and on the patch embedding.

A batch without the `mmpack` dict takes the stock path: generation, padded evaluation and saving
are untouched. `unpatch_model` takes everything back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from mmpack.hf import attention, pixels
from mmpack.hf.embedding import embed, is_sharded
from mmpack.hf.isolation import check_isolation
from mmpack.hf.loss import install_loss, remove_loss
from mmpack.hf.rotary import rotations, text_forward
from mmpack.ops.varlen_attention import IMPLEMENTATIONS

Model = TypeVar("Model", bound=nn.Module)

SUPPORTED = ("qwen2_vl",)  # config.model_type of the inner model
_STATE = "_mmpack_patch"


@dataclass
class _Patch:
    """What `patch_model` did to an inner model; lives on it as an attribute."""

    hook_id: int
    output_hook_id: int
    text_attention: str  # the implementation before
    impl: str
    is_isolated: bool = False


def patch_model(model: Model, impl: str = "auto") -> Model:
    """Patch a Qwen2-VL model, in place, to train on packs; returns it. Patching twice is one patch.

    A self-test follows: a small pack is run twice with another first segment, and the second
    segment's hidden states must not change by a bit. Where it cannot run yet (weights on the meta
    device or sharded, kernels without their GPU) it runs at the first packed forward. Mode, gradients and random
    state are as before.

    Args:
        model: a `Qwen2VLForConditionalGeneration`, its inner `Qwen2VLModel`, or a wrapper that holds
            one (PEFT).
        impl: which ops do the work. "auto": libraries' (torch, flash-attn); "triton": mmpack's own
            kernels (attention, rotary embedding, token embedding with feature insertion), on a CUDA device or in
            Triton's interpreter; "auto" will mean them once they are measured on a GPU. Or one of
            `mmpack.ops.varlen_attention`'s implementations, for attention alone. What is asked for
            by name is used or refused.

    Raises:
        ValueError: the model is not supported, or something else has replaced what mmpack binds.
        RuntimeError: the self-test found that segments see each other.
    """
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(
            f"impl must be 'auto' or one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}"
        )
    base = _inner_model(model)
    if hasattr(base, _STATE):
        getattr(base, _STATE).impl = impl
        return model
    bindings = _bindings(base)
    for module, _ in bindings:
        if "forward" in vars(module):
            raise ValueError(
                f"{type(module).__name__} already has a replaced forward (accelerate's offload to "
                "several devices does that); patch the model before, or load it on one device"
            )
    for module, forward_over in bindings:
        module.forward = MethodType(forward_over(type(module).forward), module)
    hook = base.register_forward_pre_hook(_take_pack, with_kwargs=True)
    text_attention = base.language_model.config._attn_implementation
    output_hook = base.register_forward_hook(_keep_supervised, with_kwargs=True)
    setattr(base, _STATE, _Patch(hook.id, output_hook.id, text_attention, impl))
    _set_text_attention(base, attention.NAME)
    install_loss(base, model)
    # A model that Trainer is still to move to its GPU cannot run kernels yet.
    needs_gpu = impl not in ("auto", "sdpa", "reference", "flex")
    if _has_weights(base) and (not needs_gpu or base.device.type == "cuda"):
        try:
            _check_once(base)
        except BaseException:
            unpatch_model(model)
            raise
    return model


def unpatch_model(model: Model) -> Model:
    """Take `patch_model` back; returns the model. A model that is not patched stays as it is."""
    base = _inner_model(model)
    patch = vars(base).get(_STATE)
    if patch is None:
        return model
    base._forward_pre_hooks.pop(patch.hook_id, None)
    base._forward_pre_hooks_with_kwargs.pop(patch.hook_id, None)
    base._forward_hooks.pop(patch.output_hook_id, None)
    base._forward_hooks_with_kwargs.pop(patch.output_hook_id, None)
    for module, _ in _bindings(base):
        del module.forward
    vars(base.visual.patch_embed).pop("normalization", None)
    _set_text_attention(base, patch.text_attention)
    remove_loss(base, model)
    delattr(base, _STATE)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_model` has patched the model, or what it wraps."""
    return any(_STATE in vars(module) for module in model.modules())


def _take_pack(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The hook: a packed batch becomes `inputs_embeds`; anything else passes untouched."""
    pack = kwargs.get("mmpack")
    if pack is None:
        return None
    if getattr(base, "_is_replica", False):
        raise ValueError(
            "nn.DataParallel cuts batches along their first dimension, which a packed row does not have; "
            "start one process a GPU: torchrun --nproc_per_node N, or accelerate launch"
        )
    if not torch.compiler.is_compiling():  # host-side questions, asked of every eager batch
        _check_once(base)
        _check_batch(args, kwargs, pack)
    impl = getattr(base, _STATE).impl
    pack = {**pack, "impl": impl}
    position_ids = kwargs["position_ids"][1:]  # row 0 would make transformers build a mask
    if impl == "triton":
        pack |= rotations(base, pack, position_ids[:, 0])
    features_FD, dummy_FD = None, None
    # Before the embedding, and recorded or not, with images or without: sharded ranks gather in one order.
    with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(base.visual)):
        if kwargs.get("pixel_values") is not None:
            pixel_values = kwargs["pixel_values"]
            if pixel_values.dtype == torch.uint8:
                base.visual.patch_embed.normalization = pack["normalization"]
            else:
                pixel_values = pixel_values.type(base.visual.dtype)
            features_FD = base.visual(
                pixel_values,
                grid_thw=kwargs["image_grid_thw"],
                cu_seqlens=pack["vision_cu_seqlens"],
                max_seqlen=pack["vision_max_seqlen"],
                position_ids=pack["vision_position_ids"],
                mmpack=pack,
            ).pooler_output
        elif _tower_must_run(base.visual):
            dummy_FD = _dummy_features(base)
    embeds_TD = embed(base.get_input_embeddings(), kwargs["input_ids"][0], features_FD, pack, impl)
    if dummy_FD is not None:
        embeds_TD = embeds_TD + 0 * dummy_FD.sum().to(embeds_TD.device, embeds_TD.dtype)
    return args, {
        **kwargs,
        "mmpack": pack,
        "input_ids": None,
        "inputs_embeds": embeds_TD[None],
        "position_ids": position_ids,
        "pixel_values": None,
        "image_grid_thw": None,
        "use_cache": False,
    }


def _keep_supervised(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """The hook on the output, for outer forwards that are not transformers' (Liger's, TRL's): they pass
    `logits_to_keep` down and compare all hidden states with `shift_labels`, so it is done here."""
    if kwargs.get("mmpack") is None or kwargs.get("logits_to_keep") is None:
        return None
    index = kwargs["logits_to_keep"]
    if isinstance(output, tuple):
        return output[0][:, index], *output[1:]
    output.last_hidden_state = output.last_hidden_state[:, index]
    return output


def _check_batch(args: tuple[Any, ...], kwargs: dict[str, Any], pack: dict[str, Any]) -> None:
    """Host-side checks of what a data loader may have done to the batch."""
    if args or kwargs.get("input_ids") is None:
        raise ValueError("a packed batch must be passed by keyword, with input_ids: model(**batch)")
    if kwargs.get("attention_mask") is not None:
        raise ValueError("a packed batch has no padding; remove attention_mask from it")
    num_tokens = pack["offsets"][-1]
    if kwargs["input_ids"].shape != (1, num_tokens):
        raise ValueError(
            f"input_ids have shape {tuple(kwargs['input_ids'].shape)}, the pack has "
            f"(1, {num_tokens}); nothing may cut or stack a PackCollator's batch"
        )
    pixel_values = kwargs.get("pixel_values")
    num_patches = 0 if pixel_values is None else len(pixel_values)
    if num_patches != pack["num_patches"]:
        raise ValueError(
            f"pixel_values have {num_patches} patches, the pack has {pack['num_patches']}; an "
            "IterableDataset under Trainer is cut by accelerate unless TrainingArguments has "
            "accelerator_config={'dispatch_batches': False}"
        )


def _is_trained(visual: nn.Module) -> bool:
    """A frozen tower saves nothing for a backward. (`enable_input_require_grads` makes the outputs of
    embeddings require gradients, the tower's among them.)"""
    return any(parameter.requires_grad for parameter in visual.parameters())


def _tower_must_run(visual: nn.Module) -> bool:
    """Without images the tower still runs where another rank may wait for it: for its gradients
    (DDP) or its shards (FSDP, ZeRO-3)."""
    return _is_trained(visual) or any(is_sharded(parameter) for parameter in visual.parameters())


def _dummy_features(base: nn.Module) -> torch.Tensor:
    """Features of one 2 x 2-patch image of zeros, made on the device."""
    config, device = base.visual.config, base.visual.device
    num_patches = config.spatial_merge_size**2
    patch_values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    cu_seqlens = torch.arange(2, dtype=torch.int32, device=device) * num_patches
    pack = {
        "impl": getattr(base, _STATE).impl,
        "vision_offsets": (0, num_patches),
        "vision_cu_seqlens": cu_seqlens,
        "vision_max_seqlen": num_patches,
        "vision_segment_ids": torch.zeros(num_patches, dtype=torch.int32, device=device),
        "vision_tiles": cu_seqlens.repeat(1, 2),  # one tile, its segment's rows
    }
    return base.visual(
        torch.zeros(num_patches, patch_values, dtype=base.visual.dtype, device=device),
        grid_thw=torch.ones(1, 3, dtype=torch.long, device=device),
        cu_seqlens=cu_seqlens,
        max_seqlen=num_patches,
        position_ids=torch.zeros(num_patches, 2, dtype=torch.long, device=device),
        mmpack=pack,
    ).pooler_output


def _check_once(base: nn.Module) -> None:
    patch = getattr(base, _STATE)
    if not patch.is_isolated:
        patch.is_isolated = True  # before the test, whose forwards come here too
        try:
            check_isolation(base)
        except BaseException:
            patch.is_isolated = False
            raise


def _has_weights(base: nn.Module) -> bool:
    return not any(p.is_meta or is_sharded(p) for p in base.parameters())


def _set_text_attention(base: nn.Module, name: str) -> None:
    base.set_attn_implementation(
        {
            "": base.config._attn_implementation,
            "text_config": name,
            "vision_config": base.visual.config._attn_implementation,
        }
    )


def _bindings(base: nn.Module) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """(module, what makes its new forward of its class's own)."""
    tower, text = base.visual, base.language_model
    return [
        (tower.patch_embed, pixels.patch_embed_forward),
        *((block.attn, attention.vision_forward) for block in tower.blocks),
        *((layer.self_attn, text_forward) for layer in text.layers),
    ]


def find_inner(model: nn.Module) -> Any:
    """The module that holds `visual` and `language_model`, wherever it is wrapped; None without."""
    found = [m for m in model.modules() if hasattr(m, "visual") and hasattr(m, "language_model")]
    # transformers gives the outer model properties of the same names; the inner one comes last.
    return found[-1] if found else None


def _inner_model(model: nn.Module) -> Any:
    """`find_inner`, or an error."""
    base = find_inner(model)
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type not in SUPPORTED:
        raise ValueError(
            f"cannot patch {type(model).__name__} (model_type {model_type!r}); supported: "
            f"{', '.join(SUPPORTED)}"
        )
    return base
