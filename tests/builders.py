"""Tiny models, and what stock transformers says about one row on its own."""

import contextlib
import copy
import dataclasses
import functools
import inspect
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, Qwen2_5_VLModel

from mmpack import Encoder, VideoSpec, VisionSpec
from mmpack.errors import MAX_BAD
from mmpack.hf import PackCollator, patch_model
from mmpack.packing.pack_samples import MediaPolicy, PackSamples
from mmpack.packing.pack_source import DroppedSegments
from mmpack.types import EncodedSample, ImageRef, VideoRef

VOCAB = 151_680  # the real tokenizer's 151,657 ids, rounded up

# TrainingArguments that log every step and touch nothing else.
QUIET = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}

# For models of 100 ids.
SMALL_SPEC = VisionSpec(
    min_pixels=1,
    max_pixels=1,
    image_token_id=90,
    video_token_id=91,
    vision_start_token_id=92,
    vision_end_token_id=93,
)


# transformers before its pull request 48669 cuts the seconds of a temporal patch to whole ones.
CUTS_SECONDS = "int(next(second_per_grid_ts))" in inspect.getsource(Qwen2_5_VLModel.get_rope_index)
SECONDS = 2.0 if CUTS_SECONDS else 0.65  # a temporal patch of `encoded`'s videos

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
# With linear attention: a stock model takes no packs, so they are not in what compares packs with stock.
HYBRIDS = ["qwen3_5", "qwen3_5_moe"]
ALIASES = {"cosmos3_omni": "qwen3_vl"}  # the same classes by another name
# What the families' configs have of their own. Windows of 2 x 2 features, so that small images have several.
TOWER = {"hidden_size": 32, "intermediate_size": 48}
VISION = {
    "qwen2_vl": {"embed_dim": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {**TOWER, "window_size": 56, "fullatt_block_indexes": [1]},
    "qwen3_vl": {**TOWER, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]},
}
VISION["qwen3_vl_moe"] = VISION["qwen3_vl"]
VISION["qwen3_5"] = VISION["qwen3_5_moe"] = {**TOWER, "num_position_embeddings": 36}
VISION |= {name: VISION[family] for name, family in ALIASES.items()}
# A text layer more than deepstack has levels: what is added after the last one reaches no loss.
TEXT = {"qwen3_vl": {"head_dim": 8, "num_hidden_layers": 3}}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
TEXT["qwen3_vl_moe"] = TEXT["qwen3_vl"] | EXPERTS
TEXT["qwen3_5"] = {
    "head_dim": 16,
    "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
TEXT["qwen3_5_moe"] = TEXT["qwen3_5"] | EXPERTS | {"shared_expert_intermediate_size": 16}
TEXT |= {name: TEXT[family] for name, family in ALIASES.items()}


def small_spec(family="qwen2_vl"):
    """`SMALL_SPEC` with the family's patches and what videos are to it."""
    is_third = ALIASES.get(family, family).startswith("qwen3")
    video = VideoSpec(
        min_pixels=1,
        max_pixels=1,
        budgets_clip=is_third,
        has_timestamps=is_third,
        tokens_per_second=4 if family == "qwen2_5_vl" else None,
    )
    return dataclasses.replace(SMALL_SPEC, patch_size=16 if is_third else 14, video=video)


def small_config(family="qwen2_vl", **options):
    """A config of 100 ids."""
    return tiny_config(100, vision=small_spec(family), family=family, **options)


def tiny_config(vocab_size=VOCAB, tied=False, hidden=32, vision=None, family="qwen2_vl"):
    """Two or three text layers (GQA 4:2) and two vision layers of a family."""
    vision = vision or VisionSpec(min_pixels=1, max_pixels=1)
    out = "hidden_size" if family == "qwen2_vl" else "out_hidden_size"
    return CONFIG_MAPPING[family](
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_scaling": {"rope_type": "default", "mrope_section": [hidden // 8 - 2, 1, 1]},
            "rope_theta": 10000.0,
            "pad_token_id": 0,
            **TEXT.get(family, {}),
        },
        vision_config={
            "depth": 2,
            "num_heads": 2,
            "patch_size": vision.patch_size,
            **VISION[family],
            out: hidden,
        },
        tie_word_embeddings=tied,
        image_token_id=vision.image_token_id,
        video_token_id=vision.video_token_id,
        vision_start_token_id=vision.vision_start_token_id,
        vision_end_token_id=vision.vision_end_token_id,
    )


