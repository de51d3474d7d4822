"""Images at URLs, and CSV and Parquet lists."""

import contextlib
import http.server
import socketserver
import sys
import threading
from pathlib import Path, PurePosixPath

import pytest

from reclip_d2.data import remote_images
from reclip_d2.data.image_folder import find_images
from reclip_d2.data.remote_images import fetch_images, is_url, url_path
from reclip_d2.errors import ReclipError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory():
    """A file system in memory: ``memory://bucket`` with three images, one of them hidden, and another file."""
    system = fsspec.filesystem("memory")
    files = {"a.jpg": b"A", "in/b b.png": b"B", "in/.hidden.png": b"H", "in/notes.md": b"N", "c.JPG": b"C"}
    for name, content in files.items():
        system.pipe(f"/bucket/set/{name}", content)
    yield system
    system.rm("/bucket", recursive=True)


def names(found) -> list[str]:
    return [str(image.name) for image in found.images]


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["memory://bucket/set"], ["a.jpg", "c.JPG", "in/b b.png"]),
        (["memory://bucket/set/"], ["a.jpg", "c.JPG", "in/b b.png"]),
        (["memory://bucket/set/*.jpg"], ["a.jpg"]),
        (["memory://bucket/set/**/*.png"], ["b b.png"]),  # not the hidden one
        (["memory://bucket/set/in", "memory://bucket/set/a.jpg"], ["a.jpg", "in/b b.png"]),
        (["memory://bucket/set/gone.jpg"], ["gone.jpg"]),  # found out when it is fetched
    ],
)
def test_what_a_url_names(memory, tmp_path, sources, expected):
    found = find_images(sources, copies=tmp_path / "copies")
    assert names(found) == expected
    assert all(image.path == tmp_path / "copies" / image.name for image in found.images)
    assert found.left_out == ("left out: 1 .md" if "in/b b.png" in expected else "")


def test_copies_are_made_once(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_images, "_WAIT", 0.0)
    images = find_images(["memory://bucket/set", "memory://bucket/set/gone.jpg"], copies=tmp_path).images
    problems = fetch_images(images)
    assert list(problems) == ["gone"] and "image memory://bucket/set/gone.jpg does not exist" in problems["gone"]
    assert {image.image_id: image.path.read_bytes() for image in images if image.path.exists()} == {
        "a": b"A", "c": b"C", "in/b b": b"B",
    }  # fmt: skip
    memory.pipe("/bucket/set/a.jpg", b"another")
    fetch_images(images)
    assert (tmp_path / "a.jpg").read_bytes() == b"A"
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_errors_of_the_network_are_retried(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_images, "_WAIT", 0.0)
    original, calls = type(memory)._open, []

    def failing(self, path, *args, **kwargs):
        calls.append(path)
        if len(calls) < 3:
            raise OSError("connection reset\nby peer")
        return original(self, path, *args, **kwargs)

    monkeypatch.setattr(type(memory), "_open", failing)
    image = find_images(["memory://bucket/set/a.jpg"], copies=tmp_path).images
    assert fetch_images(image) == {} and len(calls) == 3
    calls.clear()
    monkeypatch.setattr(remote_images, "_TRIES", 2)
    (tmp_path / "a.jpg").unlink()
    assert "cannot be read (connection reset by peer)" in fetch_images(image)["a"]
    monkeypatch.setattr(remote_images, "MOST_BYTES", 0)
    assert "has more than 0 MiB" in fetch_images(image)["a"]
    assert not list(tmp_path.iterdir())


def test_lists(memory, tmp_path):
    csv = tmp_path / "list.csv"
    csv.write_text('\ufeffid,Image\n1,memory://bucket/set/a.jpg\n2,"memory://bucket/set/in/b b.png"\n3,\n')
    assert names(find_images([csv], copies=tmp_path)) == ["a.jpg", "in/b b.png"]
    (tmp_path / "list.txt").write_text("# two\nmemory://bucket/set/a.jpg\nmemory://bucket/set/in\n")
    assert names(find_images([tmp_path / "list.txt"], copies=tmp_path)) == ["a.jpg", "in/b b.png"]
    memory.pipe("/bucket/set/list.csv", b"path\nin/b b.png\na.jpg\n")  # relative to the list
    assert names(find_images(["memory://bucket/set/list.csv"], copies=tmp_path)) == ["a.jpg", "in/b b.png"]
    (tmp_path / "local.png").touch()
    csv.write_text("whatever\nlocal.png\n")  # of files, and its only column
    (image,) = find_images([csv]).images
    assert image.path == tmp_path / "local.png" and not image.url


