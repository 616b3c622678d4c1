"""The C++ core: equal to the reference, and every entry point refuses what it cannot trust.

`csrc/sanitize.sh` runs this file on a core built with the address and undefined behaviour sanitizers.
A new entry point needs a line in GOOD, and in CONTRADICTIONS what only it can get wrong; those for
pixels, which take any strides, have tests of their own (here and in test_resize.py).
"""

import dataclasses
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_assemble import same

from mmpack import VisionSpec, _native, assemble, plan_packs, reference, types
from mmpack.types import EncodedSample, ImageRef, VideoRef

int32 = partial(np.array, dtype=np.int32)
int64 = partial(np.array, dtype=np.int64)

IMAGE, VIDEO = 7, 6
SPECS = [
    VisionSpec(min_pixels=1, max_pixels=1, merge_size=m, image_token_id=IMAGE, video_token_id=VIDEO)
    for m in (1, 2, 3)
]


def sample(spec, *pieces):
    """Of ids, (id, label) pairs, (t, h, w) grids of images in features, and (t, h, w, step) of videos."""
    ids, labels, grids, steps = [], [], [], []
    for piece in pieces:
        if isinstance(piece, tuple) and len(piece) > 2:
            grids.append((piece[0], piece[1] * spec.merge_size, piece[2] * spec.merge_size))
            steps.append(piece[3] if piece[3:] else 1)
            piece = VIDEO if piece[3:] else IMAGE
        token, label = piece if isinstance(piece, tuple) else (piece, piece)
        ids.append(token)
        labels.append(label)
    return EncodedSample(
        int32(ids),
        int32(labels),
        int32(grids).reshape(-1, 3),
        (),
        spec,
        temporal_step=np.array(steps, dtype=np.float32) if set(steps) - {1} else None,
    )


def with_media(samples, names):
    """The samples, each image or video one of those that `names` names in turn, per grid."""
    names, shown = iter(names), []
    for one in samples:
        markers = one.input_ids[np.isin(one.input_ids, (IMAGE, VIDEO))]
        refs = [ImageRef if marker == IMAGE else VideoRef for marker in markers]
        media = tuple(ref(f"/media/{next(names)}") for ref in refs)
        shown.append(dataclasses.replace(one, media=media))
    return shown


def equal_to_reference(samples):
    return same(assemble(samples, pixels=False), assemble(samples, pixels=False, impl="reference"))


LONG = [*range(8, 28)] * 7
EDGES = {
    "an empty sample": [[]],
    "empty samples": [[], [1, 2], [], [(1, 2, 2)], []],
    "one token": [[1]],
    "an image alone": [[(1, 1, 1)]],
    "an image first": [[(1, 2, 3), 1, 2]],
    "an image last": [[1, 2, (1, 3, 2)]],
    "images side by side": [[(1, 2, 2), (1, 1, 5), 1], [(1, 3, 1), (1, 1, 1)]],
    "nothing supervised": [[(1, -100), (2, -100)], [(3, -100)]],
    "frames": [[1, (3, 2, 2), 2], [(2, 1, 1)]],
    "a video": [[1, (3, 2, 2, 1), 2]],
    "a video before an image": [[(3, 1, 2, 4.5), 1, (1, 2, 2)], [(1, 1, 1), 2, (2, 2, 1, 0.3)]],
    "videos alone": [[(2, 1, 1, 0)], [(1, 1, 1, 1), (5, 1, 2, 1 / 3)]],
    "a long video": [[1, (700, 1, 1, 0.1), 2], [(300, 1, 1, 25.1)]],
    "300 tiny images": [[1, *[(1, 1, 1), 2] * 300]],
    "one huge image": [[1, (1, 90, 91), 2]],
    "a segment of 127": [LONG[:127], LONG[:5]],
    "a segment of 128": [LONG[:128]],
    "segments of 128": [LONG[:128], LONG[:128], [1]],
    "a segment of 129": [[1], LONG[:129], [2]],
    "one id 1,000 times": [[5] * 1000, [(5, -100)] * 33],
    "the largest id": [[2**31 - 1, 0, 2**31 - 1, 2**11, 2**22, 0]],
}


