"""Order, resume, rejection and failure of a suite's runs, with fake runs."""

import json
import threading

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.experiments.runner import estimated_time, run_pending
from tests.experiments.tiny_suite import SUITE, Worker, made_up_result, make_runs, write_suite

MAIN_SEED_0, MAIN_SEED_1 = ["plain", "model-seed0", "added-seed0"], ["model-seed1", "added-seed1"]
REST = ["student", "probe", "sweep_1", "sweep_2"]


def run(runs, worker, **arguments):
    lines = []
    return run_pending(runs, worker, say=lines.append, **arguments), lines


def rewrite(tmp_path, old, new):
    """The runs after a change of the suite file."""
    assert old in SUITE
    write_suite(tmp_path, SUITE.replace(old, new))


# ---- order -----------------------------------------------------------------------------------------------------


def test_the_main_table_comes_first_and_each_run_once(tmp_path):
    runs, worker = make_runs(tmp_path), Worker()
    failures, lines = run(runs, worker)
    assert failures == []
    rest = [[f"{key}-seed{seed}" for key in REST] for seed in (0, 1)]
    assert worker.done == [*MAIN_SEED_0, *MAIN_SEED_1, *rest[0], *rest[1]]
    assert lines[0].startswith("[ 1/13] plain: mIoU 50.0 in 0 s; ")
    assert lines[-1] == "[13/13] sweep_2-seed1: mIoU 50.0 in 0 s; all done"
    # Nothing is run again, neither by the same program nor by a new one.
    assert run(runs, worker)[1] == run(make_runs(tmp_path), worker)[1] == []
    assert len(worker.done) == 13


def test_a_run_gets_its_teacher_and_its_seed(tmp_path):
    jobs = {}

    def perform(job, output):
        jobs[job.folder.name] = dict(zip(job.options[::2], job.options[1::2], strict=True))
        assert output == job.folder / "output.txt"
        return made_up_result(1.0)

    run(make_runs(tmp_path, options=("SOLVER.MAX_ITER", "3"), dataset="embedded_dev"), perform)
    student, probe = jobs["student-seed1"], jobs["probe-seed1"]
    checkpoint = str(tmp_path / "out" / "runs" / "model-seed1" / "model_final.pth")
    assert student["MODEL.TEACHER.WEIGHTS"] == probe["LINEAR_PROBE.WEIGHTS"] == checkpoint
    assert student["SEED"] == 1 and jobs["plain"]["SEED"] == 0
    assert student["SOLVER.MAX_ITER"] == "3" and student["DATASETS.TEST"] == ("embedded_dev",)
    assert student["MODEL.DEVICE"] == "cpu" and student["TEST.BIAS.BIN_WIDTH"] == 8


def test_chosen_experiments_bring_what_they_need(tmp_path):
    worker = Worker()
    run(make_runs(tmp_path, only=("student",)), worker)
    assert worker.done == ["model-seed0", "model-seed1", "student-seed0", "student-seed1"]
    run(make_runs(tmp_path, seeds=(0, 1, 2), only=("student", "plain")), worker)
    assert worker.done[4:] == ["plain", "model-seed2", "student-seed2"]


def test_two_at_a_time_and_never_before_the_teacher(tmp_path):
    """Each run waits until another is at work too, or is the last: one by one they would never end."""
    together = threading.Barrier(2)
    finished = set()

    def perform(job, output):
        name = job.folder.name
        teacher = {"student": "model", "probe": "model"}.get(name.partition("-")[0])
        assert teacher is None or f"{teacher}-seed0" in finished
        if name != "sweep_2-seed0":  # the last of seven
            together.wait(timeout=30)
        finished.add(name)
        return made_up_result(1.0)

    assert run(make_runs(tmp_path, seeds=(0,)), perform, jobs=2)[0] == []
    assert len(finished) == 7


# ---- stopped, changed, failed --------------------------------------------------------------------------------------


