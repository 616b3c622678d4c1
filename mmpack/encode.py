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
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from mmpack import images, videos
from mmpack.errors import BadRow, OnError, RowError, report
from mmpack.types import IGNORE, EncodedSample, ImageRef, Media, Message, Sample, VideoRef
from mmpack.vision import VisionSpec

_CHUNK = 256  # samples tokenised in one call; tokenizers spreads a call over the cores
_END_OF_DOCUMENT = "<|endoftext|>"  # of Qwen's base models; the instruct ones' eos ends a turn
_STAND_IN = "\ue000{}\ue001"  # private use characters: no template tests for them


@dataclass(frozen=True, slots=True)
class _Fixed:
    """What the template writes alone: the same for every conversation of a shape."""

    text: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Span:
    """What the template has between two special tokens: its text around one text of the row."""

    before: str
    after: str
    is_answer: bool = False
    before_ids: tuple[int, ...] = ()  # an answer's: those of `before` alone
    ends_early: bool = False  # an answer's: `after` is not of it


class _Clip(NamedTuple):
    """A video's marker, where it becomes several."""

    text: str


_Layout = tuple[_Fixed | _Span | _Clip, ...]  # a rendered conversation with its texts left out


class _Vision(NamedTuple):
    """What the images and videos of a sample are in a pack."""

    grids: list[tuple[int, int, int]]
    steps: list[float]  # M-RoPE positions a temporal patch
    timestamps: list[list[str]]  # of each video that has them


class _Piece(NamedTuple):
    """What stands between two special tokens of a rendered template."""

    before: str = ""
    slot: int | None = None  # which text of the conversation; None: template text alone
    after: str = ""


