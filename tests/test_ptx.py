"""The PTX emulator of tests/ptx on small programs: what instructions do, as PTX's manual has it, and its
faults."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx.asynchronous import TensorMap
from ptx.faults import Fault, Unknown
from ptx.small_programs import LOAD, STORE, run

ROOT = Path(__file__).resolve().parents[1]


def compute(body, *values, dtype=np.uint32):
    """What each thread makes in %r3 of its value in %r2."""
    padded = np.resize(np.array(values), 32)
    out = run(f"{LOAD}\n{body}\n{STORE}", padded).view(dtype)
    return out[: len(values)].tolist()


def float32(*values):
    return np.array(values, np.float32)


def test_integers_wrap_shift_and_divide_as_in_c():
    values = np.array([7, -7, 2**31 - 1, -(2**31)], np.int32)
    assert compute("add.s32 %r3, %r2, 1;", *values, dtype=np.int32)[2] == -(2**31)
    for body, expected in (
        ("div.s32 %r3, %r2, 2;", [3, -3, 2**30 - 1, -(2**30)]),  # towards zero
        ("rem.s32 %r3, %r2, 4;", [3, -3, 3, 0]),
        ("shr.s32 %r3, %r2, 40;", [0, -1, 0, -1]),
        ("shr.u32 %r3, %r2, 28;", [0, 15, 7, 8]),
        ("shl.b32 %r3, %r2, 32;", [0, 0, 0, 0]),
        ("bfe.s32 %r3, %r2, 0, 3;", [-1, 1, -1, 0]),
        ("bfe.u32 %r3, %r2, 1, 2;", [3, 0, 3, 0]),
        ("mul.hi.u32 %r3, %r2, 2;", [0, 1, 0, 1]),
        ("mad.lo.s32 %r3, %r2, -3, 5;", [-16, 26, -(2**31) + 8, -(2**31) + 5]),
        ("max.s32 %r3, %r2, -1;", [7, -1, 2**31 - 1, -1]),
        ("neg.s32 %r3, %r2;", [-7, 7, -(2**31) + 1, -(2**31)]),
    ):
        assert compute(body, *values, dtype=np.int32) == expected, body


def test_bytes_are_picked():
    """Byte 4 is the second operand's first, of which selector 12 repeats the sign."""
    assert compute("prmt.b32 %r3, %r2, 0xAABBCC80, 0x4C10U;", 0x11223344) == [0x80FF3344]
    assert compute("lop3.b32 %r3, %r2, 12, 10, 0xEA;", 3) == [3 & 12 | 10]
    assert compute("popc.b32 %r3, %r2;", 0xF0F1) == [9]


def test_floats_compare_and_round():
    nan, inf = float("nan"), float("inf")
    values = float32(2.5, -3.5, nan, 3e9, -inf)
    for body, expected in (
        ("cvt.rzi.s32.f32 %r3, %r2;", [2, -3, 0, 2**31 - 1, -(2**31)]),
        ("cvt.rni.s32.f32 %r3, %r2;", [2, -4, 0, 2**31 - 1, -(2**31)]),
        ("setp.lt.f32 %p1, %r2, 0f40800000;\nselp.b32 %r3, 1, 0, %p1;", [1, 1, 0, 0, 1]),
        ("setp.geu.f32 %p1, %r2, 0f40800000;\nselp.b32 %r3, 1, 0, %p1;", [0, 0, 1, 1, 0]),
        ("setp.neu.f32 %p1, %r2, %r2;\nselp.b32 %r3, 1, 0, %p1;", [0, 0, 1, 0, 0]),
    ):
        assert compute(body, *values, dtype=np.int32) == expected, body
    most = compute("max.f32 %r3, %r2, 0f00000000;", *values, dtype=np.float32)
    assert most == [2.5, 0, 0, np.float32(3e9), 0]  # a number beats NaN
    assert np.isnan(
        compute("max.NaN.f32 %r3, %r2, 0f00000000;", *float32(nan), dtype=np.float32)[0]
    )


