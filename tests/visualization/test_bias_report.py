"""The parts of the bias report without a model: the page, its sentences, its folder."""

import json
import math
import re

import numpy as np
import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.model_analysis import ModelAnalysis
from reclip_d2.evaluation.preferences import ClassPlaces, Preference
from reclip_d2.visualization.bias_report import (
    BiasReport,
    ReportSubject,
    Scene,
    check_output_dir,
    file_part,
    preference_sentences,
    remove_report,
)


def test_the_page_escapes_and_loads_nothing(tmp_path):
    scene = Scene("0 <1>", np.zeros((8, 8, 3), np.uint8), None)
    colors = np.zeros((2, 3), np.uint8)
    subject = ReportSubject('a "b" & <c>', "<p>", 1, ["<sky>", "sea"], colors, 255, False, 8.0, 10, 1, [scene])
    preference = Preference(np.zeros((2, 3, 3)), np.array([0.5, -0.5]), "bias logits", 1)
    model = ModelAnalysis("<m>", "x & y", preference=preference, predictions=[np.zeros((8, 8), np.int64)])
    report = BiasReport(tmp_path, subject, [model])
    page = report.write().read_text()
    assert "<title>Biases of CLIP on a &#34;b&#34; &amp; &lt;c&gt;: &lt;m&gt;</title>" in page
    assert "Protocol: &lt;p&gt;." in page and "<li>&lt;m&gt;: x &amp; y</li>" in page
    assert "<li>&lt;sky&gt;: +0.50 overall" in page and "<h2>The two biases" not in page
    assert page.count('<img src="data:image/png;base64,iVBOR') == 2 and 'alt="&lt;m&gt;: preference for' in page
    tags = set(re.findall(r"<(/?\w+)", page))
    known = "html head meta title style body h1 h2 p figure img figcaption ul li".split()
    assert {tag.strip("/") for tag in tags} == set(known)
    assert re.search(r"<h2>What CLIP prefers.*<h2>Predictions.*<h2>How this was made", page, re.DOTALL)


LINES = [
    ClassPlaces("sky", math.log(2), "top", math.log(1.5), "bottom", math.log(0.5)),
    ClassPlaces("wood", -0.25, "centre", 0.1, "left", -0.1),
]


def test_sentences():
    empty = np.zeros((2, 1, 1))
    by_share = Preference(empty, np.zeros(2), "mean soft-max", 9)
    by_logits = Preference(empty, np.zeros(2), "bias logits", 1)
    assert preference_sentences(by_share, LINES[:1]) == [
        "sky: 2.0 times the uniform share; most at the top (1.5 times), least at the bottom (0.5 times)"
    ]
    sentences = preference_sentences(by_logits, LINES, left_out=7)
    assert sentences[1:] == [
        "(7 classes between them)",
        "wood: −0.25 overall; most at the centre (+0.10), least at the left (−0.10)",
    ]


def test_names_as_parts_of_file_names():
    assert file_part("ReCLIP++ (rectified)") == "ReCLIP++_rectified"
    assert file_part("../up") == "up" and file_part("Straße 1") == "Stra_e_1" and file_part("//") == "model"


def test_only_pictures_of_the_report_are_removed(tmp_path):
    report = tmp_path / "report"
    report.mkdir()
    for path in (report / "own.png", report / "mine.png", tmp_path / "out.png"):
        path.write_bytes(b"x")
    (report / "bias.json").write_text(json.dumps({"pictures": ["own.png", "../out.png", 7]}))
    (report / "index.html").write_text("x")
    with pytest.raises(ReclipError, match="add --overwrite"):
        check_output_dir(report, overwrite=False)
    check_output_dir(report, overwrite=True)
    assert (report / "own.png").exists()  # nothing is lost before there is something new
    remove_report(report)
    assert sorted(path.name for path in report.iterdir()) == ["mine.png"] and (tmp_path / "out.png").exists()
    check_output_dir(report, overwrite=False)


@pytest.mark.parametrize("content", ["", "[]", '{"pictures": 3}', "{"])
def test_a_damaged_report_is_removed_too(tmp_path, content):
    (tmp_path / "bias.json").write_text(content)
    remove_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ReclipError, match="is a file"):
        check_output_dir(tmp_path / "file", overwrite=True)
