"""Context parallelism: loss and gradients of ranks that share packs equal those of their rows alone in stock.

The ranks are started once for all cases. A collective that one of them does not reach, or reaches at another
place, ends in an error after gloo's timeout.
"""

import contextlib
import dataclasses
import datetime
import functools
import io
import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from builders import (
    HYBRIDS,
    collator,
    encoded,
    float64_loss,
    float64_stays,
    item_of,
    loss_and_grads,
    small_config,
    small_spec,
    stock_of,
    tiny_model,
    with_noise,
    worst_difference,
)
from ranks import on_ranks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks import bench_context
from mmpack import ContextGroup, EncodedSample
from mmpack.hf import PackCollator, compat, context_parallel, head, loss_denominator, patch_model
from mmpack.hf.context_ranks import compare_batches

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def rows_of(name, family):
    """The rows of a case's packs."""
    spec = small_spec(family)
    return {
        "mixed": [
            encoded(spec, 1, 2, (2, 4), 3, 4),
            encoded(spec, range(5, 40)),
            encoded(spec, 8, (4, 6), (6, 2), 9, 10),
            encoded(spec, 11, (2, 4, 4), 12, (2, 4), 13, (3, 4, 2), 14),
        ],
        # longer than a rank's tokens, across the cut, and of one rank
        "one long image": [encoded(spec, 1, (10, 12), 2, 3), encoded(spec, 4, 5)],
        "text": [encoded(spec, range(5, 20)), encoded(spec, range(30, 55))],
        "a video": [encoded(spec, 1, (3, 4, 4), 2, 3), encoded(spec, range(5, 20))],
        # whose tokens are of the first rank only, which is also without a supervised row
        "images first": [
            encoded(spec, 1, (2, 4), (4, 4), range(3, 30), supervised=False),
            encoded(spec, range(5, 40)),
        ],
        "shared": [
            encoded(spec, 1, 2, (2, 4), 3, 4),
            encoded(spec, 8, (4, 6), 9, (2, 4), 7, (4, 6), (2, 4), 10),
            encoded(spec, range(5, 40)),
            encoded(spec, 11, (2, 4, 4), 12, (4, 6), 13),
            encoded(spec, 15, (6, 2), 16, (2, 4, 4), 17),
        ],
        "empty": [EncodedSample.filler(1, spec)],
    }[name]


@functools.cache
def packs_of(name, family):
    """(an item per row, stock inputs of each row with labels)"""
    packs = [with_noise([row], seed) for seed, row in enumerate(rows_of(name, family))]
    if name == "shared":  # all images of a size are one, and all videos
        known = {}
        for n, (row,) in enumerate(packs):
            media = [
                known.setdefault((type(ref), *grid), ref)
                for ref, grid in zip(row.media, row.grid_thw.tolist())
            ]
            packs[n] = item_of([dataclasses.replace(row, media=tuple(media))])
    if name == "empty":
        return packs, []
    stock = [stock_of(collator(family)([pack]), small_spec(family)) for pack in packs]
    if family == "qwen2_vl":  # unpatched, so that nothing is shared
        stock = [stock_of(PackCollator()([pack]), small_spec(family)) for pack in packs]
    return packs, stock


def plain(model):
    """The model as it is."""
    return model


def frozen_tower(model):
    model.model.visual.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def checkpointed_reentrant(model):
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    return model


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "in_proj_qkv", "out_proj"])
    adapted = peft.get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return adapted


def ddp(model):
    return DistributedDataParallel(model)


def compiled(model):
    return torch.compile(model, backend="eager")


