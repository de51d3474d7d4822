"""``--shard I/N``: parts of a run in one output folder, which together write what one run writes."""

import os
import signal

import pytest

from reclip_d2.cli.main import main
from reclip_d2.utils.locks import try_lock
from reclip_d2.workspace import masks
from reclip_d2.workspace.run_folder import RunFolder
from tests.cli.conftest import all_files, segment_arguments
from tests.cli.test_resume import kill_in_call, one_thread, weights_of
from tests.kills import run_killed

__all__ = ["one_thread"]
FORMATS = ("--formats", "overlay", "cvat", "scores")


def predict_arguments(output: str, *arguments: str) -> list[str]:
    return ["predict", "photos", "--model", "out", "--output", output, "--device", "cpu", *FORMATS, *arguments]


def results(folder) -> dict[str, bytes]:
    """All files but those of the run; the summary page names no folder."""
    files = all_files(folder)
    return {name: content for name, content in files.items() if not name.startswith(("run/", "reclip.json"))}


@pytest.mark.usefixtures("one_thread")
def test_predict_in_any_order(reclip, model, photos, tmp_path):
    (photos / "bad.png").write_bytes(b"")
    assert reclip(*predict_arguments("whole", "--skip-broken")).status == 0
    for number, missing in ((3, 5), (1, 2)):
        part = reclip(*predict_arguments("parts", "--skip-broken", "--shard", f"{number}/3"))
        assert part.status == 0, part.err
        assert f"{missing} images have no mask yet" in part.out and "images of other shards are done" in part.out
        assert not (tmp_path / "parts" / "summary.json").exists() and not (tmp_path / "parts" / "cvat").exists()
    again = reclip(*predict_arguments("parts", "--skip-broken", "--shard", "3/3"))
    assert again.status == 0 and "(0 new)" in again.out
    last = reclip(*predict_arguments("parts", "--skip-broken", "--shard", "2/3"))
    assert last.status == 0 and "6 masks" in last.out and "no mask of bad" in last.out
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    # A run without --shard, and another division, find everything done.
    for arguments in ((), ("--shard", "1/2")):
        after = reclip(*predict_arguments("parts", "--skip-broken", *arguments))
        assert after.status == 0 and "(0 new)" in after.out
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


@pytest.mark.usefixtures("one_thread")
def test_at_once_with_a_kill(reclip, model, photos, tmp_path):
    assert reclip(*predict_arguments("whole")).status == 0
    kill = kill_in_call(masks, "count_pixels", 2)
    assert run_killed(lambda: main(predict_arguments("parts", "--shard", "2/2")), kill) == -signal.SIGKILL
    processes = []
    for number in (1, 2):
        process = os.fork()
        if process == 0:
            arguments = predict_arguments("parts", "--shard", f"{number}/2")
            os._exit(run_killed(lambda: main(arguments), lambda: None))  # noqa: B023
        processes.append(process)
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes] == [0, 0]
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_who_waits_and_who_is_refused(reclip, model, photos, tmp_path):
    assert reclip(*predict_arguments("parts", "--shard", "1/2")).status == 0
    lock = try_lock(tmp_path / "parts" / ".shard-1-of-2.lock")
    assert "another run of shard 1/2 is using" in reclip(*predict_arguments("parts", "--shard", "1/2")).error
    assert "a run of shard 1-of-2 is using" in reclip(*predict_arguments("parts")).error
    beside = reclip(*predict_arguments("parts", "--shard", "2/2"))  # all masks are made, but not all runs have ended
    assert beside.status == 0 and not (tmp_path / "parts" / "summary.json").exists()
    lock.release()
    assert reclip(*predict_arguments("parts")).status == 0 and (tmp_path / "parts" / "summary.json").exists()
    other = ("--use", "maskclip", "--opts", "MODEL.CLIP.TEMPLATES", "photo")
    assert "shards do not move them aside" in reclip(*predict_arguments("parts", "--shard", "1/2", *other)).error
    assert "--overwrite and --shard" in reclip(*predict_arguments("parts", "--shard", "1/2", "--overwrite")).error
    assert "--shard '3/2': give I/N" in reclip(*predict_arguments("parts", "--shard", "3/2")).error
    # Only a lock is left by a run that was killed before anything else: the folder counts as new.
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".shard-1-of-2.lock").touch()
    assert not RunFolder(tmp_path / "killed").is_used()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", [(), ("--method", "reclippp_rectify")], ids=["dense", "windows"])
def test_segment(reclip, photos, classes, tmp_path, method, monkeypatch):
    monkeypatch.setattr("reclip_d2.features.shards.FEWEST_VIEWS", 2)
    monkeypatch.setattr("reclip_d2.hypothesis.blocks.BLOCK_SIZE", 2)
    monkeypatch.setattr("reclip_d2.hypothesis.blocks.ScoreBlocks.__init__.__defaults__", (2,))
    (photos / "bad.png").write_bytes(b"")
    arguments = (*method, "--skip-broken", "--iterations", "3")
    assert reclip(*segment_arguments(*arguments, output="whole")).status == 0
    words = {"2/2": "run the other shards", "1/2": "run the command without --shard"}
    for shard, then in words.items():
        part = reclip(*segment_arguments(*arguments, "--shard", shard, output="parts"))
        assert part.status == 0 and then in part.out, part.err
        assert not (tmp_path / "parts" / "run" / "hypotheses.jsonl").exists()
    files = [*(tmp_path / "parts" / "run").rglob("*.safetensors"), *(tmp_path / "parts" / "run").rglob("*.npz")]
    assert len(files) >= 3

    def forbidden(*_: object) -> None:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr("reclip_d2.features.store.FeatureStore._encode", forbidden)
        patch.setattr("reclip_d2.hypothesis.generate._window_arrays", forbidden)
        last = reclip(*segment_arguments(*arguments, output="parts"))
    assert last.status == 0, last.err
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all((value == parts["rectified"][key]).all() for key, value in whole["rectified"].items())
    assert "--shard and --fast" in reclip(*segment_arguments("--fast", "--shard", "1/2")).error
