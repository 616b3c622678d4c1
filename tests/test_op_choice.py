"""`impl="auto"`: a patched model uses what was measured, ranks agree on it, and a resumed run keeps it."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from builders import (
    FAMILIES,
    SMALL_SPEC,
    encoded,
    made_up_rows,
    packed,
    small_config,
    tiny_model,
)
from ranks import on_ranks

import mmpack.ops
from benchmarks import tune_models
from mmpack import ContextGroup, reference
from mmpack.hf import (
    PackCollator,
    attention,
    head,
    loss,
    model_patch,
    op_choice,
    patch_model,
    rank_choice,
)
from mmpack.hf.op_choice import ShapeClass, choose, roles_of, shape_classes, tell_choice, usable
from mmpack.hf.rank_choice import KEY, agree_on_ops
from mmpack.ops.tuning import Measured, agreed

CONFIG = small_config()
OPS = {"varlen_attention": "reference", "apply_mrope": "triton", "embed_features": "triton"}
OPS |= {
    "patch_embed": "triton",
    "supervised_cross_entropy": "triton",
    "supervised_linear_cross_entropy": "triton",
}


def measured(default="sdpa", **seconds):
    return Measured(default, seconds, {}, 8192, "2026-11-30")


def table_of(config=CONFIG, dtype=torch.float32, roles=None, **seconds):
    """A table in which the op of each role, or of all, has these times; or OPS was twice as fast."""
    found = {}
    for role, (op, sizes) in roles_of(config).items():
        if roles is None or role in roles:
            name = str(ShapeClass(op, str(dtype).removeprefix("torch."), sizes))
            default = "sdpa" if op == "varlen_attention" else "libraries"
            default = "torch" if op.startswith(("supervised", "patch")) else default
            found[name] = measured(default, **(seconds or {default: 2.0, OPS[op]: 1.0}))
    return found


@pytest.fixture
def calls(monkeypatch):
    """(op or implementation, sizes) of every call of an op; those of kernels run the specification."""
    seen = []
    real = attention.varlen_attention

    def attend(q, k, *args, causal, impl, **options):
        sizes = {"H": q.shape[1], "Hk": k.shape[1], "K": q.shape[2], "causal": int(causal)}
        seen.append((impl, sizes))
        return real(
            q, k, *args, causal=causal, impl="auto" if impl == "triton" else impl, **options
        )

    def rotate(q, k, positions, inv_freq, sections, *, interleaved, attention_scaling):
        sizes = {"H": q.shape[1], "Hk": k.shape[1], "K": q.shape[2]}
        sizes |= {f"S{n}": (*sections, 0, 0)[n] for n in range(3)}
        seen.append(("apply_mrope", {**sizes, "interleaved": int(interleaved)}))
        return reference.apply_mrope(
            q, k, positions, inv_freq, sections, interleaved, attention_scaling
        )

    def embed(ids, index, weight, features, **rest):
        seen.append(("embed_features", dict(zip("VD", weight.shape))))
        return reference.embed_features(ids, index, weight, features)

    real_loss = loss.supervised_cross_entropy

    def score(logits, *args, impl, **options):
        seen.append((f"loss {impl}", {"V": logits.shape[1]}))
        return real_loss(logits, *args, impl="auto", **options)

    monkeypatch.setattr(loss, "supervised_cross_entropy", score)
    monkeypatch.setattr(attention, "varlen_attention", attend)
    monkeypatch.setattr(mmpack.ops, "apply_mrope", rotate)
    monkeypatch.setattr(mmpack.ops, "embed_features", embed)
    return seen


@pytest.fixture
def here(monkeypatch):
    """Sets what was measured on this machine."""

    def set_table(table):
        for module in (model_patch, rank_choice):
            monkeypatch.setattr(module, "table_here", lambda device: table)

    return set_table


def batch(family="qwen2_vl"):
    return made_up_rows(family)[0]


def names(calls):
    """The attention of text and tower, and the other ops, in words."""
    found = {
        ("text " if sizes.get("causal") else "tower ") + impl
        for impl, sizes in calls
        if "causal" in sizes
    }
    return found | {op for op, sizes in calls if "causal" not in sizes and op != "loss auto"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_roles_are_what_ops_are_called_with(family, calls):
    config = small_config(family)
    model = patch_model(tiny_model(config), impl="triton")
    model(**batch(family))
    of_calls = {tuple(sorted(sizes.items())) for _, sizes in calls}
    of_roles = {
        tuple(sorted((name, size) for name, size in sizes if name != "window"))
        for role, (_, sizes) in roles_of(config).items()
        if role not in ("head", "patches")  # such a small head makes logits; pixels are floats
    }
    assert of_calls == of_roles
    windows = [
        dict(sizes)["window"] for _, sizes in roles_of(config).values() if "window" in dict(sizes)
    ]
    assert sorted(windows) == ([0, 0, 16] if family == "qwen2_5_vl" else [0, 0])


@pytest.mark.parametrize(
    ("roles", "used"),
    [
        ([], {"text auto", "tower auto"}),
        (["attention"], {"text reference", "tower auto"}),
        (["vision_attention"], {"text auto", "tower reference"}),
        (["embedding"], {"text auto", "tower auto", "embed_features"}),
        (["rotary"], {"text auto", "tower auto", "apply_mrope"}),
        (["loss"], {"text auto", "tower auto", "loss triton"}),
        (
            None,
            {"text reference", "tower reference", "apply_mrope", "embed_features", "loss triton"},
        ),
    ],
)
def test_each_role_uses_its_own_choice(roles, used, calls, here):
    here(table_of(roles=roles))
    model = patch_model(tiny_model(CONFIG))
    expected = patch_model(tiny_model(CONFIG), impl="libraries")(**batch()).loss
    calls.clear()
    loss = model(**batch()).loss
    assert names(calls) == used
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_rotation_of_one_side_leaves_the_other(calls, here):
    here(table_of(roles=["vision_rotary"]))
    patch_model(tiny_model(CONFIG))(**batch())
    assert {sizes["S2"] for op, sizes in calls if op == "apply_mrope"} == {0}  # the tower's


@pytest.mark.parametrize(("chosen", "impl"), [({}, "torch"), (None, "triton")])
def test_uint8_patches(chosen, impl, here, monkeypatch):
    here(table_of(roles=["patches"]) if chosen is None else {})
    seen, real = [], mmpack.ops.patch_embed

    def patch_embed(stills, video, weight, *args, impl):
        seen.append((impl, tuple(weight.shape)))
        return real(stills, video, weight, *args, impl="torch")

    monkeypatch.setattr(mmpack.ops, "patch_embed", patch_embed)
    model = patch_model(tiny_model(CONFIG))
    collate = PackCollator(model=model, pixels="uint8")
    model(**collate([packed([encoded(SMALL_SPEC, 1, (2, 4), 2, 3)])]))
    (_, sizes) = roles_of(CONFIG)["patches"]
    E, C, t, p = dict(sizes).values()
    assert seen == [(impl, (E, C, t, p, p))]


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_the_head(impl, here, monkeypatch):
    """Which sums its losses where that pays."""
    here(table_of(roles=["head"]) if impl == "triton" else {})
    seen, real = [], head.supervised_linear_cross_entropy

    def score(*args, impl, **options):
        seen.append(impl)
        return real(*args, impl="auto", **options)

    monkeypatch.setattr(head, "pays", lambda *sizes: True)
    monkeypatch.setattr(head, "supervised_linear_cross_entropy", score)
    patch_model(tiny_model(CONFIG)).train()(**batch())
    assert seen == [impl]


def test_the_dtype_is_that_of_the_computation(calls, here):
    here(table_of(dtype=torch.bfloat16))
    model = patch_model(tiny_model(CONFIG))
    model(**batch())
    assert names(calls) == {"text auto", "tower auto"}
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch())
    # the table of embeddings stays float32
    assert names(calls) == {"text reference", "tower reference", "apply_mrope", "loss triton"}


def test_libraries_and_named_implementations_opt_out(calls, here):
    here(table_of())
    for impl, used in (("libraries", "auto"), ("sdpa", "sdpa")):
        patch_model(tiny_model(CONFIG), impl=impl)(**batch())
        assert names(calls) == {f"text {used}", f"tower {used}"}
        calls.clear()
    model = patch_model(tiny_model(CONFIG))
    patch_model(model, impl="libraries")(**batch())
    calls.clear()
    model(**batch())
    assert names(calls) == {"text auto", "tower auto"}
    with pytest.raises(ValueError, match="impl must be 'auto', 'libraries' or one of triton"):
        patch_model(model, impl="librarys")


def test_the_self_test_runs_again_with_other_ops(here, monkeypatch):
    tested = []
    monkeypatch.setattr(model_patch, "check_isolation", tested.append)
    here({})
    model = patch_model(tiny_model(CONFIG))
    model(**batch())
    assert len(tested) == 1
    cpu = torch.device("cpu")
    choice = choose(CONFIG, table_of())
    assert model_patch.use_choice(model, choice, cpu) and len(tested) == 2
    assert not model_patch.use_choice(model, dict(choice), cpu) and len(tested) == 2


@pytest.mark.slow
def test_a_compiled_model_with_a_choice_is_one_graph(here):
    here(
        table_of(roles=["attention", "vision_attention"])
        | table_of(roles=["rotary"], libraries=1.0)
    )
    model = patch_model(tiny_model(CONFIG))
    expected = model(**batch()).loss.item()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(**batch()).loss.item() == pytest.approx(expected, rel=1e-6)


def test_what_is_measured_for_a_model():
    texts = [str(shape) for shape in shape_classes(CONFIG, torch.float16)]
    assert len(texts) == len(set(texts)) == 9 == len([t for t in texts if "float" in t])
    assert [text for text in texts if "float32" in text] == ["embed_features float32 V=100 D=32"]
    assert set(table_of(dtype=torch.float16)) <= set(texts)


def test_ranks_that_share_packs_attend_with_a_part_of_the_heads():
    """All else is as without: rotary embedding comes before tokens are exchanged for heads."""
    alone = roles_of(CONFIG)
    for size, heads in ((2, {"H": 2, "Hk": 1}), (4, {"H": 1, "Hk": 1})):
        roles = roles_of(CONFIG, size)
        assert dict(roles["attention"][1]) == dict(alone["attention"][1]) | heads
        assert {**roles, "attention": None} == {**alone, "attention": None}
    choice = choose(CONFIG, table_of(), 2)
    assert choice == {
        role: one for role, one in choose(CONFIG, table_of()).items() if role != "attention"
    }


def test_a_dry_run_of_the_benchmarks_model_lists_it(capsys):
    assert tune_models.main(["--dry-run"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "varlen_attention bfloat16 H=12 Hk=2 K=128 causal=1 window=0"
    assert last == "apply_mrope bfloat16 H=12 Hk=2 K=128 S0=16 S1=24 S2=24 interleaved=0"


def test_one_line_says_how_to_measure(caplog):
    caplog.set_level("INFO")
    tell_choice({}, torch.device("cpu"))
    assert not caplog.messages
    tell_choice({}, torch.device("cuda"))
    tell_choice({}, torch.device("cuda"), ranks=2)
    tell_choice({"attention": {torch.bfloat16: "triton"}}, torch.device("cuda"))
    assert "on this GPU; `mmpack tune MODEL` does that" in caplog.messages[0]
    assert "on the GPU of every rank; `mmpack tune" in caplog.messages[1]
    assert caplog.messages[2:] == ["ops by `mmpack tune`: attention bfloat16 triton"]


def test_a_library_that_is_gone_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(
        op_choice, "why_not_installed", lambda name: "it is gone" if name == "flash3" else None
    )
    table = usable({"c": measured("sdpa", sdpa=3.0, flash3=1.0, triton=2.0)})
    assert table["c"].choice == "triton"
    assert caplog.messages == ["flash3 was measured here, but cannot be used: it is gone"]


# Ranks and checkpoints


def args(**options):
    return SimpleNamespace(device="cpu", should_log=True, world_size=1, **options)


def begin(model, state, capacity=8192):
    agree_on_ops(model, args(), state, capacity)
    return state.stateful_callbacks[KEY]


def a_rank(folder):
    """Rank 1's text attention by "triton" is wrong, and its embedding slow."""
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    table = table_of(
        roles=["attention"], sdpa=3.0, reference=2.0, **({} if rank else {"triton": 1.0})
    )
    table |= table_of(roles=["embedding"], libraries=2.0, triton=3.0 if rank else 1.0)
    table |= {} if rank else table_of(roles=["vision_attention"])
    rank_choice.table_here = lambda device: table
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    record = begin(patch_model(tiny_model(CONFIG)), state)
    assert record == {
        "impl": "auto", "attention float32": "reference", "embedding float32": "libraries",
    }  # fmt: skip
    dist.destroy_process_group()


