"""Who may import whom (DESIGN.md): arrows go down, heavy dependencies live in one room each."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mmpack"

LAYERS = {
    "_native": 0,
    "errors": 0,
    "arrays": 0,
    "video_spec": 0,
    "vision": 0,
    "types": 0,
    "videos": 1,
    "buffers": 1,
    "cost": 1,
    "files": 1,
    "images": 1,
    "media": 1,
    "mixture": 1,
    "ops": 1,
    "publish": 1,
    "reference": 1,
    "assemble": 2,
    "compact": 2,
    "batches": 2,
    "conversations": 2,
    "documents": 2,
    "encode": 2,
    "plan": 2,
    "select": 2,
    "split": 2,
    "store": 2,
    "template": 2,
    "truncate": 2,
    "readers": 3,
    "assembling": 3,
    "dataset": 4,
    "index": 4,
    "prompt": 4,
    "stream": 4,
    "hf": 5,
    "check": 6,
    "cli": 6,
    "demo": 6,
    "env": 6,
    "inspect": 6,
    "options": 6,
    "merge": 6,
    "pack": 6,
    "pictures": 6,
    "report": 6,
}
# In their own layer these may use each other: the nouns stand on the spec and the errors, a room is
# a room, and the command line is made of its commands.
SAME_LAYER = {
    ("video_spec", "errors"),
    ("vision", "errors"),
    ("vision", "video_spec"),
    ("types", "errors"),
    ("types", "arrays"),
    ("types", "vision"),
    ("videos", "images"),
    ("compact", "assemble"),
    ("documents", "conversations"),
    ("encode", "template"),
    ("split", "truncate"),
    ("store", "batches"),
    ("stream", "dataset"),
    ("hf", "hf"),
    ("ops", "ops"),
    ("ops", "reference"),  # the door to attention runs it by name
    ("cli", "demo"),
    ("cli", "check"),
    ("cli", "env"),
    ("cli", "inspect"),
    ("cli", "options"),
    ("cli", "merge"),
    ("cli", "pack"),
    ("cli", "pictures"),
    ("cli", "report"),
    ("env", "report"),
    ("inspect", "report"),
    ("pack", "pictures"),
    ("merge", "pack"),
    ("pack", "report"),
    ("pictures", "check"),
    ("pictures", "inspect"),
    ("pictures", "report"),
    ("report", "check"),
}

# third-party package -> the rooms that may import it; numpy may be anywhere
ROOMS = {
    "PIL": {"images", "demo"},
    "accelerate": {"hf"},
    "av": {"videos"},
    "datasets": set(),
    "filelock": {"publish"},
    "flash_attn": {"ops"},
    "flash_attn_interface": {"ops"},
    "matplotlib": {"pictures"},
    "pyarrow": {"batches", "files", "store"},
    "tokenizers": {"demo"},
    "torch": {
        "assembling",
        "buffers",
        "images",
        "reference",
        "dataset",
        "stream",
        "hf",
        "demo",
        "ops",
    },
    "safetensors": {"hf"},  # transformers needs it
    "tqdm": {"cli", "pack"},
    "transformers": {"hf", "demo"},
    "triton": {"ops"},
}


def rooms():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield path, parts[0]


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


def test_every_file_has_a_layer():
    assert {room for _, room in rooms()} - {"__init__"} <= set(LAYERS)


@pytest.mark.parametrize(("path", "room"), list(rooms()), ids=lambda x: getattr(x, "stem", x))
def test_imports_go_down(path, room):
    if room == "__init__":
        return
    for line, module in imports(path):
        top, *rest = module.split(".")
        place = f"{path.relative_to(ROOT)}:{line}: {room} may not import {module}"
        if top == "mmpack":
            target = rest[0]
            assert LAYERS[target] < LAYERS[room] or (room, target) in SAME_LAYER, place
        elif top in ROOMS:
            assert room in ROOMS[top], place
        else:
            assert top in sys.stdlib_module_names or top == "numpy", place


def test_the_design_has_the_layers_and_every_file():
    """DESIGN.md's list of layers is the one above, and its tree names what there is."""
    text = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    drawn = {}
    for number, line in re.findall(r"^L(\d)  (.+)$", text, re.M):
        words = re.sub(r"\([^)]*\)|/\*", "", re.split(r" {5}", line)[0]).split()
        drawn.update(dict.fromkeys(words, int(number)))
    assert {
        name: layer for name, layer in drawn.items() if name not in ("benchmarks", "tests")
    } == LAYERS
    tree = text[text.index("## Where things are") : text.index("## Stations")]
    names = [path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    names += [path.name for path in (ROOT / "csrc").glob("*.cpp")]
    assert [name for name in names if not re.search(rf"\b{re.escape(name)}", tree)] == []


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
    for path, room in rooms():
        if room in ("hf", "ops"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                for call in (".item(", ".tolist(", ".nonzero("):
                    assert call not in line, f"{path.relative_to(ROOT)}:{number}"


def test_public_names():  # their docstrings: test_docs.py
    import mmpack

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mmpack.nothing  # noqa: B018
