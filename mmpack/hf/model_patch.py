"""patch_model / unpatch_model: make a transformers Qwen-VL model accept packs.

Nothing in transformers is replaced. On one model instance, patching

- registers a forward pre-hook on the inner model, which runs the vision tower, embeds the tokens, inserts the
  features and passes `inputs_embeds` on; and a forward hook, which selects the supervised rows for outer forwards
  that do not;
- switches text attention to the registered "mmpack" (`mmpack.hf.attention`);
- binds a forward on each vision attention and on the patch embedding;
- Qwen2.5-VL: keeps the features in window order; Qwen3-VL: adds deepstack features by index (`mmpack.hf.tower`);
  Qwen3.5: binds a forward on each Gated DeltaNet (`mmpack.hf.linear_attention`).
  `mmpack.families` says how families differ.

A batch without the `mmpack` dict takes the stock path: generation, padded evaluation and saving are unchanged.
`unpatch_model` undoes everything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from mmpack.hf import attention, context_parallel, tower
from mmpack.hf.compat import (
    DEEPSTACK_METHOD,
    attention_name,
    has_linear_kernels,
    is_replica,
    is_sharded,
    remove_hook,
)
from mmpack.hf.embedding import at_placeholders, embed
from mmpack.hf.fit import check_facts, check_ids, facts_of_model, num_ids
from mmpack.hf.forward_kwargs import assemble_on_device
from mmpack.hf.head import give_targets
from mmpack.hf.linear_attention import linear_forward
from mmpack.hf.loss import install_loss, remove_loss
from mmpack.hf.mmpack_dict import MmpackDict
from mmpack.hf.model_parts import (
    PATCH,
    check_videos,
    family_of,
    find_inner,
    inner_model,
    tower_of,
)
from mmpack.hf.op_choice import Choice, choose, table_here, tell_choice
from mmpack.hf.rotary import rotations, text_forward
from mmpack.hf.self_test import check_isolation
from mmpack.ops.varlen_attention import IMPLEMENTATIONS
from mmpack.packing.context_group import ContextGroup

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class _Patch:
    """The state of a patched inner model, stored as its attribute."""

    hooks: list[tuple[str, int]]  # (submodule's name, id); handles do not survive a deep copy
    text_attention: str  # the implementation to restore
    impl: str
    facts: dict[str, Any]  # what data must be encoded with (`mmpack.hf.fit`)
    context: ContextGroup | None  # the ranks that share a pack
    is_isolated: bool = False
    choice: Choice = field(default_factory=dict)  # with impl "auto"; made at the first forward
    chosen_for: str = ""  # the type of its device


def patch_model(model: Model, impl: str = "auto", context: ContextGroup | None = None) -> Model:
    """Patch a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5, dense or MoE, in place to train on packs; returns the
    model. Patching a patched model only changes `impl` and `context`.

    A self-test follows: it runs a small pack twice with different first segments, and the second segment's hidden
    states must be equal to the bit (with experts: up to rounding). If it cannot run yet (weights on the meta
    device or sharded, kernels without their GPU), it runs at the first packed forward. It does not change training
    mode, gradients or random state.

    Args:
        model: a `Qwen2VLForConditionalGeneration` or another family's, its inner model, or a wrapper around one
            (PEFT).
        impl: which ops to use. "auto": what `mmpack tune` found to be right and fastest on this GPU, else
            libraries' (torch, flash-attn), with a warning; under Trainer, all ranks use the same
            (`PackingCallback`). "libraries": only libraries'. "triton": mmpack's kernels (attention, rotary
            embedding, token embedding with feature insertion, cast of uint8 pixels), on a CUDA device or in
            Triton's interpreter. Or an implementation of `mmpack.ops.varlen_attention`, for attention only. A
            named implementation is used or refused.
        context: this rank's place among the ranks that share each pack (context parallelism): a `PackCollator`
            made for the model then gives this rank's part of a pack, and all ranks of a group need the same packs.
            The process group is made from torch.distributed's default one, which all ranks must do: here if that
            is initialized, else at the first packed forward. None, or a size of 1: each rank has packs of its own.

    Raises:
        ValueError: the model is not supported, something else has replaced a method that mmpack binds, or its
            heads do not divide among the ranks of `context`, or this rank has another place.
        RuntimeError: the self-test found that segments attend to each other.
    """
    if impl not in ("auto", "libraries", *IMPLEMENTATIONS):
        raise ValueError(
            f"impl must be 'auto', 'libraries' or one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}"
        )
    base = inner_model(model)
    if context is not None and context.size == 1:
        context = None
    if context is not None:
        context_parallel.join(base.config, context)
    if hasattr(base, PATCH):
        patch = getattr(base, PATCH)
        patch.impl, patch.choice, patch.chosen_for = impl, {}, ""
        patch.context = context
        return model
    bindings = _bindings(base)
    for module, method, _ in bindings:
        if method in vars(module):
            raise ValueError(
                f"{type(module).__name__} already has a replaced {method} (accelerate's offload to "
                "several devices does that); patch the model before that, or load it on one device"
            )
    for module, method, over in bindings:
        setattr(module, method, MethodType(over(getattr(type(module), method)), module))
    text_attention = attention_name(base.language_model.config)
    facts = facts_of_model(base.config)
    setattr(base, PATCH, _Patch(_register_hooks(base), text_attention, impl, facts, context))
    _set_text_attention(base, attention.NAME)
    install_loss(base, model)
    if _can_run(base, impl):
        try:
            _check_once(base)
        except BaseException:
            unpatch_model(model)
            raise
    return model


def _can_run(base: Any, impl: str) -> bool:
    """Whether a model has its weights and, if it needs one, its GPU; Trainer may not have moved it yet."""
    needs_gpu = impl not in ("auto", "libraries", "sdpa", "reference", "flex") or (
        family_of(base).has_linear_attention and has_linear_kernels(both=False)
    )
    return _has_weights(base) and (not needs_gpu or base.device.type == "cuda")


def unpatch_model(model: Model) -> Model:
    """Undo `patch_model`; returns the model. An unpatched model is left unchanged.

    Args:
        model: the model passed to `patch_model`, or its inner model.

    Raises:
        ValueError: it holds no model of a supported family.
    """
    base = inner_model(model)
    patch = vars(base).get(PATCH)
    if patch is None:
        return model
    for name, hook_id in patch.hooks:
        remove_hook(base.get_submodule(name), hook_id)
    for module, method, _ in _bindings(base):
        delattr(module, method)
    for name in ("normalization", "choice"):
        vars(base.visual.patch_embed).pop(name, None)
    vars(base.visual.merger).pop("merged", None)
    _set_text_attention(base, patch.text_attention)
    remove_loss(base, model)
    delattr(base, PATCH)
    return model


def patch_of(model: nn.Module) -> tuple[Any, str] | None:
    """(inner model, `impl`) of a patched model; None for others."""
    base = find_inner(model)
    patch = None if base is None else vars(base).get(PATCH)
    return None if patch is None else (base, patch.impl)


def context_of(model: nn.Module) -> ContextGroup | None:
    """The `context` that a model is patched with."""
    base = find_inner(model)
    patch = None if base is None else vars(base).get(PATCH)
    return None if patch is None else patch.context


def use_choice(model: nn.Module, choice: Choice, device: torch.device) -> bool:
    """Use these ops from now on in a patched model with impl "auto"; returns whether that is new. The self-test
    runs again if they are others."""
    base = inner_model(model)
    patch = getattr(base, PATCH)
    is_new: bool = patch.chosen_for != device.type or patch.choice != choice
    if patch.choice != choice:
        patch.is_isolated = False
    patch.choice, patch.chosen_for = choice, device.type
    if _has_weights(base) and base.device.type == device.type:
        _check_once(base)  # later, in a compiled graph, it could not run
    return is_new


def is_patched(model: nn.Module) -> bool:
    """Whether the model, or one that it wraps, is patched."""
    return any(PATCH in vars(module) for module in model.modules())


def _take_pack(
    base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: replaces the ids of a packed batch by `inputs_embeds`; other batches pass unchanged."""
    pack: MmpackDict | None = kwargs.get("mmpack")
    if pack is None:
        return None
    if is_replica(base):
        raise ValueError(
            "nn.DataParallel splits batches along the first dimension, which a packed row does not have; "
            "start one process per GPU: torchrun --nproc_per_node N, or accelerate launch"
        )
    patch = getattr(base, PATCH)
    if not torch.compiler.is_compiling():  # host-side checks, skipped in a compiled graph
        _choose_once(base, kwargs)
        _check_once(base)
        _check_batch(base, args, kwargs, pack)
    impl = "auto" if patch.impl == "libraries" else patch.impl
    if "compact" in pack:
        kwargs, pack = assemble_on_device(kwargs, pack, tower_of(base).table_side)
    give_targets(pack)
    pack = {**pack, "impl": impl, "tuned": patch.choice}
    over = pack.get("context")
    if over is not None:
        over = pack["context"] = {**over, "group": context_parallel.process_group(patch.context)}
    position_ids = kwargs["position_ids"][1:]  # row 0 would make transformers build a mask
    if impl == "triton" or "rotary" in patch.choice or "vision_rotary" in patch.choice:
        pack["rotary"], pack["vision_rotary"] = rotations(base, pack, position_ids[:, 0])
    features: list[Any] = [None]
    nothing: torch.Tensor | None = None
    # Always run the tower before the embedding, on every rank, so that sharded ranks gather in the same order.
    with torch.set_grad_enabled(torch.is_grad_enabled() and tower.is_trained(base.visual)):
        if any(kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_videos")):
            features = tower.run_tower(base, *tower.pixels_and_grids(kwargs), pack)
        elif over is not None and "sent" in over:
            features = tower.run_on_nothing(base, impl)  # none of which is sent
        elif tower.must_run(base.visual):
            blank = tower.run_on_nothing(base, impl)
            nothing = 0 * torch.stack([x.sum() for x in blank]).sum()
        if over is not None and "sent" in over:
            features = [context_parallel.exchange_features(level, over) for level in features]
    embeds_TD = embed(base.get_input_embeddings(), kwargs["input_ids"][0], features[0], pack)
    if nothing is not None:
        embeds_TD = embeds_TD + nothing.to(embeds_TD.device, embeds_TD.dtype)
    if features[1:]:
        placed = []  # by a loop: in a comprehension, torch.compile would look at all of `pack`
        for features_FD in features[1:]:
            placed.append(at_placeholders(features_FD, pack))
        pack["deepstack"] = placed
    return args, {
        **kwargs,
        "mmpack": pack,
        "input_ids": None,
        "inputs_embeds": embeds_TD[None],
        "position_ids": position_ids,
        "pixel_values": None,
        "image_grid_thw": None,
        "pixel_values_videos": None,
        "video_grid_thw": None,
        "use_cache": False,
    }


def _keep_supervised(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook that selects the supervised rows, for outer forwards of Liger and TRL: they pass
    `logits_to_keep` down and compare all hidden states with `shift_labels`."""
    if kwargs.get("mmpack") is None or kwargs.get("logits_to_keep") is None:
        return None
    index = kwargs["logits_to_keep"]
    if isinstance(output, tuple):
        return output[0][:, index], *output[1:]
    output.last_hidden_state = output.last_hidden_state[:, index]
    return output


def _check_batch(
    base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], pack: MmpackDict
) -> None:
    """Host-side checks that the batch is complete and fits the model."""
    if args or kwargs.get("input_ids") is None:
        raise ValueError("a packed batch must be passed by keyword, with input_ids: model(**batch)")
    if kwargs.get("attention_mask") is not None:
        raise ValueError("a packed batch has no padding; remove attention_mask from it")
    num_tokens = pack["offsets"][-1]
    patch, over = getattr(base, PATCH), pack.get("context")
    context_parallel.check_part(patch.context, pack)
    if over is not None:
        context_parallel.check_router(base.config, kwargs.get("output_router_logits"))
        if not over.get("is_compared"):
            context_parallel.check_same_packs(patch.context, [pack])
        num_tokens = over["tokens"][over["rank"]]
    if "compact" in pack:
        num_tokens += len(pack["grid_thw"]) - pack["compact"]["sizes"][1]  # not yet expanded
    if kwargs["input_ids"].shape != (1, num_tokens):
        raise ValueError(
            f"input_ids have shape {tuple(kwargs['input_ids'].shape)}, the pack has "
            f"(1, {num_tokens}); do not slice or stack the batches of PackCollator"
        )
    positions = kwargs.get("position_ids")
    if positions is not None and positions.ndim == 3 and len(positions) < 3:
        raise ValueError(
            f"position_ids have shape {tuple(positions.shape)}; accelerate splits the batches of an "
            "IterableDataset unless TrainingArguments has accelerator_config={'dispatch_batches': False}"
        )
    family = family_of(base)
    pixels = (kwargs.get(name) for name in ("pixel_values", "pixel_values_videos"))
    num_patches = sum(len(values) for values in pixels if values is not None)
    if num_patches != pack["num_patches"]:
        raise ValueError(
            f"pixel_values have {num_patches} patches, the pack has {pack['num_patches']}; accelerate splits "
            "the batches of an IterableDataset unless TrainingArguments has "
            "accelerator_config={'dispatch_batches': False}"
        )
    needed = {"window_order": family.has_windows, "position_index": family.has_position_table}
    if "compact" in pack:
        del needed["position_index"]  # made on the device
    if num_patches and any(is_needed and name not in pack for name, is_needed in needed.items()):
        raise ValueError(
            f"the batch lacks indices for the vision tower of {base.config.model_type}; pass the model to the "
            "collator: PackCollator(model=model)"
        )
    if pack["video_rule"] is not None:
        check_videos(base, pack["video_rule"])
    check_facts(patch.facts, pack["facts"])
    check_ids(num_ids(base), pack["id_range"])


def _choose_once(base: Any, kwargs: dict[str, Any]) -> None:
    """Choose ops for the device of the first batch, unless that was done for all ranks (`rank_choice`)."""
    patch, device = getattr(base, PATCH), kwargs["mmpack"]["supervised_index"].device
    if patch.impl == "auto" and patch.chosen_for != device.type:
        size = 1 if patch.context is None else patch.context.size
        choice = choose(base.config, table_here(device), size)
        if choice != patch.choice:
            patch.choice, patch.is_isolated = choice, False
        patch.chosen_for = device.type
        tell_choice(choice, device, context_size=size)


def _check_once(base: Any) -> None:
    patch = getattr(base, PATCH)
    if not patch.is_isolated:
        patch.is_isolated = True  # set first, because the test's forwards come here too
        try:
            check_isolation(base)
        except BaseException:
            patch.is_isolated = False
            raise


def _has_weights(base: Any) -> bool:
    return not any(p.is_meta or is_sharded(p) for p in base.parameters())


def _set_text_attention(base: Any, name: str) -> None:
    base.set_attn_implementation(
        {
            "": attention_name(base.config),
            "text_config": name,
            "vision_config": attention_name(base.visual.config),
        }
    )


def _bindings(base: Any) -> list[tower.Binding]:
    """The methods to bind on the model's tower and text layers."""
    text = base.language_model
    bound: list[tower.Binding] = [
        (layer.self_attn, "forward", text_forward)
        if hasattr(layer, "self_attn")
        else (layer.linear_attn, "forward", linear_forward)
        for layer in text.layers
    ]
    if family_of(base).has_deepstack:
        bound.append((text, DEEPSTACK_METHOD, tower.deepstack_by_index))
    return [*tower.bindings(base), *bound]


def _register_hooks(base: Any) -> list[tuple[str, int]]:
    family = family_of(base)
    handles = [
        ("", base.register_forward_pre_hook(_take_pack, with_kwargs=True)),
        ("", base.register_forward_hook(_keep_supervised, with_kwargs=True)),
    ]
    if family.has_windows:
        give = base.visual.register_forward_hook(tower.give_merged, with_kwargs=True, prepend=True)
        keep = base.visual.merger.register_forward_hook(tower.keep_merged)
        handles += [("visual", give), ("visual.merger", keep)]
    if family.has_deepstack:
        add = base.language_model.register_forward_pre_hook(tower.add_deepstack, with_kwargs=True)
        handles.append(("language_model", add))
    return [(name, handle.id) for name, handle in handles]
