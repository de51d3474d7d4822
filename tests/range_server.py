"""An HTTP server on the loopback that sends parts of files, which the standard library's does not."""

from __future__ import annotations

import contextlib
import http.server
import re
import threading
from collections.abc import Iterator
from urllib.parse import unquote


class RangeServer(http.server.ThreadingHTTPServer):
    """Serves files from memory.

    Attributes:
        files: contents by name.
        ranges: whether requests for a range of bytes get it, or the whole file.
        sent: bytes of each answer, in order.
        fails_from: answer requests for bytes from here on with an error; None for none.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.ranges, self.sent = True, []
        self.fails_from: int | None = None

    @property
    def address(self) -> str:
        """``http://127.0.0.1:PORT``."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: RangeServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        data = self.server.files.get(unquote(self.path.partition("?")[0]).lstrip("/"))
        if data is None:
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "") if self.server.ranges else None
        first, last = (int(asked[1]), int(asked[2] or len(data) - 1)) if asked else (0, len(data) - 1)
        if asked and self.server.fails_from is not None and last >= self.server.fails_from:
            self.send_error(403)
            return
        part = data[first : last + 1]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if with_body:
            self.server.sent.append(len(part))
            with contextlib.suppress(OSError):  # the client has enough
                self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving_ranges() -> Iterator[RangeServer]:
    """A running server."""
    with RangeServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
