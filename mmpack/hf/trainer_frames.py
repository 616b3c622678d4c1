"""What Trainer does not tell its callbacks: their order, itself, and what its methods were given.

It is found among the callers. Where it is not (another Trainer, another way to call), nothing is done, and who
asks says what is missing then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler


class LastCallback(TrainerCallback):
    """Stands last in Trainer's list, where all others have said whether to log, evaluate and save."""

    def __init__(self, check: Callable[..., None]) -> None:
        self._check = check

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._check(args, state, control, model)

    on_epoch_end = on_step_end


def take_places(first: TrainerCallback, last: TrainerCallback) -> None:
    """Make a callback the first of its handler's, so that reporters see what it puts into logs, and another
    one the last.

    Trainer puts reporters in front of a user's callbacks. Where the handler is not found, values are printed
    and in `log_history`, but reporters have gone by, and a run that has diverged is logged before it ends.
    """
    handler = callers(first)[0]
    if handler is not None:
        others = [callback for callback in handler.callbacks if callback not in (first, last)]
        handler.callbacks[:] = [first, *others, last]


def callers(callback: TrainerCallback, name: str = "") -> tuple[Any, Any, Any]:
    """(handler that calls the callback, its Trainer, what the Trainer's methods have under a name), which
    Trainer tells callbacks nothing of; None of what is not found."""
    frame, handler = sys._getframe(1), None
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, CallbackHandler) and callback in found.callbacks:
            handler = found
        elif handler is not None and getattr(found, "callback_handler", None) is handler:
            if not name or name in frame.f_locals:
                return handler, found, frame.f_locals.get(name)
        frame = frame.f_back  # type: ignore[assignment]
    return handler, None, None
