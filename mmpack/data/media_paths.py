"""An image or a video in a row -> a reference to a file inside the media folders, or to bytes.

Paths in rows are not trusted: with links resolved, they must lie inside the folders that the user named; URLs are
refused; only regular files are opened. A file can change after its row was read, so `open_media` checks again.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Sequence
from typing import Any, BinaryIO

from mmpack.data.archives import open_member
from mmpack.data.media_keys import entry_of
from mmpack.data.path_forms import (
    base64_error,
    decoded_base64,
    frames_in,
    other_unicode_form,
    path_of_url,
)
from mmpack.errors import RowError, a_kind, names
from mmpack.regular_files import NotRegularError, open_regular, regular_stat
from mmpack.types import ImageRef, TarMember, VideoRef
from mmpack.video_spec import is_rate

DATA_URIS = "data:"  # in the list of folders: data URIs in rows are allowed
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # at least two letters: C:\ is not a URL
_MOST_PATH = 4096  # characters; longer ones are no path of Linux or macOS


class MediaFolders:
    """The folders that images and videos may be in. A relative path starts from `root` if given, else it must be
    in one of the folders only."""

    def __init__(
        self,
        folders: Sequence[str | os.PathLike[str]],
        *,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        names = [os.fspath(folder) for folder in folders]
        self._takes_data_uris = DATA_URIS in names
        self._names = [os.path.abspath(name) for name in names if name != DATA_URIS]
        self._folders = [os.path.realpath(name) for name in self._names]
        self._roots = self._names if root is None else [os.path.abspath(root)]

    @property
    def names(self) -> list[str]:
        """The folders, and "data:" if data URIs are allowed."""
        return [*self._names, *([DATA_URIS] if self._takes_data_uris else [])]

    def locate_video(self, value: Any) -> VideoRef:
        """Resolve one video of a row: a path, also of a folder of frames, bytes, `{"path": ..., "bytes": ...}`,
        `{"base64": ...}`, or frames that `locate` takes, as a list or in `{"frames": [...], "fps": ...}`.

        Raises:
            RowError: it is none of these, the file does not exist, or it is in a place that is not allowed.
        """
        frames, fps, folder = value, None, None
        if isinstance(value, dict) and "frames" in value:
            frames, fps = value["frames"], value.get("fps")
            if fps is not None and not is_rate(fps):
                raise RowError(
                    f"the fps of a video must be a number from 0.001 to 10,000, got {fps!a:.40}",
                    "fix the row",
                )
        if isinstance(frames, dict) and frames.get("bytes") is None:
            frames = frames.get("path", frames)
        if isinstance(frames, str) and not frames.startswith(DATA_URIS):
            full = self._resolved(frames, "video")
            if os.path.isdir(full):
                frames, folder = frames_in(full), full
            elif fps is not None:
                raise RowError(
                    f"video {full:.200} has a 'sample_fps', but is not a list or a folder of frames",
                    "sample it with 'fps'",
                )
        if isinstance(frames, (list, tuple)):
            if not frames:
                raise RowError("a video is an empty list of frames", "drop it and its <video>")
            refs = tuple(map(self._frame, frames))
            rate = None if fps is None else float(fps)
            return VideoRef(refs[0].path, frames=refs, fps=rate, folder=folder)
        if hasattr(value, "getbands"):
            raise RowError("a video is given as a single image", "give a list of frames, or a path")
        found = self.locate(frames, "video")
        return VideoRef(found.path, found.data, member=found.member)

    def _frame(self, value: Any) -> ImageRef:
        source, options = entry_of(value, "image")
        if options is not None:
            key = next(iter(options.given))
            raise RowError(f"a frame of a video has {key!r}", "give it to the video")
        return self.locate(source)

    def locate(self, value: Any, kind: str = "image") -> ImageRef:
        """Resolve one image of a row: a path, bytes, `{"path": ..., "bytes": ...}`, `{"base64": ...}`, a PIL image or
        the member of a tar file; `kind` is the word for it in errors.

        Raises:
            RowError: it is none of these, the file does not exist, or it is in a place that is not allowed.
        """
        if isinstance(value, ImageRef) and value.member is not None:
            self.real_path(value.path, kind)
            return value
        if isinstance(value, dict) and value.get("base64") is not None:
            return self._decode_base64(value["base64"], kind)
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
            if data is None and path is None:
                raise RowError(
                    f"{a_kind(kind)} needs 'path' or 'bytes', got {names(value)}",
                    "rename its keys",
                )
            if data is None:
                return self.locate(path, kind)
            if not isinstance(data, (bytes, bytearray)):
                raise RowError(
                    f"the bytes of {a_kind(kind)} must be bytes, got {type(data).__name__}",
                    "give its path",
                )
            name = (
                os.path.basename(path) if isinstance(path, str) and _is_unicode(path) else "bytes"
            )
            return ImageRef(name, bytes(data))
        if isinstance(value, (bytes, bytearray)):
            return ImageRef("bytes", bytes(value))
        if isinstance(value, str):
            return self._locate_path(value, kind)
        if hasattr(value, "getbands") and hasattr(value, "size"):  # a PIL image, without PIL here
            width, height = value.size
            return ImageRef("image in memory", value, (height, width))
        raise RowError(
            f"{a_kind(kind)} must be a path, bytes or {'a PIL image' if kind == 'image' else 'a list of frames'}, "
            f"got {type(value).__name__}",
            "give its path",
        )

    def _locate_path(self, path: str, kind: str) -> ImageRef:
        if path.startswith(DATA_URIS):
            return self._decode_uri(path, kind)
        full = self._resolved(path, kind)
        try:
            regular_stat(full)
        except NotRegularError as error:
            raise _not_a_file(error, kind) from None
        except OSError as error:
            raise RowError(
                f"{kind} {full:.300} cannot be opened: {error.strerror}",
                "fix the path or its permissions",
            ) from None
        return ImageRef(full)

    def _resolved(self, path: str, kind: str) -> str:
        """The path of an existing file or folder that a row's path means.

        Raises:
            RowError: there is none, or it is in a place that is not allowed.
        """
        if not path or "\0" in path or not _is_unicode(path):
            raise RowError(f"{kind} path {path!a:.100} is not a file name", "fix the path")
        written, path = path, path_of_url(path, kind)
        if _URL.match(path):
            raise RowError(f"{kind} {path:.100} is a URL, not a file", "download it first")
        if len(path) > _MOST_PATH and (error := base64_error(written, kind)):
            raise error
        full = self._full(path, kind)
        if "\\" in path and not (self.contains(full) and os.path.exists(full)):
            full = self._full(path.replace("\\", "/"), kind)  # written on Windows
        if not self.contains(full):
            raise base64_error(written, kind) or RowError(
                f"{kind} {path:.200} is outside {' and '.join(self._names)}",
                "add its folder with --media-dir (media_dir), or move it",
            )
        if os.path.exists(full):
            return full
        if (other := other_unicode_form(full)) and self.contains(other):
            return other
        roots = "" if len(self._roots) == 1 else f", nor in {' or '.join(self._roots[1:])}"
        raise base64_error(written, kind) or RowError(
            f"{kind} {full:.300} does not exist{roots}",
            "fix the path or --media-dir (media_dir)",
        )

    def real_path(self, path: str, kind: str) -> str:
        """The path with links resolved as they are now.

        Raises:
            RowError: it is outside the folders.
        """
        real = os.path.realpath(path)
        if any(_is_inside(real, folder) for folder in self._folders):
            return real
        leads = "" if real == path else f" (a link to {real:.200})"
        raise RowError(
            f"{kind} {path:.200}{leads} is outside {' and '.join(self._names)}",
            "add its folder with --media-dir (media_folders)",
        )

    def contains(self, path: str) -> bool:
        """Whether a path, with links resolved, is inside the folders."""
        real = os.path.realpath(path)
        return any(_is_inside(real, folder) for folder in self._folders)

    def _full(self, path: str, kind: str) -> str:
        """The path in the root that has it; in the first root if none has it.

        Raises:
            RowError: several roots have different files of this name.
        """
        places = [os.path.normpath(os.path.join(root, path)) for root in self._roots]
        if len(places) == 1 or os.path.isabs(path):
            return places[0]
        found = [place for place in places if self.contains(place) and os.path.exists(place)]
        if len({os.path.realpath(place) for place in found}) > 1:
            raise RowError(
                f"{kind} {path:.200} is ambiguous: {found[0]:.200} and {found[1]:.200} exist",
                "give each data set its own root, the 'media_dir' of its dataset_info.json entry, or pack them "
                "separately with one --media-dir (media_dir) each",
            )
        return found[0] if found else places[0]

    def _decode_base64(self, text: Any, kind: str) -> ImageRef:
        if isinstance(text, str) and text.startswith(DATA_URIS):
            return self._decode_uri(text, kind)
        if not self._takes_data_uris:
            raise RowError(
                f"{a_kind(kind)} is given as 'base64' in the row; this is not allowed by default",
                f"allow it with --allow-data-uri ({DATA_URIS!r} in media_dir)",
            )
        return ImageRef("base64", decoded_base64(text, kind))

    def _decode_uri(self, uri: str, kind: str) -> ImageRef:
        head, _, body = uri.partition(",")
        if not self._takes_data_uris:
            raise RowError(
                f"{kind} {head:.60},... is a data URI; these are not allowed by default",
                f"allow them with --allow-data-uri ({DATA_URIS!r} in media_dir)",
            )
        if not head.endswith(";base64"):
            raise RowError(f"{kind} {head:.60},... is not base64", "encode it as base64")
        try:
            return ImageRef("data URI", base64.b64decode(body, validate=True))
        except (binascii.Error, ValueError):
            raise RowError(f"{kind} {head:.60},... is broken base64", "encode it again") from None


def open_media(
    path: str,
    kind: str,
    folders: MediaFolders | None = None,
    buffering: int = -1,
    member: TarMember | None = None,
) -> BinaryIO:
    """Open the file of an image or a video for reading; `kind` is the word for it in errors.

    Args:
        folders: folders that must contain it, links resolved; None: any folder.
        buffering: as in `open`.
        member: where it is in the file, if that is a tar file.

    Raises:
        RowError: it does not exist, is outside the folders, or is not a regular file; or the tar file has changed.
    """
    real = path if folders is None else folders.real_path(path, kind)
    try:
        # `real` contains no links, unless one was created since
        links = folders is None
        if member is not None:
            return open_member(real, member, kind, follow_link=links, buffering=buffering)
        return open_regular(real, follow_link=links, buffering=buffering)
    except NotRegularError as error:
        error.path = path
        raise _not_a_file(error, kind) from None
    except FileNotFoundError:
        raise RowError(f"{kind} {path} does not exist", "fix the path") from None
    except OSError as error:
        raise RowError(
            f"{kind} {path} cannot be opened: {error.strerror}", "fix the path or its permissions"
        ) from None


def _not_a_file(error: NotRegularError, kind: str) -> RowError:
    return RowError(
        f"{kind} {str(error.path):.300} is {error.kind}, not a regular file",
        "fix the path",
    )


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
