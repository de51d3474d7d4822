"""``python -m reclip_d2.fetch`` against a server on the loopback: resume, redirect, wrong hashes, archives, offline."""

import hashlib
import http.server
import io
import re
import sys
import tarfile
import threading
import zipfile

import pytest
import yaml

from reclip_d2.errors import ReclipError
from reclip_d2.fetch import archives as module
from reclip_d2.fetch.archives import Archive, fetch_archive, load_pooch, unpack
from reclip_d2.fetch.program import build_parser, main, read_registry

CONTENT = bytes(range(256)) * 20_000  # 5 MB


@pytest.fixture
def pooch():
    return pytest.importorskip("pooch")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves ``files``; the first ``cuts`` replies end after a third, and ``ranges`` says whether Range is honoured."""

    files, cuts, ranges, requests = {}, 0, True, []

    def do_GET(self):
        cls = type(self)
        cls.requests.append((self.path, self.headers.get("Range")))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file")
            self.end_headers()
            return
        content = cls.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked and cls.ranges else 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if cls.cuts:
            cls.cuts -= 1
            body = body[: len(body) // 3]
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """The handler's class, with the address of a running server."""
    handler = type("Handler", (Server,), {"files": {"/file": CONTENT}, "requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        handler.address = f"http://127.0.0.1:{running.server_address[1]}"
        monkeypatch.setattr(module, "_PAUSE", 0)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("RECLIP_OFFLINE", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield handler
        running.shutdown()
        thread.join()


def md5(content=CONTENT):
    return f"md5:{hashlib.md5(content).hexdigest()}"


def archive(server, path="/file", name="a.bin", hash="", **options):
    return Archive(name, server.address + path, md5() if hash == "" else hash, **options)


def test_a_download_is_checked_and_kept(pooch, server, tmp_path):
    file = fetch_archive(archive(server), tmp_path)
    assert file.read_bytes() == CONTENT and [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    fetch_archive(archive(server), tmp_path)
    assert len(server.requests) == 1
    file.write_bytes(b"other")
    with pytest.raises(ReclipError, match="a.bin has another hash than md5:.*: remove it, and repeat"):
        fetch_archive(archive(server), tmp_path)


@pytest.mark.parametrize("path", ["/file", "/moved"])
def test_a_cut_connection_resumes(pooch, server, tmp_path, path):
    server.cuts = 2
    assert fetch_archive(archive(server, path), tmp_path).read_bytes() == CONTENT
    ranges = [asked for place, asked in server.requests if place == "/file"]
    # Whole chunks of a MiB were kept, of a third and of a third of the rest.
    assert ranges == [None, f"bytes={1 << 20}-", f"bytes={2 << 20}-"]


def test_a_later_run_resumes(pooch, server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:1000])
    assert fetch_archive(archive(server), tmp_path).read_bytes() == CONTENT
    assert server.requests == [("/file", "bytes=1000-")]
    # Complete, but not yet checked.
    (tmp_path / "b.bin.part").write_bytes(CONTENT)
    assert fetch_archive(archive(server, name="b.bin"), tmp_path).read_bytes() == CONTENT


def test_a_server_without_ranges_begins_again(pooch, server, tmp_path):
    server.ranges = False
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    assert fetch_archive(archive(server), tmp_path).read_bytes() == CONTENT


def test_a_file_that_became_shorter_begins_again(pooch, server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT + b"more")
    assert fetch_archive(archive(server), tmp_path).read_bytes() == CONTENT


def test_a_server_that_always_cuts(pooch, server, tmp_path):
    server.cuts = 100
    with pytest.raises(
        ReclipError, match=r"cannot be downloaded \(.*\); \d MiB are kept: repeat the command to resume"
    ):
        fetch_archive(archive(server), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin.part"]
    server.cuts = 0
    assert fetch_archive(archive(server), tmp_path).read_bytes() == CONTENT


def test_a_wrong_hash_leaves_nothing(pooch, server, tmp_path):
    with pytest.raises(ReclipError, match="/file has another hash than md5:0000"):
        fetch_archive(archive(server, hash="md5:" + "0" * 32), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_published_hash_the_first_is_recorded(pooch, server, tmp_path):
    fetch_archive(archive(server, hash=None), tmp_path)
    assert hashlib.sha256(CONTENT).hexdigest() in (tmp_path / "hashes.json").read_text()
    (tmp_path / "a.bin").unlink()
    server.files = {"/file": CONTENT[::-1]}
    with pytest.raises(ReclipError, match="has another hash than sha256:"):
        fetch_archive(archive(server, hash=None), tmp_path)


def test_what_is_not_there(pooch, server, tmp_path):
    with pytest.raises(ReclipError, match=r"/none cannot be downloaded \(HTTP 404\): look"):
        fetch_archive(archive(server, "/none"), tmp_path)
    gone = Archive("a.bin", "http://127.0.0.1:9/x", md5())
    with pytest.raises(ReclipError, match=r"127.0.0.1:9/x cannot be downloaded \(.+\); repeat the command"):
        fetch_archive(gone, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["RECLIP_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(pooch, server, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ReclipError, match=f"a.bin is not in {tmp_path}, and RECLIP_OFFLINE"):
        fetch_archive(archive(server), tmp_path)
    (tmp_path / "a.bin").write_bytes(CONTENT)
    assert fetch_archive(archive(server), tmp_path) and not server.requests


def test_without_pooch(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ReclipError, match=r"not installed: pip install 'reclip_d2\[fetch\]'"):
        load_pooch()


def zipped(names):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name in names:
            file.writestr(name, name)
    return stream.getvalue()


def tarred(names):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as file:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            file.addfile(member, io.BytesIO(name.encode()))
    return stream.getvalue()


@pytest.mark.parametrize(("suffix", "make"), [("zip", zipped), ("tgz", tarred)])
def test_unpacking(tmp_path, suffix, make):
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(make(["in/a.txt", "in/b.txt"]))
    unpack(Archive(file.name, "", None, into="sets", only=("in/a.txt",)), file, tmp_path)
    assert (tmp_path / "sets/in/a.txt").read_text() == "in/a.txt" and not (tmp_path / "sets/in/b.txt").exists()
    evil = tmp_path / f"evil.{suffix}"
    evil.write_bytes(make(["../../outside.txt"]))
    with pytest.raises(ReclipError, match=r"evil.* cannot be unpacked"):
        unpack(Archive(evil.name, "", None, into="sets/deep"), evil, tmp_path)
    assert not (tmp_path / "outside.txt").exists()
    broken = tmp_path / f"broken.{suffix}"
    broken.write_bytes(make([f"{k}.txt" for k in range(9)])[:60])
    with pytest.raises(ReclipError, match=r"broken.* cannot be unpacked"):
        unpack(Archive(broken.name, "", None), broken, tmp_path)


def test_the_program(pooch, server, tmp_path, capsys):
    content = zipped(["Set/images/a.jpg"])
    server.files = {"/set.zip": content}
    registry = tmp_path / "registry.yaml"
    entry = {"url": f"{server.address}/set.zip", "hash": md5(content), "gigabytes": 0.001, "into": "."}
    datasets = {"little": {"archives": ["set.zip"], "prepare": "python prepare_little.py"}}
    registry.write_text(yaml.safe_dump({"archives": {"set.zip": entry}, "datasets": datasets}))
    main(["little", "--folder", str(tmp_path / "sets")], registry)
    out = capsys.readouterr().out
    assert "set.zip: the published hash" in out and "python prepare_little.py" in out
    assert (tmp_path / "sets/Set/images/a.jpg").exists()
    main(["little", "--folder", str(tmp_path / "sets")], registry)
    assert len(server.requests) == 1

    entry["gigabytes"] = 10**9
    registry.write_text(yaml.safe_dump({"archives": {"set.zip": entry}, "datasets": datasets}))
    with pytest.raises(SystemExit):
        main(["little", "--folder", str(tmp_path / "other")], registry)
    assert "GB free, and archives and files need about 2000000000.0 GB" in capsys.readouterr().err


def test_cityscapes_explains_its_login(capsys):
    with pytest.raises(SystemExit) as end:
        main(["cityscapes19"])
    assert end.value.code == 1 and "needs a login" in capsys.readouterr().err


def test_the_registry():
    archives, datasets = read_registry()
    for item in archives.values():
        assert re.fullmatch(r"md5:[0-9a-f]{32}|sha1:[0-9a-f]{40}", item.hash or "md5:" + "0" * 32)
        assert item.url.endswith(item.name) and item.url.startswith("http") and item.gigabytes > 0
    assert [name for name, item in archives.items() if item.hash is None] == ["stuffthingmaps_trainval2017.zip"]
    assert {name for fields in datasets.values() for name in fields["archives"]} == set(archives)
    assert {"voc20", "ade150", "context59", "cocostuff"} <= set(datasets)
    parser = build_parser()
    assert parser.parse_args(["voc20", "clip"]).names == ["voc20", "clip"]
