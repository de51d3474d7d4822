"""The parts of the bias report that need no model: the page, its sentences, its folder."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.preferences import ClassInWords, Preference
from reclip_d2.visualization.html import Page, number
from reclip_d2.visualization.report_folder import check_output_dir, file_part, remove_report
from reclip_d2.visualization.report_texts import preference_sentences


def test_numbers_of_a_table():
    assert number(1.25, 1) == "1.2" and number(-0.5, 2) == "−0.50" and number(0.5, 2, sign=True) == "+0.50"
    assert number(math.nan) == number(None) == number(math.inf) == "–"


def test_page_escapes_and_holds_its_pictures(tmp_path):
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "a.png")
    page = Page('a "title" & <more>')
    page.heading("<h>")
    page.items(["x < y"])
    page.table(["class", "IoU"], [["<sky>", "1"]])
    page.picture(tmp_path / "a.png", 'says "hello"')
    text = page.render()
    assert "<title>a &quot;title&quot; &amp; &lt;more&gt;</title>" in text
    assert "<h2>&lt;h&gt;</h2>" in text and "<li>x &lt; y</li>" in text
    assert "<td>&lt;sky&gt;</td><td class=number>1</td>" in text
    assert 'src="data:image/png;base64,iVBOR' in text and 'alt="says &quot;hello&quot;"' in text


LINES = [
    ClassInWords("sky", math.log(2), "top", math.log(1.5), "bottom", math.log(0.5)),
    ClassInWords("wood", -0.25, "centre", 0.1, "left", -0.1),
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
        "wood: −0.25 as a whole; most at the centre (+0.10), least at the left (−0.10)",
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