@pytest.mark.parametrize("segments", EDGES.values(), ids=EDGES.keys())
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"merge {spec.merge_size}")
def test_edges_equal_the_reference(segments, spec):
    assert equal_to_reference([sample(spec, *segment) for segment in segments])


def test_text_is_text_whatever_the_merge_size():
    """Its square does not fit 64 bits, which the sanitizers see."""
    spec = dataclasses.replace(SPECS[0], merge_size=1 << 62)
    assert equal_to_reference([sample(spec, 1, 2, 3)])


tokens = st.one_of(
    st.sampled_from([1, 2, 3]),
    st.integers(8, 2**31 - 1),
    st.tuples(st.integers(8, 60), st.just(-100)),
)
grids = st.tuples(st.integers(1, 2), st.integers(1, 12), st.integers(1, 12)) | st.tuples(
    st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.floats(0, 60, width=32)
)
runs = st.one_of(
    st.lists(st.one_of(tokens, grids), max_size=12),
    st.tuples(tokens, st.integers(1, 300)).map(lambda run: [run[0]] * run[1]),
)
segments = st.lists(
    st.lists(runs, max_size=3).map(lambda parts: sum(parts, [])), min_size=1, max_size=8
)


@settings(max_examples=200, deadline=None)
@given(segments=segments, spec=st.sampled_from(SPECS))
def test_ragged_packs_equal_the_reference(segments, spec):
    assert equal_to_reference([sample(spec, *segment) for segment in segments])


@settings(max_examples=100, deadline=None)
@given(segments=segments, spec=st.sampled_from(SPECS), numbers=st.integers(0, 2**32 - 1))
def test_packs_with_shared_images_equal_the_reference(segments, spec, numbers):
    samples = [sample(spec, *segment) for segment in segments]
    names = np.random.default_rng(numbers).integers(0, 2, sum(len(s.grid_thw) for s in samples))
    assert equal_to_reference(with_media(samples, names))


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_real_packs_equal_the_reference(every, realset):
    plan = plan_packs([sample.num_tokens for sample in realset], 8192)
    for pack in range(plan.num_packs)[::every]:
        assert equal_to_reference([realset[n] for n in plan.samples_of(pack)])


def plan_arguments():
    return {
        "num_tokens": int64([60, 50, 40]),
        "capacity": 100,
        "num_patches": int64([8, 0, 12]),
        "patch_capacity": 50,
        "costs": int64([5, 3, 4]),
        "seed": 0,
    }


def samples_arguments():
    return {
        "input_ids": int32([1, VIDEO, 2, IMAGE, 3]),
        "labels": int32([-100, -100, 2, -100, 3]),
        "offsets": int32([0, 3, 5]),
        "grid_thw": int32([[1, 2, 2], [1, 4, 2]]),
        "temporal_step": np.array([2.5, 1], dtype=np.float32),
        "grid_offsets": int32([0, 1, 2]),
        "first_shown": int32([0, 1]),
        "image_id": IMAGE,
        "video_id": VIDEO,
        "merge_size": 2,
    }


# Letters of the arguments above: 6 tokens, 3 features, 2 segments, 2 images, 12 patches.
SHAPES = {
    np.int64: {
        "input_ids": (6,),
        "labels": (6,),
        "position_ids": (4, 6),
        "grid_thw": (2, 3),
        "vision_grid_thw": (2, 3),
        "vision_position_ids": (12, 2),
    },
    np.int32: {
        "cu_seqlens": (3,),
        "segment_ids": (6,),
        "tiles": (2, 4),
        "feature_index": (6,),
        "feature_token": (3,),
        "feature_offsets": (4,),
        "text_order": (3,),
        "text_id_offsets": (4,),
        "supervised_index": (3,),
        "vision_index": (2,),
        "vision_cu_seqlens": (3,),
        "vision_segment_ids": (12,),
        "vision_tiles": (2, 4),
    },
}
OUTLINE = ("supervised_index", "cu_seqlens", "vision_cu_seqlens")
GUARD = 77  # a number around every output, which must not change


def guarded(shape, dtype):
    """An array inside another one."""
    whole = np.full((shape[0] + 8, *shape[1:]), GUARD, dtype)
    return whole[4:-4]


def assert_guards_stand(out):
    for name, array in out.items():
        margins = np.concatenate([array.base[:4], array.base[-4:]])
        assert (margins == GUARD).all(), name


