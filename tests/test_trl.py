"""PackedSFTTrainer: TRL's SFTTrainer on packs trains like a stock Trainer on them, logs what it says, and refuses
options that would do nothing."""

import dataclasses
import functools
import inspect
import json
import shutil

import numpy as np
import pytest
import torch
from builders import QUIET, encoded, small_config, small_spec, tiny_model, with_noise
from ranks import on_ranks
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from mmpack import ContextGroup, Encoder, PackedDataset, PackStream
from mmpack.cli.main import main
from mmpack.hf import PackCollator, PackingCallback, last_checkpoint, patch_model

trl = pytest.importorskip("trl")
packed = pytest.importorskip("mmpack.integrations.trl", exc_type=ImportError)

CAPACITY = 64
NOTHING = {"bf16": False, "gradient_checkpointing": False, "max_length": None}


@functools.cache
def samples(count=10, family="qwen2_vl"):
    """Text and images, of very different shares of supervised tokens, from two files."""
    made = []
    for n in range(count):
        images = [(2, 4)] * (n % 3 == 0)
        sample = encoded(small_spec(family), 1, n + 3, *images, range(20, 24 + 5 * n % 13))
        sample.labels[: 1 + n % 5] = -100
        made.append(dataclasses.replace(sample, source=("a.json", "b.json")[n % 2], row=n))
    return tuple(with_noise([one], n)[0] for n, one in enumerate(made))


def packs(capacity=CAPACITY, count=10, family="qwen2_vl"):
    return PackedDataset.from_samples(list(samples(count, family)), capacity)


@functools.cache
def tokenizer():
    vocabulary = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="a")


def model_of(family="qwen2_vl"):
    return tiny_model(small_config(family))


def sft(folder, train, evaluated=None, model=None, more=None, **options):
    """A PackedSFTTrainer; `more` are its arguments, options its SFTConfig's."""
    config = {**QUIET, **NOTHING, "max_steps": 2, "learning_rate": 1e-2, **options}
    return packed.PackedSFTTrainer(
        model or model_of(),
        trl.SFTConfig(str(folder), **config),
        train_dataset=train,
        eval_dataset=evaluated,
        processing_class=tokenizer(),
        **(more or {}),
    )


def stock(folder, train, evaluated=None, model=None, collate=None, **options):
    """A stock Trainer on the same packs."""
    options = {**QUIET, "max_steps": 2, "learning_rate": 1e-2, **options}
    model = model or patch_model(model_of())
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **options),
        train_dataset=train,
        eval_dataset=evaluated,
        data_collator=collate or PackCollator(model=model),
    )
    PackingCallback(train).attach(trainer)
    return trainer


def logged(trainer, *names):
    names = names or ("loss", "grad_norm")
    return [[entry[n] for n in names] for entry in trainer.state.log_history if names[0] in entry]


def assert_same(ours, theirs, rel=2e-5):
    assert len(ours) == len(theirs) > 0
    np.testing.assert_allclose(ours, theirs, rtol=rel)


TOGETHER = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
TOGETHER |= {"gradient_checkpointing": True, "pad_to_multiple_of": 48}
CASES = {"packs": {}, "accumulation, checkpointing, filler": TOGETHER}


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_a_stock_trainers(tmp_path, case):
    ours = sft(tmp_path / "ours", packs(), **CASES[case])
    assert ours.data_collator.pad_to == CASES[case].get("pad_to_multiple_of")
    ours.train()
    options = {name: x for name, x in CASES[case].items() if name != "pad_to_multiple_of"}
    theirs = stock(tmp_path / "theirs", packs(), **options)
    theirs.train()
    assert_same(logged(ours), logged(theirs))


def test_weights_and_sources(tmp_path):
    """Weights of sources and of samples apply, and each source's loss is logged."""
    found = []
    for kind, make in (("ours", sft), ("theirs", stock)):
        train, model = packs(), patch_model(model_of())
        train.source_weights = {"b.json": 3.0}
        collate = PackCollator(model=model, loss_reduction="sample")
        more = {"collate": collate} if make is stock else {"more": {"data_collator": collate}}
        trainer = make(tmp_path / kind, train, model=model, **more)
        trainer.train()
        found.append(logged(trainer, "loss", "grad_norm", "pack/loss/a.json", "pack/loss/b.json"))
    assert_same(*found)


