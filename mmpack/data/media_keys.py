"""The keys of one image or video in a row -> where it is, and its options.

A content part (`{"type": "image", "path": ..., "max_pixels": ...}`) and an entry of the columns `images` and
`videos` have the same keys: those of transformers' chat format, of `datasets` (`bytes`, `path`), of OpenAI's
`image_url`, and the options of `qwen-vl-utils`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmpack.errors import RowError, a_kind, names
from mmpack.media_options import IMAGE_KEYS, SAMPLING_KEYS, VIDEO_KEYS, MediaOptions
from mmpack.types import Media, VideoRef

RATE_KEYS = ("sample_fps", "raw_fps")  # of a list of frames


def source_keys(kind: str) -> tuple[str, ...]:
    """The keys that say where an image or a video is."""
    keys = (kind, f"{kind}_url", "path", "url", "base64", "bytes", "value")
    return (*keys, "frames") if kind == "video" else keys


def media_keys(kind: str) -> tuple[str, ...]:
    """All keys with a meaning, honored or refused, of an image or a video."""
    return (*source_keys(kind), *VIDEO_KEYS, *RATE_KEYS, "detail")


def described(given: Mapping[str, Any], kind: str) -> tuple[Any, MediaOptions | None]:
    """(source, options) of an image or a video given as an object. Keys without a meaning are not looked at.

    Returns:
        source: what `MediaFolders.locate` and `locate_video` take; None if no key says it.

    Raises:
        RowError: two keys contradict each other, or a value is out of range; the message names the key.
    """
    named = {key: given[key] for key in media_keys(kind) if key in given}
    named = {
        key: value
        for key, value in named.items()
        if value is not None and not (isinstance(value, float) and value != value)  # NaN: a gap
    }
    sources = [key for key in source_keys(kind) if key in named]
    if len(sources) > 1:  # an empty text or list beside another key is a gap, too
        sources = [k for k in sources if not isinstance(named[k], (str, list)) or named[k]]
    if len(sources) > 1 and sources != [
        "path",
        "bytes",
    ]:  # the latter is how `datasets` names bytes
        raise RowError(f"{a_kind(kind)} has both {sources[0]!r} and {sources[1]!r}", "keep one")
    if named.get("detail", "auto") != "auto":
        raise RowError(
            f"'detail' {named['detail']!a:.40} of {a_kind(kind)} is not supported",
            "remove it, or give 'max_pixels'",
        )
    if kind == "image":
        wrong = [key for key in (*VIDEO_KEYS, *RATE_KEYS) if key in named and key not in IMAGE_KEYS]
        if wrong:
            raise RowError(f"an image has {wrong[0]!r}, which only videos have", "remove it")
    source: Any = named[sources[0]] if sources else None
    if "bytes" in sources:
        source = {"bytes": named["bytes"], "path": named.get("path")}
    elif sources == ["base64"]:
        source = {"base64": source}
    options = {key: named[key] for key in VIDEO_KEYS if key in named}
    inner = None
    if isinstance(source, Mapping) and not sources[0].startswith(("bytes", "path", "base64")):
        source, inner = entry_of(source, kind)
    if kind == "video":
        source = _with_rate(source, named, options)
    if inner is not None:
        twice = sorted(inner.given.keys() & options.keys())
        if twice:
            raise RowError(f"{a_kind(kind)} has {twice[0]!r} twice", "keep one")
        options |= inner.given
    return source, MediaOptions(**options) if options else None


def entry_of(value: Any, kind: str) -> tuple[Any, MediaOptions | None]:
    """(source, options) of an entry of `images` or `videos`, in any form.

    Raises:
        RowError: as `described`, or a key is not known.
    """
    if not isinstance(value, Mapping):
        return value, None
    unknown = [key for key in value if key not in (*media_keys(kind), "type")]
    source, options = described(value, kind)
    if source is None:
        raise RowError(
            f"{a_kind(kind)} needs 'path' or 'bytes', got {names(value)}",
            "rename its keys",
        )
    if unknown:
        raise RowError(
            f"{a_kind(kind)} has the unknown key {unknown[0]!a:.60}",
            f"remove it; keys are {', '.join(media_keys(kind))}",
        )
    return source, options


def with_options(ref: Media, options: MediaOptions | None) -> Media:
    """The reference with options. The `fps` of a list of frames is the list's rate.

    Raises:
        RowError: it is a list of frames, and the options would sample it again.
    """
    if options is None:
        return ref
    if not isinstance(ref, VideoRef):
        return replace(ref, options=options)
    if not ref.frames:
        return replace(ref, options=options)
    given: dict[str, Any] = options.given
    fps = given.pop("fps", ref.fps)
    sampling = [key for key in SAMPLING_KEYS if key in given]
    if sampling:
        raise RowError(
            f"{sampling[0]!r} is given for a list of frames, which is already sampled",
            "remove it, or leave frames out of the list",
        )
    return replace(ref, fps=fps, options=MediaOptions(**given) if given else None)


def _with_rate(source: Any, named: dict[str, Any], options: dict[str, Any]) -> Any:
    """The source of a video with the rate of its frames, which is removed from `options`."""
    rate = named.get("sample_fps")
    if named.get("raw_fps", rate) != rate:
        raise RowError(
            "'raw_fps' of a list of frames is not supported", "give its rate as 'sample_fps'"
        )
    is_list = isinstance(source, (list, tuple))
    if rate is not None and "fps" in options and options["fps"] != rate:
        raise RowError("'sample_fps' and 'fps' contradict each other", "keep one")
    if isinstance(source, Mapping) and source.get("fps") is not None and "fps" in options:
        raise RowError("a video has 'fps' twice", "keep one")
    if rate is None and not is_list:
        return source
    fps = options.pop("fps", None)
    return {"frames": source, "fps": fps if rate is None else rate}