def assemble_arguments():
    out = {
        name: guarded(shape, dtype)
        for dtype, shapes in SHAPES.items()
        for name, shape in shapes.items()
    }
    return {**samples_arguments(), "out": out}


def outline_arguments():
    out = {name: guarded(SHAPES[np.int32][name], np.int32) for name in OUTLINE}
    out["labels"] = guarded((6,), np.int64)
    out["markers"] = guarded((2,), np.int32)
    return {**samples_arguments(), "out": out}


GOOD = {
    "plan": plan_arguments,
    "measure": samples_arguments,
    "assemble": assemble_arguments,
    "outline": outline_arguments,
    "attention_tiles": lambda: {"offsets": int32([0, 3, 300]), "causal": True},
}


def unaligned(array):
    raw = np.frombuffer(b"\0" + array.tobytes(), dtype=np.uint8)[1:]
    return raw.view(array.dtype).reshape(array.shape)


WRONG = {
    "floats": lambda a: a.astype(np.float64),
    "another width": lambda a: a.astype(np.int32 if a.dtype == np.int64 else np.int64),
    "unsigned": lambda a: a.astype(f"u{a.dtype.itemsize}"),
    "booleans": lambda a: a.astype(bool),
    "objects": lambda a: a.astype(object),
    "the other byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "every other element": lambda a: np.repeat(a, 2, axis=0)[::2],
    "backwards": lambda a: a[::-1],
    "not aligned": unaligned,
    "broadcast": lambda a: np.broadcast_to(a.ravel()[0], a.shape),
    "no dimension": lambda a: a.ravel()[0].reshape(()),
    "a dimension more": lambda a: a[None],
    "a list": lambda a: a.tolist(),
    "text": lambda a: "0",
}
WRONG_OUT = {
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "one too few": lambda a: a[:-1].copy(),
    "one too many": lambda a: np.concatenate([a, a[:1]]),
    "nothing": lambda a: None,
}


def arrays_of(arguments):
    """(dict, name) of every array, outputs too."""
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            yield arguments, name
        elif isinstance(value, dict):
            yield from arrays_of(value)


@pytest.mark.parametrize("entry", GOOD)
def test_every_entry_point_is_in_the_table_and_takes_good_arrays(entry):
    entries = {name for name in dir(_native) if callable(getattr(_native, name)) and name[0] != "_"}
    assert entries == {*GOOD, "patchify", "normalize", "resize", "arrow_pixels"}
    getattr(_native, entry)(**GOOD[entry]())


@pytest.mark.parametrize("entry", GOOD)
@pytest.mark.parametrize("wrong", [*WRONG, *WRONG_OUT])
def test_wrong_arrays_are_refused(entry, wrong):
    place = 0
    while True:
        arguments = GOOD[entry]()
        places = [
            (holder, name)
            for holder, name in arrays_of(arguments)
            if wrong in WRONG or holder is arguments.get("out")
        ]
        if place == len(places):
            break
        holder, name = places[place]
        holder[name] = {**WRONG, **WRONG_OUT}[wrong](holder[name])
        # pybind11 says TypeError of what is no array at all
        with pytest.raises((ValueError, TypeError), match=name):
            getattr(_native, entry)(**arguments)
        place += 1


