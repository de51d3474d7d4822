"""Access to the page's server: it accepts requests of its own page only, within size limits.

Pages of other sites can send requests to a server on this machine and, by DNS rebinding, even read the answers.
Therefore, each request must be addressed to a name of this server and come from its own page. Routes of gradio that the
page does not use are closed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from reclip_d2.data.images import peek_size
from reclip_d2.errors import ReclipError

# Makes the browser block requests to other hosts and frames around the page.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; worker-src 'self' blob:;"
    " connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), display-capture=(), usb=(), serial=()",
}
"""Headers of every response."""

UPLOAD = "/gradio_api/upload"
# Routes of gradio that start programs, fetch URLs, mount other pages or edit the source. The page uses none of them.
_CLOSED = re.compile(
    r"/(gradio_api/(process_recording|component_server|proxy=|stream/|vibe|undo-vibe|dev/|run-history|runs|profiling|"
    r"custom_component|deep_link|file=https?:|mcp)|monitoring|login|logout|deep_link)",
    re.IGNORECASE,
)
_MESSAGE_BYTES = 4 * 2**20  # limit for requests other than uploads
_DAY = 86400  # seconds
_ELSEWHERE = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on what visitors may send.

    Attributes:
        pixels: of an image.
        file_bytes: of an image file.
        upload_bytes: of all uploads on disk together.
        text_bytes: of a class list.
    """

    pixels: int = 50_000_000
    file_bytes: int = 64 * 2**20
    upload_bytes: int = 4 * 2**30
    text_bytes: int = 2**16

    def check_image(self, path: Path) -> None:
        """Raise :class:`ReclipError` for an image with more bytes or pixels, without decoding it."""
        size = path.stat().st_size
        if size > self.file_bytes:
            raise ReclipError(
                f"image {path} has {size / 2**20:,.1f} MiB; this page accepts {self.file_bytes / 2**20:,.0f}:"
                " use reclip segment, or start the page with a larger --max-megabytes"
            )
        height, width = peek_size(path)
        if height * width > self.pixels:
            raise ReclipError(
                f"image {path} has {width} x {height} pixels; this page accepts {self.pixels / 1e6:,.0f} million:"
                " use reclip segment, or start the page with a larger --max-megapixels"
            )

    def check_text(self, text: str) -> None:
        """Raise :class:`ReclipError` for a class list that is too long."""
        if len(text.encode("utf-8", "surrogatepass")) > self.text_bytes:
            raise ReclipError(f"the class list has more than {self.text_bytes // 1024} KiB: shorten it")


@dataclasses.dataclass(frozen=True)
class Names:
    """Names by which the server can be addressed.

    Attributes:
        allowed: names, in lower case.
        addresses: accept any numeric address. For servers that listen for other machines; DNS rebinding needs a name.
        proxied: names of a proxy in front of the server, which may forward requests under another name.
    """

    allowed: frozenset[str]
    addresses: bool = False
    proxied: frozenset[str] = frozenset()

    def has(self, name: str) -> bool:
        """Whether a name or numeric address belongs to the server."""
        if name in self.allowed or name in self.proxied:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.addresses or address.is_loopback