def test_a_killed_suite_goes_on(tmp_path):
    class Killed(BaseException):
        pass

    stopped = []

    class DyingWorker(Worker):
        def __call__(self, job, output):
            if job.folder.name == "added-seed0":
                (job.folder / "model_0000003.pth").write_text("half-way")
                raise Killed
            return super().__call__(job, output)

    with pytest.raises(Killed):
        run(make_runs(tmp_path), DyingWorker(), stop=lambda: stopped.append(True))
    assert stopped == [True]
    assert not (tmp_path / "out" / "runs" / "added-seed0" / "result.json").exists()
    worker, found = Worker(), []

    def perform(job, output):
        found.append((job.folder.name, (job.folder / "model_0000003.pth").exists()))
        return worker(job, output)

    run(make_runs(tmp_path), perform)
    assert found[0] == ("added-seed0", True)  # its checkpoint was kept for it
    assert found[1] == ("model-seed1", False) and len(found) == 11
    # The checkpoints of before the end are gone afterwards.
    assert not (tmp_path / "out" / "runs" / "added-seed0" / "model_0000003.pth").exists()
    assert (tmp_path / "out" / "runs" / "added-seed0" / "model_final.pth").exists()


def test_a_result_says_what_it_is(tmp_path):
    run(make_runs(tmp_path, only=("student",)), Worker({"student-seed1": 61.5}))
    result = json.loads((tmp_path / "out" / "runs" / "student-seed1" / "result.json").read_text())
    assert result["experiment"] == "student" and result["seed"] == 1 and result["teacher"] == "model-seed1"
    assert result["config_files"] == ["configs/configs/data.yaml", "configs/configs/student.yaml"]
    assert result["overrides"] == {"TEST.BIAS.BIN_WIDTH": 8}
    assert result["metrics"]["mIoU"] == 61.5 and len(result["fingerprint"]) == 16
    other = json.loads((tmp_path / "out" / "runs" / "student-seed0" / "result.json").read_text())
    assert other["fingerprint"] != result["fingerprint"]


def test_a_changed_config_is_refused_and_overwritten_on_demand(tmp_path):
    run(make_runs(tmp_path), Worker())
    make_runs(tmp_path).check_changes(overwrite=False)
    config = tmp_path / "configs" / "model.yaml"
    changed = make_runs(tmp_path, options=("SOLVER.MAX_ITER", "9"))
    with pytest.raises(ReclipError) as error:
        changed.check_changes(overwrite=False)
    text = str(error.value)
    assert "run plain in" in text and "SOLVER.MAX_ITER is 9 now and was 40000" in text and "--overwrite" in text
    assert "12 other runs differ too" in text and "\n" not in text

    # A change of the model affects its student and probe too: they were made with another teacher.
    def with_new_threshold():
        from tests.experiments import tiny_suite

        with pytest.MonkeyPatch.context() as patch:
            text = tiny_suite.CONFIGS["model"].replace("0.2", "0.25")
            patch.setitem(tiny_suite.CONFIGS, "model", text)
            return make_runs(tmp_path, tables=["main", "extra"])

    runs = with_new_threshold()
    assert "0.25" in config.read_text()
    with pytest.raises(ReclipError, match=r"run model-seed0 .* HYPOTHESIS.THRESHOLD is 0.25 now and was 0.2;"):
        runs.check_changes(overwrite=False)
    runs.check_changes(overwrite=True)
    worker = Worker()
    run(with_new_threshold(), worker)
    assert "plain" not in worker.done
    assert {"model-seed0", "added-seed0", "student-seed0", "probe-seed1"} <= set(worker.done)


def test_a_new_key_of_the_project_changes_nothing_at_its_default(tmp_path):
    run(make_runs(tmp_path, seeds=(0,), only=("model",)), Worker())
    file = tmp_path / "out" / "runs" / "model-seed0" / "settings.json"
    settings = json.loads(file.read_text())
    del settings["MODEL.MASK_DECODER.PADDING_MODE"]  # as if the run were older than the key
    settings["MODEL.FORGOTTEN"] = 1  # a removed key
    file.write_text(json.dumps(settings))
    run(make_runs(tmp_path, seeds=(0,)), Worker())
    runs = make_runs(tmp_path, seeds=(0,))
    runs.check_changes(overwrite=False)
    assert runs.pending() == []
    with pytest.raises(ReclipError, match="PADDING_MODE is 'zeros' now and was 'replicate'"):
        make_runs(
            tmp_path, seeds=(0,), options=("MODEL.MASK_DECODER.PADDING_MODE", "zeros"), only=("model",)
        ).check_changes(overwrite=False)


