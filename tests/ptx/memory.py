"""Global and shared memory, and the loads and stores of threads. Every access is checked: inside an allocation (or
the CTA's shared memory) and aligned to its size. Unwritten shared memory is NaN in every float type."""

from __future__ import annotations

import ctypes

import numpy as np

from ptx.faults import Fault, Unknown
from ptx.parser import names_of
from ptx.registers import PARAMETER_BASE, SHARED_BASE, UNSIGNED

GLOBAL_BASE = 0x7F0000000000
_GAP = 512  # bytes between allocations, which nothing may touch


class GlobalMemory:
    """A copy of the storages that a launch may touch, at addresses of its own: `address` translates."""

    def __init__(self, tensors):
        regions = []
        spans = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}
        for begin, size in sorted(spans):
            if regions and begin < regions[-1][1]:  # two storages of the same bytes
                regions[-1][1] = max(regions[-1][1], begin + size)
            elif size:
                regions.append([begin, begin + size])
        self.regions, top = [], _GAP  # (address on the host, its end, offset here)
        for begin, end in regions:
            top += begin % 16  # Triton compiled for this alignment
            self.regions.append((begin, end, top))
            top = -(-(top + end - begin + _GAP) // 512) * 512
        self.bytes = np.full(top, 0xCD, np.uint8)
        self.is_allocated = np.zeros(top, bool)
        for begin, end, at in self.regions:
            self.bytes[at : at + end - begin] = _host_bytes(begin, end)
            self.is_allocated[at : at + end - begin] = True
        self._views = _views(self.bytes)

    def address(self, pointer):
        for begin, end, at in self.regions:
            if begin <= pointer <= end:
                return GLOBAL_BASE + at + pointer - begin
        raise Fault(f"a pointer to memory of no tensor: {pointer:#x}")

    def load(self, addresses, size):
        """(n,) addresses -> (n, words) of at most 8 bytes"""
        return self._views[size][self._places(addresses, size, "read")]

    def store(self, addresses, words, size):
        """`words` as `load` gives them"""
        self._views[size][self._places(addresses, size, "write")] = words

    def _places(self, addresses, size, what):
        places = addresses - GLOBAL_BASE
        inside = (places >= 0) & (places <= len(self.bytes) - size)
        ends = np.where(inside, places, 0)
        inside &= self.is_allocated[ends] & self.is_allocated[ends + size - 1]
        if not inside.all():
            bad = int(places[~inside][0])
            begin, end, at = min(
                self.regions, key=lambda r: max(r[2] - bad, bad - r[2] - r[1] + r[0])
            )
            raise Fault(
                f"{what} of {size} bytes outside of all tensors: byte {bad - at} of a storage of "
                f"{end - begin}"
            )
        return _aligned(places, size, what)

    def copy_back(self):
        for begin, end, at in self.regions:
            host, here = _host_bytes(begin, end), self.bytes[at : at + end - begin]
            if not np.array_equal(host, here):  # what is only read may be read-only
                host[:] = here


class SharedMemory:
    """The shared memory of CTAs, `size` bytes of each, and their barriers."""

    def __init__(self, num_blocks, size):
        self.size, self.stride = size, -(-size // 1024) * 1024
        self.bytes = np.full(num_blocks * self.stride, 0xFF, np.uint8)
        self.barriers = {}
        self.race_check = None
        self._views = _views(self.bytes)

    def load(self, t, lanes, addresses, size):
        """Of the threads numbered `lanes`."""
        places = self.places(t.block[lanes], addresses, size, "read")
        if self.race_check:
            self.race_check.reads(places, size, t, lanes)
        return self._views[size][places // size]

    def store(self, t, lanes, addresses, words, size):
        places = self.places(t.block[lanes], addresses, size, "write")
        if self.race_check:
            self.race_check.writes(places, size, t, lanes, self.bytes, words)
        self._views[size][places // size] = words

    def chunks(self, blocks, addresses, what):
        """Places of 16-byte chunks in `view16`, for copies and products of matrices."""
        return self.places(blocks, addresses, 16, what) // 16

    @property
    def view16(self):
        return self._views[16]

    def places(self, blocks, addresses, size, what):
        places = addresses - SHARED_BASE
        if places.size and (places.min() < 0 or places.max() > self.size - size):
            raise Fault(
                f"{what} of {size} bytes outside of shared memory: bytes {places.min()} to "
                f"{places.max() + size} of {self.size}"
            )
        if (places % size).any():
            raise Fault(f"misaligned {what} of {size} bytes of shared memory")
        return places + blocks * self.stride


def _host_bytes(begin, end):
    return np.ctypeslib.as_array((ctypes.c_uint8 * (end - begin)).from_address(begin))


def _views(array):
    """The bytes as words of each size that an access can have; 16 bytes are two words."""
    views = {size: array[: len(array) // size * size].view(f"u{size}") for size in (1, 2, 4, 8)}
    views = {size: view[:, None] for size, view in views.items()}
    return {**views, 16: array[: len(array) // 16 * 16].view(np.uint64).reshape(-1, 2)}


def _aligned(places, size, what):
    if (places % size).any():
        raise Fault(f"misaligned {what} of {size} bytes")
    return places // size


def make(parts, operands, code):
    """The step of ld or st: global, shared or (ld only) a parameter."""
    is_load, kind = parts[0] == "ld", parts[-1]
    space, count = None, 1
    for part in parts[1:-1]:
        if part in ("global", "shared", "param", "shared::cta"):
            space = part.split("::")[0]
        elif part in ("v2", "v4", "v8"):
            count = int(part[1:])
        elif part not in (
            "relaxed",
            "volatile",
            "nc",
            "L1::evict_last",
            "L1::evict_first",
            "L1::no_allocate",
        ):
            raise KeyError(part)
    bits = int(kind[1:])
    size = count * bits // 8
    if space is None or size > 16:
        raise KeyError(parts)
    values, place = operands if is_load else reversed(operands)
    names = names_of(values)
    if len(names) != count:
        raise Unknown(f"{'.'.join(parts)} with {len(names)} registers")
    address = code.address(place)
    if is_load and space == "param":
        return _load_parameter(place, kind, bits, code.write(names[0]), address)
    dtype = np.dtype(f"i{bits // 8}" if kind[0] == "s" else f"u{bits // 8}")
    if is_load:
        writers = [code.write(name) for name in names]

        def load(t, mask):
            lanes = np.arange(t.n) if mask is None else np.flatnonzero(mask)
            addresses = address(t)[lanes]
            if space == "global":
                words = t.launch.memory.load(addresses, size)
            else:
                words = t.shared.load(t, lanes, addresses, size)
            if mask is not None:
                some, words = words, np.zeros((t.n, words.shape[1]), words.dtype)
                words[lanes] = some
            columns = words.view(dtype).T
            for column, write in zip(columns, writers):
                write(t, np.ascontiguousarray(column), mask)

        return load
    readers = [code.read(name, f"u{bits}") for name in names]
    word = UNSIGNED[8 * min(size, 8)]

    def store(t, mask):
        lanes = np.arange(t.n) if mask is None else np.flatnonzero(mask)
        columns = [t.spread(read(t))[lanes] for read in readers]
        words = np.stack(columns, axis=1).view(word)
        if space == "global":
            t.launch.memory.store(address(t)[lanes], words, size)
        else:
            t.shared.store(t, lanes, address(t)[lanes], words, size)

    return store


def _load_parameter(place, kind, bits, write, address):
    dtype = UNSIGNED[bits] if kind[0] != "s" else np.dtype(f"i{bits // 8}")

    def load(t, mask):
        offset = int(address(t)[0]) - PARAMETER_BASE
        write(t, np.frombuffer(t.launch.parameters, dtype, count=1, offset=offset), mask)

    return load
