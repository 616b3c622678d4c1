"""The head of a packed batch in training: losses without logits where that pays, logits everywhere else."""

import copy
import datetime
import functools
import os
import sys

import pytest
import torch
import torch.distributed as dist
from builders import (
    FAMILIES,
    float64_loss,
    loss_and_grads,
    made_up_rows,
    small_config,
    tiny_model,
    worst_difference,
)
from ranks import on_ranks
from test_distributed import ddp, fsdp
from torch.distributed.tensor import DTensor

from mmpack.hf import PackCollator, head, patch_model, unpatch_model
from mmpack.hf.loss import PackedLoss

op = sys.modules["mmpack.ops.supervised_linear_cross_entropy"]


def small_chunks(monkeypatch):
    """A tiny vocabulary has 25 chunks, so heads are summed wherever rows are more than the hidden size."""
    monkeypatch.setattr(op, "LEAST", 1)
    monkeypatch.setattr(op, "COLUMNS", 4)


@pytest.fixture
def calls(monkeypatch):
    """The (rows, implementation) of each head that was summed."""
    small_chunks(monkeypatch)
    seen = []

    def count(rows, *args, impl, **kwargs):
        seen.append((len(rows), impl))
        return op.supervised_linear_cross_entropy(rows, *args, impl=impl, **kwargs)

    monkeypatch.setattr(head, "supervised_linear_cross_entropy", count)
    return seen


@pytest.fixture(scope="module")
def batch():
    return made_up_rows()[0]


