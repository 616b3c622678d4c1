"""References to the images and videos of a sample: a file, a member of a tar file, or bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

from mmpack.media_options import MediaOptions


class TarMember(NamedTuple):
    """Where an image or a video is in a tar file, which is not unpacked.

    Attributes:
        name: of the member.
        offset, length: of its bytes in the tar file.
        header: CRC-32 of its name, size and type as the header before its bytes has them.
        archive_bytes: size of the tar file.
    """

    name: str
    offset: int
    length: int
    header: int
    archive_bytes: int


class _Named:
    """What both references are called."""

    __slots__ = ()
    path: str
    member: TarMember | None

    @property
    def name(self) -> str:
        """What errors call it."""
        if self.member is None:
            return self.path
        return f"{self.member.name} (byte {self.member.offset:,} of {self.path})"

    @property
    def short_name(self) -> str:
        """The name of its file, or of a tar file's member, without folders."""
        return os.path.basename(self.path if self.member is None else self.member.name)


@dataclass(frozen=True, slots=True)
class ImageRef(_Named):
    """A reference to an image. Only `mmpack.data.images` opens it.

    Attributes:
        path: its file, or if `data` holds the image, a name for errors.
        data: the encoded image (bytes of a JPEG, PNG, ...) or a PIL image; None: read the file.
        size: (height, width) in pixels if known.
        options: its own pixel limits or size; None: the spec's.
        member: where it is in the file, if that is a tar file; None: it is the whole file.
        version: of an object in object storage, what identified its content when its row was read (bytes, and
            ETag or modification time); it must be the same when its pixels are read. Empty: not known, or a file.
    """

    path: str
    data: Any = None
    size: tuple[int, int] | None = None
    options: MediaOptions | None = None
    member: TarMember | None = None
    version: str = ""


@dataclass(frozen=True, slots=True)
class VideoRef(_Named):
    """A reference to a video: a file, which only `mmpack.data.videos` opens, or a list of frames.

    Attributes:
        path: its file, or a name for errors.
        data: the encoded video as bytes; None: read the file.
        frames: its frames, already sampled, if it is a list of images.
        num_frames: number of frames in the file or the list.
        fps: frames per second of the file or the list, if known.
        size: (height, width) of its frames in pixels, if known.
        options: its own pixel limits, size and sampling; None: the spec's.
        folder: the folder whose pictures are its frames, if the row names a folder.
        member: where it is in the file, if that is a tar file; None: it is the whole file.
        version: as in `ImageRef`.
    """

    path: str
    data: Any = None
    frames: tuple[ImageRef, ...] = ()
    num_frames: int = 0
    fps: float | None = None
    size: tuple[int, int] | None = None
    options: MediaOptions | None = None
    folder: str | None = None
    member: TarMember | None = None
    version: str = ""


Media = ImageRef | VideoRef
