"""Video files: opened with care, decoded to the frames that were sampled, from rows to a loss."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from builders import tiny_config
from PIL import Image

from mmpack import PackedDataset, VideoSpec, VisionSpec, assemble
from mmpack.cli.main import main
from mmpack.data import videos
from mmpack.errors import RowError
from mmpack.types import VideoRef

SPEC = VisionSpec(
    min_pixels=3136,
    max_pixels=1 << 20,
    video=VideoSpec(min_pixels=1, max_pixels=768 * 28 * 28, fps=3.0),
)


def film(path, num_frames=20, rate=10, size=(64, 48), **options):
    """A video file, its frames of one grey each."""
    av = pytest.importorskip("av", reason="needs PyAV")
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for n in range(num_frames):
            shade = np.full((size[1], size[0], 3), 12 * n, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_files(tmp_path, suffix):
    path = film(tmp_path / f"a.{suffix}")
    for ref in (VideoRef(path), VideoRef("bytes", open(path, "rb").read())):
        for decode in (False, True):
            probed = videos.probe(ref, decode=decode)
            assert (probed.num_frames, probed.fps, probed.size) == (20, 10.0, (48, 64))
    index = videos.sampled(probed, SPEC).index
    assert index.tolist() == [0, 3, 6, 10, 13, 16]  # every third of a second
    grid = SPEC.video_grid(len(index), 48, 64)
    patches = videos.load_patches(probed, np.array([grid]), SPEC)
    frames = patches.reshape(3, -1, 3, 2, 196).mean(axis=(1, 2, 4)).reshape(-1)
    assert np.abs(frames - 12 * index).max() < 4  # the codec's
    with pytest.raises(ValueError, match="is now 64 x 48 pixels .* planned as a grid of 3 x 2 x 2"):
        videos.load_patches(probed, np.array([[3, 2, 2]]), SPEC)
    lying = dataclasses.replace(probed, num_frames=40)
    with pytest.raises(ValueError, match="fewer frames than its header says: 6 of 12"):
        videos.load_patches(lying, np.array([SPEC.video_grid(12, 48, 64)]), SPEC)


def test_files_that_are_no_videos(tmp_path):
    path = film(tmp_path / "a.mp4")
    Image.new("RGB", (64, 48)).save(tmp_path / "picture.png")
    (tmp_path / "playlist.mp4").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:{path}\n#EXT-X-ENDLIST\n"
    )
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{path}'\n")
    (tmp_path / "empty.mp4").write_bytes(b"")
    whole = open(path, "rb").read()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for name in ("picture.png", "playlist.mp4", "list.mp4", "empty.mp4", "cut.mp4"):
        with pytest.raises(RowError, match=f"{name} is not a video FFmpeg can read"):
            videos.probe(VideoRef(str(tmp_path / name)))


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(
        RowError, match=r"a.mp4 needs PyAV to be read; pip install 'mmpack\[video\]'"
    ):
        videos.probe(VideoRef(str(tmp_path / "a.mp4")))


def test_the_demo_set_packs_and_trains(shared, tmp_path, capsys):
    """LLaMA-Factory's video rows, images and videos in one data set, from files to a loss."""
    pytest.importorskip("av", reason="needs PyAV")
    data, tokenizer = shared / "mllm_demo", str(shared / "tokenizer" / "qwen2_vl")
    files = [str(data / name) for name in ("mllm_demo.json", "mllm_video_demo.json")]
    assert main(["check", *files, "--json"]) in (None, 0)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]
    assert (summary["images"], summary["videos"], summary["refused"]) == (8, 3, 0)
    budget = ["--max-pixels", "12544", "--video-max-pixels", "6272", "--video-max-frames", "6"]
    out = str(tmp_path / "packed")
    pack = ["pack", *files, "--out", out, "--tokenizer", tokenizer, "--capacity", "400"]
    assert main([*pack, *budget, "--json"]) in (None, 0)
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["bad_rows"]) == (9, 0)
    dataset = PackedDataset.from_store(out)
    packs = map(assemble, dataset)
    kinds = [(pack.num_images > 0, len(pack.video_pixels) > 0) for pack in packs]
    assert (True, True) in kinds
    tiny_config(family="qwen2_vl").save_pretrained(tmp_path / "model")
    train = ["train", "--data", out, "--config", str(tmp_path / "model"), "--steps", "2"]
    options = ["--use_cpu", "--save_strategy", "no", "--output_dir", str(tmp_path)]
    assert main([*train, *options]) in (None, 0)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["steps"] == 2 and 0 < result["last_loss"] < 20
