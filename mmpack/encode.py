"""Sample -> EncodedSample: chat template, label mask, one marker per image.

The tokenizer's own chat template is rendered once with the row's text and once with stand-ins for
it, which tells which characters the template wrote. Only special tokens *the template* wrote
become special tokens; everything between two of them (role, newline and content together) is
tokenised in one piece with `split_special_tokens=True`. So the ids equal those of the rendered
text, and a control token typed by a user stays text and opens no turn.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from mmpack import images
from mmpack.errors import BadRow, OnError, RowError, report
from mmpack.types import IGNORE, EncodedSample, ImageRef, Message, Sample
from mmpack.vision import VisionSpec

_CHUNK = 256  # samples tokenised in one call; tokenizers spreads a call over the cores
_STAND_IN = "\ue000{}\ue001"  # private use characters: no template tests for them


@dataclass(frozen=True, slots=True)
class _Special:
    """A special token the template wrote."""

    token_id: int


@dataclass(frozen=True, slots=True)
class _Span:
    """What the template has between two special tokens: its text around one text of the row."""

    before: str
    slot: int | None  # which text of the conversation; None: template text alone
    after: str

    def fill(self, texts: Sequence[str]) -> str:
        return self.before + ("" if self.slot is None else texts[self.slot]) + self.after


@dataclass(frozen=True, slots=True)
class _Layout:
    """A rendered conversation with its texts left out; `is_answer` says of each item whether it is
    an answer's text or the token that ends an answer."""

    items: tuple[_Special | _Span, ...]
    is_answer: tuple[bool, ...]


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
    """Encode samples: ids with one marker per image, labels, grids from the image headers.

    Supervised are the assistant's text and the token that ends its turn (`<|im_end|>`), not the
    newline after it. A token that the tokenizer makes from template text and answer together
    (an answer that opens with a newline) counts as answer.

    Args:
        samples: conversations.
        tokenizer: a transformers fast tokenizer with a chat template, or a processor holding one.
        vision: pixel budget and ids.
        train_on_prompt: supervise all text, but no vision token.
        mask_history: supervise the last answer only.
        on_error: "raise" on an unusable sample, "skip" it with a warning, or a list to append it to.

    Yields:
        One `EncodedSample` per usable sample, in order.

    Raises:
        ValueError: a sample cannot be used and `on_error` is "raise": no supervised token, an image
            that cannot be read, a template that rewrites its text. Names file and row.
    """
    if train_on_prompt and mask_history:
        raise ValueError(
            "train_on_prompt supervises every turn and mask_history the last; pick one"
        )
    encoder = _Encoder(
        tokenizer, vision, train_on_prompt=train_on_prompt, mask_history=mask_history
    )
    remaining = iter(samples)
    while chunk := list(islice(remaining, _CHUNK)):
        yield from encoder.encode(chunk, on_error)


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
        self._vision_ids = {
            vision.image_token_id,
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
        self._layouts: dict[tuple[tuple[str, ...], ...], _Layout] = {}

    def encode(self, samples: Sequence[Sample], on_error: OnError) -> Iterator[EncodedSample]:
        laid_out = []
        to_tokenize: list[str] = []
        for sample in samples:
            try:
                layout = self._layout(sample.messages)
                grids = [
                    self._vision.image_grid(*(i.size or images.probe(i))) for i in sample.images
                ]
            except ValueError as error:
                _report(sample, error, on_error)
                continue
            begin = len(to_tokenize)
            to_tokenize += self._strings(layout, _texts(sample.messages))
            laid_out.append((sample, layout, grids, slice(begin, len(to_tokenize))))
        ids = self._tokenize(to_tokenize)
        for sample, layout, grids, strings in laid_out:
            encoded = self._finish(sample, layout, grids, iter(ids[strings]))
            if encoded.is_supervised or self._is_prompt:
                yield encoded
            else:
                error = RowError("no token of the row is supervised", "it has no answer to learn")
                _report(sample, error, on_error)

    def _layout(self, messages: tuple[Message, ...]) -> _Layout:
        """The layout of the conversation's shape, checked against the template's own rendering."""
        shape = tuple(
            (
                message.role,
                *("text" if isinstance(part, str) else "image" for part in message.content),
            )
            for message in messages
        )
        if shape not in self._layouts:
            self._layouts[shape] = self._make_layout(messages)
        layout = self._layouts[shape]
        texts = _texts(messages)
        filled = "".join(
            item.fill(texts) if isinstance(item, _Span) else self._special_tokens[item.token_id]
            for item in layout.items
        )
        if filled != self._render(_chat(messages, texts)):
            raise RowError(
                "the chat template rewrites this row's text (trims it, or strips reasoning), so its "
                "answer cannot be told from the rest",
                "clean the row or use another template",
            )
        return layout

    def _make_layout(self, messages: tuple[Message, ...]) -> _Layout:
        stand_ins = [_STAND_IN.format(n) for n in range(len(_texts(messages)))]
        items = self._split(self._render(_chat(messages, stand_ins)))

        # The slot or image of every item that holds one, against the conversation in its order.
        slots = iter(range(len(stand_ins)))
        parts = [
            next(slots) if isinstance(p, str) else "image" for m in messages for p in m.content
        ]
        held = [
            item.slot
            if isinstance(item, _Span)
            else ("image" if item.token_id == self._vision.image_token_id else None)
            for item in items
        ]
        if [part for part in held if part is not None] != parts:
            raise RowError(
                "the chat template does not write every text and image of the row once and in order",
                "is it the template of a Qwen-VL model?",
            )

        answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
        supervised = answers[-1:] if self._mask_history else answers
        message_of = iter([n for n, message in enumerate(messages) for _ in message.content])
        parts_left = [len(message.content) for message in messages]
        is_answer = []
        answer_ends = False
        for item, part in zip(items, held):
            if part is not None:
                message = next(message_of)
                parts_left[message] -= 1
                is_answer.append(message in supervised and isinstance(item, _Span))
                answer_ends = message in supervised and parts_left[message] == 0
            else:
                is_end = (
                    answer_ends
                    and isinstance(item, _Special)
                    and item.token_id not in self._vision_ids
                )
                is_answer.append(is_end)
                answer_ends = answer_ends and not is_end
        return _Layout(tuple(items), tuple(is_answer))

    def _split(self, rendered: str) -> list[_Special | _Span]:
        items: list[_Special | _Span] = []
        span = _Span("", None, "")
        position = 0
        for match in [*self._pieces.finditer(rendered), None]:
            plain = rendered[position : match.start() if match else len(rendered)]
            span = replace(span, **{"before" if span.slot is None else "after": plain})
            if match and match[1] is not None:
                if span.slot is not None:
                    raise ValueError("the chat template writes no special token between two texts")
                span = replace(span, slot=int(match[1]))
            else:
                if span != _Span("", None, ""):
                    items.append(span)
                span = _Span("", None, "")
                if match:
                    items.append(_Special(self._special_ids[match[0]]))
            position = match.end() if match else position
        return items

    def _strings(self, layout: _Layout, texts: Sequence[str]) -> Iterator[str]:
        """What to tokenise: every span whole, and for an answer the strings that bound it."""
        for item, is_answer in zip(layout.items, layout.is_answer):
            if isinstance(item, _Span):
                yield item.fill(texts)
                if is_answer and not self._train_on_prompt:
                    yield item.before
                    if item.after:
                        yield replace(item, after="").fill(texts)

    def _tokenize(self, strings: list[str]) -> list[list[int]]:
        if not strings:
            return []
        encoded = self._tokenizer(
            strings,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,  # "longer than the model's maximum" is the planner's business
        )
        return encoded["input_ids"]

    def _finish(
        self,
        sample: Sample,
        layout: _Layout,
        grids: Sequence[tuple[int, int, int]],
        tokenized: Iterator[list[int]],
    ) -> EncodedSample:
        input_ids: list[int] = []
        supervised: list[bool] = []
        for item, is_answer in zip(layout.items, layout.is_answer):
            if isinstance(item, _Special):
                ids = [item.token_id]
                start, stop = 0, 1
                is_answer |= self._train_on_prompt and item.token_id not in self._vision_ids
            else:
                ids = next(tokenized)
                start, stop = 0, len(ids)
                if self._train_on_prompt:
                    is_answer = True
                elif is_answer:
                    # From the first token that differs from those of the template's text alone
                    # to the first that differs from those of template text and answer.
                    start = _common_prefix(ids, next(tokenized))
                    stop = _common_prefix(ids, next(tokenized)) if item.after else len(ids)
            supervised += [is_answer and start <= n < stop for n in range(len(ids))]
            input_ids += ids
        ids_array = np.array(input_ids, dtype=np.int32)
        return EncodedSample(
            input_ids=ids_array,
            labels=np.where(supervised, ids_array, np.int32(IGNORE)),
            grid_thw=np.array(grids, dtype=np.int32).reshape(-1, 3),
            images=sample.images,
            vision=self._vision,
            source=sample.source,
            row=sample.row,
        )


def _texts(messages: Iterable[Message]) -> list[str]:
    return [part for message in messages for part in message.content if isinstance(part, str)]


def _chat(messages: Iterable[Message], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Messages as chat templates take them, with the texts replaced."""
    replacement = iter(texts)
    chat = []
    for message in messages:
        if any(isinstance(part, ImageRef) for part in message.content):
            content: Any = [
                {"type": "image"}
                if isinstance(part, ImageRef)
                else {"type": "text", "text": next(replacement)}
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
