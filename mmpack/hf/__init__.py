"""The only room that knows transformers."""

from mmpack.hf.callbacks import PackingCallback
from mmpack.hf.collator import PackCollator
from mmpack.hf.models import patch_model, unpatch_model
from mmpack.hf.resuming import last_checkpoint

__all__ = ["PackCollator", "PackingCallback", "last_checkpoint", "patch_model", "unpatch_model"]
