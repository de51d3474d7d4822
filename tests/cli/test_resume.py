"""A run that is killed, at every stage, ends in the same files as one that is not."""

import os
import signal
import sys
from collections.abc import Callable

import pytest
import torch

from reclip_d2.cli import masks
from reclip_d2.cli.main import main
from reclip_d2.cli.run_folder import RunFolder
from reclip_d2.data import survey
from reclip_d2.engine.hooks import SeedIteration
from reclip_d2.formats import IndexWriter
from reclip_d2.formats.pictures import OverlayWriter
from reclip_d2.hypothesis.blocks import ScoreBlocks
from tests.cli.conftest import all_files, segment_arguments

FORMATS = ("--formats", "overlay", "cvat")


def kill_in_call(owner: object, name: str, number: int) -> Callable[[], None]:
    """Arrange that the process is killed when it calls ``owner.name`` for the ``number``-th time."""

    def arrange() -> None:
        original = getattr(owner, name)
        calls = []

        def counting(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, counting)

    return arrange


def run_killed(arguments: list[str], arrange: Callable[[], None]) -> None:
    """Run the command in a process of its own until it is killed. No cleaning up of ours, no `finally`, runs there."""
    process = os.fork()
    if process == 0:
        try:
            torch.set_num_threads(1)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            arrange()
            main(arguments)
        finally:
            os._exit(3)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


@pytest.fixture
def one_thread():
    """As in the processes that are killed: sums over another number of threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_killed_at_every_stage(reclip, photos, classes, tmp_path, monkeypatch):
    def arguments(output: str) -> list[str]:
        return segment_arguments("--iterations", "7", *FORMATS, output=output)

    monkeypatch.setattr(survey, "_LARGE", 0)  # one image after the other, so that the order of calls is known
    whole = reclip(*arguments("whole"))
    assert whole.status == 0, whole.err
    stages = {
        "survey": (survey, "_look", 4),
        "hypotheses": (ScoreBlocks, "write", 1),
        "first training": (SeedIteration, "before_step", 4),
        "second training": (SeedIteration, "before_step", 3),
        "masks": (masks, "count_pixels", 3),
        "a mask, before its rename": (IndexWriter, "_add", 2),
        "formats": (OverlayWriter, "_add", 4),
    }
    for stage, kill in stages.items():
        run_killed(arguments("broken"), kill_in_call(*kill))
        done = len(list((tmp_path / "broken" / "masks").rglob("*.png")))
        expected = {"masks": 2, "a mask, before its rename": 3, "formats": 6}.get(stage, 0)
        assert done == expected, stage
    last = reclip(*arguments("broken"))
    assert last.status == 0, last.err
    assert "rectification: done before" in last.out

    expected, found = all_files(tmp_path / "whole"), all_files(tmp_path / "broken")
    kept = ("masks/", "overlay/", "cvat/", "summary.json", "run/hypotheses.jsonl")
    results = {name for name in expected if name.startswith(kept)}
    assert {name for name in found if name.startswith(kept)} == results and len(results) > 14
    for name in sorted(results):
        assert found[name] == expected[name], name
    weights = [
        torch.load(tmp_path / name / "run" / "rectified" / "model_final.pth", weights_only=True)["model"]
        for name in ("whole", "broken")
    ]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_an_interrupt_says_how_to_go_on(segment, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SeedIteration, "before_step", interrupt)
    outcome = segment()
    assert outcome.status == 130 and "the same command goes on from here" in outcome.err
    assert "Traceback" not in outcome.err


def test_two_runs_in_one_folder(model, segment):
    with RunFolder(model).lock():
        assert "another run works in" in segment().error
    assert segment().status == 0
