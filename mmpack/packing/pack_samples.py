"""The item of a `PackedDataset` or `PackStream`: the samples of one pack, and the policy for images that do not
decode.

Making an item opens no image. `PackCollator` opens them when it assembles the item, in the same DataLoader worker.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mmpack.data.media_paths import MediaFolders
from mmpack.errors import BadImageError, BadRow, counted
from mmpack.packing.loss_weights import MIX_MARK
from mmpack.types import EncodedSample, Media

if TYPE_CHECKING:
    from mmpack.packing.assemble import PixelBuffer
    from mmpack.packing.pack_source import DroppedSegments  # which needs torch

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class MediaPolicy:
    """The media folders of an item and the policy for a sample whose image does not decode, from the attributes of
    its `PackedDataset` or `PackStream`.

    Attributes:
        folders: of all samples, if `of_sources` is empty.
        of_sources: name of a mixture's source -> folders of its samples; None: any folder.
        passes: the pass of each sample, in a stream.
        left_out: the samples that `load` dropped, each with its pass.
    """

    on_bad_image: Literal["raise", "drop"]
    max_bad: float
    folders: MediaFolders | None
    dropped: DroppedSegments
    of_sources: Mapping[str, MediaFolders | None] = field(default_factory=dict)
    passes: Sequence[int] = ()
    left_out: list[tuple[int, BadRow]] = field(default_factory=list)

    def load(self, samples: Sequence[EncodedSample], buffer: PixelBuffer) -> list[EncodedSample]:
        """Decode the images and videos of an item's samples into the buffer.

        Returns:
            The samples that are kept; if none are, one token without labels.

        Raises:
            BadImageError: an image does not decode and `on_bad_image` is "raise"; the message gives file and row.
            ValueError: too many samples were dropped, or `max_bad` is not a share.
        """
        self.left_out.clear()
        if self.on_bad_image == "drop":
            with_media = sum(bool(sample.media) for sample in samples)
            self.dropped.saw(len(samples), with_media, self.max_bad)
        kept = []
        for number, sample in enumerate(samples):
            try:
                buffer.load(sample, self._folders_of(sample))
                kept.append(sample)
            except BadImageError as error:
                if self.on_bad_image == "raise":
                    raise
                _log.warning("dropped %s", error)
                reason = str(error).partition(": ")[2]
                bad = BadRow(sample.source, sample.row, reason)
                self.left_out.append((self.passes[number] if self.passes else 0, bad))
                self.dropped.drop(error, self.max_bad)
        return kept or [EncodedSample.filler(1, samples[0].vision)]

    def media_of(
        self, samples: Sequence[EncodedSample]
    ) -> Iterator[tuple[Media, MediaFolders | None]]:
        """The images and videos of samples, each with the folders that it may be in."""
        for sample in samples:
            folders = self._folders_of(sample)
            for ref in sample.media:
                yield ref, folders

    def _folders_of(self, sample: EncodedSample) -> MediaFolders | None:
        if not self.of_sources or not sample.media:
            return self.folders
        return self.of_sources[sample.source.partition(MIX_MARK)[0]]


_NO_FIELDS = (
    "an item of a packed data set is the samples of one pack, without fields such as input_ids; make batches of "
    "items with PackCollator: Trainer(data_collator=PackCollator(model=model), ...)"
)


class _NoFields(dict[str, Any]):
    """What a pack's `vars` are: transformers' default collator looks for labels in them."""

    def __contains__(self, name: object) -> bool:
        raise TypeError(_NO_FIELDS)


class _Item:
    """Tells collators that are not for packs what is missing."""

    __slots__ = ()

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return _NoFields()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PackSamples(_Item, Sequence[EncodedSample]):
    """The samples of one pack, one per segment, already truncated if needed.

    `PackCollator` makes a batch of one or several items, `mmpack.assemble(item)` a `Pack`.

    Attributes:
        samples: at least one.
        capacity: maximum tokens in the pack.
        policy: its media folders, and what to do with images and videos that do not decode.
        resume: a stream's state after this pack (`mmpack.packing.stream`), else None.
    """

    samples: Sequence[EncodedSample]
    capacity: int
    policy: MediaPolicy
    resume: bytes | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            raise TypeError(_NO_FIELDS)
        return self.samples[index]

    def __repr__(self) -> str:
        tokens = sum(sample.num_tokens for sample in self.samples)
        media = sum(len(sample.media) for sample in self.samples)
        return (
            f"PackSamples({tokens:,} of {self.capacity:,} tokens, {counted(len(self), 'segment')}, "
            f"{media:,} images and videos)"
        )
