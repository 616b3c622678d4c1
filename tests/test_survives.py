"""What users do to a model survives a patch: checkpointing, PEFT, NEFTune, other trainers and heads.

Wherever stock transformers can say what is right, on the same pack or on the rows alone, it is asked.
"""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from builders import (
    FAMILIES,
    QUIET,
    SMALL_SPEC,
    collator,
    encoded,
    loss_and_grads,
    packed,
    small_config,
    stock_processor,
    tiny_model,
    worst_difference,
)
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainingArguments

from mmpack import assemble
from mmpack.hf import PackCollator, attention, patch_model, unpatch_model
from mmpack.hf.loss import PackedLoss

pytestmark = pytest.mark.usefixtures("wide_tiles")
every_family = pytest.mark.parametrize("family", FAMILIES)
SAMPLES = [
    encoded(SMALL_SPEC, 1, 2, (2, 4), 3, 4),
    encoded(SMALL_SPEC, 5, 6, 7),
    encoded(SMALL_SPEC, 8, (4, 6), (2, 2), 9),
]
TEXT = [encoded(SMALL_SPEC, 1, 2, 3), encoded(SMALL_SPEC, 4, 5)]
SILENT = [encoded(SMALL_SPEC, 1, 2, (2, 4), 3, supervised=False)]


def pack_of(*samples, family="qwen2_vl"):
    return packed(samples, family)


PACKS = [pack_of(*SAMPLES[:2]), pack_of(*SAMPLES[1:])]
NUM_ITEMS = sum(sample.num_supervised for sample in SAMPLES)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums of a few numbers: threads would only wait for each other (20 times slower on a busy machine)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(family="qwen2_vl"):
    return tiny_model(small_config(family))


@pytest.fixture
def family():
    """What tests marked `every_family` run with in turn, and all others once."""
    return "qwen2_vl"


@pytest.fixture
def batch(family):
    return collator(family)([pack_of(*SAMPLES, family=family)])


@pytest.fixture
def expected(batch, family):
    """Loss and gradients of the patched model as it is; tests/test_matrix.py holds them to stock."""
    return loss_and_grads(patch_model(make(family)), [batch], NUM_ITEMS)


def assert_same(ours, expected, tolerance=1e-5):
    """Equal losses, and equal gradients of every parameter that `ours` trains."""
    assert ours[0] == pytest.approx(expected[0], rel=tolerance)
    assert ours[1]
    difference, name = worst_difference(ours[1], {name: expected[1][name] for name in ours[1]})
    assert difference <= tolerance, name


def train(model, tmp_path, packs=PACKS, collate=None, callbacks=(), **options):
    trainer = trainer_of(model, tmp_path, packs, collate, callbacks, **options)
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def trainer_of(model, tmp_path, packs=PACKS, collate=None, callbacks=(), **options):
    trainer_options = {name: options.pop(name) for name in ("compute_metrics",) if name in options}
    arguments = {**QUIET, "output_dir": tmp_path, "max_steps": 1, **options}
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=packs,
        eval_dataset=packs,
        data_collator=collate or PackCollator(),
        callbacks=list(callbacks),
        **trainer_options,
    )


# Gradient checkpointing


@pytest.mark.smoke
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("samples", [SAMPLES, TEXT], ids=["images", "text"])
@every_family
def test_checkpointing_runs_the_hook_once(family, use_reentrant, samples, monkeypatch):
    """The tower's blocks and the text layers run again in the backward; the hook, the tower's forward
    and the embedding do not."""
    batch = collator(family)([pack_of(*samples, family=family)])
    model = patch_model(make(family))
    expected = loss_and_grads(model, [batch], NUM_ITEMS)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    calls = []
    for name in ("visual", "language_model", "language_model.embed_tokens"):
        module = model.model.get_submodule(name)
        module.register_forward_hook(lambda module, args, out, name=name: calls.append(name))
    layers = []
    real = attention.varlen_attention

    def count(*args, **kwargs):
        layers.append(kwargs["causal"])
        return real(*args, **kwargs)

    monkeypatch.setattr(attention, "varlen_attention", count)
    assert_same(loss_and_grads(model, [batch], NUM_ITEMS), expected)
    assert sorted(calls) == ["language_model", "language_model.embed_tokens", "visual"]
    num_layers = model.config.text_config.num_hidden_layers
    assert (layers.count(True), layers.count(False)) == (2 * num_layers, 2 * 2)


