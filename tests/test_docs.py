"""The docs: code blocks run, links lead somewhere, options, names, files and error texts are the code's.

A block that cannot run here has `<!-- not run: why -->` in the line above it. Blocks of a page run in
order, in one folder beside the demo's data and, those in Python, in one namespace; of a `diff` the new side
runs, after all others, on the model that they have trained. No page has a retired idiom.
"""

import ast
import glob
import inspect
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

import mmpack
import mmpack.hf
import mmpack.ops
from mmpack.cli.command_line import command_line
from mmpack.cli.demo import write_data
from mmpack.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # for users
INTERNALS = sorted((ROOT / "docs" / "internals").glob("*.md"))
NAMING = [*PAGES, *INTERNALS, ROOT / "CONTRIBUTING.md", ROOT / "DESIGN.md"]  # what names modules
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
every_internal = pytest.mark.parametrize("page", INTERNALS, ids=lambda page: page.stem)
any_page = pytest.mark.parametrize(
    "page", [*PAGES, *INTERNALS], ids=lambda page: str(page.relative_to(ROOT).with_suffix(""))
)


class Block(NamedTuple):
    line: int
    language: str
    text: str
    reason: str | None  # why it is not run


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, f.start("text")), f["language"], f["text"], f["reason"])
        for f in FENCE.finditer(text)
    ]


def prose_of(page):
    """A page without its blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands_of(text):
    """The commands of a bash block, without comments, continued lines in one."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


# --------------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory):
    """What `mmpack demo --write demo_data` leaves, of a tenth of the rows."""
    folder = tmp_path_factory.mktemp("docs") / "demo_data"
    write_data(folder, 24)
    return folder


@every_page
def test_blocks_run(page, demo_data, tmp_path, monkeypatch):
    shutil.copytree(demo_data, tmp_path / "demo_data")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    for block in sorted(blocks_of(page), key=lambda block: block.language == "diff"):
        if block.reason is not None:
            continue
        if block.language in ("python", "diff"):
            text = block.text
            if block.language == "diff":
                text = re.sub("^-.*$|^[ +]", "", text, flags=re.M)
                text = text.replace("Qwen/Qwen2-VL-2B-Instruct", str(tmp_path / "run"))
            exec(compile("\n" * block.line + text, str(page), "exec"), namespace)
        elif block.language == "bash":
            for program, *words in commands_of(block.text):
                arguments = [name for word in words for name in sorted(glob.glob(word)) or [word]]
                if program == "mmpack":
                    assert main(arguments) == 0, f"{page.name}:{block.line}: {shlex.join(words)}"
                else:
                    subprocess.run([program, *arguments], check=True)


def test_few_blocks_are_not_run():
    blocks = [block for page in PAGES for block in blocks_of(page)]
    code = [block for block in blocks if block.language in ("python", "bash")]
    assert len(code) >= 25
    assert sum(block.reason is not None for block in code) <= 10


def test_internals_have_no_blocks_to_run():
    blocks = [(page.name, block) for page in INTERNALS for block in blocks_of(page)]
    code = [(name, block) for name, block in blocks if block.language in ("python", "bash")]
    assert [name for name, block in code if block.reason is None] == []


# --------------------------------------------------------------------------------------------------
# What the text names
# --------------------------------------------------------------------------------------------------


def anchors_of(page):
    """The anchors GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", prose_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@any_page
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose_of(page))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors_of(target), f"{page.name}: {link}"


@any_page
def test_tables_are_whole(page):
    """Each row of a table has as many cells as its head: a `|` within one is written `\\|`."""
    for table in re.findall(r"(?:^\|.*\n)+", prose_of(page), re.M):
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(set(cells)) == 1, f"{page.name}: {table.splitlines()[cells.index(max(cells))]}"


@any_page
def test_nothing_of_this_machine(page):
    text = page.read_text(encoding="utf-8")
    here = [ROOT.parent, Path.home(), Path(tempfile.gettempdir())]
    names = ["../shared", *(f"{path}/" for path in here if path != Path(path.anchor))]
    assert [name for name in names if name in text] == []


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in PAGES[1:] if f"(docs/{p.name})" not in text] == []
    index, *pages = sorted(INTERNALS, key=lambda page: page.stem != "README")
    text = index.read_text(encoding="utf-8")
    assert [p.name for p in pages if f"({p.name})" not in text] == []


@pytest.fixture(scope="module")
def options():
    """Every option a page may name: the commands', TrainingArguments', benchmarks' and those of tools."""
    from transformers import HfArgumentParser, TrainingArguments

    parsers = [command_line(), HfArgumentParser(TrainingArguments)]
    (commands,) = (a for a in parsers[0]._actions if isinstance(a.choices, dict))
    parsers += commands.choices.values()
    known = {name for p in parsers for action in p._actions for name in action.option_strings}
    for path in [*(ROOT / "benchmarks").glob("*.py"), ROOT / "tests" / "ptx" / "mode.py"]:
        known.update(re.findall(r'add_?(?:argument|option)\(\s*"(--[\w-]+)"', path.read_text()))
    known |= {"--nproc_per_node", "--dist", "--no-deps"}  # torchrun's, pytest's, pip's
    return known | {  # ms-swift's
        "--model_type", "--template", "--dataset", "--val_dataset", "--tuner_type", "--external_plugins",
        "--loss_scale", "--max_length",
    }  # fmt: skip


