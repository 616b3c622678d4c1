"""The inference side: a prompt's ids, made by the same rules as training data.

What a model is served is to be what it was trained on: same template, same image places and sizes,
same treatment of control tokens that a user typed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mmpack.data.conversations import detect_fields, turns_of
from mmpack.data.encoder import Encoder
from mmpack.data.media_paths import MediaFolders
from mmpack.data.readers import RowGroup, RowReader
from mmpack.packing.assemble import assemble
from mmpack.types import Int64


class Prompt(NamedTuple):
    """What a model's `generate` is given, as arrays."""

    input_ids: Int64  # (T,)
    image_grid_thw: Int64  # (images, 3)
    position_ids: Int64  # (4, T)
    video_grid_thw: Int64  # (videos, 3); with timestamps a row a temporal patch


def render_prompt(
    messages: Sequence[dict[str, Any]],
    encoder: Any,
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
) -> Prompt:
    """The ids of a conversation up to the assistant's turn, placeholders expanded.

    Equal to what transformers' Qwen2-VL processor gives for the rendered chat, except that control
    tokens in a message stay text, as in training.

    Args:
        messages: `role`/`content` turns that end with the user's; `content` holds one `<image>` per
            image, or OpenAI content parts.
        encoder: the `Encoder` of the training, or a transformers Qwen-VL processor. Its `missing_marker` and
            `verify` hold here too; `media_dir` does not, a caller's own paths are trusted.
        images: paths, bytes or PIL images, in the order of their markers.
        videos: paths, bytes or lists of frames, the same.

    Returns:
        What `generate` is given but the pixels: `input_ids` (T,), `image_grid_thw` (images, 3),
        `position_ids` (4, T) and `video_grid_thw` (videos, 3), all int64.

    Raises:
        ValueError: counts, roles or an image are wrong; says what to do.
    """
    encoder = Encoder.of(encoder)
    row = {"messages": list(messages)}
    turns = turns_of(row, detect_fields(row), is_prompt=True)
    reader = RowReader(encoder, RowGroup((), None, MediaFolders([".", os.sep])))
    messages_in_place = reader.place_media(turns, {"image": list(images), "video": list(videos)})
    pack = assemble([encoder.encode_prompt(messages_in_place)], pixels=False)
    grids = np.split(pack.grid_thw, [pack.num_images])
    return Prompt(pack.input_ids, grids[0], pack.position_ids, grids[1])
