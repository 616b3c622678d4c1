import dataclasses
import json
import shutil

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mmpack import VisionSpec
from mmpack.data.processor_folder import IMAGE_DEFAULTS, image_settings, load_processor

SPEC = VisionSpec(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)


@settings(max_examples=2000, deadline=None)
@given(
    height=st.integers(1, 9000),
    width=st.integers(1, 9000),
    min_features=st.integers(1, 64),
    extra_features=st.integers(0, 20000),
    patch_size=st.sampled_from([14, 16]),
)
def test_smart_resize_equals_transformers(height, width, min_features, extra_features, patch_size):
    factor = 2 * patch_size
    low = min_features * factor**2
    high = low + extra_features * factor**2
    spec = VisionSpec(min_pixels=low, max_pixels=high, patch_size=patch_size)
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ValueError, match="aspect ratio"):
            spec.smart_resize(height, width)
        return
    expected = smart_resize(height, width, factor, min_pixels=low, max_pixels=high)
    assert spec.smart_resize(height, width) == expected


def test_smart_resize_equals_transformers_on_every_small_size():
    for height in range(1, 130):
        for width in range(1, 130):
            expected = smart_resize(height, width, 28, SPEC.min_pixels, SPEC.max_pixels)
            assert SPEC.smart_resize(height, width) == expected


def test_grids_of_real_sizes_equal_the_processors(shared):
    sizes = np.load(shared / "lengths" / "image_sizes_wh.npz")
    processor = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": SPEC.min_pixels, "longest_edge": SPEC.max_pixels}
    )
    checked = 0
    for name in sizes.files:
        for width, height in np.unique(sizes[name], axis=0)[:400].tolist():
            if max(width, height) / min(width, height) > 200:
                continue
            patches = processor.get_number_of_image_patches(height, width)
            assert np.prod(SPEC.image_grid(height, width)) == patches
            checked += 1
    assert checked > 1000


def test_features_of_grids():
    grids = np.array([[1, 4, 6], [1, 2, 2], [3, 4, 4]], dtype=np.int32)
    assert SPEC.num_features(grids).tolist() == [6, 1, 12]
    assert SPEC.num_features(grids[:0]).tolist() == []


def test_the_spec_is_the_processors(vision):
    assert (vision.min_pixels, vision.max_pixels) == (3136, 1003520)
    assert (vision.patch_size, vision.merge_size, vision.temporal_patch_size) == (14, 2, 2)
    assert (vision.image_token_id, vision.video_token_id) == (151655, 151656)
    assert (vision.vision_start_token_id, vision.vision_end_token_id) == (151652, 151653)
    assert vision.patch_values == 588


@pytest.mark.parametrize("change", [{"do_resize": False}, {"rescale_factor": 1.0}, {"resample": 2}])
def test_a_processor_that_computes_something_else_is_refused(change, tokenizer):
    processor = transformers.Qwen2VLImageProcessorPil(**change)
    with pytest.raises(ValueError, match=f"has {next(iter(change))}="):
        VisionSpec.from_parts(processor, tokenizer)


def test_a_text_tokenizer_is_refused():
    class Tokenizer:
        unk_token_id = 0

        def convert_tokens_to_ids(self, token):
            return 0

    with pytest.raises(ValueError, match=r"no token <\|image_pad\|>"):
        VisionSpec.from_parts(transformers.Qwen2VLImageProcessorPil(), Tokenizer())


def test_a_senseless_budget_is_refused():
    with pytest.raises(ValueError, match="min_pixels must be positive"):
        dataclasses.replace(SPEC, max_pixels=100)


EDGES = {"shortest_edge": 3136, "longest_edge": 100_000}
SAVED = {  # changes of a published file; all that transformers' class makes of them is what we read
    "published": {},
    "the class's defaults": None,
    "older names": {"min_pixels": 784, "max_pixels": 50_176},
    "one older name": {"max_pixels": 50_176},
    "older names and a size": {"size": EDGES, "min_pixels": 784},
    "a size": {"size": EDGES},
    "no size": {"size": None},
    "Qwen3-VL": {
        "patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    },
    "null": {"image_mean": None, "do_rescale": None, "patch_size": None},
    "fields we do not read": {"processor_class": "Qwen2VLProcessor", "focal": 1},
}  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("change", SAVED)
def test_an_image_processors_folder_is_read_as_transformers_reads_it(change, nested, tmp_path):
    """By us, as importing transformers' class takes seconds."""
    saved = {"image_processor_type": "Qwen2VLImageProcessor"}
    if SAVED[change] is not None:
        saved = Qwen2VLImageProcessorPil().to_dict() | SAVED[change]
    if nested:
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": saved}))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"patch_size": 99}))
    else:
        (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "x"}))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    stock = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    ours = image_settings(tmp_path)
    for name in IMAGE_DEFAULTS:
        expected = dict(stock.size) if name == "size" else getattr(stock, name)
        given = getattr(ours, name)
        if name == "size":
            expected = {edge: expected[edge] for edge in EDGES}
            given = {edge: given[edge] for edge in EDGES}
        assert given == expected or list(given) == list(expected), name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no preprocessor_config.json"),
        ("{", "JSONDecodeError"),
        ("[]", "AttributeError"),
        ('{"size": {"height": 224, "width": 224}}', "size has no shortest_edge"),
        ('{"size": 224}', "TypeError"),
    ],
)
def test_a_folder_without_an_image_processor_is_refused(text, said, tmp_path):
    if text is not None:
        (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"has no Qwen-VL image processor: .*{said}"):
        image_settings(tmp_path)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_mean": None}, "image_mean=None, not a number for each channel"),
        ({"image_mean": 0.5}, "image_mean=0.5, not a number for each channel"),
        ({"image_std": [0.5, 0.5]}, r"image_std=\[0.5, 0.5\], not a number for each channel"),
        ({"image_std": [0.5, None, 1]}, ".*None, 1\\], not a number for each channel"),
        ({"image_std": [0.5, 0, 1]}, r"image_std=\[0.5, 0, 1\], not a number above 0"),
        ({"patch_size": None}, "patch_size=None, not a positive integer"),
        ({"merge_size": 0}, "merge_size=0, not a positive integer"),
        ({"size": {"shortest_edge": None, "longest_edge": 9}}, r"size\['shortest_edge'\]=None"),
        ({"size": {"shortest_edge": 9, "longest_edge": "9"}}, r"size\['longest_edge'\]='9', not"),
    ],
)
def test_a_setting_that_is_no_number_is_refused_with_its_name(kind, change, said, shared, tmp_path):
    shutil.copytree(shared / "tokenizer" / "qwen2_vl", tmp_path / "model")
    file = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}[kind]
    saved = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    saved = {name: value for name, value in saved.items() if not name.endswith("_pixels")}
    (tmp_path / "model" / file).write_text(json.dumps(saved | change))
    with pytest.raises(ValueError, match=f"the {kind} processor has {said}.*; fix it in"):
        load_processor(tmp_path / "model")