def test_ranks_that_differ_use_the_same_ops(tmp_path):
    on_ranks(a_rank, tmp_path)


def test_a_ranks_heads_that_were_not_measured_are_told(here, caplog):
    """Attention by all heads was; a rank that shares packs has half of them."""
    here(table := table_of(roles=["attention", "rotary"]))
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    model = patch_model(tiny_model(CONFIG), context=ContextGroup(0, 2))
    assert begin(model, state) == {"impl": "auto", "rotary float32": "triton"}
    assert "attention float32" in begin(patch_model(model), state)
    for size in (1, 2):
        tell_choice(choose(CONFIG, table, size), torch.device("cuda"), 2, size)
    (told,) = caplog.messages
    assert "not measured for the heads of a rank of a context group; `mmpack tune MODEL" in told
    assert "--context-size 2` does that" in told


def test_a_resumed_run_keeps_its_ops(here, caplog):
    here(table_of(roles=["attention"]))
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    then = begin(patch_model(tiny_model(CONFIG)), state)
    assert then == {"impl": "auto", "attention float32": "reference"}
    # Measured again: another one is faster now, and the embedding's kernel, too.
    here(
        table_of(roles=["attention"], sdpa=1.0, reference=2.0)
        | table_of(roles=["embedding"], libraries=2.0, triton=1.0)
    )
    state.global_step = 2
    assert begin(patch_model(tiny_model(CONFIG)), state) == then
    assert not caplog.messages
    # What it used is wrong here.
    here(table_of(roles=["attention"], sdpa=1.0))
    assert begin(patch_model(tiny_model(CONFIG)), state)["attention float32"] == "sdpa"
    assert caplog.messages == [
        "the checkpoint was trained with other ops: attention float32 was reference and is sdpa; "
        "results agree up to rounding, not to the bit"
    ]
    caplog.clear()
    # A machine where nothing was measured, and another `impl`.
    state.stateful_callbacks[KEY] = then
    here({})
    begin(patch_model(tiny_model(CONFIG)), state)
    assert "attention float32 was reference and is a library's" in caplog.messages[0]
    caplog.clear()
    state.stateful_callbacks[KEY] = {"impl": "triton"}
    assert begin(patch_model(tiny_model(CONFIG)), state) == {"impl": "auto"}
    assert "other ops: impl was triton and is auto;" in caplog.messages[0]


def test_packs_of_another_size_than_measured(here, caplog):
    here(table_of(roles=["attention"]))
    for capacity, is_told in ((8000, False), (4096, False), (2048, True), (40_000, True)):
        state = SimpleNamespace(global_step=0, stateful_callbacks={})
        begin(patch_model(tiny_model(CONFIG)), state, capacity)
        said = [line for line in caplog.messages if f"--capacity {capacity}" in line]
        assert bool(said) == is_told, capacity


def test_an_unpatched_model_has_no_choice():
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    agree_on_ops(tiny_model(CONFIG), args(), state, 8192)
    assert state.stateful_callbacks == {}
    assert agreed([{}]) == {}
