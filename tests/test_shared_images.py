"""Images that several rows of a pack show: which are the same, and that each is decoded and encoded once."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from builders import (
    FAMILIES,
    HYBRIDS,
    float64_loss,
    float64_stays,
    loss_and_grads,
    made_up_rows,
    shared_rows,
    small_config,
    small_spec,
    tiny_model,
    to,
    worst_difference,
)
from PIL import Image
from test_assemble import same
from test_device_batches import assert_same, completed

from mmpack import PackedDataset, assemble
from mmpack.cli import inspect
from mmpack.data import images, videos
from mmpack.errors import BadImageError
from mmpack.hf import PackCollator, patch_model
from mmpack.hf.model_patch import use_choice
from mmpack.hf.throughput import PackCounter, TrainedCosts
from mmpack.media_options import MediaOptions
from mmpack.packing.cost import sample_flops
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


def model_of(family, dtype, impl=None):
    model = tiny_model(small_config(family), dtype=dtype)
    if dtype == torch.float64:
        model.loss_function = float64_loss
    return patch_model(model, impl=impl) if impl else model


@pytest.mark.parametrize(
    ("family", "impl", "dtype"),
    [
        *[
            pytest.param(family, "auto", torch.float64, marks=pytest.mark.smoke)
            for family in (*FAMILIES, *HYBRIDS)
        ],
        pytest.param("qwen2_5_vl", "triton", torch.float32, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", "triton", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_the_theorem_on_rows_that_share_images(family, impl, dtype):
    """The rows alone, each with its own copy of every image, in stock transformers; as in `test_matrix`.

    transformers rotates a tower's q and k in float32. Stock rounds the gradient of each copy, a pack rounds their
    sum, so float64 must stay.
    """
    batch, stock, num_items = shared_rows(family)
    with float64_stays() if dtype == torch.float64 else contextlib.nullcontext():
        expected_loss, expected = loss_and_grads(model_of(family, dtype), stock, num_items)
        loss, grads = loss_and_grads(model_of(family, dtype, impl), [batch], num_items)
    tolerance = 1e-10
    if dtype == torch.float32:
        exact = model_of(family, torch.float64)
        exact.load_state_dict(model_of(family, dtype).state_dict())
        single = expected
        _, expected = loss_and_grads(exact, stock, num_items)
        tolerance = max(1e-5, 2 * worst_difference(single, expected)[0])
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    difference, parameter = worst_difference(grads, expected)
    assert difference <= tolerance, parameter
    assert grads[next(name for name in grads if "visual" in name)].abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_assembled_on_the_device_is_the_hosts(family):
    host = shared_rows(family)[0]
    side = model_of(family, torch.float32).config.vision_config
    side = getattr(side, "num_position_embeddings", None)
    made = completed(shared_rows(family, "device")[0], side and int(side**0.5))
    assert_same(made, host)


def test_the_embeddings_kernel_sums_the_gradients_of_shared_images():
    """The only kernel of a step here, in the interpreter; with all kernels: marked slow, above."""
    batch, stock, num_items = shared_rows()
    with float64_stays():
        _, expected = loss_and_grads(model_of("qwen2_vl", torch.float64), stock, num_items)
        model = model_of("qwen2_vl", torch.float64, "auto")
        use_choice(model, {"embedding": {torch.float64: "triton"}}, torch.device("cpu"))
        _, grads = loss_and_grads(model, [batch], num_items)
        _, again = loss_and_grads(model, [batch], num_items)
    difference, parameter = worst_difference(grads, expected)
    assert difference <= 1e-10, parameter
    assert all(torch.equal(grads[name], again[name]) for name in grads)


# -- decoding


@pytest.fixture
def pictures(tmp_path):
    """Two files, a link to the first, and a broken one."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        noise = rng.integers(0, 256, (4 * 14, 4 * 14, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    return {path.stem: ImageRef(str(path)) for path in tmp_path.iterdir()}


@pytest.fixture
def decoded(monkeypatch):
    """The paths of images and videos that are decoded, in order."""
    paths = []
    for module in (images, videos):
        load = module.load_patches

        def counted(ref, *args, load=load):
            paths.append(ref.path)
            return load(ref, *args)

        monkeypatch.setattr(module, "load_patches", counted)
    return paths


