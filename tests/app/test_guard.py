"""Requests that the page's server rejects, over HTTP."""

import asyncio
import io
import socket
import threading
import time
from concurrent.futures import Future

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from reclip_d2.app.guard import HEADERS, Guard, Limits, Names
from reclip_d2.app.server import server_names
from reclip_d2.errors import ReclipError
from tests.app.conftest import CLASSES

pytestmark = [
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]


@pytest.fixture
def ask(served):
    """Send a request to the page."""

    def call(method, path, **arguments):
        return httpx.request(method, f"{served.address.rstrip('/')}{path}", timeout=60, **arguments)

    return call


def port_of(served):
    return served.address.rstrip("/").rpartition(":")[2]


def raw(served, request, read=4096):
    """Send bytes; returns the beginning of the answer."""
    with socket.create_connection(("127.0.0.1", int(port_of(served))), timeout=20) as connection:
        connection.sendall(request)
        return connection.recv(read)


def upload_files(served):
    """The files with any content in the folder of uploads."""
    folder = served.session.own_folder() / "uploads"
    return {path for path in folder.rglob("*") if path.is_file() and path.stat().st_size}


# ---- who asks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "10.0.0.1", "[::2]",
                                  "localhost@evil.example", "", "a b", "localhost:port"])  # fmt: skip
def test_foreign_hosts(served, ask, host):
    for path in ("/", "/config", "/gradio_api/info"):
        answer = ask("GET", path, headers={"Host": host.format(port=port_of(served))})
        assert answer.status_code in (400, 403) and "gradio" not in answer.text


def test_a_foreign_forwarded_host(ask):
    assert ask("GET", "/", headers={"X-Forwarded-Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:{port}", "localhost.", "127.0.0.1", "127.0.0.2:80", "[::1]:1"]
)
def test_own_hosts(served, ask, host):
    """Any port: it may be forwarded."""
    assert ask("GET", "/config", headers={"Host": host.format(port=port_of(served))}).status_code == 200


def test_there_is_one_host(served):
    for lines in (b"", b"Host: localhost\r\nHost: localhost\r\n"):
        assert b" 400 " in raw(served, b"GET / HTTP/1.1\r\n" + lines + b"\r\n").splitlines()[0]


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "http://localhost:1", "null", "http://127.0.0.1", "file://", "http://[", "",
     "http://127.0.0.1:{port}.evil.example", "ftp://127.0.0.1:{port}"],
)  # fmt: skip
def test_foreign_origins(served, ask, origin):
    """An upload and a training from the page of another site."""
    before = upload_files(served)
    headers = {"Origin": origin.format(port=port_of(served))}
    answer = ask("POST", "/gradio_api/upload", headers=headers, files={"files": ("a.jpg", b"x" * 1000)})
    assert answer.status_code == 403
    body = {"data": [], "fn_index": 0, "session_hash": "x"}
    assert ask("POST", "/gradio_api/queue/join", headers=headers, json=body).status_code == 403
    assert ask("OPTIONS", "/gradio_api/upload", headers=headers).status_code == 403
    assert upload_files(served) == before


