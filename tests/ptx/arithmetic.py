"""Instructions that compute a register from registers: integers, floats, predicates, conversions.

`ARITHMETIC[name](parts)` gives (function of arrays, kinds of the operands), or raises KeyError for modifiers it
does not know. ex2, lg2, rcp, sqrt and div are exact, a GPU's approximations are not modelled.
"""

from __future__ import annotations

import numpy as np

from ptx.parser import names_of
from ptx.registers import DTYPES, decode_half, encode_half

_ROUNDINGS = {"rn": np.rint, "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_COMPARE = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal},
    **{"hi": np.greater, "hs": np.greater_equal},
}
_SMALLEST = np.float32(2.0**-126)


def make(parts):
    """(function, kinds of the sources) of an instruction; KeyError if it is not known."""
    return ARITHMETIC[parts[0]](parts)


def _only(parts, *allowed):
    """The modifiers, all of which must be known."""
    for part in parts[1:-1]:
        if part not in allowed:
            raise KeyError(part)
    return parts[1:-1]


def _flush(x):
    return np.where(np.abs(x) < _SMALLEST, np.copysign(np.float32(0), x), x)


def _float(function, *modifiers):
    """A float operation; .ftz flushes denormal operands and results."""

    def of(parts, count):
        kind = parts[-1]
        if "ftz" not in _only(parts, "ftz", *modifiers):
            return function, [kind] * count
        return lambda *xs: _flush(function(*map(_flush, xs))), [kind] * count

    return of


def _both(integers, floats, *modifiers):
    """An operation on two integers or two floats."""

    def of(parts):
        if parts[-1][0] == "f":
            return _float(floats, *modifiers)(parts, 2)
        _only(parts)
        return integers, [parts[-1]] * 2

    return of


def _mul(parts):
    kind = parts[-1]
    if kind[0] == "f":
        return _float(np.multiply, "rn")(parts, 2)
    (how,) = _only(parts, "lo", "wide", "hi")
    if how == "lo":
        return np.multiply, [kind] * 2
    bits = int(kind[1:])
    wide = DTYPES[f"{kind[0]}{2 * bits}"]  # KeyError for 64 bits
    if how == "wide":
        return lambda a, b: a.astype(wide) * b.astype(wide), [kind] * 2
    return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(
        DTYPES[kind]
    ), [kind] * 2


def _mad(parts):
    kind = parts[-1]
    (how,) = _only(parts, "lo", "wide")
    if how == "lo":
        return lambda a, b, c: a * b + c, [kind] * 3
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    dtype = DTYPES[wide]
    return lambda a, b, c: a.astype(dtype) * b.astype(dtype) + c, [kind, kind, wide]


def _exactly(function):
    """numpy's own in float32 are off by an ulp."""
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


def _fma(parts):
    """One rounding: products are exact in the wider type."""
    wide = {"f32": np.float64, "f64": np.longdouble}[parts[-1]]
    dtype = DTYPES[parts[-1]]
    return _float(lambda a, b, c: (a.astype(wide) * b + c).astype(dtype), "rn")(parts, 3)


