"""Names of another framework's module, replaced while a run lasts and restored after it, also after an error."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(module: str, makers: Mapping[str, Callable[[Any], Any]]) -> Iterator[None]:
    """Replace names of a module; only for an adapter that owns its process.

    Args:
        module: its dotted name; it is imported.
        makers: name -> what makes the replacement from the original.

    Raises:
        ValueError: the module lacks one of the names. Nothing was replaced.
    """
    found = importlib.import_module(module)
    if missing := [name for name in makers if not hasattr(found, name)]:
        raise ValueError(
            f"{module} has no {' and no '.join(missing)}, which mmpack replaces; use a version that the page of "
            "this framework in mmpack's docs lists"
        )
    originals = {name: getattr(found, name) for name in makers}
    try:
        for name, make in makers.items():
            setattr(found, name, make(originals[name]))
        yield
    finally:
        for name, original in originals.items():
            setattr(found, name, original)