OPTION = r"(?<![\w-])--[a-z][\w-]*"


@any_page
def test_options_exist(page, options):
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.S)
    assert set(re.findall(OPTION, text)) <= options


def test_options_that_the_code_names_exist(options):
    """In messages, docstrings and examples: what an error advises can be passed."""
    others = {"--revision", "--include", "--no-build-isolation"}  # hf's, pip's
    named = {one for text in texts_of_the_code() for one in re.findall(OPTION, text)}
    assert sorted(named - options - others) == []
    assert len(named) >= 50


def test_python_options_exist():
    """`name=` of a call in the prose, `PackCollator(pad_to=8192)`, is an argument of that name."""
    for page in [*PAGES, *INTERNALS]:
        for name, words in re.findall(r"`(\w+)\(([^`()]*)\)`", prose_of(page)):
            owner = next((m for m in (mmpack, mmpack.hf, mmpack.ops) if hasattr(m, name)), None)
            if owner is not None:
                known = inspect.signature(getattr(owner, name)).parameters
                keywords = set(re.findall(r"(\w+)=", words))
                assert keywords <= set(known), f"{page.name}: {name}({words})"


MODULE = r"\bmmpack(?:\.\w+)+"
# benchmarks/bench_x.py and tests/test_x.py stand for files to be written
FILE = r"\b(?:mmpack|csrc|tests|benchmarks|docs)/(?:\w+/)*(?!(?:bench_|test_)?x\.)\w+\.(?:py|cpp|h|sh|md)\b"

NAMES_FILES = [
    *(p for name in ("mmpack", "benchmarks", "tests") for p in sorted((ROOT / name).rglob("*.py"))),
    *sorted((ROOT / "csrc").iterdir()),
    *(ROOT / "benchmarks").rglob("*.sh"),
    *(ROOT / name for name in (".ci/run", "pyproject.toml", "setup.py", "MANIFEST.in")),
]


def docstrings():
    """(file of the package, docstring) of its modules, classes and functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in sorted((ROOT / "mmpack").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield path, text


def is_there(name):
    """Whether `mmpack.x.y` is a module, or something in one."""
    if name.startswith("mmpack.integrations."):  # its framework may not be installed here
        parts = name.split(".")
        path = ROOT.joinpath(*parts[:3]).with_suffix(".py")
        kinds = (ast.ClassDef, ast.FunctionDef)
        body = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else None
        return body is not None and set(parts[3:4]) <= {
            x.name for x in body if isinstance(x, kinds)
        }
    try:
        pkgutil.resolve_name(name)
    except ModuleNotFoundError:  # a module that needs a package that is not here may be meant
        return (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()
    except (ImportError, AttributeError):
        return False
    return True


def test_modules_and_files_that_are_named_exist():
    texts = [(page, page.read_text(encoding="utf-8")) for page in NAMING]
    files, names, missing = set(), set(), []
    for path in NAMES_FILES:  # not modules: names of tests may look like them
        text = path.read_text(encoding="utf-8")
        files |= {(path.name, file) for file in re.findall(FILE, text)}
    for place, text in [*texts, *docstrings()]:
        files |= {(place.name, file) for file in re.findall(FILE, text)}
        names |= {(place.name, name) for name in re.findall(MODULE, text)}
    missing += [(place, file) for place, file in files if not (ROOT / file).is_file()]
    names -= {(place, name) for place, name in names if name in ("mmpack.json", "mmpack.html")}
    known = {name: is_there(name) for name in {name for _, name in names}}
    missing += [(place, name) for place, name in names if not known[name]]
    assert sorted(missing) == []
    assert len(files) >= 20
    assert len(known) >= 30


@pytest.fixture(scope="module")
def code():
    """(files of the repository, every word in them)"""
    files = [
        path
        for folder in ("mmpack", "csrc", "tests", "benchmarks", ".ci")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".cpp", ".h", ".sh", "") and path.is_file()
    ]
    words = set()
    for path in files:
        words |= set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    return [str(path) for path in files], words


@every_internal
def test_what_internals_name_is_in_the_code(page, code):
    """A file of which a page says the last parts, `hf/patch.py`, exists, and each word of a name does."""
    files, words = code
    spans = re.findall(r"`([^`\n]+)`", prose_of(page))
    named = [span for span in spans if re.fullmatch(r"[\w/.]+\.(?:py|cpp|h|sh)", span)]
    assert [n for n in named if not any(file.endswith(f"/{n}") for file in files)] == []
    names = [span for span in spans if re.fullmatch(r"[\w.]+(?:\(.*\))?", span)]
    assert [n for n in names if not set(re.findall(r"[A-Za-z_]\w*", n)) <= words] == []


def test_every_public_name_is_in_the_docs():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    names = [name for m in (mmpack, mmpack.hf, mmpack.ops) for name in m.__all__]
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


def texts_of_the_code():
    """Text literals of the package, "\0" for what an f-string puts in."""
    for path in sorted((ROOT / "mmpack").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_error_texts_are_the_codes():
    """The first cell of each row of the troubleshooting page is an error, `...` for what differs."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    texts = re.findall(r"^\| `(.+?)` \|", page, re.M)
    assert len(texts) >= 90
    code = "\n".join(text for text in texts_of_the_code() if "\n" not in text)
    for text in texts:
        pattern = ".*".join(re.escape(piece.strip()) for piece in text.split("..."))
        assert re.search(pattern, code), text


