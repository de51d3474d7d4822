"""Find a file of a project on package indexes (the simple API, as JSON or HTML), fetch it and check its hash.

``pip download`` does not work: it builds the metadata of a source archive, which fails for this one.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import netrc
import ssl
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from reclip_d2.errors import ReclipError
from reclip_d2.install_detectron2.pip_settings import PipSettings

_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_MAX_BYTES = 64 * 2**20  # largest response, far above the size of the archive or a page
_PAUSE = 0.5  # seconds before the second attempt; doubles each time


def fetch_file(settings: PipSettings, project: str, file_name: str, sha256: str) -> bytes:
    """The content of a project's file, from the first place that has it with the right hash.

    Args:
        settings: pip's settings, with the places to search.
        project: normalised name, such as ``detectron2-cdo``.
        file_name: the file's name, as listed by the index.
        sha256: hexadecimal digest of the content.

    Raises:
        ReclipError: no place has it; the message gives the reason for each.
    """
    client = Client(settings)
    problems = []
    for place in (*settings.find_links, *(f"{index.rstrip('/')}/{project}/" for index in settings.indexes)):
        try:
            address = next((link for link in client.links(place) if _file_name(link) == file_name), None)
            if address is None:
                problems.append(f"{without_password(place)} does not list it")
                continue
            content = client.read(address)[0]
        except OSError as error:
            problems.append(f"{without_password(place)}: {_reason(error)}")
            continue
        found = hashlib.sha256(content).hexdigest()
        if found == sha256:
            return content
        problems.append(f"{without_password(address)} is another file: SHA-256 {found}, not {sha256}")
    raise ReclipError(
        f"cannot fetch {file_name}: {'; '.join(problems) or 'pip is configured for no index and no links'}."
        " Download the file elsewhere, and pass it with --sdist FILE"
    )


def without_password(address: str) -> str:
    """An address without its user and password, for messages."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else address


def _file_name(address: str) -> str:
    return unquote(urlsplit(address).path).rpartition("/")[2]


def _reason(error: OSError) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return error.strerror or str(error) or type(error).__name__


class Client:
    """Reads addresses according to pip's settings."""

    def __init__(self, settings: PipSettings) -> None:
        self.settings = settings
        self._proxies = None if settings.proxy is None else {"http": settings.proxy, "https": settings.proxy}

    def links(self, place: str) -> list[str]:
        """Addresses of the files that a folder, a page or a project of an index lists; OSError if it cannot be read."""
        folder = _local_path(place)
        if folder is not None and folder.is_dir() and not (folder / "index.html").is_file():
            return [path.resolve().as_uri() for path in sorted(folder.iterdir())]
        content, base, content_type = self.read(place)
        text = content.decode("utf-8", "replace")
        if "json" in content_type:
            try:
                return [urljoin(base, file["url"]) for file in json.loads(text)["files"]]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise OSError(f"its response is not a list of files ({type(error).__name__})") from error
        page = _Links()
        page.feed(text)
        return [urljoin(urljoin(base, page.base), link) for link in page.links]

    def read(self, address: str) -> tuple[bytes, str, str]:
        """Content, final address and content type of an address or a local path; OSError if it cannot be read."""
        path = _local_path(address)
        if path is not None:
            path = path / "index.html" if path.is_dir() else path
            with path.open("rb") as file:
                return _bounded(file), path.resolve().as_uri(), "text/html"
        for attempt in range(self.settings.retries + 1):
            last = attempt == self.settings.retries
            with contextlib.ExitStack() as stack:
                try:
                    answer = stack.enter_context(self._open(address))
                    return _bounded(answer), answer.url, answer.headers.get("Content-Type", "")
                except urllib.error.HTTPError as error:
                    error.close()
                    if last or (error.code < 500 and error.code != 429):
                        raise
                except http.client.HTTPException as error:
                    if last:
                        raise OSError(f"the response was cut off ({type(error).__name__})") from error
                except OSError as error:
                    certificate = isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError)
                    if last or certificate:
                        raise
            time.sleep(_PAUSE * 2**attempt)
        raise AssertionError("unreachable")

    def _open(self, address: str) -> http.client.HTTPResponse:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https"):
            raise OSError(f"{parts.scheme or 'no'} address: only http, https and file are supported")
        plain = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))
        request = urllib.request.Request(plain, headers={"Accept": _ACCEPT, "User-Agent": "reclip_d2"})
        login = _login(address)
        if login is not None:
            token = base64.b64encode(":".join(login).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(self._proxies),
            urllib.request.HTTPSHandler(context=self._ssl_context(parts.hostname or "", parts.port)),
        )
        return opener.open(request, timeout=self.settings.timeout or None)

    def _ssl_context(self, host: str, port: int | None) -> ssl.SSLContext:
        settings = self.settings
        if settings.certificates is None:
            context = ssl.create_default_context()
            with contextlib.suppress(ImportError, OSError):  # if Python cannot find the system's certificates
                from pip._vendor import certifi

                context.load_verify_locations(certifi.where())
        else:
            path = Path(settings.certificates)
            context = ssl.create_default_context(**{"capath" if path.is_dir() else "cafile": str(path)})
        if settings.client_certificate is not None:
            context.load_cert_chain(settings.client_certificate)
        if host in settings.trusted_hosts or f"{host}:{port}" in settings.trusted_hosts:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context


def _local_path(place: str) -> Path | None:
    """The path of a ``file:`` address or of a plain path; None for other addresses."""
    if place.startswith("file:"):
        return Path(urllib.request.url2pathname(urlsplit(place).path))
    return None if "://" in place else Path(place).expanduser()


def _bounded(stream: http.client.HTTPResponse) -> bytes:
    content = stream.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise OSError(f"more than {_MAX_BYTES >> 20} MiB")
    return content


def _login(address: str) -> tuple[str, str] | None:
    """User and password, from the address itself or else from the user's netrc file."""
    parts = urlsplit(address)
    if parts.username is not None:
        return unquote(parts.username), unquote(parts.password or "")
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        found = netrc.netrc().authenticators(parts.hostname or "")
        if found is not None:
            return found[0] or "", found[2] or ""
    return None


class _Links(HTMLParser):
    """The links of a page, and the base address that they are relative to."""

    def __init__(self) -> None:
        super().__init__()
        self.base = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get("href") or ""
        if tag == "base" and not self.base:
            self.base = address
        elif tag == "a" and address:
            self.links.append(address)
