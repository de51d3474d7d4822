"""A run that is killed at any stage and resumed produces the same files as an uninterrupted one."""

import os
import signal
from collections.abc import Callable

import pytest
import torch

from reclip_d2.cli.main import main
from reclip_d2.data import survey
from reclip_d2.engine.train_loop import SeedIteration
from reclip_d2.features.store import FeatureStore
from reclip_d2.formats import IndexWriter
from reclip_d2.formats.pictures import OverlayWriter
from reclip_d2.hypothesis import dense
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from reclip_d2.workspace import judgement, masks
from reclip_d2.workspace.run_folder import RunFolder
from tests.cli.conftest import all_files, segment_arguments
from tests.kills import kill_at_new_rename, run_killed, run_with_kills

FORMATS = ("--formats", "overlay", "cvat")
# Names of what two runs on the same inputs have in common, byte for byte.
KEPT = ("masks/", "previous-", "overlay/", "cvat/", "summary.", "run/hypotheses.jsonl", "run/decision.json")


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
        return segment_arguments("--iterations", "7", "--keep", "best", *FORMATS, output=output)

    monkeypatch.setattr(survey, "_LARGE", 0)  # one image after the other, so that the order of calls is known
    whole = reclip(*arguments("whole"))
    assert whole.status == 0, whole.err
    stages = {
        "survey": (survey, "_look", 4),
        "features": (FeatureStore, "_encode", 5),
        "hypotheses": (dense, "whole_view", 9),
        "first masks": (masks, "count_pixels", 4),
        "first training": (SeedIteration, "before_step", 4),
        "second training": (SeedIteration, "before_step", 3),
        "calibration": (judgement, "class_offset", 1),
        "judgement": (judgement, "predicted_labels", 2),
        "masks": (masks, "count_pixels", 3),
        "a mask, before its rename": (IndexWriter, "_add", 2),
        "formats": (OverlayWriter, "_add", 4),
    }
    for stage, kill in stages.items():
        assert run_killed(lambda: main(arguments("broken")), kill_in_call(*kill)) == -signal.SIGKILL
        done = len(list((tmp_path / "broken" / "masks").rglob("*.png")))
        expected = {"first masks": 3, "first training": 6, "second training": 6, "calibration": 6,
                    "judgement": 6, "masks": 2,
                    "a mask, before its rename": 3, "formats": 6}.get(stage, 0)  # fmt: skip
        assert done == expected, stage
    last = reclip(*arguments("broken"))
    assert last.status == 0, last.err
    assert "rectification: done before" in last.out

    expected, found = all_files(tmp_path / "whole"), all_files(tmp_path / "broken")
    results = {name for name in expected if name.startswith(KEPT)}
    assert {name for name in found if name.startswith(KEPT)} == results and len(results) > 14
    for name in sorted(results):
        assert found[name] == expected[name], name
    weights = [
        torch.load(tmp_path / name / "run" / "rectified" / "model_final.pth", weights_only=True)["model"]
        for name in ("whole", "broken")
    ]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def weights_of(run) -> dict[str, dict[str, torch.Tensor]]:
    return {
        path.parent.name: torch.load(path, weights_only=True)["model"]
        for path in sorted((run / "run").glob("*/model_final.pth"))
    }


def assert_same_results(whole, broken) -> None:
    """The same masks, formats, hypotheses and weights; and nothing is left of the kills."""
    expected, found = ({k: v for k, v in all_files(run).items() if k.startswith(KEPT)} for run in (whole, broken))
    assert found == expected
    weights, others = weights_of(whole), weights_of(broken)
    assert weights.keys() == others.keys()
    for kind, tensors in weights.items():
        assert all(torch.equal(value, others[kind][key]) for key, value in tensors.items()), kind
    for run in (whole, broken):
        names = {path.name for path in run.rglob("*")}
        hidden = {name for name in names if name.startswith(".")} - {".lock", ".coverage.jsonl"}
        assert not {name for name in hidden if not name.endswith(".lock")}
        assert not any(name.startswith("model_0") or ".parts-" in name or name == "features" for name in names)


