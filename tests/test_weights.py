"""The theorem with weights: loss and gradients of packs equal the weighted sum over rows alone, for weights of
rows, turns and sources and every reduction; and which weights are refused."""

import dataclasses
import functools
import json
import sys

import numpy as np
import pytest
import torch
from builders import (
    QUIET,
    SMALL_SPEC,
    collator,
    encoded,
    small_config,
    small_spec,
    stock_of,
    tiny_model,
    with_noise,
    worst_difference,
)
from ranks import on_ranks
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from mmpack import PackedDataset, PackStream, reference
from mmpack.hf import PackCollator, PackingCallback, loss_denominator, patch_model
from mmpack.packing.loss_weights import loss_weights, with_weight
from mmpack.packing.split_documents import split_samples
from mmpack.packing.truncate import truncate_sample

linear_op = sys.modules["mmpack.ops.supervised_linear_cross_entropy"]
REDUCTIONS = ("token", "sample", "sqrt")
SPEC = small_spec()
EXACT = 1e-10


def weighted(sample, *weights):
    """A sample whose tokens have these weights, one after the other."""
    count = len(sample.input_ids)
    return dataclasses.replace(sample, weights=np.resize(np.float32(weights), count))


@functools.cache
def samples():
    """Text, images and a video; three of the samples have weights, and two sources have names."""
    plain = [
        encoded(SPEC, 1, 2, (2, 4), 3, 4),
        weighted(encoded(SPEC, range(5, 35)), 0.5, 2.0, 0.1),
        encoded(SPEC, 8, (4, 6), (6, 2), 9, 10),
        weighted(encoded(SPEC, 11, (2, 4, 4), 12, (2, 4), 13), 3.0),
        encoded(SPEC, range(40, 47)),
        weighted(encoded(SPEC, range(50, 63)), 0.25, 1.0),
    ]
    noisy = [with_noise([one], seed)[0] for seed, one in enumerate(plain)]
    return [
        dataclasses.replace(one, source=("a.json", "b.json")[n % 2], row=n)
        for n, one in enumerate(noisy)
    ]


def model_of():
    return tiny_model(small_config(), torch.float64)


@functools.cache
def alone(reduction, factor=1.0):
    """(loss, gradients) of the weighted sum over rows alone in the stock model, divided by the sum of the weights;
    `factor` is that of the source b.json."""
    model = model_of()
    rows, denominator = [], 0.0
    for sample in samples():
        own = with_weight(sample, factor) if sample.source == "b.json" else sample
        weights = torch.from_numpy(reference.loss_weights([own], reduction)).double()
        without = dataclasses.replace(sample, weights=None)
        rows.append((stock_of(collator()([without]), SPEC), weights))
        denominator += float(weights.sum())
    total = 0.0
    for inputs, weights in rows:
        labels = inputs.pop("labels")[0, 1:]
        logits = model(**inputs).logits[0, :-1][labels != -100]
        loss = reference.supervised_cross_entropy(
            logits, labels[labels != -100], denominator, weights
        )
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def summed(model, batches):
    """(loss, gradients) of an optimizer step in a loop of one's own."""
    denominator, total = loss_denominator(batches), 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=denominator).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal(loss, grads, expected, tolerance=EXACT):
    assert abs(loss - expected[0]) <= tolerance * expected[0]
    difference, name = worst_difference(grads, expected[1])
    assert difference <= tolerance, name


# ---------------------------------------------------------------------------------------- packs


