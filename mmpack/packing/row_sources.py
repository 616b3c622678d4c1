"""The sources of a stream: rows or data files, each with its encoder and, in a mixture, its weight."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from mmpack.data.encoder import Encoder
from mmpack.data.media_paths import MediaFolders
from mmpack.data.readers import RowGroup, media_folders
from mmpack.errors import OnError
from mmpack.packing import overflow
from mmpack.packing.loss_weights import MIX_MARK
from mmpack.packing.mixture import check_alike, check_pairs
from mmpack.packing.stream_files import DataFiles, is_paths


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """A source of a stream.

    Attributes:
        source: as in `PackStream`, of paths `DataFiles`. encoder: of its rows; None: they are encoded.
        group: the encoder's fields and media folders.
        name: its name in a mixture; else empty. weight: its share of the mixture's tokens.
    """

    source: Any
    encoder: Encoder | None
    group: RowGroup | None
    name: str = ""
    weight: Fraction = Fraction(1)

    @property
    def has_files(self) -> bool:
        """Whether it reads data files."""
        return isinstance(self.source, DataFiles)

    @property
    def settings(self) -> dict[str, Any]:
        """What the sources of a mixture must have in common."""
        if self.encoder is None:
            return {}
        spec = json.loads(json.dumps(asdict(self.encoder.vision)))
        text = self.encoder.settings()
        names = ("the tokenizer", "typed_tokens", "template_args")
        return {**{f"the spec's {n}": v for n, v in spec.items()}, **{n: text[n] for n in names}}

    @property
    def rows_name(self) -> str:
        """What errors call it."""
        return f"{self.name}{MIX_MARK}the stream" if self.name else "the stream"


def row_sources(
    source: Any, encoder: Any, cost: Any, on_overflow: overflow.OnOverflow
) -> tuple[RowSource, ...]:
    """The sources of a `PackStream`, from its arguments.

    Raises:
        ValueError: a mixture's name or weight is not usable, it has no encoder for a source, encoders have
            different specs, or an encoder does not go with a stream.
    """
    if not isinstance(source, Mapping):
        return (_row_source(source, encoder, cost, on_overflow, "", 1),)
    check_pairs(source)
    if isinstance(encoder, Mapping) and (more := [one for one in encoder if one not in source]):
        raise ValueError(f"there is an encoder for {more[0]!r}, which is no source of the mixture")
    found = []
    for name, (rows, weight) in source.items():
        own = encoder.get(name) if isinstance(encoder, Mapping) else encoder
        if isinstance(encoder, Mapping) and name not in encoder:
            raise ValueError(
                f"the source {name!r} of the mixture has no encoder; pass encoder={{{name!r}: ..., ...}}"
            )
        found.append(_row_source(rows, own, cost, on_overflow, name, weight))
    check_alike({one.name: one.settings for one in found})
    return tuple(found)


def on_error_of(sources: Sequence[RowSource]) -> OnError | None:
    """The `on_error` of the sources' encoders; None: they have none.

    Raises:
        ValueError: they differ.
    """
    found = [(one.name, one.encoder.on_error) for one in sources if one.encoder is not None]
    for name, on_error in found[1:]:
        first = found[0][1]
        if not (on_error == first if isinstance(first, str) else on_error is first):
            raise ValueError(
                f"the encoders of {found[0][0]!r} and {name!r} differ in on_error, and a stream has one for all "
                "rows; pass on_error=..."
            )
    return found[0][1] if found else None


def _row_source(
    source: Any, encoder: Any, cost: Any, on_overflow: overflow.OnOverflow, name: str, weight: float
) -> RowSource:
    if encoder is None:
        if is_paths(source):
            raise ValueError(
                "data files need an encoder; pass an Encoder or a processor as encoder"
            )
        return RowSource(
            source=source, encoder=None, group=None, name=name, weight=Fraction(float(weight))
        )
    encoder = Encoder.of(encoder, cost)
    overflow.check_split(on_overflow, encoder.stage)
    groups = list(encoder.groups(source if is_paths(source) else iter(())))
    group = groups[0]  # for its media folders
    if is_paths(source):
        source = DataFiles(groups)
        group = RowGroup((), None, MediaFolders(media_folders(groups)))
    if any(one.limit is not None for one in groups):
        raise ValueError(
            "num_samples and max_samples of a mapping are for plans, and a stream has none; remove them, and "
            "limit the source"
        )
    return RowSource(
        source=source, encoder=encoder, group=group, name=name, weight=Fraction(float(weight))
    )
