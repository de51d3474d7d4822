"""Finding, fetching and checking a file, from servers on this machine and from folders."""

import base64
import hashlib
import http.server
import json
import threading
import types

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.install_detectron2 import package_index
from reclip_d2.install_detectron2.package_index import fetch_file, without_password
from reclip_d2.install_detectron2.pip_settings import PipSettings

NAME, CONTENT = "a_b-1.0.tar.gz", b"the archive"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
JSON = "application/vnd.pypi.simple.v1+json"


@pytest.fixture
def server(monkeypatch):
    """A server: ``pages`` has path -> (status, content type, content), or a list of these, one for each request."""
    monkeypatch.setattr(package_index, "_PAUSE", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = types.SimpleNamespace(pages={}, requests=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests.append((self.path, dict(self.headers)))
            page = state.pages.get(self.path, (404, "text/plain", b"no"))
            if isinstance(page, list):
                page = page.pop(0)
            status, kind, content = page
            self.send_response(status)
            self.send_header("Location" if 300 <= status < 400 else "Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        state.url = f"http://127.0.0.1:{running.server_port}"
        yield state
        running.shutdown()
        thread.join()


def fetch(**settings):
    return fetch_file(PipSettings(**{"indexes": (), "retries": 2, **settings}), "a-b", NAME, DIGEST)


def listing(*addresses):
    return json.dumps({"files": [{"filename": "ignored", "url": address} for address in addresses]}).encode()


def test_an_index_that_answers_in_json(server):
    server.pages["/simple/a-b/"] = (200, JSON, listing("../../files/a_b-0.9.tar.gz", f"../../files/{NAME}#sha256=0"))
    server.pages[f"/files/{NAME}"] = (200, "application/gzip", CONTENT)
    assert fetch(indexes=(f"{server.url}/simple",)) == CONTENT
    assert [path for path, _ in server.requests] == ["/simple/a-b/", f"/files/{NAME}"]
    assert server.requests[0][1]["Accept"].startswith(JSON)


def test_an_index_that_answers_in_html(server):
    page = f'<html><a href="../x/a_b-0.9.tar.gz">old</a><A HREF="/f/{NAME}?a=1&amp;b=2#sha256=0">new</A></html>'
    server.pages["/simple/a-b/"] = (200, "text/html; charset=utf-8", page.encode())
    server.pages[f"/f/{NAME}?a=1&b=2"] = (200, "application/gzip", CONTENT)
    assert fetch(indexes=(f"{server.url}/simple/",)) == CONTENT


def test_links_are_relative_to_where_a_redirection_leads_or_to_the_pages_base(server):
    server.pages["/simple/a-b/"] = (301, "/other/a-b/", b"")
    server.pages["/other/a-b/"] = (200, JSON, listing(NAME))
    server.pages[f"/other/a-b/{NAME}"] = (200, "application/gzip", CONTENT)
    assert fetch(indexes=(f"{server.url}/simple",)) == CONTENT
    server.pages["/page"] = (200, "text/html", f'<base href="/other/a-b/"><a href="{NAME}">x</a>'.encode())
    assert fetch(find_links=(f"{server.url}/page",)) == CONTENT


def test_places_are_tried_in_turn(server):
    """First links, then indexes; one that lacks the file, or has another of its name, is passed over."""
    server.pages["/links"] = (200, "text/html", b"<a href='other-1.0.tar.gz'>x</a>")
    server.pages["/wrong/a-b/"] = (200, JSON, listing(NAME))
    server.pages[f"/wrong/a-b/{NAME}"] = (200, "application/gzip", b"something else")
    server.pages["/right/a-b/"] = (200, JSON, listing(NAME))
    server.pages[f"/right/a-b/{NAME}"] = (200, "application/gzip", CONTENT)
    settings = {"find_links": (f"{server.url}/links",)}
    assert fetch(indexes=tuple(f"{server.url}/{name}" for name in ("missing", "wrong", "right")), **settings) == CONTENT
    with pytest.raises(ReclipError) as error:
        fetch(indexes=(f"{server.url}/missing", f"{server.url}/wrong"), **settings)
    digest = hashlib.sha256(b"something else").hexdigest()
    assert str(error.value) == (
        f"cannot fetch {NAME}: {server.url}/links does not list it; {server.url}/missing/a-b/: HTTP status 404; "
        f"{server.url}/wrong/a-b/{NAME} is another file: SHA-256 {digest}, not {DIGEST}."
        " Download the file elsewhere, and pass it with --sdist FILE"
    )


def test_a_server_that_falters_is_asked_again(server):
    server.pages["/simple/a-b/"] = [(503, "text/plain", b""), (429, "text/plain", b""), (200, JSON, listing(NAME))]
    server.pages[f"/simple/a-b/{NAME}"] = (200, "application/gzip", CONTENT)
    assert fetch(indexes=(f"{server.url}/simple",)) == CONTENT
    server.pages["/simple/a-b/"] = [(503, "text/plain", b"")] * 3
    with pytest.raises(ReclipError, match="HTTP status 503"):
        fetch(indexes=(f"{server.url}/simple",))
    assert [path for path, _ in server.requests].count("/simple/a-b/") == 6
    with pytest.raises(ReclipError, match="HTTP status 404"):  # which does not change by asking again
        fetch(indexes=(f"{server.url}/none",))
    assert [path for path, _ in server.requests].count("/none/a-b/") == 1


def test_a_server_that_cannot_be_reached(server):
    with pytest.raises(ReclipError, match=r"http://127\.0\.0\.1:9/a-b/: .*[Rr]efused"):
        fetch(indexes=("http://127.0.0.1:9",), retries=1)


@pytest.mark.parametrize("answer", [b"{}", b"[]", b"<html>", b'{"files": [{}]}', b"[" * 10_000])
def test_json_that_is_no_list_of_files(server, answer):
    server.pages["/simple/a-b/"] = (200, JSON, answer)
    with pytest.raises(ReclipError, match="its response is not a list of files"):
        fetch(indexes=(f"{server.url}/simple",))


def test_user_and_password_of_an_index_are_sent_and_not_shown(server):
    server.pages["/simple/a-b/"] = (200, JSON, listing())
    secret = server.url.replace("//", "//me:s%2Fcret@")
    with pytest.raises(ReclipError) as error:
        fetch(indexes=(f"{secret}/simple",))
    assert "cret" not in str(error.value)
    assert server.requests[0][1]["Authorization"] == f"Basic {base64.b64encode(b'me:s/cret').decode()}"
    assert without_password("https://me:x@host:1/a?b") == "https://host:1/a?b"
    assert without_password("https://host/a@b") == "https://host/a@b"


def test_folders(tmp_path):
    """A folder of files, and an index on disk: a folder for each project, with or without a page."""
    assert_missing = pytest.raises(ReclipError, match="does not list it")
    with assert_missing:
        fetch(find_links=(str(tmp_path),))
    (tmp_path / NAME).write_bytes(CONTENT)
    assert fetch(find_links=(str(tmp_path),)) == CONTENT
    assert fetch(find_links=(tmp_path.as_uri(),)) == CONTENT
    project = tmp_path / "simple" / "a-b"
    project.mkdir(parents=True)
    (project / "index.html").write_text(f"<a href='../../{NAME}'>{NAME}</a>")
    assert fetch(indexes=((tmp_path / "simple").as_uri(),)) == CONTENT
    with pytest.raises(ReclipError, match="No such file or directory"):
        fetch(indexes=((tmp_path / "none").as_uri(),))


def test_other_kinds_of_address_and_large_answers_are_refused(server, monkeypatch):
    with pytest.raises(ReclipError, match="ftp address: only http, https and file are supported"):
        fetch(indexes=("ftp://example.org/simple",))
    monkeypatch.setattr(package_index, "_MAX_BYTES", 1 << 20)
    server.pages["/simple/a-b/"] = (200, JSON, b" " * (2 << 20))
    with pytest.raises(ReclipError, match="more than 1 MiB"):
        fetch(indexes=(f"{server.url}/simple",), retries=0)


def test_no_place_at_all():
    with pytest.raises(ReclipError, match="pip is configured for no index and no links"):
        fetch()
