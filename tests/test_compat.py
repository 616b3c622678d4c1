"""What mmpack/hf/compat.py says it leans on is there, and nothing else of transformers' insides is used.

One test for each name, which fails with what breaks; run on a new version of transformers before anything else.
"""

import ast
import contextlib
import copy
import functools
import inspect
import re
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.data_loader import IterableDatasetShard, prepare_data_loader
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from builders import FAMILIES, HYBRIDS, QUIET, small_config, tiny_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import AttentionInterface, AutoConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.vision_utils import get_vision_attention_seqlens

import mmpack
from mmpack import families
from mmpack.hf import compat

pytestmark = pytest.mark.smoke
CHECKS = {}  # as compat.CONTRACTS: (a field of Family that a family must have, or "", check of a stock model)
GRID = torch.tensor([[1, 8, 8]])


def check(name, trait=""):
    """Makes a function of a family the check of a name, for families that have a trait."""

    def add(function):
        CHECKS[name] = trait, function
        return function

    return add


def has(module, *names):
    return all(hasattr(module, name) for name in names)


def takes(function, *names):
    return set(names) <= set(inspect.signature(function).parameters)


@functools.cache
def model_of(family):
    """A stock one; who changes it takes a copy."""
    return tiny_model(small_config(family)).eval()


def tower_of(family):
    return model_of(family).model.visual


@functools.cache
def pixels_of(family):
    config = tower_of(family).config
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return torch.randn(64, values, generator=torch.Generator().manual_seed(0))


def features_of(family, **keywords):
    with torch.no_grad():
        return tower_of(family)(pixels_of(family), grid_thw=GRID, **keywords).pooler_output


def are_heeded(family, **keywords):
    """Whether the tower's features depend on them."""
    return not torch.equal(features_of(family, **keywords), features_of(family))


@check("tower: cu_seqlens, position_ids")
def _(family):
    halves = torch.tensor([0, 32, 64], dtype=torch.int32)
    places = torch.zeros(64, 2, dtype=torch.long)
    return are_heeded(family, cu_seqlens=halves) and are_heeded(family, position_ids=places)


@check("tower: max_seqlen")
def _(family):
    config = copy.deepcopy(tower_of(family).config)
    config._attn_implementation = "flash_attention_2"
    told = get_vision_attention_seqlens(GRID, config, kwargs={"max_seqlen": 7})[1]
    return told == 7 and not are_heeded(family, max_seqlen=64)


@check("tower: window_index, cu_window_seqlens, max_window_seqlen", "has_windows")
def _(family):
    index, cu = compat.get_vision_window_index(GRID, 2, 56, 14)
    return (
        are_heeded(family, window_index=index.flip(0).roll(1), cu_window_seqlens=cu)
        and are_heeded(family, window_index=index, cu_window_seqlens=cu[[0, -1]])
        and not are_heeded(family, max_window_seqlen=16)
    )


@check("tower: interp_indices, interp_weights", "has_position_table")
def _(family):
    index = torch.zeros(64, 4, dtype=torch.int32)
    return are_heeded(family, interp_indices=index, interp_weights=index.float())


@check("tower: permute_input_for_window_attn", "has_windows")
def _(family):
    tower, seen = copy.deepcopy(tower_of(family)), []
    stock = getattr(tower, compat.WINDOW_METHOD)

    def permute(input_tensor, window_index, seq_len):
        seen.append(len(window_index))
        return stock(input_tensor, window_index, seq_len)

    setattr(tower, compat.WINDOW_METHOD, permute)
    tower(pixels_of(family), grid_thw=GRID)
    return seen == [16] * 3  # hidden states, cos, sin


@check("tower: other keywords reach the attention")
def _(family):
    seen = []
    handles = [
        block.attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs.get("mmpack")), with_kwargs=True
        )
        for block in tower_of(family).blocks
    ]
    features_of(family, mmpack="pack")
    for handle in handles:
        handle.remove()
    return seen == ["pack"] * len(handles)


@check("tower: pooler_output, deepstack_features")
def _(family):
    with torch.no_grad():
        output = tower_of(family)(pixels_of(family), grid_thw=GRID)
    levels = getattr(output, "deepstack_features", [])
    expected = 2 if families.FAMILIES[family].has_deepstack else 0
    return len(output.pooler_output) == 16 and [len(x) for x in levels] == [16] * expected


