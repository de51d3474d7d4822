"""pip's settings, from the output of ``pip config list``."""

import os
import subprocess
import sys
import types

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.install_detectron2 import pip_settings
from reclip_d2.install_detectron2.pip_settings import PipSettings

DEFAULT = "https://default.example/simple"


def test_without_a_configuration_it_is_the_default():
    assert PipSettings.parse("", {}, DEFAULT) == PipSettings(indexes=(DEFAULT,))


def test_sections_override_each_other_in_pips_order():
    lines = [
        ":env:.index-url='https://env.example/simple'",
        "install.index-url='https://install.example/simple'",
        "global.index-url='https://global.example/simple'",
        "global.extra-index-url='https://one.example/simple\\nfile:///two/simple'",
        "install.find-links='/wheels https://links.example/page'",
        "download.cert='/not/for/us.pem'",
        "global.default-timeout='60'",
        "global.timeout='90'",
        "global.retries='1'",
        ":env:.trusted-host='a.example b.example:8080'",
        ":env:.client-cert='/mine.pem'",
        ":env:.proxy='http://proxy.example:3128'",
    ]
    assert PipSettings.parse("\n".join(lines), {"REQUESTS_CA_BUNDLE": "/ca.pem"}, DEFAULT) == PipSettings(
        indexes=("https://env.example/simple", "https://one.example/simple", "file:///two/simple"),
        find_links=("/wheels", "https://links.example/page"),
        certificates="/ca.pem",
        client_certificate="/mine.pem",
        trusted_hosts=("a.example", "b.example:8080"),
        proxy="http://proxy.example:3128",
        timeout=90.0,
        retries=1,
    )


@pytest.mark.parametrize(("text", "indexes"), [("1", ()), ("true", ()), ("0", (DEFAULT,)), ("False", (DEFAULT,))])
def test_no_index(text, indexes):
    assert PipSettings.parse(f":env:.no-index='{text}'", {}, DEFAULT).indexes == indexes


def test_certificates_that_pip_names_come_first():
    found = PipSettings.parse("global.cert='/pip.pem'", {"REQUESTS_CA_BUNDLE": "/other.pem"}, DEFAULT)
    assert found.certificates == "/pip.pem"


def test_a_number_that_is_none():
    with pytest.raises(ReclipError, match="pip's setting timeout is 'soon': it must be a number"):
        PipSettings.parse("global.timeout='soon'", {}, DEFAULT)


def test_a_python_without_pip(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="/python: No module named pip\n")
    monkeypatch.setattr(pip_settings, "subprocess", types.SimpleNamespace(run=lambda command, **options: failed))
    with pytest.raises(ReclipError, match=r"has no working pip \(.*No module named pip\): run python -m ensurepip"):
        PipSettings.read()


def test_the_real_pip_is_understood(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mine.example/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://other.example/simple https://third.example/simple")
    found = PipSettings.read()
    assert found.indexes == (
        "https://mine.example/simple",
        "https://other.example/simple",
        "https://third.example/simple",
    )


def test_the_default_index_is_pips_own(monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    help_text = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--help"], capture_output=True, text=True, check=True
    ).stdout
    (index,) = PipSettings.read().indexes
    assert f"(default {index})" in " ".join(help_text.split())
