"""What is built from the checkout: the source archive is the repository, the wheel what runs, and one version."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mmpack
from mmpack import _native

ROOT = Path(__file__).resolve().parents[1]
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|mmpack\.egg-info/.*")
# What git does not know of, in folders that go into the archive.
LEFT_OVERS = ("tests/__pycache__/x.pyc", "csrc/planner.o", "docs/.DS_Store", "mmpack/_native.so")


def run(*command, **options):
    """What it printed, of a process that is not in the checkout's Python path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked():
    """The repository's files; those of git and CI, which begin with a dot, are not for archives."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository to compare with")
    names = run("git", "ls-files", cwd=ROOT).splitlines()
    return {name for name in names if not name.startswith(".") and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def checkout(tracked, tmp_path_factory):
    """A copy of them, with left-overs of other work."""
    folder = tmp_path_factory.mktemp("packaging") / "checkout"
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    for name in LEFT_OVERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"left over")
    return folder


def build(hook, source):
    """The archive that the backend makes of `source`, with what is installed here."""
    code = f"from setuptools.build_meta import {hook}; {hook}('dist')"
    run(sys.executable, "-c", code, cwd=source)
    (made,) = (source / "dist").iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(checkout):
    """(the names in the source archive, the folder it is unpacked in)"""
    with tarfile.open(build("build_sdist", checkout)) as archive:
        names = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
        archive.extractall(checkout.parent, filter="data")
    return names, checkout.parent / f"mmpack-{mmpack.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist):
    """The wheel made of the source archive and the core that is built here: compiling it again takes 20 seconds
    (`test_in_a_fresh_environment` does)."""
    core = Path(_native.__file__)
    kind = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    place = sdist[1] / "build" / kind / "mmpack" / core.name
    place.parent.mkdir(parents=True)
    shutil.copyfile(core, place)  # newer than its sources
    with zipfile.ZipFile(build("build_wheel", sdist[1])) as archive:
        yield archive


def test_the_source_archive_is_the_repository(sdist, tracked):
    names, _ = sdist
    assert {name for name in names if not GENERATED.fullmatch(name)} == tracked


def test_the_wheel_holds_what_runs(wheel, tracked):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    (core,) = (name for name in names if name.endswith(".so"))
    assert core.startswith("mmpack/_native.")
    assert names - {core} == {name for name in tracked if name.startswith("mmpack/")}
    (licence,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_every_module_comes_from_the_wheel(wheel, tmp_path):
    """None is missing, none leans on the checkout; `import mmpack` stays light there too; and `import mmpack.x.y`
    gives a module, not a function of its name (but for `ops`, where a file is named after the op that the folder
    exports)."""
    wheel.extractall(tmp_path)
    names = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in wheel.namelist()
        if name.startswith("mmpack/") and name.endswith(".py")
    ]
    code = f"""
import importlib, sys
sys.path.insert(0, {str(tmp_path)!r})
import mmpack
assert not {{"torch", "triton", "transformers", "PIL", "datasets"}} & set(sys.modules)
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:  # of a trainer that is not here: it says which
        assert name.startswith("mmpack.integrations.") and "pip install" in str(error), error
        continue
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
    parent, _, last = name.rpartition(".")
    hidden = parent and getattr(sys.modules[parent], last, module) is not module
    assert not hidden or ".ops." in name, name
"""
    run(sys.executable, "-c", code, *names, cwd=tmp_path)
    assert len(names) >= 80


def test_the_core_runs_elsewhere(wheel, tmp_path):
    """It needs the system's libraries, and no folder but what this Python puts into all it builds."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf reads Linux' libraries, and is not here")
    (core,) = (name for name in wheel.namelist() if name.endswith(".so"))
    dynamic = run("readelf", "--dynamic", "--wide", wheel.extract(core, tmp_path))
    folders = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)
    assert all(folder in sysconfig.get_config_var("LDSHARED") for folder in folders)
    needed = set(re.findall(r"NEEDED.*\[(\w+)", dynamic))
    assert {"libstdc"} <= needed <= {"libstdc", "libm", "libgcc_s", "libc", "libpthread", "ld"}


def test_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert (metadata["Name"], metadata["Version"]) == ("mmpack", mmpack.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().startswith("# mmpack")
    # Whatever the project is tested with, a user may install.
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    extras = {extra for one in requirements if one.name == "mmpack" for extra in one.extras}
    assert extras <= set(metadata.get_all("Provides-Extra"))
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    for tested in (Requirement(line.split("#")[0]) for line in lines):
        (asked,) = (one for one in requirements if one.name == tested.name)
        for exact in (one for one in tested.specifier if one.operator == "=="):
            assert exact.version in asked.specifier, f"{asked} leaves out {tested}"


def test_one_version():
    heading = re.search("^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert heading[1].split()[0] == mmpack.__version__
    printed = run(sys.executable, "-m", "mmpack", "--version", cwd=ROOT)
    assert printed == f"mmpack {mmpack.__version__}\n"


@pytest.mark.slow
def test_in_a_fresh_environment(checkout, tmp_path):
    """Both archives in an isolated environment; the wheel without torch, then with all that trains."""
    tomllib = pytest.importorskip("tomllib")
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", checkout)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    assert archive.name == f"mmpack-{mmpack.__version__}.tar.gz"

    run(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    constraints = ("-c", ROOT / "constraints.txt")
    run(python, "-m", "pip", "install", "--no-deps", wheel)
    run(python, "-m", "pip", "install", "--no-deps", *constraints, *settings["test-requires"])
    for command in settings["test-command"]:
        run("sh", "-c", f". {tmp_path / 'env'}/bin/activate; {command}", cwd=tmp_path)

    run(python, "-m", "pip", "install", *constraints, f"{wheel}[train]")
    command = python.with_name("mmpack")
    assert run(command, "--version", cwd=tmp_path) == f"mmpack {mmpack.__version__}\n"
    assert "useful tokens/s" in run(command, "demo", cwd=tmp_path)
    assert "transformers" in run(command, "env", cwd=tmp_path)
