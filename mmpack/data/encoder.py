"""Encoder: rows -> Sample -> EncodedSample. Chat template, label mask, one marker per image or video.

The tokenizer's chat template is rendered once with the row's texts and once with stand-ins, which shows which
characters the template wrote. The text between two special tokens of the template (role, newline and content
together) is tokenized in one piece. So the ids equal those of the rendered text, except that control tokens typed
in a row stay text and open no turn (`mmpack.data.special_tokens`).

For videos with timestamps, the marker is repeated for each temporal patch, after its time and inside its own
vision start and end tokens, all between those that the template wrote, as in transformers' `Qwen3VLProcessor`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from mmpack.data import images, videos
from mmpack.data.chat_template import Template
from mmpack.data.chunks import chunks
from mmpack.data.layouts import Clip, Fixed, Layout, common_prefix, strings, turn_weights
from mmpack.data.model_folder import local_path
from mmpack.data.processor_folder import load_processor
from mmpack.data.readers import Reader
from mmpack.data.rendering import texts_of
from mmpack.data.special_tokens import TypedTokens
from mmpack.data.template_errors import check_arguments
from mmpack.errors import BadRow, OnError, RowError, Skip, counting, refuse
from mmpack.types import IGNORE, EncodedSample, ImageRef, Media, Message, Sample
from mmpack.vision_spec import VisionSpec


class _Vision(NamedTuple):
    """Grids and times of a sample's images and videos."""

    grids: list[tuple[int, int, int]]
    steps: list[float]  # M-RoPE positions per temporal patch
    timestamps: list[list[str]]  # for each video with timestamps


