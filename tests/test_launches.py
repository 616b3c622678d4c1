"""How kernels are launched, without a GPU: on the device of their tensors, and in few variants."""

import ast
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
MOST_VARIANTS = 12  # of a kernel, over any number of packs: each takes a second or more to compile


def jit_variants(argument):
    """How often each kernel is compiled, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "tests/jit_variants.py", str(argument)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def launching_functions():
    """(file, function, its decorators) of whatever has a launch in it: `..._kernel[grid](...)`."""
    for path in sorted((ROOT / "mmpack" / "ops").rglob("*.py")):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(function, ast.FunctionDef):
                continue
            calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
            launched = (call.value for call in calls if isinstance(call, ast.Subscript))
            if any(ast.unparse(kernel).endswith("_kernel") for kernel in launched):
                yield path.name, function.name, [ast.unparse(d) for d in function.decorator_list]


def test_every_launch_is_on_the_device_of_its_tensors():
    found = list(launching_functions())
    assert len(found) == 12
    for file, name, decorators in found:
        assert decorators == ["on_its_device"], f"{file}: {name}"


def test_the_guard_is_around_the_launch(monkeypatch):
    from mmpack.ops.arguments import on_its_device

    inside = []

    @contextmanager
    def device_of(tensor):
        inside.append(tensor)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.empty(1)
    (of,), rest = on_its_device(lambda first, rest: (list(inside), rest))(x, rest=2)
    assert of is x and rest == 2 and not inside


def test_no_guard_where_there_is_no_gpu():
    from mmpack.ops.arguments import on_its_device

    for device in ("cpu", "meta"):
        assert on_its_device(lambda x: x.device.type)(torch.empty(1, device=device)) == device


@pytest.mark.parametrize("packs", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_packs_of_any_sizes_share_their_kernels(packs):
    variants = jit_variants(packs)
    assert len(variants) == 17
    assert max(variants.values()) <= MOST_VARIANTS, variants


def test_sizes_of_one_compile():
    """The JIT makes a constant of an integer that is 1, which has no `.to`."""
    assert len(jit_variants("--ones")) == 14


def test_a_test_is_not_of_a_gpu_by_its_folders_name(pytestconfig):
    conftest = next(
        plugin
        for plugin in pytestconfig.pluginmanager.get_plugins()
        if getattr(plugin, "SHARED", None) and hasattr(plugin, "device")
    )
    item = type("Item", (), {"keywords": {"gpu": 1}, "path": Path("test_x.py")})()
    type(item).get_closest_marker = lambda *a: None
    conftest.pytest_collection_modifyitems([item])  # add_marker would fail
    assert item.get_closest_marker("gpu") is None
