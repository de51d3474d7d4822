"""The GPU check without a GPU: how steps run, end and resume, their output, and the programs at small sizes."""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest
import torch

from reclip_d2.layers._extension import OPERATORS
from tools.benchmark_kernels import TAU, eager_batched, eager_rectify_and_pool, padded_rows
from tools.gpu_check import kernel_times, runner, whole_step
from tools.gpu_check.figures import MORE_TO_DO
from tools.gpu_check.operator_calls import Calls
from tools.gpu_check.pack_installed import pack
from tools.gpu_check.report import markdown
from tools.gpu_check.runner import Check
from tools.gpu_check.steps import CORRECTNESS, SANITIZERS, TESTS, Step, plan
from tools.gpu_check.whole_step import plain_rectify_and_pool

ROOT = Path(__file__).resolve().parents[2]


def shell(name, script, seconds=20.0, needs=(), group=""):
    return Step(name, ("bash", "-c", script), seconds, needs, group)


def states(check):
    return {name: step["status"] for name, step in check.state["steps"].items()}


def read(folder):
    return json.loads((folder / "gpu_check.json").read_text())


@pytest.fixture(autouse=True)
def no_least_time(monkeypatch):
    monkeypatch.setattr(runner, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(runner, "_GRACE_SECONDS", 0.2)


def test_a_failed_step_does_not_stop_the_next(tmp_path):
    steps = [shell("one", "echo first; exit 3"), shell("two", "echo second"), shell("three", "true", needs=("one",))]
    check = Check(steps, "cpu", tmp_path)
    assert not check.run(30)
    assert states(check) == {"one": "failed", "two": "passed", "three": runner.BLOCKED}
    state = read(tmp_path)
    assert state["steps"]["one"]["exit"] == 3 and state["steps"]["one"]["tail"] == ["first"]
    assert (tmp_path / "two.log").read_text() == "second\n"


def test_results_are_written_after_each_step(tmp_path):
    # The second step reads what the first has left behind.
    script = f"grep -q '\"one\"' {tmp_path}/gpu_check.json && grep -q '| one | passed |' {tmp_path}/gpu_check.md"
    assert Check([shell("one", "true"), shell("two", script)], "cpu", tmp_path).run(30)


def test_own_limit_ends_a_step_and_all_that_it_started(tmp_path):
    script = f"trap '' TERM; echo 1 > $GPU_CHECK_FIGURES; sleep 30 & echo $! > {tmp_path}/child; wait; sleep 30"
    check = Check([shell("slow", script, seconds=0.5), shell("next", "true")], "cpu", tmp_path)
    begin = time.monotonic()
    check.run(30)
    assert time.monotonic() - begin < 10
    assert states(check) == {"slow": runner.TIMED_OUT, "next": "passed"}
    assert check.state["steps"]["slow"]["figures"] == 1  # what it had written by then
    child = int((tmp_path / "child").read_text())
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or re.search(r"State:\s+Z", status.read_text())


def test_a_second_run_does_what_the_first_had_no_time_for(tmp_path):
    def steps():
        return [
            shell("done", f"echo x >> {tmp_path}/done"),
            shell("broken", f"echo x >> {tmp_path}/broken; false"),
            shell("long", f"[ -e {tmp_path}/once ] && exit 0; touch {tmp_path}/once; sleep 30"),
            shell("last", "true"),
        ]

    first = Check(steps(), "cpu", tmp_path)
    assert not first.run(2.0)
    assert states(first) == {
        "done": "passed", "broken": "failed", "long": runner.OUT_OF_TIME, "last": runner.NOT_RUN,
    }  # fmt: skip
    second = Check(steps(), "cpu", tmp_path)
    assert not second.run(30)
    assert states(second) == {"done": "passed", "broken": "failed", "long": "passed", "last": "passed"}
    assert (tmp_path / "done").read_text() == (tmp_path / "broken").read_text() == "x\n"  # neither ran twice
    assert len(read(tmp_path)["runs"]) == 2
    third = Check(steps(), "cpu", tmp_path)
    third.forget(["broken"])
    third.run(30)
    assert (tmp_path / "broken").read_text() == "x\nx\n" and (tmp_path / "done").read_text() == "x\n"


def test_a_step_that_was_partly_done_goes_on_with_its_figures(tmp_path):
    script = "echo -n 1 >> $GPU_CHECK_FIGURES; [ $(cat $GPU_CHECK_FIGURES) -ge 11 ] || exit 75"
    for figures, status in ((1, runner.PARTLY), (11, "passed"), (11, "passed")):
        check = Check([shell("parts", script)], "cpu", tmp_path)
        assert check.run(30) == (status == "passed")
        assert check.state["steps"]["parts"]["figures"] == figures and states(check) == {"parts": status}
    check.forget(["parts"])
    check.run(30)
    assert check.state["steps"]["parts"]["figures"] == 1  # begun afresh


def test_the_json_alone_is_enough_to_go_on_elsewhere(tmp_path):
    def steps():
        return [
            Step("build", ("bash", "-c", f"echo x >> {tmp_path}/built"), 20.0, always=True),
            shell("figures", "echo '{\"speed\": 7}' > $GPU_CHECK_FIGURES"),
            shell("parts", 'f=$GPU_CHECK_FIGURES; grep -q 1 "$f" && exit 0; echo 1 > "$f"; exit 75'),
        ]

    assert not Check(steps(), "cpu", tmp_path / "here").run(30)
    (tmp_path / "there").mkdir()
    shutil.copy(tmp_path / "here" / "gpu_check.json", tmp_path / "there")
    assert Check(steps(), "cpu", tmp_path / "there").run(30)
    assert json.loads((tmp_path / "there" / "figures.json").read_text()) == {"speed": 7}
    assert (tmp_path / "built").read_text() == "x\nx\n"  # for each machine


def test_kernel_times_measures_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("GPU_CHECK_FIGURES", str(tmp_path / "figures.json"))
    monkeypatch.setenv("GPU_CHECK_CEILINGS", str(tmp_path / "ceilings.json"))
    (tmp_path / "ceilings.json").write_text('{"copy_bytes_per_second": 1e9}')
    monkeypatch.setattr(kernel_times, "CPU_CASES", kernel_times.CPU_CASES[1:3])
    measured = []

    def measure(case, *arguments):
        measured.append(case.operator)
        methods = {"ours": {"median_seconds": 1e-4}}
        dtype, layout, *_ = arguments
        return {"operator": case.operator, "name": case.name, "dtype": dtype, "layout": layout, "methods": methods,
                "roofline": 0.5}  # fmt: skip

    monkeypatch.setattr(kernel_times, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["kernel_times", "--device", "cpu", "--seconds", "60"])
    monkeypatch.setattr(kernel_times.Clock, "left", lambda clock: 1 - len(measured))
    assert kernel_times.main() == MORE_TO_DO
    monkeypatch.setattr(kernel_times.Clock, "left", lambda clock: 1)
    assert kernel_times.main() == 0
    assert measured == ["rectify_and_pool", "upsample_argmax"]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["cases"]) == 2 and figures["left_out"] == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[1]"),
        lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "sources": "other"})),
        lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "device": "cuda"})),
    ],
)
def test_results_of_other_sources_or_damaged_ones_do_not_count(tmp_path, damage):
    step = shell("one", f"echo x >> {tmp_path}/ran")
    assert Check([step], "cpu", tmp_path).run(30)
    damage(tmp_path / "gpu_check.json")
    assert Check([step], "cpu", tmp_path).run(30)
    assert (tmp_path / "ran").read_text() == "x\nx\n"


