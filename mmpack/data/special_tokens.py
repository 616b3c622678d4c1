"""Special tokens in a row's text: which become their ids, and which stay text.

Control tokens are those that give a conversation its structure: the tokenizer's bos, eos and pad tokens, the
vision tokens of the spec, Qwen's turn tokens, and every special token that the chat template writes. Typed in a
row, they stay text, so a row cannot open a turn or claim an image. All other special tokens of the tokenizer
(Qwen's `<|box_start|>`, tokens that a user added) become their ids, as in transformers; with
`typed_tokens="text"`, they stay text, too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from mmpack.errors import RowError
from mmpack.vision_spec import VisionSpec

END_OF_DOCUMENT = "<|endoftext|>"  # as in Qwen's base models; the instruct models' eos ends a turn
# Qwen's, also if neither template nor spec has them; a document has no template.
_OTHER_CONTROL = (END_OF_DOCUMENT, "<|im_start|>", "<|im_end|>", "<|vision_pad|>")
_BROKEN = "\ufdd8"  # a noncharacter of Unicode, around the code of a token's first character
_BREAK = re.compile(f"{_BROKEN}([0-9a-f]+){_BROKEN}")
_NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")  # for a program's own use, never in text


class TypedTokens(NamedTuple):
    """How often each special token is in a row's text."""

    text: Counter[str]  # those that stay text
    ids: Counter[str]  # those that become their ids


class SpecialTokens:
    """The special tokens of a tokenizer.

    Args:
        tokenizer: a transformers fast tokenizer.
        vision: the spec, whose tokens are control tokens.
        written: special tokens that the chat template writes.
        typed_tokens: as in `mmpack.Encoder`.

    Attributes:
        ids, texts: token -> id, and id -> token.
        control: tokens that stay text if a row has them.
    """

    def __init__(
        self, tokenizer: Any, vision: VisionSpec, written: Iterable[str], typed_tokens: str
    ) -> None:
        self._tokenizer = tokenizer
        special = {n: token for n, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.texts = {number: token.content for number, token in special.items()}
        self.ids = {text: number for number, text in self.texts.items()}
        vision_ids = (
            vision.image_token_id,
            vision.video_token_id,
            vision.vision_start_token_id,
            vision.vision_end_token_id,
        )
        self.control = self.ids.keys() & {
            *written,
            *_OTHER_CONTROL,
            *(self.texts.get(number, "") for number in vision_ids),
            *(getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad")),
        }
        self._become_ids = set(self.ids) - self.control if typed_tokens == "ids" else set()
        longest_first = sorted(special.values(), key=lambda token: -len(token.content))
        self._any = re.compile("|".join(_pattern(token) for token in longest_first) or "(?!)")
        # Also inside a word, where one that is a `single_word` is text: a rendering is split at all of these.
        self._written = re.compile("|".join(re.escape(t.content) for t in longest_first) or "(?!)")
        self._becomes_id = re.compile(
            "|".join(_pattern(t) for t in longest_first if t.content in self._become_ids) or "(?!)"
        )

    def tokenize(self, strings: list[str]) -> list[list[int]]:
        """The ids of each string; control tokens in it are text.

        Calls the backend's `encode_batch_fast` with the settings of the tokenizer's `__call__`, which takes 1.5x
        the time here because it builds a dict per string. No string is truncated to the model's maximum.
        """
        if not any(map(self._becomes_id.search, strings)):
            return self._encode(strings)
        pieces = [list(self._split(string)) for string in strings]
        texts = [piece for split in pieces for piece in split if isinstance(piece, str)]
        encoded = iter(self._encode(texts))
        return [
            [number for p in split for number in (next(encoded) if isinstance(p, str) else (p,))]
            for split in pieces
        ]

    def _split(self, string: str) -> Iterator[str | int]:
        """The string's texts, and the ids between them. The tokenizer splits at these tokens too."""
        begin = 0
        for match in self._any.finditer(string):
            token = self._token(match)
            if token in self._become_ids:
                yield string[begin : match.start()]
                yield self.ids[token]
                begin = match.end()
        yield string[begin:]

    def _encode(self, strings: list[str]) -> list[list[int]]:
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        return [e.ids for e in backend.encode_batch_fast(strings, add_special_tokens=False)]

    def typed(self, value: Any) -> TypedTokens:
        """The special tokens in the strings of a JSON value."""
        found = Counter(
            self._token(match) for text in _strings(value) for match in self._any.finditer(text)
        )
        ids = Counter({token: n for token, n in found.items() if token in self._become_ids})
        return TypedTokens(found - ids, ids)

    def broken(self, value: Any) -> Any:
        """A JSON value without special tokens: in each, the first character is replaced; `restored` undoes that.

        Raises:
            RowError: a string has a noncharacter of Unicode.
        """
        if isinstance(value, dict):
            return {self.broken(key): self.broken(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.broken(inner) for inner in value]
        if not isinstance(value, str):
            return value
        if found := _NONCHARACTERS.search(value):
            raise RowError(
                f"a tool or tool call has U+{ord(found[0]):04X}, which is no character of Unicode",
                "remove it",
            )
        return self._written.sub(_break, value)

    def _token(self, match: re.Match[str]) -> str:
        return match[0] if match[0] in self.ids else match[0].strip()


def _break(match: re.Match[str]) -> str:
    return f"{_BROKEN}{ord(match[0][0]):x}{_BROKEN}{match[0][1:]}"


def restored(text: str) -> str:
    """Undo `SpecialTokens.broken` in a rendered text."""
    return _BREAK.sub(lambda match: chr(int(match[1], 16)), text)


def _pattern(token: Any) -> str:
    """What the tokenizer matches for an added token: its text, with the white space that it takes along."""
    pattern: str = re.escape(token.content)
    if token.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    before = r"(?:(?<!\s)\s+)?" if token.lstrip else ""  # tried once per run of white space
    return before + pattern + (r"\s*" if token.rstrip else "")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)
