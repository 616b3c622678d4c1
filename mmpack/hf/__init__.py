"""The only room that knows transformers."""

from mmpack.hf.callbacks import PackingCallback
from mmpack.hf.collator import PackCollator
from mmpack.hf.models import patch_model, unpatch_model

__all__ = ["PackCollator", "PackingCallback", "patch_model", "unpatch_model"]
