"""Start and stop the page's server; nothing that the page does leaves the machine."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reclip_d2.app.session import Session
from reclip_d2.errors import ReclipError

# gradio reads these when it is imported, or when it starts.
_SETTINGS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# The browser refuses whatever the page would fetch from another host.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; worker-src 'self' blob:;"
    " connect-src 'self' data: blob:"
)


class ContentPolicy:
    """ASGI middleware that sends :data:`CONTENT_POLICY` with every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", CONTENT_POLICY.encode())
                message["headers"] = [*message.get("headers", []), policy]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def check_gradio() -> None:
    """Raise :class:`ReclipError` if gradio, an optional dependency, cannot be imported."""
    os.environ.update(_SETTINGS)
    try:
        import gradio
        from starlette.middleware import Middleware  # noqa: F401  (comes with gradio)
    except ImportError as error:
        raise ReclipError(f'reclip app needs gradio ({error}): pip install "reclip_d2[app]"') from error
    if int(gradio.__version__.split(".")[0]) < 6:
        raise ReclipError(f'reclip app needs gradio 6, not {gradio.__version__}: pip install "reclip_d2[app]"')


def check_address(host: str, port: int) -> None:
    """Raise :class:`ReclipError` if nothing can listen there."""
    if not 0 < port < 65536:
        raise ReclipError(f"--port {port}: give a number from 1 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise ReclipError(f"--host {host} is unknown ({error.strerror}): take 127.0.0.1") from error
    except OSError as error:
        raise ReclipError(
            f"--host {host} --port {port} cannot be used ({error.strerror}): give another --port"
        ) from error


@contextlib.contextmanager
def serve(session: Session, host: str, port: int) -> Iterator[str]:
    """Serve the page of a session as long as the block runs; yields its address.

    Raises:
        ReclipError: the server cannot start.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(session.own_folder() / "uploads")
    _reach_local_without_proxy(host)
    from starlette.middleware import Middleware

    from reclip_d2.app.page import CSS, build_page, theme

    with contextlib.ExitStack() as stack:
        stack.callback(session.close)  # last: then nothing is written any more
        page = build_page(session)
        try:
            _, address, _ = page.launch(
                server_name=f"[{host}]" if ":" in host else host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                inbrowser=False,
                ssr_mode=False,
                show_error=True,
                allowed_paths=[str(session.masks)],  # of itself gradio takes files below the working folder and /tmp
                footer_links=[],
                theme=theme(),
                css=CSS,
                app_kwargs={"middleware": [Middleware(ContentPolicy)], "docs_url": None, "redoc_url": None},
            )
        except OSError as error:
            raise ReclipError(f"--host {host} --port {port} cannot be used ({error}): give another --port") from error
        stack.callback(page.close, verbose=False)
        stack.callback(session.stop_learning)
        yield address


def _reach_local_without_proxy(host: str) -> None:
    """gradio asks its own server whether it is there, and would ask a proxy for that."""
    for name in ("NO_PROXY", "no_proxy"):
        known = [entry for entry in os.environ.get(name, "").split(",") if entry]
        os.environ[name] = ",".join(dict.fromkeys([*known, "127.0.0.1", "localhost", host]))


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    return all(address == "::1" or address.startswith("127.") for address in addresses)


def working_folder(parent: Path | None) -> contextlib.AbstractContextManager[str]:
    """A folder to work in: that of the user, which stays, or one that goes with the block."""
    if parent is None:
        return tempfile.TemporaryDirectory(prefix="reclip-app-", ignore_cleanup_errors=True)
    parent.mkdir(parents=True, exist_ok=True)
    return contextlib.nullcontext(str(parent))