def test_an_open_folder_and_a_name(tmp_path):
    """The packs and the model as folders; Trainer's `max_steps` from the packs."""
    packs().save(tmp_path / "packed")
    model_of().save_pretrained(tmp_path / "model")
    options = {"max_steps": -1, "num_train_epochs": 1}
    ours = packed.PackedSFTTrainer(
        str(tmp_path / "model"),
        trl.SFTConfig(str(tmp_path / "ours"), **{**QUIET, **NOTHING, **options}),
        train_dataset=tmp_path / "packed",
        processing_class=tokenizer(),
    )
    ours.train()
    theirs = stock(tmp_path / "theirs", packs(), learning_rate=2e-5, **options)
    theirs.train()
    assert len(packs()) == theirs.state.global_step
    assert_same(logged(ours), logged(theirs))


def test_streams(tmp_path):
    """To train on and to evaluate; batches are not split."""
    streams = [PackStream(samples(), None, CAPACITY, buffer=4) for _ in range(4)]
    ours = sft(tmp_path / "ours", streams[0], streams[1], eval_strategy="steps", eval_steps=1)
    ours.train()
    own = {"accelerator_config": {"dispatch_batches": False}}
    theirs = stock(tmp_path / "theirs", streams[2], streams[3], **own)
    theirs.train()
    assert_same(logged(ours), logged(theirs))
    assert logged(ours, "eval_loss")[-1][0] == pytest.approx(theirs.evaluate()["eval_loss"], 1e-5)


def test_files_are_saved_with_a_streams_budget(small_set, tmp_path, monkeypatch):
    """As with a data set: the tokenizer is the model's, and transformers' processor is not loaded."""
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", None)
    shutil.copytree(small_set / "tokenizer", tmp_path / "model")
    model_of().save_pretrained(tmp_path / "model")
    budget = 56 * 56
    encoder = Encoder.from_folder(small_set / "tokenizer", max_pixels=budget, media_dir=small_set)
    rows = json.loads((small_set / "train.json").read_text())
    args = trl.SFTConfig(str(tmp_path / "run"), **{**QUIET, **NOTHING, "max_steps": 1})
    for stream in (
        PackStream(rows, encoder, 1024),
        PackStream({"a": (rows, 1), "b": (rows, 2)}, encoder, 1024),
    ):
        trainer = packed.PackedSFTTrainer(str(tmp_path / "model"), args, train_dataset=stream)
        trainer.save_model(str(tmp_path / "saved"))
        saved = Encoder.from_folder(tmp_path / "saved")
        assert saved.vision.max_pixels == budget
        assert saved.tokenizer.get_vocab() == encoder.tokenizer.get_vocab()


def test_a_tokenizer_that_is_not_known_is_asked_for(small_set, tmp_path, monkeypatch):
    """Not that of the current folder."""
    monkeypatch.chdir(small_set / "tokenizer")
    args = trl.SFTConfig(str(tmp_path), **{**QUIET, **NOTHING, "max_steps": 1})
    with pytest.raises(ValueError, match="made from a config, so .*pass processing_class="):
        packed.PackedSFTTrainer(model_of(), args, train_dataset=packs())
    named = model_of()
    named.config._name_or_path = str(small_set / "config.json")
    with pytest.raises(ValueError, match="made from a config, so .*pass processing_class="):
        packed.PackedSFTTrainer(named, args, train_dataset=packs())
    stream = PackStream(samples(), None, CAPACITY)
    named.config._name_or_path = str(small_set / "tokenizer")
    with pytest.raises(ValueError, match="of encoded samples, .*pass processing_class="):
        packed.PackedSFTTrainer(named, args, train_dataset=stream)


