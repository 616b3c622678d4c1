"""Ids as text in which a special token's id can be told from the same text spelled out."""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Any

BOUNDARY = "\u00b7"  # a middle dot


class TokenText:
    """Decodes ids with a tokenizer: `decode(ids)` is their text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._special = {number: token.content for number, token in added if token.special}
        longest_first = sorted(self._special.values(), key=len, reverse=True)
        pattern = b"|".join(re.escape(text.encode()) for text in longest_first) or b"(?!)"
        self._spelled = re.compile(pattern)

    def __call__(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def special(self, ids: list[int]) -> list[tuple[int, str]]:
        """(place, text) of each special token."""
        return [(place, self._special[n]) for place, n in enumerate(ids) if n in self._special]

    def shown(self, ids: list[int]) -> str:
        """The text of ids. A special token's text that is spelled out in other tokens has a middle dot between
        these, like `<|\u00b7im\u00b7_end\u00b7|>`."""
        text = self(ids)
        if len(self._spelled.findall(text.encode())) == len(self.special(ids)):
            return text
        edges = [-1, *(place for place, _ in self.special(ids)), len(ids)]
        words = []
        for before, after in zip(edges, edges[1:]):
            words.append(self._with_boundaries(ids[before + 1 : after]))
            words += [self._special[number] for number in ids[after : after + 1]]
        return "".join(words)

    def _with_boundaries(self, ids: list[int]) -> str:
        """The text of ids without special tokens."""
        text = self(ids).encode()
        # The tokens of a byte-level tokenizer have a character per byte.
        sizes = [len(token) for token in self._tokenizer.convert_ids_to_tokens(ids)]
        if sum(sizes) != len(text):
            return text.decode()
        edges = set(accumulate(sizes))
        dotted = [
            at
            for match in self._spelled.finditer(text)
            for at in range(match.start() + 1, match.end())
            if at in edges
        ]
        pieces = [text[a:b] for a, b in zip([0, *dotted], [*dotted, len(text)])]
        return BOUNDARY.encode().join(pieces).decode()
