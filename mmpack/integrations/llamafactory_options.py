"""LLaMA-Factory's options that mean something for packs: what they do here, or why they are refused.

Every option of its `DataArguments` and `ProcessorArguments`, and every other one that would change what a step
computes, is in one of the tables; `tests/test_llamafactory.py` compares them with the installed version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmpack.vision_spec import VisionSpec

_TEMPLATE = (
    "the tokenizer's chat template writes turns, thoughts and tools",
    "leave it out, or pack with mmpack pack (--template-arg, --typed-tokens) and pass packed: FOLDER",
)
_PLANNED = (
    "packs are planned from all rows at once",
    "leave it out",
)
_LOSS_ALONE = ("evaluation on packs computes the loss alone", "leave it out")
_OTHER_LOSS = ("it needs the logits of every token, and a pack has those of answers only",) + (
    "leave it out",
)
_OTHER_TRAINER = ("it does not train in the Trainer that mmpack's packs go to", "leave it out")
_NOT_QWEN = ("Qwen-VL models do not have it", "leave it out")
_NO_STREAM = (
    "packs are planned from all rows at once, not from a stream",
    "leave it out, or train on a PackStream in a script (docs/pretraining.md)",
)

# option -> (values that are accepted because they say what happens anyway, why others do nothing, advice)
REFUSED: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "stage": (("sft", "pt"), "mmpack packs conversations (sft) and documents (pt)",
              "use LLaMA-Factory's own command"),
    "do_train": ((True,), "this command trains", "set do_train: true"),
    "packing": ((True,), "rows are always packed, and do not attend to each other", "leave it out"),
    "streaming": ((False,), *_NO_STREAM),
    "buffer_size": ((), *_NO_STREAM),
    "mix_strategy": (("concat",), "all data sets are packed together, each row once",
                     "list rows of a data set more often, or train on a PackStream of "
                     "datasets.interleave_datasets in a script"),
    "interleave_probs": ((), "all data sets are packed together, each row once", "leave it out"),
    "preprocessing_batch_size": ((), *_PLANNED),
    "tokenized_path": ((), "packs are kept in output_dir/packs and reused",
                       "leave it out, or pack with mmpack pack and pass packed: FOLDER"),
    "ignore_pad_token_for_loss": ((True,), "packs have no padding", "leave it out"),
    "tool_format": ((), *_TEMPLATE),
    "default_system": ((), *_TEMPLATE),
    "enable_thinking": ((True,), *_TEMPLATE),
    "preserve_thinking": ((False,), *_TEMPLATE),
    "split_special_tokens": ((False,), *_TEMPLATE),
    "disable_shuffling": ((False,), "the plan determines the order of rows", "leave it out"),
    "image_do_pan_and_scan": ((False,), *_NOT_QWEN),
    "crop_to_patches": ((False,), *_NOT_QWEN),
    "use_audio_in_video": ((False,), *_NOT_QWEN),
    "audio_sampling_rate": ((), *_NOT_QWEN),
    "eval_num_beams": ((), *_LOSS_ALONE),
    "do_predict": ((False,), *_LOSS_ALONE),
    "predict_with_generate": ((False,), *_LOSS_ALONE),
    "compute_accuracy": ((False,), *_LOSS_ALONE),
    "include_effective_tokens_per_second": ((False,), "the log has pack/tokens_per_second", "leave it out"),
    "use_dft_loss": ((False,), *_OTHER_LOSS),
    "use_asft_loss": ((False,), *_OTHER_LOSS),
    "use_eaft_loss": ((False,), *_OTHER_LOSS),
    "upcast_lmhead_output": ((False,), "the loss of a pack is computed in float32 without it", "leave it out"),
    "enable_liger_kernel": ((False,), "it replaces the forward that mmpack's loss is in", "leave it out"),
    "shift_attn": ((False,), "it mixes the rows of a pack", "leave it out"),
    "mixture_of_depths": ((), "it replaces the layers that mmpack patches", "leave it out"),
    "use_unsloth": ((False,), "it replaces the layers that mmpack patches", "leave it out"),
    "use_unsloth_gc": ((False,), "it calls layers without what a pack needs", "leave it out"),
    "use_kt": ((False,), *_OTHER_TRAINER),
    "use_mca": ((False,), *_OTHER_TRAINER),
    "use_hyper_parallel": ((False,), *_OTHER_TRAINER),
}  # fmt: skip

# Options that act on rows, and do not apply to a packed store.
OF_ROWS = (
    "dataset", "eval_dataset", "dataset_dir", "media_dir", "train_on_prompt", "mask_history", "max_samples",
    "val_size", "eval_on_each_dataset", "preprocessing_num_workers", "image_max_pixels", "image_min_pixels",
    "video_max_pixels", "video_min_pixels", "video_fps", "video_maxlen",
)  # fmt: skip
# Options of data that act, or hold anyway, with rows and with a store.
ALWAYS = ("template", "cutoff_len", "neat_packing", "overwrite_cache", "data_shared_file_system")
# flash_attn -> `impl` of `patch_model`
ATTENTION = {"auto": "auto", "sdpa": "sdpa", "fa2": "flash2", "fa3": "flash3"}


@dataclass(frozen=True, kw_only=True)
class OwnOptions:
    """The options that this command has beside LLaMA-Factory's, and those of its that mmpack applies.

    Attributes:
        packed, eval_packed: folders that `mmpack pack` wrote; None: the data sets of the YAML are packed.
        impl: see `mmpack.hf.patch_model`.
        frozen: parts of the model that are not trained, for the cost of packs.
    """

    packed: str | None
    eval_packed: str | None
    impl: str
    frozen: tuple[str, ...]


def taken_options(args: dict[str, Any], frozen_by_default: Mapping[str, bool]) -> OwnOptions:
    """Take the options out of `args` that LLaMA-Factory does not know or must not apply, and refuse those that
    do not apply to packs.

    Args:
        args: all options of the run, changed in place.
        frozen_by_default: the default of `freeze_vision_tower` and the like.

    Raises:
        ValueError: names an option that does not apply, and says why.
    """
    packed, eval_packed = args.pop("packed", None), args.pop("eval_packed", None)
    for name, folder in (("packed", packed), ("eval_packed", eval_packed)):
        if folder is not None and not isinstance(folder, str):
            raise ValueError(f"{name} is a folder that mmpack pack wrote, got {folder!r:.80}")
    if eval_packed is not None and packed is None:
        raise ValueError(
            "eval_packed does not apply without packed; pack the training rows too, or name them in eval_dataset"
        )
    for name, value in args.items():
        accepted, why, advice = REFUSED.get(name, ((value,), "", ""))
        if value is not None and value not in accepted:
            raise ValueError(f"{name}: {_shown(value)} does not apply: {why}; {advice}")
        if packed is not None and name in OF_ROWS and value is not None:
            instead = "pass eval_packed" if name in ("eval_dataset", "val_size") else "leave it out"
            raise ValueError(
                f"{name}: {_shown(value)} does not apply: the rows of {packed} are packed; {instead}, or pack "
                f"again"
            )
    if args.get("do_train") is None:  # LLaMA-Factory would load the model and end
        args["do_train"] = True
    attention = str(args.pop("flash_attn", "auto"))
    if attention not in ATTENTION:
        raise ValueError(
            f"flash_attn: {attention} does not apply: packs need attention within segments; use one of "
            f"{', '.join(ATTENTION)}"
        )
    parts = {
        "vision": "freeze_vision_tower",
        "merger": "freeze_multi_modal_projector",
        "language": "freeze_language_model",
    }
    frozen = (part for part, name in parts.items() if args.get(name, frozen_by_default[name]))
    return OwnOptions(
        packed=packed, eval_packed=eval_packed, impl=ATTENTION[attention], frozen=tuple(frozen)
    )


def _shown(value: Any) -> str:
    """A value as YAML writes it."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{text:.80}"


