"""Stopping at a plateau: the rule by hand, and runs that stop, resume and share the decision."""

import json

import pytest
import torch

from reclip_d2.config import load_config
from reclip_d2.engine import trainer
from reclip_d2.engine.launch_checks import scale_to_processes
from reclip_d2.engine.plateau import PlateauRule, StopAtPlateau
from reclip_d2.errors import ReclipError
from tests.helpers import (
    datasets,
    isolated_cache,
    register_dataset,
    register_tiny_model,
    stopped_in_iteration,
    write_scenes,
)
from tests.processes import run_processes
from tests.test_train_net import NAMES, assert_same, run, scene, weights

__all__ = ["datasets", "isolated_cache", "scene"]

# Any two windows are alike: a plateau is reached after 4 iterations, and the training ends after 7.
AT_ONCE = (
    "SOLVER.PLATEAU.ENABLED", "True", "SOLVER.PLATEAU.PERIOD", "1", "SOLVER.PLATEAU.WINDOW", "2",
    "SOLVER.PLATEAU.PATIENCE", "1", "SOLVER.PLATEAU.MASK_CHANGE", "1.0", "SOLVER.PLATEAU.LOSS_CHANGE", "1.0",
    "SOLVER.PLATEAU.COOL_DOWN", "3", "SOLVER.MAX_ITER", "12", "SOLVER.CHECKPOINT_PERIOD", "1",
)  # fmt: skip


def rule(**options: float) -> PlateauRule:
    return PlateauRule(**{"window": 2, "patience": 2, "mask_change": 0.25, "loss_change": 0.1, **options})


def saved(scene, output: str, name: str = "model_final") -> dict:
    return torch.load(scene / output / f"{name}.pth", weights_only=True)


def lines(scene, output: str) -> list[dict]:
    return [json.loads(line) for line in (scene / output / "metrics.json").read_text().splitlines()]


# ---- the rule ---------------------------------------------------------------------------------------------------


def test_changes_by_hand():
    one = rule()
    assert one.observe(torch.tensor([0, 0, 0, 0]), 4.0) == {}
    one.observe(torch.tensor([0, 0, 0, 1]), 2.0)
    one.observe(torch.tensor([0, 0, 1, 1]), 2.0)
    # Most frequent labels, the smaller one in a tie: 0 0 0 0 against 0 0 1 1, without jitter.
    expected = {"masks": 0.5, "loss": 0.5, "jitter": 0.0}
    assert one.observe(torch.tensor([0, 0, 1, 1]), 1.0) == pytest.approx(expected)
    assert not one.reached
    # 0 0 0 1 against 0 0 1 0, of which one in four has changed in the last window; 2 against 2.5.
    expected = {"masks": 0.5, "loss": -0.25, "jitter": 0.25}
    assert one.observe(torch.tensor([0, 0, 1, 0]), 4.0) == pytest.approx(expected)
    assert one.calm == 1  # 0.5 - 0.25 is the limit


