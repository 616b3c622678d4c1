"""Images that several rows of a pack show: which are the same, and that each is decoded and encoded once."""

import dataclasses

import numpy as np
import pytest
from builders import small_spec
from PIL import Image

from mmpack.media_options import MediaOptions
from mmpack.packing.shared_images import first_shown, media_keys
from mmpack.types import EncodedSample, ImageRef, VideoRef

SPEC = small_spec()
GRID = (1, 4, 4)


def sample_of(*refs, grids=None, marker=SPEC.image_token_id, vision=SPEC):
    """A sample of these images or videos, with one text token before and after each."""
    grids = [GRID] * len(refs) if grids is None else grids
    ids = np.array([1, *[marker, 2] * len(grids)], dtype=np.int32)
    labels = np.where(ids == marker, -100, ids).astype(np.int32)
    grid_thw = np.array(grids, dtype=np.int32).reshape(-1, 3)
    return EncodedSample(ids, labels, grid_thw, refs, vision, "rows.json", 0)


FILE = ImageRef("/media/a.png")
PICTURE = Image.new("RGB", (28, 28))


@pytest.mark.parametrize(
    "one, other",
    [
        (FILE, ImageRef("/media/a.png", size=(28, 28))),
        (FILE, ImageRef("/media/a.png", options=MediaOptions())),
        (ImageRef("row 1", b"jpeg"), ImageRef("row 2", b"".join([b"jp", b"eg"]))),
        (ImageRef("in memory", PICTURE), ImageRef("in memory", PICTURE)),
    ],
)
def test_two_refs_to_one_image_are_one(one, other):
    assert first_shown([sample_of(one), sample_of(other)]).tolist() == [0, 0]


@pytest.mark.parametrize(
    "other",
    [
        ImageRef("/media/b.png"),
        ImageRef("/media/a.png", b"/media/a.png"),
        ImageRef("/media/a.png", PICTURE),
        ImageRef("/media/a.png", PICTURE.copy()),
        ImageRef("/media/a.png", options=MediaOptions(max_pixels=784)),
        VideoRef("/media/a.png", num_frames=2),
    ],
)
def test_another_file_other_bytes_options_or_kind_is_another_image(other):
    ones = [sample_of(FILE), sample_of(ImageRef("in memory", PICTURE)), sample_of(other)]
    expected = 1 if getattr(other, "data", None) is PICTURE else 2
    assert first_shown(ones).tolist() == [0, 1, expected]


def test_the_same_file_at_another_size_is_another_image():
    ones = [sample_of(FILE, FILE, grids=[GRID, (1, 2, 4)]), sample_of(FILE, grids=[(1, 2, 4)])]
    assert first_shown(ones).tolist() == [0, 1, 1]


def test_images_shared_within_and_between_samples():
    b = ImageRef("/media/b.png")
    ones = [sample_of(FILE, b, FILE), sample_of(), sample_of(b), sample_of(ImageRef("c"), FILE)]
    assert first_shown(ones).tolist() == [0, 1, 0, 1, 4, 0]


def test_a_video_with_timestamps_is_shared_marker_by_marker():
    vision = small_spec("qwen3_vl")
    video = VideoRef("/media/a.mp4", num_frames=6, fps=2.0)
    sample = sample_of(video, grids=[GRID] * 3, marker=vision.video_token_id, vision=vision)
    assert [count for _, count in media_keys(sample)] == [3]
    assert first_shown([sample, sample]).tolist() == [0, 1, 2, 0, 1, 2]
    longer = dataclasses.replace(sample, media=(dataclasses.replace(video, fps=2.5),))
    assert first_shown([sample, longer]).tolist() == [0, 1, 2, 3, 4, 5]


def test_lists_of_frames_are_one_video_if_their_frames_are():
    a, b = (VideoRef("a", frames=(FILE, ImageRef(path)), num_frames=2) for path in "ab")
    of = {"marker": SPEC.video_token_id}
    assert first_shown([sample_of(a, **of), sample_of(b, **of), sample_of(a, **of)]).tolist() == [
        0,
        1,
        0,
    ]


def test_grids_without_references_are_not_shared():
    none = sample_of(grids=[GRID, GRID])
    assert media_keys(none) is None
    assert first_shown([none, sample_of(FILE), none]).tolist() == [0, 1, 2, 3, 4]


def test_a_hash_can_stand_for_the_bytes():
    row = sample_of(ImageRef("row", b"jpeg"))
    (((_, source, *_), _),) = media_keys(row, hash)
    assert source == ("bytes", hash(b"jpeg"))
