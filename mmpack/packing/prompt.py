"""Prompts for inference, encoded by the same rules as training data.

A model should be served inputs like those it was trained on: the same template, image positions and sizes, and
handling of control tokens that a user typed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mmpack.data.conversations import turns_of
from mmpack.data.encoder import Encoder
from mmpack.data.media_paths import MediaFolders
from mmpack.data.readers import RowGroup, RowReader
from mmpack.data.row_fields import detect_fields
from mmpack.data.row_keys import log_unread
from mmpack.data.tool_calls import tools_of
from mmpack.packing.assemble import assemble
from mmpack.types import Int64


class Prompt(NamedTuple):
    """Inputs for a model's `generate`, as arrays."""

    input_ids: Int64  # (T,)
    image_grid_thw: Int64  # (images, 3)
    position_ids: Int64  # (4, T)
    video_grid_thw: Int64  # (videos, 3); with timestamps, one row per temporal patch


def render_prompt(
    messages: Sequence[dict[str, Any]],
    encoder: Any,
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    tools: Sequence[dict[str, Any]] = (),
) -> Prompt:
    """The ids of a conversation up to the assistant's turn, placeholders expanded.

    Equal to the output of transformers' Qwen2-VL processor for the rendered chat, except that control tokens in a
    message stay text, as in training.

    Args:
        messages: `role`/`content` turns, the last one the user's or a tool's; `content` has one `<image>` per
            image, or OpenAI content parts.
        encoder: the `Encoder` used for training, or a transformers Qwen-VL processor. Its `missing_marker` and
            `verify` apply; its `media_dir` does not, because the caller's paths are trusted.
        images: paths, bytes or PIL images, in the order of their markers.
        videos: paths, bytes or lists of frames, in the order of their markers.
        tools: functions that the model may call; the chat template writes them.

    Returns:
        Inputs for `generate`, without pixels: `input_ids` (T,), `image_grid_thw` (images, 3), `position_ids` (4,
        T) and `video_grid_thw` (videos, 3), all int64.

    Raises:
        ValueError: a count, a role or an image is wrong; the message has advice.
    """
    encoder = Encoder.of(encoder)
    row = {"messages": list(messages)}
    unread = set[str]()
    turns = turns_of(row, detect_fields(row), unread, is_prompt=True)
    log_unread("messages", dict.fromkeys(unread, 1))
    reader = RowReader(encoder, RowGroup((), None, MediaFolders([".", os.sep])))
    messages_in_place = reader.place_media(turns, {"image": list(images), "video": list(videos)})
    sample = encoder.encode_prompt(messages_in_place, tools_of(list(tools)))
    pack = assemble([sample], pixels=False)
    grids = np.split(pack.grid_thw, [pack.num_images])
    return Prompt(pack.input_ids, grids[0], pack.position_ids, grids[1])
