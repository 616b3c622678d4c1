"""The layout that a tokenizer's chat template gives a conversation: everything but the conversation's own texts.

The template is rendered with stand-ins once per conversation shape, which shows which characters the template
wrote. It is also rendered with the real texts, and a row whose text it rewrites is refused. Tools and tool calls
are written by the template, so they are part of the shape. A document has no template.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from mmpack.data.layouts import (
    Clip,
    Fixed,
    Layout,
    Shape,
    Slot,
    around_texts,
    common_prefix,
    is_thought_twice,
)
from mmpack.data.rendering import (
    MARKS,
    Piece,
    Renderer,
    kind_of,
    marked_call,
    marked_tool,
    texts_of,
)
from mmpack.data.special_tokens import END_OF_DOCUMENT, SpecialTokens
from mmpack.data.template_errors import (
    check_marks,
    no_thoughts,
    not_written,
    rewritten,
    shares_tokens,
    thought_twice,
)
from mmpack.data.thoughts import (
    Thought,
    filled,
    fitted,
    thinking_turn,
    ways,
    without_thoughts,
)
from mmpack.errors import RowError
from mmpack.types import IGNORE, Message, Sample
from mmpack.vision_spec import VisionSpec

_MOST_LAYOUTS = 4096  # kept of conversations without tools
_MOST_TOOL_LAYOUTS = 64  # these hold the ids of tools and calls; every row with calls has its own


class Template:
    """A cached layout per conversation shape. Options are those of `mmpack.Encoder`; with `is_prompt` the layout
    ends where the assistant's turn begins. `arguments` are the template's own."""

    def __init__(
        self,
        tokenizer: Any,
        vision: VisionSpec,
        *,
        train_on_prompt: bool = False,
        mask_history: bool = False,
        mask_thinking: bool = False,
        typed_tokens: str = "ids",
        is_prompt: bool = False,
        arguments: Mapping[str, Any] | None = None,
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
        self._mask_thinking = mask_thinking
        self.is_prompt = is_prompt
        render = functools.partial(
            tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=is_prompt,
            **(arguments or {}),
        )
        inner = getattr(tokenizer, "tokenizer", tokenizer)
        self._eos_token_id = inner.eos_token_id
        ids = {t.content: n for n, t in inner.added_tokens_decoder.items() if t.special}
        self._renderer = Renderer(render, ids)
        self._turn_end: int | None = None  # the special token that ends an assistant's turn
        written = {token for token in ids if token in str(tokenizer.chat_template)}
        for roles in (("system", "user", "assistant"), ("user", "assistant")):
            written.update(self._tried(roles))  # a template can put a token together
        self.special_tokens = SpecialTokens(inner, vision, written, typed_tokens)
        self.tokenize = self.special_tokens.tokenize
        self._shapes: dict[Any, Shape] = {}
        self._tool_shapes: dict[Any, Shape] = {}

    def _tried(self, roles: Sequence[str]) -> list[str]:
        """The special tokens of a short conversation; [] if the template refuses it."""
        try:
            items = self._renderer.stand_ins([Message(role, ("?",)) for role in roles])
        except RowError:
            return []
        for place, item in enumerate(items):
            if isinstance(item, Piece) and len(roles) - 1 in item.slots:
                ends = [end for end in items[place:] if isinstance(end, int)]
                self._turn_end = ends[0] if ends else None
        return [text for text, number in self._renderer.special_ids.items() if number in items]

    @functools.cached_property
    def _takes_thoughts(self) -> bool:
        turns = [Message("user", ("?",)), Message("assistant", (Thought("?"), "?"))]
        try:
            items = self._renderer.stand_ins(turns)
        except RowError:
            return False
        return any(isinstance(item, Piece) and 1 in item.slots for item in items)

    def layout(self, sample: Sample) -> tuple[Layout, list[str]]:
        """The layout of the conversation's shape, and the texts in it as the template writes them: thoughts on
        their own, trimmed where it trims them, without thoughts that it leaves out.

        Raises:
            RowError: the template refuses the conversation, or rewrites, drops or reorders its texts, tools or
                tool calls.
        """
        messages, tools = sample.messages, sample.tools
        texts = texts_of(messages)
        if messages[0].role == "document":
            return self._document_layout(messages[0]), texts
        if any(isinstance(text, Thought) for text in texts) and not self._takes_thoughts:
            raise no_thoughts(messages)
        thinking = thinking_turn(messages)
        splits = thinking is not None and self._takes_thoughts
        calls = [message.tool_calls for message in messages]
        rendered: str | None = None
        reason: RowError | None = None
        for way in ways(messages, splits):
            try:
                layout, dropped = self._shape(way, calls, tools)
            except RowError as error:
                reason = reason or error
                continue
            if rendered is None:
                rendered = self._renderer.render(messages, texts, calls, tools)
            own = texts if way is messages else texts_of(way)
            own = [text for n, text in enumerate(own) if n not in dropped] if dropped else own
            around = around_texts(layout)
            if filled(own, around) != rendered:
                own = fitted(own, around, rendered)
                if filled(own, around) != rendered:
                    if reason is None:
                        kept = without_thoughts(way, dropped)
                        reason = rewritten(kept, own, around, rendered)
                    continue
            if thinking is not None and splits and is_thought_twice(layout, own):
                raise thought_twice(thinking)
            return layout, own
        assert reason is not None
        raise reason

    def _shape(
        self, messages: Sequence[Message], calls: Sequence[Sequence[Any]], tools: Sequence[Any]
    ) -> Shape:
        key: Any = tuple(
            [(m.role, m.loss, m.weight == 1, *map(kind_of, m.content)) for m in messages]
        )
        shapes, most = self._shapes, _MOST_LAYOUTS
        if tools or any(calls):
            key = (key, json.dumps([tools, calls]))
            shapes, most = self._tool_shapes, _MOST_TOOL_LAYOUTS
        shape = shapes.get(key)
        if shape is None:
            if len(shapes) >= most:
                shapes.clear()
            shape = shapes[key] = self._make_shape(messages, tools)
        return shape

    def _document_layout(self, document: Message) -> Layout:
        """Texts, images and the token that ends a document, without a template. All text is supervised."""
        run = (
            self._vision.vision_start_token_id,
            self._vision.image_token_id,
            self._vision.vision_end_token_id,
        )
        image = Fixed("", run, (IGNORE,) * len(run))
        text = Slot(("", ""), is_answer=True)
        parts = [text if isinstance(part, str) else image for part in document.content if part]
        end = self.special_tokens.ids.get(END_OF_DOCUMENT, self._eos_token_id)
        if end is None:
            raise ValueError(f"the tokenizer has neither {END_OF_DOCUMENT} nor an eos_token")
        return (*parts, Fixed("", (end,), (end,)))

    def _make_shape(self, messages: Sequence[Message], given: Sequence[Any]) -> Shape:
        broken = self.special_tokens.broken
        tools = [marked_tool(broken(tool), number) for number, tool in enumerate(given)]
        turns: list[int] = []  # of each call
        calls: list[list[Any]] = []
        for turn, message in enumerate(messages):
            numbered = enumerate(message.tool_calls, len(tools) + len(turns))
            calls.append([marked_call(broken(call), number) for number, call in numbered])
            turns += [turn] * len(message.tool_calls)
        items = self._renderer.stand_ins(messages, calls, tools)
        marks = [mark for item in items if isinstance(item, Piece) for mark in item.marks]
        wanted = [int(mark) for mark in MARKS.findall(json.dumps(calls, ensure_ascii=False))]
        check_marks(marks, wanted, len(tools), turns)
        written = {slot for item in items if isinstance(item, Piece) for slot in item.slots}
        texts = enumerate(texts_of(messages))
        thoughts = frozenset(number for number, text in texts if isinstance(text, Thought))
        dropped = thoughts - written
        turns_of = self._turns_of(items, messages, turns, len(tools), dropped)

        answers = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        if self._mask_history:
            answers = answers[-1:]
        supervised: dict[int, int] = {}  # item -> its turn
        silent = set[int]()  # items that have no loss even with `train_on_prompt`
        spoken: dict[int, int] = {}  # item -> the assistant's turn whose weight it has
        for turn, message in enumerate(messages):
            places = self._places(items, turns_of, turn, bool(calls[turn]))
            if message.role == "assistant":
                spoken |= dict.fromkeys(places, turn)
            if message.weight != 1 and any(len(turns_of[place]) > 1 for place in places):
                raise shares_tokens(turn)
            if message.loss == "none":
                silent.update(places)
            elif message.loss == "default" and turn in answers:
                supervised |= dict.fromkeys(places, turn)
        is_first = {turn: place for place, turn in reversed(supervised.items())}
        layout: list[Fixed | Slot | Clip] = []
        before: dict[int, str] | None = None
        for place, item in enumerate(items):
            turn = supervised.get(place, -1)
            with_prompt = self._train_on_prompt and place not in silent
            if isinstance(item, int):
                layout.append(self._special(item, turn >= 0 or with_prompt))
            elif turn < 0 or with_prompt:
                layout.append(self._plain(item, with_prompt))
            elif is_first[turn] == place and (item.is_marked_first or not item.slots):
                if before is None:
                    before = self._before_calls(messages, calls, tools)
                layout.append(self._called(item, turn, before.get(turn)))
            else:
                has_thought = bool(item.slots) and item.slots[0] in thoughts
                begins = self._mask_thinking and is_first[turn] == place
                layout.append(self._answered(item, bool(calls[turn]), has_thought, begins))
            if place in spoken and not isinstance(layout[-1], Clip):
                layout[-1] = replace(layout[-1], turn=spoken[place])
        return Shape(tuple(layout), dropped)

    def _turns_of(
        self,
        items: Sequence[Piece | int],
        messages: Sequence[Message],
        turns_of_calls: Sequence[int],
        num_tools: int,
        dropped: frozenset[int],
    ) -> list[set[int]]:
        """The turns whose texts, media and calls are in each item.

        Raises:
            RowError: the template does not write all of them but the dropped thoughts once and in order.
        """
        number = count()
        parts: list[tuple[int, int | str]] = [
            (turn, next(number) if isinstance(part, str) else kind_of(part))
            for turn, message in enumerate(messages)
            for part in message.content
            if part != ""
        ]
        parts = [part for part in parts if part[1] not in dropped]
        wanted = [part for _, part in parts]
        held: list[int | str] = []
        turns_of: list[set[int]] = []
        for item in items:
            turns: set[int] = set()
            found = item.slots if isinstance(item, Piece) else [self._media_of.get(item)]
            for part in found:
                if part is not None:
                    turns.update({turn for turn, _ in parts[len(held) : len(held) + 1]})
                    held.append(part)
            if isinstance(item, Piece):
                calls = [mark - num_tools for mark in item.marks if mark >= num_tools]
                turns.update(turns_of_calls[call] for call in calls)
            turns_of.append(turns)
        order = [turn for turns in turns_of for turn in sorted(turns)]
        if held != wanted or order != sorted(order):
            raise not_written(without_thoughts(messages, dropped), held)
        return turns_of

    def _places(
        self, items: Sequence[Piece | int], turns_of: Sequence[set[int]], turn: int, has_calls: bool
    ) -> list[int]:
        """The items of a turn, in order, with the token that ends it: the first special token that is not of an
        image; calls can have special tokens, so after these the token that ends other turns."""
        own = [place for place, turns in enumerate(turns_of) if turn in turns]
        if not own:
            return []
        rest = range(own[-1] + 1, len(items))
        following = next((place for place in rest if turns_of[place]), len(items))
        ends = [
            place
            for place in range(own[-1] + 1, following)
            if isinstance(items[place], int) and items[place] not in self._vision_ids
        ]
        end = ends[:1]
        if has_calls:
            own = list(range(own[0], own[-1] + 1))
            end = [place for place in ends if items[place] == self._turn_end][:1] or end
            own += range(own[-1] + 1, end[0] if end else following)
        return own + end

    def _special(self, item: int, is_supervised: bool) -> Fixed | Clip:
        text = self.special_tokens.texts[item]
        if self._media_of.get(item) == "video" and self._vision.video_spec.has_timestamps:
            return Clip(text)
        is_supervised &= item not in self._vision_ids
        return Fixed(text, (item,), (item if is_supervised else IGNORE,))

    def _plain(self, item: Piece, is_supervised: bool) -> Fixed | Slot:
        """A piece that is supervised as a whole, or not at all."""
        if item.slots:
            return Slot(tuple(item.around), is_supervised)
        ids = self._ids(item.around[0])
        return Fixed(item.around[0], ids, ids if is_supervised else (IGNORE,) * len(ids))

    def _answered(
        self, item: Piece, has_calls: bool, has_thought: bool, masks_thought: bool
    ) -> Fixed | Slot:
        """A piece of an answer with a text or a thought, or behind one."""
        if not item.slots:
            ids = self._ids(item.around[0])
            return Fixed(item.around[0], ids, ids)
        if len(item.slots) > 1 + has_thought:
            raise RowError(
                "the chat template writes no special token between an answer and another text",
                "use a template that does; otherwise the answer's tokens cannot be told from the others",
            )
        before, after = item.around[0], item.around[-1]
        has_answer = len(item.slots) > has_thought
        return Slot(
            tuple(item.around),
            True,
            self._ids(before),
            bool(after) and has_answer and not has_calls,
            has_thought,
            masks_thought,
        )

    def _before_calls(
        self, messages: Sequence[Message], calls: Sequence[Sequence[Any]], tools: Sequence[Any]
    ) -> dict[int, str]:
        """For each turn, what the template writes before its text, if turns of calls alone have a text, too."""
        worded = [
            replace(one, content=(*texts_of([one]), "?"))
            if one.tool_calls and all(isinstance(text, Thought) for text in texts_of([one]))
            else one
            for one in messages
        ]
        turns = [turn for turn, message in enumerate(worded) for _ in texts_of([message])]
        return {
            turns[item.slots[0]]: item.around[0]
            for item in self._renderer.stand_ins(worded, calls, tools)
            if isinstance(item, Piece) and item.slots and not item.is_marked_first
        }

    def _called(self, item: Piece, turn: int, before: str | None) -> Fixed:
        """A piece of calls without text, which begins an answer after `before`."""
        (text, *others) = item.around
        if before is None or others or not text.startswith(before):
            raise RowError(
                f"the chat template does not show where the tool calls of turn {turn} begin",
                "use a template that writes them after the text of their turn",
            )
        ids = self._ids(text)
        begin = common_prefix(ids, self._ids(before))
        return Fixed(text, ids, (IGNORE,) * begin + ids[begin:])

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenize([text])[0])
