"""Pages of packs: rows are data there. A browser was asked once, by hand; here the HTML is parsed."""

import base64
import dataclasses
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from builders import encoded, packed, small_spec, with_noise
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import mmpack.cli
from mmpack.cli import inspect, inspect_html
from mmpack.cli.main import main
from mmpack.cli.terminal import printable
from mmpack.data import images
from mmpack.packing.assemble import assemble
from mmpack.packing.dataset import PackedDataset
from mmpack.types import EncodedSample, ImageRef, VideoRef

HOSTILE = [
    "<script>document.title = 'ran'</script>",
    "</script><script>document.title = 'ran'</script>",
    "<!-- <script>",
    "]]> --> </style><style>* { display: none }</style>",
    "<img src=x onerror=\"document.title = 'ran'\">",
    "javascript:document.title = 'ran'",
    "&lt;b&gt; &amp; &#x3c;script&#x3e; \\u003cb\\u003e",
    "a\u202eb\u2066c\x1b[2J\x07\x00\u2028\u2029",
    "' \" ` ${document.title} {policy} \u05e9\u4f60\U0001f600",
]


class Parsed(HTMLParser):
    """Elements of a page, with their attributes and their text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.is_open = [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        self.is_open = True

    def handle_endtag(self, tag):
        self.is_open = False

    def handle_data(self, data):
        if self.is_open:
            self.elements[-1][2] += data

    def texts(self, tag):
        return [text for name, _, text in self.elements if name == tag]


def page_of(store, capsys, *options):
    """(the parsed page, its data, what was printed)"""
    path = store.parent / "page.html"
    capsys.readouterr()
    assert main(["inspect", str(store), "--html", str(path), *map(str, options)]) == 0
    page = Parsed(path.read_text("ascii"))
    return page, json.loads(page.texts("script")[0]), capsys.readouterr()


def pack(folder, tokenizer, rows, capacity=2048):
    (folder / "rows.json").write_text(json.dumps(rows))
    arguments = ["pack", folder / "rows.json", "--capacity", capacity, "--quiet"]
    arguments += ["--tokenizer", tokenizer, "--out", folder / "packed"]
    assert main(list(map(str, arguments))) == 0
    return folder / "packed"


def test_rows_are_data(small_set, tmp_path, capsys):
    name = '"><b onload=x>.png'
    Image.new("RGB", (56, 56)).save(tmp_path / name)
    rows = []
    for text in HOSTILE:
        turns = [{"from": "human", "value": f"<image>{text}"}, {"from": "gpt", "value": text}]
        rows.append({"conversations": turns, "images": [name]})
    store = pack(tmp_path, small_set / "tokenizer", rows).rename(tmp_path / "a <b> & 'c'")
    page, data, _ = page_of(store, capsys)

    assert [tag for tag, *_ in page.elements] == [
        "html", "head", "meta", "meta", "meta", "meta", "title", "style", "body", "noscript", "script", "script",
    ]  # fmt: skip
    names = {key for _, attributes, _ in page.elements for key in attributes}
    assert names == {"lang", "charset", "http-equiv", "content", "name", "type", "id"}
    (policy,) = [a["content"] for _, a, _ in page.elements if "http-equiv" in a]
    (style,), (written, script) = page.texts("style"), page.texts("script")
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    ]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; "
        f"script-src 'sha256-{hashes[1]}'; base-uri 'none'; form-action 'none'"
    )
    assert not set("<>&\u2028\u2029\x00\x1b") & set(written)
    assert page.texts("title") == ["a <b> & 'c': packs"]
    assert data["name"] == "a <b> & 'c'"

    (shown,) = data["packs"]
    found = {segment["row"]: segment for segment in shown["segments"]}
    for row, text in enumerate(HOSTILE):
        spans = [span for span in found[row]["spans"] if "text" in span]
        assert [s["text"] for s in spans if s["supervised"]] == [printable(text) + "<|im_end|>"]
        assert f"<|vision_end|>{printable(text)}<|im_end|>" in "".join(s["text"] for s in spans)
    assert {medium["file"] for medium in shown["media"]} == {name}
    assert printable(HOSTILE[7]) == "a\\u202eb\\u2066c\\x1b[2J\\x07\\x00\\u2028\\u2029"


def test_the_script_makes_no_markup_of_strings():
    script = Path(mmpack.cli.__file__).with_name("inspect_page.js").read_text("ascii")
    sinks = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|srcdoc|href|\.cssText|setTimeout"
    assert re.findall(sinks, script) == []
    assert re.findall(r"\.src = (.*)", script) == ["`data:image/jpeg;base64,${jpeg}`;"]
    assert "textContent" in script


def test_a_page_shows_what_the_terminal_does(small_set, capsys):
    dataset = PackedDataset.from_store(small_set / "packed")
    decode, _ = inspect.find_tokenizer(dataset, None)
    page, data, printed = page_of(small_set / "packed", capsys)
    assert [pack["number"] for pack in data["packs"]] == list(range(dataset.plan.num_packs))
    assert printed.err == ""
    assert data["about"] == {
        "packs": dataset.plan.num_packs, "next": None, "segment": None, "problems": [],
    }  # fmt: skip
    for number, shown in enumerate(data["packs"]):
        view = inspect.view_pack(dataset, number)
        told = inspect.as_dict(view, decode, range(len(view.samples)))
        assert [shown[key] for key in ("tokens", "supervised")] == [
            told["tokens"],
            told["supervised"],
        ]
        for one, other in zip(shown["segments"], told["segments"], strict=True):
            same = ("row", "source", "begin", "end", "supervised")
            assert [one[key] for key in same] == [other[key] for key in same]
            for span, known in zip(one["spans"], other["spans"], strict=True):
                assert (span["begin"], span["end"]) == (known["begin"], known["end"])
                if "medium" in known:
                    medium = shown["media"][span["medium"]]
                    assert (medium["name"], medium["segment"]) == (
                        known["medium"],
                        other["segment"],
                    )
                else:
                    assert (span["text"], span["supervised"]) == (
                        known["text"],
                        known["supervised"],
                    )
        for medium in shown["media"]:
            picture = Image.open(io.BytesIO(base64.b64decode(medium["jpeg"])))
            assert picture.size == (medium["width"], medium["height"])
            assert picture.format == "JPEG" and max(picture.size) <= 192


def test_which_packs(small_set, capsys):
    store = small_set / "packed"
    num_packs = PackedDataset.from_store(store).plan.num_packs
    assert num_packs == 3
    _, data, printed = page_of(store, capsys, "--pack", "0-1")
    assert [pack["number"] for pack in data["packs"]] == [0, 1]
    assert data["about"]["next"] == "2-2"
    assert "page.html: packs 0 to 1 of 3, " in printed.out and "; --pack 2-2 has" in printed.out
    _, data, printed = page_of(store, capsys, "--row", 5, "--json")
    ((number, segment),) = inspect.find_row(PackedDataset.from_store(store), "5")
    assert [pack["number"] for pack in data["packs"]] == [number]
    assert data["about"]["segment"] == segment
    assert json.loads(printed.out)["packs"] == [number]
    for options, code, error in [
        (["--pack", "0-1"], 1, "--pack 0-1 needs --html FILE"),
        (["--pack", "0-9", "--html", "x"], 1, "there is no pack 9; packs are 0 to 2"),
        (["--pack", "2-1", "--html", "x"], 1, "--pack 2-1 is empty"),
        (["--pack", "1-", "--html", "x"], 1, "--pack takes K, or K-L with --html, got '1-'"),
        (["--segment", "99", "--html", "x"], 1, "pack 0 has no segment 99"),
        (["--png", "x", "--html", "x"], 2, "not allowed with argument"),
    ]:
        try:
            assert main(["inspect", str(store), *options]) == code
        except SystemExit as ended:
            assert ended.code == code == 2
        assert error in capsys.readouterr().err
    assert not Path("x").exists()


def test_a_page_is_bounded(small_set, monkeypatch):
    dataset = PackedDataset.from_store(small_set / "packed")
    decode, _ = inspect.find_tokenizer(dataset, None)
    views = [inspect.view_pack(dataset, number) for number in range(2)]
    whole = inspect_html.Page()
    whole.add(views[0], decode)
    assert not whole.is_full and whole.problems() == []

    page = inspect_html.Page(characters=1000, image_bytes=1)
    page.add(views[0], decode)
    assert page.is_full
    shown = json.loads(page.packs[0])
    assert sum(len(s["text"]) for t in shown["segments"] for s in t["spans"] if "text" in s) <= 1000
    assert [("jpeg" in medium) for medium in shown["media"]] == [True] + [False] * page.num_left
    cut = sum(span.get("cut", 0) for segment in shown["segments"] for span in segment["spans"])
    assert page.num_cut == cut > 0
    assert [problem.split(" did not fit")[0] for problem in page.problems()] == [
        f"{page.num_left:,} of the images and videos", f"{cut:,} characters of text",
    ]  # fmt: skip

    monkeypatch.setattr(inspect_html, "Page", lambda: type(page)(image_bytes=1))
    written = inspect_html.write_page(
        dataset, range(3), decode, str(small_set / "bounded.html"), name="x"
    )
    assert written["packs"] == [0] and written["next"] == "1-2"
    assert written["problems"][-1] == "2 packs of --pack 0-2 did not fit"


def test_images_that_cannot_be_shown(small_set, tmp_path, tmp_path_factory, capsys):
    text = PngInfo()
    text.add_text("Comment", "secret")
    for name in ("a", "b", "c"):
        noise = np.random.default_rng(0).integers(0, 256, (400, 300, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x010E] = "secret"
        Image.fromarray(noise).save(
            tmp_path / f"{name}.png", pnginfo=text, exif=exif, icc_profile=b"secret"
        )
    turns = [{"from": "human", "value": "<image><image><image>?"}, {"from": "gpt", "value": "x"}]
    row = {"conversations": turns, "images": ["a.png", "b.png", "c.png"]}
    store = pack(tmp_path, small_set / "tokenizer", [row])
    outside = tmp_path_factory.mktemp("outside") / "b.png"
    (tmp_path / "b.png").rename(outside)
    (tmp_path / "b.png").symlink_to(outside)  # a link that now leads out of the media folder
    (tmp_path / "c.png").unlink()
    _, data, printed = page_of(store, capsys)
    shown, link, gone = data["packs"][0]["media"]
    jpeg = base64.b64decode(shown["jpeg"])
    picture = Image.open(io.BytesIO(jpeg))
    assert b"secret" not in jpeg
    assert all(key.startswith("jfif") for key in picture.info)
    assert picture.size == (shown["width"], shown["height"])
    assert picture.height == 192
    assert "is outside" in link["why"] and "jpeg" not in link
    assert "c.png does not exist" in gone["why"] and "jpeg" not in gone
    problem = "2 of the images and videos cannot be read; the page says why"
    assert data["about"]["problems"] == [problem]
    assert printed.err == f"mmpack: {problem}\n"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_a_video_is_its_first_frame(tmp_path, family):
    spec = small_spec(family)
    side = 2 * spec.patch_size
    frames = []
    for n, color in enumerate([(255, 0, 255), (0, 255, 0), (0, 255, 0), (0, 255, 0)]):
        Image.new("RGB", (side, side), color).save(tmp_path / f"{n}.png")
        frames.append(ImageRef(str(tmp_path / f"{n}.png")))
    sample = encoded(spec, 1, (2, 2, 2), 3)
    clip = VideoRef(frames[0].path, frames=tuple(frames), num_frames=4)
    sample = dataclasses.replace(sample, media=(clip,))
    page = inspect_html.Page()
    page.add(inspect.view_pack(PackedDataset.from_samples([sample], 64), 0), None)
    shown = json.loads(page.packs[0])
    (medium,) = shown["media"]
    assert medium["video"] and medium["frames"] == 2
    color = np.asarray(Image.open(io.BytesIO(base64.b64decode(medium["jpeg"])))).mean(axis=(0, 1))
    assert np.abs(color - (255, 0, 255)).max() < 8
    places = [span["frame"] for span in shown["segments"][0]["spans"] if "medium" in span]
    assert places == ([0, 1] if family == "qwen3_vl" else [0])


def test_thumbnails_of_any_shape():
    for height, width in [(1, 1), (1, 4000), (300, 1), (192, 192)]:
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        picture = Image.open(io.BytesIO(images.thumbnail(pixels, 192)))
        assert picture.size == (min(width, 192), max(1, min(height, 192)))


def test_a_notebook_shows_a_pack_without_script(tmp_path):
    spec = small_spec()
    samples = [
        encoded(spec, 1, (4, 6), 2, 3),
        encoded(spec, *range(1, 9)),
        encoded(spec, 1, (2, 2, 2)),
    ]
    pack = assemble(with_noise(samples))
    counts = "24 tokens in 3 segments, 9 supervised, 1 image, 1 video grid"
    assert repr(pack) == f"Pack({counts})"
    shown = Parsed(pack._repr_html_())
    assert f"<b>Pack</b>: {counts}<" in pack._repr_html_()
    tags = {tag for tag, *_ in shown.elements}
    assert tags == {"div", "b", "span", "table", "tr", "th", "td", "img"}
    assert {key for _, attributes, _ in shown.elements for key in attributes} == {
        "style",
        "src",
        "alt",
    }
    numbers = [text for text in shown.texts("td") if text]
    assert len(numbers) == 15 and numbers[:5] == ["0", "11", "2", "6", "1"]
    still, clip = [attributes["src"] for tag, attributes, _ in shown.elements if tag == "img"]
    head = "data:image/png;base64,"
    picture = Image.open(io.BytesIO(base64.b64decode(still.removeprefix(head))))
    assert picture.size == (6 * 14, 4 * 14)
    view = pack.pixels.reshape(2, 3, 2, 2, 3, 14, 14).transpose(0, 2, 5, 1, 3, 6, 4)
    assert np.array_equal(np.asarray(picture), view.reshape(56, 84, 3))
    assert Image.open(io.BytesIO(base64.b64decode(clip.removeprefix(head)))).size == (28, 28)
    bare = dataclasses.replace(pack, pixels=None, video_pixels=None)._repr_html_()
    assert "<img" not in bare and "2 pictures not shown" in bare


def test_a_notebook_is_sent_half_a_megabyte_at_most():
    sample = encoded(small_spec(), 1, (14, 14), *range(1, 80))
    pack = assemble(packed([sample] * 300))
    shown = pack._repr_html_()
    assert len(shown) < 2**19
    assert shown.count("<img") == 12 and "288 pictures not shown" in shown
    assert "and 200 more segments" in shown
    tall = assemble(packed([encoded(small_spec(), 1, (2, 200))]))._repr_html_()
    assert tall.count("<img") == 1
    assert "1 token in 1 segment, 0 supervised, 0 images" in repr(
        assemble([EncodedSample.filler(1, small_spec())], pixels=False)
    )
