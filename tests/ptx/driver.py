"""Triton's JIT with the emulator in place of a GPU: kernels are bound, specialized and compiled as for a GPU, and
get CPU tensors. Limits of a launch are checked as a GPU's driver does.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import make_tensordesc_arg

from ptx import schedule
from ptx.asynchronous import TensorMap
from ptx.faults import Fault, Unknown
from ptx.memory import GlobalMemory
from ptx.parser import parse

MAX_SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448}  # bytes of a CTA, by architecture
_FORMATS = {8: "b", 16: "h", 32: "i", 64: "q"}


@dataclass
class Order:
    """How the emulator runs threads and copies; see `schedule.Launch`."""

    late: bool = False
    warp_seed: int | None = None
    check_races: bool = False


class Driver:
    """What Triton asks of a driver."""

    def __init__(self, arch: int = 90, order: Order | None = None):
        self.arch, self.order = arch, order or Order()
        self.utils, self.launcher_cls = self, self._launcher
        self.programs: dict[str, schedule.Program] = {}
        self.edit = lambda ptx: ptx  # of every kernel that is loaded: tests put faults in
        self.device = 0
        self._ptx = ""
        triton.knobs.runtime.kernel_load_start_hook = self._about_to_load

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_properties(self, device):
        return {
            "max_shared_mem": MAX_SHARED[self.arch],
            "multiprocessor_count": 132,
            "warpSize": 32,
        }

    def _about_to_load(self, module, function, name, metadata_group, hash):
        self._ptx = next(Path(path) for path in metadata_group.values() if path.endswith(".ptx"))

    def load_binary(self, name, kernel, shared, device):
        """(module, function, registers, spills, most threads of a CTA)"""
        text = self.edit(self._ptx.read_text())
        if text not in self.programs:
            self.programs[text] = schedule.Program(parse(text))
        return None, self.programs[text], 0, 0, 1024

    def fill_tma_descriptor_tiled(self, address, swizzle, size, dtype, block, shape, strides, pad):
        return TensorMap(address, swizzle, size, list(block), list(shape), list(strides), bool(pad))

    fill_tma_descriptor = fill_tma_descriptor_tiled  # its name in Triton 3.6

    def _launcher(self, source, metadata):
        return lambda *args: self._launch(source, metadata, *args)

    def _launch(self, source, metadata, x, y, z, stream, program, *rest):
        args = rest[4:]  # the others are of hooks
        if min(x, y, z) < 0 or x >= 1 << 31 or max(y, z) > 65535:
            raise Fault(f"a grid of {x, y, z}: at most 2^31 - 1, 65535 and 65535")
        if not x * y * z:
            return
        if getattr(metadata, "global_scratch_size", 0):
            raise Unknown("scratch memory of a kernel")
        values, descriptors = [], iter(getattr(metadata, "tensordesc_meta", None) or [])
        for kind, value in zip(source.signature.values(), args, strict=True):
            if kind.startswith("tensordesc"):
                values += make_tensordesc_arg(value, next(descriptors, None))
            elif kind != "constexpr":
                values.append(value)
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        tensors += [
            value.base for value in args if hasattr(value, "base") and hasattr(value, "strides")
        ]
        memory = GlobalMemory([tensor for tensor in tensors if tensor.numel()])
        parameters, maps = _parameters(program.kernel, values, memory)
        launch = schedule.Launch(
            memory, parameters, maps, (x, y, z), max(metadata.shared, 16), **vars(self.order)
        )
        schedule.run(program, launch)
        memory.copy_back()


def _parameters(kernel, values, memory):
    """The bytes of a kernel's parameters, and its tensor maps by their offset in them."""
    out, maps = bytearray(kernel.parameter_bytes), {}
    scratch = [None] * (len(kernel.parameters) - len(values))  # Triton's own, of no bytes
    for parameter, value in zip(kernel.parameters, [*values, *scratch], strict=True):
        if isinstance(value, TensorMap):
            fields = {**vars(value), "address": memory.address(value.address)}
            maps[parameter.offset] = TensorMap(**fields)
            continue
        if isinstance(value, torch.Tensor):
            value = memory.address(value.data_ptr()) if value.numel() else 0
        bits = 8 * parameter.size
        code = {"f32": "f", "f64": "d"}.get(parameter.kind, _FORMATS[bits])
        if code not in "fd":
            value = int(value or 0) & ((1 << bits) - 1)
            code = code.upper()
        struct.pack_into(f"<{code}", out, parameter.offset, value)
    return bytes(out), maps
