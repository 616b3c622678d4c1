"""What PackingCallback logs: counted by hand, over ranks, and without a trace in the training."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import QUIET, SMALL_SPEC, encoded, tiny_config, tiny_model, with_noise
from ranks import on_ranks
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from mmpack import PackedDataset, assemble
from mmpack.hf import (
    PackCollator,
    PackingCallback,
    attention_share,
    patch_model,
    throughput,
)
from mmpack.packing.cost import sample_flops
from mmpack.types import IGNORE

TESTS = Path(__file__).resolve().parent
CAPACITY = 48
CONFIG = tiny_config(100, vision=SMALL_SPEC)


def dataset_of(count=12):
    """Text and images, before and after the supervised text; 12 samples make 5 packs of 48."""
    rng = np.random.default_rng(0)
    samples = []
    for n in range(count):
        text = rng.integers(1, 80, 20)
        images = [(2 * rng.integers(1, 4), 4) for _ in range(n % 3)]
        samples.append(encoded(SMALL_SPEC, text[:2], *images, text[2 : 4 + 5 * n % 13], (2, 2)))
        samples[-1].labels[:3] = IGNORE
    return PackedDataset.from_samples(list(with_noise(samples)), CAPACITY)


class Recorder(PackCollator):
    """Keeps the batches; they are trained on in this order."""

    def __init__(self, **options):
        super().__init__(**options)
        self.batches = []

    def __call__(self, packs):
        self.batches.append(packs)
        return super().__call__(packs)


class Reporter(TrainerCallback):
    """What a reporter writes at the moment it is called."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


def trained(model, folder, attached=(), collate=None, dataset=None, callbacks=(), **options):
    arguments = {**QUIET, "output_dir": str(folder), "num_train_epochs": 1}
    arguments |= {"per_device_eval_batch_size": 8, **options}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=dataset,
        eval_dataset=dataset if "eval_strategy" in options else None,
        data_collator=collate or PackCollator(),
        callbacks=list(callbacks),
    )
    for callback in attached:
        callback.attach(trainer)
    trainer.train()
    return trainer


