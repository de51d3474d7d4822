"""The training benchmark: its counts and sums, its file and its page, and measurements that take seconds."""

import dataclasses
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reclip_d2.backbones import packed_texts, query
from reclip_d2.errors import ReclipError
from reclip_d2.utils.progress import Progress, report_to
from tests.helpers import isolated_cache, make_rectified, tiny_dense
from tools.benchmark_training import __main__ as program
from tools.benchmark_training import growth, runs, steps
from tools.benchmark_training.bars import Bar, all_bars
from tools.benchmark_training.child import StageClock, run_segment
from tools.benchmark_training.counts import dense_flops, global_flops, step_flops, text_flops
from tools.benchmark_training.inputs import Settings, generated_classes, photograph
from tools.benchmark_training.paper_sum import Ceilings, Cost, LaunchCounter, RectificationWork, rectification_seconds
from tools.benchmark_training.report import BEGIN, END, markdown, write_report
from tools.benchmark_training.results import Results

__all__ = ["isolated_cache"]


@pytest.fixture
def no_fast_path():
    """Attention as separate operators: PyTorch does not count the fused one."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def counted(function):
    """Operations that PyTorch counts; attention as two products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_operations_of_the_towers_are_those_that_pytorch_counts(no_fast_path):
    backbone = tiny_dense().double()  # oneDNN, whose layers PyTorch does not count, is for float32
    side = backbone.patch_size
    images = torch.zeros(1, 3, 3 * side, 5 * side, dtype=torch.float64, requires_grad=True)
    assert dense_flops(backbone.clip.visual, 15) == counted(lambda: backbone.dense(images))
    crop = torch.zeros(1, 3, *backbone.image_size, dtype=torch.float64, requires_grad=True)
    patches = backbone.image_size[0] * backbone.image_size[1] // side**2
    assert global_flops(backbone.clip.visual, patches) == counted(lambda: backbone.global_features(crop))
    with torch.enable_grad():
        texts = counted(lambda: backbone.text_features(["red tree", "sky and sea"]))
    assert text_flops(backbone, [5, 5]) == pytest.approx(texts, rel=0.01)  # both padded to the longer: start, 3, end


def test_operations_of_a_step_are_those_that_pytorch_counts(monkeypatch):
    monkeypatch.setattr(packed_texts, "_is_usual", lambda block: False)  # one masked sequence, as on a GPU
    names = [[f"{word}"] for word in "red green blue grey black white".split()]
    model = make_rectified(class_names=names, decoder={"kernel_size": 5})
    views, grid = 8, (10, 12)
    assert model.mask_decoder.folding_pays(views, grid[0] * grid[1])
    side = model.backbone.patch_size
    batch = [
        {
            "features": torch.randn(*grid, model.backbone.embed_dim).half(),
            "view_size": (grid[0] * side, grid[1] * side),
            "hypothesis": torch.tensor([number % 6]),
        }
        for number in range(views)
    ]
    found = counted(lambda: sum(model(batch).values()).backward())
    assert step_flops(model, views, grid) == pytest.approx(found, rel=0.05)


def test_launches_are_operators_without_views():
    x = torch.ones(3, 4)
    with LaunchCounter() as counter:
        y = x.t().reshape(2, 6)  # a view and a copy
        (y + 1).mul_(2)
        torch.empty(5)
    assert counter.count == 3


def test_sum_on_paper():
    work = RectificationWork(
        images=100, views=2, iterations=1000, texts=Cost(2e12, 10), hypothesis=Cost(4e12, 100), view=Cost(1e9, 200),
        step=Cost(3e9, 500), step_bytes=5e8, reading_seconds=0.01,
    )  # fmt: skip
    ceilings = Ceilings(
        bfloat16_flops=1e14, float32_flops=1e13, copy_bytes_per_second=1e12, launch_seconds=1e-5,
        graph_launch_seconds=1e-6,
    )  # fmt: skip
    seconds = rectification_seconds(work, ceilings, graph=False)
    assert seconds == {
        "texts": pytest.approx(0.02),
        "hypotheses": pytest.approx(100 * 0.04),
        "feature store": pytest.approx(200 * 200 * 1e-5),  # launches take longer than 1e-5 s of operations
        "reading images": pytest.approx(0.01 * 300),
        "iterations": pytest.approx(1000 * 5e-3),  # 500 launches take longer than 0.3 ms and 0.5 ms
    }
    assert rectification_seconds(work, ceilings, graph=True)["iterations"] == pytest.approx(1000 * (8e-4 + 5e-4))