def test_a_parquet_list(memory, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"label": [1, 2], "url": ["memory://bucket/set/a.jpg", None]})
    parquet.write_table(table, tmp_path / "list.parquet")
    assert names(find_images([tmp_path / "list.parquet"], copies=tmp_path)) == ["a.jpg"]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ReclipError, match=r"bad.parquet is not a Parquet file"):
        find_images([tmp_path / "bad.parquet"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", "has no column image, path, url, file_name or filename"),
        (b"image\n", "names no image"),
        (b"", "has no column"),
        (b"\xff\xfe\0", "is not a CSV file in UTF-8"),
        (b"image\nx.csv\n", "is itself a list"),
        (b"image\nmemory://bucket/set/x.parquet\n", "is itself a list"),
        (b"image\ngone.png\n", "line 1: gone.png does not exist"),
        (b"image\nmemory://bucket/../../x.png\n", "has .. in its path"),
        (b"image\nhttp://host/%2e%2e/%2e%2e/x.png\n", "has .. in its path"),
    ],
)
def test_lists_that_are_wrong(tmp_path, content, message):
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(ReclipError, match="list|URL|path") as caught:
        find_images([tmp_path / "list.csv"], copies=tmp_path / "copies")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory://bucket/nothing", "has no images"),
        ("memory://bucket/set/in/notes.md", "has no images"),
        ("nonsense://bucket/x", "Protocol not known: nonsense"),
        ("simplecache::memory://bucket/set", "does not exist"),
        ("memory://bucket/gone.csv", "does not exist: check the URL"),
    ],
)
def test_urls_that_are_wrong(memory, tmp_path, source, message):
    with pytest.raises(ReclipError) as caught:
        find_images([source], copies=tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_where_urls_are_not_read(memory, tmp_path):
    with pytest.raises(ReclipError, match="which only reclip predict and segment read"):
        find_images(["memory://bucket/set"])
    (tmp_path / "x.png").touch()
    with pytest.raises(ReclipError, match="names both files and URLs"):
        find_images(["memory://bucket/set", tmp_path / "x.png"], copies=tmp_path / "copies")
    memory.pipe("/bucket/set/a.png", b"P")
    with pytest.raises(ReclipError, match=r"memory:///bucket/set/a.jpg and a.png would share the mask a.png"):
        find_images(["memory://bucket/set"], copies=tmp_path)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ReclipError, match=r"s3://bucket/set: .*: pip install s3fs$"):
        find_images(["s3://bucket/set"], copies=tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(ReclipError, match=r"needs the package pyarrow: pip install 'reclip_d2\[remote\]'"):
        find_images([tmp_path / "x.parquet"])
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ReclipError, match=r"URLs need the package fsspec: pip install 'reclip_d2\[remote\]'"):
        find_images(["memory://bucket/set"], copies=tmp_path)


def test_paths_of_urls():
    assert is_url("s3://x") and not is_url("C://x") and not is_url("a/b") and not is_url("/a://b")
    assert url_path("http://u:secret@host:80/a%20b/c.png?sign=x/../y") == PurePosixPath("host_80/a b/c.png")
    assert url_path("s3://bucket/a%20b/c?1#2.png") == PurePosixPath("bucket/a%20b/c?1#2.png")  # a key, as it is


@contextlib.contextmanager
def serving(folder: Path):
    """An HTTP server on the loopback; gives its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: object) -> None:
            pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_http_and_file(tmp_path):
    (tmp_path / "web" / "in").mkdir(parents=True)
    for name in ("a.png", "in/b.png"):
        (tmp_path / "web" / name).write_bytes(name.encode())
    images = find_images([f"file://{tmp_path}/web"], copies=tmp_path / "1").images
    assert [str(image.name) for image in images] == ["a.png", "in/b.png"] and fetch_images(images) == {}
    assert (tmp_path / "1" / "in" / "b.png").read_bytes() == b"in/b.png"
    pytest.importorskip("aiohttp")
    with serving(tmp_path / "web") as address:
        images = find_images([f"{address}/"], copies=tmp_path / "2").images
        assert [str(image.name) for image in images] == ["a.png", "in/b.png"] and fetch_images(images) == {}
        gone = find_images([f"{address}/gone.png?key=1"], copies=tmp_path / "2").images
        assert "does not exist" in fetch_images(gone)["gone"]
    assert (tmp_path / "2" / "in" / "b.png").read_bytes() == b"in/b.png"