@pytest.mark.usefixtures("one_thread")
def test_killed_at_the_first_rename(reclip, photos, classes, tmp_path):
    """The folder then contains only a half-written file, and does not count as a folder with other files."""
    arguments = segment_arguments("--fast", output="broken")
    kill = kill_at_new_rename(set(), tmp_path / "killed.txt")
    assert run_killed(lambda: main(arguments), kill) == -signal.SIGKILL
    assert (tmp_path / "killed.txt").read_text() == "before reclip.json"
    assert any(path.name.startswith(".reclip.json.") for path in (tmp_path / "broken").iterdir())
    assert reclip(*arguments).status == 0
    assert not any(path.name.startswith(".reclip.json.") for path in (tmp_path / "broken").iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_killed_at_every_rename_without_training(reclip, photos, classes, tmp_path):
    assert reclip(*segment_arguments("--fast", *FORMATS, output="whole")).status == 0
    moments = run_with_kills(lambda: main(segment_arguments("--fast", *FORMATS, output="broken")), tmp_path)
    assert moments[0] == "before reclip.json"  # and yet the folder does not count as one with other files
    assert {f"before {number}.png" for number in range(6)} <= set(moments) and "after summary.json" in moments
    assert_same_results(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "flags",
    [(), ("--student", "--student-iterations", "4"), ("--method", "reclippp_rectify")],
    ids=["rectified", "student", "published"],
)
def test_killed_at_every_rename(reclip, photos, classes, tmp_path, flags):
    """With checkpoints after iteration 2, 4 and 6, where the training ends: the last is followed by the final one."""
    arguments = [*flags, "--iterations", "6", *FORMATS]
    assert reclip(*segment_arguments(*arguments, output="whole")).status == 0
    moments = run_with_kills(lambda: main(segment_arguments(*arguments, output="broken")), tmp_path)
    assert {"before model_final.pth", "after model_final.pth", "after last_checkpoint: model_0000005.pth"} <= set(
        moments
    )
    shard = "after 000000.npz" if "--method" in flags else "after 0000.safetensors"
    assert {"before hypotheses.jsonl", "after images.json", "before summary.html", "after decision.json"} <= set(
        moments
    )
    assert shard in moments
    assert_same_results(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.usefixtures("one_thread")
def test_a_kill_between_the_last_checkpoint_and_the_final_one(reclip, photos, classes, tmp_path):
    def kill_before_the_final_checkpoint() -> None:
        save = ReclipCheckpointer.save

        def saving(self: object, name: str, **kwargs: object) -> None:
            if name == "model_final":
                os.kill(os.getpid(), signal.SIGKILL)
            save(self, name, **kwargs)

        ReclipCheckpointer.save = saving

    arguments = segment_arguments("--iterations", "4", output="broken")  # checkpoints at 2 and 4
    assert reclip(*segment_arguments("--iterations", "4", output="whole")).status == 0
    assert run_killed(lambda: main(arguments), kill_before_the_final_checkpoint) == -signal.SIGKILL
    model = tmp_path / "broken" / "run" / "rectified"
    assert (model / "model_0000003.pth").exists() and not (model / "model_final.pth").exists()
    assert reclip(*arguments).status == 0
    assert_same_results(tmp_path / "whole", tmp_path / "broken")


def test_checkpoints_that_a_kill_left_beside_the_final_one(segment, model):
    folder = model / "run" / "rectified"
    for name in ("model_0000001.pth", "model_0000003.pth", "model_best.pth", "model_00.pth"):
        (folder / name).write_bytes(b"x")
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    (folder / ".model_final.pth.0a1b2c3d.tmp.pth").touch()
    assert segment().status == 0
    assert {path.name for path in folder.iterdir() if "model" in path.name} == {
        "model_final.pth", "model_best.pth", "model_00.pth",
    }  # fmt: skip
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


def test_an_interrupt_says_how_to_go_on(segment, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SeedIteration, "before_step", interrupt)
    outcome = segment()
    assert outcome.status == 130 and "repeat the command to resume" in outcome.err
    assert "Traceback" not in outcome.err


def test_two_runs_in_one_folder(model, segment):
    with RunFolder(model).lock():
        assert "another run is using" in segment().error
    assert segment().status == 0