MOST32, MOST64 = 2**31 - 1, 2**63 - 1
CONTRADICTIONS = [
    ("plan", {"num_tokens": int64([-1, 0, 0])}, "must lie in"),
    ("plan", {"num_tokens": int64([101, 0, 0])}, "must lie in"),
    ("plan", {"num_tokens": int64([1, 2])}, "num_patches must be int64 of shape"),
    ("plan", {"num_patches": int64([51, 0, 0])}, "must lie in"),
    ("plan", {"num_patches": int64([-(2**63), 0, 0])}, "must lie in"),
    ("plan", {"costs": int64([1, 2])}, "costs must be int64 of shape"),
    ("plan", {"costs": int64([-1, 0, 1])}, "must lie in"),
    ("plan", {"costs": int64([0, 0, 0])}, "must not all be zero"),
    ("plan", {"costs": int64([2**60, 1, 0])}, "must lie in"),
    ("plan", {"costs": int64([MOST64, MOST64, 0])}, "must lie in"),
    ("plan", {"capacity": 0}, "capacities must be"),
    ("plan", {"capacity": -5, "num_tokens": int64([]), "num_patches": None}, "of shape|must be"),
    ("plan", {"capacity": MOST64}, "capacities must be"),
    ("plan", {"patch_capacity": -1}, "capacities must be"),
    ("plan", {"patch_capacity": MOST64}, "capacities must be"),
    ("plan", {"num_tokens": int64([2**59] * 3), "capacity": 2**60}, "their sum"),
    *[
        (entry, change, message)
        for entry in ("measure", "assemble", "outline")
        for change, message in [
            ({"input_ids": int32([1, IMAGE, 2, IMAGE, -3])}, "must not be negative"),
            ({"labels": int32([1, 2])}, "must have the same length"),
            ({"offsets": int32([])}, "ascend from 0"),
            ({"offsets": int32([0])}, "ascend from 0"),
            ({"offsets": int32([1, 5])}, "ascend from 0"),
            ({"offsets": int32([0, 4])}, "ascend from 0"),
            ({"offsets": int32([0, 6])}, "ascend from 0"),
            ({"offsets": int32([0, 4, 3, 5])}, "ascend from 0"),
            ({"offsets": int32([0, 9, -9, 5])}, "ascend from 0"),
            ({"offsets": int32([0, MOST32, -(2**31), 5])}, "ascend from 0"),
            ({"grid_offsets": int32([])}, "must have the length of offsets"),
            ({"grid_offsets": int32([0, 2])}, "must have the length of offsets"),
            ({"grid_offsets": int32([1, 1, 2])}, "ascend from 0"),
            ({"grid_offsets": int32([0, 1, 3])}, "ascend from 0"),
            ({"grid_offsets": int32([0, 3, 2])}, "ascend from 0"),
            ({"grid_offsets": int32([0, -1, 2])}, "ascend from 0"),
            ({"grid_offsets": int32([0, 2, 2])}, "got 1 image and video markers and 2 grids"),
            ({"input_ids": int32([1, IMAGE, 2, 2, 3])}, "got 0 image and video markers and 1 grid"),
            ({"input_ids": int32([1] * 4 + [IMAGE])}, "got 0 image and video markers and 1 grid"),
            ({"image_id": 4}, "got 0 image and video markers and 1 grid"),
            ({"image_id": -1}, "got 0 image and video markers and 1 grid"),
            ({"image_id": IMAGE + 2**32}, "got 0 image and video markers and 1 grid"),
            ({"grid_thw": int32([[1, 2, 2]])}, "ascend from 0 to the number of grids"),
            ({"grid_thw": int32([[1, 2], [1, 2]])}, "of shape"),
            ({"grid_thw": int32([[1, 2, 2], [0, 2, 2]])}, "must be positive"),
            ({"grid_thw": int32([[1, 2, 2], [1, -2, 2]])}, "must be positive"),
            ({"grid_thw": int32([[1, 2, 2], [1, -2, -2]])}, "must be positive"),
            ({"grid_thw": int32([[1, 2, 2], [1, 3, 2]])}, "multiples of 2, got 1 x 3 x 2"),
            ({"grid_thw": int32([[1, 2, 2], [1, 2, 5]])}, "multiples of 2"),
            ({"grid_thw": int32([[1, 2, 2], [MOST32, 2, 2]])}, "2\\^31 patches"),
            ({"grid_thw": int32([[1, 2, 2], [1, 1 << 16, 1 << 16]])}, "2\\^31 patches"),
            ({"grid_thw": int32([[MOST32, 2**30, 2**30]] * 2)}, "2\\^31 patches"),
            ({"grid_thw": int32([[1, 2**15, 2**15]] * 2)}, "2\\^31 patches"),
            (
                {
                    "grid_thw": int32([[1, 2**15, 2**15]] * 2),
                    "input_ids": int32([1, IMAGE, 2, IMAGE, 3]),
                    "first_shown": int32([0, 0]),
                    "merge_size": 1,
                },
                "2\\^31 tokens",
            ),
            ({"temporal_step": np.float32([1])}, "temporal_step must have one value per grid"),
            ({"first_shown": int32([0])}, "first_shown must have one value per grid"),
            ({"first_shown": int32([0, 2])}, "first_shown must be, for each marker, the first"),
            ({"first_shown": int32([1, 1])}, "first_shown must be, for each marker, the first"),
            ({"first_shown": int32([-1, 1])}, "first_shown must be, for each marker, the first"),
            ({"first_shown": int32([0, -(2**31)])}, "first_shown must be, for each marker"),
            ({"first_shown": int32([0, 0])}, "the first one of the same kind and grid"),
            (
                {
                    "first_shown": int32([0, 0]),
                    "grid_thw": int32([[1, 2, 2]] * 2),
                },
                "the first one of the same kind",
            ),
            (
                {
                    "first_shown": int32([0, 0]),
                    "input_ids": int32([1, IMAGE, 2, IMAGE, 3]),
                },
                "the first one of the same kind and grid",
            ),
            ({"temporal_step": np.float32([-1, 1])}, "temporal_step must not be negative"),
            ({"temporal_step": np.float32([1, np.nan])}, "temporal_step must not be negative"),
            ({"temporal_step": np.float32([np.inf, 1])}, "temporal_step must not be negative"),
            (
                {
                    "grid_thw": int32([[2, 2, 2], [1, 2, 2]]),
                    "temporal_step": np.float32([2e9, 1]),
                },
                "beyond position 2\\^30",
            ),
            ({"video_id": IMAGE}, "image_id and video_id must differ"),
            ({"merge_size": 0}, "merge_size must be positive"),
            ({"merge_size": -2}, "merge_size must be positive"),
            ({"merge_size": MOST64}, "multiples of"),
        ]
    ],
    ("assemble", {"out": {}}, "input_ids must be a numpy array"),
    ("attention_tiles", {"offsets": int32([])}, "ascend from 0"),
    ("attention_tiles", {"offsets": int32([1, 3])}, "ascend from 0"),
    ("attention_tiles", {"offsets": int32([0, 3, 2])}, "ascend from 0"),
    ("attention_tiles", {"offsets": int32([0, -1])}, "ascend from 0"),
]