@dataclass(frozen=True, repr=False)
class Encoder(Reader):
    """Turns rows into token ids: a tokenizer, a `VisionSpec`, and all options for reading and encoding.

    Create it with `from_processor` or `from_folder`, change options with `dataclasses.replace`; it can be pickled.

    Attributes:
        tokenizer: a transformers fast tokenizer with a chat template, or a processor that holds one. None if only
            the spec is needed, for processor outputs.
        vision: patch sizes, pixel budget and token ids.
        train_on_prompt: supervise all text, but no vision tokens.
        mask_history: supervise the last answer only.
        mask_thinking: leave thoughts and their `<think>` tags unsupervised.
        typed_tokens: special tokens in a row's text, other than control tokens (those of turns, images and
            videos), become their "ids", as in transformers, or stay "text". Control tokens always stay text.
        template_args: arguments of the chat template for all rows and prompts, such as
            `{"enable_thinking": False}`.
        stage, mapping, media_dir, on_error, missing_marker, verify: as in `Reader`.

    Raises:
        ValueError: an option has an invalid value, or two options contradict each other.
    """

    tokenizer: Any
    vision: VisionSpec
    train_on_prompt: bool = field(default=False, kw_only=True)
    mask_history: bool = field(default=False, kw_only=True)
    mask_thinking: bool = field(default=False, kw_only=True)
    typed_tokens: Literal["ids", "text"] = field(default="ids", kw_only=True)
    template_args: Mapping[str, Any] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.typed_tokens not in ("ids", "text"):
            raise ValueError(f"typed_tokens must be 'ids' or 'text', got {self.typed_tokens!r}")
        if self.template_args:
            check_arguments(self.template_args, self.tokenizer, self.stage)
        if self.train_on_prompt and self.mask_history:
            raise ValueError(
                "train_on_prompt supervises every turn, mask_history only the last; leave out "
                "--train-on-prompt (train_on_prompt) or --mask-history (mask_history)"
            )
        if self.train_on_prompt and self.mask_thinking:
            raise ValueError(
                "train_on_prompt supervises all text, mask_thinking leaves thoughts out; leave out "
                "--train-on-prompt (train_on_prompt) or --mask-thinking (mask_thinking)"
            )
        if self.stage == "pretrain" and self.mask_thinking:
            raise ValueError(
                "documents have no thoughts; leave out --mask-thinking (mask_thinking)"
            )
        if self.stage == "pretrain" and (self.train_on_prompt or self.mask_history):
            raise ValueError(
                "documents have no turns; leave out --train-on-prompt and --mask-history "
                "(train_on_prompt, mask_history)"
            )

    def __repr__(self) -> str:
        others = {one.name: one.default for one in fields(self) if one.kw_only}
        changed = {name: getattr(self, name) for name in others}
        words = [
            f"{name}={value!r:.60}" for name, value in changed.items() if value != others[name]
        ]
        pixels = f"images up to {self.vision.max_pixels:,} pixels"
        return f"Encoder({', '.join([type(self.tokenizer).__name__, pixels, *words])})"

    @classmethod
    def from_processor(cls, processor: Any, config: Any = None, **options: Any) -> Encoder:
        """An encoder with the settings of a transformers Qwen-VL processor.

        Args:
            config: the model's config; needed for Qwen2.5-VL's videos, whose positions in time depend on it.
            options: other attributes.

        Raises:
            ValueError: it is not such a processor, or it processes pixels in a way that mmpack does not.
        """
        if not hasattr(processor, "image_processor"):
            raise ValueError(
                f"an Encoder or a transformers Qwen-VL processor is needed, got a "
                f"{type(processor).__name__}; Encoder.from_folder(FOLDER) makes one of a tokenizer's folder"
            )
        return cls(processor, VisionSpec.from_processor(processor, config), **options)

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        config: Any = None,
        *,
        max_pixels: int | None = None,
        min_pixels: int | None = None,
        video: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Encoder:
        """An encoder with the settings in a folder, or a model on the Hugging Face Hub, as Qwen publishes them.

        Reads only the processors' settings, so torchvision, which transformers' processor requires, need not be
        installed.

        Args:
            folder: a folder with `tokenizer.json`, a chat template and `preprocessor_config.json`; or a name on
                the Hub, `owner/name` or `hf:owner/name@revision`, whose files are downloaded.
            config: the model's config; by default the folder's, if it has one.
            max_pixels, min_pixels: override the folder's values in the spec.
            video: `VideoSpec` fields that override the folder's; fields that are None do not.
            options: other attributes.

        Raises:
            ValueError: the folder lacks a tokenizer, a chat template or `preprocessor_config.json`, there is no
                such folder or model, or `min_pixels` is more than `max_pixels`.
        """
        folder = local_path(folder)
        tokenizer, vision = load_processor(folder, config)
        low = vision.min_pixels if min_pixels is None else min_pixels
        high = vision.max_pixels if max_pixels is None else max_pixels
        vision = replace(vision, min_pixels=low, max_pixels=high)
        chosen = {name: value for name, value in (video or {}).items() if value is not None}
        if chosen:
            if options.get("stage") == "pretrain":
                raise ValueError(
                    f"video settings ({', '.join(chosen)}) do not apply: documents have no videos "
                    "(stage='pretrain'); leave out video"
                )
            if vision.video is None:
                raise ValueError(
                    f"{folder} is a Qwen2.5-VL processor, whose videos need the model's config; "
                    "pass --config (config)"
                )
            vision = replace(vision, video=replace(vision.video, **chosen))
        return cls(tokenizer, vision, **options)

    @classmethod
    def of(cls, encoder: Any, config: Any = None) -> Encoder:
        """Return an encoder unchanged, or make one from a transformers Qwen-VL processor with `from_processor`.
        `config` is ignored if it is not a model config but costs."""
        if isinstance(encoder, Encoder):
            return encoder
        return cls.from_processor(encoder, config if hasattr(config, "model_type") else None)

    def __getstate__(self) -> dict[str, Any]:
        """The attributes, without cached templates."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def settings(self) -> dict[str, str]:
        """All settings that a row's ids depend on, for JSON; the tokenizer as a hash of its content."""
        inner = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        content = inner.backend_tokenizer.to_str() + repr(self.tokenizer.chat_template)
        names = (
            "stage",
            "missing_marker",
            "verify",
            "train_on_prompt",
            "mask_history",
            "mask_thinking",
            "typed_tokens",
        )
        values = {name: getattr(self, name) for name in names} | asdict(self.vision)
        values["template_args"] = sorted((self.template_args or {}).items())
        values["on_error"] = "raise" if self.on_error == "raise" else "skip"
        digest = hashlib.sha256(content.encode()).hexdigest()
        return {"the tokenizer": digest} | {n: repr(v) for n, v in sorted(values.items())}

    def encode(self, samples: Iterable[Sample]) -> Iterator[EncodedSample]:
        """Encode samples: ids with one marker per image or video, labels, and grids from image headers.

        The assistant's thought, its text, its tool calls and the token that ends its turn (`<|im_end|>`) are
        supervised, the newline after it is not. A token that spans template text and answer (an answer that begins
        with a newline) counts as answer. A document (`stage="pretrain"`) has no template: it is encoded as its
        texts, its images as `<|vision_start|>` marker `<|vision_end|>`, and `<|endoftext|>`; everything except the
        images is supervised.

        Args:
            samples: conversations or documents, as `read` yields them.

        Yields:
            One `EncodedSample` per usable sample, in order: (n,) ids and labels, (I, 3) grids. No pixel is
            decoded.

        Raises:
            ValueError: a sample cannot be used and `on_error` is "raise": no token is supervised, an image or
                video cannot be read, or the template rewrites its text; the message gives file and row. Or too
                many were skipped.
        """
        on_error = counting(self.on_error)
        for chunk in chunks(samples):
            if isinstance(on_error, Skip):
                on_error.saw("encoding", len(chunk))
            for _, encoded in self.encode_chunk(chunk, on_error):
                yield encoded

    def encode_chunk(
        self, samples: Sequence[Sample], on_error: OnError
    ) -> Iterator[tuple[int, EncodedSample]]:
        """Like `encode`, for callers that bring their own chunks; yields (index in the chunk, encoded sample)."""
        return self._encode(self._template, samples, on_error)

    def typed_in(self, sample: Sample) -> TypedTokens:
        """The special tokens in a sample's texts, tools and tool calls: how many stay text, how many become
        ids."""
        calls = [message.tool_calls for message in sample.messages]
        texts = texts_of(sample.messages)
        return self._template.special_tokens.typed([texts, calls, sample.tools])

    def encode_prompt(
        self, messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...] = ()
    ) -> EncodedSample:
        """Encode a conversation up to the start of the assistant's turn; nothing is supervised."""
        sample = Sample(messages, source="prompt", row=0, tools=tools)
        ((_, encoded),) = self._encode(self._prompt_template, [sample], "raise")
        return encoded

    @cached_property
    def _template(self) -> Template:
        return Template(
            self.tokenizer,
            self.vision,
            train_on_prompt=self.train_on_prompt,
            mask_history=self.mask_history,
            mask_thinking=self.mask_thinking,
            typed_tokens=self.typed_tokens,
            arguments=self.template_args,
        )

    @cached_property
    def _prompt_template(self) -> Template:
        return Template(
            self.tokenizer,
            self.vision,
            typed_tokens=self.typed_tokens,
            is_prompt=True,
            arguments=self.template_args,
        )

    @cached_property
    def _timestamp_ids(self) -> Callable[[str], tuple[int, ...]]:
        return cache(lambda text: tuple(self._template.tokenize([text])[0]))

    def _encode(
        self, template: Template, samples: Sequence[Sample], on_error: OnError
    ) -> Iterator[tuple[int, EncodedSample]]:
        laid_out = []
        to_tokenize: list[str] = []
        for place, sample in enumerate(samples):
            try:
                layout, texts = template.layout(sample)
                media, of_turns = self._place(sample), turn_weights(sample)
            except ValueError as error:
                _report(sample, error, on_error)
                continue
            to_tokenize += strings(layout, texts)
            laid_out.append((place, sample, layout, media, of_turns))
        ids = iter(template.tokenize(to_tokenize))
        for place, sample, layout, media, of_turns in laid_out:
            encoded = self._finish(sample, layout, media, of_turns, ids)
            if encoded.is_supervised or template.is_prompt:
                yield place, encoded
            else:
                unsupervised = RowError(
                    "no token of the row is supervised", "add an answer or drop the row"
                )
                _report(sample, unsupervised, on_error)

    def _place(self, sample: Sample) -> _Vision:
        spec = self.vision
        placed = _Vision([], [], [])
        for ref in sample.media:
            if isinstance(ref, ImageRef):
                size = ref.size or images.probe(ref)
                placed.grids.append(_named(ref, spec.image_grid, *size, ref.options))
                placed.steps.append(1.0)
                continue
            video = videos.probe(ref) if ref.size is None else ref
            assert video.size is not None
            frames = videos.sampled(video, spec)
            sizes = (len(frames.index), *video.size, video.options)
            patches, height, width = _named(video, spec.video_grid, *sizes)
            if spec.video_spec.has_timestamps:
                placed.grids.extend([(1, height, width)] * patches)
                placed.steps.extend([1.0] * patches)
                times = spec.video_spec.timestamps(
                    frames.index, frames.fps, spec.temporal_patch_size
                )
                placed.timestamps.append(times)
            else:
                placed.grids.append((patches, height, width))
                placed.steps.append(spec.temporal_step(frames))
        return placed

    def _finish(
        self,
        sample: Sample,
        layout: Layout,
        media: _Vision,
        of_turns: list[float] | None,
        tokenized: Iterator[list[int]],
    ) -> EncodedSample:
        input_ids: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        timestamps = iter(media.timestamps)
        spec = self.vision
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
            elif isinstance(item, Fixed):
                input_ids += item.ids
                labels += item.labels
            else:
                ids = next(tokenized)
                input_ids += ids
                # An answer begins at the first token that differs from the ids of `before` alone, and ends at the
                # first that differs from the ids of `before` and the answer without `after`.
                start = common_prefix(ids, item.before_ids) if item.is_answer else len(ids)
                stop = common_prefix(ids, next(tokenized)) if item.ends_early else len(ids)
                if item.masks_thought:
                    start = common_prefix(ids, next(tokenized))
                labels += [IGNORE] * start + ids[start:stop]
                labels += [IGNORE] * (len(input_ids) - len(labels))
            if of_turns is not None:
                weights += [of_turns[item.turn]] * (len(labels) - len(weights))
        return EncodedSample(
            input_ids=np.array(input_ids, dtype=np.int32),
            labels=np.array(labels, dtype=np.int32),
            grid_thw=np.array(media.grids, dtype=np.int32).reshape(-1, 3),
            media=sample.media,
            vision=self.vision,
            source=sample.source,
            row=sample.row,
            temporal_step=np.array(media.steps, dtype=np.float32)
            if set(media.steps) - {1}
            else None,
            weights=None if of_turns is None else np.array(weights, dtype=np.float32),
        )


def _named(ref: Media, grid_of: Callable[..., tuple[int, int, int]], *sizes: Any) -> Any:
    """The grid of an image or a video, whose name an error gets."""
    try:
        return grid_of(*sizes)
    except RowError as error:
        kind = "image" if isinstance(ref, ImageRef) else "video"
        raise RowError(f"{kind} {ref.name}: {error.error}", error.advice) from None


def _report(sample: Sample, error: ValueError, on_error: OnError) -> None:
    text, advice = (error.error, error.advice) if isinstance(error, RowError) else (str(error), "")
    refuse(BadRow(sample.source, sample.row, text, advice), on_error)
