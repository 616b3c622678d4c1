"""Names with `*`, `?`, `[...]` and braces, as shells and WebDataset's users write them -> paths."""

from __future__ import annotations

import glob
import itertools
import math
import re
from collections.abc import Iterator, Sequence

from mmpack.data.remote_roots import shown
from mmpack.errors import counted

_MOST = 100_000  # names that braces stand for
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")
_NUMBERED = re.compile(r"[-_.]?\d{3,}(?=\.tar$)")
_EVALUATION = {"val", "valid", "validation", "test", "dev", "eval"}  # words in names of shards
_SPLITS = {"train", "training", *_EVALUATION}


def is_pattern(path: str) -> bool:
    """Whether a path has braces or wildcards."""
    return _BRACES.search(path) is not None or glob.has_magic(path)


def matching(path: str) -> list[str]:
    """The paths that a pattern stands for: those of braces in their order, existing or not, and those that match
    wildcards, sorted.

    Raises:
        ValueError: there are none, or braces stand for more than 100,000.
    """
    found: list[str] = []
    for name in without_braces(path):
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not matches:
            raise ValueError(f"no file matches {name}; fix the path")
        found += matches
    return found


def without_braces(path: str) -> Iterator[str]:
    """The names that a path with braces stands for; of another path, itself.

    Raises:
        ValueError: they are more than 100,000.
    """
    texts, groups, end = [], list[Sequence[str]](), 0
    for match in _BRACES.finditer(path):
        first, last, listed = match.groups()
        texts.append(path[end : match.start()])
        groups.append(listed.split(",") if first is None else _Numbers(first, last))
        end = match.end()
    if (count := math.prod(map(len, groups))) > _MOST:
        raise ValueError(
            f"{shown(path)} stands for {counted(count, 'file')}, at most {_MOST:,} are read"
        )
    for values in itertools.product(*groups):
        yield "".join(text + value for text, value in zip(texts, values)) + path[end:]


class _Numbers(Sequence[str]):
    """The numbers of `{first..last}`, with as many digits as the longer one if one begins with 0."""

    def __init__(self, first: str, last: str) -> None:
        begin, end = int(first), int(last)
        self._numbers = range(begin, end + 1) if begin <= end else range(begin, end - 1, -1)
        padded = any(len(text) > 1 and text.startswith("0") for text in (first, last))
        self._digits = max(len(first), len(last)) if padded else 1

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> str:  # type: ignore[override]
        return f"{self._numbers[place]:0{self._digits}d}"


def without_number(name: str) -> str:
    """The name of a data file without the number of a shard: `train-00000-of-00010.parquet` is `train.parquet`,
    `train-000123.tar` is `train.tar`, and `000123.tar` is `*.tar`."""
    name = re.sub(r"-\d{5,}-of-\d{5,}", "", name)
    name = _NUMBERED.sub("", name)
    return "*.tar" if name == ".tar" else name


def mixed_splits(names: Sequence[str]) -> list[str]:
    """The splits that names of shards (`val-00000.tar`) are of, if there are several and one is for evaluation."""
    found = {"/".join(sorted(_SPLITS.intersection(re.split(r"[-_.]", name)))) for name in names}
    is_mixed = len(found) > 1 and any(_EVALUATION.intersection(one.split("/")) for one in found)
    return sorted(one or "(other)" for one in found) if is_mixed else []