def test_lora(tmp_path):
    """TRL makes the adapters; the head's weights stay, and the loss is that of transformers' forward."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    ours = sft(tmp_path, packs(), more={"peft_config": config}, max_steps=1)
    names = [name for name, one in ours.model.named_parameters() if one.requires_grad]
    assert names and all("lora_" in name for name in names)
    batch = ours.data_collator([packs()[0]])
    expected = patch_model(model_of())(**batch).loss.item()  # the second factor begins at 0
    ours.train()
    ((loss, norm),) = logged(ours)
    assert loss == pytest.approx(expected, rel=1e-5) and norm > 0
    with pytest.raises(ValueError, match="lm_head"):
        on_head = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
        sft(tmp_path, packs(), more={"peft_config": on_head})


def test_experts_add_trls_loss(tmp_path):
    """A mixture of experts has TRL's load balancing loss on top, unless its coefficient is 0."""
    losses, family = [], "qwen3_vl_moe"
    train = packs(family=family)
    for coefficient in (0.0, 0.5):
        model = model_of(family)
        trainer = sft(tmp_path, train, model=model, router_aux_loss_coef=coefficient)
        batch = trainer.data_collator([train[0]])
        losses.append(trainer.compute_loss(model, dict(batch)).item())
    with torch.no_grad():
        asked = {**batch, "fused_lm_head": True, "output_router_logits": True}
        aux = float(model(**asked).aux_loss)
    assert aux > 0.5
    assert losses[1] - losses[0] == pytest.approx(0.5 * aux, rel=1e-5)


def test_dft(tmp_path):
    """The loss of Dynamic Fine-Tuning, in training and as eval_loss."""
    train = packs(1000)
    assert len(train) == 1
    trainer = sft(tmp_path, train, train, loss_type="dft", max_steps=1)
    model = patch_model(model_of()).eval()
    batch = PackCollator(model=model)([train[0]])
    with torch.no_grad():
        chances = model(**batch).logits[0].float().log_softmax(-1)
    picked = chances.gather(1, batch["shift_labels"].reshape(-1, 1)).double()
    expected = float((-picked * picked.exp()).mean())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert logged(trainer, "loss") == [[pytest.approx(expected, rel=1e-4)]]


def test_a_repeated_part_of_a_batch_is_left_out(tmp_path, monkeypatch):
    """On several ranks, accelerate repeats packs in the last batch: eval_loss is of the first packs alone, and
    with their weights. `test_two_ranks` has the ranks."""
    train = packs(40)
    assert len(train) > 2
    monkeypatch.setattr("mmpack.hf.evaluation.num_real_items", lambda *args: 2)
    for kind in ("nll", "dft"):
        model = patch_model(right_at_times())
        collate = PackCollator(model=model, loss_reduction="sample" if kind == "nll" else "token")
        options = {"per_device_eval_batch_size": len(train), "loss_type": kind}
        more = {"data_collator": collate}
        trainer = sft(tmp_path, train, train, model, more, **options)
        found = trainer.evaluate()["eval_loss"]
        with trainer.scores, torch.no_grad():
            batch = collate([train[n] for n in range(2)])
            loss = trainer.model.eval()(**batch, fused_lm_head=True).loss
        assert found == pytest.approx(loss.item(), rel=1e-5)


def test_trainers_that_share_a_model(tmp_path):
    """One after the other, each with its own loss, of all and of each source; TRL's own refuses weights."""
    model, train = model_of(), packs()
    first = sft(tmp_path, train, train, model)
    before = first.evaluate()["eval_loss"]
    second = sft(tmp_path, train, train, model, loss_type="dft", max_steps=1, learning_rate=0.0)
    found = second.evaluate()
    alone = sft(tmp_path, packs(), packs(), model_of(), loss_type="dft").evaluate()
    names = ("eval_loss", "eval_loss/a.json", "eval_loss/b.json")
    assert [found[name] for name in names] == pytest.approx(
        [alone[name] for name in names], rel=1e-5
    )
    assert (
        min(found[name] for name in names[1:])
        < found["eval_loss"]
        < max(found[name] for name in names[1:])
    )
    assert found["eval_loss"] < before / 2
    second.train()
    assert logged(second, "pack/loss/a.json", "pack/loss/b.json")
    assert first.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)
    weighted = PackCollator(model=model, loss_reduction="sample")([train[0]])
    with pytest.raises(ValueError, match="weights of the loss, .*PackedSFTTrainer"):
        model(**weighted, fused_lm_head=True)


def scores(model, samples):
    """(entropy, share of right predictions) of every supervised token, from logits of the rows alone."""
    entropies, right = [], []
    was_training = model.training
    for sample in samples:
        batch = PackCollator(model=model)([sample])
        with torch.no_grad():
            chances = model.eval()(**batch).logits[0].double().log_softmax(-1)
        entropies += (-chances.exp() * chances).sum(-1).tolist()
        right += (chances.argmax(-1) == batch["shift_labels"].reshape(-1)).tolist()
    model.train(was_training)
    return np.mean(entropies), np.mean(right)


