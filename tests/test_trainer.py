"""The theorem inside a stock Hugging Face Trainer, whose defaults break stock packing silently."""

import functools

import pytest
import torch
from builders import (
    QUIET,
    loss_and_grads,
    renumber,
    stock_inputs,
    stock_processor,
    tiny_model,
    worst_difference,
)
from transformers import Trainer, TrainerCallback, TrainingArguments

from mmpack import Encoder, PackedDataset, VisionSpec
from mmpack.hf import PackCollator, patch_model

pytestmark = pytest.mark.usefixtures("wide_tiles")
MAX_PIXELS = 28 * 28 * 16
NUM_ROWS = 18
CAPACITY = 700


@pytest.fixture(scope="module")
def rows(realset_rows):
    """Row numbers: text, single and multi image rows in turn."""
    kinds = [[], [], []]
    for number, row in enumerate(realset_rows):
        if len(str(row)) < 1500:
            kinds[min(len(row["images"]), 2)].append(number)
    return [number for group in zip(*kinds) for number in group][:NUM_ROWS]


@pytest.fixture(scope="module")
def numbered(rows, realset_rows, realset_samples, shared, tokenizer):
    """(samples, stock inputs of each row), with the tokenizer's ids."""
    processor = stock_processor(tokenizer, MAX_PIXELS)
    vision = VisionSpec.from_processor(processor)
    samples = Encoder(tokenizer, vision).encode([realset_samples[n] for n in rows])
    stock = [stock_inputs(realset_rows[n], shared / "realset", processor) for n in rows]
    return list(samples), stock


@pytest.fixture(scope="module")
def renumbered(numbered):
    """(samples, stock inputs of each row, options of the model), with the ids that occur."""
    return renumber(*numbered)


@pytest.fixture(scope="module")
def dataset(renumbered):
    dataset = PackedDataset.from_samples(renumbered[0], CAPACITY)
    assert len(dataset) == 4
    return dataset


@pytest.fixture(scope="module")
def stock_rows(renumbered):
    return renumbered[1]


@pytest.fixture(scope="module")
def model_of(renumbered):
    """The model of a family, with other options of `tiny_config` where they are given."""
    return functools.partial(tiny_model, **renumbered[2])


@pytest.fixture(scope="module")
def expected_of(stock_rows, model_of):
    """family -> loss and gradients of every row alone, weighted by tokens, in float32."""

    @functools.cache
    def compute(family):
        return loss_and_grads(model_of(family=family), stock_rows, num_items_of(stock_rows))

    return compute


@pytest.fixture
def expected(expected_of):
    return expected_of("qwen2_vl")


def num_items_of(stock_rows):
    return sum(int((inputs["labels"] != -100).sum()) for inputs in stock_rows)


class KeepGradients(TrainerCallback):
    """The gradients the optimizer is about to see."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
        }


def one_step(model, dataset, tmp_path, collate=None, **options):
    """(logged loss, gradients) of one optimizer step over the whole data set."""
    keep = KeepGradients()
    arguments = {
        **QUIET,
        "output_dir": tmp_path,
        "max_steps": 1,
        "gradient_accumulation_steps": len(dataset),
        "max_grad_norm": 0.0,  # gradients as they are
        **options,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=dataset,
        data_collator=collate or PackCollator(),
        callbacks=[keep],
    )
    trainer.train()
    return float(trainer.state.log_history[0]["loss"]), keep.grads


OPTIONS = {
    "accumulation 4": {},
    "one batch of 4 packs": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing kernels": {"gradient_checkpointing": True},
    "workers": {"dataloader_num_workers": 2},
}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(("qwen2_vl", name) for name in OPTIONS if "kernels" not in name),
        pytest.param(
            "qwen2_vl", "checkpointing kernels", marks=pytest.mark.slow
        ),  # as in test_matrix
        pytest.param("qwen2_5_vl", "accumulation 4", marks=pytest.mark.smoke),
        pytest.param("qwen3_vl", "accumulation 4", marks=pytest.mark.smoke),
        pytest.param("qwen3_vl_moe", "accumulation 4", marks=pytest.mark.slow),
    ],
)
def test_patched_model(family, options, dataset, model_of, expected_of, tmp_path):
    """Micro-batches of unequal weight; the newer families say accepts_loss_kwargs=False, which lets
    Trainer count micro-batches alike."""
    impl = "triton" if "kernels" in options else "auto"
    model = model_of(family=family)
    assert getattr(model, "accepts_loss_kwargs", None) == (None if family == "qwen2_vl" else False)
    patch_model(model, impl=impl)
    collate = PackCollator(model=model)
    loss, grads = one_step(model, dataset, tmp_path, collate, **OPTIONS[options])
    expected = expected_of(family)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    difference, name = worst_difference(grads, expected[1])
    assert difference <= 1e-5, name


@pytest.mark.smoke
def test_uint8_pixels(dataset, model_of, expected, tmp_path):
    """Bytes from the workers to the tower; the rows alone had transformers' own float32 pixels."""
    model = patch_model(model_of())
    collate = PackCollator(model=model, pixels="uint8")
    loss, grads = one_step(model, dataset, tmp_path, collate, dataloader_num_workers=2)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    difference, name = worst_difference(grads, expected[1])
    assert difference <= 1e-5, name


