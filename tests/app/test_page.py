"""The page over HTTP, as a browser would use it."""

import re
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from reclip_d2.app.handlers import Handlers, _plain
from reclip_d2.app.page import EXAMPLE_CLASSES, build_page, write_example_scenes
from reclip_d2.app.private_folder import MARKER
from reclip_d2.app.server import serve
from reclip_d2.app.session import Session
from reclip_d2.errors import ReclipError
from tests.app.conftest import CLASSES, TINY, free_port
from tests.cli.conftest import read_mask

# Of gradio's own use of pandas.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]


@pytest.fixture
def upload(served):
    """Upload images of the folder; returns what the page says of them."""

    def call(*names):
        return served.client.predict([handle_file(str(served.photos / name)) for name in names], api_name="/upload")

    return call


def path_of(value):
    """The file that the client has for a component: a path, or a description or an update that holds one."""
    while isinstance(value, dict):
        value = value.get("path") or value["value"]
    return Path(value)


def size_of(value):
    """(W, H) of a picture."""
    with Image.open(path_of(value)) as image:
        return image.size


def test_learning_is_announced(served):
    """The broken image has no part; few images are said to be few."""
    assert served.learnt.startswith("Learnt from 4 images in ") and "poor estimate" in served.learnt


def test_segment(served, upload, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "moving.gif")
    _, iterations, status, *_ = upload("3.jpg", "broken.jpg", "in/4.png", tmp_path / "moving.gif")
    status = status.replace("&#46;", ".")
    assert iterations == 200 and "broken.jpg cannot be read" in status and "left out: 1 .gif" in status
    status, slider, sides, legend, mask, choice, bias, *maps = served.client.predict(CLASSES, api_name="/segment")
    expected = served.session.segment(served.photos / "3.jpg", CLASSES)
    assert "ReCLIP" in status and "learnt on this page" in status
    np.testing.assert_array_equal(read_mask(path_of(mask)), expected.after)
    assert [size_of(file) for file in slider] == [(300, 200)] * 2  # 150 x 200, with margins
    assert "before" in sides and "after" in sides
    assert all(name in legend for name in ("sky", "wood", "fire", "background: road, snow"))
    assert "red" in bias and all(size_of(file)[0] > 300 for file in maps)

    other = served.client.predict(3, api_name="/bias")
    assert "road" in other[0] and other[0] != bias


def test_other_names_have_no_after(served, upload):
    upload("0.jpg")
    status, _, sides, legend, *_ = served.client.predict("sky\nlake", api_name="/segment")
    assert "no trained model here has all of these" in status and "after" not in sides and "change" not in legend
    status, *_ = served.client.predict("fire\nwood", api_name="/segment")
    assert "3 more classes" in status


@pytest.mark.parametrize("endpoint", ["/segment", "/learn"])
def test_a_wrong_class_list(served, upload, endpoint):
    upload("0.jpg")
    with pytest.raises(AppError) as error:
        served.client.predict("sky\nlake,", *([3] if endpoint == "/learn" else []), api_name=endpoint)
    assert "the class list, line 2: an empty name" in str(error.value)


def test_nothing_uploaded(served):
    assert len(served.client.predict([], api_name="/upload")) > 5
    for endpoint, arguments in (("/segment", [CLASSES]), ("/learn", [CLASSES, 3])):
        with pytest.raises(AppError, match="no image"):
            served.client.predict(*arguments, api_name=endpoint)


def test_stop_without_a_training(served):
    served.client.predict(api_name="/stop")  # says so, and is no error


