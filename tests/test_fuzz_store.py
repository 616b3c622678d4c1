"""Damaged stores: each ends in samples or in a ValueError, and none in a crash or another exception."""

import json
import zlib
from dataclasses import replace

import pytest
from builders import encoded, small_spec
from fuzzing import damaged, survives

pytest.importorskip("pyarrow")

from mmpack import PackedDataset
from mmpack.media_options import MediaOptions
from mmpack.packing.assemble import assemble
from mmpack.store.encoded_store import write_store
from mmpack.store.manifest import About, Planning
from mmpack.store.plan_file import save_plan
from mmpack.types import ImageRef, TarMember, VideoRef

ODD = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**40,
    0.5,
    float("nan"),
    "x",
    "\ud800",
    "\0",
    [],
    {},
    [[1]],
)


def write(folder):
    """A store of pieces, images, bytes and videos, two batches of them, with all files there can be."""
    spec = small_spec()
    kinds = [
        encoded(spec, *range(1, 90)),
        encoded(spec, 1, 2, (2, 4), 3, 4),
        encoded(spec, 8, (4, 6), (6, 2), 9, 10),
    ]
    frames = (ImageRef("d.png"), ImageRef("e.png"))
    clip = encoded(spec, 11, (2, 4, 4), 12)
    large = ImageRef("b.png", options=MediaOptions(max_pixels=4096, min_pixels=784))
    member = TarMember("f.png", 512, 99, 7, 2048)
    media = [(), (ImageRef("a.tar", member=member),), (large, ImageRef("c", b"bytes"))]
    samples = [replace(kinds[n % 3], media=media[n % 3], row=n) for n in range(257)]
    size = MediaOptions(resized_height=28, resized_width=56)
    samples.append(replace(clip, media=(VideoRef("d.png", None, frames, 2, 2.0, options=size),)))
    about = About(
        begun=1,
        made_from={"a": "b"},
        files={"/nowhere": (1, 2, "3")},
        media_folders=("/nowhere",),
        planning=Planning(capacity=64, frozen=("vision",)),
    )
    store = write_store(folder, [replace(one, source="rows.json") for one in samples], spec, about)
    dataset = PackedDataset.from_samples(store, 64, on_overflow="split")
    dataset.samples.save(folder)
    save_plan(dataset.plan, folder)
    return folder


def read(folder):
    """All that training and inspecting read of a store, but pixels."""
    dataset = PackedDataset.from_store(folder)
    for number in (0, len(dataset) - 1):
        assemble(dataset[number], pixels=False)
    for number in range(0, len(dataset.samples), 8):
        assert dataset.samples[number].num_tokens >= 0
    dataset.set_epoch(1)
    dataset[0]
    store = getattr(dataset.samples, "samples", dataset.samples)
    list(store.image_paths()), store.rows, store.sources, store.grids()


def spoilt_json(text, rng):
    """A record with a value of another kind, a field less or one more."""
    record = json.loads(text)
    places = list(_places(record))
    holder, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(("more", "../x", ""))] = rng.choice(ODD)
    else:
        holder[key] = rng.choice(ODD)
    return json.dumps(record).encode()


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in list(items):
        yield value, key
        if isinstance(one, (dict, list)):
            yield from _places(one)


@pytest.mark.parametrize("is_sealed", [False, True], ids=["damaged", "hostile"])
@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_whatever_a_store_holds(count, is_sealed, tmp_path, monkeypatch):
    """Hostile: checksums fit, whatever was changed, because all of them are 0."""
    if is_sealed:
        monkeypatch.setattr(zlib, "crc32", lambda data, value=0: 0)
    folder = write(tmp_path / "store")
    read(folder)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    good = {name: good[name] for name in good if name not in ("state.json", "dataset_info.json")}
    names, last = [*sorted(good), *["samples.arrow"] * 3], []

    def mutate(rng):
        for name in last:
            (folder / name).write_bytes(good[name])
        last[:] = [rng.choice(names)]
        content = good[last[0]]
        is_field = last[0].endswith(".json") and rng.random() < 0.7
        content = spoilt_json(content, rng) if is_field else damaged(content, rng)
        (folder / last[0]).write_bytes(content)
        return last[0]

    found = survives(lambda: read(folder), mutate, count)
    assert found["ValueError"] > count / 5, found
    assert found["result"] or not is_sealed, found
