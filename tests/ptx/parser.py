"""PTX text -> a `Kernel`: its parameters, the widths of its registers, its instructions and labels.

Only the parts of PTX that Triton writes. Anything else is an error that quotes it. Names in a `{ }` of the body
(Triton's inline assembly has such) are local to it, and get the scope's number: `complete@2`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ptx.faults import Unknown

WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "b64": 64}
# A statement may have braces: {%r1, %r2} or [%rd1, {%r1, %r2}].
_STATEMENT = re.compile(
    r"\s*(?:(?P<scope>[{}])|(?P<label>[$\w]+):|\.loc\s[^\n]*|"
    r"(?P<text>[^;{}]+(?:\{[^;{}]*(?:\{[^{}]*\})?[^;{}]*\}[^;{}]*)*);)"
)
_GUARD = re.compile(r"@(!?)([%$\w@]+)\s+")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel: `offset` and `size` in bytes; `kind` is "u64" or "f32", or "map" for a tensor
    map."""

    name: str
    kind: str
    offset: int
    size: int


@dataclass
class Instruction:
    """`@!%p1 mad.wide.s32 %rd1, %r2, 4, %rd3`: guard ("%p1", True), parts ("mad", "wide", "s32"), 4 operands."""

    text: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None


@dataclass
class Kernel:
    """A kernel's code. `num_threads` is of a CTA; `widths` in bits, by register; `labels` number instructions."""

    name: str
    parameters: list[Parameter]
    num_threads: int
    widths: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


def parse(ptx: str) -> Kernel:
    """The one kernel of a file."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    heads = re.findall(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*(.*?)\n\{", ptx, re.S)
    if len(heads) != 1:
        raise Unknown(f"a file with {len(heads)} kernels: {[head[0] for head in heads]}")
    name, parameters, directives = heads[0]
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    if not threads:
        raise Unknown(f"{name} without .reqntid: {directives!r}")
    kernel = Kernel(name, list(_parameters(parameters)), int(threads[1]))
    body = ptx[re.search(r"\.entry.*?\n\{", ptx, re.S).end() :]
    _Body(kernel).read(body)
    return kernel


def _parameters(text: str):
    offset = 0
    for declaration in filter(None, map(str.strip, text.split(","))):
        found = re.fullmatch(r"\.param\s+(.*?)([\w$]+)(?:\[(\d+)\])?", declaration, re.S)
        if not found:
            raise Unknown(f"parameter {declaration!r}")
        how, name, bytes_of_array = found.groups()
        if bytes_of_array:
            kind, size, align = "map", int(bytes_of_array), 64
        else:
            kind = re.search(r"\.([usbf]\d+)", how)[1]
            size = align = int(kind[1:]) // 8
        offset = -(-offset // align) * align
        yield Parameter(name, kind, offset, size)
        offset += size


class _Body:
    """Reads a kernel's statements into it."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.scopes: list[
            tuple[int, set[str]]
        ] = []  # of inline assembly: number, names declared in it
        self.num_scopes = 0
        self.families: dict[str, int] = {}  # %r<10> declares %r0 to %r9: width by "%r"

    def read(self, body: str) -> None:
        at = 0
        while True:
            found = _STATEMENT.match(body, at)
            if not found:
                raise Unknown(f"the statement {body[at : at + 80].strip()!r}")
            at = found.end()
            if found["scope"] == "{":
                self.num_scopes += 1
                inside = body[at : body.index("}", at)]
                self.scopes.append((self.num_scopes, set(re.findall(r"([$\w]+):(?!:)", inside))))
            elif found["scope"] == "}":
                if not self.scopes:
                    return
                self.scopes.pop()
            elif found["label"]:
                self.kernel.labels[self._local(found["label"])] = len(self.kernel.instructions)
            elif found["text"]:
                self._statement(" ".join(found["text"].split()))

    def _local(self, name: str) -> str:
        """A name as the whole kernel knows it."""
        for number, names in reversed(self.scopes):
            if name in names:
                return f"{name}@{number}"
        return name

    def _statement(self, text: str) -> None:
        if text.startswith(".pragma"):
            return
        if text.startswith(".reg "):
            self._registers(text)
            return
        if text.startswith("."):
            raise Unknown(f"the directive {text!r}")
        if self.scopes:
            text = re.sub(r"(?<![.\w$%:])[a-zA-Z_]\w*(?![\w.:])", lambda m: self._local(m[0]), text)
        guard = _GUARD.match(text)
        rest = text[guard.end() :] if guard else text
        operation, _, operands = rest.partition(" ")
        instruction = Instruction(
            text=text,
            parts=tuple(operation.split(".")),
            operands=tuple(split_operands(operands)),
            guard=(guard[2], bool(guard[1])) if guard else None,
        )
        for name in re.findall(r"%[a-z]+\d+", text):
            family = re.match(r"%[a-z]+", name)[0]
            if family in self.families:
                self.kernel.widths[name] = self.families[family]
        self.kernel.instructions.append(instruction)

    def _registers(self, text: str) -> None:
        """.reg .b32 %r<9>, or .reg .pred complete"""
        _, kind, names = text.split(" ", 2)
        if kind[1:] not in WIDTHS:
            raise Unknown(f"registers of {text!r}")
        for name in names.split(","):
            family = re.fullmatch(r"\s*(%[a-z]+)<\d+>\s*", name)
            if family:
                self.families[family[1]] = WIDTHS[kind[1:]]
            else:
                self.scopes[-1][1].add(name.strip())
                self.kernel.widths[self._local(name.strip())] = WIDTHS[kind[1:]]


def split_operands(text: str) -> list[str]:
    """ "%r1, {%r2, %r3}, [%rd1+4]" -> ["%r1", "{%r2, %r3}", "[%rd1+4]"]"""
    parts, depth, begin = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "[{(") - (character in ")}]")
        if character == "," and not depth:
            parts.append(text[begin:at].strip())
            begin = at + 1
    return [*parts, text[begin:].strip()] if text[begin:].strip() else parts


def names_of(operand: str) -> list[str]:
    """ "{%r1, %r2}" or "%r1" -> the names"""
    return [name.strip() for name in operand.strip("{} ").split(",")]