def test_a_failure_stops_only_what_needs_it_and_is_tried_again(tmp_path):
    class Failing(Worker):
        def __call__(self, job, output):
            if job.folder.name == "model-seed1":
                raise ReclipError("the loss is not finite")
            if job.folder.name == "sweep_1-seed0":
                raise RuntimeError("\nTraceback ...\nKeyError: 'gone'")
            return super().__call__(job, output)

    failures, lines = run(make_runs(tmp_path), Failing())
    assert failures[0] == "model-seed1: failed: the loss is not finite"
    output = tmp_path / "out" / "runs" / "sweep_1-seed0" / "output.txt"
    assert set(failures[1:]) == {
        "student-seed1: not run, since model-seed1 failed",
        "probe-seed1: not run, since model-seed1 failed",
        f"sweep_1-seed0: failed: KeyError: 'gone' (details: {output})",
    }
    assert sum(line.endswith("the loss is not finite") for line in lines) == 1 and len(lines) == 13
    worker = Worker()
    assert run(make_runs(tmp_path), worker)[0] == []
    assert set(worker.done) == {"model-seed1", "student-seed1", "probe-seed1", "sweep_1-seed0"}
    assert not (tmp_path / "out" / "runs" / "model-seed1" / "failure.txt").exists()


def test_the_first_failure_is_the_end_while_nothing_has_succeeded(tmp_path):
    def perform(job, output):
        raise ReclipError("no data set")

    with pytest.raises(ReclipError, match="run plain: no data set"):
        run(make_runs(tmp_path), perform)


def test_checkpoints_that_nothing_needs_are_dropped_and_made_anew_for_who_does(tmp_path):
    worker = Worker()
    run(make_runs(tmp_path, seeds=(0,), tables=["main"]), worker, drop_checkpoints=True)
    folder = tmp_path / "out" / "runs" / "model-seed0"
    assert not (folder / "model_final.pth").exists() and not (folder / "last_checkpoint").exists()
    assert (folder / "result.json").exists()
    assert worker.done == MAIN_SEED_0
    run(make_runs(tmp_path, seeds=(0,), tables=["extra"]), worker)  # without dropping
    assert worker.done[3:] == ["model-seed0", "student-seed0", "probe-seed0"]
    assert (folder / "model_final.pth").exists()


def test_a_checkpoint_of_unknown_origin_is_refused(tmp_path):
    folder = tmp_path / "out" / "runs" / "plain"
    folder.mkdir(parents=True)
    (folder / "model_final.pth").write_text("?")
    with pytest.raises(ReclipError, match="plain contains checkpoints of unknown origin"):
        run(make_runs(tmp_path), Worker())


def test_one_program_at_a_time(tmp_path):
    runs = make_runs(tmp_path)
    with (
        runs.lock(),
        pytest.raises(ReclipError, match="another reproduce.py is using"),
        make_runs(tmp_path).lock(),
    ):
        pass
    with runs.lock():
        pass


def test_damaged_files_name_themselves(tmp_path):
    run(make_runs(tmp_path, only=("plain",)), Worker())
    file = tmp_path / "out" / "runs" / "plain" / "result.json"
    file.write_text("{")
    with pytest.raises(ReclipError, match="result.json is damaged .*remove .*plain to run it again"):
        make_runs(tmp_path).pending()


def test_remaining_time(tmp_path):
    """Known from earlier runs: 10 s for each training, and of the other kinds nothing until one is done."""
    run(make_runs(tmp_path, seeds=(0,)), Worker())
    for file in (tmp_path / "out" / "runs").glob("*/result.json"):
        result = json.loads(file.read_text())
        result["seconds"] = 3600.0 if result["experiment"] == "student" else 600.0
        file.write_text(json.dumps(result))
    _, lines = run(make_runs(tmp_path, seeds=(0, 1)), Worker())
    # After model-seed1 remain added, student, probe, and two of the sweep: 1 h and four times 10 min.
    assert lines[0].endswith("about 1 h 40 min left")
    assert lines[-1].endswith("all done")