@pytest.mark.parametrize(
    ("reduction", "assemble"), [*((one, "host") for one in REDUCTIONS), ("sqrt", "device")]
)
def test_packs_equal_their_rows_alone(reduction, assemble):
    if assemble == "device" and torch.cuda.is_available():
        pytest.skip("kernels run on the GPU here, not in the interpreter")
    model = patch_model(model_of())
    collate = PackCollator(model=model, loss_reduction=reduction, assemble=assemble)
    batches = [collate(samples()[:4]), collate(samples()[4:])]
    assert_equal(*summed(model, batches), alone(reduction))
    loss = model(**collate(samples())).loss  # a batch by itself: divided by its own weights
    assert loss.item() == pytest.approx(alone(reduction)[0], rel=EXACT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_logits_of_every_token_have_the_same_loss(reduction):
    model = patch_model(model_of())
    collate = PackCollator(model=model, loss_reduction=reduction, full_logits=True)
    assert_equal(*summed(model, [collate(samples())]), alone(reduction))


@pytest.mark.parametrize("without_logits", [False, True])
def test_a_batch_tells_the_losses_of_its_rows(without_logits, monkeypatch):
    if without_logits:
        monkeypatch.setattr(linear_op, "LEAST", 1)
        monkeypatch.setattr(linear_op, "COLUMNS", 4)
    model = patch_model(model_of())
    batch = PackCollator(model=model, loss_reduction="sqrt")(samples())
    told = []
    batch["mmpack"]["take_losses"] = told.append
    output = model(**batch)
    assert (output.logits is None) == without_logits
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert_equal(output.loss.item(), grads, alone("sqrt"))
    weights = batch["mmpack"]["loss_weight_bits"].view(torch.float32).double()
    (losses,) = told
    assert not losses.requires_grad
    mean = (losses * weights).sum() / weights.sum()
    assert mean.item() == pytest.approx(output.loss.item(), rel=EXACT)


def test_the_weights_are_the_references():
    for reduction in REDUCTIONS:
        expected = reference.loss_weights(samples(), reduction)
        assert np.array_equal(loss_weights(samples(), reduction), expected)
    plain = [dataclasses.replace(one, weights=None) for one in samples()]
    assert loss_weights(plain, "token") is None
    assert (reference.loss_weights(plain, "token") == 1).all()


@pytest.mark.parametrize(("reduction", "total"), [("sample", 1), ("sqrt", 29**0.5)])
def test_a_split_document_is_one_sample(reduction, total):
    document = encoded(SPEC, range(1, 31))
    pieces = list(split_samples([document], 12))
    assert len(pieces) == 3
    for one in (pieces, [document]):
        assert float(loss_weights(one, reduction).sum()) == pytest.approx(total, rel=1e-6)
    halves = split_samples([weighted(document, *range(1, 31))], 12)
    of_ids = {int(i): w for p in halves for i, w in zip(p.input_ids[1:], p.weights[1:])}
    assert of_ids == {n: n for n in range(2, 31)}


def test_a_cut_sample_counts_what_is_left():
    cut = truncate_sample(weighted(encoded(SPEC, range(1, 31)), *range(1, 31)), 11)
    assert np.allclose(loss_weights([cut], "sample"), np.arange(2, 12) / 10)


def test_the_log_of_a_batch_knows_its_sources():
    model = patch_model(model_of())
    pack = PackCollator(model=model, loss_reduction="sample")(samples())["mmpack"]
    assert pack["sources"] == ("a.json", "b.json")
    weights = pack["loss_weight_bits"].view(torch.float32).double()
    for number, total in enumerate(pack["source_sums"]):
        assert float(weights[pack["source_rows"] == number].sum()) == pytest.approx(total)
    assert sum(pack["loss_weight_sums"]) == pytest.approx(float(weights.sum()))


# ---------------------------------------------------------------------------------------- Trainer


class Keep(TrainerCallback):
    """The losses of an optimizer step's batches, and the gradients that the optimizer is about to see."""

    def __init__(self, model):
        self.losses = []
        model.register_forward_hook(lambda module, args, output: self.losses.append(output.loss))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads = {name: p.grad.clone() for name, p in model.named_parameters()}


def one_step(data, folder, reduction, attach=True, **options):
    """(loss, gradients, log) of one optimizer step of a stock Trainer."""
    model = patch_model(model_of())
    keep = Keep(model)
    arguments = {
        **QUIET,
        "output_dir": str(folder),
        "max_steps": 1,
        "max_grad_norm": 0.0,
        **options,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=data,
        data_collator=PackCollator(model=model, loss_reduction=reduction),
        callbacks=[keep],
    )
    if attach:
        PackingCallback(data).attach(trainer)
    trainer.train()
    return sum(one.item() for one in keep.losses), keep.grads, trainer.state.log_history[0]


def data_set():
    data = PackedDataset.from_samples(samples(), 30)
    assert len(data) == 4
    return data


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_stock_trainer_with_accumulation(reduction, tmp_path):
    loss, grads, log = one_step(data_set(), tmp_path, reduction, gradient_accumulation_steps=4)
    expected = alone(reduction)
    assert_equal(loss, grads, expected)
    assert log["loss"] == pytest.approx(expected[0], rel=1e-5)
    # the loss of each source, by the weights of its rows
    parts = {name: log[f"pack/loss/{name}"] for name in ("a.json", "b.json")}
    sums = dict.fromkeys(parts, 0.0)
    for one in samples():
        sums[one.source] += reference.loss_weights([one], reduction).sum(dtype=np.float64)
    mean = sum(parts[name] * sums[name] for name in parts) / sum(sums.values())
    assert mean == pytest.approx(expected[0], rel=1e-10)


def test_a_source_has_a_weight(tmp_path):
    data = data_set()
    data.source_weights = {"b.json": 0.2}
    loss, grads, _ = one_step(data, tmp_path, "sqrt", gradient_accumulation_steps=4)
    assert_equal(loss, grads, alone("sqrt", 0.2))
    assert abs(alone("sqrt", 0.2)[0] / alone("sqrt")[0] - 1) > 1e-3


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_stream(reduction, tmp_path):
    packs = len(list(PackStream(samples(), None, 30)))
    options = {
        "gradient_accumulation_steps": packs,
        "accelerator_config": {"dispatch_batches": False},
    }
    stream = PackStream(samples(), None, 30)
    stream.source_weights = {"b.json": 2.0}
    loss, grads, _ = one_step(stream, tmp_path, reduction, **options)
    assert_equal(loss, grads, alone(reduction, 2.0))


def test_a_stream_names_sources_that_it_never_had(tmp_path, caplog):
    stream = PackStream(samples(), None, 30)
    stream.source_weights = {"b.json": 2.0, "c.json": 2.0}
    one_step(
        stream,
        tmp_path,
        "token",
        gradient_accumulation_steps=4,
        accelerator_config={"dispatch_batches": False},
    )
    assert (
        "no sample of the source 'c.json', which has a weight (source_weights), was" in caplog.text
    )
    assert "source 'b.json'" not in caplog.text


def step_on_a_rank(folder):
    import os

    for reduction in REDUCTIONS:
        loss, grads, log = one_step(data_set(), folder, reduction, gradient_accumulation_steps=2)
        found = {"loss": loss, "grads": grads, "log": log}
        torch.save(found, f"{folder}/{reduction}{os.environ['RANK']}.pt")


def test_two_ranks(tmp_path):
    on_ranks(step_on_a_rank, tmp_path)
    for reduction in REDUCTIONS:
        ranks = [torch.load(tmp_path / f"{reduction}{n}.pt") for n in range(2)]
        loss = sum(rank["loss"] for rank in ranks)
        for rank in ranks:
            grads = {name.removeprefix("module."): g for name, g in rank["grads"].items()}
            assert_equal(loss, grads, alone(reduction))
        names = [{n for n in rank["log"] if n.startswith("pack/loss/")} for rank in ranks]
        assert names == [{"pack/loss/a.json", "pack/loss/b.json"}] * 2


@pytest.mark.parametrize(("reduction", "size"), [("sample", 1), ("token", 3)])
def test_an_evaluation_has_the_same_weights(reduction, size, tmp_path):
    model, data = patch_model(model_of()), data_set()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path), **{**QUIET, "per_device_eval_batch_size": size}),
        train_dataset=data,
        eval_dataset=data,
        data_collator=PackCollator(model=model, loss_reduction=reduction),
    )
    PackingCallback(data).attach(trainer)
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(alone(reduction)[0], rel=EXACT)


