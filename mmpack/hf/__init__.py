"""The only folder that knows transformers."""

from mmpack.hf.callbacks import PackingCallback
from mmpack.hf.collator import PackCollator
from mmpack.hf.loading import load_processor
from mmpack.hf.patch import patch_model, unpatch_model
from mmpack.hf.resuming import last_checkpoint

__all__ = [
    "PackCollator",
    "PackingCallback",
    "last_checkpoint",
    "load_processor",
    "patch_model",
    "unpatch_model",
]
