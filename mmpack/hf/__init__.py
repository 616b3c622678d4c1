"""Packs in transformers' models and Trainer."""

from mmpack.hf.callbacks import PackingCallback
from mmpack.hf.checkpoints import last_checkpoint
from mmpack.hf.collator import PackCollator
from mmpack.hf.model_patch import patch_model, unpatch_model
from mmpack.hf.weight_count import loss_denominator

__all__ = [
    "PackCollator",
    "PackingCallback",
    "last_checkpoint",
    "loss_denominator",
    "patch_model",
    "unpatch_model",
]


def __dir__() -> list[str]:
    return __all__
