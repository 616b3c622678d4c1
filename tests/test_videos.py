"""Videos: frames and grids are transformers', and one pack holds both kinds. Files: test_video_files.py.

transformers' video processors cannot be imported without torchvision: it is stubbed, and what needs no
pixel (sampling, sizes, expansion, timestamps) is called on them.
"""

import dataclasses
import importlib
import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from builders import (
    CUTS_SECONDS,
    FAMILIES,
    collator,
    encode_one,
    encoded,
    item_of,
    loss_and_grads,
    small_config,
    small_spec,
    stock_of,
    tiny_config,
    tiny_model,
    with_noise,
    worst_difference,
)
from PIL import Image
from test_assemble import same

from mmpack import Encoder, PackedDataset, PackStream, Reader, VideoSpec, VisionSpec, assemble
from mmpack.data import videos
from mmpack.hf import PackCollator, patch_model
from mmpack.packing.prompt import render_prompt
from mmpack.packing.truncate import truncate_sample
from mmpack.store.encoded_store import open_store, write_store
from mmpack.types import ImageRef, Message, Sample, VideoRef

SECOND = VideoSpec(min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28)
THIRD = VideoSpec(
    min_pixels=128 * 32 * 32, max_pixels=768 * 32 * 32, budgets_clip=True, has_timestamps=True
)


def spec_of(video, patch_size=14, **changes):
    return VisionSpec(
        min_pixels=3136, max_pixels=1 << 20, patch_size=patch_size, video=video, **changes
    )


@pytest.fixture(scope="module")
def stock():
    """transformers' (second, third) video processors' modules, torchvision stubbed."""
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2"]
    names.append(f"{names[-1]}.functional")
    stubs = {name: types.ModuleType(name) for name in names if name not in sys.modules}
    for name, stub in stubs.items():
        stub.__path__ = []
        stub.__spec__ = types.SimpleNamespace(name=name, loader=None, origin=None, parent="")
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stubs[parent], child, stub)
    sys.modules |= stubs
    try:
        second, third = (
            importlib.import_module(f"transformers.models.qwen{n}_vl.video_processing_qwen{n}_vl")
            for n in (2, 3)
        )
    finally:
        for name in stubs:
            del sys.modules[name]
    return second, third


def processor_of(n, module):
    """A video processor as its class's defaults have it, without an init that asks for torchvision."""
    kind = getattr(module, f"Qwen{n}VLVideoProcessor")
    processor = kind.__new__(kind)
    processor.num_frames = None
    return processor


LENGTHS = [2, 3, 4, 5, 7, 10, 31, 64, 100, 243, 270, 999, 5000, 40000]


@pytest.mark.smoke
@pytest.mark.parametrize("fps", [1.0, 12.5, 23.976023976023978, 29.916666666666668, 60.0])
def test_sampled_frames_are_transformers(stock, fps):
    from transformers.video_utils import VideoMetadata

    second, third = (processor_of(n, module) for n, module in zip((2, 3), stock))
    for num_frames in LENGTHS:
        metadata = VideoMetadata(total_num_frames=num_frames, fps=fps)
        for wanted in (0.5, 2.0, 3.7):
            ours = dataclasses.replace(SECOND, fps=wanted).sample(num_frames, fps, 2)
            theirs = second.sample_frames(metadata, fps=wanted).numpy()
            assert np.array_equal(ours, theirs[theirs < num_frames])
            assert len(ours) <= SECOND.max_frames + 1
            ours = dataclasses.replace(THIRD, fps=wanted).sample(num_frames, fps, 2)
            theirs = third.sample_frames(metadata, fps=wanted)
            assert np.array_equal(ours, theirs)