def test_stages_add_up():
    times = iter([0.0, 2.0, 3.0, 3.0, 4.0, 5.0, 9.0, 10.0, 11.0])
    clock = StageClock(lambda: next(times))
    clock(Progress("images"))
    clock(Progress("features", message="not stored"))  # a note
    clock(Progress("estimate", message="about 6 s", seconds_left=6.0))
    clock.enter("texts")
    clock.enter("estimate")
    clock(Progress("images"))
    clock.enter("")
    assert clock.seconds == {"start": 2.0, "images": 1.0 + 1.0, "estimate": 1.0 + 4.0, "texts": 1.0}
    assert clock.estimate == 6.0 and clock.estimated_at == 3.0 and clock.total() == 11.0


def test_verdicts():
    assert [Bar("", value, 2.0).verdict for value in (None, 2.0, 2.1)] == ["not measured", "pass", "FAIL"]
    assert [Bar("", value, 2.0, at_least=True).verdict for value in (2.0, 1.9)] == ["pass", "FAIL"]


def results_of(path=None, quick=False):
    return Results(path, torch.device("cpu"), quick)


def test_bars_find_their_figures():
    results = results_of()
    results.add("b/12", {"seconds": 400.0, "stages": {"texts": 19.0}, "estimate_ratio": 0.5})
    variants = {"fresh crops": {"peak_bytes": 4, "ratio": 1.0}, "store": {"peak_bytes": 2, "ratio": 30.0}}
    results.add("a/voc20", {"variants": variants})
    results.add("c/classes", {"variants": {"150": {"median_seconds": 2.0}, "1000": {"median_seconds": 3.0}}})
    results.add("c/classes-fresh", {"variants": {"150": {"median_seconds": 2.0}, "1000": {"median_seconds": 5.0}}})
    results.add("c/sides", {"sides": {"8192": {"peak_bytes": 5e9}}})
    found = {bar.text: (bar.value, bar.verdict) for bar in all_bars(results)}
    assert found["12 photographs, 11 classes, from nothing to masks"] == (400.0, "FAIL")
    assert found["its texts"] == (19.0, "pass")
    assert found["12 photographs: estimate and truth differ by a factor of"] == (2.0, "FAIL")
    assert found["voc20: step without the store / with it"] == (30.0, "pass")
    assert found["voc20: memory of the step with the store / without it"] == (0.5, "pass")
    assert found["step from the store: 1,000 classes / 150"] == (1.5, "pass")
    assert found["step with fresh crops: 1,000 classes / 150"] == (2.5, "FAIL")
    assert found["peak memory of `reclip predict`, 8,192 x 8,192 px"] == (5.0, "FAIL")
    assert found["100 photographs, 20 classes"] == (None, "not measured")


def test_figures_are_kept_and_failures_do_not_stop_the_others(tmp_path, capsys):
    path, calls = tmp_path / "figures.json", []

    def measure(name):
        calls.append(name)
        if name == "b/1" and calls.count(name) == 1:
            raise ReclipError("no luck")
        return {"figure": len(calls)}

    wanted = {name: lambda name=name: measure(name) for name in ("a/x", "b/1", "c/images")}
    assert program.run_all({"a/x": wanted["a/x"]}, results_of(path), None) == []
    assert program.run_all({name: wanted[name] for name in ("b/1", "a/x")}, results_of(path), None) == ["b/1"]
    assert "no luck" in capsys.readouterr().err
    again = results_of(path)
    assert program.run_all({name: wanted[name] for name in ("a/x", "b/1")}, again, None) == []
    assert calls == ["a/x", "b/1", "b/1"]
    stored = json.loads(path.read_text())
    assert stored["figures"]["a/x"]["figure"] == 1 and stored["figures"]["a/x"]["run"] == 0
    assert stored["figures"]["b/1"]["run"] == 1 and len(stored["runs"]) == 2  # without the run that failed
    again.drop(["a/x"])
    assert list(again.figures) == ["b/1"]


def test_a_file_with_other_settings_is_an_error(tmp_path):
    path = tmp_path / "figures.json"
    results_of(path).add("a/x", {})
    with pytest.raises(ReclipError, match="was measured with"):
        results_of(path, quick=True)
    path.write_text("[]")
    with pytest.raises(ReclipError, match="holds no figures of this benchmark"):
        results_of(path)


def test_the_page_is_written_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_report(page, "new")
    assert page.read_text() == f"before\n{BEGIN}\n\nnew\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ReclipError, match="has no lines"):
        write_report(page, "new")
    assert page.read_text() == "no marks"


