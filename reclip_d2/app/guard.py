"""What reaches the page's server at all: requests of the page itself, no larger than it takes.

A page of another site can send requests to a server on this machine, and by DNS rebinding even read the answers. So
each request must be for a name of this server, and come from its own page; gradio's routes that the page has no use for
are closed.
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

from reclip_d2.app.limits import Limits

# The browser refuses whatever the page would fetch from another host, and shows the page in no frame.
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
"""Sent with every answer."""

UPLOAD = "/gradio_api/upload"
# Routes of gradio that start programs, fetch addresses, mount other pages or edit the source: the page uses none.
_CLOSED = re.compile(
    r"/(gradio_api/(process_recording|component_server|proxy=|stream/|vibe|undo-vibe|dev/|run-history|runs|profiling|"
    r"custom_component|deep_link|file=https?:|mcp)|monitoring|login|logout|deep_link)",
    re.IGNORECASE,
)
_MESSAGE_BYTES = 4 * 2**20  # of a request that uploads nothing
_DAY = 86400  # seconds
_ELSEWHERE = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclasses.dataclass(frozen=True)
class Names:
    """What the server may be called in an address.

    Attributes:
        allowed: names, in lower case.
        addresses: every numeric address will do: the server listens for other machines, and no foreign name can lead
            to it by a numeric address.
        proxied: names of a proxy in front of it, which may pass requests on under another name.
    """

    allowed: frozenset[str]
    addresses: bool = False
    proxied: frozenset[str] = frozenset()

    def has(self, name: str) -> bool:
        """Whether a name or numeric address is the server's."""
        if name in self.allowed or name in self.proxied:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.addresses or address.is_loopback


class Refusal(Exception):
    """A request is not answered."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Guard:
    """ASGI middleware; see the module."""

    def __init__(self, app: Any, names: Names, limits: Limits, uploads: Path) -> None:
        """
        Args:
            app: the application behind it.
            uploads: folder where the application keeps uploads.
        """
        self.app = app
        self.names = names
        self.limits = limits
        self.uploads = uploads
        self._expected: list[int] = []  # bytes of the uploads that are under way

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page opens no web socket
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                known = {name for name, _ in ours}
                theirs = [pair for pair in message.get("headers", []) if pair[0].lower() not in known]
                message["headers"] = [*theirs, *ours]
            await send(message)

        try:
            headers = _Headers(scope)
            self._check_sender(scope["method"], headers)
            if _CLOSED.match(scope["path"]):
                raise Refusal(404, "there is no such thing on this page")
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

    # ---- who asks ---------------------------------------------------------------------------------------------

    def _check_sender(self, method: str, headers: _Headers) -> None:
        """Refuse what is for another host, or comes from the page of another."""
        host = headers.only("host")
        name, port = _host(host)
        forwarded = headers.all("x-forwarded-host")
        if not self.names.has(name) or not all(self.names.has(_host(other)[0]) for other in forwarded):
            raise Refusal(
                403, f"this server is not {name[:100]!r}: open it by its own address, or start it with --allow-host"
            )
        for origin in headers.all("origin"):
            if not self._is_own(origin, name, port):
                raise Refusal(403, "requests from pages of other sites are refused")
        if headers.one("sec-fetch-site") in ("cross-site", "same-site"):
            opened = headers.one("sec-fetch-mode") == "navigate" and headers.one("sec-fetch-dest") == "document"
            if method not in ("GET", "HEAD") or not opened:  # a link to the page is fine
                raise Refusal(403, "requests from pages of other sites are refused")

    def _is_own(self, origin: str, name: str, port: int | None) -> bool:
        """Whether an ``Origin`` is the page that this request's ``Host`` serves."""
        try:
            parts = urlsplit(origin)
            own, own_port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            return False
        default = _DEFAULT_PORTS.get(parts.scheme)
        if default is None:
            return False
        return own in self.names.proxied or (own == name and (own_port or default) == (port or default))

    # ---- how much ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _upload(self, headers: _Headers) -> Iterator[None]:
        """Refuse an upload that is too large, before any of it is read."""
        length = headers.one("content-length")
        if not length.isdecimal():
            raise Refusal(411, "an upload must say its length")
        size = int(length)
        room = self.limits.upload_bytes - size - sum(self._expected)
        if _bytes_in(self.uploads) > room:
            _remove_old(self.uploads)
        if _bytes_in(self.uploads) > room:
            most = f"{self.limits.upload_bytes / 2**30:.3g} GiB"
            raise Refusal(
                413, f"the uploads would have more than {most} together: upload fewer, or restart the page's server"
            )
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
        raise Refusal(400, "the Host header is wrong") from None
    if not name or parts.netloc != value or "@" in value:
        raise Refusal(400, "the Host header is wrong")
    return name, port


class _Headers:
    """The headers of a request."""

    def __init__(self, scope: Any) -> None:
        self._pairs = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]

    def all(self, name: str) -> list[str]:
        return [value.strip() for key, value in self._pairs if key == name]

    def one(self, name: str) -> str:
        """Its value, empty without one, or of the first of several."""
        return next(iter(self.all(name)), "")

    def only(self, name: str) -> str:
        values = self.all(name)
        if len(values) != 1:
            raise Refusal(400, f"there must be one {name} header")
        return values[0]


async def _read_message(receive: Any, headers: _Headers) -> Any:
    """Read the body of a request that uploads nothing; returns what gives it to the application.

    It may be no longer than a message of the page is, and may name no file of elsewhere: gradio would fetch it.
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
            raise Refusal(400, "the request is no message of the page") from None
        if _names_elsewhere(content):
            raise Refusal(403, "files are taken from uploads alone")
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _names_elsewhere(content: Any) -> bool:
    """Whether a message names a file by an address."""
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
    """Bytes of the files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def _remove_old(folder: Path) -> None:
    """Remove the files of yesterday and before."""
    latest = time.time() - _DAY
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_mtime < latest:
                path.unlink()


def _remove_parts(folder: Path) -> None:
    """Remove what gradio leaves of uploads that were cut short or refused: complete ones lie in folders."""
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
