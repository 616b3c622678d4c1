"""Damaged pictures and films, thousands of them: each is read, or refused with a ValueError.

Every batch runs in a process of its own (this file as a script), which a crash of a decoder ends; the batch's seed
and the number of the case make it again.
"""

import io
import random
import subprocess
import sys
import zlib

import numpy as np
import pytest

NAMED = ("PNG", "JPEG", "WEBP", "TIFF", "MP4")
OTHERS = ("GIF", "BMP", "AVIF", "JPEG2000", "PPM", "MPO")
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def seeds_of(kind):
    """Whole files of a kind, small ones."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (40, 60, 4), dtype=np.uint8)
    if kind == "MP4":
        return [film(codec, container) for codec, container in CODECS]
    from PIL import Image

    rgb, rgba = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    plain = Image.new("RGB", (60, 40), "red")
    ways = {
        "PNG": [(rgb, {}), (rgba, {}), (rgb.convert("P"), {"transparency": 3}), (plain, {})],
        "JPEG": [(rgb, {}), (rgb.convert("L"), {"progressive": True}), (rgb.convert("CMYK"), {})],
        "WEBP": [
            (rgb, {}),
            (rgb, {"lossless": True}),
            (rgba, {}),
            (plain, {"exif": b"Exif\0\0" * 4}),
        ],
        "TIFF": [(rgb, {}), (rgb, {"compression": "tiff_lzw"}), (plain, {"compression": "jpeg"})]
        + [(rgb.convert("1"), {"compression": "group4"}), (rgba, {"compression": "tiff_deflate"})],
        "GIF": [(rgb, {}), (plain, {"save_all": True, "append_images": [rgb]})],
        "MPO": [(rgb, {"save_all": True, "append_images": [plain]})],
    }
    files = []
    for picture, options in ways.get(kind, [(rgb, {}), (plain, {})]):
        file = io.BytesIO()
        picture.save(file, format=kind, **options)
        files.append(file.getvalue())
    return files


CODECS = (("mpeg4", "mp4"), ("libx264", "mp4"), ("mpeg4", "matroska"))


def film(codec, container):
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as opened:
        stream = opened.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(6):
            shade = np.full((48, 64, 3), 40 * n, dtype=np.uint8)
            opened.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        opened.mux(stream.encode())
    return file.getvalue()


def mutate(rng, data):
    """The bytes with some changed, lost, doubled or put in, numbers in headers made extreme."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(data) or 1)
        if rng.random() < 0.4:
            place = min(place, rng.randrange(64))  # of the header
        kind = rng.randrange(6)
        if kind == 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            size, order = rng.choice((1, 2, 4)), rng.choice(("little", "big"))
            value = rng.choice(EXTREMES) & ((1 << 8 * size) - 1)
            data[place : place + size] = value.to_bytes(size, order)
        elif kind == 3:
            del data[place : place + rng.choice((1, 4, 100, len(data)))]
        elif kind == 4:
            end = place + rng.choice((1, 4, 100))
            data[place:place] = data[place:end]
        else:
            data[place:place] = rng.randbytes(rng.choice((1, 4, 100)))
    return bytes(data)


def with_checksums(data):
    """A PNG whose chunks have the checksums of what is in them now, so that more than those is tried."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        out += data[at:end] + zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)


def read(kind, data, spec, path):
    """What check, pack and training do with bytes in a row, and with a file, which some decoders read themselves;
    whether they were read."""
    from mmpack.data import images, videos
    from mmpack.types import ImageRef, VideoRef

    with open(path, "wb") as file:
        file.write(data)
    outcomes = []
    for decode, found in ((False, (path,)), (True, ("x", data))):
        try:
            if kind == "MP4":
                probed = videos.probe(VideoRef(*found), decode=decode)
                index = videos.sampled(probed, spec).index
                grid = spec.video_grid(len(index), *probed.size)
                patches = videos.load_patches(probed, np.array([grid]), spec)
                assert len(patches) == np.prod(grid)
            else:
                size = images.probe(ImageRef(*found), decode=decode)
                grid = spec.image_grid(*size)
                assert len(images.load_patches(ImageRef(*found), grid, spec)) == np.prod(grid)
            outcomes.append(True)
        except ValueError as error:
            assert str(error)
            outcomes.append(False)
    return outcomes[0]


def run_batch(kind, seed, count, log):
    """A batch, in the child; the number of the case under way is in the file `log`, its bytes in `log`.bytes."""
    import warnings

    from PIL import Image

    from mmpack import VideoSpec, VisionSpec

    Image.MAX_IMAGE_PIXELS = 1 << 20  # so that a case takes milliseconds, whatever its header says
    warnings.simplefilter("ignore")
    if kind == "MP4":
        import av

        av.logging.set_level(av.logging.PANIC)
    video = VideoSpec(min_pixels=1, max_pixels=56 * 56, fps=3.0)
    spec = VisionSpec(min_pixels=28 * 28, max_pixels=56 * 56, video=video)
    files, path = seeds_of(kind), f"{log}.{'webp' if kind == 'WEBP' else 'bytes'}"
    assert all(read(kind, data, spec, path) for data in files)
    numbers = open(log, "wb", buffering=0)
    rng = random.Random(f"{kind} {seed}")
    num_read = 0
    for number in range(count):
        numbers.write(b"%d " % number)
        data = mutate(rng, rng.choice(files))
        if kind == "PNG" and rng.random() < 0.5:
            data = with_checksums(data)
        num_read += read(kind, data, spec, path)
    print(num_read)


def run_batches(batches, tmp_path):
    """Each of (kind, seed, count) in a child; how many files were read."""
    num_read = 0
    for batch in batches:
        log = tmp_path / "number"
        command = [sys.executable, __file__, *map(str, batch), str(log)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        what = f"{batch}, case {log.read_text()[-9:]}: {done.returncode}\n{done.stderr[-3000:]}"
        assert done.returncode == 0, what
        num_read += sum(map(int, done.stdout.split()))
    return num_read


def kinds():
    from PIL import features

    return [kind for kind in OTHERS if kind != "AVIF" or features.check("avif")]


def test_mutated_media_end_in_patches_or_reasons(tmp_path):
    pytest.importorskip("av", reason="needs PyAV")
    count = 200
    num_read = run_batches([(",".join([*NAMED, *kinds()]), 0, count)], tmp_path)
    assert 0.02 < num_read / count / len([*NAMED, *kinds()]) < 0.9  # both ends are met


@pytest.mark.slow
def test_many_mutated_media_end_in_patches_or_reasons(tmp_path):
    pytest.importorskip("av", reason="needs PyAV")
    batches = [(kind, seed, 1000) for seed in range(4) for kind in NAMED]
    batches += [(kind, 0, 1000) for kind in kinds()]
    num_read = run_batches(batches, tmp_path)
    assert 0.02 < num_read / sum(count for _, _, count in batches) < 0.9


if __name__ == "__main__":
    every, batch_seed, number_of_cases, log_file = sys.argv[1:]
    for one in every.split(","):
        run_batch(one, int(batch_seed), int(number_of_cases), log_file)
