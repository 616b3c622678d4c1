"""Compiles a kernel to steps, and runs the threads of a grid.

Order "together" runs several CTAs at a time, all threads in step: where they branch, those at the smallest program
counter go first. Order "warps" runs one CTA at a time, its warps in random turns, to look for missing barriers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from ptx import arithmetic, asynchronous, memory, races, tensor_cores
from ptx.faults import Fault, Unknown
from ptx.memory import SharedMemory
from ptx.parser import Instruction, Kernel
from ptx.registers import Operands, Threads
from ptx.warps import WARP_STEPS, whole_warps

MOST_THREADS = 2048  # that run together: beyond, numpy's time per thread no longer falls
MOST_SPINS = 1000
_NOTHING = ("fence", "membar", "griddepcontrol", "setmaxnreg")


@dataclass
class Launch:
    """What the threads of a grid share. `maps` are tensor maps by their offset in the parameters."""

    memory: memory.GlobalMemory
    parameters: bytes
    maps: dict[int, asynchronous.TensorMap]
    grid: tuple[int, int, int]
    shared_bytes: int
    late: bool = False  # asynchronous work when it is waited for, not at once
    warp_seed: int | None = None  # random turns of warps
    check_races: bool = False


@dataclass
class Step:
    """A compiled instruction; `kind` is "", "branch", "end", "barrier", "wait", "wgmma" or "shared"."""

    text: str
    kind: str = ""
    run: object = None  # (threads, mask or None)
    guard: object = None  # threads -> where the instruction is executed
    is_negated: bool = False
    target: int = -1
    times: int = 0  # that some threads executed it


class Program:
    """A kernel, compiled to steps."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.code = Operands(kernel)
        self.steps = [self._step(instruction) for instruction in kernel.instructions]

    def _step(self, instruction: Instruction) -> Step:
        step = Step(instruction.text)
        if instruction.guard:
            step.guard = self.code.read(instruction.guard[0], "pred")
            step.is_negated = instruction.guard[1]
        parts, operands = instruction.parts, instruction.operands
        self.code.is_guarded = instruction.guard is not None
        try:
            if parts[0] == "bra":
                step.kind, step.target = "branch", self.kernel.labels[operands[0]]
            elif parts[0] in ("ret", "exit"):
                step.kind = "end"
            elif parts in (("bar", "sync"), ("barrier", "sync"), ("barrier", "sync", "aligned")):
                if operands != ("0",):
                    raise KeyError(operands)
                step.kind = "barrier"
            else:
                step.run = self._run_of(parts, operands)
                if parts[0] == "mbarrier" and parts[1] in ("try_wait", "test_wait"):
                    step.kind = "wait"
                elif parts[:2] == ("wgmma", "mma_async"):
                    step.kind = "wgmma"
                elif "shared" in parts:
                    step.kind = "shared"
        except (KeyError, ValueError, IndexError) as error:
            raise Unknown(f"the emulator does not know {instruction.text!r} ({error})") from error
        except Unknown as error:
            raise Unknown(f"{error}, in {instruction.text!r}") from error
        return step

    def _run_of(self, parts, operands):
        name, code = parts[0], self.code
        if name in _NOTHING or parts == ("bar", "warp", "sync"):
            return lambda t, mask: None
        if name in ("ld", "st"):
            return memory.make(parts, operands, code)
        if name in WARP_STEPS:
            return WARP_STEPS[name](parts, operands, code)
        if name == "mbarrier":
            return asynchronous.make_mbarrier(parts, operands, code)
        if name == "cp":
            return asynchronous.make_cp(parts, operands, code)
        if name == "wgmma":
            return tensor_cores.make_wgmma(parts, operands, code)
        if name == "mma":
            return tensor_cores.make_mma(parts, operands, code)
        if name == "mov" and "{" in "".join(operands):
            return arithmetic.make_packing(parts, operands, code)
        if name == "cvt" and parts[-2] in ("bf16x2", "f16x2"):
            return arithmetic.make_packed_cvt(parts, operands, code)
        function, kinds = arithmetic.make(parts)
        write = code.write(operands[0])
        sources = [
            code.read(operand, kind) for operand, kind in zip(operands[1:], kinds, strict=True)
        ]
        if len(sources) == 1:
            (read,) = sources
            return lambda t, mask: write(t, function(read(t)), mask)
        if len(sources) == 2:
            first, second = sources
            return lambda t, mask: write(t, function(first(t), second(t)), mask)
        return lambda t, mask: write(t, function(*[read(t) for read in sources]), mask)