def test_the_log_counts_tokens(tmp_path):
    """`num_tokens` are the packs' useful ones, entropy and accuracy are means over tokens, however packs are
    batched; an empty pack and filler do not count."""
    train = packs()
    options = {"per_device_train_batch_size": 2, "pad_to_multiple_of": 100, "learning_rate": 0.0}
    options |= {"max_steps": -1, "num_train_epochs": 2, "logging_steps": len(train) + 1}
    trainer = sft(tmp_path, train, **options)
    assert len(trainer.train_dataset) == len(train) + 1  # an empty pack
    trainer.model.load_state_dict(right_at_times().state_dict())
    expected = scores(trainer.model, samples())
    trainer.train()
    names = ("num_tokens", "entropy", "mean_token_accuracy")
    ((tokens, entropy, accuracy),) = logged(trainer, *names)
    assert tokens == 2 * sum(sample.num_tokens for sample in samples())
    assert 0.02 < expected[1] < 0.98
    assert (entropy, accuracy) == pytest.approx(expected, rel=1e-5)


@functools.cache
def right_at_times():
    """A model trained until some of its predictions are right."""
    model = patch_model(model_of())
    batch = PackCollator(model=model)(list(samples()))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(8):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_evaluation(tmp_path):
    """One set and a dict of sets, also as folders: loss, entropy and accuracy are over the tokens of the set."""
    packs(40, 5).save(tmp_path / "few")
    model = right_at_times()
    few, most = scores(model, samples()[:5]), scores(model, samples())
    for size in (1, 3):
        sets = {"few": str(tmp_path / "few"), "most": packs(40)}
        trainer = sft(tmp_path, packs(), sets, model=model, per_device_eval_batch_size=size)
        found = trainer.evaluate()
        for name, expected in (("few", few), ("most", most)):
            names = [f"eval_{name}_entropy", f"eval_{name}_mean_token_accuracy"]
            assert [found[name] for name in names] == pytest.approx(expected, rel=1e-5)
        theirs = stock(tmp_path, packs(), packs(40), model=model)
        assert found["eval_most_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-5)
    assert trainer.evaluate(packs(40))["eval_entropy"] == pytest.approx(most[0], rel=1e-5)
    assert trainer.predict(packs(40)).metrics["test_loss"] == pytest.approx(
        found["eval_most_loss"], rel=1e-5
    )


def test_metrics_of_ones_own(tmp_path):
    """`compute_metrics` gets the logits of every token with full_logits, and is refused without."""

    def metrics(prediction):
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"right": right[prediction.label_ids[:, 1:] != -100].mean()}

    model, train = right_at_times(), packs(1000)
    more = {"compute_metrics": metrics}
    with pytest.raises(ValueError, match="full_logits=True"):
        sft(tmp_path, train, train, model=model, more=more)
    more["data_collator"] = PackCollator(model=model, full_logits=True)
    found = sft(tmp_path, train, train, model=model, more=more).evaluate()
    assert found["eval_right"] == pytest.approx(found["eval_mean_token_accuracy"], rel=1e-6)
    assert found["eval_entropy"] == pytest.approx(scores(model, samples())[0], rel=1e-5)