@pytest.mark.parametrize(("entry", "change", "message"), CONTRADICTIONS)
def test_what_contradicts_itself_is_refused(entry, change, message):
    arguments = {**GOOD[entry](), **change}
    with pytest.raises(ValueError, match=message):
        getattr(_native, entry)(**arguments)


def test_memory_is_not_shared_between_what_is_read_and_written():
    arguments = assemble_arguments()
    arguments["out"]["text_order"] = arguments["out"]["feature_token"]
    with pytest.raises(ValueError, match="text_order must not share memory"):
        _native.assemble(**arguments)
    arguments = assemble_arguments()
    arguments["out"]["cu_seqlens"] = arguments["offsets"]
    with pytest.raises(ValueError, match="cu_seqlens must not share memory"):
        _native.assemble(**arguments)


small = st.one_of(st.integers(-2, 9), st.sampled_from([MOST32, -MOST32, 2**16, 2**30]))


@settings(max_examples=400, deadline=None)
@given(data=st.data(), entry=st.sampled_from(list(GOOD)))
def test_hostile_numbers_raise_or_stay_inside(data, entry):
    arguments = GOOD[entry]()
    for holder, name in list(arrays_of(arguments)):
        if holder is arguments and data.draw(st.booleans()):
            array = holder[name].copy()
            for _ in range(data.draw(st.integers(1, 3))):
                array.flat[data.draw(st.integers(0, array.size - 1))] = data.draw(small)
            holder[name] = array[: data.draw(st.integers(0, len(array)))]
    if entry == "attention_tiles":  # millions of tiles are no error
        assume(not any(arguments["offsets"] > 2**20))
    try:
        getattr(_native, entry)(**arguments)
    except ValueError:
        pass
    assert_guards_stand(arguments.get("out", {}))


