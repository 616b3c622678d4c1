"""Names of another framework's module or class, replaced while a run lasts and restored after it, also after an
error."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: str | type, makers: Mapping[str, Callable[[Any], Any]]) -> Iterator[None]:
    """Replace names of a module or class; only for an adapter that owns its process.

    Args:
        owner: a module's dotted name, which is imported, or a class.
        makers: name -> what makes the replacement from the original.

    Raises:
        ValueError: the owner lacks one of the names. Nothing was replaced.
    """
    found: Any = importlib.import_module(owner) if isinstance(owner, str) else owner
    if missing := [name for name in makers if not hasattr(found, name)]:
        raise ValueError(
            f"{owner if isinstance(owner, str) else owner.__name__} has no {' and no '.join(missing)}, which "
            "mmpack replaces; use a version that the page of this framework in mmpack's docs lists"
        )
    originals = {name: getattr(found, name) for name in makers}
    try:
        for name, make in makers.items():
            setattr(found, name, make(originals[name]))
        yield
    finally:
        for name, original in originals.items():
            setattr(found, name, original)