def test_reentrant_checkpointing_in_a_trainer(tmp_path):
    options = {"max_steps": 2, "learning_rate": 1e-3}
    plain = train(patch_model(make()), tmp_path, **options)
    kwargs = {"use_reentrant": True}
    options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    assert train(patch_model(make()), tmp_path, **options) == pytest.approx(plain, rel=1e-5)


# PEFT

TARGETS = {
    "text": ["q_proj", "v_proj"],
    "embeddings": ["embed_tokens"],
    "tower": ["qkv", "proj"],  # `proj` is the patch embedding's convolution too
    "both": ["q_proj", "embed_tokens", "qkv", "proj"],
}


def lora(model, targets, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def trained(result):
    return result[0], {name: grad for name, grad in result[1].items() if "lora_" in name}


@pytest.mark.parametrize(
    ("family", "targets"),
    [*(("qwen2_vl", name) for name in TARGETS), *((family, "both") for family in FAMILIES[1:])],
)
@pytest.mark.parametrize("order", ["patch first", "lora first"])
def test_lora(order, family, targets, batch):
    """Equal to LoRA on the stock model, whose adapters all get gradients."""
    targets = TARGETS[targets]
    expected = loss_and_grads(lora(make(family), targets), [batch], NUM_ITEMS)
    model = make(family)
    if order == "patch first":
        patch_model(model)
    model = patch_model(lora(model, targets))
    result = loss_and_grads(model, [batch], NUM_ITEMS)
    assert_same(trained(result), trained(expected))
    assert all(grad.abs().max() > 0 for grad in trained(result)[1].values())
    unpatch_model(model)
    assert_same(trained(loss_and_grads(model, [batch], NUM_ITEMS)), trained(expected))


@pytest.mark.smoke
@pytest.mark.parametrize("use_reentrant", [True, False])
@every_family
def test_lora_under_checkpointing(family, use_reentrant, batch):
    """Reentrant checkpointing differentiates only what has an input that requires gradients: the hooks
    of `enable_input_require_grads` see to that, in the text model and in the tower."""
    expected = loss_and_grads(lora(make(family), TARGETS["both"]), [batch], NUM_ITEMS)
    model = patch_model(lora(make(family), TARGETS["both"]))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(trained(loss_and_grads(model, [batch], NUM_ITEMS)), trained(expected))


@every_family
def test_lora_on_bytes(batch, family):
    """A patch embedding with an adapter is called as a module, on normalised pixels."""
    model = patch_model(lora(make(family), TARGETS["tower"]))
    collate = PackCollator(model=model, pixels="uint8")
    result = loss_and_grads(model, [collate([pack_of(*SAMPLES, family=family)])], NUM_ITEMS)
    assert_same(trained(result), trained(loss_and_grads(model, [batch], NUM_ITEMS)), 2e-5)


def test_the_fused_embedding_and_lora(batch, fused_calls):
    """The kernels go around no adapter."""
    for targets in (["q_proj"], ["q_proj", "embed_tokens"]):
        expected = loss_and_grads(lora(make(), targets), [batch], NUM_ITEMS)
        fused_calls.clear()
        model = patch_model(lora(make(), targets), impl="triton")
        assert_same(trained(loss_and_grads(model, [batch], NUM_ITEMS)), trained(expected))
        assert bool(fused_calls) == ("embed_tokens" not in targets)


@pytest.mark.parametrize("order", ["patch first", "lora first"])
@every_family
def test_trained_copies_of_modules(family, order, batch):
    """PEFT's `modules_to_save`: whole trained copies beside the frozen table and the tower's merger."""
    copies = ["embed_tokens", "merger"]
    expected = lora(make(family), ["q_proj"], modules_to_save=copies)
    model = make(family) if order == "lora first" else patch_model(make(family))
    model = patch_model(lora(model, ["q_proj"], modules_to_save=copies))
    expected = loss_and_grads(expected, [batch], NUM_ITEMS)
    for _ in range(2):
        result = loss_and_grads(model, [batch], NUM_ITEMS)
        assert_same(result, expected)
    for name in copies:
        saved = [g for n, g in result[1].items() if f"{name}.modules_to_save" in n]
        assert saved and all(grad.any() for grad in saved)
    unpatch_model(model)
    assert_same(loss_and_grads(model, [batch], NUM_ITEMS), expected)


@every_family
def test_merged_adapters_stay_patched(batch, family):
    model = patch_model(lora(make(family), TARGETS["both"]))
    loss = model(**batch).loss
    merged = model.merge_and_unload()
    assert merged(**batch).loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert merged is unpatch_model(merged)
    assert merged(**batch).loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_lora_in_a_trainer(tmp_path):
    """Micro-batches count by their tokens: Trainer looks through PEFT's wrapper."""
    stock = train(lora(make(), ["q_proj"]), tmp_path, gradient_accumulation_steps=2)
    ours = train(patch_model(lora(make(), ["q_proj"])), tmp_path, gradient_accumulation_steps=2)
    assert ours == pytest.approx(stock, rel=1e-5)


@pytest.mark.smoke
@every_family
def test_a_frozen_tower_is_not_recorded_on_a_dummy(family):
    """`enable_input_require_grads` makes the tower's first output require gradients; a rank with images
    runs a frozen tower unrecorded, so a rank without must, or it gathers shards nobody sends."""
    model = patch_model(make(family))
    model.model.visual.requires_grad_(False)
    model.enable_input_require_grads()
    next(model.model.visual.parameters()).ds_id = 7  # as ZeRO-3 marks its shards
    recorded = []
    model.model.visual.merger.register_forward_hook(
        lambda module, args, out: recorded.append(out.requires_grad)
    )
    for samples in (TEXT, SAMPLES):
        batch = collator(family)([pack_of(*samples, family=family)])
        model(**batch).loss.backward()
    assert recorded == [False, False]


@every_family
def test_shards_are_left_to_their_modules(family, expected, fused_calls):
    """Under ZeRO-3 a weight is empty until its module is called: neither the embedding nor the patch
    embedding may be read around it. Gathering is done here by hooks, as DeepSpeed's."""
    model = patch_model(make(family), impl="triton")
    embedding, projection = model.get_input_embeddings(), model.model.visual.patch_embed.proj
    for module in (embedding, projection):
        weight, full = module.weight, module.weight.detach().clone()
        weight.ds_id = 7
        shape = (0, *full.shape[1:]) if module is embedding else (0,)
        weight.data = full.new_empty(shape)

        def gather(module, args, full=full):
            module.weight.data = full.clone()

        module.register_forward_pre_hook(gather)
    fused_calls.clear()
    collate = PackCollator(model=model, pixels="uint8")
    batch = collate([pack_of(*SAMPLES, family=family)])
    assert_same(loss_and_grads(model, [batch], NUM_ITEMS), expected, tolerance=2e-5)
    assert fused_calls == []


# NEFTune


def test_neftune(tmp_path, fused_calls):
    """Noise is on the text's rows, in the strength asked for, and the fused embedding, which would go
    around the hook, is not taken; after training it is again."""
    model = patch_model(make(), impl="triton")
    model(**PackCollator()([PACKS[0]]))
    assert fused_calls  # also by the self-test, which is over now
    clean = model.get_input_embeddings().weight.detach().clone()
    noise = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            fused_calls.clear()
            model.model.language_model.register_forward_pre_hook(self.look, with_kwargs=True)
            model.register_forward_pre_hook(self.keep_ids, with_kwargs=True)

        def keep_ids(self, module, args, kwargs):
            self.ids, self.index = kwargs["input_ids"][0], kwargs["mmpack"]["feature_index"]

        def look(self, module, args, kwargs):
            text = self.index < 0
            noise.append((kwargs["inputs_embeds"][0] - clean[self.ids])[text].detach())

    options = {"neftune_noise_alpha": 5.0, "max_steps": 1}
    losses = train(model, tmp_path, packs=PACKS[:1], callbacks=[Look()], **options)
    assert all(math.isfinite(loss) for loss in losses)
    assert fused_calls == []
    limit = 5.0 / math.sqrt(assemble(PACKS[0]).num_tokens * clean.shape[1])
    assert len(noise) == 1
    assert 0.9 * limit <= noise[0].abs().max() <= 1.001 * limit
    assert not torch.equal(model.get_input_embeddings().weight, clean)
    model(**PackCollator()([PACKS[0]]))
    assert len(fused_calls) == 1


# Trainer: evaluation, label smoothing, losses


@pytest.mark.smoke
def test_evaluation(tmp_path):
    """eval_loss is the mean over batches of each one's mean over its supervised tokens, as transformers
    has it for padded batches; with full_logits predictions stand in the places of the labels."""
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"seen": float(len(seen))}

    model = patch_model(make())
    collate = PackCollator(full_logits=True)
    got = trainer_of(model, tmp_path, collate=collate, compute_metrics=metrics).evaluate()
    assert got["eval_seen"] == 1.0
    stock = make().eval()
    longest = max(assemble(pack).num_tokens for pack in PACKS)
    logits = seen[0].predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    assert logits.shape == (len(PACKS), longest, 100)
    assert seen[0].label_ids.shape == (len(PACKS), longest)
    losses = []
    for n, item in enumerate(PACKS):
        pack = assemble(item)
        num_tokens = len(pack.input_ids)
        with torch.no_grad():
            out = stock(**PackCollator(full_logits=True)([item]))
        assert torch.allclose(torch.from_numpy(logits[n, :num_tokens]), out.logits[0], atol=1e-5)
        assert seen[0].label_ids[n, :num_tokens].tolist() == pack.labels.tolist()
        assert (seen[0].label_ids[n, num_tokens:] == -100).all()
        losses.append(out.loss.item())
    assert got["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    first, second = (sum(sample.num_supervised for sample in pack) for pack in PACKS)
    assert first != second
    of_supervised_rows = trainer_of(model, tmp_path, prediction_loss_only=True).evaluate()
    assert of_supervised_rows["eval_loss"] == pytest.approx(got["eval_loss"], rel=1e-6)


@pytest.mark.smoke
def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor .* supervised tokens only"):
        train(patch_model(make()), tmp_path, label_smoothing_factor=0.1)


def test_compute_loss_func_needs_every_logit(tmp_path):
    """Refused on supervised rows' logits; equal to the packed loss on full ones."""

    def compute_loss(outputs, labels, num_items_in_batch=None):
        logits, labels = outputs.logits[0, :-1], labels[0, 1:]
        return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    def step(collate):
        trainer = trainer_of(patch_model(make()), tmp_path, collate=collate)
        trainer.compute_loss_func = compute_loss
        trainer.train()
        return float(trainer.state.log_history[0]["loss"])

    with pytest.raises(ValueError, match=r"PackCollator\(full_logits=True\)"):
        step(PackCollator())
    expected = train(patch_model(make()), tmp_path)
    assert step(PackCollator(full_logits=True)) == pytest.approx(expected[0], rel=1e-5)


def users_loss(logits, labels, vocab_size, **kwargs):
    return logits.sum() * 0 + 42.0


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_users_loss_is_kept(when, batch):
    model = make()
    if when == "before":
        model.loss_function = users_loss
    patch_model(model)
    if when == "after":
        model.loss_function = users_loss
    assert model(**batch).loss.item() == 42.0
    assert unpatch_model(model).loss_function is users_loss
    assert model(**batch).loss.item() == 42.0


@pytest.mark.smoke
@every_family
def test_the_loss_is_patched_once_and_taken_back(family):
    model = make(family)
    stock = model.loss_function
    had = getattr(model, "accepts_loss_kwargs", None)
    for _ in range(2):
        patch_model(model)
        assert isinstance(model.loss_function, PackedLoss)
        assert model.loss_function.stock is stock
        assert model.accepts_loss_kwargs
        assert len(model._forward_pre_hooks) == 1
        assert len(model.model._forward_hooks) == len(model.model._forward_pre_hooks) == 1
    unpatch_model(model)
    assert model.loss_function is stock
    assert getattr(model, "accepts_loss_kwargs", None) == had
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs
    for table in ("_forward_hooks", "_forward_pre_hooks"):
        assert not getattr(model.model, table)
        assert not getattr(model.model, f"{table}_with_kwargs")


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("family", "num_items"),
    [("qwen2_vl", None), ("qwen2_vl", 0), *((family, 3) for family in FAMILIES)],
)
def test_a_pack_without_labels(family, num_items):
    """Loss 0 and gradients 0: other micro-batches and ranks go on, and no parameter is left without."""
    model = patch_model(make(family))
    batch = collator(family)([pack_of(*SILENT, family=family)])
    if num_items is not None:
        batch["num_items_in_batch"] = torch.tensor(num_items)
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def test_a_trainer_goes_on_after_a_step_without_labels(tmp_path):
    packs = [pack_of(*SILENT), PACKS[0]]
    options = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    losses = train(patch_model(make()), tmp_path, packs=packs, **options)
    assert losses[0] == 0
    assert losses[1] == pytest.approx(train(patch_model(make()), tmp_path, packs=PACKS[:1])[0])


