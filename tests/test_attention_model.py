"""The prediction of attention's speed: what it counts in machine code and in tiles."""

import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import attention_model as model
from benchmarks.bench_varlen_attention import Case
from mmpack import reference

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0020*/              @P2 BRA `(.L_x_2) ;
        /*0030*/                   ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*0040*/                   FSEL R4, R5, -INF , P0 ;
.L_x_2:
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/              @!P1 BRA `(.L_x_4) ;
        /*0070*/                   MUFU.EX2 R6, R7 ;
        /*0080*/              @!P0 BRA `(.L_x_1) ;
.L_x_3:
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_3) ;
"""


def kernel(name, BM=128, BN=64, programs=1):
    return model.Kernel(name, model.Loop(500, 100, 32, 3), BM, BN, num_warps=8, programs=programs)


def test_the_loop_is_between_a_branch_back_and_its_target():
    assert model.loop_of(SASS) == model.Loop(instructions=6, masked=2, exponentials=1, barriers=1)
    with pytest.raises(ValueError, match="0 loops with products"):
        model.loop_of(SASS.replace("HGMMA", "FFMA"))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[1000], [300, 20, 7, 64, 129], [256] * 4])
def test_steps_cover_what_rows_see(lengths, causal):
    """At least the scores that count; at most a tile's rows times its segments' keys, and a block more."""
    tiles = reference.attention_tiles(np.cumsum([0, *lengths]), causal=causal)
    n = np.array(lengths)
    scores = (n * (n + 1) / 2 if causal else n * n).sum()
    for name, G in (("fwd", 1), ("bwd_dq", 1), ("bwd_dkv", 3)):
        of = kernel(name)
        steps, masked = model.steps_of(of, tiles, G, causal).T
        computed = steps.sum() * of.BM * of.BN / G
        assert scores <= computed <= sum(128 * (end - begin + 128) for *_, begin, end in tiles)
        assert (masked <= steps).all() and (steps % G == 0).all()
    alone = reference.attention_tiles(np.array([0, 1024]), causal=causal)
    steps, masked = model.steps_of(kernel("fwd"), alone, 1, causal).T
    whole = 16 * 8 if not causal else sum(2 * tile + 2 for tile in range(8))
    assert steps.sum() == whole and masked.sum() == (2 * 8 if causal else 0)


def test_programs_overlap_until_a_unit_is_used_up():
    steps = np.array([[16, 0]] * 1000)
    one, two, many = (model.seconds(kernel("fwd", programs=n), 128, 12, steps) for n in (1, 2, 100))
    assert two == pytest.approx(one / 2) and many > one / 5
    tensor = 12_000 * 16 * (2 * 2 * 128 * 64 * 128) / model.FLOPS_PER_CYCLE
    assert many >= tensor / model.MULTIPROCESSORS / model.HERTZ
    longest = model.seconds(
        kernel("fwd"), 128, 1, np.array([[1000, 0]])
    )  # nothing shares one program
    assert longest == pytest.approx(model.seconds(kernel("fwd"), 128, 100, np.array([[1000, 0]])))


def test_masked_steps_and_longer_loops_cost_time():
    plain, masked = (
        model.seconds(kernel("fwd"), 128, 12, np.array([[16, m]] * 500)) for m in (0, 16)
    )
    assert masked == pytest.approx(plain + 500 * 12 * 16 * 100 * 8 / 4 / 132 / model.HERTZ)


def test_a_prediction_is_below_the_peak_and_grows_with_segments():
    kernels = {name: kernel(name) for name in model.STEPS}
    for mode in ("forward", "backward"):
        rates = [
            model.predict(Case("", (n,) * (16384 // n), (12, 2, 128), True), mode, kernels)
            for n in (256, 1024, 4096, 16384)
        ]
        peak = model.FLOPS_PER_CYCLE * model.MULTIPROCESSORS * model.HERTZ / 1e12
        assert rates == sorted(rates) and 10 < rates[0] and rates[-1] < peak


def test_measured_figures_are_ours_of_that_gpu(tmp_path):
    (tmp_path / "h200").mkdir()
    head = "bench,impl,mode,metric,p50,config,machine"
    row = "varlen_attention,triton,forward,rate,412.5,a case,NVIDIA H200"
    others = [
        row.replace("triton", "flash2"),
        row.replace("H200", "A100"),
        row.replace("rate", "time"),
    ]
    lines = [head, *others, row]
    (tmp_path / "h200" / "published.csv").write_text("\n".join(lines), encoding="utf-8")
    assert model.measured(tmp_path) == {("a case", "forward"): 412.5}


@pytest.mark.slow
def test_the_command(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.attention_model", "--results", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *rows = done.stdout.splitlines()
    assert "PREDICTED" in first and len(rows) == 24
    assert all(row.endswith("predicted  not measured") for row in rows)