# ---- several data sets and CLIPs -----------------------------------------------------------------------------------


def test_clips_come_first_and_only_the_main_table_is_run_with_them(tmp_path):
    runs = make_runs(tmp_path, seeds=(0,), suite="worlds")
    worker = Worker(out=tmp_path / "out")
    assert run(runs, worker)[0] == []
    clips = ["data-clip1/pretraining", "hard-clip1/pretraining"]
    main = [f"{key}/{name}" for key in ("data", "hard", "data-clip1", "hard-clip1") for name in MAIN_SEED_0]
    rest = [f"{key}/{name}-seed0" for key in ("data", "hard") for name in ("probe", "sweep_1")]
    assert worker.done == [*clips, *main, *rest]
    assert (tmp_path / "out" / "clips" / "hard-seed1.safetensors").exists()
    assert make_runs(tmp_path, seeds=(0,), suite="worlds").pending() == []


def test_runs_with_another_clip_name_its_file_and_its_pretraining(tmp_path):
    runs = make_runs(tmp_path, seeds=(0,), suite="worlds", only=("model",), dataset="*_dev")
    planned = {p.name: p for p in runs.selected}
    assert [name for name in planned if "pretraining" in name] == ["data-clip1/pretraining", "hard-clip1/pretraining"]
    run_, clip = planned["hard-clip1/model-seed0"], planned["hard-clip1/pretraining"]
    assert run_.cfg.MODEL.CLIP.PRETRAINED == str(tmp_path / "out" / "clips" / "hard-seed1.safetensors")
    assert run_.cfg.DATASETS.TEST == ("hard_dev",)
    # The CLIP counts by its world and seed, not by its path.
    assert run_.settings["clip"] == clip.fingerprint and "MODEL.CLIP.PRETRAINED" not in run_.settings
    assert "clip" not in planned["hard/model-seed0"].settings


def test_a_removed_clip_is_made_again_if_a_run_needs_it(tmp_path):
    folder = tmp_path / "out"
    run(make_runs(tmp_path, seeds=(0,), suite="worlds", tables=["main"]), Worker(out=folder))
    (folder / "clips" / "hard-seed1.safetensors").unlink()
    assert make_runs(tmp_path, seeds=(0,), suite="worlds", tables=["main"]).pending() == []
    names = [p.name for p in make_runs(tmp_path, seeds=(0, 1), suite="worlds", tables=["main"]).pending()]
    assert names[0] == "hard-clip1/pretraining" and "data-clip1/pretraining" not in names


def test_a_failed_pretraining_stops_the_runs_with_its_clip(tmp_path):
    class Failing(Worker):
        def __call__(self, job, output):
            if job.kind == "pretrain" and job.value("WORLD") == "hard":
                raise ReclipError("no world hard")
            return super().__call__(job, output)

    failures, _ = run(make_runs(tmp_path, seeds=(0,), suite="worlds", tables=["main"]), Failing(out=tmp_path / "out"))
    assert failures[0] == "hard-clip1/pretraining: failed: no world hard"
    assert failures[1:] == [f"hard-clip1/{name}: not run, since hard-clip1/pretraining failed" for name in MAIN_SEED_0]


def test_first_estimate_of_the_time_is_from_the_suite_file(tmp_path):
    # On each of four: plain 6 s, model and added 30 s each; nothing is known of the pretrainings.
    runs = make_runs(tmp_path, seeds=(0,), suite="worlds", tables=["main"])
    assert estimated_time(runs, 2) == "14 runs to do"
    one = make_runs(tmp_path, seeds=(0, 1, 2), suite="worlds", only=("plain", "model"), tables=["main"])
    one.planned = [p for p in one.planned if p.run.condition.clip_seed == 0]
    # Two data sets, each 6 + 3 * 30 s, on two processes.
    assert estimated_time(one, 2) == "8 runs to do, about 2 min on 2 processes"