def tiny_model(config=None, dtype=torch.float32, attn="sdpa", **config_options):
    """Random weights, large enough that a leak shows; equal for equal configs."""
    config = copy.deepcopy(config or tiny_config(**config_options))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attn)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    if dtype == torch.float64 and config.model_type.endswith("_moe"):
        model.set_experts_implementation("eager")  # torch's grouped products know no float64
    return model.to(dtype).train()


@functools.cache
def collator(family="qwen2_vl", assemble="host", patched=False):
    """For models of `small_config(family)`; for a patched one if it must be."""
    model = tiny_model(small_config(family))
    if patched or assemble == "device" or family in HYBRIDS:
        model = patch_model(model)
    return PackCollator(model=model, assemble=assemble)


def packed(samples, family="qwen2_vl", seed=0):
    """`encoded` samples without videos as an item of a family's patches, with seeded pixels."""
    samples = [dataclasses.replace(sample, vision=small_spec(family)) for sample in samples]
    return with_noise(samples, seed)


def float64_loss(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **kwargs):
    """transformers' causal loss without its cast to float32."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
    logits, target = logits.reshape(-1, vocab_size), shift_labels.reshape(-1)
    return F.cross_entropy(logits, target, reduction="sum") / num_items_in_batch


def stock_processor(tokenizer, max_pixels):
    """transformers' own Qwen2-VL processor with this budget."""
    from benchmarks.peer_collators import (
        processor_of,  # here: ranks run tests as scripts, without a path
    )

    return processor_of(tokenizer, VisionSpec(min_pixels=56 * 56, max_pixels=max_pixels))


def stock_inputs(row, folder, processor):
    """One ShareGPT row as a stock training script feeds it, labels found in the ids."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    chat = []
    if row.get("system"):
        chat.append({"role": "system", "content": row["system"]})
    for turn in row["conversations"]:
        parts = []
        for number, text in enumerate(turn["value"].split("<image>")):
            parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}]
        chat.append({"role": roles[turn["from"]], "content": parts})
    text = processor.apply_chat_template(chat, tokenize=False)
    pictures = [Image.open(folder / path) for path in row.get("images") or []]
    inputs = dict(processor(text=[text], images=pictures or None, return_tensors="pt"))
    inputs.pop("attention_mask")
    inputs["labels"] = stock_labels(inputs["input_ids"])
    return inputs


def renumber(samples, stock):
    """(samples, stock inputs, options of `tiny_config`): the ids that occur, numbered from 0, in their order.

    The head of a tiny model with all of the tokenizer's ids takes nearly all of its time.
    """
    vision = samples[0].vision
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    special = [getattr(vision, name) for name in names]
    used = np.unique(np.concatenate([special, *(sample.input_ids for sample in samples)]))

    def numbers(ids):
        return np.where(ids < 0, ids, np.searchsorted(used, ids)).astype(ids.dtype)

    vision = dataclasses.replace(vision, **dict(zip(names, numbers(np.array(special)).tolist())))
    samples = [
        dataclasses.replace(
            one, input_ids=numbers(one.input_ids), labels=numbers(one.labels), vision=vision
        )
        for one in samples
    ]
    both = ("input_ids", "labels")
    stock = [
        {**row, **{n: torch.from_numpy(numbers(row[n].numpy())) for n in both}} for row in stock
    ]
    return samples, stock, {"vocab_size": len(used), "vision": vision}


def stock_labels(input_ids):
    """Answer and <|im_end|>, found by the turns' special tokens."""
    ids = input_ids[0].tolist()
    labels = [-100] * len(ids)
    for n, token in enumerate(ids):
        if token == 151644 and ids[n + 1] == 77091:  # <|im_start|> assistant \n
            end = ids.index(151645, n)
            labels[n + 3 : end + 1] = ids[n + 3 : end + 1]
    return torch.tensor([labels])


def item_of(samples):
    """An item of a data set that holds these samples."""
    policy = MediaPolicy("raise", MAX_BAD, None, DroppedSegments())
    return PackSamples(samples, sum(sample.num_tokens for sample in samples), policy)


