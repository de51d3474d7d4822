"""Suite files: parsing, mistakes, and that the papers' suite fits every data set."""

import functools
from pathlib import Path

import pytest

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.experiments.plan import Runs, Settings, resolve
from reclip_d2.experiments.suite_file import load_suite, suite_names
from tests.experiments.tiny_suite import SUITE, small_suite, write_suite

PAPER = Path(__file__).resolve().parents[2] / "configs" / "ablations" / "paper.yaml"
SUITES = ("embedded", "voc20", "context59", "ade150", "cityscapes19", "coco_stuff27")


@functools.cache
def planned_runs(name: str) -> Runs:
    """The papers' runs with one seed, in a folder that does not exist."""
    return Runs(load_suite(PAPER, name), Settings(Path("/nowhere"), (0,), "cpu"))


# ---- the papers' suite -------------------------------------------------------------------------------------------


def test_suites_of_the_papers():
    assert tuple(suite_names(PAPER)) == SUITES


@pytest.mark.parametrize("name", SUITES)
def test_every_experiment_has_a_config(name):
    runs = planned_runs(name)
    suite = runs.suite
    assert [table.key for table in suite.tables][:10] == "II I III IV V VI VII VIII IX Fig3".split()
    for planned in runs.planned:
        if planned.cfg is None:  # the pretraining of a CLIP
            continue
        assert planned.cfg.TEST.BIAS.ENABLED
        assert planned.cfg.DATASETS.TEST == (f"{planned.run.condition.world}_val",)
        architecture = planned.cfg.MODEL.META_ARCHITECTURE
        kind = planned.run.experiment.kind
        assert (architecture == "MaskCLIP") == (
            (kind in ("evaluate", "true_shares") and not planned.teacher) or planned.run.experiment.key == "maskclip_lp"
        )
        if kind == "probe" and architecture != "MaskCLIP":
            assert planned.cfg.LINEAR_PROBE.WEIGHTS == str(planned.teacher.folder.checkpoint)
        elif architecture == "Distillation" and planned.cfg.MODEL.TEACHER.META_ARCHITECTURE == "RectifiedCLIP":
            assert planned.cfg.MODEL.TEACHER.WEIGHTS == str(planned.teacher.folder.checkpoint)
            for part in ("CLIP", "BIAS_HEAD", "MASK_DECODER"):  # a student reads them as its teacher did
                assert planned.cfg.MODEL[part] == planned.teacher.cfg.MODEL[part], planned.name


def test_experiments_are_what_their_tables_say(tmp_path):
    suite = load_suite(PAPER, "voc20")
    cfg = {key: resolve(suite, experiment) for key, experiment in suite.experiments.items()}

    def parts(key):
        keys = cfg[key].MODEL, cfg[key].HYPOTHESIS
        return keys[0].BIAS_HEAD.NAME, keys[0].MASK_DECODER.ENABLED, keys[1].METHOD, keys[1].THRESHOLD

    # Table III: one thing after the other.
    assert parts("reclip_rec") == ("ReCLIPBiasHead", False, "image", 0.23)
    assert parts("plus_decoder") == ("ReCLIPBiasHead", True, "image", 0.23)
    assert parts("plus_hypothesis") == ("ReCLIPBiasHead", True, "crops", 0.07)
    assert parts("reclippp_rec") == ("ReCLIPPPBiasHead", True, "crops", 0.07)
    assert parts("image_hypothesis") == ("ReCLIPPPBiasHead", True, "image", 0.23)
    assert cfg["plus_hypothesis"].MODEL.BIAS_HEAD.REFERENCE_NORM == "matrix"
    assert cfg["learnable_query"].MODEL.CLIP.LEARNABLE_QUERY and not cfg["reclippp_rec"].MODEL.CLIP.LEARNABLE_QUERY
    assert cfg["fine_tuned"].MODEL.CLIP.FINE_TUNE and cfg["reclip_fine_tuned"].MODEL.CLIP.FINE_TUNE
    assert [cfg[key].MODEL.BIAS_HEAD.RECTIFICATION for key in ("reclippp_rec", "bias_added", "no_bias")] == [
        "subtract", "add", "none",
    ]  # fmt: skip
    weights = [cfg[key].MODEL.DISTILLATION for key in ("mask_loss", "mask_feature_loss", "reclippp")]
    assert [(w.MASK_WEIGHT, w.FEATURE_WEIGHT, w.TEXT_WEIGHT) for w in weights] == [
        (1, 0, 0),
        (1, 0.5, 0),
        (1, 0.5, 0.5),
    ]
    heads = [cfg[key].MODEL.STUDENT.HEAD for key in ("head_original", "head_query", "head_query_bias", "reclippp")]
    assert heads == ["original", "query", "query_bias", "query_bias_decoder"]
    assert cfg["reclippp_lp"].MODEL.STUDENT.HEAD == "query_bias_decoder"  # a probe has its teacher's config