def logged(trainer):
    return [
        {name: value for name, value in entry.items() if name.startswith("pack/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def sizes(items):
    """Of useful segments: tokens, supervised tokens, patches; and FLOPs of useful ones, of all."""
    tokens = supervised = patches = useful = flops = 0
    for pack in map(assemble, items):
        placed = 0
        for begin, end in zip(pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist()):
            features = int((pack.feature_index[begin:end] >= 0).sum())
            grids = []
            while sum(np.prod(grid) // 4 for grid in grids) < features:
                grids.append(pack.grid_thw[placed].tolist())
                placed += 1
            labels = int((pack.labels[begin:end] != IGNORE).sum())
            cost = int(sample_flops(CONFIG, [end - begin], [labels], grids, [0, len(grids)])[0])
            flops += cost
            if labels:
                tokens += end - begin
                supervised += labels
                patches += 4 * features
                useful += cost
    return tokens, supervised, patches, useful, flops


def test_logged_values_are_those_counted_by_hand(tmp_path, monkeypatch):
    """Batches of 2 packs, accumulated by 2, logged every 2 steps; a step takes 4 s, and an evaluation,
    which is not counted, 100 s a batch. One pack is empty, and rows are filled up to 64 tokens."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.now += 4

        def on_prediction_step(self, *args, **kwargs):
            clock.now += 100

    before, after, dataset, collate = Reporter(), Reporter(), dataset_of(), Recorder(pad_to=64)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_train_epochs": 2,
    }
    model = patch_model(tiny_model(CONFIG))
    hooks = len(model._forward_pre_hooks)
    monkeypatch.setattr(throughput, "peak_tflops", lambda device: 1e-6)
    evaluated = SimpleNamespace(batches=[])

    class NoEvaluation(TrainerCallback):
        """Takes what evaluation has collated out of what training has."""

        def on_step_end(self, *args, **kwargs):
            evaluated.start = len(collate.batches)

        def on_evaluate(self, *args, **kwargs):
            evaluated.batches += collate.batches[evaluated.start :]
            del collate.batches[evaluated.start :]

    options["callbacks"] = [before, Clock(), after, NoEvaluation()]
    trainer = trained(model, tmp_path, [PackingCallback(dataset)], collate, dataset, **options)
    assert len(dataset) == 5
    assert len(trainer.train_dataset) == 6
    assert len(evaluated.batches) == 2  # of up to 8 packs, once a log
    assert len(collate.batches) == 2 * 3
    values = logged(trainer)
    assert len(values) == 2
    # An epoch's 3 batches are a step of 2 and one of 1.
    for epoch, entry in enumerate(values):
        packs = [pack for batch in collate.batches[3 * epoch : 3 * epoch + 3] for pack in batch]
        tokens, supervised, patches, useful, flops = sizes(packs)
        assert useful < flops
        expected = {
            "pack/utilization": tokens / (6 * CAPACITY),
            "pack/tokens_per_second": tokens / 8,
            "pack/supervised_tokens_per_second": supervised / 8,
            "pack/patches_per_second": patches / 8,
            "pack/flops_max_over_mean": 1.0,
            "pack/tflops": useful / 8 / 1e12,
            "pack/mfu": useful / 8 / 1e6,
        }
        assert entry == pytest.approx(expected, rel=1e-12)
    # Reporters see the same, wherever they stand; evaluation's and the summary's logs stay as they are.
    for reporter in (before, after):
        seen = [logs for _, logs in reporter.seen if "loss" in logs]
        assert [{k: v for k, v in logs.items() if "pack/" in k} for logs in seen] == values
        others = [logs for _, logs in reporter.seen if "loss" not in logs]
        assert len(others) == 3
        assert not any("pack/" in name for logs in others for name in logs)
    assert len(model._forward_pre_hooks) == hooks + 1  # of evaluation


def test_a_callback_that_is_not_attached_says_what_it_lacks(tmp_path, caplog):
    before, after, dataset = Reporter(), Reporter(), dataset_of()
    callbacks = [before, PackingCallback(dataset), after]
    model = patch_model(tiny_model(CONFIG))
    trainer = trained(model, tmp_path, (), None, dataset, callbacks, per_device_train_batch_size=2)
    assert sum("get no pack/ values" in message for message in caplog.messages) == 1
    values = logged(trainer)
    assert len(values) == 3 and all("pack/tflops" in entry for entry in values)
    assert not any("pack/" in name for _, logs in before.seen for name in logs)
    assert [logs for _, logs in after.seen if "loss" in logs][0].items() >= values[0].items()
    assert len(dataset) == 6  # with the empty pack
    with pytest.raises(ValueError, match="already has a PackingCallback; attach one"):
        PackingCallback(dataset).attach(trainer)


def test_training_is_the_same_to_the_bit(tmp_path):
    def run(**options):
        torch.manual_seed(0)
        model, dataset = patch_model(tiny_model(CONFIG)), dataset_of()
        added = [PackingCallback(dataset, **options)] if options else []
        options = {"learning_rate": 1e-2, "neftune_noise_alpha": 5.0, "max_steps": 3}
        options["train_sampling_strategy"] = (
            "sequential"  # the packs' order, which the callback keeps
        )
        trainer = trained(model, tmp_path, added, None, dataset, **options)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, model.state_dict(), torch.get_rng_state(), logged(trainer)

    losses, weights, rng, values = run()
    losses_with, weights_with, rng_with, values_with = run(attention_every=1)
    assert len(losses) == 3
    assert losses == losses_with
    assert torch.equal(rng, rng_with)
    assert all(torch.equal(weights[name], weight) for name, weight in weights_with.items())
    assert not any(values)
    assert all("pack/image_attention/layer_1" in entry for entry in values_with)


def dense_share(model, items, layers):
    """Mean mass of all supervised rows after an image, from whole attention matrices of the segments
    alone: {layer: share}."""
    masses = {layer: [] for layer in layers}
    for item in items:
        pack, batch = assemble(item), PackCollator()([item])
        for sample in np.split(np.arange(len(pack.input_ids)), pack.cu_seqlens[1:-1]):
            ids = torch.from_numpy(pack.input_ids[sample])
            features = pack.feature_index[sample]
            features = features[features >= 0]
            ends = (pack.grid_thw.prod(axis=1) // 4).cumsum()
            images = np.unique(np.searchsorted(ends, features, side="right"))
            patches = np.concatenate([[0], pack.grid_thw.prod(axis=1).cumsum()])
            pixels = [batch["pixel_values"][patches[n] : patches[n + 1]] for n in images]
            with torch.no_grad():
                attentions = model(
                    input_ids=ids[None],
                    pixel_values=torch.cat(pixels).double() if pixels else None,
                    image_grid_thw=torch.from_numpy(pack.grid_thw[images]) if pixels else None,
                    position_ids=torch.from_numpy(pack.position_ids[1:, sample])[:, None],
                    output_attentions=True,
                ).attentions
            is_image = ids == SMALL_SPEC.image_token_id
            labels = pack.labels[sample]
            for row in np.flatnonzero(labels[1:] != IGNORE):
                if is_image[: row + 1].any():
                    for layer in layers:
                        weights = attentions[layer][0, :, row]
                        masses[layer].append(weights[:, is_image].sum(-1).mean().item())
    return {layer: np.mean(mass) for layer, mass in masses.items()}


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["", "checkpoint"])
def test_attention_share_is_that_of_dense_attention(options, tmp_path):
    """Micro-batches of the second step of two; all supervised rows are sampled, as they are few."""
    dataset, collate = dataset_of(), Recorder()
    model = patch_model(tiny_model(CONFIG).double())
    callback = PackingCallback(dataset, attention_every=2, attention_layers=[1, 0])
    options = {"gradient_accumulation_steps": 2, "learning_rate": 0.0, "max_steps": 2, **options}
    first, second = logged(trained(model, tmp_path, [callback], collate, dataset, **options))
    packs = [batch[0] for batch in collate.batches[2:4]]
    assert max(len(assemble(p).supervised_index) for p in packs) <= attention_share.ROWS
    expected = dense_share(tiny_model(CONFIG, attn="eager").double(), packs, [0, 1])
    assert not any("attention" in name for name in first)
    for layer, share in expected.items():
        assert 0.05 < share < 0.95
        # transformers' eager softmax is in float32
        assert second[f"pack/image_attention/layer_{layer}"] == pytest.approx(share, rel=1e-6)


def test_attention_share_of_sampled_rows(monkeypatch):
    """3 of the supervised rows, evenly spaced, heads that share keys; float32."""
    monkeypatch.setattr(attention_share, "ROWS", 3)
    counts = []
    for item in dataset_of():
        pack, batch = assemble(item), PackCollator()([item])["mmpack"]
        torch.manual_seed(0)
        q, k = torch.randn(4, len(pack.input_ids), 8), torch.randn(2, len(pack.input_ids), 8)
        num = len(pack.supervised_index)
        total, count = 0.0, 0
        for n in range(3):
            row = pack.supervised_index[(n * num + num // 2) // 3]
            keys = np.arange(pack.cu_seqlens[pack.segment_ids[row]], row + 1)
            is_image = torch.from_numpy(pack.feature_index[keys] >= 0)
            if is_image.any():
                scores = torch.stack([0.3 * k[h // 2, keys] @ q[h, row] for h in range(4)])
                total += float(scores.softmax(-1)[:, is_image].sum(-1).mean())
                count += 1
        with torch.autocast("cpu", torch.bfloat16):
            mass, rows = attention_share.image_share(q, k, 0.3, batch).tolist()
        assert rows == count
        assert mass == pytest.approx(total, rel=1e-5)
        counts.append(count)
    assert 0 < sum(counts) < 15
    # On the meta device a question to the data would be an error.
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    assert attention_share.image_share(q.to("meta"), k.to("meta"), 0.3, meta).is_meta
    batch["supervised_index"] = batch["supervised_index"][:0]
    assert attention_share.image_share(q, k, 0.3, batch).tolist() == [0, 0]


def test_frozen_parts_and_adapters_cost_less():
    text = ([20, 9], [7, 3], np.empty((0, 3)), [0, 0, 0])
    mixed = ([20, 9], [7, 3], [[1, 4, 4], [1, 2, 2]], [0, 1, 2])
    arrays = [np.asarray(value, dtype=np.int64) for value in mixed]
    model = tiny_model(CONFIG)

    def costs():
        return throughput.TrainedCosts(model, model.model).of(*arrays).tolist()

    assert costs() == sample_flops(CONFIG, *mixed).tolist()
    model.model.visual.requires_grad_(False)
    frozen = ["vision", "merger"]
    assert costs() == sample_flops(CONFIG, *mixed, frozen=frozen).tolist()
    peft = pytest.importorskip("peft")
    model = tiny_model(CONFIG)
    inner = model.model
    lora = peft.LoraConfig(r=1, target_modules=r".*language_model.*\.(q|v)_proj")
    wrapped = peft.get_peft_model(model, lora)
    # forward and gradients of inputs, of the text; forward alone in the tower
    passed = sample_flops(CONFIG, *text, frozen=["vision", "language"])
    tower = sample_flops(
        CONFIG, [0, 0], [0, 0], *mixed[2:], frozen=["vision", "merger", "language"]
    )
    assert throughput.TrainedCosts(wrapped, inner).of(*arrays).tolist() == (passed + tower).tolist()


def test_peaks(monkeypatch):
    names = {
        "NVIDIA H200": 989,
        "NVIDIA H200 NVL": 835,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA GH200 480GB": 989,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA A100 80GB PCIe": 312,
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
        "NVIDIA A10": None,
        "NVIDIA GeForce GTX 1080": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert throughput.peak_tflops(torch.device("cuda", 0)) == peak, name
    assert throughput.peak_tflops(torch.device("cpu")) is None


def test_refusals(tmp_path):
    dataset = dataset_of()
    with pytest.raises(ValueError, match="attention_every must be positive, got 0"):
        PackingCallback(dataset, attention_every=0)
    watching = PackingCallback(dataset, attention_every=1)
    with pytest.raises(ValueError, match=r"needs a patched model.*patch_model\(model\) before"):
        trained(tiny_model(CONFIG), tmp_path, [watching], None, dataset)
    model = patch_model(tiny_model(CONFIG))
    watching = PackingCallback(dataset, attention_every=1, attention_layers=[1, 2])
    with pytest.raises(ValueError, match=r"must be from 0 to 1, got \[1, 2\]"):
        trained(model, tmp_path, [watching], None, dataset)


def test_an_unpatched_model_is_counted_too(tmp_path):
    dataset = dataset_of()
    values = logged(
        trained(tiny_model(CONFIG), tmp_path, [PackingCallback(dataset)], None, dataset)
    )
    assert len(values) == 5
    mean = np.mean([entry["pack/utilization"] for entry in values])
    assert mean == pytest.approx(dataset.plan.utilization)


@pytest.mark.slow
def test_a_compiled_model_stays_one_graph():
    dataset = dataset_of()
    model = patch_model(tiny_model(CONFIG))
    collate = PackCollator(model=model, loss_reduction="sample")
    batches = [collate([dataset[n]]) for n in range(2)]
    expected = [model(**batch).loss.item() for batch in batches]
    args = SimpleNamespace(device=torch.device("cpu"), process_index=0, should_log=False)
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    control = TrainerControl()
    callback, step = PackingCallback(dataset), (args, state, control)
    callback.on_train_begin(*step, model=model)
    callback.on_step_begin(*step)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for batch, loss, after in zip(
        batches, expected, (callback.on_substep_end, callback.on_step_end)
    ):
        assert compiled(**batch).loss.item() == pytest.approx(loss, rel=1e-6)
        assert [float(x) for x in callback._divergence._losses] == [pytest.approx(loss, rel=1e-6)]
        after(*step)
    counter = callback._batches.counter
    (told,) = counter.losses.pop().values()  # of one source: the whole loss, from inside the graph
    weights = [sum(batch["mmpack"]["loss_weight_sums"]) for batch in batches]
    assert told[0] == pytest.approx(np.dot(weights, expected), rel=1e-6)
    assert told[1] == pytest.approx(sum(weights))
    seen = counter._seen
    packs = [dataset[0], dataset[1]]
    counted = (seen.tokens, seen.supervised, seen.patches, seen.useful_flops, seen.flops[-1])
    assert counted == sizes(packs)


def train_a_rank(folder):
    """Runs as a process of a group; leaves what it trained on and what was logged in `folder`."""
    import os

    torch.manual_seed(0)
    dataset, collate = dataset_of(), Recorder()
    model = patch_model(tiny_model(CONFIG))
    callback = PackingCallback(dataset, attention_every=1, attention_layers=[0])
    options = {"logging_steps": 3, "learning_rate": 0.0}
    trainer = trained(model, folder, [callback], collate, dataset, **options)
    numbers = [[sizes(batch) for batch in collate.batches], logged(trainer)]
    shares = dense_share(
        tiny_model(CONFIG, attn="eager").double(), [pack for (pack,) in collate.batches], [0]
    )
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps([*numbers, shares[0]]))


def test_balance_is_of_steps_not_of_their_sum(monkeypatch):
    """Two ranks that take turns at the heavy pack wait as long as if it were always the same one."""
    counter = throughput.PackCounter(costs=object())
    seen = [
        throughput.Seen(1, 40, 10, 8, 7 * 10**12, flops=flops, start=0.0)
        for flops in ([6, 2], [2, 6])
    ]

    def gathered(mine):
        assert mine[0] is seen[0]
        return [(rank, None, {}) for rank in seen]

    monkeypatch.setattr(throughput, "gathered", gathered)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: 2.0))
    counter._seen = seen[0]
    assert counter.pop(CAPACITY, {}, torch.device("cpu")) == {
        "pack/utilization": 80 / (2 * CAPACITY),
        "pack/tokens_per_second": 40.0,
        "pack/supervised_tokens_per_second": 10.0,
        "pack/patches_per_second": 8.0,
        "pack/flops_max_over_mean": 1.5,
        "pack/tflops": 3.5,
    }


@pytest.mark.slow
def test_two_ranks(tmp_path):
    on_ranks(train_a_rank, tmp_path)
    ranks = [json.loads((tmp_path / f"rank{n}.json").read_text()) for n in range(2)]
    steps = np.array([sizes for sizes, _, _ in ranks])  # (ranks, steps, 5)
    assert steps.shape == (2, 3, 5)
    flops = steps[..., 4]
    for _, ((entry,)), share in ranks:
        assert entry["pack/utilization"] == pytest.approx(steps[..., 0].sum() / (6 * CAPACITY))
        balance = flops.max(0).sum() / flops.mean(0).sum()
        assert entry["pack/flops_max_over_mean"] == pytest.approx(balance) != 1
        shares = sorted(share for _, _, share in ranks)
        assert shares[0] <= entry["pack/image_attention/layer_0"] <= shares[1]
        per_token = entry["pack/patches_per_second"] / entry["pack/tokens_per_second"]
        assert per_token == pytest.approx(steps[..., 2].sum() / steps[..., 0].sum())