def test_the_door_names_the_row():
    spec = SPECS[1]
    good = sample(spec, 1, (1, 1, 1))

    def broken(**change):
        fields = {"input_ids": good.input_ids, "labels": good.labels, "grid_thw": good.grid_thw}
        return [good, EncodedSample(**{**fields, **change}, media=(), vision=spec, row=5)]

    for impl in ("native", "reference"):
        for change, message in [
            ({"input_ids": int32([-1, IMAGE])}, "row 5 of : input_ids must not be negative"),
            ({"input_ids": int64([1, IMAGE])}, "row 5 of : input_ids must be int32 .* got int64"),
            (
                {"input_ids": int32([1, 1])},
                "row 5 of : .* got 0 image and video markers and 1 grid",
            ),
            ({"labels": int32([1])}, "row 5 of : 1 labels but 2 input_ids"),
            (
                {"grid_thw": int32([[1, 3, 2]])},
                "row 5 of : grids must .* multiples of 2, got 1 x 3",
            ),
            ({"grid_thw": int32([[1, 2**30, 4]])}, "row 5 of : a pack must have fewer than 2.31"),
        ]:
            with pytest.raises(ValueError, match=message):
                assemble(broken(**change), pixels=False, impl=impl)
    half = EncodedSample(int32([IMAGE]), int32([-100]), int32([[1, 2**15, 2**15]]), (), spec, "", 6)
    with pytest.raises(ValueError, match="a pack must have fewer than 2.31 patches"):
        assemble([half, half], pixels=False)  # neither alone


def test_the_core_and_python_have_one_schema():
    """The same arrays, dtypes and extents, of the same names as a Pack's fields; the same constants."""
    assert (_native.TILE, _native.MAX_RUN) == (types.TILE, types.MAX_RUN)
    assert _native.PACK_ARRAYS == types.PACK_ARRAYS
    fields = [field.name for field in dataclasses.fields(types.Pack)]
    assert set(types.PACK_ARRAYS) <= set(fields)


def test_tiles_equal_the_reference():
    offsets = int32([0, 0, 5, 5, 140, 600])
    for causal in (True, False):
        expected = reference.attention_tiles(offsets, causal=causal)
        assert np.array_equal(_native.attention_tiles(offsets, causal), expected)


def patches_by_transposition(pixels, patch, merge):
    height, width, channels = pixels.shape
    sides = (height // patch // merge, merge, patch, width // patch // merge, merge, patch)
    blocks = pixels.reshape(*sides, channels).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(blocks).reshape(-1, channels * patch * patch)


@pytest.mark.parametrize("patch", [14, 16, 3, 1])
@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("seen", ["as it is", "backwards", "transposed", "grey", "four channels"])
def test_patches_equal_a_transposition(patch, merge, seen):
    block = patch * merge
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2 * block, 3 * block, 4), dtype=np.uint8)
    pixels = {
        "as it is": pixels[:, :, :3].copy(),
        "backwards": pixels[::-1, ::-1, 2::-1],
        "transposed": pixels[:, :, :3].transpose(1, 0, 2),
        "grey": np.broadcast_to(pixels[:, :, :1], (*pixels.shape[:2], 3)),
        "four channels": pixels,
    }[seen]
    expected = patches_by_transposition(pixels, patch, merge)
    out = guarded(expected.shape, np.uint8)
    _native.patchify(pixels, patch, merge, out)
    assert np.array_equal(out, expected)
    assert_guards_stand({"patches": out})


PIXELS = np.zeros((28, 56, 3), dtype=np.uint8)
PATCHES = np.zeros((8, 588), dtype=np.uint8)
TABLE = np.zeros((3, 256), dtype=np.float32)
VALUES = np.zeros((8, 1176), dtype=np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PIXELS.astype(float), 14, 2, PATCHES), "pixels must be uint8"),
        ((PIXELS[0], 14, 2, PATCHES), "pixels must be uint8"),
        ((PIXELS, 0, 2, PATCHES), "must be positive"),
        ((PIXELS, 14, -2, PATCHES), "must be positive"),
        ((PIXELS, 2**62, 4, PATCHES), "must be positive"),
        ((PIXELS[1:], 14, 2, PATCHES), "multiples of 28, got 27 x 56"),
        ((PIXELS, 14, 3, PATCHES), "multiples of 42"),
        ((PIXELS[:, :, :2], 14, 2, PATCHES), "patches must be uint8 of shape"),
        ((PIXELS, 14, 2, PATCHES, 1), "frame must be from 0 to 0"),
        ((PIXELS, 14, 2, np.zeros((8, 1176), np.uint8), 2), "frame must be from 0 to 1"),
        ((PIXELS, 14, 2, np.zeros((8, 1176), np.uint8), -1), "frame must be from 0 to 1"),
        ((PIXELS, 14, 2, np.zeros((8, 1177), np.uint8), 1), "patches must be uint8 of shape"),
        ((PIXELS, 14, 2, PATCHES[:7]), "patches must be uint8 of shape"),
        ((PIXELS, 14, 2, PATCHES[:, :587]), "patches must be uint8 of shape"),
        ((PIXELS, 14, 2, np.zeros((16, 588), np.uint8)[::2]), "patches must be contiguous"),
        ((PIXELS[:, :, :0], 14, 2, PATCHES[:, :0]), "pixels must have channels"),
        ((np.zeros((0, 0, 2**62), np.uint8), 2**20, 1, PATCHES[:0]), "at most 2.60 bytes"),
        ((np.zeros((0, 0, 2**21), np.uint8), 2**20, 1, PATCHES[:0]), "at most 2.60 bytes"),
        ((PIXELS, 14, 2, PATCHES.astype(np.int8)), "patches must be uint8 of shape"),
        ((PIXELS, 14, 2, np.frombuffer(PATCHES.tobytes(), np.uint8).reshape(8, 588)), "writable"),
    ],
)
def test_wrong_pixels_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        _native.patchify(*arguments)


