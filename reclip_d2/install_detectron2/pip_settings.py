"""Where pip looks for packages and how it connects: ``pip config list``, which covers files and environment."""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping

from reclip_d2.errors import ReclipError

# pip prints its configuration, but not its default index, which is only in its code.
_DEFAULT_INDEX = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"

# Sections in the order in which pip reads them; a later one overrides an earlier one.
_SECTIONS = ("global", "install", ":env:")


@dataclasses.dataclass(frozen=True)
class PipSettings:
    """The parts of pip's configuration that matter for fetching a file.

    Attributes:
        indexes: addresses of package indexes, in the order of use.
        find_links: folders, or addresses of pages with links, which are searched first.
        certificates: file or folder of certificate authorities; None for the system's.
        client_certificate: file with a certificate and its key, for servers that require one.
        trusted_hosts: names, or names with a port, whose certificates are not checked.
        proxy: address; None for the environment's.
        timeout: seconds per attempt.
        retries: further attempts after a failure.
    """

    indexes: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    certificates: str | None = None
    client_certificate: str | None = None
    trusted_hosts: tuple[str, ...] = ()
    proxy: str | None = None
    timeout: float = 15.0
    retries: int = 3

    @classmethod
    def read(cls) -> PipSettings:
        """Settings of the running Python's pip; raises :class:`ReclipError` if pip does not work."""
        listing = _ask_pip("-m", "pip", "config", "list")
        return cls.parse(listing, os.environ, _ask_pip("-c", _DEFAULT_INDEX).strip())

    @classmethod
    def parse(cls, listing: str, environment: Mapping[str, str], default_index: str) -> PipSettings:
        """Settings from the output of ``pip config list``, lines of ``section.option='value'``.

        Args:
            default_index: address that is used if the settings name none.

        Raises:
            ReclipError: a setting that must be a number is not one.
        """
        values: dict[str, str] = {}
        lines = [line.partition("=") for line in listing.splitlines()]
        for section in _SECTIONS:
            for name, _, quoted in lines:
                if name.startswith(f"{section}."):
                    values[name.removeprefix(f"{section}.")] = _unquote(quoted)

        indexes = [values.get("index-url", default_index), *values.get("extra-index-url", "").split()]
        certificates = values.get("cert") or environment.get("REQUESTS_CA_BUNDLE") or environment.get("CURL_CA_BUNDLE")
        return cls(
            indexes=() if _is_true(values.get("no-index", "")) else tuple(dict.fromkeys(indexes)),
            find_links=tuple(values.get("find-links", "").split()),
            certificates=certificates or None,
            client_certificate=values.get("client-cert") or None,
            trusted_hosts=tuple(values.get("trusted-host", "").split()),
            proxy=values.get("proxy") or None,
            timeout=_number(values, "timeout", "default-timeout", default=cls.timeout),
            retries=int(_number(values, "retries", default=cls.retries)),
        )


def _ask_pip(*arguments: str) -> str:
    """Output of a command of the running Python, whose pip must work."""
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ReclipError(f"{sys.executable} has no working pip ({reason}): run python -m ensurepip")
    return result.stdout


def _unquote(text: str) -> str:
    try:
        return str(ast.literal_eval(text))
    except (SyntaxError, ValueError):
        return text


def _is_true(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "yes", "on", "y", "t")


def _number(values: Mapping[str, str], *names: str, default: float) -> float:
    for name in names:
        if name in values:
            try:
                return max(0.0, float(values[name]))
            except ValueError:
                raise ReclipError(f"pip's setting {name} is {values[name]!r}: it must be a number") from None
    return default
