"""Fixtures: the shared real data (tests that need it skip where it is missing) and offline mode."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models are tiny, and test processes many

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from ptx import mode

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
sys.path.append(str(ROOT))  # benchmarks, behind an mmpack that is installed


# The files that take longest, which begin first: a worker that began one last would let the others wait.
LONGEST = (
    "test_matrix", "test_trainer", "test_equivalence", "test_stream_trainer", "test_varlen_attention",
    "test_survives", "test_gpu_run", "test_store", "test_assemble_sequence", "test_packaging", "test_docs",
)  # fmt: skip


emulator = None  # the driver behind Triton if the tests of GPUs run in the emulator


def pytest_addoption(parser):
    mode.add_options(parser)


def pytest_configure(config):
    global emulator
    gc.disable()  # while test files are imported
    if config.getoption("emulate", False):
        emulator = mode.start(config)
    elif not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    if emulator:
        mode.choose(items)
        return
    for item in items:
        if item.get_closest_marker("emulated"):
            item.add_marker(pytest.mark.skip(reason="needs pytest --emulate"))
        elif item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """What was imported is never garbage: `Trainer.train` would look for some in millions of objects, for half a
    second."""
    gc.enable()
    gc.freeze()


@pytest.fixture(scope="session")
def shared():
    """The folder of real data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared real data, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer(shared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "tokenizer" / "qwen2_vl")


@pytest.fixture(scope="session")
def vision(shared):
    """The real processor's spec with the budget most of the real data was measured with."""
    from mmpack import Encoder

    folder = shared / "tokenizer" / "qwen2_vl"
    return Encoder.from_folder(folder, max_pixels=28 * 28 * 1280).vision


@pytest.fixture(scope="session")
def encoder(tokenizer, vision):
    from mmpack import Encoder

    return Encoder(tokenizer, vision)


@pytest.fixture(scope="session")
def realset_rows(shared):
    return json.loads((shared / "realset" / "realset_sft.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def realset_samples(shared):
    from mmpack import Reader

    return list(Reader().read(shared / "realset" / "realset_sft.json"))


@pytest.fixture(scope="session")
def realset(realset_samples, encoder):
    """Every row of the real set, encoded."""
    return list(encoder.encode(realset_samples))


@pytest.fixture(scope="session")
def small_set(tmp_path_factory):
    """A folder with a few of the demo's rows, its tokenizer and config, the rows packed, and packed as a
    part of which there is one."""
    from mmpack.cli.demo import write_data
    from mmpack.cli.main import main

    folder = tmp_path_factory.mktemp("small_set")
    write_data(folder, 24)
    arguments = ["pack", folder / "train.json", "--tokenizer", folder / "tokenizer"]
    arguments += ["--capacity", 2048, "--quiet"]
    for where in (["packed"], ["part", "--shard", "1/1"]):
        assert main([*map(str, arguments), "--out", str(folder / where[0]), *where[1:]]) == 0
    return folder


@pytest.fixture(scope="session")
def small_encoder(small_set):
    from mmpack import Encoder

    return Encoder.from_folder(small_set / "tokenizer")


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where kernels run: a GPU or its emulator, or Triton's interpreter on CPU tensors (bf16 sums are wrong
    there)."""
    if request.param == "cuda":
        return mode.DEVICE if emulator else torch.device("cuda")
    if emulator or torch.cuda.is_available():
        pytest.skip("kernels run on the GPU here, not in the interpreter")
    return torch.device("cpu")


@pytest.fixture
def emulated():
    """The driver behind Triton under --emulate."""
    return emulator


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fresh memory is full of NaN, so that a row nobody wrote is seen."""
    real = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() and not out.is_meta else out

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.fixture
def fused_calls(monkeypatch):
    """How often the fused embedding ran."""
    import mmpack.ops

    calls = []
    real = mmpack.ops.embed_features

    def count(*args, **kwargs):
        calls.append(kwargs["padding_idx"])
        return real(*args, **kwargs)

    monkeypatch.setattr(mmpack.ops, "embed_features", count)
    return calls


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def wide_tiles(monkeypatch):
    """In the interpreter a program costs milliseconds whatever its size: models get few of them."""
    if not (emulator or torch.cuda.is_available()):
        from mmpack.ops import mrope

        monkeypatch.setattr(mrope, "BLOCK_T", 256)
        monkeypatch.setattr(mrope, "TILE", 1 << 20)
