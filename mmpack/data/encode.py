"""Sample -> EncodedSample: chat template, label mask, one marker per image or video.

The tokenizer's own chat template is rendered once with the row's text and once with stand-ins for
it, which tells which characters the template wrote. Only special tokens *the template* wrote
become special tokens; everything between two of them (role, newline and content together) is
tokenised in one piece with `split_special_tokens=True`. So the ids equal those of the rendered
text, and a control token typed by a user stays text and opens no turn.

Where videos have timestamps, their marker becomes as many as the video has temporal patches, each behind
its time and between vision tokens of its own, all within those the template wrote: the expansion of
transformers' `Qwen3VLProcessor`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmpack.data import images, videos
from mmpack.data.chat_template import Clip, Fixed, Layout, Template, strings, texts_of
from mmpack.data.chunks import chunks
from mmpack.errors import BadRow, OnError, RowError, Skip, counting, refuse
from mmpack.types import IGNORE, EncodedSample, ImageRef, Message, Sample
from mmpack.vision_spec import VisionSpec


class _Vision(NamedTuple):
    """What the images and videos of a sample are in a pack."""

    grids: list[tuple[int, int, int]]
    steps: list[float]  # M-RoPE positions a temporal patch
    timestamps: list[list[str]]  # of each video that has them


def encode_sample(
    sample: Sample,
    tokenizer: Any,
    vision: VisionSpec,
    *,
    train_on_prompt: bool = False,
    mask_history: bool = False,
) -> EncodedSample:
    """Encode one sample: ids with one marker per image or video, labels, grids from the headers.

    Args:
        sample: what `read_samples` gives.
        tokenizer, vision, train_on_prompt, mask_history: as in `encode_samples`, which is the same for
            many, and faster.

    Returns:
        Its (n,) ids and labels and (I, 3) grids; no pixel is decoded.

    Raises:
        ValueError: it cannot be used; names file and row.
    """
    (encoded,) = encode_samples(
        [sample], tokenizer, vision, train_on_prompt=train_on_prompt, mask_history=mask_history
    )
    return encoded


def encode_samples(
    samples: Iterable[Sample],
    tokenizer: Any,
    vision: VisionSpec,
    *,
    train_on_prompt: bool = False,
    mask_history: bool = False,
    on_error: OnError = "raise",
) -> Iterator[EncodedSample]:
    """Encode samples: ids with one marker per image or video, labels, grids from the headers.

    Supervised are the assistant's text and the token that ends its turn (`<|im_end|>`), not the
    newline after it. A token that the tokenizer makes from template text and answer together
    (an answer that opens with a newline) counts as answer. A document (`mmpack.data.readers.read_documents`)
    has no template: its texts, its images as `<|vision_start|>` marker `<|vision_end|>`, and
    `<|endoftext|>`; supervised is all but the images.

    Args:
        samples: conversations or documents.
        tokenizer: a transformers fast tokenizer with a chat template, or a processor holding one.
        vision: pixel budget and ids.
        train_on_prompt: supervise all text, but no vision token.
        mask_history: supervise the last answer only.
        on_error: "raise" on an unusable sample, "skip" it with a warning, a `Skip`, or a list to append it
            to; see `read_samples`, with which it can share one.

    Yields:
        One `EncodedSample` per usable sample, in order.

    Raises:
        ValueError: a sample cannot be used and `on_error` is "raise": no supervised token, an image
            or video that cannot be read, a template that rewrites its text. Names file and row. Or too many
            were skipped.
    """
    on_error = counting(on_error)
    encode = encoder(tokenizer, vision, train_on_prompt=train_on_prompt, mask_history=mask_history)
    for chunk in chunks(samples):
        if isinstance(on_error, Skip):
            on_error.saw("encoding", len(chunk))
        yield from encode(chunk, on_error)


def encoder(
    tokenizer: Any, vision: VisionSpec, *, train_on_prompt: bool = False, mask_history: bool = False
) -> Callable[[Sequence[Sample], OnError], Iterator[EncodedSample]]:
    """`encode_samples` for who has samples a chunk at a time: what a chunk teaches of the chat
    template serves the next."""
    if train_on_prompt and mask_history:
        raise ValueError(
            "train_on_prompt supervises every turn and mask_history the last; pick one"
        )
    return _Encoder(
        tokenizer, vision, train_on_prompt=train_on_prompt, mask_history=mask_history
    ).encode


def encode_prompt(
    messages: tuple[Message, ...], tokenizer: Any, vision: VisionSpec
) -> EncodedSample:
    """Encode a conversation up to where the assistant is to speak; nothing is supervised."""
    sample = Sample(messages, source="prompt", row=0)
    (encoded,) = _Encoder(tokenizer, vision, is_prompt=True).encode([sample], "raise")
    return encoded


class _Encoder:
    """What many samples share: the template, the images' and videos' places, the timestamps' ids."""

    def __init__(self, tokenizer: Any, vision: VisionSpec, **options: bool) -> None:
        self._vision = vision
        self._template = Template(tokenizer, vision, **options)
        self._timestamp_ids = functools.cache(
            lambda text: tuple(self._template.tokenize([text])[0])
        )

    def encode(self, samples: Sequence[Sample], on_error: OnError) -> Iterator[EncodedSample]:
        laid_out = []
        to_tokenize: list[str] = []
        for sample in samples:
            try:
                layout = self._template.layout(sample.messages)
                media = self._place(sample)
            except ValueError as error:
                _report(sample, error, on_error)
                continue
            to_tokenize += strings(layout, texts_of(sample.messages))
            laid_out.append((sample, layout, media))
        ids = iter(self._template.tokenize(to_tokenize))
        for sample, layout, media in laid_out:
            encoded = self._finish(sample, layout, media, ids)
            if encoded.is_supervised or self._template.is_prompt:
                yield encoded
            else:
                unsupervised = RowError(
                    "no token of the row is supervised", "it has no answer to learn"
                )
                _report(sample, unsupervised, on_error)

    def _place(self, sample: Sample) -> _Vision:
        spec = self._vision
        placed = _Vision([], [], [])
        for ref in sample.media:
            if isinstance(ref, ImageRef):
                placed.grids.append(spec.image_grid(*(ref.size or images.probe(ref))))
                placed.steps.append(1.0)
                continue
            video = videos.probe(ref) if ref.size is None else ref
            assert video.size is not None
            index, fps = videos.sampled(video, spec)
            patches, height, width = spec.video_grid(len(index), *video.size)
            if spec.video_spec.has_timestamps:
                placed.grids.extend([(1, height, width)] * patches)
                placed.steps.extend([1.0] * patches)
                times = spec.video_spec.timestamps(index, fps, spec.temporal_patch_size)
                placed.timestamps.append(times)
            else:
                placed.grids.append((patches, height, width))
                placed.steps.append(spec.temporal_step(index, video.num_frames, fps))
        return placed

    def _finish(
        self,
        sample: Sample,
        layout: Layout,
        media: _Vision,
        tokenized: Iterator[list[int]],
    ) -> EncodedSample:
        input_ids: list[int] = []
        labels: list[int] = []
        timestamps = iter(media.timestamps)
        spec = self._vision
        for item in layout:
            if isinstance(item, Clip):
                for text in next(timestamps):
                    clip = (
                        spec.vision_start_token_id,
                        spec.video_token_id,
                        spec.vision_end_token_id,
                    )
                    input_ids += (*self._timestamp_ids(text), *clip)
                labels += [IGNORE] * (len(input_ids) - len(labels))
                continue
            if isinstance(item, Fixed):
                input_ids += item.ids
                labels += item.labels
                continue
            ids = next(tokenized)
            input_ids += ids
            # An answer is from the first token that differs from those of the template's text alone
            # to the first that differs from those of template text and answer.
            start = _common_prefix(ids, item.before_ids) if item.is_answer else len(ids)
            stop = _common_prefix(ids, next(tokenized)) if item.ends_early else len(ids)
            labels += [IGNORE] * start + ids[start:stop] + [IGNORE] * (len(ids) - max(start, stop))
        return EncodedSample(
            input_ids=np.array(input_ids, dtype=np.int32),
            labels=np.array(labels, dtype=np.int32),
            grid_thw=np.array(media.grids, dtype=np.int32).reshape(-1, 3),
            media=sample.media,
            vision=self._vision,
            source=sample.source,
            row=sample.row,
            temporal_step=np.array(media.steps, dtype=np.float32)
            if set(media.steps) - {1}
            else None,
        )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for n, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return n
    return min(len(a), len(b))


def _report(sample: Sample, error: ValueError, on_error: OnError) -> None:
    text, advice = (error.error, error.advice) if isinstance(error, RowError) else (str(error), "")
    refuse(BadRow(sample.source, sample.row, text, advice), on_error)