def with_noise(samples, seed=0):
    """`encoded` samples as an item with seeded pictures of their grids, each grid of a video a video."""
    rng, noisy = np.random.default_rng(seed), []

    def picture(height, width):
        p = samples[0].vision.patch_size
        noise = rng.integers(0, 256, (height * p, width * p, 3), dtype=np.uint8)
        return ImageRef("noise", Image.fromarray(noise))

    for sample in samples:
        vision, ids = sample.vision, sample.input_ids
        large = {"max_pixels": 2**31}  # no picture is resized
        video = dataclasses.replace(vision.video, **large) if vision.video else None
        markers = ids[np.isin(ids, (vision.image_token_id, vision.video_token_id))]
        media = []
        for marker, (t, h, w) in zip(markers, sample.grid_thw):
            if marker == vision.image_token_id:
                media.append(picture(h, w))
            else:
                frames = tuple(picture(h, w) for _ in range(t * vision.temporal_patch_size))
                media.append(VideoRef("noise", frames=frames, num_frames=len(frames)))
        vision = dataclasses.replace(vision, min_pixels=1, video=video, **large)
        noisy.append(dataclasses.replace(sample, media=tuple(media), vision=vision))
    return item_of(noisy)


@contextlib.contextmanager
def float64_stays():
    """Casts of float64 to float32 do nothing. Qwen3.5 casts weights, whose gradients would be sums in float32:
    over the tokens of the pack, or over those of each row."""
    to = torch.Tensor.to

    def without(self, *args, **kwargs):
        if self.dtype == torch.float64:
            args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        return to(self, *args, **kwargs)

    def floats(self):
        # Text positions, (3, 1, 1, T) in 5.17: their matrix product with float64 frequencies needs one dtype.
        are_positions = self.dtype == torch.int64 and self.ndim == 4
        return without(self.double() if are_positions else self, torch.float32)

    with (
        mock.patch.object(torch.Tensor, "to", without),
        mock.patch.object(torch.Tensor, "float", floats),
    ):
        yield


def loss_and_grads(model, batches, num_items):
    """Sum of the losses over `num_items`, and every parameter's gradient (zero where it has none)."""
    model.zero_grad()
    total = 0.0
    first = next(model.parameters())
    config = getattr(model, "config", None)
    exact = first.dtype == torch.float64 and "qwen3_5" in getattr(config, "model_type", "")
    with float64_stays() if exact else contextlib.nullcontext():
        for batch in batches:
            loss = model(**batch, num_items_in_batch=torch.tensor(num_items)).loss
            loss.backward()
            total += loss.item()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    return total, grads


def worst_difference(ours, expected):
    """(relative difference, name) of the parameter whose gradient is furthest off, max-norm."""
    assert ours.keys() == expected.keys()
    return max(
        (((ours[n] - g).abs().max() / g.abs().max().clamp_min(1e-300)).item(), n)
        for n, g in expected.items()
        if g.abs().max() > 0 or ours[n].abs().max() > 0
    )


def assert_within_budget(name, ours, torchs, exact):
    """|ours - exact| <= 2 max|torch - exact| + 1e-5 max|exact|, in the max norm."""
    error = (ours.double() - exact).abs().max().item()
    budget = 2 * (torchs.double() - exact).abs().max().item() + 1e-5 * exact.abs().max().item()
    assert error <= budget, f"{name}: {error:.2e} off, {budget:.2e} allowed"