def test_the_papers_numbers():
    tables = {table.key: table for table in load_suite(PAPER, "voc20").tables}
    rows = {row.experiment: row.paper for row in tables["II"].rows}
    assert rows["reclippp"] == {
        "mIoU": {"VOC": 79.2, "Context": 34.5, "ADE20K": 14.5, "Cityscapes": 26.9, "COCO Stuff": 23.2}
    }
    assert rows["mean_filter_3"] == {"mIoU": {}}
    rows = {row.experiment: row.paper for row in tables["VII"].rows}
    assert rows["reclippp_rec"] == {"class_preference": {"Context": 0.37}, "space_preference": {"VOC": -0.29}}
    assert {row.experiment: row.paper["mIoU"] for row in tables["V"].rows}["bias_added"] == {
        "VOC": None,
        "Context": None,
    }


@pytest.mark.parametrize("name", SUITES)
def test_figure_3_holds_the_default_among_its_points(name, tmp_path):
    suite = load_suite(PAPER, name)
    (figure,) = (table for table in suite.tables if table.key == "Fig3")
    default = load_config(suite.config_files("reclippp_rectify.yaml")).HYPOTHESIS
    for curve, own in zip(figure.curves, (default.THRESHOLD, default.WINDOW_RATIO), strict=True):
        part = curve.key.split(".")[1]
        values = [resolve(suite, suite.experiments[point]).HYPOTHESIS[part] for point in curve.points]
        assert values == sorted(set(values)) and len(values) >= 4
        assert values[curve.points.index("reclippp_rec")] == own
        assert curve.line == "image_hypothesis"


def test_extensions_and_explanations_are_of_the_embedded_suite_only():
    embedded, voc = load_suite(PAPER, "embedded"), load_suite(PAPER, "voc20")
    assert {"ext", "ext_rec", "prompt_73", "coverage_bias_only"} <= set(embedded.experiments)
    assert not {"ext", "ext_rec", "prompt_73", "coverage_bias_only"} & set(voc.experiments)
    assert "explanations" not in [table.key for table in voc.tables]
    assert not any("ext" in (claim.better, claim.worse) for table in voc.tables for claim in table.claims)


def test_a_probe_has_seeds_where_its_model_has_none():
    experiments = load_suite(PAPER, "embedded").experiments
    assert not experiments["maskclip"].seeded and experiments["maskclip_lp"].seeded


def test_every_experiment_of_the_embedded_suite_is_run_on_both_worlds():
    suite, runs = planned_runs("embedded").suite, planned_runs("embedded").planned
    on = {}
    for planned in runs:
        on.setdefault(planned.run.condition.key, set()).add(planned.run.experiment.key)
    assert on["embedded"] == on["embedded_longtail"] == set(suite.experiments)
    main = {row.experiment for table in suite.tables if table.main for row in table.rows}
    assert on["embedded-clip1"] == on["embedded_longtail-clip1"] == main | {"pretraining"}
    assert {"maskclip", "calibration_estimated", "calibration_true", "reclip", "ext", "shares"} <= main
    # Runs read the features of both views of an image, unless CLIP changes.
    for planned in runs:
        if planned.cfg is not None and planned.run.experiment.kind == "train":
            assert (planned.cfg.FEATURE_STORE.VIEWS == 2) != planned.cfg.MODEL.CLIP.FINE_TUNE


# ---- reading ---------------------------------------------------------------------------------------------------


def test_overrides_taken_keys_and_sweeps(tmp_path):
    suite = small_suite(tmp_path)
    assert resolve(suite, suite.experiments["taken"]).SOLVER.BASE_LR == 0.125
    assert resolve(suite, suite.experiments["added"]).TEST.BIAS.BIN_WIDTH == 8  # common
    assert suite.experiments["probe"].overrides == {"LINEAR_PROBE.MAX_ITER": 7}
    curve = {table.key: table for table in suite.tables}["curve"].curves[0]
    # The model's own 0.2 is between 0.1 and 0.3.
    assert curve.points == ("sweep_1", "model", "sweep_2")
    assert suite.experiments["sweep_2"].overrides == {"HYPOTHESIS.THRESHOLD": 0.3}
    claims = [(claim.better, claim.worse) for claim in suite.tables[-1].claims]
    assert claims == [("sweep_1", "sweep_2"), ("sweep_1", "added"), ("model", "added"), ("sweep_2", "added")]


