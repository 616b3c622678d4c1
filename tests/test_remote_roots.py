"""What is a root in object storage, and what a row may name under it. Nothing is opened."""

import pytest

from mmpack.data.data_paths import data_files
from mmpack.data.media_paths import MediaFolders
from mmpack.data.model_folder import local_path
from mmpack.data.remote_roots import RemotePath, data_path, is_inside, object_in, remote_root
from mmpack.errors import RowError

HTTP, S3 = "https://host.example/data", "s3://bucket/data"
ANY = (HTTP, S3, "gs://bucket/data", "hf://datasets/owner/name", "memory://data")

# (path of a row, a word of the reason): refused under every root.
REFUSED = [
    ("../secret.png", "'..'"),
    ("a/../../secret.png", "'..'"),
    ("a/..", "'..'"),
    ("..\\secret.png", "'..'"),
    ("a/..;x=1/secret.png", "'..'"),  # some servers drop what follows the semicolon
    ("a/ .. /b.png", "'..'"),
    ("%2e%2e/secret.png", "'..'"),
    ("%2E./secret.png", "'..'"),
    ("..%2fsecret.png", "'..'"),
    ("..%5csecret.png", "'..'"),
    ("%252e%252e%252fsecret.png", "'..'"),
    ("%25252e%25252e/secret.png", "'..'"),
    ("%c0%ae%c0%ae/secret.png", "UTF-8"),  # an overlong form of dots
    ("/etc/passwd", "absolute"),
    ("//other.example/a.png", "absolute"),
    ("\\\\other\\a.png", "absolute"),
    ("%2fetc/passwd", "absolute"),
    ("%252fetc/passwd", "absolute"),
    ("C:\\a.png", "drive"),
    ("http://other.example/a.png", "URL"),
    ("HTTPS://host.example/data/a.png", "URL"),
    ("s3://other/a.png", "URL"),
    ("file:///etc/passwd", "URL"),
    ("file:a.png", "URL"),
    ("javascript:1", "URL"),
    ("localhost:80/a.png", "URL"),
    ("http%3a//other.example/a.png", "URL"),
    ("simplecache::s3://other/a.png", "'::'"),
    ("a.png::file:///etc/passwd", "'::'"),
    ("zip://a.png::s3://other/b.zip", "'::'"),
    ("a%3a%3ab.png", "'::'"),
    ("", "not a name"),
    (".", "nothing"),
    ("a\nb.png", "not a name"),
    ("a\r\nHost: other", "not a name"),
    ("a%0d%0aHost: other", "not a name"),
    ("a%00.png", "not a name"),
    ("\ud800.png", "not a name"),
    ("a" * 5000, "not a name"),
]


@pytest.mark.parametrize("root", ANY)
@pytest.mark.parametrize(("path", "why"), REFUSED)
def test_refused(root, path, why):
    with pytest.raises(RowError, match="path .* write a relative path") as refused:
        object_in(root, path, "image")
    assert why in refused.value.error
    with pytest.raises(RowError):
        MediaFolders([root]).locate(path)
    # nor does a store's record of it lead out
    assert not is_inside(f"{root}/{path}", root)


# (root, path of a row, the object).
ALLOWED = [
    (HTTP, "a.png", f"{HTTP}/a.png"),
    (HTTP, "./b//c/./a.png", f"{HTTP}/b/c/a.png"),
    (HTTP, "b\\a.png", f"{HTTP}/b/a.png"),
    (HTTP, "two words.png", f"{HTTP}/two%20words.png"),
    (HTTP, "20%25.png", f"{HTTP}/20%2525.png"),  # a name, not a URL
    (HTTP, "what?.png", f"{HTTP}/what%3F.png"),
    (HTTP, "C#.png", f"{HTTP}/C%23.png"),
    (HTTP, "\u00e9.png", f"{HTTP}/%C3%A9.png"),
    (HTTP, "...png", f"{HTTP}/...png"),
    (HTTP, "a..b/c..png", f"{HTTP}/a..b/c..png"),
    (S3, "two words.png", f"{S3}/two words.png"),
    (S3, "C#.png", f"{S3}/C#.png"),
    ("gs://bucket", "a@b.png", "gs://bucket/a@b.png"),
]


@pytest.mark.parametrize(("root", "path", "url"), ALLOWED)
def test_allowed(root, path, url):
    assert object_in(root, path) == url
    assert is_inside(url, root)
    assert MediaFolders([root]).locate(path).path == url
    assert MediaFolders([root]).real_path(url, "image") == url


@pytest.mark.parametrize(
    ("root", "path"),
    [
        ("gs://bucket", "a.png#123"),
        ("gs://bucket", "a.png?generation=1"),
        ("s3://bucket", "a.png?versionId=1"),
        ("hf://datasets/owner/name", "a@refs/convert/parquet/b.png"),
    ],
)
def test_a_row_chooses_no_version(root, path):
    with pytest.raises(RowError, match="reads as a version"):
        object_in(root, path)