def test_the_own_origin(served, ask):
    answer = ask("POST", "/gradio_api/reset", headers={"Origin": served.address.rstrip("/")}, json={
        "fn_index": 0, "session_hash": "x", "event_id": "y"})  # fmt: skip
    assert answer.status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_may_link_to_the_page_alone(ask, site):
    """As a picture, a frame or a form it is refused; also without an Origin."""
    link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert ask("GET", "/", headers=link).status_code == 200
    for change in ({"Sec-Fetch-Dest": "iframe"}, {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}):
        assert ask("GET", "/", headers={**link, **change}).status_code == 403
    assert ask("POST", "/gradio_api/reset", headers=link, json={}).status_code == 403
    assert ask("GET", "/config", headers={"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}).status_code == 200


def test_names_of_a_server(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "Box.lan")
    local, everywhere = server_names("127.0.0.1"), server_names("0.0.0.0", ["Proxy.example."])
    assert local.has("localhost") and local.has("127.1.2.3") and local.has("::1")
    assert not any(local.has(name) for name in ("box.lan", "192.168.0.5", "proxy.example", "evil.example"))
    assert all(everywhere.has(name) for name in ("box.lan", "box", "192.168.0.5", "proxy.example", "localhost"))
    assert not everywhere.has("evil.example")
    assert not Names(frozenset()).has("localhost")


# ---- what is sent with the answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/config", "/nothing", "/gradio_api/upload"])
def test_headers(ask, path):
    answer = ask("GET", path)
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    refused = ask("GET", path, headers={"Host": "evil.example"})
    assert refused.headers["x-frame-options"] == "DENY"


# ---- routes that the page has no use for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/gradio_api/process_recording"), ("POST", "/gradio_api/component_server"), ("POST", "/login"),
     ("POST", "/gradio_api/vibe-edit/"), ("GET", "/gradio_api/proxy=http://127.0.0.1:1/x"), ("GET", "/monitoring"),
     ("GET", "/gradio_api/file=http://127.0.0.1:1/x"), ("GET", "/gradio_api/FILE=HTTPS://127.0.0.1/x"),
     ("GET", "/gradio_api/file=%68ttp://127.0.0.1:1/x"), ("GET", "/monitoring/summary")],
)  # fmt: skip
def test_closed_routes(ask, method, path):
    assert ask(method, path).status_code == 404


def test_files_of_elsewhere_are_not_fetched(served, ask):
    """gradio would download them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.5)
        file = {"path": f"http://127.0.0.1:{listener.getsockname()[1]}/a.jpg", "meta": {"_type": "gradio.FileData"}}
        for path in ("/gradio_api/queue/join", "/gradio_api/call/upload", "/gradio_api/run/upload"):
            body = {"data": [[file]], "fn_index": 0, "session_hash": "x"}
            assert ask("POST", path, json=body).status_code == 403
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize("body", [b"[" * 100_000, b"\xff\xfe", b'{"a":', b"files=1"])
def test_no_messages(ask, body):
    assert ask("POST", "/gradio_api/queue/join", content=body).status_code == 400


def test_long_messages(served, ask):
    assert ask("POST", "/gradio_api/queue/join", content=b"[" + b" " * 5_000_000 + b"]").status_code == 413
    head = b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    assert b" 413 " in raw(served, head + 5 * chunk).splitlines()[0]


# ---- uploads ------------------------------------------------------------------------------------------------------


def test_an_upload_must_say_its_length(served):
    head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n" \
           b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"  # fmt: skip
    assert b" 411 " in raw(served, head).splitlines()[0]


def test_a_large_upload_is_refused_before_it_is_sent(served):
    head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000000\r\n" \
           b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"  # fmt: skip
    assert b" 413 " in raw(served, head).splitlines()[0]


def test_a_large_file(served, ask, monkeypatch):
    """While it is sent, it never takes more than the limit on disk; then it is removed."""
    before = upload_files(served)
    monkeypatch.setattr(served.session, "limits", Limits())
    size = served.session.limits.file_bytes
    answer = ask("POST", "/gradio_api/upload", files={"files": ("a.jpg", io.BytesIO(b"\0" * (size + 1)))})
    assert answer.status_code == 413 and "maximum allowed size" in answer.text
    assert upload_files(served) == before


def test_an_upload_that_is_cut_short_leaves_nothing(served):
    before = upload_files(served)
    head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n" \
           b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" \
           b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'  # fmt: skip
    with socket.create_connection(("127.0.0.1", int(port_of(served)))) as connection:
        connection.sendall(head + b"\0" * 100_000)
        time.sleep(0.3)
    for _ in range(100):
        if upload_files(served) == before:
            break
        time.sleep(0.05)
    assert upload_files(served) == before


def png(size):
    """A PNG of one colour."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((size, size), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_an_image_of_many_pixels(served, tmp_path):
    """A file of 48 KB; it is not decoded, and does not stay."""
    bomb = tmp_path / "bomb.png"
    with Image.new("1", (20_000, 20_000)) as image:
        image.save(bomb)
    assert bomb.stat().st_size < 100_000
    start = time.monotonic()
    status = served.client.predict([handle_file(str(bomb))], api_name="/upload")[2].replace("&#46;", ".")
    assert "bomb.png has 20000 x 20000 pixels" in status
    assert time.monotonic() - start < 10 and not [path for path in upload_files(served) if path.name == bomb.name]
    with pytest.raises(ReclipError, match="20000 x 20000"):
        served.session.segment(bomb, CLASSES)