def small_items(*samples, on_bad_image="drop", folders=None):
    """The samples as the item of a data set, and the data set."""
    vision = dataclasses.replace(SPEC, min_pixels=1, max_pixels=2**31)
    samples = [dataclasses.replace(one, vision=vision) for one in samples]
    dataset = PackedDataset.from_samples(samples, 1000)
    dataset.on_bad_image = on_bad_image
    dataset.media_folders = folders
    return dataset[0], dataset


def test_a_shared_image_is_decoded_once(pictures, decoded):
    a, b = pictures["a"], pictures["b"]
    data = open(a.path, "rb").read()
    inside = [ImageRef(f"in row {n}", data[:1] + data[1:]) for n in range(2)]
    item, _ = small_items(sample_of(b, a), sample_of(a, inside[0], a), sample_of(inside[1], b))
    pack, alone = assemble(item), assemble(item, share_images=False)
    shown = [b.path, a.path, inside[0].path]
    order = [ref.path for one in item for ref in one.media]
    assert decoded[:3] == list(dict.fromkeys(p.replace("row 1", "row 0") for p in order))
    assert sorted(decoded[:3]) == sorted(shown) and decoded[3:] == order
    assert len(pack.pixels) == 3 * 16 and len(alone.pixels) == 7 * 16
    by_grid = pack.pixels.reshape(3, 16, -1)[pack.vision_index]
    assert np.array_equal(by_grid, alone.pixels.reshape(7, 16, -1))
    for name in ("position_ids", "labels", "grid_thw", "cu_seqlens"):  # as they are
        assert np.array_equal(getattr(pack, name), getattr(alone, name))


def test_a_shared_video_is_decoded_once(decoded):
    vision = dataclasses.replace(small_spec(), min_pixels=1, max_pixels=2**31)
    vision = dataclasses.replace(
        vision, video=dataclasses.replace(vision.video, max_pixels=2**31, min_pixels=1)
    )
    noise = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)
    frames = tuple(ImageRef("frame", Image.fromarray(one)) for one in noise)
    video = VideoRef("a list", frames=frames, num_frames=2)
    of = {"marker": vision.video_token_id, "vision": vision}
    samples = [sample_of(video, **of), sample_of(video, video, **of)]
    pack, alone = assemble(samples), assemble(samples, share_images=False)
    assert len(decoded) == 1 + 3
    assert np.array_equal(np.tile(pack.video_pixels, (3, 1)), alone.video_pixels)


def test_every_row_with_a_bad_image_is_dropped(pictures, decoded, caplog):
    """Also one of which another row shows a good image: it is decoded for that one."""
    a, b, broken = (pictures[name] for name in ("a", "b", "broken"))
    rows = [
        sample_of(a, broken),
        sample_of(b, a),
        sample_of(broken),
        sample_of(a),
        sample_of(broken, b),
    ]
    item, dataset = small_items(*rows)
    pack = assemble(item)
    kept = [one for one in item if broken not in one.media]
    assert len(kept) == 2 and dataset.num_dropped_segments == 3
    assert sum("broken.png cannot be" in text for text in caplog.messages) == 3
    assert decoded.count(broken.path) == 1
    expected = assemble(kept)
    assert same(pack, expected)
    assert len(expected.pixels) == 2 * 16
    raising, _ = small_items(*rows, on_bad_image="raise")
    with pytest.raises(BadImageError, match=r"row 0 of rows.json: image .*broken.png cannot be"):
        assemble(raising)


