"""An image or a video in a row -> a reference to a file inside the media folders, or to bytes.

Paths in rows are not trusted: with links resolved, they must lie inside the folders that the user named; URLs are
refused; only regular files are opened. A file can change after its row was read, so `open_media` checks again. A
folder that the user named may be the URL of a root in object storage; a path in a row then means an object under
it (`mmpack.data.remote_roots`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, BinaryIO

from mmpack.data.archives import open_member
from mmpack.data.limits import MAX_PATH
from mmpack.data.media_keys import entry_of
from mmpack.data.path_forms import (
    base64_error,
    decoded_base64,
    decoded_uri,
    frames_in,
    other_unicode_form,
    path_of_url,
)
from mmpack.data.remote_files import MOST_AT_ONCE, error_words, exists, size_of
from mmpack.data.remote_objects import HEADER, open_object
from mmpack.data.remote_roots import absolute, is_inside, is_remote, object_in
from mmpack.errors import RowError, a_kind, names
from mmpack.regular_files import NotRegularError, open_regular, regular_stat
from mmpack.types import ImageRef, TarMember, VideoRef
from mmpack.video_spec import is_rate

DATA_URIS = "data:"  # in the list of folders: data URIs in rows are allowed
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # at least two letters: C:\ is not a URL
_OF_VIDEO = 1 << 20  # bytes of a video in object storage that are read first


class MediaFolders:
    """The folders that images and videos may be in, on this machine or in object storage (URLs). A relative path
    starts from `root` if given, else it must be in one of the folders only.

    Raises:
        ValueError: a URL is not one of a root, see `remote_root`.
    """

    def __init__(
        self,
        folders: Sequence[str | os.PathLike[str]],
        *,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        names = [os.fspath(folder) for folder in folders]
        self._takes_data_uris = DATA_URIS in names
        self._names = [absolute(name) for name in names if name != DATA_URIS]
        self._folders = [os.path.realpath(name) for name in self._names if not is_remote(name)]
        self._remote = [name for name in self._names if is_remote(name)]
        self._roots = self._names if root is None else [absolute(root)]
        self._starts_remote = any(map(is_remote, self._roots))

    @property
    def names(self) -> list[str]:
        """The folders, and "data:" if data URIs are allowed."""
        return [*self._names, *([DATA_URIS] if self._takes_data_uris else [])]

    @property
    def are_remote(self) -> bool:
        """Whether some are in object storage, so that reading waits."""
        return bool(self._remote)

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
            if not is_remote(full) and os.path.isdir(full):
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
        return VideoRef(found.path, found.data, member=found.member, version=found.version)

    def _frame(self, value: Any) -> ImageRef:
        source, options = entry_of(value, "image")
        if options is not None:
            key = next(iter(options.given))
            raise RowError(f"a frame of a video has {key!r}", "give it to the video")
        return self.locate(source)

    def locate(self, value: Any, kind: str = "image") -> ImageRef:
        """Resolve one image of a row: a path, bytes, `{"path": ..., "bytes": ...}`, `{"base64": ...}`, a PIL image
        or the member of a tar file; `kind` is the word for it in errors.

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
        if is_remote(full):  # reading its header tells whether it exists
            return ImageRef(full)
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
        """The path of an existing file or folder that a row's path means, or the URL of an object.

        Raises:
            RowError: there is none, or it is in a place that is not allowed.
        """
        if not path or "\0" in path or not _is_unicode(path):
            raise RowError(f"{kind} path {path!a:.100} is not a file name", "fix the path")
        written, path = path, path_of_url(path, kind)
        if _URL.match(path):
            raise RowError(f"{kind} {path:.100} is a URL, not a file", "download it first")
        if len(path) > MAX_PATH and (error := base64_error(written, kind)):
            raise error
        if self._starts_remote and not (os.path.isabs(path) and self._folders):
            try:
                return self._in_storage(path, kind)
            except RowError as error:
                raise base64_error(written, kind) or error from None
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

    def _in_storage(self, path: str, kind: str) -> str:
        """`_resolved` where a root is in object storage; looks for objects only if there are several roots."""
        places = [
            object_in(root, path, kind) if is_remote(root) else self._on_disk(root, path)
            for root in self._roots
        ]
        if len(places) == 1:
            return places[0]
        try:
            found = {place: None for place in places if self._is_there(place)}
        except OSError as error:
            what, advice = error_words(error)
            raise RowError(f"{kind} {error.filename:.300} {what}", advice) from None
        if len({place if is_remote(place) else os.path.realpath(place) for place in found}) > 1:
            raise _ambiguous(path, list(found), kind)
        if not found:
            where = " or ".join(self._roots)
            raise RowError(
                f"{kind} {path:.200} does not exist in {where}",
                "fix the path or --media-dir (media_dir)",
            )
        return next(iter(found))

    def _on_disk(self, root: str, path: str) -> str:
        """The file in a local root that a row's path means, as written there or in another form."""
        full = os.path.normpath(os.path.join(root, path))
        if "\\" in path and not self._is_there(full):
            full = os.path.normpath(os.path.join(root, path.replace("\\", "/")))
        return full if os.path.exists(full) else other_unicode_form(full) or full

    def _is_there(self, place: str) -> bool:
        return exists(place) if is_remote(place) else self.contains(place) and os.path.exists(place)

    def real_path(self, path: str, kind: str) -> str:
        """The path with links resolved as they are now; of an object, its URL.

        Raises:
            RowError: it is outside the folders.
        """
        if is_remote(path):
            real, is_in = path, self.contains(path)
        else:
            real = os.path.realpath(path)
            is_in = any(_is_inside(real, folder) for folder in self._folders)
        if is_in:
            return real
        leads = "" if real == path else f" (a link to {real:.200})"
        raise RowError(
            f"{kind} {path:.200}{leads} is outside {' and '.join(self._names)}",
            "add its folder with --media-dir (media_folders)",
        )

    def contains(self, path: str) -> bool:
        """Whether a path, with links resolved, or a URL is inside the folders."""
        if is_remote(path):
            return any(path == root or is_inside(path, root) for root in self._remote)
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
        found = [place for place in places if self._is_there(place)]
        if len({os.path.realpath(place) for place in found}) > 1:
            raise _ambiguous(path, found, kind)
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
        return ImageRef("data URI", decoded_uri(head, body, kind))


