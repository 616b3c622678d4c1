"""Tables and plots of results whose tests pass.

    python -m benchmarks.report                   published results: the tables of docs/benchmarks.md and
    README.md,
                                                  docs/*.png
    python -m benchmarks.report FILE... [--out FOLDER]      any results: report.md and plots beside FILE
    python -m benchmarks.report --check           check that both tables match the published results

Results are CSVs written by `pytest benchmarks`; published ones are `results/*/published.csv`. A value without a
row is "not measured", and a plot without rows is not drawn. Each benchmark has tests (`TESTS`), which are run
first, or read from `--tests FILE` (`benchmarks.outcomes`). If one failed, hung or did not run, or if none passed,
the benchmark's rows and plots are withheld and the exit code is 1. A test with an implementation among its
parameters only affects that implementation's rows. A GPU's results need the outcomes of its own tests beside them
in `tests.csv`, written by `gpu.sh`: a test that fails or was cut off there affects only that GPU's rows. Results
of a dry run are refused.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_run import STAGES
from benchmarks.harness import RESULTS, Row, kind_of, read_rows
from benchmarks.outcomes import Outcome, read_outcomes
from benchmarks.tables import ALL, Red, brief_table, table

ROOT = Path(__file__).resolve().parents[1]
README, PAGE, PICTURES = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
PUBLISHED = "*/published.csv"

# The tests of each benchmark; its results are only published if they pass.
TESTS = {
    "assemble": ("test_assemble",),
    "batch": ("test_assemble", "test_assemble_sequence", "test_device_batches"),
    "context": ("test_context", "test_context_part"),
    "embed_features": ("test_embed_features",),
    "head": ("test_supervised_cross_entropy", "test_supervised_linear_cross_entropy"),
    "headers": ("test_images",),
    "host": ("test_collator", "test_pixels"),
    "index": ("test_build", "test_encode"),
    # Inside other frameworks, of which only TRL is installed where reports are made; each benchmark compares
    # losses itself.
    "inside LLaMA-Factory": ("test_callbacks", "test_trainer"),
    "inside TRL": ("test_trl",),
    "inside ms-swift": ("test_callbacks", "test_trainer"),
    "mrope": ("test_mrope", "test_rotary"),
    "opening": ("test_store",),
    "patch_embed": ("test_patch_embed", "test_cast_patches"),
    "pixels": ("test_images", "test_pixels"),
    "plan": ("test_plan", "test_balance", "test_cost"),
    "ranks": ("test_plan", "test_balance", "test_cost"),
    "sources": (
        "test_build",
        "test_encode",
        "test_tar_format",
        "test_tar_shards",
        "test_ray_chunks",
    ),
    "store": ("test_store",),
    "stream": ("test_stream",),
    "tower": ("test_vision_spec", "test_families", "test_equivalence"),
    "train": ("test_equivalence", "test_model_patch"),
    "varlen_attention": ("test_varlen_attention", "test_varlen_limits"),
}

# Test files that run on a GPU, completely or in part.
ON_GPU = {
    Path(argument).stem
    for stage in STAGES
    for argument in stage.command
    if re.fullmatch(r"tests/test_\w+\.py", argument)
}


def pages(rows: Sequence[Row], red: Red | None = None) -> dict[Path, str]:
    """The pages that contain a table, with the tables made from these rows."""
    made = {README: brief_table(rows, red), PAGE: table(rows, red)}
    return {path: put_into(path.read_text(encoding="utf-8"), text) for path, text in made.items()}


def put_into(text: str, made: str) -> str:
    """A page with the table inserted between its markers.

    Raises:
        ValueError: the page has no pair of markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN} and {END} around its table")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def run_tests(benches: set[str]) -> Path:
    """Run the tests of benchmarks; returns the path of a CSV of `benchmarks.outcomes`."""
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
    """The test files among a benchmark's `names` that did not pass, by implementation or for ALL: files with a
    test that failed, was cut off or did not run, and files in which no test passed."""
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
    """What to withhold, from the outcomes of tests on the host, which apply to all machines, and on GPUs, by
    kind."""
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
    """Whether a test of this row did not pass."""
    of = red.get((kind_of(row.machine), row.bench), {})
    return ALL in of or row.impl in of


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 if something is withheld, or with --check if a table in the docs differs."""
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
    parser.add_argument("--check", action="store_true", help="compare the tables, change nothing")
    options = parser.parse_args(arguments)
    files = options.files or sorted(RESULTS.glob(PUBLISHED))
    rows = [row for file in files for row in read_rows(file)]
    if options.check:
        for path, text in pages(rows).items():
            if path.read_text(encoding="utf-8") != text:
                print(
                    f"the table of {path.relative_to(ROOT)} is not what the published results say: "
                    "python -m benchmarks.report"
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
        for path, text in pages(rows, red).items():
            path.write_text(text, encoding="utf-8")
    for name, why_not in draw([row for row in rows if not is_withheld(row, red)], folder):
        print(f"{folder / name}.png" + (f" is not drawn: {why_not}" if why_not else ""))
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