def test_steps_of_a_group_run_at_the_same_time(tmp_path):
    meet = "touch {0}/{1}; for i in $(seq 200); do [ -e {0}/{2} ] && exit 0; sleep 0.05; done; exit 1"
    steps = [
        shell("a", meet.format(tmp_path, "a.here", "b.here"), group="both"),
        shell("b", meet.format(tmp_path, "b.here", "a.here"), group="both"),
    ]
    assert Check(steps, "cpu", tmp_path).run(30)


def test_a_program_that_is_not_there_is_named(tmp_path):
    check = Check([Step("one", ("no-such-program-here", "x"), 5.0)], "cpu", tmp_path)
    assert not check.run(10)
    assert states(check) == {"one": runner.MISSING}
    assert check.state["steps"]["one"]["tail"] == ["no-such-program-here: No such file or directory"]


def test_copies_lie_where_asked(tmp_path):
    copies = tmp_path / "copies"
    copies.mkdir()
    Check([shell("one", "true")], "cpu", tmp_path / "own", copies).run(30)
    assert sorted(path.name for path in copies.iterdir()) == ["gpu_check.json", "gpu_check.md"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plan_is_sound(device):
    steps = plan(device)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-z_]+", name) for name in names)
    for number, step in enumerate(steps):
        assert set(step.needs) <= set(names[:number])
        program = step.command[0]
        assert program in (sys.executable, "bash", "ncu", "compute-sanitizer")
    grouped = [step.name for step in steps if step.group]
    if device == "cpu":
        assert not grouped
    else:
        assert grouped == ["tests", *(f"sanitizer_{tool}" for tool in SANITIZERS), "compile"]
        assert {step.group for step in steps} == {"", CORRECTNESS}
        rehearsed = {step.name for step in plan("cpu")}
        assert {step.name for step in steps if not step.group} - rehearsed == {"profiler"}