def run(program: Program, launch: Launch) -> None:
    """Run all CTAs of a grid."""
    x, y, z = launch.grid
    blocks = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    with np.errstate(all="ignore"):
        if launch.warp_seed is not None:
            turns = random.Random(launch.warp_seed)
            turns.shuffle(blocks)
            for block in blocks:
                _run_warps(program, launch, block, turns)
            return
        one_at_a_time = launch.late or launch.check_races
        number = 1 if one_at_a_time else max(1, MOST_THREADS // program.kernel.num_threads)
        for begin in range(0, len(blocks), number):
            threads = _threads(program, launch, blocks[begin : begin + number])
            spins = 0
            for event in _events(program, threads):
                spins = spins + 1 if event == "spin" else 0
                if spins > MOST_SPINS:
                    raise Fault("all threads wait for a barrier whose phase never ends")
            _check_end([threads])


def _threads(program, launch, blocks):
    num_threads, count = program.kernel.num_threads, len(blocks)
    shared = SharedMemory(count, launch.shared_bytes)
    if launch.check_races:
        shared.race_check = races.RaceCheck(len(shared.bytes))
    tid = np.tile(np.arange(num_threads, dtype=np.uint32), count)
    block = np.repeat(np.arange(count), num_threads)
    ctaid = [np.array(axis, np.uint32)[block] for axis in zip(*blocks)]
    return Threads(program.kernel, launch, shared, tid, block, ctaid)


def _run_warps(program, launch, block, turns):
    """One CTA, its warps in random turns between barriers and accesses to shared memory."""
    cta = _threads(program, launch, [block])
    warps = []
    for begin in range(0, cta.n, 32):
        lanes = slice(begin, begin + 32)
        ctaid = [axis[lanes] for axis in cta.ctaid]
        of = (program.kernel, launch, cta.shared, cta.tid[lanes], cta.block[lanes], ctaid)
        warps.append(Threads(*of))
    events = [_events(program, warp) for warp in warps]
    states, spins = ["turn"] * len(warps), 0
    while set(states) != {"done"}:
        ready = [number for number, state in enumerate(states) if state in ("turn", "spin")]
        if ready:
            number = turns.choice(ready)
            states[number] = next(events[number], "done")
            spins = spins + 1 if states[number] == "spin" else 0
            if spins > MOST_SPINS * len(warps):
                raise Fault("all threads wait for a barrier whose phase never ends")
        elif set(states) <= {"barrier", "done"}:
            states = ["turn" if state == "barrier" else state for state in states]
            continue
        elif set(states) & {"barrier"} and not _groups_at_wgmma(states):
            raise Fault("some warps wait at a barrier, others at a wgmma")
        for group in _groups_at_wgmma(states):
            _wgmma_together(program, warps[group])
            states[group] = ["turn"] * 4
    _check_end(warps)


def _groups_at_wgmma(states):
    groups = (slice(begin, begin + 4) for begin in range(0, len(states) - 3, 4))
    return [group for group in groups if set(states[group]) == {"wgmma"}]


def _wgmma_together(program, warps):
    """The wgmma at which the four warps of a group are."""
    if len({int(warp.pcs[0]) for warp in warps}) > 1:
        raise Fault("the warps of a group are at different wgmmas")
    step = program.steps[int(warps[0].pcs[0])]
    try:
        step.run(_Warpgroup(warps), None)
    except (Fault, Unknown) as error:
        raise type(error)(f"{error}: {step.text}") from None


class _Warpgroup:
    """Four warps as one `Threads`, for as long as a wgmma lasts."""

    def __init__(self, warps):
        self.warps, self.n, self.wgmma, self.registers = warps, 128, self, self
        self.shared, self.launch = warps[0].shared, warps[0].launch
        self.block = np.concatenate([warp.block for warp in warps])
        self.tid = np.concatenate([warp.tid for warp in warps])

    spread = Threads.spread

    def add(self, job):
        """The first warp that waits for it does it."""
        if not self.launch.late:
            job()
            return
        jobs = [job]
        for warp in self.warps:
            warp.wgmma.add(lambda: jobs.pop()() if jobs else None)

    def __getitem__(self, place):
        values = [warp.registers[place] for warp in self.warps]
        if any(value is None for value in values):
            return None
        if len({value.dtype for value in values}) > 1:
            values = [value.view(f"u{value.dtype.itemsize}") for value in values]
        return np.concatenate(values)

    def __setitem__(self, place, value):
        for number, warp in enumerate(self.warps):
            warp.registers[place] = value[32 * number : 32 * number + 32]


def _check_end(all_threads):
    if not all(t.wgmma.is_idle() and t.copies.is_idle() for t in all_threads):
        raise Fault("wgmma or cp.async that nobody waited for")


def _events(program, t):
    """Run threads to their end. Yields "barrier" if all are at one and others (of another warp) may not be,
    "wgmma" if a warp needs the others of its group, "spin" if it waits for a copy."""
    steps, is_warp = program.steps, t.n == 32
    while True:
        runnable = t.alive & ~t.waiting
        if not runnable.any():
            if not t.alive.any():
                return
            _release(t)
            continue
        pc = int(t.pcs[runnable].min())
        active = runnable & (t.pcs == pc)
        others = t.pcs[runnable & ~active]
        stop = int(others.min()) if len(others) else len(steps)
        mask = None if active.all() else active
        while pc < stop:
            step = steps[pc]
            where = mask
            if step.guard is not None:
                try:
                    where = t.spread(step.guard(t))
                except Fault as fault:
                    raise Fault(f"{fault}: {step.text}") from None
                if step.is_negated:
                    where = ~where
                if mask is not None:
                    where = where & mask
                count = np.count_nonzero(where)
                if count == t.n:
                    where = None
                elif not count and step.kind not in ("branch", "end"):
                    pc += 1
                    continue
            step.times += 1
            if step.kind == "branch":
                if where is mask or where is None or np.array_equal(where, active):
                    pc = step.target
                    if pc < stop:
                        continue
                elif not where.any():
                    pc += 1
                    continue
                else:
                    t.pcs[active] = pc + 1
                    t.pcs[where] = step.target
                    break
            elif step.kind == "end":
                ended = active if where is None else where
                t.pcs[active] = pc + 1
                t.alive = t.alive & ~ended
                _release(t)
                break
            elif step.kind == "barrier":
                whole_warps(t, where)
                t.pcs[active] = pc + 1
                if is_warp:
                    yield "barrier"
                elif where is not None or not t.alive.all():
                    t.waiting |= active if where is None else where
                    _release(t)
                    break
                elif t.shared.race_check:
                    t.shared.race_check.barrier()
                pc += 1
                continue
            else:
                if step.kind == "wgmma" and is_warp:
                    t.pcs[:] = pc
                    yield "wgmma"
                else:
                    try:
                        step.run(t, where)
                    except (Fault, Unknown) as error:
                        raise type(error)(f"{error}: {step.text}") from None
                    if step.kind == "wait" and t.is_blocked:
                        yield "spin"
                    elif is_warp and step.kind == "shared":
                        yield "turn"
                pc += 1
                continue
            t.pcs[active] = pc
            break
        else:
            t.pcs[active] = pc


def _release(t):
    """Let the CTAs go on whose threads all wait at a barrier; a CTA is known by its `block`."""
    for block in np.unique(t.block[t.waiting]):
        of_block = (t.block == block) & t.alive
        if not t.waiting[of_block].all():
            continue
        places = np.unique(t.pcs[of_block])
        if len(places) > 1:
            texts = [f"{place - 1}" for place in places]
            raise Fault(
                f"the threads of a CTA wait at different barriers, instructions {', '.join(texts)}"
            )
        t.waiting &= ~of_block
        if t.shared.race_check:
            t.shared.race_check.barrier()