def test_a_resumed_run_is_the_run(tmp_path):
    """Weights to the bit, and num_tokens go on."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    whole = sft(tmp_path / "whole", packs(), **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "half" / "checkpoint-3")
    resumed = sft(tmp_path / "half", packs(), **options)
    folder = tmp_path / "half" / "checkpoint-3"
    state = json.loads((folder / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"][packed.TokenMetrics.NAME]["attributes"]["num_tokens"]
    assert last_checkpoint(str(tmp_path / "half")) is not None
    resumed.train(resume_from_checkpoint=str(folder))
    assert logged(resumed, "num_tokens") == logged(whole, "num_tokens")
    first, last = (tokens for (tokens,) in logged(whole, "num_tokens"))
    assert first < kept < last
    weights = (trainer.model.state_dict() for trainer in (whole, resumed))
    assert all(torch.equal(a, b) for a, b in zip(*(one.values() for one in weights)))


EIGHT = {"per_device_eval_batch_size": 8}  # TRL's default


def on_two(folder):
    """An odd number of packs on two ranks: an empty one at the end."""
    train = packs()
    assert len(train) % 2 == 1
    options = {"max_steps": -1, "num_train_epochs": 1, "ddp_backend": "gloo"}
    trainer = sft(folder, train, train, model=right_at_times(), learning_rate=0.0, **options)
    expected = [pytest.approx(value, rel=1e-5) for value in scores(trainer.model, samples())]
    found = trainer.evaluate()
    assert [found["eval_entropy"], found["eval_mean_token_accuracy"]] == expected
    many = sft(folder, train, train, model=trainer.model, ddp_backend="gloo", **EIGHT).evaluate()
    assert many["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)
    assert [many["eval_entropy"], many["eval_mean_token_accuracy"]] == expected
    train.set_epoch(0)
    steps = [PackCollator()(train[n : n + 2]) for n in range(0, len(train), 2)]
    with torch.no_grad():
        losses = [trainer.model(**batch).loss.item() for batch in steps]
    trainer.train()
    entries = logged(trainer, "loss", "num_tokens")
    assert [loss for loss, _ in entries] == pytest.approx(losses, rel=2e-4)
    assert entries[-1][1] == sum(sample.num_tokens for sample in samples())


@pytest.mark.slow
def test_two_ranks(tmp_path):
    on_ranks(on_two, tmp_path)


REFUSALS = {
    "packing": True,
    "packing_strategy": "wrapped",
    "eval_packing": True,
    "padding_free": True,
    "truncation_mode": "keep_end",
    "dataset_text_field": "content",
    "dataset_kwargs": {"add_special_tokens": False},
    "dataset_num_proc": 4,
    "shuffle_dataset": True,
    "chat_template_path": "other.jinja",
    "eos_token": "<|im_end|>",
    "pad_token": "<pad>",
    "assistant_only_loss": True,
    "completion_only_loss": False,
    "label_smoothing_factor": 0.1,
    "max_length": 300,
}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", REFUSALS)
def test_options_of_rows_are_refused(tmp_path, name):
    assert REFUSALS.keys() == packed.REFUSED_OPTIONS.keys() | {"max_length"}
    with pytest.raises(ValueError, match=rf"^SFTConfig\({name}=.*does not apply: .*; .+"):
        sft(tmp_path, packs(), **{name: REFUSALS[name]})


def test_other_refusals(tmp_path):
    """Data sets of rows, arguments and combinations that do nothing, each with what to do instead."""
    for name in ("formatting_func", "compute_loss_func"):
        with pytest.raises(ValueError, match=f"^{name} does not apply: .*leave it out"):
            sft(tmp_path, packs(), more={name: print})
    with pytest.raises(TypeError, match="train_dataset is a list, which holds no packs; pass a"):
        sft(tmp_path, [{"messages": []}])
    with pytest.raises(TypeError, match="train_dataset is a dict, which only eval_dataset may be"):
        sft(tmp_path, {"a": packs()})
    with pytest.raises(TypeError, match=r"eval_dataset\['a'\] is a list"):
        sft(tmp_path, packs(), {"a": []})
    with pytest.raises(ValueError, match="data_collator is .*pass a PackCollator"):
        sft(tmp_path, packs(), more={"data_collator": list})
    with pytest.raises(ValueError, match="args is a TrainingArguments; pass a trl.SFTConfig"):
        args = TrainingArguments(str(tmp_path))
        packed.PackedSFTTrainer(model_of(), args, train_dataset=packs())
    weighted = packs()
    weighted.source_weights = {"a.json": 2.0}
    with pytest.raises(ValueError, match="'dft' does not apply weights.*source_weights"):
        sft(tmp_path, weighted, loss_type="dft")
    with pytest.raises(ValueError, match="PackingCallback of another data set"):
        sft(tmp_path, packs(), more={"callbacks": [PackingCallback(packs())]})
    padded = {"data_collator": PackCollator(pad_to=16)}
    with pytest.raises(ValueError, match=r"pad_to_multiple_of=32.*PackCollator\(pad_to=32\)"):
        sft(tmp_path, packs(), more=padded, pad_to_multiple_of=32)
    shared = patch_model(model_of(), context=ContextGroup(0, 2))
    with pytest.raises(
        ValueError, match="model shares packs over 2 ranks .*use transformers' Trainer"
    ):
        sft(tmp_path, packs(), model=shared)
    trainer = sft(tmp_path, packs())
    with pytest.raises(ValueError, match="not PackCollator's; evaluate packs"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.zeros(1, 4)})


def rows_of(data):
    return sorted(sample.row for number in range(len(data)) for sample in data[number].samples)


def test_rows_held_out(small_set, tmp_path):
    """Of `mmpack pack --val-size`: FOLDER:val, which is not trained on."""
    split = tmp_path / "split"
    words = [small_set / "train.json", "--tokenizer", small_set / "tokenizer", "--capacity", 2048]
    words += ["--val-size", 4, "--quiet", "--out", split]
    assert main(["pack", *map(str, words)]) == 0
    held_out = PackedDataset.from_store(split, split="val")
    trainer = sft(tmp_path, str(split), f"{split}:val")
    assert rows_of(trainer.eval_dataset) == rows_of(held_out)
    assert len(rows_of(held_out)) == 4
    assert not {*rows_of(held_out)} & {*rows_of(trainer.train_dataset)}
    named = sft(tmp_path, split, {"val": f"{split}:val"}).eval_dataset["val"]
    assert rows_of(named) == rows_of(held_out)
    with pytest.raises(
        ValueError, match="split:val are the rows held out for evaluation; train on"
    ):
        sft(tmp_path, f"{split}:val")


def test_no_hook_of_the_trainers_stays_on_the_model(tmp_path):
    """After training, interrupted or not, and after evaluation; the loss of each is that of packs."""
    trainer = sft(tmp_path, packs(), packs())
    model = trainer.model
    trainer.train()
    assert trainer.scores not in model._forward_hooks.values()
    evaluated = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    assert trainer.scores not in model._forward_hooks.values()
    theirs = stock(tmp_path, packs(), packs(), model=model)
    assert_same(evaluated, [theirs.evaluate()["eval_loss"]] * 2)

    class Interrupts(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            assert trainer.scores in model._forward_hooks.values()
            raise KeyboardInterrupt

    trainer.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.scores not in model._forward_hooks.values()


def test_ones_own_callback_is_attached(tmp_path):
    train = packs()
    own, other = PackingCallback(train, attention_every=1), TrainerCallback()
    trainer = sft(tmp_path, train, more={"callbacks": [own, other]}, max_length=CAPACITY)
    trainer.train()
    assert [isinstance(c, PackingCallback) for c in trainer.callback_handler.callbacks].count(
        True
    ) == 1
    assert other in trainer.callback_handler.callbacks
    assert logged(trainer, "pack/image_attention/layer_1")


def test_weights_are_refused_without_packed_trainer(tmp_path):
    """TRL's own trainer with our collator would ignore them."""
    datasets = pytest.importorskip("datasets")
    model = patch_model(model_of())
    batch = PackCollator(model=model, loss_reduction="sample")(list(samples()))
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(tmp_path), **{**QUIET, **NOTHING}),
        data_collator=PackCollator(model=model),
        train_dataset=datasets.Dataset.from_list([{"input_ids": [0], "labels": [0]}]),
        processing_class=tokenizer(),
    )
    with pytest.raises(ValueError, match="weights of the loss, .*PackedSFTTrainer"):
        trainer.compute_loss(model, dict(batch))