def test_an_ffma_rounds_once_and_ftz_flushes():
    x = np.float32(1 + 2**-12)
    twice = np.float32(x * x) - np.float32(1 + 2**-11)
    (once,) = compute("fma.rn.f32 %r3, %r2, %r2, 0fBF801000;", x, dtype=np.float32)
    assert once == 2**-24 and twice == 0
    small = np.float32(1e-40)
    assert compute("mul.f32 %r3, %r2, 0f3F800000;", small, dtype=np.float32) == [small]
    assert compute("fma.rn.ftz.f32 %r3, %r2, 0f3F800000, 0f00000000;", small, dtype=np.float32) == [
        0
    ]


@pytest.mark.parametrize("half", ["bf16", "f16"])
def test_halves_round_to_even(half):
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[half]
    rng = np.random.default_rng(0)
    ulp = 2.0 ** (-7 if half == "bf16" else -10)
    ties = 1 + ulp * (np.arange(8) + 0.5)  # between two halves
    values = np.concatenate([rng.normal(size=20), ties, [0.0, -0.0, np.inf, -np.inf]]).astype(
        np.float32
    )
    body = f"cvt.rn.{half}.f32 %rs1, %r2;\ncvt.f32.{half} %r3, %rs1;"
    expected = torch.from_numpy(values).to(dtype).float().tolist()
    assert compute(body, *values, dtype=np.float32) == expected
    packed = compute(f"cvt.rn.{half}x2.f32 %r3, %r2, 0f3F800000;", *values)
    high = torch.from_numpy(np.array([word >> 16 for word in packed], np.uint16)).view(dtype)
    one = torch.ones((), dtype=dtype).view(torch.int16).item()
    assert high.float().tolist() == expected and {word & 0xFFFF for word in packed} == {one}


def test_threads_of_a_warp_exchange_values():
    lanes = np.arange(32, dtype=np.uint32)
    for body, expected in (
        ("shfl.sync.bfly.b32 %r3, %r2, 4, 31, -1;", lanes ^ 4),
        ("shfl.sync.up.b32 %r3, %r2, 3, 0, -1;", np.where(lanes < 3, lanes, lanes - 3)),
        ("shfl.sync.down.b32 %r3, %r2, 3, 31, -1;", np.where(lanes > 28, lanes, lanes + 3)),
        ("shfl.sync.idx.b32 %r3, %r2, 5, 31, -1;", np.full(32, 5)),
        ("redux.sync.add.s32 %r3, %r2, -1;", np.full(32, lanes.sum())),
        ("elect.sync %r4|%p1, -1;\nselp.b32 %r3, %r2, 99, %p1;", np.where(lanes == 0, 0, 99)),
        ("setp.lt.u32 %p1, %r2, 5;\nvote.sync.ballot.b32 %r3, %p1, -1;", np.full(32, 31)),
    ):
        assert compute(body, *lanes) == expected.tolist(), body