def encoded(vision, *pieces, supervised=True):
    """An EncodedSample from text ids, (grid_h, grid_w) images and (grid_t, grid_h, grid_w) videos in
    reading order. A video's temporal patches are SECONDS long; their times are ids from 94 on."""
    ids, grids, steps = [], [], []
    start, end = vision.vision_start_token_id, vision.vision_end_token_id
    for piece in pieces:
        steps += [1] * (len(grids) - len(steps))
        if isinstance(piece, tuple) and len(piece) == 3:
            if vision.video.has_timestamps:
                runs = [(94 + n % 6, start, vision.video_token_id, end) for n in range(piece[0])]
                ids += [start, *sum(runs, ()), end]
                grids += [(1, *piece[1:])] * piece[0]
            else:
                ids += [start, vision.video_token_id, end]
                grids.append(piece)
                per_second = vision.video.tokens_per_second
                steps.append(per_second * np.float32(SECONDS) if per_second else 1)
        elif isinstance(piece, tuple):
            ids += [vision.vision_start_token_id, vision.image_token_id, vision.vision_end_token_id]
            grids.append((1, *piece))
        else:
            ids += [piece] if isinstance(piece, int) else list(piece)
    ids = np.array(ids, dtype=np.int32)
    steps += [1] * (len(grids) - len(steps))
    special = np.isin(ids, [start, vision.image_token_id, vision.video_token_id, end])
    labels = np.where(special | (not supervised), -100, ids).astype(np.int32)
    return EncodedSample(
        ids,
        labels,
        np.array(grids, dtype=np.int32).reshape(-1, 3),
        (),
        vision,
        temporal_step=np.array(steps, dtype=np.float32) if set(steps) - {1} else None,
    )


def encode_one(sample, tokenizer, vision, **options):
    """A `Sample` encoded."""
    (one,) = Encoder(tokenizer, vision, **options).encode([sample])
    return one


def made_up_rows(family="qwen2_vl", assemble_on="host"):
    """(packed batch, stock inputs of each row, supervised tokens) without any real data."""
    spec = small_spec(family)
    rows = [
        encoded(spec, 1, 2, (2, 4), 3, 4),
        encoded(spec, range(5, 60)),
        encoded(spec, 8, (4, 6), (6, 2), 9, 10),
        encoded(spec, 11, (2, 4, 4), 12, (2, 4), 13, (3, 4, 2), 14),
    ]
    packs = [with_noise([row], seed) for seed, row in enumerate(rows)]
    stock = [stock_of(collator(family)([pack]), spec) for pack in packs]
    batch = collator(family, assemble_on)(packs)
    return batch, stock, batch["shift_labels"].numel()


def shared_rows(family="qwen2_vl", assemble_on="host"):
    """Like `made_up_rows`, but all images of a size are one picture, and all videos one video."""
    spec = small_spec(family)
    rows = [
        encoded(spec, 1, 2, (2, 4), 3, 4),
        encoded(spec, 8, (4, 6), 9, (2, 4), 7, (4, 6), (2, 4), 10),
        encoded(spec, range(5, 40)),
        encoded(spec, 11, (2, 4, 4), 12, (4, 6), 13),
        encoded(spec, 15, (6, 2), 16, (2, 4, 4), 17),
    ]
    item = with_noise(rows)
    known = {}
    samples = [
        dataclasses.replace(
            row,
            media=tuple(
                known.setdefault((type(ref), *grid), ref)
                for ref, grid in zip(row.media, row.grid_thw.tolist())
            ),
        )
        for row in item
    ]
    stock = [stock_of(PackCollator()([item_of([sample])]), spec) for sample in samples]
    batch = collator(family, assemble_on, patched=True)([item_of(samples)])
    for name in ("pixel_values", "pixel_values_videos"):
        assert len(batch[name]) < sum(len(one[name]) for one in stock if name in one)
    return batch, stock, batch["shift_labels"].numel()


def stock_of(alone, spec):
    """A row's batch as the processor's output would be, positions and all left to the model."""
    names = ("input_ids", "labels", "pixel_values", "pixel_values_videos", "image_grid_thw")
    inputs = {name: alone[name] for name in names if name in alone}
    ids = alone["input_ids"]
    types = torch.zeros_like(ids)
    types[ids == spec.image_token_id] = 1
    types[ids == spec.video_token_id] = 2
    inputs["mm_token_type_ids"] = types.int()
    if "video_grid_thw" in alone:
        grids = alone["video_grid_thw"]
        if spec.video.has_timestamps:  # one row a video again; neighbours differ here
            grids, count = grids.unique_consecutive(dim=0, return_counts=True)
            grids = torch.cat([count[:, None], grids[:, 1:]], dim=1)
        inputs["video_grid_thw"] = grids
        if spec.video.tokens_per_second:
            inputs["second_per_grid_ts"] = torch.full((len(grids),), SECONDS)
    return inputs


def to(device, value):
    """A batch on a device."""
    if isinstance(value, dict):
        return {name: to(device, item) for name, item in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value
