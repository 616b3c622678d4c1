"""The processor's files beside a trained model: what transformers and mmpack read there is what was trained
with."""

import json
from dataclasses import replace

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmpack.data.processor_folder import load_config, load_processor
from mmpack.hf.processor_files import ProcessorFiles

IMAGE = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
LARGE = {"longest_edge": 16_777_216, "shortest_edge": 65_536}
CLIP = {"longest_edge": 25_165_824, "shortest_edge": 4_096}
QWEN3 = {
    "patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "processor_class": "Qwen3VLProcessor",
}  # fmt: skip
LAYOUTS = {  # of published models, and of transformers' own save_pretrained
    "Qwen2-VL": {
        "preprocessor_config.json": {
            **IMAGE, "min_pixels": 3136, "max_pixels": 12_845_056, "processor_class": "Qwen2VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessor",
        },
    },
    "Qwen2.5-VL": {
        "preprocessor_config.json": {
            **IMAGE, "min_pixels": 3136, "max_pixels": 12_845_056, "processor_class": "Qwen2_5_VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessor",
        },
    },
    "Qwen3-VL": {
        "preprocessor_config.json": {
            **QWEN3, "size": LARGE, "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        "video_preprocessor_config.json": {
            **QWEN3, "size": CLIP, "video_processor_type": "Qwen3VLVideoProcessor",
        },
    },
    "saved by transformers": {
        "processor_config.json": {
            "image_processor": {**QWEN3, "size": LARGE, "image_processor_type": "Qwen2VLImageProcessor"},
            "processor_class": "Qwen3VLProcessor",
            "video_processor": {**QWEN3, "size": CLIP, "video_processor_type": "Qwen3VLVideoProcessor"},
        },
    },
    "both": {  # as ms-swift saves Qwen3-VL
        "processor_config.json": {
            "image_processor": {**QWEN3, "size": LARGE, "image_processor_type": "Qwen2VLImageProcessor"},
            "processor_class": "Qwen3VLProcessor",
            "video_processor": {**QWEN3, "size": CLIP, "video_processor_type": "Qwen3VLVideoProcessor"},
        },
        "preprocessor_config.json": {
            **QWEN3, "size": LARGE, "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        "video_preprocessor_config.json": {
            **QWEN3, "size": CLIP, "video_processor_type": "Qwen3VLVideoProcessor",
        },
    },
    "no budget": {"preprocessor_config.json": IMAGE},
}  # fmt: skip


@pytest.mark.parametrize("is_changed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_settings_trained_with_come_back(small_set, tmp_path, layout, is_changed):
    source, saved = tmp_path / "source", tmp_path / "saved"
    source.mkdir()
    saved.mkdir()
    for path in (small_set / "tokenizer").iterdir():
        if "processor" not in path.name:
            (source / path.name).write_bytes(path.read_bytes())
    for name, settings in LAYOUTS[layout].items():
        (source / name).write_text(json.dumps(settings))
    config = load_config(small_set / "config.json")
    spec = load_processor(source, config)[1]
    if is_changed:
        video = replace(
            spec.video, min_pixels=5000, max_pixels=70_000, fps=1.5, min_frames=6, max_frames=32
        )
        spec = replace(spec, min_pixels=4000, max_pixels=60_000, video=video)
    ProcessorFiles(source, spec).save_pretrained(saved)
    assert load_processor(saved, config)[1] == spec
    stock = Qwen2VLImageProcessorPil.from_pretrained(saved)
    assert (stock.size["shortest_edge"], stock.size["longest_edge"]) == (
        spec.min_pixels, spec.max_pixels,
    )  # fmt: skip
    for name in LAYOUTS[layout]:  # all other settings are as they were
        before, after = (json.loads((folder / name).read_text()) for folder in (source, saved))
        assert before.keys() <= after.keys()
        budgets = {name: (spec.min_pixels, spec.max_pixels)}
        if "image_processor" in after:
            video = (spec.video.min_pixels, spec.video.max_pixels)
            budgets = {"image_processor": budgets[name], "video_processor": video}
        elif name.startswith("video"):
            budgets = {name: (spec.video.min_pixels, spec.video.max_pixels)}
        for part, (low, high) in budgets.items():
            found = after.get(part, after)
            size = found.get("size", {"shortest_edge": low, "longest_edge": high})
            assert (size["shortest_edge"], size["longest_edge"]) == (low, high)
            assert found.get("max_pixels", high) == high
    for path in source.iterdir():
        if "processor" not in path.name:
            assert (saved / path.name).read_bytes() == path.read_bytes()


def test_images_alone_leave_the_budget_of_videos(small_set, tmp_path):
    """A spec without videos, as of Qwen2.5-VL without its config: videos keep the published budget."""
    source, saved = tmp_path / "source", tmp_path / "saved"
    source.mkdir()
    saved.mkdir()
    settings = LAYOUTS["Qwen2-VL"]["preprocessor_config.json"]
    for path in (small_set / "tokenizer").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "preprocessor_config.json").write_text(json.dumps(settings))
    spec = load_processor(source)[1]
    ProcessorFiles(source, replace(spec, max_pixels=60_000, video=None)).save_pretrained(saved)
    after = load_processor(saved)[1]
    assert after == replace(spec, max_pixels=60_000)
