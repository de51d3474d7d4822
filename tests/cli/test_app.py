"""``reclip app``: arguments, errors, and exit."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from reclip_d2.app.command import _stop_on_signals, choose_models
from reclip_d2.app.server import is_local
from reclip_d2.cli.main import build_parser

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """What the command sets in the environment is given back."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")


def test_without_gradio(reclip, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'pip install "reclip_d2[app]"' in reclip("app", "--clip", "reclip-embedded").error


def test_an_old_gradio(reclip, monkeypatch):
    monkeypatch.setattr("gradio.__version__", "5.49.1")
    assert "needs gradio 6, not 5.49.1" in reclip("app", "--clip", "reclip-embedded").error


def test_a_taken_port(reclip):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = reclip("app", "--clip", "reclip-embedded", "--port", port).error
    assert f"--port {port} cannot be used" in error and "give another --port" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--port", "0"), "--port 0"),
        (("--port", "70000"), "--port 70000"),
        (("--host", "no.such.host.invalid"), "--host no.such.host.invalid is unknown"),
        (("--model", "nowhere"), "--model nowhere is neither an output folder of reclip segment"),
        (("--clip", "no-such-clip"), "--clip no-such-clip is not known"),
        (("--device", "tpu"), "--device tpu"),
    ],
)
def test_wrong_arguments(reclip, arguments, words):
    assert words in reclip("app", "--port", free_port(), *arguments).error


def test_a_model_brings_its_clip(reclip, model):
    def choose(*arguments):
        return choose_models(build_parser().parse_args(["app", *arguments]))

    clip, trained = choose("--model", "out", "--device", "cpu", "--opts", "SEED", "3")
    assert (clip.name, clip.device, clip.opts) == ("reclip-embedded", "cpu", ("SEED", "3"))
    assert trained.kind == "rectified" and trained.folder.path == model
    clip, trained = choose("--clip", "reclip-embedded", "--device", "cpu")
    assert clip.name == "reclip-embedded" and trained is None
    both = ("--model", "out", "--clip", "reclip-embedded")
    assert "omit --clip" in reclip("app", "--port", free_port(), *both).error


def test_who_can_reach_it():
    assert is_local("127.0.0.1") and is_local("::1") and is_local("localhost") and not is_local("0.0.0.0")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number):
    """Either interrupts, also where it was ignored; the second would end the process at once."""
    before = {known: signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(number, signal.SIG_IGN)
        _stop_on_signals()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            signal.pause()
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)


def test_it_serves_until_it_is_told_to_end(tmp_path):
    """It prints its address, responds there, exits with status 0, and leaves no files."""
    port = free_port()
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    # No proxy shall be asked for what is on this machine.
    environment |= {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "NO_PROXY": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "reclip_d2", "app", "--clip", "reclip-embedded", "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        address = re.search(r"http://\S+", lines[1])
        assert address is not None, "".join(lines) + process.stderr.read()
        assert address[0] == f"http://127.0.0.1:{port}/"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(address[0], timeout=300) as reply:
            assert reply.status == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0 and "stopped" in out and "Traceback" not in err, out + err
    assert not list(tmp_path.glob("reclip-app-*"))
