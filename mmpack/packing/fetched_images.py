"""The images of a pack that are in object storage, read several at once before they are decoded one after
another."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from mmpack.data.media_paths import MediaFolders, open_media
from mmpack.data.remote_files import IN_FLIGHT
from mmpack.data.remote_roots import is_remote
from mmpack.types import ImageRef, Media


class FetchedImages:
    """Reads images in threads that end when all are read. Their bytes are kept until this object is gone: those
    of one pack.

    Args:
        media: images and videos, of which only images in object storage are read, each once; with folders that
            must contain them.
    """

    def __init__(self, media: Iterable[tuple[Media, MediaFolders | None]]) -> None:
        self._found: dict[Hashable, Future[bytes]] = {}
        pool = None
        for ref, folders in media:
            if isinstance(ref, ImageRef) and ref.data is None and is_remote(ref.path):
                pool = pool or ThreadPoolExecutor(IN_FLIGHT)
                key = _key(ref, folders)
                if key not in self._found:
                    self._found[key] = pool.submit(_content, ref, folders)
        if pool is not None:
            pool.shutdown(wait=False)  # after what was submitted

    def image(self, ref: ImageRef, folders: MediaFolders | None) -> ImageRef:
        """The image with its bytes, if it was read.

        Raises:
            RowError: it could not be read.
        """
        found = self._found.get(_key(ref, folders))
        return ref if found is None else replace(ref, data=found.result())


def own_images(
    media: Iterable[tuple[Media, MediaFolders | None]], is_own: Iterator[bool]
) -> Iterator[tuple[Media, MediaFolders | None]]:
    """The images of which a rank has a frame; `is_own` tells it of each image, videos left out."""
    for ref, folders in media:
        if isinstance(ref, ImageRef) and next(is_own, True):
            yield ref, folders


def _key(ref: ImageRef, folders: MediaFolders | None) -> Hashable:
    return ref.path, ref.member, ref.version, id(folders)


def _content(ref: ImageRef, folders: MediaFolders | None) -> bytes:
    with open_media(ref.path, "image", folders, member=ref.member, version=ref.version) as file:
        return file.read()
