"""What Triton's own JIT would compile for a run of packs, without a GPU: for test_launches, in a process of
its own, since elsewhere in the tests Triton's interpreter stands in the JIT's place.

    python tests/jit_variants.py PACKS     the variants of every kernel over that many random packs, as JSON
    python tests/jit_variants.py --ones    compile, for sm_90a, what packs launch whose sizes are all 1
"""

import collections
import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from mmpack.ops import embed_features, mrope  # noqa: F401
from mmpack.ops.assembly.assemble_patches import assemble_patches_fwd
from mmpack.ops.assembly.assemble_sequence import assemble_sequence_fwd
from mmpack.ops.assembly.dense_mask import dense_mask_fwd
from mmpack.ops.cast_patches import cast_patches_fwd
from mmpack.ops.cross_entropy_kernels import cross_entropy_bwd, cross_entropy_fwd
from mmpack.ops.varlen_triton import varlen_attention_bwd, varlen_attention_fwd

embed = sys.modules["mmpack.ops.embed_features"]
INT32, INT64, BF16 = torch.int32, torch.int64, torch.bfloat16


class Driver:
    """As much of a GPU's driver as the JIT asks before it compiles."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Compiled:
    """What is launched in place of a kernel: nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *args):
        return None

    def run(self, *args):
        pass


def install(compiles):
    """The JIT with `Driver`; the names of what it compiles come into the list returned."""
    names = []
    real = JITFunction._do_compile

    def do_compile(self, key, *rest):
        names.append(self.fn.__name__)
        if compiles:
            real(self, key, *rest)
        self.device_caches[0][0][key] = compiled = Compiled()
        return compiled

    JITFunction._do_compile = do_compile
    triton.runtime.driver.set_active(Driver())
    return names


def zeros(*shape, dtype=INT32):
    return torch.zeros(shape, dtype=dtype)


def launch(T, S, I, F, R, num_tiles, D=64, attends=True):
    """Everything mmpack launches for a pack: T tokens, S segments, I images of F features, R runs."""
    W = zeros(50, D, dtype=BF16)
    text, P = T - F, 4 * F
    embed.embed_features_fwd(zeros(T, dtype=INT64), zeros(T), W, zeros(F, D, dtype=BF16))
    dout, dfeatures = zeros(T, D, dtype=BF16), zeros(F, D, dtype=BF16)
    indices = (zeros(F), zeros(F + 1), zeros(text), zeros(R + 1))
    embed.embed_features_bwd(dout, W, dfeatures, zeros(T, dtype=INT64), indices, -1)
    sizes = (T, F, F, R, num_tiles)
    of_grids = (zeros(I, 3), torch.zeros(I), zeros(I, 3))
    assemble_sequence_fwd(zeros(text + I), zeros(S + 1), zeros(I), *of_grids, sizes, 9, 2)
    if I:
        assemble_patches_fwd(torch.ones(I, 3, dtype=INT64), I, P, num_tiles, 2)
    cast_patches_fwd(zeros(P, 588, dtype=torch.uint8), BF16)
    dense_mask_fwd(zeros(min(T, 512)), True, torch.bool)
    positions = zeros(4, T, dtype=INT64)[1:]  # the first row is the text's
    q, k = (torch.empty(T, H, 128, dtype=BF16) for H in (2, 1))
    how = (torch.rand(64), (16, 24, 24), False, 1.0)
    mrope.apply_mrope_fwd(q, k, positions, *how)
    L, V = max(1, T // 3), 5000  # rows, and columns of the last of two chunks
    rows = zeros(L, dtype=INT64), torch.zeros(L), torch.zeros(L)
    for first, C in ((0, 4864), (4864, V - 4864)):
        cross_entropy_fwd(zeros(L, C, dtype=BF16), *rows, first)
        cross_entropy_bwd(zeros(L, C, dtype=BF16), *rows, first)
    if attends:
        of_pack = (zeros(num_tiles, 4), zeros(T), zeros(S + 1))
        out, lse = varlen_attention_fwd(q, k, k, *of_pack, True, 0.1)
        varlen_attention_bwd(out, q, k, k, out, lse, *of_pack, True, 0.1)


def main(argument):
    if argument == "--ones":
        names = install(compiles=True)
        launch(T=1, S=1, I=0, F=0, R=1, num_tiles=1, D=1, attends=False)
        launch(T=3, S=1, I=1, F=1, R=2, num_tiles=1, D=1, attends=False)
    else:
        names = install(compiles=False)
        rng = np.random.default_rng(0)
        for _ in range(int(argument)):
            T, S = int(rng.integers(1, 2049)), int(rng.integers(1, 90))
            I = int(rng.integers(0, 40)) if T > 40 else 0
            F = int(rng.integers(I, T)) if I else 0
            R, num_tiles = int(rng.integers(1, T - F + 1)), int(rng.integers(1, 90))
            launch(T, S, I, F, R, num_tiles)
    print(json.dumps(collections.Counter(names)))


if __name__ == "__main__":
    main(sys.argv[1])
