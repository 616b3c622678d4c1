import json
import sys
from importlib.metadata import version

import pytest
import torch

import mmpack.ops
from mmpack.cli.env import KERNELS, PLAIN, environment
from mmpack.cli.main import main
from mmpack.ops.varlen_attention import IMPLEMENTATIONS, auto_impl, why_not


def test_every_op_and_implementation_is_there():
    found = environment()
    assert {"varlen_attention", *KERNELS, *PLAIN} == set(mmpack.ops.__all__)
    assert set(found["ops"]) == set(mmpack.ops.__all__)
    assert tuple(found["ops"]["varlen_attention"]) == IMPLEMENTATIONS
    assert found["ops"]["varlen_attention"][found["auto"]] is None
    assert found["packages"]["torch"] == {"version": version("torch"), "error": None}
    assert bool(found["gpus"]) == torch.cuda.is_available() == (found["why_no_gpu"] is None)
    if not (torch.version.cuda or torch.version.hip):
        assert found["why_no_gpu"] == f"torch {torch.__version__} is built for the CPU only"
    if not found["gpus"]:
        q_THK = torch.empty(1, 1, 64, dtype=torch.bfloat16)
        assert found["ops"]["varlen_attention"]["flash2"] == why_not("flash2", q_THK)


def test_the_table(capsys):
    assert main(["env"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mmpack", mmpack.__version__] in lines
    assert ["patch_embed", "torch", "available"] in lines
    (auto,) = (words for words in lines if "impl='auto'" in words)
    assert auto[:3] == ["varlen_attention", environment()["auto"], "available;"]


@pytest.fixture
def broken_flash(tmp_path, monkeypatch):
    """A flash-attn that was built for another torch."""
    for name, text in {
        "flash_attn/__init__.py": "raise RuntimeError('undefined symbol:\\n _ZN3c10')",
        "flash_attn-2.8.3.dist-info/METADATA": "Name: flash-attn\nVersion: 2.8.3\n",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)


def test_a_broken_package_is_named_and_not_taken(broken_flash, capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    error = "RuntimeError: undefined symbol: _ZN3c10"
    assert found["packages"]["flash-attn"] == {"version": "2.8.3", "error": error}
    reason = found["ops"]["varlen_attention"]["flash2"]
    assert reason.startswith("flash_attn cannot be imported: undefined symbol")
    assert auto_impl(torch.empty(1, 1, 64)) == "sdpa"
    assert main(["env"]) == 0
    assert f"2.8.3, BROKEN: {error}" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["torch", "triton", "transformers", "mmpack.ops", "numpy"])
def test_nothing_is_needed(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    for name in [name for name in sys.modules if name.startswith("mmpack.ops.")]:
        if missing == "mmpack.ops":
            monkeypatch.setitem(sys.modules, name, None)
    assert main(["env"]) == 0
    assert mmpack.__version__ in capsys.readouterr().out