def encode_sample(
    sample: Sample,
    tokenizer: Any,
    vision: VisionSpec,
    *,
    train_on_prompt: bool = False,
    mask_history: bool = False,
) -> EncodedSample:
    """Encode one sample; `encode_samples` is the same for many, faster."""
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
    (an answer that opens with a newline) counts as answer. A document (`mmpack.readers.read_documents`)
    has no template: its texts, its images as `<|vision_start|>` marker `<|vision_end|>`, and
    `<|endoftext|>`; supervised is all but the images.

    Args:
        samples: conversations or documents.
        tokenizer: a transformers fast tokenizer with a chat template, or a processor holding one.
        vision: pixel budget and ids.
        train_on_prompt: supervise all text, but no vision token.
        mask_history: supervise the last answer only.
        on_error: "raise" on an unusable sample, "skip" it with a warning, or a list to append it to.

    Yields:
        One `EncodedSample` per usable sample, in order.

    Raises:
        ValueError: a sample cannot be used and `on_error` is "raise": no supervised token, an image
            or video that cannot be read, a template that rewrites its text. Names file and row.
    """
    encode = encoder(tokenizer, vision, train_on_prompt=train_on_prompt, mask_history=mask_history)
    remaining = iter(samples)
    while chunk := list(islice(remaining, _CHUNK)):
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
    """What many samples share: the special tokens, and the layout of every conversation shape."""

    def __init__(
        self,
        tokenizer: Any,
        vision: VisionSpec,
        *,
        train_on_prompt: bool = False,
        mask_history: bool = False,
        is_prompt: bool = False,
    ) -> None:
        self._vision = vision
        self._media_of = {vision.image_token_id: "image", vision.video_token_id: "video"}
        self._vision_ids = {
            *self._media_of,
            vision.vision_start_token_id,
            vision.vision_end_token_id,
        }
        self._train_on_prompt = train_on_prompt
        self._mask_history = mask_history
        self._is_prompt = is_prompt
        self._render: Callable[..., str] = functools.partial(
            tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=is_prompt
        )
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._special_tokens = {
            token_id: token.content
            for token_id, token in self._tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self._special_ids = {token: token_id for token_id, token in self._special_tokens.items()}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._pieces = re.compile(
            "|".join([_STAND_IN.format(r"(\d+)"), *map(re.escape, longest_first)])
        )
        self._timestamp_ids = functools.cache(lambda text: tuple(self._tokenize([text])[0]))
        self._layouts: dict[tuple[tuple[str, ...], ...], _Layout] = {}

    def encode(self, samples: Sequence[Sample], on_error: OnError) -> Iterator[EncodedSample]:
        laid_out = []
        to_tokenize: list[str] = []
        for sample in samples:
            try:
                layout = self._layout(sample.messages)
                media = self._place(sample)
            except ValueError as error:
                _report(sample, error, on_error)
                continue
            to_tokenize += _strings(layout, _texts(sample.messages))
            laid_out.append((sample, layout, media))
        ids = iter(self._tokenize(to_tokenize))
        for sample, layout, media in laid_out:
            encoded = self._finish(sample, layout, media, ids)
            if encoded.is_supervised or self._is_prompt:
                yield encoded
            else:
                error = RowError("no token of the row is supervised", "it has no answer to learn")
                _report(sample, error, on_error)

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

    def _layout(self, messages: tuple[Message, ...]) -> _Layout:
        """The layout of the conversation's shape, checked against the template's own rendering."""
        if messages[0].role == "document":
            return self._document_layout(messages[0])
        shape = tuple(
            (
                message.role,
                *map(_kind, message.content),
            )
            for message in messages
        )
        if shape not in self._layouts:
            self._layouts[shape] = self._make_layout(messages)
        layout = self._layouts[shape]
        texts = _texts(messages)
        remaining = iter(texts)
        filled = [
            item.before + next(remaining) + item.after if isinstance(item, _Span) else item.text
            for item in layout
        ]
        if "".join(filled) != self._render(_chat(messages, texts)):
            raise RowError(
                "the chat template rewrites this row's text (trims it, or strips reasoning), so its "
                "answer cannot be told from the rest",
                "clean the row or use another template",
            )
        return layout

    def _document_layout(self, document: Message) -> _Layout:
        """No template: texts, images and the token that ends a document. All text is supervised."""
        run = (
            self._vision.vision_start_token_id,
            self._vision.image_token_id,
            self._vision.vision_end_token_id,
        )
        image = _Fixed("", run, (IGNORE,) * len(run))
        text = _Span("", "", is_answer=True)
        parts = [text if isinstance(part, str) else image for part in document.content]
        end = self._special_ids.get(_END_OF_DOCUMENT, self._tokenizer.eos_token_id)
        if end is None:
            raise ValueError(f"the tokenizer has neither {_END_OF_DOCUMENT} nor an eos_token")
        return (*parts, _Fixed("", (end,), (end,)))

    def _make_layout(self, messages: tuple[Message, ...]) -> _Layout:
        stand_ins = [_STAND_IN.format(n) for n in range(len(_texts(messages)))]
        items = self._split(self._render(_chat(messages, stand_ins)))

        # The slot or image of every item that holds one, against the conversation in its order.
        slots = iter(range(len(stand_ins)))
        parts = [
            next(slots) if isinstance(p, str) else _kind(p) for m in messages for p in m.content
        ]
        held = [
            item.slot if isinstance(item, _Piece) else self._media_of.get(item) for item in items
        ]
        if [part for part in held if part is not None] != parts:
            raise RowError(
                "the chat template does not write every text, image and video of the row once and in order",
                "is it the template of a Qwen-VL model?",
            )

        answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
        supervised = answers[-1:] if self._mask_history else answers
        message_of = iter([n for n, message in enumerate(messages) for _ in message.content])
        parts_left = [len(message.content) for message in messages]
        layout: list[_Fixed | _Span | _Clip] = []
        answer_ends = False
        for item, part in zip(items, held):
            is_answer = False
            if part is not None:
                message = next(message_of)
                parts_left[message] -= 1
                is_answer = message in supervised and isinstance(item, _Piece)
                answer_ends = message in supervised and parts_left[message] == 0
            elif answer_ends and not isinstance(item, _Piece) and item not in self._vision_ids:
                is_answer, answer_ends = True, False
            layout.append(self._item(item, is_answer))
        return tuple(layout)

    def _item(self, item: _Piece | int, is_answer: bool) -> _Fixed | _Span | _Clip:
        if isinstance(item, int):
            if self._media_of.get(item) == "video" and self._vision.video_spec.has_timestamps:
                return _Clip(self._special_tokens[item])
            is_answer |= self._train_on_prompt and item not in self._vision_ids
            return _Fixed(self._special_tokens[item], (item,), (item if is_answer else IGNORE,))
        if item.slot is None:
            (ids,) = map(tuple, self._tokenize([item.before]))
            return _Fixed(item.before, ids, ids if self._train_on_prompt else (IGNORE,) * len(ids))
        if not is_answer or self._train_on_prompt:
            return _Span(item.before, item.after, self._train_on_prompt)
        (before_ids,) = map(tuple, self._tokenize([item.before]))
        return _Span(item.before, item.after, True, before_ids, ends_early=bool(item.after))

    def _split(self, rendered: str) -> list[_Piece | int]:
        """What was rendered from stand-ins: ids of special tokens, and what is between them."""
        items: list[_Piece | int] = []
        piece = _Piece()
        position = 0
        for match in [*self._pieces.finditer(rendered), None]:
            plain = rendered[position : match.start() if match else len(rendered)]
            piece = piece._replace(**{"before" if piece.slot is None else "after": plain})
            if match and match[1] is not None:
                if piece.slot is not None:
                    raise ValueError("the chat template writes no special token between two texts")
                piece = piece._replace(slot=int(match[1]))
            else:
                if piece != _Piece():
                    items.append(piece)
                piece = _Piece()
                if match:
                    items.append(self._special_ids[match[0]])
            position = match.end() if match else position
        return items

    def _tokenize(self, strings: list[str]) -> list[list[int]]:
        """The ids of each string, special tokens in it being text.

        `encode_batch_fast` of the tokenizer's backend, set as its own call sets it, which here costs
        half as much again (a dict a string). "Longer than the model's maximum" is the planner's
        business.
        """
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        return [e.ids for e in backend.encode_batch_fast(strings, add_special_tokens=False)]

    def _finish(
        self,
        sample: Sample,
        layout: _Layout,
        media: _Vision,
        tokenized: Iterator[list[int]],
    ) -> EncodedSample:
        input_ids: list[int] = []
        labels: list[int] = []
        timestamps = iter(media.timestamps)
        spec = self._vision
        for item in layout:
            if isinstance(item, _Clip):
                for text in next(timestamps):
                    clip = (
                        spec.vision_start_token_id,
                        spec.video_token_id,
                        spec.vision_end_token_id,
                    )
                    input_ids += (*self._timestamp_ids(text), *clip)
                labels += [IGNORE] * (len(input_ids) - len(labels))
                continue
            if isinstance(item, _Fixed):
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
            images=sample.media,
            vision=self._vision,
            source=sample.source,
            row=sample.row,
            temporal_step=np.array(media.steps, dtype=np.float32)
            if set(media.steps) - {1}
            else None,
        )


def _strings(layout: _Layout, texts: Iterable[str]) -> Iterator[str]:
    """What to tokenise: every span whole, and where text follows an answer, without that."""
    remaining = iter(texts)
    for item in layout:
        if isinstance(item, _Span):
            text = item.before + next(remaining)
            yield text + item.after
            if item.ends_early:
                yield text


def _kind(part: str | Media) -> str:
    if isinstance(part, str):
        return "text"
    return "video" if isinstance(part, VideoRef) else "image"


def _texts(messages: Iterable[Message]) -> list[str]:
    return [part for message in messages for part in message.content if isinstance(part, str)]


def _chat(messages: Iterable[Message], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Messages as chat templates take them, with the texts replaced."""
    replacement = iter(texts)
    chat = []
    for message in messages:
        if any(not isinstance(part, str) for part in message.content):
            content: Any = [
                {"type": "text", "text": next(replacement)}
                if isinstance(part, str)
                else {"type": _kind(part)}
                for part in message.content
            ]
        else:
            content = "".join(next(replacement) for _ in message.content)
        chat.append({"role": message.role, "content": content})
    return chat


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for n, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return n
    return min(len(a), len(b))


def _report(sample: Sample, error: ValueError, on_error: OnError) -> None:
    text, advice = (error.error, error.advice) if isinstance(error, RowError) else (str(error), "")
    report(BadRow(sample.source, sample.row, text, advice), on_error)