def test_unknown_names_and_ceilings_are_errors(tmp_path):
    with pytest.raises(ReclipError, match="--only b/7 is unknown: choose from a/x"):
        program.chosen({"a/x": dict}, ["a"], ["b/7"])
    assert list(program.chosen({"a/x": dict, "b/1": dict}, ["b"], [])) == ["b/1"]
    path = tmp_path / "ceilings.json"
    path.write_text('{"bfloat16_flops": 5e14, "device_name": "GPU"}')
    assert program.read_ceilings(path) == Ceilings(bfloat16_flops=5e14)
    path.write_text('{"bfloat16_flops": -1}')
    with pytest.raises(ReclipError, match="above 0"):
        program.read_ceilings(path)


def test_generated_inputs():
    names = [names[0] for names in generated_classes(1000).classes]
    assert len(set(names)) == 1000
    assert photograph(0, 48, 64).size == (64, 48)
    assert photograph(0, 48, 64).tobytes() == photograph(0, 48, 64).tobytes() != photograph(1, 48, 64).tobytes()


@pytest.fixture
def settings(tmp_path):
    return Settings(torch.device("cpu"), tmp_path, quick=True, repeats=2)


def test_configs_of_all_cases_load(tmp_path):
    whole = Settings(torch.device("cpu"), tmp_path)
    found = {}
    for name, make in steps.step_cases(whole).items():
        case = dataclasses.replace(make(), method="reclippp_distill", opts=("MODEL.STUDENT.WEIGHTS", ""))
        with steps.Workplace(whole, case) as place:
            cfg = place._config(True)
        found[name] = (len(case.classes.classes), cfg.SOLVER.IMS_PER_BATCH, cfg.INPUT.MIN_SIZE_TRAIN[0])
        assert cfg.MODEL.CLIP.NAME == "ViT-B-16-quickgelu" and cfg.FEATURE_STORE.VIEWS == 1
    assert found == {
        "voc20": (20, 12, 512), "ade150": (150, 8, 512), "context59": (59, 12, 520), "cityscapes19": (19, 8, 512),
        "coco_stuff27": (27, 8, 512), "coco_stuff171": (171, 8, 512),
    }  # fmt: skip


def test_a_step_and_its_report(settings):
    results = results_of(quick=True)
    with report_to(None):
        results.add("a/embedded", steps.rectification(settings, steps.step_cases(settings)["embedded"]()))
        results.add("c/images", growth.store_sizes(settings, [3, 17], draws=2))
    variants = results.figures["a/embedded"]["variants"]
    assert variants["fresh crops"]["ratio"] == 1.0
    assert len(variants["fresh crops"]["seconds"]) == 2 and len(variants["store"]["seconds"]) == 6
    store = results.figures["c/images"]["counts"]["17"]
    assert store["bytes_said"] == 17 * 8 * 11 * 512 * 2  # views of 128 x 171 px
    assert store["bytes_said"] < store["bytes_on_disk"] < 1.05 * store["bytes_said"]
    text = markdown(results)
    assert "| embedded | 12 | 12 | store |" in text and "| 17 |" in text
    assert not list((settings.folder / "steps").glob("*"))


def test_segment_by_stage(settings, monkeypatch):
    monkeypatch.setattr(query, "query_features", query.query_features)  # the benchmark replaces it
    images = settings.folder / "photographs"
    runs.write_photographs(images, 2, 96, 128)
    request = {
        "images": str(images),
        "classes": str(runs.write_classes(settings.folder, 3)),
        "output": str(settings.folder / "output"),
        "options": {**settings.clip_options, "device": "cpu", "fast": True, "opts": ["TEST.BAND_MEMORY", "64"]},
    }
    clock = StageClock()
    figures = run_segment(request, clock)
    assert {"start", "texts", "masks"} <= figures["stages"].keys()
    assert sum(figures["stages"].values()) <= clock.total()
    assert figures["estimate_ratio"] == figures["estimate"] / figures["after_estimate"]
    assert len(list((settings.folder / "output").rglob("*.png"))) == 2


@pytest.mark.slow
def test_the_whole_program(tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    arguments = ["--quick", "--photographs", "2", "--repeats", "1", "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr("sys.argv", ["benchmark_training", *arguments, "--report", str(page)])
    assert program.main() == 0
    names = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert {name.partition("/")[0] for name in names} == {"a", "b", "c", "d", "paper"}
    for heading in ("Step of rectification", "`reclip segment`", "Growth with classes", "on paper"):
        assert heading in page.read_text()
    begin = capsys.readouterr()
    assert "| 2 | 4 |" in begin.out