def test_all_tests_that_need_a_gpu_are_run():
    marked = [path for path in (ROOT / "tests").rglob("*.py") if re.search(r"mark[.]cuda\b", path.read_text())]
    for path in marked:
        assert any(path.is_relative_to(ROOT / place) for place in TESTS), path


def test_summary_of_figures():
    times = {"median_seconds": 1e-4, "peak_bytes": 100, "device_seconds": 6e-5}
    case = {
        "operator": "rectify_and_pool", "name": "voc20, 512 px, batch 12", "dtype": "float32", "layout": "cn",
        "roofline": 0.25, "host_seconds": 5e-5, "graph_seconds": 7e-5, "graph_host_seconds": 8e-6,
        "kernels": {"void hard_rows_kernel<float>": 3e-5},
        "methods": {
            "ours": times, "eager": {"median_seconds": 6e-4, "peak_bytes": 1000, "device_seconds": 9e-5},
            "batched": {"median_seconds": 2.5e-4, "peak_bytes": 900},
            "compile-batched": {"error": "RuntimeError: a | b"},
        },
    }  # fmt: skip
    step = {"images_per_second": 1000.0, "seconds": 0.012, "host_seconds": 0.003, "peak_bytes": 2**30}
    step["kernel_seconds"] = 0.002
    state = {
        "device": "cuda", "sources": "abc", "runs": [{"began": "today"}],
        "steps": {
            "ceilings": {"status": "passed", "figures": {
                "device_name": "Some GPU", "torch": "2.11", "cuda": "13.0", "copy_bytes_per_second": 3e12,
                "bfloat16_flops": 8e14, "float32_flops": 5e13,
            }},
            "tests": {"status": "failed", "seconds": 9.0, "last_line": "1 failed | 2 passed", "tail": ["E  assert"]},
            "kernels": {"status": "passed", "figures": {"cases": [case], "left_out": 2}},
            "whole_step": {"status": "passed", "figures": {
                "training voc20": {"left_out": 1, "variants": {
                    "bfloat16, kernels": step, "float32": {"error": "RuntimeError: a | b"},
                }},
                "evaluation": {"error": "OutOfMemoryError: all of it"},
                "hypotheses": {"crops_per_second": 9000.0, "of_bfloat16_peak": 0.4},
                "cuda graph": "it refuses",
            }},
        },
    }  # fmt: skip
    text = markdown(state)
    assert text.startswith("# GPU check: Some GPU\n")
    assert "copy 3000 GB/s" in text and "800.0 TFLOP/s in bfloat16" in text
    assert "| tests | failed | 9.0 | 1 failed \\| 2 passed |" in text and "E  assert" in text
    row = "| float32, cn | 100.0 | 25% | 60.0 | 50 | 70.0 | 8.0 | 6.0x | 2.5x |"
    assert f"| rectify_and_pool: voc20, 512 px, batch 12 {row} RuntimeError: a \\| b | 1.5x | 10.0x |" in text
    assert "- 30.0 us `void hard_rows_kernel<float>`" in text and "2 cases were skipped" in text
    assert "| bfloat16, kernels | 1000.0 | 12.00 | 2.00 | 3.00 | 1024 |" in text
    assert "| float32 | RuntimeError: a \\| b |" in text and "1 variants were skipped" in text
    assert "failed: OutOfMemoryError: all of it" in text
    assert "9000 crops/s, 40% of the bfloat16 peak." in text and "it refuses" in text
    assert "dry run" not in text and "dry run" in markdown({**state, "device": "cpu"})