# Copies and wrappers


@every_family
def test_a_copy_trains_on_its_own(batch, family):
    model = patch_model(make(family))
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    before = copy.deepcopy(model.state_dict())
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = other(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model(**batch).loss.item() == pytest.approx(losses[0], rel=1e-6)
    fresh = make(family)
    fresh.load_state_dict(other.state_dict())
    assert fresh(**batch).loss.item() == pytest.approx(other(**batch).loss.item(), rel=1e-5)
    unpatch_model(other)
    assert isinstance(model.loss_function, PackedLoss)
    assert not isinstance(other.loss_function, PackedLoss)


def test_a_trained_model_is_saved_as_stock(tmp_path, batch):
    model = patch_model(make())
    trainer = trainer_of(model, tmp_path, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    stock = type(model).from_pretrained(tmp_path / "saved").eval()
    full = PackCollator(full_logits=True)([pack_of(*SAMPLES)])
    with torch.no_grad():
        ours, theirs = model.eval()(**full), stock(**full)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)


def test_data_parallel_is_refused(batch):
    """torch's own replica of a module, made as nn.DataParallel makes it."""
    model = patch_model(make())
    replica = model._replicate_for_data_parallel()
    replica.model = model.model._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"nn\.DataParallel splits batches .* torchrun"):
        replica(**batch)
    assert model(**batch).loss.isfinite()


