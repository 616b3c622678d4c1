"""Is an implementation of an op right on this GPU, and how long does it take: the trials of `mmpack tune`.

Right means, on segments of SEGMENTS rows and with fresh memory full of NaN: no row is further from float64 than
twice a library's worst row plus 1e-5; what is copied is equal to the bit. Of our own kernels also: two backward
passes give the same bits, and a change in one segment changes no bit of another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mmpack.ops.tuning import ShapeClass
from mmpack.trials import WrongResultError

SEGMENTS = (1, 127, 130, 64, 3)  # around the 128 rows of a tile
CHANGED = 2  # the segment that is changed to see whether others notice
OURS = "triton"
REPEATS = 5  # runs per timing

Tensors = dict[str, Tensor]


class OpTrial:
    """The candidates for one op and shape class. A subclass defines the op.

    Attributes:
        default: the candidate that is used without a measurement.
        plain: a library's, whose error is the yardstick.
        copied: names of outputs that are copies.
        by_row: names of inputs and outputs with one row per token, or per entry of `rows`.
        rows: for some of them, an input with the token of each row.
    """

    default = plain = "libraries"
    copied: tuple[str, ...] = ()
    by_row: tuple[str, ...] = ()
    rows: dict[str, str] = {}

    def __init__(self, shape: ShapeClass, tokens: int, device: torch.device) -> None:
        self.sizes = dict(shape.sizes)
        self.dtype = getattr(torch, shape.dtype)
        self.tokens, self.device = tokens, device
        self._random = torch.Generator(device=device).manual_seed(0)
        self.small = self.inputs(SEGMENTS, is_timed=False)
        exactly = {n: x.double() if x.is_floating_point() else x for n, x in self.small.items()}
        self._exact = self.run(self.plain, exactly)
        self._plain = self.run(self.plain, self.small)
        self._large: Tensors | None = None

    def candidates(self) -> Sequence[str]:
        """The implementations that can be called with these inputs."""
        return ["libraries", OURS]

    def inputs(self, lengths: Sequence[int], is_timed: bool) -> Tensors:
        """Random inputs, and the outputs' gradients, for segments of these lengths."""
        raise NotImplementedError

    def run(self, name: str, given: Tensors) -> Tensors:
        """Outputs and gradients of a candidate."""
        raise NotImplementedError

    def timed_lengths(self) -> list[int]:
        """The lengths of the segments to time."""
        raise NotImplementedError

    def check(self, name: str) -> None:
        """Raises: WrongResultError: says which output is wrong, and by how much."""
        with fresh_memory_is_nan():
            first, second = (self.run(name, self.small) for _ in range(2))
        for output, exact in self._exact.items():
            if output in self.copied and not torch.equal(first[output], self._plain[output]):
                raise WrongResultError(f"{output}: not copied bit by bit")
            error, yardstick = (worst_row(x[output], exact) for x in (first, self._plain))
            if not error <= (allowed := 2 * yardstick + 1e-5):
                raise WrongResultError(f"{output}: error {error:.2e}, at most {allowed:.2e}")
        if name != OURS:
            return
        for output, one in first.items():
            if not torch.equal(one, second[output]):
                raise WrongResultError(f"{output}: two runs differ")
        changed = dict(self.small)
        for part in self.by_row:
            if part in changed:
                factor = 1 - 4 * self._is_changed(part).to(changed[part].dtype)
                changed[part] = changed[part] * factor.reshape(-1, *[1] * (changed[part].ndim - 1))
        for output, one in self.run(name, changed).items():
            if output in self.by_row:
                others = ~self._is_changed(output)
                if not torch.equal(one[others], first[output][others]):
                    raise WrongResultError(f"{output}: a change in one segment changed another")

    def _is_changed(self, name: str) -> Tensor:
        """Which rows belong to the segment that is changed."""
        begin = sum(SEGMENTS[:CHANGED])
        tokens = torch.arange(sum(SEGMENTS), device=self.device)
        if name in self.rows:
            tokens = self.small[self.rows[name]]
        return (tokens >= begin) & (tokens < begin + SEGMENTS[CHANGED])

    def seconds(self, name: str) -> float:
        """Seconds of a forward and backward."""
        if self._large is None:
            self._large = self.inputs(self.timed_lengths(), is_timed=True)
        if self.device.type != "cuda":
            begin = time.perf_counter()
            self.run(name, self._large)
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPEATS):
            self.run(name, self._large)
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1000 / REPEATS

    def random(self, *shape: int) -> Tensor:
        """Normal numbers in the class's dtype."""
        values = torch.randn(shape, generator=self._random, device=self.device)
        return values.to(self.dtype)


def worst_row(found: Tensor, exact: Tensor) -> float:
    """The largest distance of a row from its exact value, relative to the rows' root mean square; inf if not
    finite."""
    rows = exact.flatten(1)
    scale = rows.norm(dim=1).square().mean().sqrt()
    error = float(((found.double().flatten(1) - rows).norm(dim=1) / scale).max())
    return error if error < float("inf") else float("inf")


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """Fill what `torch.empty` and its relatives allocate with NaN, so that rows that nobody writes are noticed."""
    places = ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like"))
    real = {name: getattr(owner, name) for owner, name in places}

    def filled(name: str):
        def allocate(*args, **kwargs):
            out = real[name](*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() and not out.is_meta else out

        return allocate

    try:
        for owner, name in places:
            setattr(owner, name, filled(name))
        yield
    finally:
        for owner, name in places:
            setattr(owner, name, real[name])
