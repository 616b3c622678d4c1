"""The kernels of mmpack as launched in GPU runs, with the limits of each, for compile_report."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from mmpack.ops import cross_entropy_kernels as loss
from mmpack.ops import embed_features as _  # noqa: F401  (the name is the op's, not the file's)
from mmpack.ops import mrope, varlen_triton  # noqa: F401
from mmpack.ops.assembly import offsets

embed = sys.modules["mmpack.ops.embed_features"]
varlen = sys.modules["mmpack.ops.varlen_triton"]
cast = sys.modules["mmpack.ops.cast_patches"]
sequence = sys.modules["mmpack.ops.assembly.assemble_sequence"]
patches = sys.modules["mmpack.ops.assembly.assemble_patches"]
attention_tiles = sys.modules["mmpack.ops.assembly.attention_tiles"]
masks = sys.modules["mmpack.ops.assembly.dense_mask"]


@dataclass(frozen=True)
class Case:
    """A kernel as launched in a GPU run, and its limits.

    `arguments` are Triton types; ":16" marks divisibility by 16, which arguments that the kernel does not
    specialize must not have. `programs` are those that a multiprocessor must hold at once, by architecture on
    which the kernel is offered. `needs` are required instructions, `lacks` forbidden ones.
    """

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    programs: dict[int, int]
    needs: tuple[str, ...] = ()
    max_spill_bytes: int = 0
    lacks: tuple[str, ...] = ("LDL", "STL", "ATOM")


def _everywhere(programs: int) -> dict[int, int]:
    return dict.fromkeys((80, 89, 90, 100), programs)


def _embed_cases(dtype: str, D: int) -> list[Case]:
    wide = f"*{dtype}:16"
    copies = {"D": D, "COPY_D": embed.copy_width(D)}
    sums = {
        "D": D,
        "BLOCK_D": embed.BLOCK_D,
        "MAX_RUN": embed.MAX_RUN,
        "BLOCK_R": embed.BLOCK_R,
        "ACC": tl.float32,
    }
    options = {"num_warps": embed.NUM_WARPS}
    text = {
        "input_ids_ptr": "*i64:16",
        "text_order_ptr": "*i32:16",
        "text_id_offsets_ptr": "*i32:16",
    }
    cases = [
        Case(
            f"embed_features_fwd {dtype} D={D}",
            embed._embed_features_fwd_kernel,
            {
                "out_ptr": wide,
                "input_ids_ptr": "*i64:16",
                "feature_index_ptr": "*i32:16",
                "weight_ptr": wide,
                "features_ptr": wide,
                "weight_stride": "i32:16",
                "features_stride": "i32:16",
            },
            copies,
            options,
            programs=_everywhere(8),
            needs=("LDG.128", "STG.128"),
        )
    ]
    for accumulate in (False, True):
        name = "accumulate_embedding_grad" if accumulate else "embed_features_bwd"
        cases += [
            Case(
                f"{name} {dtype} D={D}",
                embed._embed_features_bwd_kernel,
                {
                    "dweight_ptr": "*fp32:16" if accumulate else wide,
                    "partial_ptr": "*fp32:16",
                    "dfeatures_ptr": wide,
                    "dout_ptr": wide,
                    **text,
                    "feature_token_ptr": "*i32:16",
                    "feature_offsets_ptr": "*i32:16",
                    "dout_stride": "i32:16",
                    "num_runs": "i32",
                    "padding_idx": "i32",
                },
                {**sums, **copies, "ACCUMULATE": accumulate},
                options,
                programs=_everywhere(5),
                needs=("LDG.128", "STG.128"),
            ),
            Case(
                f"{name} partials {dtype} D={D}",
                embed._embed_features_bwd_partials_kernel,
                {
                    "dweight_ptr": "*fp32:16" if accumulate else wide,
                    "partial_ptr": "*fp32:16",
                    **text,
                    "num_runs": "i32",
                    "padding_idx": "i32",
                },
                {**sums, "ACCUMULATE": accumulate},
                options,
                programs=_everywhere(5),
                needs=("LDG.128", "STG.128"),
            ),
        ]
    return cases


def _attention_cases(dtype: str, K: int, G: int, causal: bool) -> list[Case]:
    D0, D1 = varlen.split_head_dim(K)
    # As the launch options intend; with two, one computes while the other waits.
    programs = dict.fromkeys(("fwd", "bwd_dq"), 2 if K <= 96 else 1)
    programs["bwd_dkv"] = 2 if K <= 128 else 1
    # At 256, dk and dv take 128 registers, and ptxas spills addresses in shared memory that it computes before the
    # loop: with Triton 3.7.1 the loop loads 21 of them and stores none. Exact float32 products use no tensor
    # cores.
    spills = dict.fromkeys(("fwd", "bwd_dq"), 64)
    spills["bwd_dkv"] = 64 if K <= 128 else 320
    cases = []
    for name, kernel in (
        ("fwd", varlen.kernels._varlen_attention_fwd_kernel),
        ("bwd_dq", varlen.kernels._varlen_attention_bwd_dq_kernel),
        ("bwd_dkv", varlen.kernels._varlen_attention_bwd_dkv_kernel),
    ):
        options = varlen.launch_options(name, K, {"fp32": torch.float32}.get(dtype))
        launch = {
            key: options.pop(key)
            for key in ("num_warps", "maxnreg", "enable_fp_fusion")
            if key in options
        }
        constants = {"H": G, "G": G, "K": K, "D0": D0, "D1": D1, "TILE": varlen.TILE}
        constants |= {"CAUSAL": causal, **options}
        arguments = {}
        for argument in kernel.arg_names:
            if argument.endswith("1_desc") and not D1:
                constants[argument] = None
            elif argument.endswith("_desc"):  # q0_desc: queries, the first D0 columns
                rows = constants["BN" if argument[0] in "kv" else "BM"]
                columns = D1 if D1 and "1_" in argument else D0
                arguments[argument] = f"tensordesc<{dtype}[{rows}, {columns}]>"
            elif argument.endswith(("_step", "_stride")):
                arguments[argument] = "i32:16"
            elif argument not in constants:
                arguments[argument] = {
                    "lse_ptr": "*fp32:16",
                    "delta_ptr": "*fp32:16",
                    "tiles_ptr": "*i32:16",
                    "segment_ids_ptr": "*i32",
                    "cu_seqlens_ptr": "*i32",
                    "T": "i32",
                    "scale": "fp32",
                    "scale_log2": "fp32",
                }.get(argument, f"*{dtype}:16")
        cases.append(
            Case(
                f"varlen_attention_{name} {dtype} K={K} {'causal' if causal else 'full'} G={G}",
                kernel,
                arguments,
                constants,
                launch,
                programs={90: 1 if dtype == "fp32" else programs[name], 100: 1},
                needs=("UTMALDG",) if dtype == "fp32" else ("FFMA", "HGMMA", "UTMALDG", "STG.128"),
                lacks=("ATOM",),
                max_spill_bytes=512 if dtype == "fp32" else spills[name],
            )
        )
    return cases


def _cast_case(p: int, N: int) -> Case:
    return Case(
        f"cast_patches {p} pixels bf16",
        cast._cast_patches_fwd_kernel,
        {"out_ptr": "*bf16:16", "patches_ptr": "*u8:16", "P": "i32"},
        {"N": N, "W": cast.padded_width(N), "ROWS": cast.ROWS, "BLOCK": cast.BLOCK},
        {"num_warps": 4},
        programs=_everywhere(8),
        needs=("STG.128",),
    )


_TEXT = {"sections": (16, 24, 24), "interleaved": False, "num_freqs": 64}
_QWEN3 = {"sections": (24, 20, 20), "interleaved": True, "num_freqs": 64}
_VISION = {"sections": (20, 20), "interleaved": False, "num_freqs": 20}
_PARTIAL = {"sections": (11, 11, 10), "interleaved": True, "num_freqs": 32}


def _mrope_case(name: str, dtype: str, H: int, HK: int, K: int, rope: dict[str, Any]) -> Case:
    """Only the inverse direction, which negates more. Vision positions are a transposed view."""
    strides = ("q_stride_t", "q_stride_h", "k_stride_t", "k_stride_h")
    constants = mrope.mrope_constants(H, HK, K, **rope, inverse=True, dtype=None)
    arguments = {
        **dict.fromkeys(("q_out_ptr", "k_out_ptr", "q_ptr", "k_ptr"), f"*{dtype}:16"),
        "position_ids_ptr": "*i64",  # rows of T numbers, without the first row
        "inv_freq_ptr": "*fp32:16",
        **dict.fromkeys(strides, "i32:16"),
        "position_stride": "i32",
        "position_stride_t": "i32",
        "T": "i32",
        "scaling": "fp32",
    }
    return Case(
        f"apply_mrope {name} {dtype}",
        mrope._apply_mrope_kernel,
        arguments,
        constants,
        mrope.OPTIONS,
        programs=_everywhere(2),
        needs=("FFMA", "LDG.128", "STG.128"),
    )


def _index_case(name: str, kernel: Any, constants: dict[str, Any], programs: int) -> Case:
    """Cases of a kernel that writes indices: pointers are int32, unless the name says otherwise."""
    types = {
        "input_ids_out_ptr": "*i64:16",
        "position_ids_ptr": "*i64:16",
        "sorted_places_ptr": "*i64",
        "sorted_ids_ptr": "*i32",  # views that begin after the markers
        "temporal_step_ptr": "*fp32:16",
        "mask_ptr": "*u8:16" if constants.get("HIDDEN") == 0 else "*bf16:16",
    }
    if "HIDDEN" in constants:
        types["T"] = (
            "i32:16"  # like capacities; rows of other lengths are written element by element
        )
    arguments = {
        argument: types.get(argument, "*i32:16" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
        if argument not in constants
    }
    num_warps = {"_cut_tiles_kernel": 1, "_text_runs_kernel": 8}.get(kernel.__name__, 4)
    needs = ("STG.128",) if "HIDDEN" in constants else ()
    return Case(
        name, kernel, arguments, constants, {"num_warps": num_warps}, _everywhere(programs), needs
    )


def _loss_cases(dtype: str) -> list[Case]:
    """A chunk of the vocabulary, as wide as all but the last."""
    arguments = {
        "lse_ptr": "*fp32:16",
        "target_ptr": "*fp32:16",
        "scale_ptr": "*fp32:16",
        "labels_ptr": "*i64:16",
        "stride": "i32:16",
        "C": "i32:16",
        "first": "i32",
    }
    return [
        Case(
            f"cross_entropy_{name} {dtype}",
            kernel,
            {
                argument: arguments.get(argument, f"*{dtype}:16")
                for argument in kernel.arg_names
                if argument != "BLOCK_C"
            },
            {"BLOCK_C": loss.BLOCK_C},
            {"num_warps": loss.NUM_WARPS},
            programs=_everywhere(65536 // (64 * 32 * loss.NUM_WARPS)),
            needs=("LDG.128", "STG.128") if name == "bwd" else ("LDG.128",),
        )
        for name, kernel in (
            ("fwd", loss._cross_entropy_fwd_kernel),
            ("bwd", loss._cross_entropy_bwd_kernel),
        )
    ]


_MERGE = {"MERGE": 2}
_INDEX_CASES = [
    _index_case(
        "assemble_sequence outline",
        sequence._outline_kernel,
        {**_MERGE, "LOG_I": offsets.search_steps(300), "BLOCK_I": sequence.BLOCK_I},
        1,
    ),
    _index_case(
        "assemble_sequence",
        sequence._assemble_sequence_kernel,
        {
            **_MERGE,
            "LOG_S": offsets.search_steps(100),
            "LOG_I": offsets.search_steps(300),
            "BLOCK_T": sequence.BLOCK_T,
        },
        4,
    ),
    _index_case(
        "assemble_sequence text runs",
        sequence._text_runs_kernel,
        {"MAX_RUN": sequence.MAX_RUN, "BLOCK_X": sequence.BLOCK_X},
        1,
    ),
    _index_case(
        "assemble_patches",
        patches._assemble_patches_kernel,
        {**_MERGE, "LOG_FRAMES": offsets.search_steps(300), "BLOCK_P": patches.BLOCK_P},
        5,
    ),
    _index_case(
        "attention_tiles cut",
        attention_tiles._cut_tiles_kernel,
        {"TILE": attention_tiles.TILE, "BLOCK_CUT": attention_tiles.BLOCK_CUT},
        1,
    ),
    _index_case(
        "attention_tiles rank",
        attention_tiles._rank_tiles_kernel,
        {"CAUSAL": True, "BLOCK_N": attention_tiles.BLOCK_N, "BLOCK_M": attention_tiles.BLOCK_M},
        3,
    ),
    *[
        _index_case(
            f"dense_mask {name}",
            masks._dense_mask_kernel,
            {
                "HIDDEN": hidden,
                "CAUSAL": True,
                "BLOCK_Q": masks.BLOCK_Q,
                "BLOCK_KV": masks.BLOCK_KV,
            },
            3,
        )
        for name, hidden in (("bool", 0), ("bf16", torch.finfo(torch.bfloat16).min))
    ],
]
CASES = _INDEX_CASES + [
    case
    for dtype, D in (("bf16", 1536), ("bf16", 3584), ("bf16", 8192), ("fp32", 3584))
    for case in _embed_cases(dtype, D)
]
CASES += [_cast_case(14, 588), _cast_case(16, 768)]
CASES += [case for dtype in ("bf16", "fp16", "fp32") for case in _loss_cases(dtype)]
CASES += [
    _mrope_case("12 + 2 heads", "bf16", 12, 2, 128, _TEXT),
    _mrope_case("28 + 4 heads", "bf16", 28, 4, 128, _TEXT),
    _mrope_case("28 + 4 heads", "fp32", 28, 4, 128, _TEXT),
    _mrope_case("interleaved", "bf16", 32, 8, 128, _QWEN3),
    _mrope_case("vision", "bf16", 16, 16, 80, _VISION),
    _mrope_case("partial", "bf16", 16, 2, 256, _PARTIAL),
]
CASES += [
    case
    for dtype, K, G, causal in (
        ("bf16", 128, 6, True),  # Qwen2-VL-2B
        ("bf16", 128, 7, True),  # 7B
        ("fp16", 128, 7, True),
        ("bf16", 128, 1, False),
        ("bf16", 80, 1, False),  # Qwen2-VL's and Qwen2.5-VL's towers
        ("bf16", 72, 1, False),  # Qwen3-VL's
        ("bf16", 96, 1, False),
        ("bf16", 64, 1, True),
        ("bf16", 256, 8, True),  # Qwen3.5
        ("fp32", 128, 7, True),
        ("fp32", 80, 1, False),
    )
    for case in _attention_cases(dtype, K, G, causal)
]