def vision_with_budgets(
    vision: VisionSpec, model_args: Any, given: Mapping[str, Any]
) -> VisionSpec:
    """The processor's spec within LLaMA-Factory's budgets, which also apply where the YAML does not name them.

    LLaMA-Factory resizes an image to its budget before the processor does to its own, so the narrower of both
    holds.

    Args:
        model_args: with `image_max_pixels`, `image_min_pixels`, `video_max_pixels`, `video_min_pixels`,
            `video_fps` and `video_maxlen`.
        given: the options of the YAML.

    Raises:
        ValueError: a budget cannot hold: no size is within both, or it is for a frame and the processor's is for
            all frames together.
    """
    low, high = _both(vision, model_args, "image")
    vision = replace(vision, min_pixels=low, max_pixels=high)
    video = vision.video
    if video is None:
        return vision
    if not video.budgets_clip:
        low, high = _both(video, model_args, "video")
        video = replace(video, min_pixels=low, max_pixels=high)
    elif named := [n for n in ("video_max_pixels", "video_min_pixels") if given.get(n) is not None]:
        raise ValueError(
            f"{named[0]} does not apply: it is for one frame, and this model's processor limits all frames of a "
            "video together; leave it out, or pack with mmpack pack --video-max-pixels and pass packed: FOLDER"
        )
    frames = int(model_args.video_maxlen)
    few = min(video.min_frames, frames)
    rate = float(model_args.video_fps)
    return replace(vision, video=replace(video, fps=rate, max_frames=frames, min_frames=few))


def _both(processor: Any, model_args: Any, kind: str) -> tuple[int, int]:
    smallest, largest = (getattr(model_args, f"{kind}_{end}_pixels") for end in ("min", "max"))
    low, high = max(smallest, processor.min_pixels), min(largest, processor.max_pixels)
    if low > high:
        raise ValueError(
            f"{kind}_max_pixels: {largest} does not apply: the processor makes no {kind} smaller than "
            f"{processor.min_pixels} pixels; raise it"
        )
    return low, high