def test_threads_that_branch_apart_meet_again():
    """The trips of the loop differ from thread to thread."""
    body = """
	mov.b32 %r3, 0;
	mov.b32 %r4, 0;
$L__BB0_1:
	setp.ge.u32 	%p1, %r4, %r2;
	@%p1 bra 	$L__BB0_2;
	add.s32 %r3, %r3, %r4;
	add.s32 %r4, %r4, 1;
	bra.uni $L__BB0_1;
$L__BB0_2:
	add.s32 %r3, %r3, 1000;"""
    trips = np.random.default_rng(0).integers(0, 9, 32).astype(np.uint32)
    assert compute(body, *trips) == (1000 + trips * (trips - 1) // 2).tolist()


def test_an_inline_label_is_its_blocks_own():
    block = "\n{\n\t.reg .pred go;\n\tbra.uni out;\n\tadd.s32 %r3, %r3, 100;\nout:\n\tadd.s32 %r3, %r3, 1;\n}"
    assert compute("mov.b32 %r3, %r2;" + block + block, 5) == [7]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("bfind.u32 %r3, %r2;", "does not know 'bfind.u32 %r3, %r2'"),
        ("add.sat.s32 %r3, %r2, 1;", "does not know 'add.sat.s32 %r3, %r2, 1' ('sat')"),
        ("bar.sync 1, 64;", "does not know 'bar.sync 1, 64'"),
        ("wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r3}, %rd1, %rd2, 1, 1, 1;", "n8k8.f32.tf32"),
        ("tcgen05.alloc.cta_group::1.sync.aligned.b32 [%r2], 32;", "tcgen05.alloc"),
        ("mov.u32 %r3, %envreg3;", "the operand '%envreg3', in 'mov.u32 %r3, %envreg3'"),
        (".local .b8 depot[8];", "the directive '.local .b8 depot[8]'"),
    ],
)  # fmt: skip
def test_what_it_does_not_know_it_names(line, told):
    with pytest.raises(Unknown, match=re.escape(told)):
        compute(line, 1)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("ld.global.b32 %r3, [%rd4+4];", "read of 4 bytes outside of all tensors: byte 128 of a storage of 128"),
        ("st.global.b32 [%rd2+-4], %r1;", "write of 4 bytes outside of all tensors"),
        ("ld.global.b32 %r3, [%rd1+2];", "misaligned read of 4 bytes"),
        ("ld.shared.b32 %r3, [global_smem+4096];", "shared memory: bytes 4096 to 4100 of 4096"),
        ("st.shared.v4.b32 [global_smem+8], {%r1, %r1, %r1, %r1};", "misaligned write of 16 bytes"),
        ("add.s32 %r3, %r7, 1;\nmov.b32 %r7, 1;", "%r7 is read before it is written: add.s32 %r3, %r7, 1"),
        ("mbarrier.arrive.expect_tx.shared::cta.b64 _, [global_smem], 4;", "not initialized"),
        ("mbarrier.init.shared::cta.b64 [global_smem], 1;\n"
         "mbarrier.arrive.expect_tx.shared::cta.b64 _, [global_smem], 4;", "more arrivals"),
        ("cp.async.ca.shared.global [global_smem], [%rd1], 0x4;\ncp.async.commit_group;", "waited"),
    ],
)  # fmt: skip
def test_what_a_gpu_would_not_forgive(body, told):
    with pytest.raises(Fault, match=re.escape(told)):
        run(body, np.zeros(32, np.uint32), late=True)


SPIN = "\n{\n\t.reg .pred done;\nagain:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [global_smem], 0;\n\t@!done bra.uni again;\n}"


@pytest.mark.parametrize("order", [{}, {"warp_seed": 1}], ids=["together", "warps"])
def test_what_hangs_is_told(order):
    body = "setp.eq.u32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared::cta.b64 [global_smem], 1;\nbar.sync 0;"
    with pytest.raises(Fault, match="wait for a barrier whose phase never ends"):
        run(body + SPIN, np.zeros(64, np.uint32), threads=64, **order)
    apart = "setp.lt.u32 %p1, %r1, 16;\n@%p1 bra $L__BB0_1;\nbar.sync 0;\n$L__BB0_1:\nbar.sync 0;"
    with pytest.raises(Fault, match="a part of a warp"):
        run(apart, np.zeros(32, np.uint32), **order)


# Each thread gives its number to the one at the same place of the other warp.
EXCHANGE = """
	shl.b32 %r4, %r1, 2;
	mov.b32 %r5, global_smem;
	add.s32 %r6, %r5, %r4;
	st.shared.b32 [%r6], %r1;
	{barrier}
	xor.b32 %r7, %r4, 128;
	add.s32 %r8, %r5, %r7;
	ld.shared.b32 %r3, [%r8];
	st.global.b32 [%rd5], %r3;"""