def test_a_part_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPU_CHECK_FIGURES", str(tmp_path / "figures.json"))
    device, clock, calls = torch.device("cpu"), whole_step.Clock(60), []

    def variants(fails):
        part = whole_step.Part("variants", device, clock, images=1)
        part.add("one", 1, 1, lambda: contextlib.nullcontext(lambda _: calls.append("one")))
        part.add("two", 1, 1, lambda: contextlib.nullcontext(lambda _: 1 // fails))
        return part

    parts = {"broken": lambda: 1 // 0, "variants": lambda: variants(0), "last": lambda: {"crops_per_second": 1.0}}
    assert whole_step.measure(parts, clock) == 1
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["broken"] == {"error": "ZeroDivisionError: integer division or modulo by zero"}
    assert "ZeroDivisionError" in figures["variants"]["variants"]["two"]["error"]
    assert figures["variants"]["variants"]["one"]["seconds"] >= 0 and figures["last"] == {"crops_per_second": 1.0}
    assert "Traceback" in capsys.readouterr().err

    calls.clear()  # the next run measures what failed, and nothing else
    repaired = {"broken": lambda: {"crops_per_second": 2.0}, "variants": lambda: variants(1), "last": lambda: 1 // 0}
    assert whole_step.measure(repaired, clock) == 0 and not calls
    assert whole_step.measure({"more": lambda: None}, whole_step.Clock(0)) == MORE_TO_DO


def test_kernels_are_profiled_after_all_parts_are_timed(monkeypatch):
    """The profiler slows down later launches."""
    device, clock, order = torch.device("cpu"), whole_step.Clock(60), []
    monkeypatch.setattr(whole_step, "kernel_seconds", lambda *_: order.append("profile") or {"a": 0.5, "b": 0.25})
    parts = {}
    for name in ("first", "second"):
        part = whole_step.Part(name, device, clock)
        step = contextlib.nullcontext(lambda _, name=name: order.append(name))
        parts[name] = lambda part=part, step=step: part.add("only", 1, 1, lambda: step) or part
    assert whole_step.measure(parts, clock) == 0
    timed = order[: order.index("profile")]
    assert order.count("profile") == 2 and timed.count("first") == timed.count("second") + 1  # warmed up again
    assert part.variants["only"]["kernel_seconds"] == 0.75


def test_operator_calls_reach_what_they_should():
    calls = dict(Calls(torch.device("cpu")).everything())
    assert len(calls) >= 40
    for word in ("C504", "C600", " nc ", "float64", "float16", "bfloat16", "hard", "soft", "(0, 0)", "no bias", "lift"):
        assert any(word in name for name in calls), word
    for operator in OPERATORS:
        name = next(name for name in calls if name.startswith(operator))
        assert all(bool(result.isfinite().all()) for result in calls[name]())


def test_one_product_for_all_images_equals_the_loop():
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(3, 8, 5, generator=generator) * TAU, torch.randn(8, 5, generator=generator) * TAU
    features, ids, bounds = torch.randn(3, 8, 6, generator=generator), torch.tensor([4, 0, 2]), [0, 2, 2, 3]
    torch.manual_seed(1)
    loop = eager_rectify_and_pool(logits, bias, features, ids, bounds)
    torch.manual_seed(1)
    padded, index = padded_rows(ids, bounds)
    assert padded.tolist() == [[4, 0], [0, 0], [2, 0]] and index.tolist() == [0, 1, 4]
    torch.testing.assert_close(eager_batched(logits, bias, features, padded, index), loop)
    torch.manual_seed(1)
    pooled, area = plain_rectify_and_pool(logits, bias, features, ids, torch.tensor(bounds), TAU, True)
    torch.testing.assert_close(pooled, loop)
    assert area.tolist() == [1.0, 1.0, 1.0]


def test_installed_package_becomes_a_wheel(tmp_path):
    wheel = pack("iniconfig", tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        record = next(name for name in archive.namelist() if name.endswith("/RECORD"))
        for line in archive.read(record).decode().splitlines():
            name, digest, size = line.rsplit(",", 2)
            if not digest:
                continue
            data = archive.read(name)
            assert len(data) == int(size)
            assert base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode() == digest[7:]
        assert "iniconfig/__init__.py" in archive.namelist()


@pytest.mark.parametrize(("name", "message"), [("no-such-thing", "is not installed"), ("torch", "compiled files")])
def test_what_cannot_be_packed_is_said(tmp_path, name, message):
    with pytest.raises(SystemExit, match=message):
        pack(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def provide(tmp_path):
    """A function that runs build.sh in a tree whose build does not work; a brought extension "loads" if it says so."""
    root, wheels = tmp_path / "checkout", tmp_path / "wheels"
    for folder in (root / "tools" / "gpu_check", root / "reclip_d2", wheels):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "gpu_check" / "build.sh", root / "tools" / "gpu_check")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    place = root / "reclip_d2" / f"_C{suffix}"
    (root / "setup.py").write_text("raise SystemExit('no compiler')")
    (root / "torch.py").write_text("__version__ = '0'")  # the script only asks for its version
    (root / "reclip_d2" / "__init__.py").touch()
    (root / "reclip_d2" / "layers.py").write_text(
        f"from pathlib import Path\nkernels_available = lambda device: Path({str(place)!r}).read_text() == 'works'"
    )

    def run(brought, **environment):
        if brought is not None:
            (wheels / "_C.cpython-39-x86_64-linux-gnu.so").write_text(brought)
        paths = {"PYTHON": sys.executable, "GPU_CHECK_WHEELS": str(wheels), "PYTHONPATH": str(root)}
        command = ["bash", str(root / "tools" / "gpu_check" / "build.sh")]
        environment = {**os.environ, **paths, **environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def test_extension_that_was_brought_along_saves_the_build(provide):
    done = provide("works")
    assert (done.returncode, done.stdout) == (0, "operators for cuda with torch 0\n"), done.stderr


@pytest.mark.parametrize("brought", [None, "built for another torch"])
def test_extension_is_built_where_none_was_brought_that_works(provide, brought):
    done = provide(brought)
    assert done.returncode == 1 and "no compiler" in done.stderr
    assert done.stdout.endswith("no extension was brought that works here: building one\n")


def test_extension_is_built_on_request(provide):
    done = provide("works", GPU_CHECK_BUILD="yes")
    assert done.returncode == 1 and "no compiler" in done.stderr and not done.stdout


def test_unknown_step_is_an_error():
    command = [sys.executable, "-m", "tools.gpu_check", "--device", "cpu", "--steps", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no step nothing: the steps are ceilings, build,")


@pytest.mark.slow
def test_rehearsal_on_the_cpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "2", "OUT": str(tmp_path / "out")}
    (tmp_path / "out").mkdir()
    command = ["bash", "tools/gpu_check.sh", "--device", "cpu", "--folder", str(tmp_path / "check")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    state = read(tmp_path / "out")
    assert {name: step["status"] for name, step in state["steps"].items()} == dict.fromkeys(
        [step.name for step in plan("cpu")], "passed"
    )
    assert state["steps"]["kernels"]["figures"]["left_out"] == 0
    assert set(state["steps"]["whole_step"]["figures"]) == {
        "training embedded", "hypotheses", "evaluation embedded", "CUDA graph embedded",
    }  # fmt: skip
    assert (tmp_path / "out" / "gpu_check_logs.tar.gz").stat().st_size > 0