@check("tower: patch_embed, blocks, attn, merger, fullatt_block_indexes")
def _(family):
    tower = tower_of(family)
    sizes = ("in_channels", "temporal_patch_size", "patch_size", "proj")
    names = ["merger", "rotary_pos_emb", "dtype", "device"]
    if families.FAMILIES[family].has_windows:
        names += ["fullatt_block_indexes", "spatial_merge_unit"]
    return (
        has(tower, *names)
        and has(tower.patch_embed, *sizes)
        and isinstance(tower.patch_embed.proj, nn.Conv3d)
        and all(has(block, "attn") for block in tower.blocks)
    )


@check("vision attention: qkv, proj, num_heads, scaling")
def _(family):
    attention = tower_of(family).blocks[0].attn
    return has(attention, "qkv", "proj", "num_heads", "scaling") and takes(
        attention.forward, "cu_seqlens", "position_embeddings"
    )


@check("vision attention: apply_rotary_pos_emb_vision")
def _(family):
    theirs = sys.modules[type(tower_of(family)).__module__].apply_rotary_pos_emb_vision
    q, k, (cos, sin) = torch.randn(9, 2, 8), torch.randn(9, 2, 8), torch.randn(2, 9, 8)
    pairs = zip(compat.apply_rotary_pos_emb_vision(q, k, cos, sin), theirs(q, k, cos, sin))
    return all(torch.equal(ours, stocks) for ours, stocks in pairs)


@check("vision: get_vision_window_index", "has_windows")
def _(family):
    index, cu = compat.get_vision_window_index(GRID, 2, 56, 14)
    return not are_heeded(family, window_index=index, cu_window_seqlens=cu)


@check("vision: get_vision_interpolation_indices_and_weights", "has_position_table")
def _(family):
    index, weights = compat.get_vision_interpolation_indices_and_weights(
        GRID, 6, align_corners=True, spatial_merge_size=2
    )
    return not are_heeded(family, interp_indices=index, interp_weights=weights)


@check("text: the registered attention gets scaling, dropout and mmpack")
def _(family):
    seen = []

    def probe(module, query, key, value, attention_mask, **kwargs):
        seen.append(set(kwargs))
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None

    AttentionInterface.register("mmpack_probe", probe)
    compat.AttentionMaskInterface.register("mmpack_probe", compat.sdpa_mask)
    text = copy.deepcopy(model_of(family).model.language_model)
    text.set_attn_implementation("mmpack_probe")
    positions = torch.arange(3).expand(3, 1, 3)
    text(inputs_embeds=torch.randn(1, 3, 32), position_ids=positions, mmpack={}, use_cache=False)
    return len(seen) == sum(has(layer, "self_attn") for layer in text.layers) and all(
        {"scaling", "dropout", "mmpack"} <= names for names in seen
    )


@check("text: sdpa_attention_forward, sdpa_mask")
def _(family):
    return (
        AttentionInterface()["sdpa"] is compat.sdpa_attention_forward
        and compat.AttentionMaskInterface()["sdpa"] is compat.sdpa_mask
    )


@check("text: q_proj, k_proj, v_proj, o_proj, head_dim, scaling, attention_dropout")
def _(family):
    attention = model_of(family).model.language_model.layers[-1].self_attn
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "attention_dropout"]
    return has(attention, *names, "config", "layer_idx") and hasattr(
        attention, "q_norm"
    ) == family.startswith("qwen3")


@check("text: rotary_emb.inv_freq, attention_scaling, mrope_section")
def _(family):
    base = model_of(family).model
    text, tower = base.language_model.rotary_emb, base.visual.rotary_pos_emb
    sections = getattr(text, "mrope_section", text.config.rope_parameters.get("mrope_section"))
    return (
        has(text, "inv_freq", "attention_scaling")
        and has(tower, "inv_freq", "attention_scaling")
        and sum(sections) == len(text.inv_freq)
        and hasattr(text, "mrope_section")
    )


@check("text: visual_pos_masks, deepstack_visual_embeds", "has_deepstack")
def _(family):
    text = model_of(family).model.language_model
    return takes(text.forward, "visual_pos_masks", "deepstack_visual_embeds")


@check("text: _deepstack_process", "has_deepstack")
def _(family):
    method = getattr(model_of(family).model.language_model, compat.DEEPSTACK_METHOD)
    return takes(method, "hidden_states", "visual_pos_masks", "visual_embeds")


@check("text: linear_attn, layer_types", "has_linear_attention")
def _(family):
    text = model_of(family).model.language_model
    kinds = {
        "linear_attention": ("linear_attn", "self_attn"),
        "full_attention": ("self_attn", "linear_attn"),
    }
    pairs = [(layer, *kinds[kind]) for layer, kind in zip(text.layers, text.config.layer_types)]
    return len({there for _, there, _ in pairs}) == 2 and all(
        has(layer, there) and not has(layer, absent) for layer, there, absent in pairs
    )