def test_nothing_is_fetched_from_elsewhere(served):
    """The browser is told to refuse other hosts, and no tag of the page names one."""
    reply = httpx.get(served.address, timeout=300)
    policy = reply.headers["content-security-policy"]
    assert reply.status_code == 200 and "default-src 'self'" in policy and "http" not in policy
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(https?://[^\"]+)\"", reply.text)
    assert [address for address in loaded if not address.startswith(served.address)] == []
    assert "fonts.googleapis" not in reply.text


def test_what_the_page_serves(served):
    """Its own pictures, and nothing else of the folder that it works in."""
    learnt = served.session._learnt[0].folder.path.parent
    for file, status in ((learnt / "classes.txt", 403), (served.session.own_folder() / MARKER, 403),
                         (served.session.segment(served.photos / "0.jpg", CLASSES).mask_file, 200)):  # fmt: skip
        assert file.is_file()
        assert httpx.get(f"{served.address}gradio_api/file={file}", timeout=300).status_code == status


def test_at_its_end_no_image_is_left(served, tmp_path, monkeypatch):
    """Neither uploads nor masks nor examples; what lay in the folder before stays."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # given back at the end
    work = tmp_path / "work"
    for name in ("masks/mine.png", "uploads/mine.jpg"):
        (work / name).parent.mkdir(parents=True)
        (work / name).touch()
    session = Session(TINY, None, work)
    with serve(session, "127.0.0.1", free_port()) as address:
        client = Client(address, verbose=False, download_files=str(tmp_path), httpx_kwargs={"timeout": 300})
        client.predict([handle_file(str(served.photos / "0.jpg"))], api_name="/upload")
        client.predict(CLASSES, api_name="/segment")
        own = {path.relative_to(session.own_folder()).parts[0] for path in session.own_folder().rglob("*.*g")}
        assert own == {"uploads", "masks", "examples"}
    assert sorted(str(path.relative_to(work)) for path in work.rglob("*.*")) == ["masks/mine.png", "uploads/mine.jpg"]
    assert {path.name for path in work.iterdir()} == {"masks", "uploads"}


def test_examples_are_of_the_tiny_clip(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    scenes = write_example_scenes(tmp_path, 2)
    pixels = [np.asarray(Image.open(path)) for path in scenes]
    assert [p.shape for p in pixels] == [(96, 96, 3)] * 2 and (pixels[0] != pixels[1]).any()
    assert len(EXAMPLE_CLASSES.split("\n")) == 12
    page = build_page(Session(TINY, None, tmp_path / "work"))
    assert len(list((tmp_path / "work").glob("page-*/examples/*.jpg"))) == 24
    labels = {getattr(block, "label", None) for block in page.blocks.values()}
    assert {"Images", "Classes", "Bias of the class", "Iterations"} <= labels


def test_what_the_user_can_mend_and_what_not(session, monkeypatch):
    """Out of memory is reported with its remedy; a bug remains a bug."""

    def call(error):
        def fail(path, text, visitor):
            raise error

        monkeypatch.setattr(session, "segment", fail)
        return Handlers(session).segment([Path("a.jpg")], 0, CLASSES, gr.Request(session_hash="one"))

    with pytest.raises(gr.Error, match="out of CPU memory"):
        call(MemoryError())
    with pytest.raises(gr.Error, match="&lt;i&gt; is wrong: set --clip"):
        call(ReclipError("<i> is wrong: set MODEL.CLIP.NAME"))
    for bug in (RuntimeError("a bug"), KeyError("a bug")):
        with pytest.raises(type(bug)):
            call(bug)


def test_a_model_without_a_bias_to_draw(session, served, monkeypatch):
    """Its masks are shown, with the reason why the bias is not."""

    def fail(segmentation, visitor):
        raise ReclipError("this model has none")

    monkeypatch.setattr(session, "bias_parts", fail)
    result, status, pictures, *_ = Handlers(session).segment(
        [served.photos / "0.jpg"], 0, CLASSES, gr.Request(session_hash="one")
    )
    assert result.after is not None and len(pictures) == 2 and "The bias is not shown: this model has none." in status


def test_plain_text_for_markdown():
    assert _plain("a_b") == "a&#95;b" and _plain("<i>") == "&#60;i&#62;" and _plain("sky") == "sky"