def test_both_must_be_calm_for_some_periods():
    one = rule(mask_change=0.0)
    same, other = torch.zeros(4, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
    reached = []
    for labels, loss in [(same, 1.0)] * 4 + [(same, 0.5)] * 4 + [(other, 0.5)] * 4 + [(other, 0.6)]:
        one.observe(labels, loss)
        reached.append(one.reached)
    # Observations 5 to 7 see the loss fall and 10 to 11 the masks change; 8, 9 and 12 are calm, and so is 13: a rising
    # loss is no reason to train.
    assert reached == [False] * 8 + [True] + [False] * 3 + [True]


def test_the_state_continues_a_rule():
    torch.manual_seed(0)
    data = [(torch.randint(3, (20,)), float(torch.rand(()))) for _ in range(9)]
    one, two = rule(), rule()
    for labels, loss in data[:5]:
        one.observe(labels, loss)
    two.load_state_dict(one.state_dict())
    for labels, loss in data[5:]:
        assert one.observe(labels, loss) == two.observe(labels, loss) != {}


# ---- runs -------------------------------------------------------------------------------------------------------


def test_a_run_stops_after_a_cool_down_and_says_so(scene):
    run(scene, "out", *AT_ONCE, "TEST.EVAL_PERIOD", "100", "SOLVER.POLY_POWER", "0.5")
    assert saved(scene, "out")["iteration"] == 6
    log = (scene / "out" / "log.txt").read_text()
    assert "plateau after 4 of 12 iterations: in 2 held-out views, " in log and "label than 2 iterations before" in log
    assert "Exception" not in log
    values = {key: value for line in lines(scene, "out") for key, value in line.items()}
    assert values["plateau/iterations"] == 7 and "sem_seg/mIoU" in values
    assert {"plateau/masks", "plateau/loss", "plateau/jitter"} <= set(values)
    # Iteration 6 is the last of three: the poly schedule, times (1 - 2 / 3) ** 0.5.
    assert values["lr"] == pytest.approx(0.05 * (1 - 6 / 12) ** 0.5 * (1 / 3) ** 0.5)


def test_resume_is_exact(scene, monkeypatch):
    """Killed within a period, at the decision, and in the cool-down."""
    run(scene, "unbroken", *AT_ONCE)
    for iteration in (1, 3, 5):
        with stopped_in_iteration(iteration, monkeypatch):
            run(scene, "stopped", *AT_ONCE, "--resume")
    for _ in range(2):  # the second finds nothing left to do
        run(scene, "stopped", *AT_ONCE, "--resume")
        assert_same(weights(scene, "unbroken"), weights(scene, "stopped"))
        assert saved(scene, "stopped")["iteration"] == 6


def test_without_a_plateau_the_rule_changes_nothing(scene):
    """Crops are new in each iteration, so nothing is held out of the training."""
    run(scene, "off")
    run(scene, "on", *AT_ONCE[:6], "SOLVER.PLATEAU.PATIENCE", "100")
    assert_same(weights(scene, "off"), weights(scene, "on"))
    assert not saved(scene, "off")["trainer"].get("hooks", {}).get("StopAtPlateau")


def test_the_end_of_the_schedule_comes_first(scene):
    """After 4 of 7 iterations, a cool-down of 3 would end where the schedule does."""
    run(scene, "out", *AT_ONCE, "SOLVER.MAX_ITER", "7")
    assert "plateau after" not in (scene / "out" / "log.txt").read_text()
    run(scene, "full", "SOLVER.MAX_ITER", "7")
    assert_same(weights(scene, "full"), weights(scene, "out"))


def test_periods_are_scaled_with_the_processes():
    keys = ["SOLVER.REFERENCE_WORLD_SIZE", "1", "SOLVER.PLATEAU.PERIOD", "10", "SOLVER.PLATEAU.COOL_DOWN", "60"]
    plateau = scale_to_processes(load_config("", keys), 4).SOLVER.PLATEAU
    assert (plateau.PERIOD, plateau.COOL_DOWN) == (2, 15)
    keys = ["SOLVER.REFERENCE_WORLD_SIZE", "1", "SOLVER.PLATEAU.PERIOD", "1", "SOLVER.PLATEAU.COOL_DOWN", "0"]
    plateau = scale_to_processes(load_config("", keys), 4).SOLVER.PLATEAU
    assert (plateau.PERIOD, plateau.COOL_DOWN) == (1, 0)


@pytest.mark.parametrize(("key", "value"), [("PERIOD", "0"), ("MASK_CHANGE", "1.1"), ("COOL_DOWN", "-1")])
def test_bad_values(key, value):
    with pytest.raises(ReclipError, match=f"SOLVER.PLATEAU.{key}"):
        load_config("", [f"SOLVER.PLATEAU.{key}", value])


# ---- several processes ------------------------------------------------------------------------------------------


def stop_in_a_process(rank, folder):
    """Worker: only the main process sees a plateau; both must stop."""
    if rank == 0:
        write_scenes(folder / "train", 6, size=(32, 32))
    torch.distributed.barrier()
    images = sorted((folder / "train" / "images").iterdir())
    register_dataset("reclip_test_train", [{"file_name": str(path)} for path in images], NAMES)
    cfg = load_config(
        "",
        [
            *("MODEL.META_ARCHITECTURE", "RectifiedCLIP", "MODEL.BACKBONE.NAME", "DenseCLIP", "MODEL.DEVICE", "cpu"),
            *("MODEL.CLIP.NAME", register_tiny_model(folder), "MODEL.CLIP.PRETRAINED", "random"),
            *("MODEL.CLIP.TEMPLATES", "photo", "MODEL.BIAS_HEAD.PROMPT_LENGTH", "4"),
            *("DATASETS.TRAIN", "('reclip_test_train',)", "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "0"),
            *("INPUT.MIN_SIZE_TRAIN", "(32,)", "HYPOTHESIS.FILE", str(folder / "hypotheses.jsonl")),
            *("SOLVER.IMS_PER_BATCH", "4", "SEED", "0", "OUTPUT_DIR", str(folder / "out"), *AT_ONCE),
        ],
    )
    (folder / "out").mkdir(exist_ok=True)
    torch.manual_seed(0)
    made = trainer.Trainer(cfg)
    made.resume_or_load(resume=False)
    if rank:  # it must not look at masks
        (hook,) = (hook for hook in made._hooks if isinstance(hook, StopAtPlateau))
        hook.views = None
    made.train()
    torch.save({"iterations": made.iter, **made.model.module.state_dict()}, folder / f"{rank}.pt")


def test_processes_stop_together(tmp_path):
    run_processes(stop_in_a_process, tmp_path)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt")
        assert state.pop("iterations") == 7
        final = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
        trained = [key for key in final if "running" not in key and "num_batches" not in key]
        assert_same({key: state[key] for key in trained}, {key: final[key] for key in trained})