def test_a_shared_image_must_be_in_the_folders_of_every_row(pictures, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    row = sample_of(pictures["a"])
    good, _ = small_items(row, on_bad_image="raise", folders=[tmp_path])
    bad, _ = small_items(row, on_bad_image="raise", folders=[tmp_path / "elsewhere"])
    assert len(assemble([*good, *good]).pixels) == 16
    collate = PackCollator(model=model_of("qwen2_vl", torch.float32, "auto"))
    assert len(collate([good, good])["pixel_values"]) == 16
    for order in ([good, bad], [bad, good]):
        with pytest.raises(BadImageError, match="a.png is outside .*elsewhere"):
            collate(order)


# -- batches


def test_only_a_patched_model_gets_shared_images(pictures):
    item, _ = small_items(sample_of(pictures["a"], pictures["b"]), sample_of(pictures["a"]))
    model = model_of("qwen2_vl", torch.float32)
    for collate in (PackCollator(), PackCollator(model=model)):
        batch = collate([item])
        assert len(batch["pixel_values"]) == batch["image_grid_thw"].prod(1).sum() == 3 * 16
    for assembled in ("host", "device"):
        batch = PackCollator(model=patch_model(model), assemble=assembled)([item])
        assert len(batch["pixel_values"]) == batch["mmpack"]["num_patches"] == 2 * 16
        assert batch["image_grid_thw"].tolist() == [list(GRID)] * 3  # one per marker, as before
        assert batch["mmpack"]["grid_is_new"] == (True, True, False)


def test_a_shared_image_counts_once(pictures):
    """Patches and FLOPs of the tower; those of the text count every segment."""
    model = model_of("qwen2_vl", torch.float32, "auto")
    rows = [sample_of(pictures["a"]), sample_of(pictures["a"], pictures["b"])]
    counted = []
    for kept in (rows, rows[1:], [sample_of(pictures["link"]), rows[1]]):
        counter = PackCounter(TrainedCosts(model, model.model))
        counter.begin_step()
        collate = PackCollator(model=model, assemble="device")
        counter.count([collate([small_items(*kept)[0]])["mmpack"]])
        counted.append(counter._seen)
    shared, alone, other = counted
    assert (shared.patches, alone.patches, other.patches) == (32, 32, 48)
    assert shared.tokens == other.tokens == alone.tokens + rows[0].num_tokens
    tower = sample_flops(model.config, [0], [0], [GRID], [0, 1])
    assert other.useful_flops - shared.useful_flops == tower


def test_inspect_and_notebooks_tell_shared_images(pictures):
    item, dataset = small_items(sample_of(pictures["a"], pictures["b"]), sample_of(pictures["a"]))
    pack = assemble(item)
    assert "3 images, 2 of them distinct)" in repr(pack)
    shown = pack._repr_html_()
    assert shown.count("<img") == 2 and "not shown" not in shown
    view = inspect.view_pack(dataset, 0)
    names = {(medium.segment, medium.name): medium.is_shared for medium in view.media}
    segment = next(n for n, one in enumerate(view.samples) if len(one.media) == 1)
    assert names.pop((segment, "image 1")) == (segment == 1)
    assert sum(names.values()) == (segment == 0)
    assert inspect.table(view).count("a.png, shared") == 1
    spans = [(s.segment, view.media[s.medium].ref.path) for s in view.spans if s.medium >= 0]
    assert spans == [(n, ref.path) for n, one in enumerate(view.samples) for ref in one.media]
    media = [one for s in inspect.as_dict(view, None, [0, 1])["segments"] for one in s["media"]]
    assert [one["shared"] for one in media].count(True) == 1


@pytest.mark.parametrize(("family", "assembled"), [("qwen2_5_vl", "device"), ("qwen3_vl", "host")])
def test_no_data_is_asked_for_in_a_step(family, assembled):
    """Forward and backward on the meta device, where a question to the data is an error."""
    batch, _, num_items = shared_rows(family, assembled)
    model = model_of(family, torch.float32, "auto")
    loss_and_grads(model, [batch], num_items)  # asks what may be asked once
    batch = to(torch.device("meta"), batch)
    loss = model.to("meta")(**batch, num_items_in_batch=torch.tensor(3)).loss
    loss.backward()
    assert loss.is_meta


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_the_step_is_one_graph_with_and_without_shared_images(family):
    model = model_of(family, torch.float32, "auto")
    made = [make(family) for make in (made_up_rows, shared_rows)]
    eager = [loss_and_grads(model, [batch], num_items) for batch, _, num_items in made]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for (batch, _, num_items), (loss, grads) in zip(made, eager):
        found, ours = loss_and_grads(compiled, [batch], num_items)
        assert found == pytest.approx(loss, rel=1e-6)
        ours = {name.removeprefix("_orig_mod."): gradient for name, gradient in ours.items()}
        difference, parameter = worst_difference(ours, grads)
        assert difference <= 1e-5, parameter