# Outer forwards that are not transformers'


@pytest.fixture
def torchs_kernel(monkeypatch):
    """Liger's forward and loss as they are; its kernel, which needs a GPU, in torch's words. The list
    has the rows of each call."""
    pytest.importorskip("liger_kernel")
    try:
        from liger_kernel.transformers.model import loss_utils, qwen2_vl  # noqa: F401
    except ImportError as error:  # Liger lags behind transformers
        pytest.skip(f"this liger-kernel cannot be imported with this transformers: {error}")
    rows = []

    def linear_cross_entropy(
        hidden, weight, target, bias=None, ignore_index=-100, reduction="mean", softcap=None, **_
    ):
        rows.append(len(hidden))
        logits = hidden @ weight.T
        return F.cross_entropy(logits, target, reduction=reduction, ignore_index=ignore_index)

    monkeypatch.setattr(loss_utils.F, "liger_fused_linear_cross_entropy", linear_cross_entropy)
    return rows


@pytest.mark.smoke
@pytest.mark.parametrize("order", ["patch first", "liger first"])
@pytest.mark.parametrize("full_logits", [False, True])
def test_liger(order, full_logits, torchs_kernel, expected):
    """Liger's outer forward gets the supervised rows alone, and our hook and attention stay below it."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2_vl

    model = make()
    if order == "patch first":
        patch_model(model)
    layers = {"rope": False, "rms_norm": False, "layer_norm": False, "swiglu": False}
    apply_liger_kernel_to_qwen2_vl(model=model, **layers)
    patch_model(model)
    batch = PackCollator(full_logits=full_logits)([pack_of(*SAMPLES)])
    assert_same(loss_and_grads(model, [batch], NUM_ITEMS), expected)
    assert torchs_kernel == [batch["input_ids"].shape[1] if full_logits else NUM_ITEMS]


@every_family
def test_an_outer_forward_that_passes_everything_down(batch, family):
    """Liger's and TRL's call the inner model with `logits_to_keep` in the keywords; both kinds of
    output are cut to the supervised rows."""
    model = patch_model(make(family)).eval()
    inner = {k: v for k, v in batch.items() if k not in ("labels", "shift_labels")}
    index = inner["logits_to_keep"]
    cut = model.model(**inner).last_hidden_state
    assert torch.equal(cut, model.model(**inner, return_dict=False)[0])
    del inner["logits_to_keep"]
    assert torch.equal(cut, model.model(**inner).last_hidden_state[:, index])
    assert torch.equal(model.lm_head(cut), model(**batch).logits)


@pytest.fixture(scope="module")
def conversations():
    """Rows as TRL takes them, images in the place of their parts."""
    datasets = pytest.importorskip("datasets")
    rows = []
    for n in range(4):
        pictures = []
        for shade in range(1 + n % 2):
            file = io.BytesIO()
            Image.new("RGB", (56 + 28 * (n % 3), 56), (40 * n, 90, 80 * shade)).save(file, "PNG")
            pictures.append({"bytes": file.getvalue(), "path": None})
        parts = [{"type": "image", "text": None} for _ in pictures]
        parts.append({"type": "text", "text": "What is this" + "?" * n})
        answer = [{"type": "text", "text": f"A cat, number {n}."}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": pictures})
    dataset = datasets.Dataset.from_list(rows)
    return dataset.cast_column("images", datasets.Sequence(datasets.Image()))


@pytest.mark.parametrize("full_logits", [False, True])
def test_trl(full_logits, conversations, tokenizer, tmp_path):
    """SFTTrainer hands raw rows to our collator and puts a head of its own over the inner model; the
    logged loss and gradient norm are those of a stock Trainer on the same rows."""
    trl = pytest.importorskip("trl")
    processor = stock_processor(tokenizer, 28 * 28 * 16)
    collate = PackCollator(processor, full_logits=full_logits)
    rows = list(conversations)
    model = patch_model(tiny_model())
    batch = collate(rows)
    num_items = int((batch["labels"] != -100).sum())
    loss, grads = loss_and_grads(model, [batch], num_items)
    args = trl.SFTConfig(
        **{**QUIET, "per_device_train_batch_size": len(rows)},
        output_dir=tmp_path,
        max_steps=1,
        max_length=None,
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=args,
        train_dataset=conversations,
        processing_class=processor,
        data_collator=collate,
    )
    model.zero_grad()
    trainer.train()
    logged = trainer.state.log_history[0]
    assert float(logged["loss"]) == pytest.approx(loss, rel=1e-5)
    norm = math.sqrt(sum(grad.double().square().sum().item() for grad in grads.values()))
    assert float(logged["grad_norm"]) == pytest.approx(norm, rel=1e-4)
