"""What the figures say: one table and a picture a question, of results whose tests are green.

    python -m benchmarks.report                   the published results: README.md's table, docs/*.png
    python -m benchmarks.report FILE... [--out FOLDER]      any results: report.md and pictures beside FILE
    python -m benchmarks.report --check           is README.md's table what the published results say?

Results are CSVs as `pytest benchmarks` leaves them; published ones are `results/*/published.csv`. Nothing is
made up: what no row tells is "not measured", and its picture is not drawn. What is measured has tests
(`TESTS`); they are run first, or read from `--tests FILE` (`benchmarks.outcomes`), and where one failed, hung,
did not run or none passed, its rows and pictures are withheld and the exit code is 1. A test that names an
implementation among its parameters stands for that one's rows. A GPU's results need the outcome of its own
tests beside them, `tests.csv`, as `gpu.sh` leaves it: what is red there is withheld of that GPU alone, and so
is what was cut off. A dry run's results are refused.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_run import STAGES
from benchmarks.harness import CEILING, RESULTS, Row, kind_of, read_rows
from benchmarks.outcomes import Outcome, read_outcomes

ROOT = Path(__file__).resolve().parents[1]
README, PICTURES = ROOT / "README.md", ROOT / "docs"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
PUBLISHED = "*/published.csv"
H200 = "nvidia-h200"

# What each benchmark measures is right where these are green.
TESTS = {
    "assemble": ("test_assemble",),
    "batch": ("test_assemble", "test_assemble_sequence", "test_device_batches"),
    "embed_features": ("test_embed_features",),
    "head": ("test_supervised_cross_entropy",),
    "headers": ("test_images",),
    "host": ("test_collator", "test_pixels"),
    "index": ("test_build", "test_encode"),
    "mrope": ("test_mrope", "test_rotary"),
    "opening": ("test_store",),
    "patch_embed": ("test_patch_embed",),
    "pixels": ("test_images", "test_pixels"),
    "plan": ("test_plan", "test_balance", "test_cost"),
    "ranks": ("test_plan", "test_balance", "test_cost"),
    "store": ("test_store",),
    "stream": ("test_stream",),
    "tower": ("test_vision_spec", "test_families", "test_equivalence"),
    "train": ("test_equivalence", "test_model_patch"),
    "varlen_attention": ("test_varlen_attention",),
}

# Test files of which a GPU runs a part, or all.
ON_GPU = {
    Path(argument).stem
    for stage in STAGES
    for argument in stage.command
    if re.fullmatch(r"tests/test_\w+\.py", argument)
}
ALL = ""  # in place of an implementation: all of them
Red = dict[
    tuple[str, str], dict[str, list[str]]
]  # by machine's kind and benchmark, implementation: files


@dataclass(frozen=True)
class Line:
    """A row of the table: a figure of ours, beside its peers' and its ceiling in the same run.

    `ours` and the peers are patterns an impl's name matches whole; the first of `ours` that was measured
    stands, named where it is not the first. Of several cases one that has `config` in its own, at
    `x`, else at the largest x. A peer is compared with ours of its own test, where both took turns.
    """

    title: str
    bench: str
    mode: str
    metric: str
    ours: tuple[str, ...]
    peers: dict[str, str]
    config: str = ""
    x: float | None = None
    is_host: bool = False  # no GPU takes part
    as_values: bool = False  # not how many times as good, but the peers' own figures
    fallback: str = ""  # what the first of `ours` is replaced by where it cannot run
    has_ceiling: bool = True  # the ceiling recorded holds for this one


_KERNEL = {"fallback": "libraries' way"}
_HOST = {"is_host": True}
_ATTENTION = {
    "flash-attn 2": "flash2",
    "flash-attn 3": "flash3",
    "flash-attn 4": "flash4",
    "torch varlen": "torch_varlen",
    "flex": "flex",
    "dense mask": "dense mask",
}
_INSERTION = {"transformers": "transformers", "compiled": "compiled reference"}
_PLANNERS = {
    "LLaMA-Factory": r"llamafactory .* by 1000",
    "TRL": "trl .*",
    "axolotl": "axolotl .*",
}
_COLLATORS = {name: name for name in ("transformers", "LLaMA-Factory", "VeOmni")}
_STREAMS = {"next-fit": "next-fit", "first-fit": "first-fit", "planned": "planned"}
_STEPS = {
    "padded": "padded, 8 rows",
    "padded by length": "padded, 8 rows of like length",
    "transformers' packing": "transformers packed",
}

LINES = [
    Line("training step, useful tokens", "train", "step", "useful tokens", ("mmpack, triton", "mmpack"),
         _STEPS, **_KERNEL),
    Line("logits and loss, 15 % supervised, peak memory", "head", "forward and backward", "peak", ("mmpack",),
         {"transformers": "transformers", "Liger": "liger"}, x=0.15),
    Line("attention, real rows, forward", "varlen_attention", "forward", "rate", ("triton", "sdpa"),
         _ATTENTION, config="real rows, ", **_KERNEL),
    Line("attention, real rows, backward", "varlen_attention", "backward", "rate", ("triton", "sdpa"),
         _ATTENTION, config="real rows, ", **_KERNEL),
    Line("embedding and insertion, forward", "embed_features", "forward", "bandwidth",
         ("mmpack", "index_copy"), _INSERTION, config="share=0.7", **_KERNEL),
    Line("embedding and insertion, backward", "embed_features", "backward", "bandwidth",
         ("mmpack", "index_copy"), _INSERTION, config="share=0.7", **_KERNEL),
    Line("rotary embedding, forward", "mrope", "forward", "bandwidth", ("mmpack",),
         {"transformers": "transformers", "Liger": "liger", "compiled": "compiled"}, config="K=128"),
    Line("patch embedding, forward and backward", "patch_embed", "forward and backward", "bandwidth",
         ("mmpack",), {"transformers": "transformers", "linear": "linear"}),
    Line("vision tower with windows (Qwen2.5-VL), step", "tower", "step", "time", ("mmpack",),
         {"transformers": "transformers"}, config="qwen2_5_vl"),
    Line("assembling a pack, pixels aside", "assemble", "assemble", "time", ("mmpack",),
         {"transformers": "transformers"}, config="segments=7 ", **_HOST),
    Line("rows to a batch, images decoded", "host", "collate", "time", ("mmpack uint8",),
         _COLLATORS, **_HOST),
    Line("the same, resized by torch", "host", "collate", "time", ("mmpack uint8 by torch",),
         _COLLATORS, has_ceiling=False, **_HOST),
    Line("a decoded picture of 1024 x 768 to patches", "pixels", "a picture", "time", ("mmpack",),
         {"transformers": "transformers"}, config="1024 x 768", **_HOST),
    Line("indexing rows", "index", "index", "time", ("mmpack",), {"transformers": "transformers"}, **_HOST),
    Line("packs of 8,192 full", "plan", "plan", "utilization", ("mmpack by cost",), _PLANNERS,
         config="real", x=8192, as_values=True, **_HOST),
    Line("dearest of 64 ranks over the mean", "plan", "plan", "imbalance 64", ("mmpack by cost",), _PLANNERS,
         config="real", x=8192, as_values=True, **_HOST),
    Line("packs of a stream full, buffer of 200 rows", "stream", "pack", "utilization", ("mmpack",), _STREAMS,
         x=8192, as_values=True, **_HOST),
    Line("dearest of 8 ranks over the mean, stream", "stream", "pack", "flops max over mean", ("mmpack",),
         _STREAMS, x=8192, as_values=True, **_HOST),
]  # fmt: skip

_MORE_IS_BETTER = ("1/s", "GB/s", "TFLOP/s")


def cell(line: Line, rows: Sequence[Row], red: dict[str, list[str]] | None = None) -> str:
    """What a machine's rows say of a line; `red` are implementations, or ALL, with what is not green."""
    red = red or {}
    bad = {file for impl in (*line.ours, ALL) for file in red.get(impl, ())}
    if bad:
        return f"withheld: {', '.join(f'`tests/{file}.py`' for file in sorted(bad))} not green"
    rows = [row for row in rows if row.impl not in red]
    rows = [
        row
        for row in rows
        if (row.bench, row.mode, row.metric) == (line.bench, line.mode, line.metric)
        and line.config in row.config
        and line.x in (None, row.x)
    ]
    name, ours = next(((name, row) for name in line.ours if (row := _last(rows, name))), ("", None))
    if ours is None:
        return "not measured"
    rows = [row for row in rows if (row.x, row.config) == (ours.x, ours.config)]
    told = []
    for shown, pattern in line.peers.items():
        peer = _last(rows, pattern)
        if peer and line.as_values:
            told.append(f"{shown} {_number(peer)}")
        elif peer:
            beside = _last([row for row in rows if row.test == peer.test], re.escape(ours.impl))
            if beside is None:
                raise ValueError(f"{peer.test} measured {peer.impl} without {ours.impl}")
            ratio = peer.p50 / beside.p50
            ratio = 1 / ratio if ours.unit in _MORE_IS_BETTER else ratio
            told.append(f"{ratio:.{1 if ratio < 9.95 else 0}f} x {shown}")
    ceiling = _last([row for row in rows if row.test == ours.test], CEILING)
    if ceiling and line.has_ceiling:
        told.append(f"ceiling {_number(ceiling)}")
    by = f" ({line.fallback})" if name != line.ours[0] and line.fallback else ""
    figures = f"**{_number(ours)}**{by}" + (": " + ", ".join(told) if told else "")
    at = f"{ours.x_name}={ours.x:g}" if line.x is not None or not ours.config else ""
    return f"{figures}<br>{' '.join(filter(None, (ours.config, at)))}"