# ---------------------------------------------------------------------------------------- refused


def test_weights_that_nobody_counts_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"num_items_in_batch is not their sum; use PackingCallback"
    ):
        one_step(data_set(), tmp_path, "token", attach=False, gradient_accumulation_steps=4)
    model = patch_model(model_of())
    batch = PackCollator(model=model)(samples())
    with pytest.raises(ValueError, match="takes batches of PackCollator"):
        loss_denominator([{}])
    with pytest.raises(ValueError, match="loss_denominator"):
        model(**batch, num_items_in_batch=torch.tensor(3))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"compute_loss_func": lambda *given: None}, "compute_loss_func does not get them; leave"),
        ({"label_smoother": object()}, "label_smoothing_factor replaces the loss"),
        ({"model_accepts_loss_kwargs": False}, "the Trainer averages micro-batches; call patch"),
        ({"model": nn.Linear(1, 1)}, "the model's loss is not mmpack's; call patch_model"),
        ("ranks", "average_tokens_across_devices=False divides by each rank's own weights"),
        ("shared", "ranks share a batch"),
    ],
)
def test_a_trainer_that_would_not_apply_weights_is_refused(changes, reason, tmp_path, monkeypatch):
    model = patch_model(model_of())
    collate = PackCollator(model=model)
    trainer = Trainer(
        model=model, args=TrainingArguments(str(tmp_path), **QUIET), data_collator=collate
    )
    PackingCallback(data_set()).attach(trainer)
    batches = iter([collate(samples()), collate(samples())])
    assert trainer.get_batch_samples(batches, 1, torch.device("cpu"))[1].dtype == torch.float64
    trainer._get_num_items_in_batch._is_checked = False
    if changes == "ranks":
        monkeypatch.setattr(TrainingArguments, "world_size", 2)
        trainer.args.average_tokens_across_devices = False
    elif changes == "shared":
        monkeypatch.setattr(trainer, "get_tp_size", lambda: 2)
    else:
        vars(trainer).update(changes)
    with pytest.raises(ValueError, match=f"weights of the loss, which would not apply: {reason}"):
        trainer.get_batch_samples(batches, 1, torch.device("cpu"))


