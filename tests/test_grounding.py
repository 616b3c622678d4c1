"""Boxes of a picture, in pixels of the resized picture and in thousandths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mmpack import Reader, VisionSpec, relative_boxes, resized_boxes

BUDGET = {"min_pixels": 56 * 56, "max_pixels": 1280 * 28 * 28}
SECOND = VisionSpec(**BUDGET)
THIRD = VisionSpec(min_pixels=65536, max_pixels=1280 * 32 * 32, patch_size=16)


def by_hand(box, height, width, spec):
    """Qwen's rule for one box, in Python's own arithmetic."""
    side = spec.patch_size * spec.merge_size
    new_height, new_width = smart_resize(height, width, side, spec.min_pixels, spec.max_pixels)
    out = []
    for value, new, old in zip(box, (new_width, new_height) * 2, (width, height) * 2):
        out.append(max(0, min(round(value * (new / old)), new - 1)))
    return out


@settings(deadline=None, max_examples=60)
@given(
    st.integers(30, 3000),
    st.integers(30, 3000),
    st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=4),
    st.sampled_from([SECOND, THIRD]),
)
def test_resized_boxes_follow_smart_resize(height, width, shares, spec):
    boxes = np.array(shares) * np.array([width, height, width, height])
    found = resized_boxes(boxes, (height, width), spec.image_grid(height, width), spec)
    assert found.dtype == np.int64
    assert found.tolist() == [by_hand(box, height, width, spec) for box in boxes.tolist()]


def test_a_box_of_a_large_picture_lies_inside_the_resized_one():
    """A report's picture: 3000 x 2000 pixels, resized to 1204 x 812."""
    spec = VisionSpec(min_pixels=56 * 56, max_pixels=1_003_520)
    size = (2000, 3000)
    grid = spec.image_grid(*size)
    height, width = spec.smart_resize(*size)
    assert grid == (1, height // 14, width // 14)
    boxes = [[2400, 1500, 3000, 2000], [0, 0, 1500, 1000]]
    assert resized_boxes(boxes, size, grid, spec).tolist() == [
        [round(2400 * width / 3000), round(1500 * height / 2000), width - 1, height - 1],
        [0, 0, width // 2, height // 2],
    ]
    assert relative_boxes(boxes, size).tolist() == [[800, 750, 1000, 1000], [0, 0, 500, 500]]


def test_points_scales_and_no_boxes():
    grid = SECOND.image_grid(280, 560)
    assert resized_boxes([[560, 140]], (280, 560), grid, SECOND).tolist() == [[559, 140]]
    assert relative_boxes([[560, 140], [1, 1]], (280, 560)).tolist() == [[1000, 500], [2, 4]]
    assert relative_boxes([[140, 140]], (280, 560), scale=100).tolist() == [[25, 50]]
    assert relative_boxes([], (280, 560)).shape == (0, 4)
    assert resized_boxes(np.empty((0, 2)), (280, 560), grid, SECOND).shape == (0, 2)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([1, 2, 3, 4], r"must be \(N, 4\), or points \(N, 2\), got shape \(4,\)"),
        ([[1, 2, 3]], r"got shape \(1, 3\)"),
        (
            [[0, 0, 5, 5], [0, 0, 561, 5]],
            r"box 1 \[0.0, 0.0, 561.0, 5.0\] is outside the picture of 560 x 280",
        ),
        ([[-1, 0, 5, 5]], "box 0 .* is outside"),
        ([[float("nan"), 0]], "box 0 .* is outside"),
    ],
)
def test_boxes_that_cannot_be_meant_are_refused(boxes, message):
    grid = SECOND.image_grid(280, 560)
    for call in (
        lambda: resized_boxes(boxes, (280, 560), grid, SECOND),
        lambda: relative_boxes(boxes, (280, 560)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_rows_with_objects_point_to_the_page():
    row = {
        "messages": [
            {"role": "user", "content": "Where is the sheep?"},
            {"role": "assistant", "content": "<ref-object><bbox>"},
        ],
        "objects": {"ref": ["sheep"], "bbox": [[90, 160, 135, 212]]},
    }
    advice = r".*; write boxes as text, see docs/grounding\.md"
    with pytest.raises(ValueError, match="the row has 'objects', boxes for <ref-object>" + advice):
        list(Reader().read([row]))
    del row["objects"]
    with pytest.raises(ValueError, match="turn 1 has the placeholder <ref-object>"):
        list(Reader().read([row]))
