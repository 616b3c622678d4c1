"""Weights of the loss in rows and turns: numbers, or true and false.

A token's weight is its row's times its turn's; 1 if neither has one. Zero: no loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from mmpack.data.row_keys import LOSS_KEYS, ROW_WEIGHT_KEYS, is_absent
from mmpack.data.row_values import short
from mmpack.errors import RowError

# So that float32 holds products of weights, 1 / tokens and the sum over a step.
SMALLEST, LARGEST = 1e-6, 1e6
RANGE = "from 0.000001 to 1,000,000"


def is_weight(value: Any) -> bool:
    """Whether a number is a weight above zero."""
    return bool(SMALLEST <= value <= LARGEST)


def turn_weight(turn: Mapping[str, Any], role: str, where: str) -> float:
    """The weight of a turn, from its `loss`, `weight` and `loss_weight`. True and false say whether it has a loss,
    numbers also how much.

    Raises:
        RowError: another value, two that contradict each other, or a loss for a turn that is not the assistant's.
    """
    given = _given(turn, LOSS_KEYS)
    weights = {key: _weight(value, f"{where} has {key!r}") for key, value in given.items()}
    for key, weight in weights.items():
        if weight and role != "assistant":
            raise RowError(
                f"{where} is the {role}'s and asks for a loss with {key!r}",
                "remove it; --train-on-prompt (train_on_prompt) supervises all text",
            )
    return _agreed(given, weights, where)


def row_weight(row: Mapping[str, Any], read: frozenset[str]) -> float:
    """The weight of a row, from `weight`, `loss_weight` or `sample_weight`, which may be text (CSV).

    Args:
        read: columns that hold something else.

    Raises:
        RowError: it is not a weight, it is zero, or two differ.
    """
    if row.keys().isdisjoint(ROW_WEIGHT_KEYS):
        return 1.0
    given = _given(row, ROW_WEIGHT_KEYS - read)
    for key, value in given.items():
        if isinstance(value, str):
            try:
                given[key] = float(value)
            except ValueError:
                continue  # refused below, as it is written
    weights = {key: _weight(value, f"the row has {key!r}") for key, value in given.items()}
    weight = _agreed(given, weights, "the row")
    if not weight:
        name = next(key for key, one in weights.items() if not one)
        raise RowError(
            f"the row has {name!r} 0, so no token of it would be supervised", "drop the row"
        )
    return weight


def _given(holder: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    """The weights that are present; NaN is present, because it must not count as 1."""
    values = {key: holder[key] for key in sorted(keys) if key in holder}
    is_nan = (isinstance(value, Real) and value != value for value in values.values())
    return {
        key: value
        for (key, value), nan in zip(values.items(), is_nan)
        if nan or not is_absent(value)
    }


def _weight(value: Any, what: str) -> float:
    if isinstance(value, Real) and (value == 0 or is_weight(value)):
        return float(value)
    raise RowError(
        f"{what} {short(value)}; a weight of the loss is true, false, 0 or a number {RANGE}",
        "fix it, or remove it for a weight of 1",
    )


def _agreed(given: Mapping[str, Any], weights: Mapping[str, float], where: str) -> float:
    numbers = {weights[key] for key, value in given.items() if not isinstance(value, bool)}
    flags = {value for value in given.values() if isinstance(value, bool)}
    if len(numbers) > 1 or len(flags) > 1 or (flags and {bool(n) for n in numbers} - flags):
        raise RowError(f"{where} has {' and '.join(map(repr, given))} that differ", "keep one")
    return float(*(numbers or flags or {1.0}))