def test_a_missing_barrier_is_found():
    inputs, threads = np.zeros(64, np.uint32), np.arange(64)
    whole, broken = EXCHANGE.format(barrier="bar.sync 0;"), EXCHANGE.format(barrier="")
    for order in ({}, {"check_races": True}, {"warp_seed": 1}, {"warp_seed": 2}):
        out = run(whole, inputs, threads=64, **order).view(np.uint32)
        assert (out == threads ^ 32).all(), order
    with pytest.raises(
        Fault, match="byte 128 of shared memory is written by warp 1, read by 0, no barrier"
    ):
        run(broken, inputs, threads=64, check_races=True)
    same = EXCHANGE.replace("[%r6], %r1", "[%r5], VALUE").replace("[%r8]", "[%r5]")
    same = same.format(barrier="bar.sync 0;")
    assert (
        run(same.replace("VALUE", "7"), inputs, threads=64, check_races=True).view(np.uint32) == 7
    ).all()
    with pytest.raises(Fault, match="byte 0 of shared memory is written by warps 0 and 1"):
        run(same.replace("VALUE", "%r1"), inputs, threads=64, check_races=True)
    found = [run(broken, inputs, threads=64, warp_seed=seed).view(np.uint32) for seed in range(4)]
    assert not all((out == threads ^ 32).all() for out in found)


COPY = """
	shl.b32 %r4, %r1, 2;
	mov.b32 %r5, global_smem;
	add.s32 %r6, %r5, %r4;
	cp.async.ca.shared.global [%r6], [%rd4], 0x4;
	cp.async.commit_group;
	cp.async.wait_group {pending};
	ld.shared.b32 %r3, [%r6];
	cp.async.wait_group 0;
	st.global.b32 [%rd5], %r3;"""


def test_a_copy_is_there_when_it_is_waited_for():
    values = np.arange(32, dtype=np.uint32)
    for late, pending in ((False, 1), (False, 0), (True, 0)):
        assert (
            run(COPY.format(pending=pending), values, late=late).view(np.uint32) == values
        ).all()
    unwaited = run(COPY.format(pending=1), values, late=True).view(np.uint32)
    assert (unwaited == 0xFFFFFFFF).all()  # NaN, as all shared memory that nobody wrote


TMA = """
	setp.eq.u32 %p1, %r1, 0;
	mov.b32 %r4, global_smem;
	add.s32 %r5, %r4, 2048;
	mov.b64 %rd6, map;
	mov.b32 %r6, {x};
	mov.b32 %r7, {y};
	@%p1 mbarrier.init.shared::cta.b64 [%r5], 1;
	bar.sync 0;
	@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 512;
	@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r4], [%rd6, {{%r6, %r7}}], [%r5];
{{
	.reg .pred done;
again:
	mbarrier.try_wait.parity.shared::cta.b64 done, [%r5], 0;
	{loop}
}}
	shl.b32 %r8, %r1, 4;
	add.s32 %r9, %r4, %r8;
	ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r9];
	st.global.v4.b32 [%rd5], {{%r10, %r11, %r12, %r13}};"""
LOOP = "@!done bra.uni again;"
MAP = {"swizzle": 1, "element_size": 2, "block": [16, 16], "shape": [20, 24], "strides": [24, 1]}


def tma(x, y, loop=LOOP, **order):
    values = np.arange(20 * 24, dtype=np.uint16)
    out = run(
        TMA.format(x=x, y=y, loop=loop),
        values,
        size=16,
        tensor_map={**MAP, "is_padded_with_nan": False},
        **order,
    )
    return values.reshape(20, 24), out.view(np.uint16).reshape(16, 2, 8)