def test_an_unpatched_model_is_refused():
    with pytest.raises(ValueError, match="loss_reduction='sqrt' needs a patched model, but no"):
        PackCollator(loss_reduction="sqrt")
    with pytest.raises(ValueError, match="row 1 of b.json has a weight of the loss, which only a"):
        PackCollator()(samples())
    with pytest.raises(ValueError, match=r"\(loss_reduction\) must be 'token', 'sample' or 'sqrt'"):
        PackCollator(loss_reduction="mean")


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_of_samples_are_positive_numbers(bad):
    sample = dataclasses.replace(weighted(encoded(SMALL_SPEC, 1, 2, 3), 1.0, 1.0, bad), row=7)
    with pytest.raises(ValueError, match=f"row 7 of : a token's weight is {bad:g}; weights must"):
        loss_weights([sample], "token")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"b.json": 0}, r"\(source_weights\) of 'b.json' is 0, not a number from 0.000001"),
        ({"b.json": float("nan")}, "'b.json' is nan"),
        ({"b.json": "2"}, "'b.json' is '2'"),
        ({"a.json": 3, "b.json": 3}, r"gives every source of the data \(2\) one weight"),
        ({"c.json": 2}, "names 'c.json', but the data's sources are 'a.json', 'b.json'; use"),
    ],
)
def test_weights_of_sources_are_checked(weights, message):
    with pytest.raises(ValueError, match=message):
        data_set().source_weights = weights


def test_shards_are_one_source():
    shards = [
        dataclasses.replace(one, source=f"train-0000{n}-of-00006.parquet" if n else "other.json")
        for n, one in enumerate(samples())
    ]
    data = PackedDataset.from_samples(shards, 30)
    data.source_weights = {"train.parquet": 4}
    weights = [one.weights for item in data for one in item if one.source != "other.json"]
    assert {float(w) for one in weights for w in one} >= {4.0, 2.0, 12.0}
    assert json.dumps(data.fingerprint()["source weights"]) == '{"train.parquet": 4.0}'
