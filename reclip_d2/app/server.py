"""Start and stop the page's server; nothing that the page does leaves the machine."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from reclip_d2.app.guard import Guard, Names
from reclip_d2.app.private_folder import private_folder
from reclip_d2.app.session import Session
from reclip_d2.errors import ReclipError

# gradio reads these when it is imported, or when it starts.
_SETTINGS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# Browser pages whose state is kept, each with an image of the size that is shown.
_SESSIONS = 64
# Requests that may wait in the queue.
_WAITING = 256


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
def serve(session: Session, host: str, port: int, allowed_hosts: Sequence[str] = ()) -> Iterator[str]:
    """Serve the page of a session as long as the block runs; yields its address.

    Args:
        allowed_hosts: further names that the page is opened by, such as that of a proxy in front of it.

    Raises:
        ReclipError: the server cannot start.
    """
    uploads = session.own_folder() / "uploads"
    uploads.mkdir(exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    _reach_local_without_proxy(host)
    from starlette.middleware import Middleware

    from reclip_d2.app.page import CSS, build_page, theme

    with contextlib.ExitStack() as stack:
        stack.callback(session.close)  # last: then nothing is written any more
        page = build_page(session)
        page.queue(max_size=_WAITING)
        guard = Middleware(Guard, names=server_names(host, allowed_hosts), limits=session.limits, uploads=uploads)
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
                app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None},
                max_file_size=session.limits.file_bytes,
                state_session_capacity=_SESSIONS,
                enable_monitoring=False,
            )
        except OSError as error:
            raise ReclipError(f"--host {host} --port {port} cannot be used ({error}): give another --port") from error
        stack.callback(page.close, verbose=False)
        stack.callback(session.stop_all)
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


def server_names(host: str, allowed_hosts: Sequence[str] = ()) -> Names:
    """What a server that listens at ``host`` may be called; see :func:`serve`."""
    proxied = frozenset(name.lower().rstrip(".") for name in allowed_hosts)
    names = {"localhost", host.lower()}
    if is_local(host):
        return Names(frozenset(names), proxied=proxied)
    own = socket.gethostname().lower()
    return Names(frozenset({*names, own, own.partition(".")[0], f"{own}.local"}), addresses=True, proxied=proxied)


def working_folder(parent: Path | None) -> contextlib.AbstractContextManager[Path]:
    """A folder to work in: that of the user, which stays, or one that goes with the block."""
    if parent is None:
        return private_folder(Path(tempfile.gettempdir()), "reclip-app-")
    parent.mkdir(parents=True, exist_ok=True)
    return contextlib.nullcontext(parent)
