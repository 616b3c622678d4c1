"""The inference side: a prompt's ids, made by the same rules as training data.

What a model is served is to be what it was trained on: same template, same image places and sizes,
same treatment of control tokens that a user typed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mmpack.data.conversations import detect_fields, turns_of
from mmpack.data.encode import encode_prompt
from mmpack.data.media_paths import MediaFolders
from mmpack.data.readers import RowReader
from mmpack.packing.assemble import assemble
from mmpack.types import Int64
from mmpack.vision_spec import VisionSpec


class Prompt(NamedTuple):
    """What a model's `generate` is given, as arrays."""

    input_ids: Int64  # (T,)
    image_grid_thw: Int64  # (images, 3)
    position_ids: Int64  # (4, T)
    video_grid_thw: Int64  # (videos, 3); with timestamps a row a temporal patch


def render_prompt(
    messages: Sequence[dict[str, Any]],
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    *,
    tokenizer: Any,
    vision: VisionSpec,
    missing_marker: Literal["refuse", "prepend"] = "refuse",
) -> Prompt:
    """The ids of a conversation up to the assistant's turn, placeholders expanded.

    Equal to what transformers' Qwen2-VL processor gives for the rendered chat, except that control
    tokens in a message stay text, as in training.

    Args:
        messages: `role`/`content` turns that end with the user's; `content` holds one `<image>` per
            image, or OpenAI content parts.
        images: paths, bytes or PIL images, in the order of their markers.
        videos: paths, bytes or lists of frames, the same.
        tokenizer: a transformers fast tokenizer with a chat template, or a processor holding one.
        vision: pixel budget and ids, as in training.
        missing_marker: images but no marker anywhere: "refuse", or "prepend" the markers to the
            first turn, as LLaMA-Factory's inference engines do.

    Returns:
        What `generate` is given but the pixels: `input_ids` (T,), `image_grid_thw` (images, 3),
        `position_ids` (4, T) and `video_grid_thw` (videos, 3), all int64.

    Raises:
        ValueError: counts, roles or an image are wrong; says what to do.
    """
    row = {"messages": list(messages)}
    turns = turns_of(row, detect_fields(row), is_prompt=True)
    anywhere = MediaFolders([".", os.sep])  # a caller's own paths are trusted, a row's are not
    reader = RowReader(None, anywhere, missing_marker)
    messages_in_place = reader.place_media(turns, {"image": list(images), "video": list(videos)})
    pack = assemble([encode_prompt(messages_in_place, tokenizer, vision)], pixels=False)
    grids = np.split(pack.grid_thw, [pack.num_images])
    return Prompt(pack.input_ids, grids[0], pack.position_ids, grids[1])
