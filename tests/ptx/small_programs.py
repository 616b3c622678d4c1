"""Small programs by hand, run on the emulator: for its own tests."""

from __future__ import annotations

import numpy as np
import torch

from ptx import schedule
from ptx.asynchronous import TensorMap
from ptx.memory import GlobalMemory
from ptx.parser import parse

PROGRAM = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 in_ptr,
	.param .u64 .ptr .global .align 1 out_ptr,
	.param .align 64 .b8 map[128]
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<20>;
	.reg .b64 	%rd<20>;
	ld.param.b64 	%rd1, [in_ptr];
	ld.param.b64 	%rd2, [out_ptr];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, {size};
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
{body}
	ret;
}}
"""
# %r1 is the thread's number, %rd4 and %rd5 its places in the input and in the output.
LOAD, STORE = "ld.global.b32 %r2, [%rd4];", "st.global.b32 [%rd5], %r3;"


def run(body, inputs, threads=32, size=4, shared_bytes=4096, tensor_map=None, **order):
    """The output of a program whose threads have `size` bytes of input and of output each."""
    program = schedule.Program(parse(PROGRAM.format(body=body, threads=threads, size=size)))
    inputs = torch.as_tensor(np.asarray(inputs))
    out = torch.zeros(threads * size, dtype=torch.uint8)
    memory = GlobalMemory([inputs, out])
    parameters = np.array([memory.address(x.data_ptr()) for x in (inputs, out)]).tobytes()
    maps = {}
    if tensor_map:
        maps[64] = TensorMap(memory.address(inputs.data_ptr()), **tensor_map)
    launch = schedule.Launch(
        memory, parameters.ljust(192, b"\0"), maps, (1, 1, 1), shared_bytes, **order
    )
    schedule.run(program, launch)
    memory.copy_back()
    return out.numpy()