@pytest.mark.parametrize(
    "order", [{}, {"late": True}, {"late": True, "check_races": True}], ids=str
)
def test_tma_pads_with_zeros_and_swizzles(order):
    for x, y in ((3, 2), (-4, -5), (16, 12)):
        values, out = tma(x, y, **order)
        padded = np.pad(values, 16)
        box = padded[16 + y : 32 + y, 16 + x : 32 + x].reshape(16, 2, 8)
        # With 32 bytes of swizzle, rows 4 to 7 of 8 have their two chunks exchanged.
        expected = np.where((np.arange(16) // 4 % 2 == 1)[:, None, None], box[:, ::-1], box)
        assert np.array_equal(out, expected), (x, y)


def test_tma_that_nobody_waits_for_is_not_there():
    values, out = tma(3, 2, loop="")
    assert out[0, 0, 0] == values[2, 3]  # early
    assert (tma(3, 2, loop="", late=True)[1] == 0xFFFF).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"strides": [23, 1]}, "a stride is no multiple of 16 bytes"),
        ({"block": [300, 16]}, "a box has more than 256 rows or columns"),
        ({"block": [16, 4]}, "a row of the box is no multiple of 16 bytes"),
        ({"block": [16, 32]}, "a row of the box exceeds the swizzle"),
        ({"shape": [0, 24]}, "a size is 0"),
        ({"address": 8}, "the base is not 16-byte aligned"),
    ],
)
def test_tensor_maps_have_limits(change, told):
    with pytest.raises(Fault, match=told):
        TensorMap(**{"address": 64, **MAP, "is_padded_with_nan": False, **change})


def test_products_of_a_warp():
    """mma.m16n8k16 with the fragments' layout as PTX's manual draws it."""
    rng = np.random.default_rng(0)
    a, b = (
        torch.from_numpy(rng.normal(size=s).astype(np.float32)).bfloat16()
        for s in ((16, 16), (16, 8))
    )
    lanes = np.arange(32)
    group, pair = lanes // 4, lanes % 4 * 2
    a_bits, b_bits = (x.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) for x in (a, b))
    words = []
    for row, column in ((0, 0), (8, 0), (0, 8), (8, 8)):
        low, high = (a_bits[group + row, pair + column + n] for n in (0, 1))
        words.append(low | high << 16)
    for row in (0, 8):
        low, high = (b_bits[pair + row + n, group] for n in (0, 1))
        words.append(low | high << 16)
    body = (
        "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd4];\nld.global.v2.b32 {%r6, %r7}, [%rd4+16];\n"
    )
    body += "".join(f"mov.b32 %r{n}, 0;\n" for n in range(8, 12))
    body += "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r8, %r9, %r10, %r11}, "
    body += "{%r2, %r3, %r4, %r5}, {%r6, %r7}, {%r8, %r9, %r10, %r11};\n"
    body += "st.global.v4.b32 [%rd5], {%r8, %r9, %r10, %r11};"
    inputs = np.stack([*words, *words[:2]], axis=1)
    found = run(body, inputs, size=32).view(np.float32).reshape(32, 8)[:, :4]
    exact = (a.double() @ b.double()).numpy()
    for register, (row, column) in enumerate(((0, 0), (0, 1), (8, 0), (8, 1))):
        assert np.allclose(found[:, register], exact[group + row, pair + column], rtol=0, atol=1e-5)


def test_the_emulated_device_is_the_cpu_to_torch():
    from ptx.mode import DEVICE

    assert DEVICE.type == "cuda"
    tensors = (
        torch.ones(2, device=DEVICE),
        torch.ones(2).to(DEVICE),
        torch.nn.Linear(2, 2).to(DEVICE).weight,
    )
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("triton", ["installed", "3.6.0"])
def test_all_tests_of_gpus_pass_in_the_emulator(triton, tmp_path):
    """Five minutes of a processor each. The oldest Triton supported is fetched."""
    path = [str(ROOT)]
    if triton != "installed":
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", str(tmp_path), f"triton=={triton}"], check=True)
        path.insert(0, str(tmp_path))
    command = [sys.executable, "-m", "pytest", "--emulate", "-m", "(gpu or emulated) and not slow"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