@pytest.mark.parametrize(
    "url",
    [
        "https://host.example/data2/a.png",
        "https://host.example/other/a.png",
        "https://host.example.evil/data/a.png",
        "http://host.example/data/a.png",
        "https://host.example/data/../a.png",
        "https://host.example/data/%2e%2e/a.png",
        "https://host.example/data//a.png",
        "https://host.example/data/a.png?x",
        "https://host.example/data/a.png#x",
        "https://user@host.example/data/a.png",
        "/etc/passwd",
    ],
)
def test_a_recorded_place_outside_the_root(url):
    with pytest.raises(RowError, match="is outside https://host.example/data"):
        MediaFolders([HTTP]).real_path(url, "image")


def test_a_local_folder_does_not_contain_objects(tmp_path):
    with pytest.raises(RowError, match="is outside"):
        MediaFolders([tmp_path]).real_path(f"{HTTP}/a.png", "image")
    with pytest.raises(RowError, match="is outside"):
        MediaFolders([HTTP]).real_path(str(tmp_path / "a.png"), "image")


SECRET = "hunter2"
ROOTS = [
    ("images", None),
    ("/data/images", None),
    ("C:\\images", None),
    ("./simplecache::x", None),
    ("https://Host.Example/data/", "https://host.example/data"),
    ("HTTP://host.example:8080//a/./b//", "http://host.example:8080/a/b"),
    ("https://host.example/two words/caf%C3%A9", "https://host.example/two%20words/caf%C3%A9"),
    ("http://[::1]:80/a", "the root"),
    ("s3://bucket/", "s3://bucket"),
    ("s3://bucket/a b/", "s3://bucket/a b"),
    ("hf://datasets/owner/name@main/data", "hf://datasets/owner/name@main/data"),
    ("memory://", "names nothing"),
    ("memory:///a/", "memory://a"),
    (f"https://user:{SECRET}@host.example/data", "user name or a password"),
    (f"s3://key:{SECRET}@bucket/data", "user name or a password"),
    (f"hf://user:{SECRET}@owner/name", "user name or a password"),
    (f"https://host.example/a.jsonl?X-Amz-Signature={SECRET}", "'[?]' or '#'"),
    (f"https://host.example/a.jsonl#{SECRET}", "'[?]' or '#'"),
    ("file:///etc", "is not read"),
    ("local:///etc", "is not read"),
    ("zip://a.zip", "is not read"),
    ("ftp://host.example/a", "is not read"),
    ("github://owner:name@/a", "is not read"),
    ("simplecache::s3://bucket/a", "chains file systems"),
    ("filecache::https://host.example/a", "chains file systems"),
    ("zip::/tmp/a.zip", "chains file systems"),
    ("zip://a.json::s3://bucket/a.zip", "chains file systems"),
    ("https://host.example/a/../b", "'..'"),
    ("https://host.example/a/%2e%2e/b", "'..'"),
    ("s3://bucket/%252e%252e/b", "'..'"),
    ("s3://../b", "no place"),
    ("https://host.example:port/a", "names no host"),
    ("https:///a", "names no host"),
    ("s3://", "names nothing"),
    ("hf://datasets/owner", "names no repository"),
    ("hf://owner", "names no repository"),
    ("https://host.example/a\r\nb", "no name|not a name"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), ROOTS)
def test_roots(name, expected):
    if expected is None or "://" in expected:
        assert remote_root(name) == expected
        assert expected is None or remote_root(expected) == expected
        return
    with pytest.raises(ValueError, match=expected) as refused:
        remote_root(name)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        f"https://user:{SECRET}@host.example/{{0..999999}}.tar",
        f"https://host.example/{{a,b}}{{0..999999}}.tar?X-Amz-Signature={SECRET}",
        f"https://{{a/b,user:{SECRET}@host.example}}/{{0..999999}}.tar",
        f"https://{{host.example,user:{SECRET}@host.example}}/a.tar",
        f"s3://key:{SECRET}@bucket/{{a,b}}",
    ],
)
def test_braces_repeat_no_secret(name):
    with pytest.raises(ValueError, match="://") as refused:
        data_files(name)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("scheme", ["https", "s3", "file"])
def test_a_tokenizer_is_no_url(scheme):
    with pytest.raises(ValueError, match=f"^{scheme}://...: there is no such file") as refused:
        local_path(f"{scheme}://user:{SECRET}@host.example/x")
    assert SECRET not in str(refused.value)


def test_data_paths():
    path = data_path("https://host.example/my%20data/train-1.jsonl.gz")
    assert isinstance(path, RemotePath)
    assert (path.name, path.suffix, path.suffixes) == (
        "train-1.jsonl.gz",
        ".gz",
        [".jsonl", ".gz"],
    )
    assert str(path.parent / "b c.json") == "https://host.example/my%20data/b%20c.json"
    assert path.parent.name == "my data"
    assert RemotePath("memory://a.json").parent == RemotePath("memory://a.json")
    assert RemotePath("https://host.example").parent == RemotePath("https://host.example")
    with pytest.raises(RowError):
        path.parent / "../x"