def model_of(family="qwen2_vl", dtype=torch.float32, **options):
    return tiny_model(small_config(family, **options), dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES[:3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_theorem(family, tied, frozen, calls):
    """In float64 and over two equal micro-batches: the rows alone in stock transformers; kept logits closer."""
    batch, stock, num_items = made_up_rows(family)
    models = [model_of(family, torch.float64, tied=tied) for _ in range(2)]
    for model in models:
        model.lm_head.requires_grad_(not frozen)
    models[0].loss_function = float64_loss
    results = [(loss_and_grads(models[0], stock, num_items), 1e-10)]
    model = patch_model(models[1])
    ours = loss_and_grads(model, [batch, batch], 2 * num_items)
    assert calls == [(num_items, "auto")] * 2 and num_items > 32
    if family == "qwen2_vl":
        head.unbind_heads(model)
        results.append((loss_and_grads(model, [batch], num_items), 1e-13))
    assert len(calls) == 2
    for other, bound in results:
        assert ours[0] == pytest.approx(other[0], rel=bound)
        difference, parameter = worst_difference(ours[1], other[1])
        assert difference <= bound, parameter


@pytest.mark.parametrize(
    ("rows", "vocabulary", "hidden_size", "is_trained", "answer"),
    [
        (8192, 151_936, 3584, True, True),
        (3584, 151_936, 3584, True, False),  # the logits take no more than the head's gradient
        (3584, 151_936, 3584, False, True),
        (6, 151_936, 3584, False, False),  # a single chunk
        (7, 151_936, 3584, False, True),
        (0, 151_936, 3584, False, False),
    ],
)
def test_where_it_pays(rows, vocabulary, hidden_size, is_trained, answer):
    assert head.pays(rows, vocabulary, hidden_size, is_trained) == answer


def logits_of(model, batch, **kwargs):
    return model(**batch, **kwargs).logits


@pytest.mark.smoke
def test_an_output_without_logits_says_so(batch, calls):
    model = patch_model(model_of())
    output = model(**batch)
    assert output.logits is None and "logits" not in output
    loss, *others = model(**batch, return_dict=False)
    assert torch.equal(loss, output.loss) and not any(x is loss for x in others)
    assert len(output.to_tuple()) == 1 + len(others)
    assert len(calls) == 2


def test_logits_stay_where_they_are_asked_for(batch, calls):
    model = patch_model(model_of())
    L, T = (batch[name].shape[1] for name in ("shift_labels", "labels"))
    assert logits_of(model.eval(), batch).shape == (1, L, 100)
    model.train()
    with torch.no_grad():
        assert logits_of(model, batch).shape == (1, L, 100)
    everything = {k: v for k, v in batch.items() if k not in ("shift_labels", "logits_to_keep")}
    assert logits_of(model, everything).shape == (1, T, 100)
    ids = torch.tensor([[1, 2, 3]])
    assert model(input_ids=ids, labels=ids).logits.shape == (1, 3, 100)
    assert model.lm_head(torch.zeros(1, L, 32)).shape == (1, L, 100)
    assert not calls
    model(**batch)
    assert len(calls) == 1


def bias(linear):
    linear.bias = torch.nn.Parameter(torch.zeros(100))


def subclass(linear):
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(TensorSubclass))


class TensorSubclass(torch.Tensor):
    """Stands for a quantized weight."""


def lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"]))


NOT_BARE = {
    "a forward hook": lambda m: m.lm_head.register_forward_hook(lambda module, args, out: out),
    "a pre-hook": lambda m: m.lm_head.register_forward_pre_hook(lambda module, args: args),
    "a backward hook": lambda m: m.lm_head.register_full_backward_hook(lambda m, g, o: None),
    "a bias": lambda m: bias(m.lm_head),
    "a tensor subclass": lambda m: subclass(m.lm_head),
    "a ZeRO-3 shard": lambda m: setattr(m.lm_head.weight, "ds_id", 7),
    "a replaced forward": lambda m: setattr(m.lm_head, "forward", m.lm_head.forward),
    "a loss of the user's": lambda m: setattr(m, "loss_function", PackedLoss(None).__call__),
    "LoRA": lora,
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", NOT_BARE)
def test_a_head_that_is_more_than_a_product_keeps_its_logits(kind, order, batch, calls):
    model = model_of()
    if order == "after":
        patch_model(model)
    changed = NOT_BARE[kind](model)
    model = changed if isinstance(changed, torch.nn.Module) else model
    patch_model(model)
    if kind == "a replaced forward" and order == "after":
        model.lm_head.forward = lambda rows: torch.nn.Linear.forward(model.lm_head, rows)
    output = model(**batch, num_items_in_batch=3)
    assert output.logits.shape == (1, batch["shift_labels"].numel(), 100)
    assert not calls
    output.loss.backward()
    unpatch_model(model)
    assert "_mmpack_head" not in vars(model.get_output_embeddings())


def test_lora_elsewhere_trains_over_a_frozen_head(batch, calls):
    peft = pytest.importorskip("peft")
    results = []
    for bound in (True, False):
        model = patch_model(model_of())
        if not bound:
            head.unbind_heads(model)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
        results.append(loss_and_grads(model, [batch], 7))
    assert len(calls) == 1
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert worst_difference(results[0][1], results[1][1])[0] <= 1e-5


def test_weights_of_the_rows_are_heard(batch, calls):
    torch.manual_seed(2)
    weights = torch.rand(batch["shift_labels"].numel())
    weights[::5] = 0
    weighted = {
        **batch,
        "mmpack": {
            **batch["mmpack"],
            "loss_weight_bits": weights.view(torch.int32),
            "is_counted": True,
        },
    }
    model = patch_model(model_of())
    for num_items in (None, torch.tensor(0.7)):
        summed = model(**weighted, num_items_in_batch=num_items).loss
        kept = model.eval()(**weighted, num_items_in_batch=num_items).loss
        model.train()
        assert summed.item() == pytest.approx(kept.item(), rel=1e-6)
        assert summed.item() != pytest.approx(model(**batch, num_items_in_batch=num_items).loss.item(), rel=1e-3)  # fmt: skip
    assert len(calls) == 4


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_implementations_reach_both_paths(impl, calls, wide_tiles, monkeypatch):
    from builders import SMALL_SPEC, encoded, packed

    from mmpack.hf import loss

    batch = PackCollator()([packed([encoded(SMALL_SPEC, 5, 6, 7), encoded(SMALL_SPEC, 10, 11)])])

    kept = []
    real = loss.supervised_cross_entropy
    monkeypatch.setattr(
        loss, "supervised_cross_entropy", lambda *a, impl, **k: kept.append(impl) or real(*a, impl=impl, **k)
    )  # fmt: skip
    monkeypatch.setattr(op, "COLUMNS", 64)  # two chunks: an interpreted program takes a millisecond
    model = patch_model(model_of(), impl=impl)
    model.lm_head.requires_grad_(False)  # with few rows, it pays only there
    summed = model(**batch).loss
    unsummed = model.eval()(**batch).loss
    assert [i for _, i in calls] == kept == [impl]
    assert summed.item() == pytest.approx(unsummed.item(), rel=1e-5)


@pytest.mark.smoke
def test_copies_and_unpatching(batch, calls):
    model = patch_model(model_of())
    other = copy.deepcopy(model)
    assert torch.equal(model(**batch).loss, other(**batch).loss)
    assert len(calls) == 2
    other(**batch).loss.backward()
    assert model.lm_head.weight.grad is None and other.lm_head.weight.grad is not None
    unpatch_model(other)
    assert not {"forward", "_mmpack_head"} & vars(other.lm_head).keys()
    assert not other._forward_hooks and not other._forward_pre_hooks
    assert logits_of(other, {"input_ids": torch.tensor([[1, 2]])}).shape == (1, 2, 100)
    assert len(calls) == 3
    assert model(**batch).logits is None


def test_a_failed_forward_leaves_no_targets_behind(batch, calls):
    model = patch_model(model_of())
    failing = model.model.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    failing.remove()
    ids = torch.arange(batch["shift_labels"].numel())[None] % 90 + 1
    assert logits_of(model, {"input_ids": ids}).shape == (1, ids.numel(), 100)
    assert not calls


def test_no_question_to_the_device(batch, calls):
    """On the meta device a question to the data is an error."""
    from test_matrix import on_meta

    model = patch_model(model_of()).to("meta")
    loss = model(**on_meta(batch), num_items_in_batch=torch.tensor(3)).loss
    loss.backward()
    assert len(calls) == 1 and loss.is_meta
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


def test_autocast(batch, calls):
    grads = []
    for bound in (True, False):
        model = patch_model(model_of())
        if not bound:
            head.unbind_heads(model)
        with torch.autocast("cpu", torch.bfloat16):
            grads.append(loss_and_grads(model, [batch], 7))
    assert len(calls) == 1
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-4)
    assert (grads[0][1]["lm_head.weight"] - grads[1][1]["lm_head.weight"]).norm() <= 0.02 * grads[1][1]["lm_head.weight"].norm()  # fmt: skip


@pytest.mark.slow
def test_compiled_it_is_one_graph(batch, calls):
    model = patch_model(model_of())
    loss, grads = loss_and_grads(model, [batch], 7)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    output = compiled(**batch, num_items_in_batch=torch.tensor(7))
    assert output.logits is None
    output.loss.backward()
    assert output.loss.item() == pytest.approx(loss, rel=1e-6)
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert worst_difference(ours, grads)[0] <= 1e-5


# Two ranks


def fsdp_head_alone(model):
    return fsdp(model, [model.lm_head])


def fsdp_head_alone_first(model):
    return fsdp(model, [model.lm_head], order="patch last")


WRAPPED = {
    "ddp": ddp,
    "fsdp2": fsdp,
    "fsdp2, the head a group of its own": fsdp_head_alone,
    "fsdp2, the head a group of its own, then patched": fsdp_head_alone_first,
}
TIED = [("ddp", False), ("ddp", True), ("fsdp2", False), ("fsdp2", True)]
CASES = [*TIED, *((name, False) for name in list(WRAPPED)[2:])]


@functools.cache
def two_batches():
    return [made_up_rows()[0], PackCollator()([made_up_pack()])]


@functools.cache
def alone(tied, frozen, items):
    """What one process computes for both batches, with kept logits."""
    model = patch_model(model_of(tied=tied))
    model.lm_head.requires_grad_(not frozen)
    head.unbind_heads(model)
    return loss_and_grads(model, two_batches(), items)


def rank_step(name, tied, frozen):
    """Compare this rank's step on one batch, beside the other's, with one process's."""
    rank, batches = int(os.environ["RANK"]), two_batches()
    items = sum(batch["shift_labels"].numel() for batch in batches)
    expected_loss, expected = alone(tied, frozen, items)
    model = model_of(tied=tied)
    model.lm_head.requires_grad_(not frozen)
    seen = []
    real = op.supervised_linear_cross_entropy
    head.supervised_linear_cross_entropy = lambda *a, **k: seen.append(1) or real(*a, **k)
    wrapped = WRAPPED[name](model)
    loss = wrapped(**batches[rank], num_items_in_batch=torch.tensor(items)).loss
    (2 * loss).backward()
    head.supervised_linear_cross_entropy = real
    assert len(seen) == (rank == 0 or frozen), (name, tied, frozen, seen)
    total = loss.detach().clone()
    dist.all_reduce(total)
    assert total.item() == pytest.approx(expected_loss, rel=1e-5)
    grads = {}
    for key, p in model.named_parameters():
        grad = torch.zeros(p.shape) if p.grad is None else p.grad
        grads[key] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    difference, parameter = worst_difference(grads, expected)
    assert difference <= 1e-5, (name, tied, frozen, parameter)


def made_up_pack():
    """A few rows: their logits pay only over a frozen head."""
    from builders import SMALL_SPEC, encoded, packed

    return packed([encoded(SMALL_SPEC, 5, 6, 7), encoded(SMALL_SPEC, 10, (2, 4), 11)])


def work():
    torch.set_num_threads(1)
    op.LEAST, op.COLUMNS = 1, 4
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    for name, tied in CASES:
        for frozen in (False, True):
            rank_step(name, tied, frozen)
    dist.destroy_process_group()


def test_two_ranks():
    """DDP and FSDP2, one rank summing its trained head's losses and the other keeping its few logits."""
    on_ranks(work)
