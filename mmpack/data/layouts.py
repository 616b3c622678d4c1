"""A rendered conversation with its texts left out: what a chat template writes, with ids and labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from mmpack.data.row_weights import RANGE, is_weight
from mmpack.data.thoughts import closing, filled, thought_end
from mmpack.errors import RowError
from mmpack.types import Sample


@dataclass(frozen=True, slots=True)
class Fixed:
    """Template text without row text: the same for every conversation of a shape."""

    text: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    turn: int = -1  # the assistant's turn that it is part of; -1: of none


@dataclass(frozen=True, slots=True)
class Slot:
    """The template's text around texts of the row, between two special tokens: before each text, and after the
    last. An answer is its slot's only text, or comes after its thought."""

    around: tuple[str, ...]
    is_answer: bool = False
    before_ids: tuple[int, ...] = ()  # for an answer: the ids of the text before it alone
    ends_early: bool = False  # for an answer: the text after it is not part of it
    has_thought: bool = False  # its first text is a thought of its own
    masks_thought: bool = False  # the thought, also one in the answer's text, is not supervised
    turn: int = -1  # as in `Fixed`

    def until_answer(self, text: str) -> str:
        """The slot up to the end of its thought, or to its first text."""
        if self.has_thought:
            return self.around[0] + text + closing(self.around[1])
        return self.around[0] + text[: thought_end(text)]


class Clip(NamedTuple):
    """A video's marker, for families that repeat it for each temporal patch."""

    text: str
    turn: int = -1


Layout = tuple[Fixed | Slot | Clip, ...]  # a rendered conversation with its texts left out


class Shape(NamedTuple):
    """The layout of a conversation, and the thoughts that the template leaves out: numbers of texts."""

    layout: Layout
    dropped: frozenset[int] = frozenset()


def turn_weights(sample: Sample) -> list[float] | None:
    """The weight of each turn's tokens, and last that of tokens of no turn; None: all are 1.

    Raises:
        RowError: a weight is out of range.
    """
    weights = [sample.weight, *(message.weight for message in sample.messages)]
    if all(weight == 1 for weight in weights):
        return None
    bad = [weight for weight in weights if not is_weight(weight)]
    if bad:
        raise RowError(f"a weight of the loss is {bad[0]!r}, not {RANGE}", "fix the weight")
    return [*(sample.weight * weight for weight in weights[1:]), sample.weight]


def strings(layout: Layout, texts: Iterable[str]) -> Iterator[str]:
    """The strings to tokenize: each slot whole, then without the text after an answer if that ends it early, then
    up to the end of its thought if that is not supervised."""
    remaining = iter(texts)
    for item in layout:
        if isinstance(item, Slot):
            own = list(islice(remaining, len(item.around) - 1))
            text = filled(own, (*item.around[:-1], ""))
            yield text + item.around[-1]
            if item.ends_early:
                yield text
            if item.masks_thought:
                yield item.until_answer(own[0])


def around_texts(layout: Layout) -> list[str]:
    """What the template writes before each text, and after the last."""
    around = [""]
    for item in layout:
        if isinstance(item, Slot):
            around[-1] += item.around[0]
            around += item.around[1:]
        else:
            around[-1] += item.text
    return around


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    for n, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return n
    return min(len(a), len(b))


def is_thought_twice(layout: Layout, texts: Iterable[str]) -> bool:
    """Whether the template writes a thought of its own before a text that begins with one."""
    remaining = iter(texts)
    for item in layout:
        if isinstance(item, Slot):
            first, *_ = islice(remaining, len(item.around) - 1)
            if thought_end(first) and "</think>" in item.around[0]:
                return True
    return False
