"""`mmpack.hf.mmpack_dict` names what real batches hold: every key, and nothing else."""

import dataclasses
import typing
from types import SimpleNamespace

import pytest
import torch
from builders import (
    FAMILIES,
    SMALL_SPEC,
    collator,
    encoded,
    made_up_rows,
    packed,
    small_config,
    tiny_model,
)

from mmpack import ContextGroup, PackedDataset, PackStream
from mmpack.hf import PackCollator, PackingCallback, loss_denominator, patch_model
from mmpack.hf.forward_kwargs import assemble_on_device
from mmpack.hf.mmpack_dict import CompactDict, ContextDict, EveryBatch, MmpackDict, SentDict

HINTS = {
    kind: typing.get_type_hints(kind, include_extras=True)
    for kind in (MmpackDict, CompactDict, ContextDict, SentDict)
}
TEXT = [encoded(SMALL_SPEC, 1, 2, 3), encoded(SMALL_SPEC, 4, 5)]


def check(kind, pack):
    """Keys and values are of the declared types, tensors of the declared dtypes; returns the keys."""
    for name, value in pack.items():
        hint = HINTS[kind][name]
        if typing.get_origin(hint) is typing.Annotated:
            assert value.dtype == hint.__metadata__[0], name
            continue
        options = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
        nested = [option for option in options if option in HINTS]
        if nested and value is not None:
            missing = HINTS[nested[0]].keys() - check(nested[0], value)
            # the model's hook and a Trainer write these
            assert missing <= {"group", "is_compared"}, name
        else:
            known = [option for option in options if option not in nested]
            kinds = tuple(typing.get_origin(option) or option for option in known)
            assert isinstance(value, kinds), name
    return set(pack)


def from_the_collator(family):
    """The dicts of batches of images, videos and text, as floats and bytes, assembled here, there, later."""
    batches = [made_up_rows(family, where)[0] for where in ("host", "device")]
    table_side = collator(family).tower.table_side
    yield from (batch["mmpack"] for batch in batches)
    yield assemble_on_device(batches[1], batches[1]["mmpack"], table_side)[1]
    model = patch_model(tiny_model(small_config(family)))
    pixels = PackCollator(model=model, pixels="uint8", pad_to=64)
    yield pixels([packed([encoded(SMALL_SPEC, 1, (2, 4), 2)], family)])["mmpack"]
    weighted = PackCollator(model=model, loss_reduction="sample")
    sources = [
        dataclasses.replace(encoded(SMALL_SPEC, 1, (2, 4), 2), source=name) for name in ("a", "b")
    ]
    batch = weighted([packed(sources, family)])
    loss_denominator([batch])
    yield batch["mmpack"]
    shared = patch_model(tiny_model(small_config(family)), context=ContextGroup(1, 2))
    yield PackCollator(model=shared)([packed([encoded(SMALL_SPEC, 1, (2, 4), 2)], family)])[
        "mmpack"
    ]
    for item in PackStream(TEXT, None, 30):
        yield collator(family)([item])["mmpack"]


def in_the_model(family):
    """The dict that text layers are given, the fused path's and a watched step's."""
    model, seen = patch_model(tiny_model(small_config(family)), impl="triton"), []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["mmpack"]), with_kwargs=True, prepend=True
    )
    dataset = PackedDataset.from_samples(list(packed(TEXT, family)), 30)
    callback = PackingCallback(dataset, attention_every=1)
    args = SimpleNamespace(device=torch.device("cpu"), process_index=0, should_log=False)
    step = (args, SimpleNamespace(global_step=0, stateful_callbacks={}), None)
    callback.on_train_begin(*step, model=model)
    callback.on_step_begin(*step)
    model(**collator(family)([packed([encoded(SMALL_SPEC, 1, (2, 4), 2, 3)], family)]))
    return seen


def test_the_dict_is_what_batches_hold():
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU here, not in the interpreter")
    found = set()
    for family in FAMILIES[:3]:  # the fourth has the third's tower
        for pack in from_the_collator(family):
            assert EveryBatch.__required_keys__ <= check(MmpackDict, pack)
            found |= set(pack)
    for pack in in_the_model("qwen3_vl"):
        found |= check(MmpackDict, pack)
    assert found == HINTS[MmpackDict].keys()