def test_a_frame_of_a_patch_leaves_the_others_alone():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 28, 56, 3), dtype=np.uint8)
    out = guarded((8, 3 * 588), np.uint8)
    for frame in (2, 0, 1):
        _native.patchify(pictures[frame], 14, 2, out, frame)
    alone = [patches_by_transposition(picture, 14, 2).reshape(8, 3, 196) for picture in pictures]
    assert np.array_equal(out.reshape(8, 3, 3, 196), np.stack(alone, axis=2))
    assert_guards_stand({"patches": out})


def test_no_pixels_are_no_patches():
    _native.patchify(PIXELS[:0], 14, 2, PATCHES[:0])
    steps = np.lib.stride_tricks.as_strided(PIXELS, (0, 0, 3), (2**62, 1, 1))
    _native.patchify(steps, 14, 2, PATCHES[:0])
    nothing = np.zeros((2**60, 0), np.uint8)  # rows, of no bytes: 2^60 times 16 channels
    _native.normalize(nothing, np.zeros((16, 256), np.float32), 1, np.zeros((2**60, 0), np.float32))


def test_floats_are_the_tables():
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (5, 3 * 7), dtype=np.uint8)
    table = rng.random((3, 256), dtype=np.float32)
    out = guarded((5, 3 * 2 * 7), np.float32)
    _native.normalize(patches, table, 2, out)
    for c in range(3):
        for frame in range(2):
            begin = (2 * c + frame) * 7
            floats = table[c][patches[:, 7 * c : 7 * c + 7]]
            assert np.array_equal(out[:, begin : begin + 7], floats)
    assert_guards_stand({"values": out})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PATCHES.astype(float), TABLE, 2, VALUES), "patches must be uint8 of shape"),
        ((PATCHES[:, ::2], TABLE, 2, VALUES), "patches must be contiguous"),
        ((PATCHES, TABLE.astype(float), 2, VALUES), "table must be float32 of shape"),
        ((PATCHES, TABLE[:, :255], 2, VALUES), "table must be float32 of shape"),
        ((PATCHES, TABLE[:0], 2, VALUES), "same number of bytes per channel"),
        ((PATCHES, np.zeros((5, 256), np.float32), 2, VALUES), "same number of bytes"),
        ((PATCHES, TABLE, 0, VALUES), "frames must be positive"),
        ((PATCHES, TABLE, 2**62, VALUES), "frames must be positive"),
        ((np.zeros((0, 3 * 2**60), np.uint8), TABLE, 2**20, VALUES), "at most 2.60 values wide"),
        ((np.zeros((0, 3 * 2**40), np.uint8), TABLE, 2**20, VALUES), "at most 2.60 values wide"),
        ((PATCHES, TABLE, 1, VALUES), "values must be float32 of shape"),
        ((PATCHES, TABLE, 2, VALUES[:-1]), "values must be float32 of shape"),
        ((PATCHES, TABLE, 2, VALUES.astype(float)), "values must be float32 of shape"),
    ],
)
def test_wrong_floats_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        _native.normalize(*arguments)