@pytest.mark.smoke
def test_unpatched_model(dataset, model_of, expected, tmp_path):
    # Trainer switches the cache off in the wrong config; the batch's use_cache=False saves us.
    model = model_of()
    assert model.config.text_config.use_cache
    loss, grads = one_step(model, dataset, tmp_path)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    difference, name = worst_difference(grads, expected[1])
    assert difference <= 1e-5, name


@pytest.mark.smoke
def test_bf16(dataset, model_of, stock_rows, expected, tmp_path):
    """Autocast over float32 weights: no further from float32 than stock transformers is, on the
    rows alone or on the same packs (more tokens a product round differently)."""
    # float32 table, bfloat16 features; torch's ops, as the interpreter cannot round to bfloat16
    model = patch_model(model_of())
    loss, grads = one_step(model, dataset, tmp_path, bf16=True)
    packs = [PackCollator()([pack]) for pack in dataset]
    num_items = num_items_of(stock_rows)
    with torch.autocast("cpu", torch.bfloat16):
        stock = [loss_and_grads(model_of(), inputs, num_items) for inputs in (stock_rows, packs)]
    budget = max(abs(stock_loss - expected[0]) for stock_loss, _ in stock)
    assert abs(loss - expected[0]) <= 2 * budget + 1e-3 * expected[0]
    for name, exact in expected[1].items():
        budget = max((stock_grads[name] - exact).abs().max() for _, stock_grads in stock)
        assert (grads[name] - exact).abs().max() <= 2 * budget + 1e-3 * exact.abs().max(), name


def test_autocast_on_rows_alone_rounds_as_stock(numbered):
    """Same dtypes at every place: a pack of one row differs from stock by no rounding to bf16."""
    samples, stock_rows = (some[:4] for some in numbered)
    alone = [PackCollator()([sample]) for sample in samples]
    num_items = num_items_of(stock_rows)
    with torch.autocast("cpu", torch.bfloat16):
        model = patch_model(tiny_model())
        # Ours divides elsewhere, and a last bit of float32 can turn a rounding to bf16.
        model.loss_function = tiny_model().loss_function
        loss, grads = loss_and_grads(model, alone, num_items)
        expected_loss, expected_grads = loss_and_grads(tiny_model(), stock_rows, num_items)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    difference, name = worst_difference(grads, expected_grads)
    assert difference <= 1e-5, name


def test_tied_embeddings_learn(dataset, model_of, tmp_path):
    """Twenty steps on the same packs bring the loss down."""
    model = patch_model(model_of(tied=True))
    keep = []

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            keep.append(logs.get("loss"))

    args = TrainingArguments(**QUIET, output_dir=tmp_path, max_steps=20, learning_rate=1e-2)
    Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=PackCollator(),
        callbacks=[Log()],
    ).train()
    losses = [float(loss) for loss in keep if loss is not None]
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