def fsdp(model):
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    inner = model.model
    for module in (*inner.visual.blocks, *inner.language_model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@contextlib.contextmanager
def loss_in_the_head():
    """As where that saves memory."""
    stock = head.supervised_linear_cross_entropy
    with (
        mock.patch.object(head, "pays", lambda *sizes: True),
        mock.patch.object(head, "supervised_linear_cross_entropy", wraps=stock) as calls,
    ):
        yield
    assert calls.call_count == 1


class Case(NamedTuple):
    rows: str
    family: str = "qwen2_vl"
    dtype: torch.dtype = torch.float64
    change: Callable = plain  # before patching; of stock's too
    wrap: Callable = plain
    options: tuple = ()  # of PackCollator
    is_mean: bool = False  # without num_items_in_batch
    impl: str = "auto"
    within: Callable = contextlib.nullcontext  # what its forward runs in


FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", *HYBRIDS)
CASES = {
    **{
        f"{family}, {str(dtype)[6:]}": Case("mixed", family, dtype)
        for family in FAMILIES
        for dtype in TOLERANCE
    },
    **{name: Case(name) for name in ("one long image", "text", "a video", "images first", "empty")},
    "images first, deepstack": Case("images first", "qwen3_vl"),
    "one long image, windows": Case("one long image", "qwen2_5_vl"),
    "shared": Case("shared"),
    "shared, windows": Case("shared", "qwen2_5_vl"),
    "uint8": Case("mixed", "qwen3_vl", torch.float32, options=(("pixels", "uint8"),)),
    "padded": Case("mixed", options=(("pad_to", 64),)),
    "frozen tower": Case("one long image", "qwen3_vl", change=frozen_tower),
    "checkpointing": Case("mixed", "qwen3_vl", change=checkpointed),
    "checkpointing, reentrant": Case("mixed", change=checkpointed_reentrant),
    "checkpointing, Gated DeltaNet": Case("mixed", "qwen3_5", change=checkpointed),
    "lora": Case("mixed", "qwen3_5", change=lora),
    "mean": Case("mixed", is_mean=True),
    "sample": Case("mixed", options=(("loss_reduction", "sample"),)),
    "sample, mean": Case("mixed", options=(("loss_reduction", "sample"),), is_mean=True),
    "ddp": Case("one long image", wrap=ddp),
    "ddp, text": Case("text", "qwen2_5_vl", wrap=ddp),
    "fsdp2": Case("images first", "qwen3_vl", wrap=fsdp),
    "fsdp2, then patched": Case("one long image", "qwen3_vl", change=fsdp),
    "head, ddp": Case("images first", wrap=ddp, within=loss_in_the_head),
    "head, fsdp2": Case("images first", wrap=fsdp, within=loss_in_the_head),
    "autocast": Case("one long image", "qwen3_vl", torch.float32, within=autocast),
    "fsdp2, checkpointing": Case("mixed", "qwen2_5_vl", change=checkpointed, wrap=fsdp),
}
KERNELS = {
    "kernels": Case("images first", "qwen3_vl", torch.float32, impl="triton"),
    "kernels, shared": Case("shared", "qwen2_5_vl", torch.float32, impl="triton"),
}
COMPILED = {
    "compiled": Case("mixed", "qwen3_vl", wrap=compiled),
    "compiled, images first": Case("images first", wrap=compiled),
}
# The groups are of the size of the world but in the cases below.
ON_FOUR = {f"{family}": Case("mixed", family) for family in FAMILIES}
TWO_BY_TWO = {
    "data x context, ddp": Case("mixed", "qwen2_5_vl", wrap=ddp),
    "data x context, fsdp2": Case("mixed", "qwen3_vl", wrap=fsdp),
    "data x context, fsdp2, text beside images": Case("one long image", wrap=fsdp),
    "data x context, Gated DeltaNet": Case("mixed", "qwen3_5", change=checkpointed, wrap=ddp),
}


def step(case, size):
    """(loss, every parameter's gradient) of a step of all ranks, summed up."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = tiny_model(small_config(case.family), dtype=case.dtype)
    place = ContextGroup.of(rank, world, size)
    model = patch_model(case.change(model), case.impl, context=place)
    wrapped = case.wrap(model)
    packs, _ = packs_of(case.rows, case.family)
    packs = packs[rank // size :: world // size]
    batch = PackCollator(model=wrapped, **dict(case.options))(packs)
    counts = {}
    if not case.is_mean:
        count = loss_denominator([batch])
        dist.all_reduce(count)
        counts = {"num_items_in_batch": count}
    is_averaged = case.wrap is ddp or fsdp in (case.wrap, case.change)
    with exactly(case), case.within():
        loss = wrapped(**batch, **counts).loss
        (loss * (world if is_averaged else 1)).backward()
    total = loss.detach().double()
    dist.all_reduce(total)
    grads = {}
    for name, weight in model.named_parameters():
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        grads[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
        if isinstance(grads[name], DTensor):  # of a weight without a gradient
            grads[name] = grads[name].full_tensor()
        if not is_averaged:
            dist.all_reduce(grads[name])
    return total.item(), grads


def different_packs():
    """What ranks say that share no pack, and what they say to a model of another place."""
    rank, size = dist.get_rank(), dist.get_world_size()
    said = []
    for place, rows in ((rank, ("mixed", "text")[rank % 2]), (size - 1 - rank, "text")):
        with pytest.raises(ValueError) as error:
            model = patch_model(tiny_model(small_config()), context=ContextGroup(place, size))
            model(**PackCollator(model=model)(packs_of(rows, "qwen2_vl")[0]))
        said.append(str(error.value))
    return said


def later_packs():
    """What ranks say that share their first pack, and then have packs of other ids, of another length, of other
    weights, and of another image of the same size."""
    rank, spec, said = dist.get_rank(), small_spec("qwen2_vl"), []
    model = patch_model(
        tiny_model(small_config()), context=ContextGroup(rank, dist.get_world_size())
    )
    collate = PackCollator(model=model)
    row = encoded(spec, range(5, 45))
    (shown,) = with_noise([encoded(spec, 1, (4, 4), range(5, 25))])
    weights = np.full(len(row.labels), 1 + rank, np.float32)
    (media,) = shown.media
    media.data.rotate(180 * rank).save(picture := io.BytesIO(), "png")
    batch = collate([row])
    assert model(**batch).loss.isfinite()
    for other in (
        encoded(spec, range(5 + rank, 45 + rank)),
        encoded(spec, range(5, 45 + 6 * rank)),
        dataclasses.replace(row, weights=weights),
        dataclasses.replace(shown, media=(dataclasses.replace(media, data=picture.getvalue()),)),
    ):
        batch = collate([other])
        with pytest.raises(ValueError) as error:
            model(**batch, num_items_in_batch=loss_denominator([batch]))
        said.append(str(error.value))
    with pytest.raises(ValueError) as error:  # as Trainer compares the batches of a step
        compare_batches(model, [collate([row])] * (1 + rank))
    return [*said, str(error.value)]


def bytes_of(family):
    """(bytes that leave this rank in a forward, of the text model's layers and of features; the formulas'
    results)"""
    model = tiny_model(small_config(family))
    model = patch_model(model, context=ContextGroup(dist.get_rank(), dist.get_world_size()))
    batch, found = PackCollator(model=model)(packs_of("images first", family)[0]), {}
    count = bench_context.counted(context_parallel.exchange, found)
    with mock.patch.object(context_parallel, "exchange", count), torch.no_grad():
        model(**batch)
    over, text = batch["mmpack"]["context"], model.config.text_config
    levels = 1 + len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
    return found, {
        "layers": bench_context.exchanged_bytes(text, over["tokens"], over["rank"], 4),
        "features": bench_context.features_bytes(
            over["sent_sizes"], over["rank"], 4, text.hidden_size, levels
        ),
    }


def work(folder, size, *names):
    """One of the ranks: every case, its loss and gradients in a file."""
    torch.set_num_threads(1)
    folder, rank = Path(folder), int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    if not names:
        torch.save(different_packs(), folder / f"said.{rank}.pt")
        torch.save(later_packs(), folder / f"later.{rank}.pt")
        alone = context_parallel.process_group(ContextGroup(0, 1))
        torch.save(compat.timeout_of(alone).total_seconds(), folder / f"timeout.{rank}.pt")
        torch.save([bytes_of(family) for family in FAMILIES], folder / f"bytes.{rank}.pt")
    for name in names or CASES:
        try:
            result = step({**CASES, **KERNELS, **COMPILED, **ON_FOUR, **TWO_BY_TWO}[name], size)
        except Exception:
            print(name)
            traceback.print_exc()
            os._exit(1)
        if rank == 0:
            torch.save(result, folder / f"{name}.pt")
    dist.destroy_process_group()


def exactly(case):
    """Stock rotates a float64 tower in float32: the gradient of a shared image once, that of a row's each time."""
    stays = case.dtype == torch.float64 and (case.family in HYBRIDS or case.rows == "shared")
    return float64_stays() if stays else contextlib.nullcontext()


@functools.cache
def expected(case):
    """The rows alone in stock, or, weighted, the whole pack on one rank."""
    packs, stock = packs_of(case.rows, case.family)
    model = tiny_model(small_config(case.family), dtype=case.dtype)
    if "loss_reduction" in dict(case.options):
        batch = PackCollator(model=patch_model(model), **dict(case.options))(packs)
        return loss_and_grads(model, [batch], np.float64(loss_denominator([batch])))
    if case.dtype == torch.float64:
        model.loss_function = float64_loss
    with exactly(case), case.within():
        return loss_and_grads(case.change(model), stock, supervised(stock))


def supervised(stock):
    return sum(int((inputs["labels"][0, 1:] != -100).sum()) for inputs in stock)


def assert_same(result, case):
    (loss, grads), (exact_loss, exact) = result, expected(as_stock(case))
    if case.rows == "empty":
        assert loss == 0 and not any(grad.any() for grad in grads.values())
        return
    bound = of_loss = TOLERANCE[case.dtype]
    if case.within is autocast or (case.dtype == torch.float32 and case.family in HYBRIDS):
        # twice stock's own error
        truth = as_stock(case)._replace(dtype=torch.float64, within=contextlib.nullcontext)
        stock_loss, stock = exact_loss, exact
        exact_loss, exact = expected(truth)
        bound = 2 * worst_difference(stock, exact)[0]
        of_loss = max(of_loss, 2 * abs(stock_loss / exact_loss - 1))
    assert loss == pytest.approx(exact_loss, rel=of_loss)
    difference, name = worst_difference(grads, exact)
    assert difference <= bound, name


def as_stock(case):
    """The case without what does not matter to stock, so that cases share it."""
    weighted = [option for option in case.options if option[0] == "loss_reduction"]
    change = case.change if case.change in (frozen_tower, lora) else plain
    return case._replace(
        change=change,
        wrap=plain,
        options=tuple(weighted),
        is_mean=False,
        impl="auto",
        within=autocast if case.within is autocast else contextlib.nullcontext,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(work, folder, 2)
    return lambda case: torch.load(folder / f"{case}.pt")


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_that_share_packs_are_rows_alone(case, results):
    assert_same(results(case), CASES[case])


def test_ranks_with_different_packs_are_told(results):
    for rank in range(2):
        different, place = results(f"said.{rank}")
        assert re.search(
            r"the 2 ranks of a context group have parts of different packs \(checksums (\w{8}), (?!\1)\w{8}\)",
            different,
        )
        assert place.startswith(f"global rank {rank} is at place {rank} of its context group of 2")


def test_a_group_waits_as_long_as_the_world(results):
    assert [results(f"timeout.{rank}") for rank in range(2)] == [30, 30]


def test_every_pack_is_compared(results):
    """Ids, lengths, weights and images, and how many packs a step has."""
    of_rank = [results(f"later.{rank}") for rank in range(2)]
    assert of_rank[0] == of_rank[1]
    assert len(of_rank[0]) == 5
    for text in of_rank[0]:
        assert re.search(
            r"different packs \(checksums (\w{8}), (?!\1)\w{8}\); .* \(on_error\)", text
        )


def test_ranks_exchange_what_the_formulas_say(results):
    for rank in range(2):
        for (found, formula), family in zip(results(f"bytes.{rank}"), FAMILIES):
            assert found == formula, family


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cases", "size", "world"),
    [(ON_FOUR, 4, 4), (TWO_BY_TWO, 2, 4), (KERNELS, 2, 2), (COMPILED, 2, 2)],
)
def test_more_ranks(cases, size, world, tmp_path):
    """Four as one group, with fewer key heads than ranks; as two groups beside each other; and our kernels."""
    on_ranks(work, tmp_path, size, *cases, size=world)
    for name, case in cases.items():
        assert_same(torch.load(tmp_path / f"{name}.pt"), case)