@check(
    "text: Gated DeltaNet's kernels get seq_idx, cu_seqlens, cu_seqlens_cpu", "has_linear_attention"
)
def _(family):
    layer = model_of(family).model.language_model.layers[0].linear_attn
    module, got = sys.modules[type(layer).__module__], {}

    def convolution(x, *args, **kwargs):
        got["convolution"] = kwargs
        return x

    def rule(query, key, value, **kwargs):
        got["rule"] = kwargs
        return value, None

    names = {"causal_conv1d_fn": convolution, "torch_chunk_gated_delta_rule": rule}
    with mock.patch.multiple(module, **names):
        layer(torch.randn(1, 5, 32), cu_seq_lens_q="bounds", seq_idx="ids", cu_seqlens_cpu="host")
    given = got["rule"]["cu_seqlens"], got["rule"]["cu_seqlens_cpu"], got["convolution"]["seq_idx"]
    return given == ("bounds", "host", "ids")


@check(
    "text: Gated DeltaNet's projections, conv1d, A_log, dt_bias, norm, out_proj, sizes",
    "has_linear_attention",
)
def _(family):
    layer = model_of(family).model.language_model.layers[0].linear_attn
    modules = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "norm", "out_proj")
    sizes = ("key_dim", "value_dim", "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
    channels = 2 * layer.key_dim + layer.value_dim
    return (
        has(layer, *modules, *sizes)
        and layer.conv1d.bias is None
        and layer.conv1d.weight.shape[:2] == (channels, 1)
        and layer.A_log.shape == layer.dt_bias.shape == (layer.num_v_heads,)
        and [*inspect.signature(layer.norm.forward).parameters] == ["hidden_states", "gate"]
    )


@check("config: _attn_implementation")
def _(family):
    base = copy.deepcopy(model_of(family).model)
    base.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    configs = (base.config, base.language_model.config, base.visual.config)
    return [compat.attention_name(config) for config in configs] == ["sdpa", "eager", "sdpa"]


@check("config: _name_or_path")
def _(family, folder):
    small_config(family).save_pretrained(folder)
    loaded = AutoConfig.from_pretrained(folder)
    return compat.folder_of(loaded) == str(folder) and compat.folder_of(small_config()) is None


@check("inner model: visual, language_model, layers, self_attn")
def _(family):
    base = model_of(family).model
    return (
        has(base, "visual", "language_model", "get_input_embeddings", "get_rope_index")
        and all(has(x, "self_attn") or has(x, "linear_attn") for x in base.language_model.layers)
        and base.config.model_type == family
    )


@check("head: loss_function, _loss_function")
def _(family):
    head = copy.deepcopy(model_of(family))
    stock, own = head.loss_function, [compat.own_loss(head)]
    head.loss_function = print
    own.append(compat.own_loss(head))
    compat.remove_own_loss(head)
    return own == [None, print] and head.loss_function is stock


@check("head: accepts_loss_kwargs")
def _(family, folder):
    head = copy.deepcopy(model_of(family))
    for accepts in (True, False):
        head.accepts_loss_kwargs = accepts
        if trainer_of(folder, head).model_accepts_loss_kwargs != accepts:
            return False
    return True


@check("torch: hook tables")
def _(family):
    linear, called = nn.Linear(1, 1), []
    handles = [
        linear.register_forward_pre_hook(lambda m, a, k: called.append("before"), with_kwargs=True),
        linear.register_forward_hook(lambda m, a, k, o: called.append("after"), with_kwargs=True),
        linear.register_full_backward_pre_hook(lambda m, g: None),
        linear.register_full_backward_hook(lambda m, i, o: None),
    ]
    are_found = len(compat.all_hooks(linear)) == 4 and len(compat.forward_hooks(linear)) == 1
    for handle in handles[:2]:
        compat.remove_hook(linear, handle.id)
    linear(torch.ones(1, 1))
    return are_found and not called and len(compat.all_hooks(linear)) == 2


@check("torch: FSDP2's hooks are of torch.distributed.fsdp")
def _(family):
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState  # the hooks' owner

    hooks = (FSDPState._pre_forward, FSDPState._post_forward)
    return all(hook.__module__.startswith("torch.distributed.fsdp.") for hook in hooks)


@check("torch: all_to_all_single_autograd")
def _(family):
    if not dist.is_available():
        return True
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rows = torch.ones(3, 2, requires_grad=True)
        out = compat.all_to_all(rows, [3], [3], dist.group.WORLD)
        (out * out).sum().backward()
    finally:
        dist.destroy_process_group()
    return type(out) is torch.Tensor and torch.equal(rows.grad, 2 * torch.ones(3, 2))


@check("torch: _device_types, _get_backend, options._timeout")
def _(family):
    if not dist.is_available():
        return True
    options = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", timeout=timedelta(seconds=77), **options)
    try:
        return compat.timeout_of(dist.group.WORLD) == timedelta(seconds=77)
    finally:
        dist.destroy_process_group()


@check("torch: _is_replica")
def _(family):
    linear = nn.Linear(1, 1)
    return compat.is_replica(linear._replicate_for_data_parallel()) and not compat.is_replica(
        linear
    )


@check("checkpoints: get_model_conversion_mapping, rename_source_key")
def _(family):
    name = "model.norm.weight"  # as Qwen2-VL and Qwen2.5-VL are saved
    for rule in compat.get_model_conversion_mapping(model_of(family)):
        if isinstance(rule, compat.WeightRenaming):
            name, _ = rule.rename_source_key(name)
    return family.startswith("qwen3") or name == "model.language_model.norm.weight"


@check("checkpoints: TRAINER_STATE_NAME")
def _(family, folder):
    trainer = trainer_of(folder)
    trainer.args.max_steps, trainer.args.save_strategy = 0, "no"
    trainer.save_state()
    return (folder / compat.TRAINER_STATE_NAME).is_file()


class Reporter(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(logs.pop("value", None))


def trainer_of(folder, model=None, callbacks=()):
    return Trainer(
        model or nn.Linear(1, 1),
        TrainingArguments(str(folder), **QUIET),
        data_collator=lambda items: {"items": items},
        train_dataset=list(range(5)),
        callbacks=list(callbacks),
    )


@check("Trainer: callback_handler.callbacks")
def _(family, folder):
    first, second = Reporter(), Reporter()
    trainer = trainer_of(folder, callbacks=[second])
    compat.callbacks_of(trainer).insert(0, first)
    trainer.log({"value": 1})
    return (first.seen, second.seen) == ([1], [None])


@check("Trainer: train_dataset is read when it trains")
def _(family, folder):
    trainer = trainer_of(folder)
    trainer.train_dataset = [7]
    return [batch["items"] for batch in trainer.get_train_dataloader()] == [[7]]


@check("Trainer: get_eval_dataloader, get_test_dataloader")
def _(family, folder):
    trainer, seen = trainer_of(folder), []
    trainer.get_eval_dataloader = lambda data: seen.append(("evaluate", data)) or []
    trainer.get_test_dataloader = lambda data: seen.append(("predict", data)) or []
    for method in (trainer.evaluate, trainer.predict):
        with contextlib.suppress(Exception):  # a list is no loader
            method([1])
    return seen == [("evaluate", [1]), ("predict", [1])]


@check("Trainer: arguments are read when it trains")
def _(family, folder):
    trainer = trainer_of(folder)
    trainer.args.train_sampling_strategy = "sequential"
    order = [item for batch in trainer.get_train_dataloader() for item in batch["items"]]
    return order == list(range(5)) and has(
        trainer.args, "logging_nan_inf_filter", "ignore_data_skip"
    )


@check("Trainer: _get_num_items_in_batch, model_accepts_loss_kwargs, label_smoother")
def _(family, folder):
    trainer, seen = trainer_of(folder), []
    trainer.model_accepts_loss_kwargs = True
    batches = [{"labels": None, "shift_labels": torch.tensor([[1, -100, 2]])}]
    stock = compat.stock_count(trainer, batches, torch.device("cpu"))
    compat.bind_count(trainer, lambda *given: seen.append(given) or 7)
    found = trainer.get_batch_samples(iter(batches), 1, torch.device("cpu"))
    return (
        (int(stock), found) == (2, (batches, 7))
        and seen == [(batches, torch.device("cpu"))]
        and has(trainer, "label_smoother", "compute_loss_func")
    )


@check("Trainer: get_tp_size; accelerate: parallelism_config.non_data_parallel_size")
def _(family, folder):
    trainer = trainer_of(folder)
    alone = compat.num_replicas(trainer)
    trainer.accelerator = SimpleNamespace(parallelism_config=ParallelismConfig(cp_size=2))
    return (alone, compat.num_replicas(trainer)) == (1, 2)


@check("accelerate: remainder, end_of_dataloader")
def _(family, folder):
    trainer_of(folder)  # makes accelerate's state
    loader = prepare_data_loader(DataLoader(range(5), batch_size=2))
    return [compat.remainder_of(loader) for _ in loader] == [None, None, 1]


@check("accelerate: deals batches to ranks in turn")
def _(family, folder):
    def of_rank(rank):
        loader = DataLoader(list(range(8)), batch_size=2)
        mine = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        return list(mine.batch_sampler)

    return [of_rank(0), of_rank(1)] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


@check("accelerate: base_dataloader")
def _(family, folder):
    loader = trainer_of(folder).get_train_dataloader()
    base = compat.base_loader(loader)
    return type(base) is DataLoader and compat.base_loader(base) is base


class Five(IterableDataset):
    def __iter__(self):
        return iter(range(5))


@check("accelerate: IterableDatasetShard.num_processes, process_index")
def _(family):
    shard = IterableDatasetShard(Five(), num_processes=2, process_index=1)
    part = list(shard)
    compat.take_whole(shard)
    return len(part) == 3 and list(shard) == list(range(5)) and isinstance(shard.dataset, Five)


@check("accelerate: AcceleratedOptimizer.scaler")
def _(family, folder):
    trainer_of(folder)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    scaler = torch.amp.GradScaler("cpu")
    return compat.has_scaler(AcceleratedOptimizer(optimizer, scaler=scaler)) and not (
        compat.has_scaler(AcceleratedOptimizer(optimizer))
    )


@check("accelerate: AcceleratorState.distributed_type")
def _(family, folder):
    trainer_of(folder)
    values = DistributedType.FSDP == "FSDP" and DistributedType.DEEPSPEED == "DEEPSPEED"
    return values and not compat.loads_whole_checkpoints()


def test_every_contract_has_a_check():
    assert list(CHECKS) == list(compat.CONTRACTS)


@pytest.mark.parametrize("name", CHECKS)
def test_what_mmpack_leans_on(name, tmp_path):
    """Of every family that has it; what names no family's model is looked at once."""
    trait, holds = CHECKS[name]
    of_model = not name.startswith(("torch", "Trainer", "accelerate"))
    for family in [*FAMILIES, *HYBRIDS] if of_model else FAMILIES[:1]:
        if not trait or getattr(families.FAMILIES[family], trait):
            arguments = (tmp_path,) if "folder" in inspect.signature(holds).parameters else ()
            assert holds(family, *arguments), f"{family}, {name}: {compat.CONTRACTS[name]}"


def private_names(tree):
    """Names with a leading underscore in a file: attributes but of `self`, whole strings, what is imported."""
    in_text = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") not in ("self", "cls"):
            names.append(node.attr)
        elif isinstance(node, ast.Constant) and id(node) not in in_text:
            names.append(str(node.value))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names += [alias.name for alias in node.names]
    return [name for name in names if re.fullmatch(r"_[a-z]\w*", name)]


def listed_names(tree):
    """Private names in the tables of an adapter, whose tests check each."""
    tables = {"NAMES", "USED", "REPLACED", "OVERRIDDEN"}
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if tables & {getattr(target, "id", "") for target in targets}:
            texts = [v.value for v in ast.walk(node) if isinstance(v, ast.Constant)]
            yield from re.findall(r"\b_[a-z]\w*", " ".join(map(str, texts)))


def test_private_names_of_others_are_in_one_file():
    """In the folders that may know transformers, one that no file there defines is somebody else's. An adapter has
    those of its framework in a table."""
    package = Path(mmpack.__file__).parent
    folders = ("hf", "cli", "integrations")
    files = [path for folder in folders for path in (package / folder).glob("*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.name != "compat.py"}
    made = re.compile(r"(?:def |class |self\.|^)(_[a-z]\w*)(?:\(| = |: )", re.M)
    ours = {name for text in texts.values() for name in made.findall(text)}
    ours |= {"_native", "_mmpack_patch", "_mmpack_loss_hooks", "_mmpack_head"}  # core; attributes
    ours |= {"_loss", "_replace"}  # the end of a metric's name; a method of named tuples
    for path, text in texts.items():
        tree = ast.parse(text)
        listed = set(listed_names(tree)) if path.parent.name == "integrations" else set()
        assert set(private_names(tree)) <= ours | listed, path


def test_inside_imports_are_in_one_file():
    """Of transformers and accelerate others take what their packages show at the top."""
    package = Path(mmpack.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            inside = [n for n in names if n.startswith(("transformers.", "accelerate."))]
            assert not inside or path.name == "compat.py", (path, inside)
