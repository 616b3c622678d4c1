"""Assembly on the device: every array equal to the reference's, to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_native import EDGES, SPECS, sample, segments, with_media

from mmpack import _native, plan_packs, reference
from mmpack.ops import assemble_patches, assemble_sequence, attention_tiles
from mmpack.packing.compact import compact
from mmpack.packing.shared_images import first_shown

CPU = torch.device("cpu")


def on(device, *arrays):
    return [torch.from_numpy(array).to(device) for array in arrays]


def arguments_of(pack):
    """The arrays of a compact pack that `assemble_sequence` takes."""
    names = ("input_ids", "offsets", "markers", "marker_thw", "temporal_step", "shown")
    return [getattr(pack, name) for name in names]


def sizes_of(pack):
    names = ("num_placeholders", "num_features", "num_runs", "num_tiles")
    return (len(pack.labels), *(getattr(pack, name) for name in names))


def assembled(pack, device):
    """What the device makes of a compact pack, as arrays by name."""
    tensors = on(device, *arguments_of(pack))
    sizes = sizes_of(pack)
    spec = {"video_id": pack.vision.video_token_id, "merge_size": pack.vision.merge_size}
    made = assemble_sequence(*tensors, sizes, **spec)
    patches = assemble_patches(
        *on(device, pack.vision_grid_thw),
        len(pack.vision_cu_seqlens) - 1,
        int(pack.vision_cu_seqlens[-1]),
        pack.num_vision_tiles,
        merge_size=pack.vision.merge_size,
    )
    made |= {f"vision_{name}": tensor for name, tensor in patches.items()}
    return {name: tensor.cpu().numpy() for name, tensor in made.items()}


def assert_equal_to_the_reference(samples, device):
    known = compact(samples)
    made = assembled(known, device)
    expected = reference.assemble(samples, first_shown(samples))
    names = ("labels", "supervised_index", "grid_thw", "vision_grid_thw")
    named = {name: getattr(known, name) for name in names}
    for name, array in {**made, **named}.items():
        wanted = getattr(expected, name)
        assert array.dtype == wanted.dtype, name
        assert np.array_equal(array, wanted), name
    for name in ("cu_seqlens", "vision_cu_seqlens"):  # the host knows them too
        assert np.array_equal(getattr(known, name), made[name])
    for name in ("max_seqlen", "vision_max_seqlen", "num_images"):
        assert getattr(known, name) == getattr(expected, name)


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge, device):
    is_long = any(word in edge for word in ("long", "huge", "300"))
    for spec in SPECS[1:2] if is_long else SPECS:  # the interpreter's loops are slow
        assert_equal_to_the_reference([sample(spec, *segment) for segment in EDGES[edge]], device)


def test_more_grids_and_segments_than_a_block(device):
    """The outline sums 256 at once."""
    spec = SPECS[1]
    rows = [
        [n % 50 + 8, *[(1, 1, 1 + n % 3)] * (n % 4), *[(1, 2, 1, 2.5)] * (n % 7 == 0)]
        for n in range(300)
    ]
    assert_equal_to_the_reference([sample(spec, *row) for row in rows], device)


def test_images_shown_several_times(device):
    """Within a row, between rows, and further apart than the outline's blocks."""
    pieces = [(1, 2, 3), (2, 1, 2, 0.5), (1, 2, 3), 9, (1, 1, 1), (2, 1, 2, 0.5)]
    rows = [sample(SPECS[1], 8, *pieces[n % 3 :], 10) for n in range(7)]
    for num_names in (1, 3):
        names = np.random.default_rng(num_names).integers(0, num_names, 99)
        assert_equal_to_the_reference(with_media(rows, names), device)
    many = [sample(SPECS[1], 8, *[(1, 1, 1)] * 4) for _ in range(75)]
    assert_equal_to_the_reference(with_media(many, np.arange(300) % 290), device)


def assert_ragged(segments):
    samples = [sample(SPECS[1], *segment) for segment in segments]
    assert_equal_to_the_reference(samples, CPU)


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")


@interpreted
@settings(max_examples=4, deadline=None)
@given(segments=segments)
def test_ragged_packs(segments):
    assert_ragged(segments)


@interpreted
@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(segments=segments)
def test_many_ragged_packs(segments):
    assert_ragged(segments)


@pytest.mark.parametrize(
    ("capacity", "packs"), [(1024, 3), pytest.param(8192, None, marks=pytest.mark.slow)]
)
def test_real_packs(capacity, packs, realset, device):
    """Some in CI, all of them at full length if asked."""
    short = [row for row in realset if row.num_tokens <= capacity]
    plan = plan_packs([row.num_tokens for row in short], capacity)
    for number in range(plan.num_packs)[:packs]:
        assert_equal_to_the_reference([short[n] for n in plan.samples_of(number)], device)