def test_limits_of_the_page(served, monkeypatch):
    monkeypatch.setattr(served.session, "limits", Limits(pixels=10_000))
    names = [handle_file(str(served.photos / name)) for name in ("0.jpg", "3.jpg")]
    status = served.client.predict(names, api_name="/upload")[2].replace("&#46;", ".")
    assert "3.jpg has 150 x 200 pixels" in status and "--max-megapixels" in status
    assert "0.jpg" not in status and "Press *Segment*" in status


def test_limits(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(png(10))
    Limits(pixels=100, file_bytes=file.stat().st_size).check_image(file)
    for limits, words in ((Limits(pixels=99), "10 x 10 pixels"), (Limits(file_bytes=10), "MiB")):
        with pytest.raises(ReclipError, match=words):
            limits.check_image(file)


# ---- visitors -----------------------------------------------------------------------------------------------------


@pytest.fixture
def visitor(served, tmp_path):
    """A further page in another browser."""
    return Client(served.address, verbose=False, download_files=str(tmp_path), httpx_kwargs={"timeout": 300})


def test_a_large_image_does_not_keep_others_waiting(served, visitor, tmp_path):
    """36 million pixels take long; a second visitor's masks come in between, and Stop ends the first one's."""
    (tmp_path / "large.png").write_bytes(png(6000))
    visitor.predict([handle_file(str(tmp_path / "large.png"))], api_name="/upload")
    heavy = visitor.submit(CLASSES, api_name="/segment")
    for _ in range(200):
        if served.session.visitors._tasks:
            break
        time.sleep(0.05)
    served.client.predict([handle_file(str(served.photos / "0.jpg"))], api_name="/upload")
    status, *_ = served.client.predict(CLASSES, api_name="/segment")
    assert "ReCLIP" in status and not heavy.done()
    served.client.predict(api_name="/stop")  # of nothing of its own
    time.sleep(0.3)
    assert not heavy.done()
    start = time.monotonic()
    visitor.predict(api_name="/stop")
    heavy.result(timeout=30)
    assert time.monotonic() - start < 5 and not served.session.visitors._tasks


def test_only_who_has_begun_a_training_can_stop_it(served, visitor):
    served.client.predict([handle_file(str(served.photos / "0.jpg"))], api_name="/upload")
    done: Future = Future()
    job = served.client.submit(CLASSES, 100_000, api_name="/learn")
    job.add_done_callback(lambda _: done.set_result(None))
    for _ in range(400):
        if served.session._learning is not None:
            break
        time.sleep(0.05)
    visitor.predict(api_name="/stop")
    assert threading.Event().wait(1) is False and not done.done()
    served.client.predict(api_name="/stop")
    assert job.result(timeout=30).startswith("Stopped")


# ---- behind a proxy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [("proxy.example", "https://proxy.example", 200), ("127.0.0.1:7860", "https://proxy.example", 200),
     ("127.0.0.1:7860", "https://other.example", 403), ("other.example", "https://proxy.example", 403)],
)  # fmt: skip
def test_a_proxy_that_was_named(tmp_path, host, origin, status):
    """It may pass requests on under its own name, or under the server's."""

    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard = Guard(page, server_names("127.0.0.1", ["proxy.example"]), Limits(), tmp_path)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://x") as client:
            return (
                await client.post("/gradio_api/reset", headers={"Host": host, "Origin": origin}, json={})
            ).status_code

    assert asyncio.run(ask()) == status