def _last(rows: Sequence[Row], pattern: str) -> Row | None:
    """The newest row, at the largest x, of an impl."""
    found = [row for row in rows if re.fullmatch(pattern, row.impl)]
    return max(reversed(found), key=lambda row: row.x, default=None)


def _number(row: Row) -> str:
    value, unit = row.p50, row.unit
    if row.metric == "utilization":
        return f"{100 * value:.1f} %"
    if unit == "TFLOP/s" and value < 1:
        value, unit = 1000 * value, "GFLOP/s"
    if unit == "1":
        return f"{value:.3f}"
    number = f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")
    return number + ("/s" if unit == "1/s" else f" {unit}")


def table(rows: Sequence[Row], red: Red | None = None) -> str:
    """The Markdown table; what is `red` is withheld."""
    kinds = list(dict.fromkeys(["cpu", H200, *(kind_of(row.machine) for row in rows)]))
    of = {kind: [row for row in rows if kind_of(row.machine) == kind] for kind in kinds}
    names = {kind: of[kind][-1].machine if of[kind] else "NVIDIA H200" for kind in kinds}
    names["cpu"] = "CPU"
    lines = ["| | " + " | ".join(names[kind] for kind in kinds) + " |"]
    lines.append("| --- |" + " --- |" * len(kinds))
    for line in LINES:
        cells = []
        for kind in kinds:
            if line.is_host and kind != "cpu":
                cells.append("host work")
            else:
                cells.append(cell(line, of[kind], (red or {}).get((kind, line.bench))))
        lines.append(f"| {line.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines + ["", *(_origin(names[kind], of[kind]) for kind in kinds)])


def _origin(name: str, rows: Sequence[Row]) -> str:
    if not rows:
        return f"{name}: not measured; `benchmarks/gpu.sh FOLDER` measures it."
    parts = (
        dict.fromkeys(getattr(row, part) for row in rows)
        for part in ("machine", "versions", "commit", "date")
    )
    machine, versions, commits, dates = (", ".join(part) for part in parts)
    return f"{machine}; {versions}; commit {commits}, {dates}."


def put_into(text: str, made: str) -> str:
    """A page with the table between its markers.

    Raises:
        ValueError: the page has no pair of markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN} and {END} around its table")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def run_tests(benches: set[str]) -> Path:
    """Run the tests that go with benchmarks; a CSV of `benchmarks.outcomes`."""
    out = Path(tempfile.mkdtemp()) / "tests.csv"
    names = sorted({name for bench in benches for name in TESTS[bench]})
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.outcomes", f"--outcomes={out}"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "auto", "--dist", "loadfile"]
    print(f"running the tests of {len(benches)} benchmarks: {', '.join(names)}", file=sys.stderr)
    subprocess.run([*command, *(f"tests/{name}.py" for name in names)], cwd=ROOT, stdout=sys.stderr)
    return out


def red_tests(
    outcomes: Sequence[Outcome], names: Sequence[str], impls: set[str]
) -> dict[str, list[str]]:
    """Of a benchmark's test files `names` those that are not green, by implementation, or for ALL: one that
    failed, broke off or did not run; all of which none passed, skipped as they may be."""
    red: dict[str, set[str]] = {}
    passed, ran = set(), set()
    for outcome in outcomes:
        file = re.fullmatch(r"tests/(\w+)\.py.*", outcome.test, re.DOTALL)
        if not file or file[1] not in names:
            continue
        ran.add(file[1])
        if outcome.event == "passed":
            passed.add(file[1])
        elif outcome.event != "skipped":
            parameters = outcome.test.partition("[")[2].removesuffix("]").split("-")
            for impl in impls & set(parameters) or {ALL}:
                red.setdefault(impl, set()).add(file[1])
    missing = set(names) - (ran if passed else set())
    if missing:
        red.setdefault(ALL, set()).update(missing)
    return {impl: sorted(files) for impl, files in red.items()}


def all_red(rows: Sequence[Row], host: Sequence[Outcome], gpus: dict[str, list[Outcome]]) -> Red:
    """What is to be withheld of rows, from the outcome of tests on the host, which stands for every
    machine, and on GPUs, by kind."""
    red: Red = {}
    for kind, bench in {(kind_of(row.machine), row.bench) for row in rows}:
        impls = {row.impl for row in rows if row.bench == bench}
        found = [red_tests(host, TESTS[bench], impls)]
        if kind != "cpu":
            names = [name for name in TESTS[bench] if name in ON_GPU]
            found.append(red_tests(gpus.get(kind, []), names, impls) if names else {})
        for impl, files in (item for reds in found for item in reds.items()):
            of = red.setdefault((kind, bench), {})
            of[impl] = sorted({*of.get(impl, ()), *files})
    return red


def is_withheld(row: Row, red: Red) -> bool:
    """Whether a test that stands for a row is not green."""
    of = red.get((kind_of(row.machine), row.bench), {})
    return ALL in of or row.impl in of


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where something is withheld, or, with --check, README.md's table is another."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="results as CSV")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: where FILE is")
    parser.add_argument(
        "--tests", type=Path, action="append", metavar="CSV", help="outcomes; default: run them"
    )
    parser.add_argument("--check", action="store_true", help="compare README.md, change nothing")
    options = parser.parse_args(arguments)
    files = options.files or sorted(RESULTS.glob(PUBLISHED))
    rows = [row for file in files for row in read_rows(file)]
    if options.check:
        text = README.read_text(encoding="utf-8")
        if put_into(text, table(rows)) != text:
            print(
                "README.md's table is not what the published results say: python -m benchmarks.report"
            )
            return 1
        return 0

    from benchmarks.plots import draw

    benches = {row.bench for row in rows}
    if benches - set(TESTS):
        parser.error(
            f"no test stands for {', '.join(sorted(benches - set(TESTS)))}: add it to TESTS"
        )
    if any(row.machine.startswith("dry run") for row in rows):
        parser.error("the figures are of a dry run, in which nothing was measured")
    host, gpus = [], {}
    for file in files:
        kinds = {kind_of(row.machine) for row in read_rows(file)}
        tests = file.with_name("tests.csv")
        if tests.exists():
            for kind in kinds - {"cpu"}:
                gpus.setdefault(kind, []).extend(read_outcomes(tests))
            host += read_outcomes(tests) if kinds == {"cpu"} else []
        elif kinds - {"cpu"}:
            parser.error(f"{file} has figures of a GPU, and no tests.csv of its tests beside it")
    host += [o for file in options.tests or [run_tests(benches)] for o in read_outcomes(file)]
    red = all_red(rows, host, gpus)
    for (kind, bench), of in sorted(red.items()):
        for impl, names in sorted(of.items()):
            what = f"{bench}{f' by {impl}' if impl else ''} on {kind}"
            print(f"withheld, as {', '.join(f'tests/{n}.py' for n in names)} is not green: {what}")
    if options.files:
        folder = options.out or files[0].parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text(table(rows, red) + "\n", encoding="utf-8")
    else:
        folder = PICTURES
        README.write_text(
            put_into(README.read_text(encoding="utf-8"), table(rows, red)), encoding="utf-8"
        )
    for name, why_not in draw([row for row in rows if not is_withheld(row, red)], folder):
        print(f"{folder / name}.png" + (f" is not drawn: {why_not}" if why_not else ""))
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