def test_another_suite_of_the_file(tmp_path):
    suite = load_suite(write_suite(tmp_path), "other")
    assert "student" not in suite.experiments
    extra = suite.tables[0]
    assert [row.experiment for row in extra.rows] == ["probe"] and extra.claims == ()
    assert suite.experiments["probe"].overrides == {"LINEAR_PROBE.MAX_ITER": 9}
    assert suite.tables[-1].curves[0].points == ("model", "sweep_1")  # 0.2 is the model's own


def test_chosen_tables(tmp_path):
    file = write_suite(tmp_path)
    assert [table.key for table in load_suite(file, "small", ["CURVE", "main"]).tables] == ["main", "curve"]
    with pytest.raises(ReclipError, match="no table 'X'.*extra, main, curve"):
        load_suite(file, "small", ["main", "X"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "kind: evaluate",
            "kind: guess",
            "plain: 'guess' is not one of evaluate, train, probe, hypotheses, true_shares, masks",
        ),
        ("teacher: model, suites", "teacher: nobody, suites", "student: its teacher 'nobody'"),
        ("seeded: false", "seeds: false", "experiments: plain: unknown key 'seeds'"),
        ("{title: Plain, kind", "{kind", "experiments: plain: no 'title'"),
        ("config: plain.yaml, ", "", "experiments: plain: no 'config'"),
        ("kind: probe,", "kind: probe, config: a.yaml,", "probe: a probe takes its teacher's config"),
        ("{experiment: plain, paper", "{experiment: plane, paper", "tables: main: 'plane' is not an experiment"),
        ("worse: plain", "worse: plane", "tables: main: 'plane' is not an experiment"),
        ("{VOC: 10.0}", "{VOC: ten}", "VOC: 'ten' is not a number"),
        ("sweep: sweep,", "sweep: broom,", "'broom' is not a sweep"),
        ("sweep.first", "sweep.middle", "'middle' is not one of first, last, each"),
        ("base: model", "base: nothing", "sweeps: sweep: its base 'nothing'"),
        ("HYPOTHESIS.THRESHOLD", "HYPOTHESIS.THRESH", "no config key HYPOTHESIS.THRESH"),
        ("tables:", "table:", "top: unknown key 'table'"),
        ("methods: configs\n", "", "top: no 'methods'"),
        ("methods: configs\n", "methods: [configs]\n", "methods: expected a folder"),
        ("small: {dataset: configs/data.yaml, ", "small: {", "suites: small: no 'dataset'"),
        ("suites:\n", "suites: [\n", "not plain YAML"),
        ("paper: [VOC], text", "clip_seeds: [1], text", "suites: small: clip_seeds: expected a list of different"),
        ("paper: [VOC], text", "clip_seeds: [0, 0], text", "suites: small: clip_seeds: expected a list of different"),
        ("paper: [VOC], text", "seconds: {plain: 0}, text", "suites: small: seconds: expected NAME: number lines"),
        ("dataset: configs/data.yaml, paper", "dataset: [], paper", "dataset: expected a config file, or a list"),
    ],
)
def test_mistakes_name_the_file_and_the_place(tmp_path, old, new, message):
    assert SUITE.count(old) >= 1
    with pytest.raises(ReclipError) as error:
        load_suite(write_suite(tmp_path, SUITE.replace(old, new, 1)), "small")
    text = str(error.value)
    assert message in text and "\n" not in text
    assert "suite.yaml" in text or "HYPOTHESIS.THRESH" in text


def test_other_mistakes(tmp_path):
    with pytest.raises(ReclipError, match="nowhere.yaml does not exist"):
        suite_names(tmp_path / "nowhere.yaml")
    file = write_suite(tmp_path)
    with pytest.raises(ReclipError, match="suite 'voc' is not in .*choose one of small, other, worlds"):
        load_suite(file, "voc")
    (tmp_path / "configs" / "hard.yaml").write_text("_BASE_: data.yaml\nHYPOTHESIS: {THRESHOLD: 0.3}\n")
    (tmp_path / "configs" / "model.yaml").write_text("MODEL: {META_ARCHITECTURE: RectifiedCLIP}\n")
    with pytest.raises(ReclipError, match="sweeps: sweep: the data sets differ in HYPOTHESIS.THRESHOLD of its base"):
        load_suite(file, "worlds")
    suite = small_suite(tmp_path)
    (tmp_path / "configs" / "student.yaml").unlink()
    with pytest.raises(ReclipError, match="experiment student of suite small: .*student.yaml does not exist"):
        resolve(suite, suite.experiments["student"])
    file.write_text("suites: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ReclipError, match="not plain YAML"):
        suite_names(file)