@pytest.mark.smoke
def test_grids_are_transformers(stock):
    second, third = stock
    rng = np.random.default_rng(0)
    for _ in range(2000):
        height, width = (int(n) for n in np.exp(rng.uniform(2.5, 7, 2)))
        num_frames = int(rng.integers(2, 770))
        low = int(rng.integers(1, 10**5))
        budget = {"min_pixels": low, "max_pixels": low + int(rng.integers(0, 10**6))}
        ours = spec_of(dataclasses.replace(SECOND, **budget))
        frames = math.ceil(num_frames / 2)
        h, w = second.smart_resize(height, width, 28, **budget)
        assert ours.video_grid(num_frames, height, width) == (frames, h // 14, w // 14)
        ours = spec_of(dataclasses.replace(THIRD, **budget), 16)
        h, w = third.smart_resize(num_frames, height, width, 2, 32, **budget)
        assert ours.video_grid(num_frames, height, width) == (frames, h // 16, w // 16)


def test_the_spec_is_read_off_processor_and_config(stock, tmp_path, shared):
    for n, (module, expected, patch) in enumerate(zip(stock, (SECOND, THIRD), (14, 16))):
        processor = processor_of(n + 2, module)
        assert VideoSpec.from_parts(processor) == expected
        assert processor.patch_size == patch
    config = tiny_config(family="qwen2_5_vl")
    assert VideoSpec.from_parts(processor, config).tokens_per_second == 4
    processor.num_frames = 8
    with pytest.raises(ValueError, match="video processor has num_frames=8"):
        VideoSpec.from_parts(processor)

    folder = shared / "tokenizer" / "qwen2_vl"
    video = Encoder.from_folder(folder).vision.video  # published with one file for both
    assert (video.min_pixels, video.max_pixels) == (3136, 12845056)
    options = {"video": {"fps": 1.0, "max_frames": 8, "max_pixels": None}}
    assert Encoder.from_folder(folder, **options).vision.video == dataclasses.replace(
        video, fps=1.0, max_frames=8
    )
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    settings["processor_class"] = "Qwen2_5_VLProcessor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert Encoder.from_folder(tmp_path).vision.video is None  # the config says what time means
    with pytest.raises(ValueError, match="need the model's config; pass --config"):
        Encoder.from_folder(tmp_path, video={"fps": 1.0})
    assert Encoder.from_folder(tmp_path, config=config).vision.video.tokens_per_second == 4
    size = {"shortest_edge": 4096, "longest_edge": 25165824}
    third = {"video_processor_type": "Qwen3VLVideoProcessor", "size": size, "fps": 2}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(third))
    video = Encoder.from_folder(tmp_path).vision.video
    assert video == dataclasses.replace(THIRD, min_pixels=4096, max_pixels=25165824)


def pictures(folder, count, size=(60, 44)):
    """Frames of noise as files; their names."""
    rng = np.random.default_rng(count)
    names = [f"{count}_{n}.png" for n in range(count)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
            folder / name
        )
    return names


def by_transposition(frames, patch, merge):
    """Patches of (n, height, width, 3) frames as transformers' video processors reshape them."""
    if len(frames) % 2:
        frames = np.concatenate([frames, frames[-1:]])
    t, h, w = len(frames) // 2, frames.shape[1] // patch, frames.shape[2] // patch
    videos = frames.transpose(0, 3, 1, 2).reshape(
        t, 2, 3, h // merge, merge, patch, w // merge, merge, patch
    )
    return videos.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("third", [False, True])
def test_patches_of_a_list_of_frames(tmp_path, count, third):
    video = dataclasses.replace(THIRD if third else SECOND, min_pixels=1, max_pixels=10**6)
    spec = spec_of(video, 16 if third else 14)
    refs = tuple(ImageRef(str(tmp_path / name)) for name in pictures(tmp_path, count))
    probed = videos.probe(VideoRef(refs[0].path, frames=refs))
    assert (probed.num_frames, probed.size) == (count, (44, 60))
    t, h, w = spec.video_grid(count, 44, 60)
    grid_thw = np.array([[1, h, w]] * t if third else [[t, h, w]])
    assert videos.num_grids(probed, spec) == len(grid_thw)
    side = spec.patch_size
    frames = [
        Image.open(ref.path).resize((w * side, h * side), Image.Resampling.BICUBIC) for ref in refs
    ]
    expected = by_transposition(np.stack([np.asarray(frame) for frame in frames]), side, 2)
    assert np.array_equal(videos.load_patches(probed, grid_thw, spec), expected)


ROW = {"conversations": [{"from": "human", "value": "A <video> b <image> c <video>?"},
                         {"from": "gpt", "value": "Yes."}]}  # fmt: skip


FPS = 1.0 if CUTS_SECONDS else 3.0  # of the second list


def sample_of(folder, *, fps=None):
    """A row with two lists of frames and an image between them."""
    second = {"frames": pictures(folder, 3), "fps": fps} if fps else pictures(folder, 3)
    row = {**ROW, "videos": [pictures(folder, 4), second], "images": pictures(folder, 1)}
    return next(iter(Reader(media_dir=folder).read([row])))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_what_transformers_makes_of_it(tmp_path, tokenizer, family, stock):
    """Ids by the processor's own expansion of the rendered chat, positions by `get_rope_index`."""
    config = tiny_config(family=family, vision=spec_of(SECOND, small_spec(family).patch_size))
    video = THIRD if family.startswith("qwen3") else SECOND
    video = dataclasses.replace(
        video, tokens_per_second=getattr(config.vision_config, "tokens_per_second", None)
    )
    spec = spec_of(video, config.vision_config.patch_size)
    sample = sample_of(tmp_path, fps=FPS)
    ours = encode_one(sample, tokenizer, spec)
    pack = assemble([ours], pixels=False)
    assert same(pack, assemble([ours], pixels=False, impl="reference"))

    grids = [spec.video_grid(4, 44, 60), spec.video_grid(3, 44, 60)]
    parts = [{"type": "text", "text": "A "}, {"type": "video"}, {"type": "text", "text": " b "},
             {"type": "image"}, {"type": "text", "text": " c "}, {"type": "video"},
             {"type": "text", "text": "?"}]  # fmt: skip
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    expansions = [expansion(family, grid, FPS if n else 2.0) for n, grid in enumerate(grids)]
    for new in expansions:
        text = text.replace("<|video_pad|>", new.replace("video_pad", "pad"), 1)
    image_grid = spec.image_grid(44, 60)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * (math.prod(image_grid) // 4))
    ids = tokenizer(text.replace("<|pad|>", "<|video_pad|>"))["input_ids"]
    assert pack.input_ids.tolist() == ids

    base = tiny_model(config).model
    ids = torch.tensor([ids])
    kinds = (ids == spec.image_token_id).int() + 2 * (ids == spec.video_token_id).int()
    options = {"second_per_grid_ts": torch.tensor([2 / 2.0, 2 / FPS])} if "2_5" in family else {}
    positions, _ = base.get_rope_index(
        ids,
        mm_token_type_ids=kinds,
        image_grid_thw=torch.tensor([image_grid]),
        video_grid_thw=torch.tensor(grids),
        **options,
    )
    assert torch.equal(torch.from_numpy(pack.position_ids[1:]), positions[:, 0])
    assert not (pack.labels[np.isin(pack.input_ids, [spec.video_token_id])] >= 0).any()
    learned = tokenizer.decode(pack.labels[pack.labels >= 0])
    assert learned == "Yes.<|im_end|>"
    prompt = render_prompt(
        [{"role": "user", "content": "<video>?"}],
        Encoder(tokenizer, spec),
        videos=[[str(tmp_path / f"4_{n}.png") for n in range(4)]],
    )
    assert prompt.video_grid_thw[:, 0].sum() == 2 and not len(prompt.image_grid_thw)


def expansion(family, grid, fps):
    """transformers' `replace_video_token`, called on nothing but what it reads."""
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    kind = Qwen3VLProcessor if family.startswith("qwen3") else Qwen2VLProcessor
    processor = kind.__new__(kind)
    processor.video_processor = types.SimpleNamespace(merge_size=2, temporal_patch_size=2)
    processor.video_token = "<|video_pad|>"
    processor.vision_start_token, processor.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    count = 4 if fps == 2.0 else 3
    metadata = VideoMetadata(total_num_frames=count, fps=fps, frames_indices=list(range(count)))
    inputs = {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata]}
    return processor.replace_video_token(inputs, 0)


@pytest.mark.parametrize("third", [False, True])
def test_a_store_keeps_videos(tmp_path, tokenizer, third):
    spec = spec_of(
        dataclasses.replace(THIRD if third else SECOND, tokens_per_second=None if third else 4)
    )
    sample = sample_of(tmp_path)
    text = Sample((Message("user", ("Hi",)), Message("assistant", ("Ho",))), "x", 1)
    inside = dataclasses.replace(sample.media[0], frames=tuple(
        ImageRef("bytes", open(frame.path, "rb").read()) for frame in sample.media[0].frames
    ))  # fmt: skip
    user = Message("user", (inside, "?"))
    samples = list(
        Encoder(tokenizer, spec).encode([sample, text, Sample((user, sample.messages[1]), "y", 2)])
    )
    store = write_store(tmp_path / "store", samples, spec)
    assert store.vision == spec
    for one, other in zip(samples, store):
        assert same(assemble([one]), assemble([other]))
        assert len(one.media) == len(other.media)
        steps = (one.temporal_step, other.temporal_step)
        assert np.array_equal(*steps) if steps[0] is not None else steps[1] is None
    assert sum(1 for _ in store.image_paths()) == 8
    assert store.num_tokens.tolist() == [sample.num_tokens for sample in samples]
    assert (
        open_store(tmp_path / "store").grids()[0].tolist()
        == np.concatenate([sample.grid_thw for sample in samples]).tolist()
    )


@pytest.mark.parametrize("third", [False, True])
def test_a_video_is_never_cut(tmp_path, tokenizer, third):
    sample = encode_one(sample_of(tmp_path), tokenizer, spec_of(THIRD if third else SECOND))
    vision, lengths = sample.vision, set()
    for capacity in range(1, sample.num_tokens + 1):
        cut = truncate_sample(sample, capacity)
        assert cut.num_tokens <= capacity
        ids = cut.input_ids
        assert (ids == vision.vision_start_token_id).sum() == (
            ids == vision.vision_end_token_id
        ).sum()
        markers = np.isin(ids, [vision.image_token_id, vision.video_token_id]).sum()
        grids = sum(videos.num_grids(ref, vision) for ref in cut.media)
        assert markers == len(cut.grid_thw) == grids
        lengths.add(len(cut.media))
    assert lengths == {0, 1, 2, 3}
    assert assemble([truncate_sample(sample, sample.num_tokens - 1)]).video_pixels is not None


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_videos_alone_and_in_a_batch_of_packs(family):
    """A video-only pack is one call of the tower; packs in a batch are images first, too."""
    spec = small_spec(family)
    rows = [
        encoded(spec, 1, (2, 4, 4), 2, 3),
        encoded(spec, 4, (4, 2), 5, (3, 2, 4), (2, 2), 6),
        encoded(spec, 7, (2, 4), 8),
    ]
    packs = [with_noise([row], seed) for seed, row in enumerate(rows)]
    joined = item_of([sample for pack in packs for sample in pack])
    together, plain = assemble(joined, pixels=False), assemble(rows, pixels=False)
    assert same(dataclasses.replace(together, vision=spec), plain)
    model = patch_model(tiny_model(small_config(family)))
    calls = []
    hook = model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    expected = tiny_model(small_config(family))
    for batch, stock in [
        ([packs[0]], [packs[:1]]),
        ([joined], [[pack] for pack in packs]),
        (packs, [[pack] for pack in packs]),
    ]:
        inputs = collator(family)(batch)
        num_items = inputs["shift_labels"].numel()
        ours = loss_and_grads(model, [inputs], num_items)
        alone = [stock_of(collator(family)(pack), spec) for pack in stock]
        theirs = loss_and_grads(expected, alone, num_items)
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
        assert worst_difference(ours[1], theirs[1])[0] <= 1e-5
        unpatched = loss_and_grads(expected, [inputs], num_items)
        assert unpatched[0] == pytest.approx(theirs[0], rel=1e-5)
    hook.remove()
    assert len(calls) == 3


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_images_and_videos_are_the_floats(family):
    spec = small_spec(family)
    rows = [encoded(spec, 1, (2, 4, 4), 2, (2, 4), 3), encoded(spec, (2, 2, 2), 4)]
    model = patch_model(tiny_model(small_config(family), dtype=torch.float64))
    for pack in (with_noise(rows), with_noise(rows[1:])):
        floats, raw = (
            PackCollator(model=model, pixels=pixels)([pack]) for pixels in ("float32", "uint8")
        )
        assert raw["pixel_values_videos"].dtype == torch.uint8
        losses = [model(**batch).loss.item() for batch in (floats, raw)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_videos_of_another_family_are_refused():
    sample = encoded(small_spec("qwen2_vl"), 1, (2, 2, 2), 3)
    pack = with_noise([sample])
    model = patch_model(tiny_model(small_config("qwen2_5_vl")))
    message = "tokens_per_second=4, but these were encoded with False and None"
    with pytest.raises(ValueError, match=message):
        model(**PackCollator(model=model)([pack]))
    blind = dataclasses.replace(pack[0], vision=dataclasses.replace(sample.vision, video=None))
    with pytest.raises(ValueError, match="the VisionSpec has no video settings"):
        PackCollator()([blind])


@pytest.mark.parametrize("family", FAMILIES)
def test_processor_outputs_with_videos(family):
    spec = small_spec(family)
    rows = [encoded(spec, 1, (2, 4, 4), 2, (2, 4), 3), encoded(spec, 4, (2, 2, 2), 5)]
    packs = [with_noise([row], seed) for seed, row in enumerate(rows)]
    features = [stock_of(collator(family)([pack]), spec) for pack in packs]
    collate = PackCollator(Encoder(None, spec), model=tiny_model(small_config(family)))
    ours, expected = collate(features), collator(family)(packs)
    for name in ("input_ids", "labels", "position_ids", "pixel_values_videos", "video_grid_thw"):
        assert torch.equal(ours[name], expected[name]), name
    assert torch.equal(ours["mmpack"]["feature_index"], expected["mmpack"]["feature_index"])
    if family == "qwen2_5_vl":
        del features[1]["second_per_grid_ts"]
        with pytest.raises(ValueError, match="feature 1 has 1 video but 0 second_per"):
            collate(features)


def test_a_processor_of_time_needs_the_config(tmp_path, tokenizer, stock):
    """Qwen2.5-VL's processor does not know how many positions a second has; the model does."""
    from transformers import Qwen2VLImageProcessorPil

    processor = types.SimpleNamespace(
        image_processor=Qwen2VLImageProcessorPil(),
        video_processor=processor_of(2, stock[0]),
        tokenizer=tokenizer,
        apply_chat_template=tokenizer.apply_chat_template,
        chat_template=tokenizer.chat_template,
        model_input_names=["input_ids", "second_per_grid_ts"],
    )
    assert VisionSpec.from_processor(processor).video is None
    assert VisionSpec.from_processor(types.SimpleNamespace(**vars(processor) | {
        "model_input_names": ["input_ids"]})).video == SECOND  # fmt: skip
    model, samples = tiny_model(tiny_config(family="qwen2_5_vl")), [sample_of(tmp_path)]
    timed = dataclasses.replace(SECOND, tokens_per_second=4)
    assert PackCollator(processor, model=model).encoder.vision.video == timed
    for made in (PackedDataset.from_files, PackStream):
        (pack,) = made(samples, processor, 4096, model.config)
        assert pack[0].vision.video == timed
        with pytest.raises(ValueError, match="the VisionSpec has no video settings"):
            list(made(samples, processor, 4096))


TURNS = ROW["conversations"]
ONE = [{"from": "human", "value": "<video>?"}, TURNS[1]]
WRONG = {
    "two markers, one video": (
        {"conversations": TURNS[:1] + TURNS[1:], "videos": [["4_0.png", "4_1.png"]]},
        "1 <image> marker but 0 images",
    ),
    "no video": ({"conversations": ONE}, "1 <video> marker but 0 videos; add the missing video"),
    "no marker": (
        {"conversations": [{"from": "human", "value": "?"}, TURNS[1]], "videos": ["a.mp4"]},
        "0 <video> markers but 1 video; add a marker",
    ),
    "no frames": ({"conversations": ONE, "videos": [[]]}, "a video is an empty list of frames"),
    "other sizes": (
        {"conversations": ONE, "videos": [["4_0.png", "wide.png"]]},
        "the frames of a video differ in size",
    ),
    "a URL": ({"conversations": ONE, "videos": ["http://x.y/a.mp4"]}, "video http.* is a URL"),
    "outside": ({"conversations": ONE, "videos": ["../a.mp4"]}, "video .* is outside"),
    "a frame outside": ({"conversations": ONE, "videos": [["../a.png"]]}, "image .* is outside"),
    "missing": ({"conversations": ONE, "videos": ["no.mp4"]}, "video .*no.mp4 does not exist"),
    "a number": ({"conversations": ONE, "videos": [7]}, "a video must be a path, bytes or a list"),
    "a rate of nothing": (
        {"conversations": ONE, "videos": [{"frames": ["4_0.png"], "fps": 0}]},
        "the fps of a video must be a number from 0.001 to 10,000, got 0",
    ),
    "both columns": (
        {"conversations": ONE, "videos": [["4_0.png"]], "video": "a.mp4"},
        "both 'videos' and 'video'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rows_are_refused(tmp_path, case):
    pictures(tmp_path, 4)
    Image.new("RGB", (90, 44)).save(tmp_path / "wide.png")
    row, message = WRONG[case]
    with pytest.raises(ValueError, match=f"row 0 of rows: .*{message}"):
        list(Reader(media_dir=tmp_path).read([row]))


def test_markers_parts_and_prepending(tmp_path):
    names = pictures(tmp_path, 4)
    parts = [
        {"type": "text", "text": "<video> as text"},
        {"type": "video", "video": names, "fps": 5},
    ]
    rows = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "?"}, TURNS[1]], "videos": [names]},
    ]
    one, other = Reader(media_dir=tmp_path, missing_marker="prepend").read(rows)
    assert one.messages[0].content[0] == "<video> as text"
    assert (one.videos[0].fps, one.videos[0].num_frames) == (5.0, 4)
    assert isinstance(other.messages[0].content[0], VideoRef) and not other.images


def test_what_is_no_video_says_so(tmp_path, tokenizer):
    sample = sample_of(tmp_path)
    single = dataclasses.replace(sample.media[0], frames=sample.media[0].frames[:1], num_frames=1)
    content = Message("user", (single, "?"))
    alone = Sample((content, sample.messages[1]), "f", 3)
    with pytest.raises(ValueError, match="row 3 of f: .* the video has 1 frame, .* as an image"):
        encode_one(alone, tokenizer, spec_of(SECOND))
    with pytest.raises(ValueError, match="list of 4 frames, at most 2 are allowed"):
        encode_one(
            sample, tokenizer, spec_of(dataclasses.replace(SECOND, min_frames=1, max_frames=2))
        )
    with pytest.raises(ValueError, match="the VisionSpec has no video settings"):
        encode_one(sample, tokenizer, spec_of(None))
