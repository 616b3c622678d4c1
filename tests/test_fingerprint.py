"""The fingerprint a resumed run is compared by covers everything a pack is made of, and stays cheap."""

import json
from dataclasses import replace

import numpy as np
import pytest
from builders import SECONDS, encoded, small_spec
from PIL import Image

from mmpack import PackedDataset
from mmpack.store.encoded_store import write_store
from mmpack.types import ImageRef, VideoRef

SPEC = small_spec("qwen2_5_vl")
COUNT, PLACE = 200, 70  # more samples than once were looked at, one of them no one looked at


def samples_of():
    """Text, an image and a video in each."""
    samples = []
    for n in range(COUNT):
        sample = encoded(SPEC, 1, 2 + n % 50, (2, 4), (2, 4, 2), 7)
        media = (
            ImageRef(f"{n}.png", size=(28, 56)),
            VideoRef(f"{n}.mp4", num_frames=8, fps=2.0, size=(56, 28)),
        )
        samples.append(replace(sample, media=media, source="train.json", row=n))
    return samples


def put(array, value, place=1):
    array = array.copy()
    array.flat[place] = value
    return array


def image(sample, **fields):
    return {"media": (replace(sample.media[0], **fields), sample.media[1])}


def video(sample, **fields):
    return {"media": (sample.media[0], replace(sample.media[1], **fields))}


# What a pack is made of -> fields of the one sample that differs; sizes and costs stay.
CHANGES = {
    "an id": lambda s: {"input_ids": put(s.input_ids, 60)},
    "a label": lambda s: {"labels": put(s.labels, -100)},
    "a grid": lambda s: {"grid_thw": np.array([[1, 4, 2], *s.grid_thw[1:]], dtype=np.int32)},
    "a video's time": lambda s: {"temporal_step": put(s.temporal_step, 2 * SECONDS)},
    "an image's path": lambda s: image(s, path="other.png"),
    "a video's path": lambda s: video(s, path="other.mp4"),
    "a video's frames": lambda s: video(s, num_frames=9),
}
IN_MEMORY = {  # no file
    "bytes": lambda s: image(s, data=b"12345678"),
    "a picture": lambda s: image(s, data=Image.new("RGB", (4, 4))),
}


def fingerprint(samples):
    """As JSON gives it back: what a checkpoint holds."""
    return json.loads(json.dumps(PackedDataset.from_samples(samples, 40).fingerprint()))


@pytest.fixture(scope="module")
def samples():
    return samples_of()


@pytest.mark.parametrize("what", [*CHANGES, *IN_MEMORY])
def test_samples_in_memory(samples, what):
    expected = fingerprint(samples)
    assert expected == fingerprint(samples_of())
    other = list(samples)
    other[PLACE] = replace(other[PLACE], **{**CHANGES, **IN_MEMORY}[what](other[PLACE]))
    found = fingerprint(other)
    assert [name for name in expected if found[name] != expected[name]] == [
        "checksum of the samples"
    ]


def test_stores(samples, tmp_path):
    expected = fingerprint(write_store(tmp_path / "same", iter(samples), SPEC))
    assert expected == fingerprint(write_store(tmp_path / "again", iter(samples), SPEC))
    for what, change in CHANGES.items():
        other = list(samples)
        other[PLACE] = replace(other[PLACE], **change(other[PLACE]))
        found = fingerprint(write_store(tmp_path / what, iter(other), SPEC))
        assert [name for name in expected if found[name] != expected[name]] == [
            "checksum of the samples"
        ], what


@pytest.mark.parametrize(("field", "value"), [("image_std", (1.0, 1.0, 1.0)), ("max_pixels", 2)])
def test_the_spec(samples, field, value):
    other = replace(SPEC, **{field: value})
    expected = fingerprint(samples)
    found = fingerprint([replace(sample, vision=other) for sample in samples])
    assert [name for name in expected if found[name] != expected[name]] == [f"the spec's {field}"]


def test_cuts_of_documents():
    def pieces(shift):
        document = encoded(SPEC, range(10, 80))
        dataset = PackedDataset.from_samples([document], 40, on_overflow="split")
        dataset.samples.bounds = dataset.samples.bounds + shift
        return dataset.fingerprint()

    one, other = pieces(0), pieces(1)
    assert [name for name in one if other[name] != one[name]] == ["checksum of their cuts"]