RETIRED = re.compile(  # this project's old idioms; each has a plain word: per, costly, fix, does not synchronize
    r"""\bdear(?:er|est)?\b | \bby\ turns\b | \baloud\b | \bas\ a\ rule\b | \bwho\ has\b | \bmend(?:s|ed|ing)?\b
    | \basks?\ the\ (?:GPU|device|host)\ nothing\b | \b(?:to|can)\ be\ had\b
    | \b(?:tokens|frames|patches|packs|samples|rows|bytes)\ an?\ (?:second|rank|epoch)\b
    | \bbytes\ a\ (?:sample|row|token)\b""",
    re.I | re.X,
)
IN_PLAIN_WORDS = [
    *NAMING,
    *(ROOT / "mmpack").rglob("*.py"),
    *(ROOT / "csrc").glob("*.*"),
    *(ROOT / "benchmarks").glob("*.py"),
]


def test_no_retired_idioms():
    """Except within backticks, which quote the code."""
    found = []
    for path in IN_PLAIN_WORDS:
        text = re.sub(r"`[^`\n]+`", "``", path.read_text(encoding="utf-8"))
        found += [(path.name, m[0]) for m in RETIRED.finditer(" ".join(text.split()))]
    assert found == []


SHAPE = r"\((?:[A-Z1]\w*|n)(?: \+ \w+)?,[^()]*\)|scalar"  # (T,), (S + 1,), (1, 1, T, T)


@pytest.mark.parametrize("module", [mmpack, mmpack.hf, mmpack.ops], ids=lambda m: m.__name__)
def test_public_docstrings(module):
    """They say what each argument and field is, what comes back, and the errors."""
    for name in module.__all__:
        thing = getattr(module, name)
        text = inspect.getdoc(thing) or ""
        where = f"{module.__name__}.{name}"
        arguments = inspect.signature(thing).parameters
        assert [x for x in arguments if not re.search(rf"\b{x}\b", text)] == [], where
        if inspect.isfunction(thing):
            returns = inspect.signature(thing).return_annotation not in (None, "None")
            first = text.partition("\n\n")[0]
            told = re.search("Returns:|Yields:|returns", text) or re.search(SHAPE, first)
            assert "Raises:" in text and (told or not returns), where
        else:
            assert "Attributes:" in text or "Args:" in text, where
            for member, value in vars(thing).items():
                if not member.startswith("_") and (callable(value) or isinstance(value, property)):
                    assert inspect.getdoc(getattr(thing, member)), f"{where}.{member}"


@pytest.mark.parametrize("name", mmpack.ops.__all__)
def test_ops_name_shapes(name):
    """Every tensor an op takes has its shape in the docstring, or is said to be another op's."""
    op = getattr(mmpack.ops, name)
    shapes = re.findall(SHAPE, inspect.getdoc(op))
    tensors = [
        p for p in inspect.signature(op).parameters.values() if "Tensor" in str(p.annotation)
    ]
    assert len(shapes) >= len(tensors) or "as in `" in inspect.getdoc(op)


@pytest.mark.slow
def test_the_api_reference(tmp_path):
    pytest.importorskip("pdoc", reason="needs mmpack[docs]")
    subprocess.run([sys.executable, ROOT / "docs" / "api.py", tmp_path], check=True)
    for module in (mmpack, mmpack.hf, mmpack.ops):
        text = (tmp_path / f"{module.__name__.replace('.', '/')}.html").read_text(encoding="utf-8")
        assert [name for name in module.__all__ if f'id="{name}"' not in text] == []