@pytest.mark.gpu
def test_a_long_pack_on_the_gpu():
    spec = SPECS[1]
    rng = np.random.default_rng(0)
    rows = [
        [*rng.integers(8, 151_000, 300).tolist(), *[(1, *rng.integers(4, 20, 2).tolist())] * 2]
        for _ in range(60)
    ]
    assert_equal_to_the_reference([sample(spec, *row) for row in rows], torch.device("cuda"))


@pytest.mark.parametrize("causal", [True, False])
def test_tiles_are_the_cores(causal, device):
    rng = np.random.default_rng(0)
    for _ in range(6):
        lengths = rng.choice([0, 1, 5, 64, 127, 128, 129, 200, 256, 1000], rng.integers(0, 30))
        offsets = np.concatenate([[0], lengths]).cumsum().astype(np.int32)
        expected = _native.attention_tiles(offsets, causal)
        tiles = attention_tiles(*on(device, offsets), len(expected), causal=causal)
        assert np.array_equal(tiles.cpu().numpy(), expected)
    many = np.arange(3000, dtype=np.int32) * 129
    expected = _native.attention_tiles(many, causal)
    if device.type == "cuda":  # a loop of seconds in the interpreter
        tiles = attention_tiles(*on(device, many), len(expected), causal=causal)
        assert np.array_equal(tiles.cpu().numpy(), expected)


def test_nothing_is_asked_of_the_device():
    pack = compact([sample(SPECS[1], *segment) for segment in EDGES["a video before an image"]])
    for name, array in assembled_on_meta(pack).items():
        wanted = getattr(
            reference.assemble([sample(SPECS[1], *s) for s in EDGES["a video before an image"]]),
            name,
        )
        assert array.is_meta
        assert array.shape == wanted.shape, name


def assembled_on_meta(pack):
    made = assemble_sequence(
        *on("meta", *arguments_of(pack)), sizes_of(pack), video_id=pack.vision.video_token_id
    )
    patches = assemble_patches(
        *on("meta", pack.vision_grid_thw),
        len(pack.vision_cu_seqlens) - 1,
        int(pack.vision_cu_seqlens[-1]),
        pack.num_vision_tiles,
    )
    return {**made, **{f"vision_{name}": tensor for name, tensor in patches.items()}}


def test_what_does_not_fit_is_refused(device):
    pack = compact([sample(SPECS[1], 1, (1, 2, 2), 2)])
    ids, offsets, markers, grids, steps, shown = on(device, *arguments_of(pack))
    good = {"sizes": (6, 4, 4, 2, 1), "video_id": 6}
    right = (ids, offsets, markers, grids, steps, shown)
    assert len(assemble_sequence(*right, **good)["input_ids"]) == 6
    for place, wrong, message in [
        (0, ids.long(), "input_ids must be flat int32"),
        (1, offsets.to("meta"), "offsets must be .* on meta"),
        (3, grids.long(), "grid_thw must be flat int32"),
        (3, grids[:0], r"grid_thw must be \(1, 3\) for 1 markers"),
        (4, steps.double(), "temporal_step must be float32"),
        (5, shown.long(), "shown must be flat int32"),
        (5, shown[0], r"shown must be \(1, 3\) for 1 markers"),
    ]:
        with pytest.raises(ValueError, match=message):
            assemble_sequence(*right[:place], wrong, *right[place + 1 :], **good)
    for sizes in [
        (7, 4, 4, 2, 1),
        (6, 3, 3, 2, 1),
        (6, 4, 5, 2, 1),
        (6, 4, 4, -2, 1),
        (6, 4, 4, 2, -1),
    ]:
        with pytest.raises(ValueError, match="sizes do not match: 3 input_ids with 1 markers"):
            assemble_sequence(*right, sizes, video_id=6)
    with pytest.raises(ValueError, match=r"int64 \(I, 3\)"):
        assemble_patches(grids, 1, 4, 1)
    with pytest.raises(ValueError, match="must not be negative"):
        assemble_patches(grids.long(), 1, -4, 1)
    with pytest.raises(ValueError, match="num_tiles must not be negative"):
        attention_tiles(offsets, -1, causal=True)
    if device.type == "cpu":
        import triton

        triton.knobs.runtime.interpret = False
        try:
            with pytest.raises(ValueError, match="needs a CUDA device"):
                attention_tiles(offsets, 1, causal=True)
        finally:
            triton.knobs.runtime.interpret = True


def test_a_compact_pack_has_the_errors_of_assemble():
    with pytest.raises(ValueError, match="at least one sample"):
        compact([])
    with pytest.raises(ValueError, match="different VisionSpecs"):
        compact([sample(spec, 1, 2) for spec in SPECS[:2]])
