"""Start and stop the page's server. Nothing the page does leaves the machine."""

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

# gradio reads these when it is imported or started.
_SETTINGS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# Open pages whose state is kept; each holds an image at display size.
_SESSIONS = 64
# Length of the request queue.
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
    """Raise :class:`ReclipError` if a server cannot listen there."""
    if not 0 < port < 65536:
        raise ReclipError(f"--port {port}: give a number from 1 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise ReclipError(f"--host {host} is unknown ({error.strerror}): use 127.0.0.1") from error
    except OSError as error:
        raise ReclipError(
            f"--host {host} --port {port} cannot be used ({error.strerror}): give another --port"
        ) from error


@contextlib.contextmanager
def serve(session: Session, host: str, port: int, allowed_hosts: Sequence[str] = ()) -> Iterator[str]:
    """Serve the page of a session during the block; yields the page's address.

    Args:
        allowed_hosts: additional names by which browsers open the page, such as a proxy's.

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
        stack.callback(session.close)  # runs last, when nothing writes any more
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
                allowed_paths=[str(session.masks)],  # by default the working folder and /tmp only
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
    """Exclude this machine from proxies: gradio requests its own server to see whether it is up."""
    for name in ("NO_PROXY", "no_proxy"):
        known = [entry for entry in os.environ.get(name, "").split(",") if entry]
        os.environ[name] = ",".join(dict.fromkeys([*known, "127.0.0.1", "localhost", host]))


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    return all(address == "::1" or address.startswith("127.") for address in addresses)


def server_names(host: str, allowed_hosts: Sequence[str] = ()) -> Names:
    """Names of a server that listens at ``host``; see :func:`serve`."""
    proxied = frozenset(name.lower().rstrip(".") for name in allowed_hosts)
    names = {"localhost", host.lower()}
    if is_local(host):
        return Names(frozenset(names), proxied=proxied)
    own = socket.gethostname().lower()
    return Names(frozenset({*names, own, own.partition(".")[0], f"{own}.local"}), addresses=True, proxied=proxied)


def working_folder(parent: Path | None) -> contextlib.AbstractContextManager[Path]:
    """The user's working folder, which is kept, or a temporary one, which is removed at the end of the block."""
    if parent is None:
        return private_folder(Path(tempfile.gettempdir()), "reclip-app-")
    parent.mkdir(parents=True, exist_ok=True)
    return contextlib.nullcontext(parent)