CHECKS = {
    "forward: fused_lm_head": lambda: (
        f"{packed.FUSED}=False" in inspect.getsource(trl.trainer.utils.add_fused_lm_head)
    ),
    "output: loss, log_probs, entropy, is_top1, label_mask, aux_loss": lambda: (
        {"loss", "log_probs", "entropy", "is_top1", "label_mask", "aux_loss"}
        <= {one.name for one in dataclasses.fields(trl.trainer.utils.FusedCausalLMOutput)}
    ),
    "SFTTrainer: aux_loss_enabled, router_aux_loss_coef": lambda: all(
        f"self.{name} =" in inspect.getsource(trl.SFTTrainer.__init__)
        for name in ("aux_loss_enabled", "router_aux_loss_coef")
    ),
    "SFTTrainer: _save_checkpoint": lambda: callable(trl.SFTTrainer._save_checkpoint),
    "SFTConfig: dataset_kwargs['skip_prepare_dataset']": lambda: (
        '"skip_prepare_dataset"' in inspect.getsource(trl.SFTTrainer.__init__)
    ),
    "add_fused_lm_head: calls the model's base_model, with its hooks": lambda: (
        "getattr(self, backbone_attr)(" in inspect.getsource(trl.trainer.utils.add_fused_lm_head)
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_trl_still_has(name):
    assert CHECKS.keys() == packed.NAMES.keys()
    assert CHECKS[name]()