def open_media(
    path: str,
    kind: str,
    folders: MediaFolders | None = None,
    buffering: int = -1,
    member: TarMember | None = None,
    version: str = "",
) -> BinaryIO:
    """Open the file or the object of an image or a video for reading; `kind` is the word for it in errors.

    Args:
        folders: folders that must contain it, links resolved; None: any folder on this machine.
        buffering: as in `open`; of an object, bytes that are read first.
        member: where it is in the file, if that is a tar file.
        version: of an object, as in `ImageRef`.

    Raises:
        RowError: it does not exist, is outside the folders, or is not a regular file; or the tar file has
            changed, or an object cannot be read, or is not of this version.
    """
    if is_remote(path):
        return _open_object(path, kind, folders, buffering, member, version)
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


def _open_object(
    url: str,
    kind: str,
    folders: MediaFolders | None,
    first: int,
    member: TarMember | None,
    version: str,
) -> BinaryIO:
    if folders is None:
        raise RowError(
            f"{kind} {url:.300} is in object storage, and no root there was named",
            "name it with --media-dir (media_dir, media_folders)",
        )
    folders.real_path(url, kind)
    try:
        if first < 1 and kind == "image" and version:  # its pixels are needed
            first = min(size_of(url, version) if member is None else member.length, MOST_AT_ONCE)
        first = max(first, HEADER if kind == "image" else _OF_VIDEO)
        if member is not None:
            return open_member(url, member, kind, buffering=first, version=version)
        return open_object(url, version, first)
    except RowError as error:
        if member is not None:
            raise
        raise RowError(f"{kind} {error.error}", error.advice) from None
    except OSError as error:
        what, advice = error_words(error)
        raise RowError(f"{kind} {url:.300} {what}", advice) from None


def _ambiguous(path: str, found: Sequence[str], kind: str) -> RowError:
    return RowError(
        f"{kind} {path:.200} is ambiguous: {found[0]:.200} and {found[1]:.200} exist",
        "give each data set its own root, the 'media_dir' of its dataset_info.json entry, or pack them "
        "separately with one --media-dir (media_dir) each",
    )


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