class Refusal(Exception):
    """A rejected request."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Guard:
    """ASGI middleware, see the module's docstring."""

    def __init__(self, app: Any, names: Names, limits: Limits, uploads: Path) -> None:
        """
        Args:
            app: the application to protect.
            uploads: its folder of uploads.
        """
        self.app = app
        self.names = names
        self.limits = limits
        self.uploads = uploads
        self._expected: list[int] = []  # bytes of the uploads in progress

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page opens no WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                known = {name for name, _ in own}
                others = [pair for pair in message.get("headers", []) if pair[0].lower() not in known]
                message["headers"] = [*others, *own]
            await send(message)

        try:
            headers = _Headers(scope)
            self._check_sender(scope["method"], headers)
            if _CLOSED.match(scope["path"]):
                raise Refusal(404, "this page has no such route")
            if scope["path"].rstrip("/") == UPLOAD:
                with self._upload(headers):
                    await self.app(scope, receive, send_with_headers)
                return
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                receive = await _read_message(receive, headers)
        except Refusal as refusal:
            await _answer(send_with_headers, refusal)
            return
        await self.app(scope, receive, send_with_headers)

    # ---- senders ----------------------------------------------------------------------------------------------

    def _check_sender(self, method: str, headers: _Headers) -> None:
        """Reject requests that are addressed to other hosts or come from their pages."""
        host = headers.only("host")
        name, port = _host(host)
        forwarded = headers.all("x-forwarded-host")
        if not self.names.has(name) or not all(self.names.has(_host(other)[0]) for other in forwarded):
            raise Refusal(
                403, f"this server is not {name[:100]!r}: open it by its own address, or start it with --allow-host"
            )
        for origin in headers.all("origin"):
            if not self._is_own(origin, name, port):
                raise Refusal(403, "requests from pages of other sites are rejected")
        if headers.one("sec-fetch-site") in ("cross-site", "same-site"):
            opened = headers.one("sec-fetch-mode") == "navigate" and headers.one("sec-fetch-dest") == "document"
            if method not in ("GET", "HEAD") or not opened:  # links to the page are fine
                raise Refusal(403, "requests from pages of other sites are rejected")

    def _is_own(self, origin: str, name: str, port: int | None) -> bool:
        """Whether an ``Origin`` is the page of this request's ``Host``."""
        try:
            parts = urlsplit(origin)
            own, own_port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            return False
        default = _DEFAULT_PORTS.get(parts.scheme)
        if default is None:
            return False
        return own in self.names.proxied or (own == name and (own_port or default) == (port or default))

    # ---- uploads ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _upload(self, headers: _Headers) -> Iterator[None]:
        """Reject uploads that are too large before reading them."""
        length = headers.one("content-length")
        if not length.isdecimal():
            raise Refusal(411, "uploads need a Content-Length header")
        size = int(length)
        room = self.limits.upload_bytes - size - sum(self._expected)
        if _bytes_in(self.uploads) > room:
            _remove_old(self.uploads)
        if _bytes_in(self.uploads) > room:
            most = f"{self.limits.upload_bytes / 2**30:.3g} GiB"
            raise Refusal(413, f"all uploads together would exceed {most}: upload fewer, or restart reclip app")
        self._expected.append(size)
        try:
            yield
        finally:
            self._expected.remove(size)
            if not self._expected:
                _remove_parts(self.uploads)


def _host(value: str) -> tuple[str, int | None]:
    """Name and port of a ``Host`` header."""
    try:
        parts = urlsplit(f"//{value}")
        name, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        raise Refusal(400, "invalid Host header") from None
    if not name or parts.netloc != value or "@" in value:
        raise Refusal(400, "invalid Host header")
    return name, port


class _Headers:
    """The headers of a request."""

    def __init__(self, scope: Any) -> None:
        self._pairs = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]

    def all(self, name: str) -> list[str]:
        """All values."""
        return [value.strip() for key, value in self._pairs if key == name]

    def one(self, name: str) -> str:
        """The first value; "" if there is none."""
        return next(iter(self.all(name)), "")

    def only(self, name: str) -> str:
        """The value of a header that must occur exactly once."""
        values = self.all(name)
        if len(values) != 1:
            raise Refusal(400, f"a request needs exactly one {name} header")
        return values[0]


async def _read_message(receive: Any, headers: _Headers) -> Any:
    """Read and check the body of a request other than an upload; returns the ``receive`` for the application.

    Bodies may not be longer than the page's own messages, nor name remote files, which gradio would fetch.
    """
    length = headers.one("content-length")
    if length.isdecimal() and int(length) > _MESSAGE_BYTES:
        raise Refusal(413, "the request is too long")
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > _MESSAGE_BYTES:
            raise Refusal(413, "the request is too long")
    if body:
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            raise Refusal(400, "the request is not a message of this page") from None
        if _names_elsewhere(content):
            raise Refusal(403, "only uploaded files are accepted")
    replayed = False

    async def replay() -> Any:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _names_elsewhere(content: Any) -> bool:
    """Whether a message names a file by its URL."""
    todo = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and _ELSEWHERE.match(path):
                return True
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    return False


def _bytes_in(folder: Path) -> int:
    """Total size of the files in a folder and its subfolders."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def _remove_old(folder: Path) -> None:
    """Remove files older than a day."""
    latest = time.time() - _DAY
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_mtime < latest:
                path.unlink()


def _remove_parts(folder: Path) -> None:
    """Remove what gradio leaves of interrupted or rejected uploads; complete ones are in subfolders."""
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(path.lstat().st_mode):
                path.unlink()


async def _answer(send: Any, refusal: Refusal) -> None:
    body = f"{refusal.text}\n".encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