def _quotient(a, b):
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":  # numpy rounds down, C to zero
        quotient = quotient + ((a - quotient * safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, -1, quotient).astype(a.dtype)


def _div(parts):
    if parts[-1][0] == "f":
        return _float(np.divide, "full", "rn", "approx")(parts, 2)
    _only(parts)
    return _quotient, [parts[-1]] * 2


def _rem(parts):
    _only(parts)
    return lambda a, b: np.where(b == 0, a, a - _quotient(a, b) * b).astype(a.dtype), [
        parts[-1]
    ] * 2


def _extremum(integers, numbers, with_nan):
    def of(parts):
        if parts[-1][0] != "f":
            _only(parts)
            return integers, [parts[-1]] * 2
        return _float(with_nan if "NaN" in parts else numbers, "NaN")(parts, 2)

    return of


def _same(function, count):
    """The same on any type, without modifiers."""

    def of(parts):
        _only(parts)
        return function, [parts[-1]] * count

    return of


def _shift(parts):
    """Shifts by the width or more give 0, or copies of the sign."""
    kind = parts[-1]
    _only(parts)
    bits, is_left = int(kind[1:]), parts[0] == "shl"
    move = np.left_shift if is_left else np.right_shift

    def shift(a, by):
        moved = move(a, np.minimum(by, bits - 1).astype(a.dtype))
        return (
            moved if kind[0] == "s" and not is_left else np.where(by < bits, moved, a.dtype.type(0))
        )

    return shift, [kind, "u32"]


def _bfe(parts):
    """Extracts bits."""
    kind = parts[-1]
    bits, dtype = int(kind[1:]), DTYPES[kind]
    if bits == 64:
        raise KeyError(kind)

    def extract(a, position, length):
        position, length = (x.astype(np.int64) for x in (position, length))
        value = (a.astype(np.int64) & ((1 << bits) - 1)) >> np.minimum(position, 63)
        value &= (np.int64(1) << np.minimum(length, 62)) - 1
        if kind[0] == "s":
            is_negative = (length > 0) & ((value >> np.maximum(length - 1, 0)) & 1 == 1)
            value = np.where(is_negative, value - (np.int64(1) << length), value)
        return value.astype(dtype)

    return extract, [kind, "u32", "u32"]


def _prmt(parts):
    """Picks four of eight bytes."""
    _only(parts)

    def permute(a, b, selectors):
        eight = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        out = np.uint64(0)
        for place in range(4):
            selector = (selectors >> np.uint32(4 * place)).astype(np.uint64) & np.uint64(15)
            byte = (eight >> ((selector & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            out = out | (np.where(selector & np.uint64(8), sign, byte) << np.uint64(8 * place))
        return out.astype(np.uint32)

    return permute, ["u32"] * 3


def _lop3(parts):
    """Any function of three bits, as a table of eight."""
    _only(parts)

    def look_up(a, b, c, table):
        out = np.uint32(0)
        for row in range(8):
            if int(table[0]) >> row & 1:
                term = np.uint32(0xFFFFFFFF)
                for bit, x in ((4, a), (2, b), (1, c)):
                    term = term & (x if row & bit else ~x)
                out = out | term
        return np.asarray(out)

    return look_up, ["u32"] * 4


def _count_bits(parts):
    kind = parts[-1]

    def count(a):
        return np.array([int(x).bit_count() for x in a], np.uint32)

    return count, [kind.replace("b", "u")]


def _setp(parts):
    kind, how = parts[-1], parts[1]
    if len(parts) != 3 or kind == "bf16":
        raise KeyError(parts)
    if kind[0] != "f":
        return _COMPARE[how], [kind] * 2
    if how in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (how == "nan"), [kind] * 2
    is_unordered = how.endswith("u")  # true if an operand is NaN
    compare = _COMPARE[how[:-1] if is_unordered else how]

    def compared(a, b):
        nan = np.isnan(a) | np.isnan(b)
        return compare(a, b) | nan if is_unordered else compare(a, b) & ~nan

    return compared, [kind] * 2


def _cvt(parts):
    """Conversions but those of two floats into one register, which `cvt_packed` makes."""
    to, source = parts[-2:]
    modifiers = parts[1:-2]
    if not set(modifiers) <= {"ftz", "sat", *_ROUNDINGS} or "sat" in modifiers:
        raise KeyError(modifiers)
    rounding = next((_ROUNDINGS[m] for m in modifiers if m != "ftz"), np.rint)
    is_integral = any(m in ("rni", "rzi", "rmi", "rpi") for m in modifiers)
    dtype = DTYPES[to]

    def convert(x):
        if source in ("bf16", "f16"):
            x = decode_half(x.view(np.uint16), source)
        if x.dtype.kind == "f" and dtype.kind in "iu" and to != "bf16":
            limits = np.iinfo(dtype)
            # The largest float below 2^63 for one whose limit no float has.
            top = np.nextafter(float(limits.max), 0) if dtype.itemsize == 8 else limits.max
            inside = np.clip(rounding(x.astype(np.float64)), limits.min, top).astype(dtype)
            inside = np.where(x.astype(np.float64) > top, dtype.type(limits.max), inside)
            return np.where(np.isnan(x), dtype.type(0), inside)
        if is_integral:
            x = rounding(x)
        if to in ("bf16", "f16"):
            return encode_half(x.astype(np.float32), to)
        return x.astype(dtype)

    return convert, [source]


def _mov(parts):
    _only(parts)
    return lambda a: a, [parts[-1]]


def make_packing(parts, operands, code):
    """mov between a register and several narrower ones."""
    bits = int(parts[-1][1:])
    joins = operands[1].startswith("{")
    names = names_of(operands[1] if joins else operands[0])
    width = bits // len(names)
    dtype = DTYPES[f"u{bits}"]
    if joins:
        readers, write = [code.read(name, f"u{width}") for name in names], code.write(operands[0])

        def join(t, mask):
            value = dtype.type(0)
            for number, read in enumerate(readers):
                value = value | read(t).astype(dtype) << dtype.type(number * width)
            write(t, value, mask)

        return join
    read, writers = code.read(operands[1], f"u{bits}"), [code.write(name) for name in names]
    narrow = DTYPES[f"u{width}"]

    def split(t, mask):
        value = read(t)
        for number, write in enumerate(writers):
            write(t, (value >> dtype.type(number * width)).astype(narrow), mask)

    return split


def make_packed_cvt(parts, operands, code):
    """Two float32 -> two halves in a register, the first in its high bits."""
    if parts[1:-2] != ("rn",) or parts[-1] != "f32":
        raise KeyError(parts)
    half = parts[-2][:-2]
    write = code.write(operands[0])
    high, low = (code.read(operand, "f32") for operand in operands[1:])

    def convert(t, mask):
        top, bottom = (encode_half(read(t), half).astype(np.uint32) for read in (high, low))
        write(t, bottom | top << np.uint32(16), mask)

    return convert


ARITHMETIC = {
    "mov": _mov,
    "cvta": lambda parts: (lambda a: a, ["u64"]),
    "add": _both(np.add, np.add, "rn"),
    "sub": _both(np.subtract, np.subtract, "rn"),
    "mul": _mul,
    "mad": _mad,
    "fma": _fma,
    "div": _div,
    "rem": _rem,
    "neg": lambda parts: _float(np.negative)(parts, 1),
    "abs": lambda parts: _float(np.abs)(parts, 1),
    "min": _extremum(np.minimum, np.fmin, np.minimum),
    "max": _extremum(np.maximum, np.fmax, np.maximum),
    "and": _same(np.bitwise_and, 2),
    "or": _same(np.bitwise_or, 2),
    "xor": _same(np.bitwise_xor, 2),
    "not": _same(np.invert, 1),
    "shl": _shift,
    "shr": _shift,
    "bfe": _bfe,
    "prmt": _prmt,
    "lop3": _lop3,
    "popc": _count_bits,
    "selp": lambda parts: (lambda a, b, p: np.where(p, a, b), [parts[-1], parts[-1], "pred"]),
    "setp": _setp,
    "ex2": lambda parts: _float(_exactly(np.exp2), "approx")(parts, 1),
    "lg2": lambda parts: _float(_exactly(np.log2), "approx")(parts, 1),
    "rcp": lambda parts: _float(np.reciprocal, "approx", "rn")(parts, 1),
    "sqrt": lambda parts: _float(np.sqrt, "approx", "rn")(parts, 1),
    "rsqrt": lambda parts: _float(lambda x: 1 / np.sqrt(x), "approx")(parts, 1),
    "cvt": _cvt,
}
