"""Who may import whom (DESIGN.md): arrows go down, heavy dependencies live in one room each."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mmpack"

# A folder is a layer, and imports point at a lower one. Inside a folder they are free. `ops` and `packing`
# stand side by side: kernels know no pack, packs no kernel.
LAYERS = {
    "mmpack": 0,
    "data": 1,
    "store": 2,
    "packing": 3,
    "ops": 3,
    "hf": 4,
    "cli": 5,
    "integrations": 6,
}
# (file, what it may import although it lies higher), each with its reason
EXCEPTIONS = {
    ("__init__", "mmpack.data"),  # the public names
    ("__init__", "mmpack.packing"),
    ("__main__", "mmpack.cli"),  # python -m mmpack
}

# third-party package -> the rooms that may import it; numpy may be anywhere
ROOMS = {
    "PIL": {"data/images", "data/resize", "cli/demo"},
    "accelerate": {"hf"},
    "aiohttp": {"data/remote_http"},
    "av": {"data/videos"},
    "datasets": {"integrations/trl"},
    "filelock": {"store/atomic_folder"},
    "flash_attn": {"ops"},
    "flash_attn_interface": {"ops"},
    "fsspec": {"data/remote_files"},
    "huggingface_hub": {"data/model_folder", "data/remote_hub"},
    "jinja2": {"data/template_errors"},  # of torch and of transformers' templates
    "matplotlib": {"cli/plots"},
    "llamafactory": {"integrations"},
    "peft": {"hf/lora"},
    "yaml": {"cli/option_file"},
    "platformdirs": {"ops/tuning"},
    "pyarrow": {
        "data/columnar_files",
        "data/file_bytes",
        "store/encoded_store",
        "store/arrow_schema",
    },
    "ray": {"store/ray_chunks"},
    "safetensors": {"hf"},  # transformers needs it
    "tokenizers": {"cli/demo"},
    "torch": {
        "reference",
        "data/images",
        "packing/dataset",
        "packing/even_packs",
        "packing/mixed_dataset",
        "packing/pack_source",
        "packing/stream",
        "packing/stream_source",
        "packing/worker_buffers",
        "ops",
        "hf",
        "cli/demo",
        "integrations",
    },
    "tqdm": {"data/progress"},
    "swift": {"integrations"},
    "transformers": {"data/processor_folder", "hf", "cli/demo", "integrations"},
    "triton": {"ops"},
    "trl": {"integrations"},
}


def files():
    """(path, its folder, its name without the suffix as in ROOMS) of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE).with_suffix("")
        folder = inside.parts[0] if len(inside.parts) > 1 else "mmpack"
        yield path, folder, str(inside)


def imports(path):
    """(line, dotted module) of every import, those inside functions and TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            if node.module == "mmpack":
                yield from ((node.lineno, f"mmpack.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def test_every_folder_is_a_layer():
    assert {folder for _, folder, _ in files()} == set(LAYERS)


@pytest.mark.parametrize(("path", "folder", "name"), list(files()), ids=lambda x: str(x)[-40:])
def test_imports_point_down(path, folder, name):
    for line, module in imports(path):
        top, *rest = module.split(".")
        place = f"{path.relative_to(ROOT)}:{line}: {folder} may not import {module}"
        if top == "mmpack":
            target = rest[0] if rest and (PACKAGE / rest[0]).is_dir() else "mmpack"
            is_below = target == folder or LAYERS[target] < LAYERS[folder]
            assert is_below or (name, f"mmpack.{target}") in EXCEPTIONS, place
        elif top in ROOMS:
            assert folder in ROOMS[top] or name in ROOMS[top], place
        else:
            assert top in sys.stdlib_module_names or top == "numpy", place


def test_the_exceptions_are_few_and_needed():
    assert len(EXCEPTIONS) <= 3
    found = {
        (name, ".".join(module.split(".")[:2]))
        for path, _, name in files()
        for _, module in imports(path)
    }
    assert found >= EXCEPTIONS


def test_no_two_names_differ_by_a_letter():
    """Who reads a name in the tree must not take it for its neighbour's."""
    names = [path.stem for path, _, _ in files() if not path.stem.startswith("__")]
    assert len(set(names)) == len(names)
    near = [
        (a, b) for a in names for b in names if a < b and (b.startswith(a) and len(b) - len(a) == 1)
    ]
    assert near == []


def test_the_design_has_the_law_and_every_file():
    """DESIGN.md's order of folders is the one above, and its tree names what there is, once."""
    text = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160  # one page for the head
    order = re.search(r"^    (mmpack < .*)$", text, re.M)[1]
    drawn = {
        folder: layer
        for layer, group in enumerate(order.split(" < "))
        for folder in group.split(", ")
    }
    assert drawn == LAYERS
    tree = text[text.index("## The tree") :]
    tree = tree[: tree.index("\n## ", 1)]
    heads = re.findall(r"^ +((?:[\w/]+\.py(?:, )?)+)", tree, re.M)  # a line may hold several
    listed = [name for head in heads for name in head.split(", ")]
    there = [path.name for path, _, _ in files() if not path.stem.startswith("__")]
    core = [path.name for path in (ROOT / "csrc").glob("*.cpp")]
    core += [p.name for p in (ROOT / "csrc").glob("*.h") if not p.with_suffix(".cpp").exists()]
    assert [name for name in core if name not in tree] == []
    assert sorted(listed) == sorted(there)


def loaded_after(statement):
    heavy = ["triton", "transformers", "PIL", "datasets", "torch"]
    code = f"{statement}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])"
    return ast.literal_eval(subprocess.check_output([sys.executable, "-c", code], text=True))


def test_a_bare_import_is_light():
    assert loaded_after("import mmpack") == []


def test_planning_loads_nothing_heavy():
    assert loaded_after("import mmpack; mmpack.plan_packs([1, 2, 3], 4)") == []


def test_the_step_path_asks_the_device_nothing():
    """No .item(), .tolist(), .nonzero() in the rooms a training step passes through."""
    for path, folder, _ in files():
        if folder in ("hf", "ops"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                for call in (".item(", ".tolist(", ".nonzero("):
                    assert call not in line, f"{path.relative_to(ROOT)}:{number}"


def test_public_names():  # their docstrings: test_docs.py
    import mmpack
    import mmpack.hf
    import mmpack.ops

    for module in (mmpack, mmpack.hf, mmpack.ops):
        assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mmpack.nothing  # noqa: B018
