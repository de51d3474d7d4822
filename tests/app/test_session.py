"""Sessions: masks before and after, parts of the logits, training."""

import json
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from reclip_d2.app.session import Session, class_text, read_classes
from reclip_d2.cli.main import main
from reclip_d2.data.class_file import parse_classes
from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.data.images import read_image
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.logit_parts import logit_parts
from reclip_d2.utils.digest import file_digest
from reclip_d2.workspace.child import RunStopped, SegmentProcess
from reclip_d2.workspace.trained_model import TrainedModel
from tests.app.conftest import CLASSES, TINY
from tests.cli.conftest import FAST_KEYS, read_mask


def predict(tmp_path, photo, model, *arguments):
    """The mask that ``reclip predict`` writes."""
    with pytest.raises(SystemExit) as end:
        main(["predict", str(photo), "--model", str(model), "--output", str(tmp_path / "out"), "--device", "cpu",
              *arguments])  # fmt: skip
    assert end.value.code == 0
    return read_mask(tmp_path / "out" / "masks" / f"{photo.stem}.png")


def test_before_is_maskclip(session, served, tmp_path, capsys):
    photo = served.photos / "3.jpg"
    result = session.segment(photo, CLASSES)
    model = session.model_for(read_classes(CLASSES)).trained.folder.path
    expected = predict(tmp_path, photo, model, "--use", "maskclip", "--opts", *FAST_KEYS)
    np.testing.assert_array_equal(result.before, expected)
    assert result.pixels_before == {str(k): int((expected == k).sum()) for k in np.unique(expected)}
    capsys.readouterr()


def test_after_is_the_trained_model(session, served, tmp_path, capsys):
    photo = served.photos / "3.jpg"
    result = session.segment(photo, CLASSES)
    trained = result.model.trained
    expected = predict(tmp_path, photo, trained.folder.path, "--use", trained.kind)
    np.testing.assert_array_equal(result.after, expected)
    np.testing.assert_array_equal(read_mask(result.mask_file), expected)
    assert result.mask_file.name == "3.png" and not result.tiled
    assert (result.after != result.before).any()
    capsys.readouterr()


def test_a_part_of_the_models_classes(session, served):
    """The logits of the other classes are omitted, for any order of the names."""
    photo = served.photos / "0.jpg"
    result = session.segment(photo, "fire\nsnow\nsky, heaven")
    model = session.models.trained(result.model.trained)
    logits = torch.cat([band.logits for band in model.bands(read_image(photo))], dim=1)
    of_model = ["sky", "wood", "fire", "road", "snow"]
    wanted = [of_model.index(name) for name in ("fire", "snow", "sky")]
    np.testing.assert_array_equal(result.after, logits[wanted].argmax(0).numpy())
    assert result.model.others == 2
    before = session.models.maskclip(result.classes)
    np.testing.assert_array_equal(result.before, before.labels(read_image(photo)))


@pytest.mark.parametrize("text", ["sky\nwood", "wood\nwater", "wood\nfire, heat"])
def test_classes_that_no_model_has(session, served, text):
    """A name without the synonyms that it was learnt with is another class."""
    result = session.segment(served.photos / "0.jpg", text)
    assert result.model is None and result.after is None and result.pixels_after is None
    np.testing.assert_array_equal(read_mask(result.mask_file), result.before)
    with pytest.raises(ReclipError, match="no bias has been learnt for these classes"):
        session.bias_parts(result)


def test_a_model_from_the_start(session, served, tmp_path):
    learnt = session.model_for(read_classes(CLASSES)).trained
    other = Session(TINY, TrainedModel.find(str(learnt.folder.path), None, None), tmp_path)
    assert other.has_models and not Session(TINY, None, tmp_path).has_models
    ours, theirs = (s.segment(served.photos / "1.jpg", CLASSES) for s in (other, session))
    np.testing.assert_array_equal(ours.after, theirs.after)
    assert ours.model.trained is other.trained
    clip_only = Session(TINY, TrainedModel.find(str(learnt.folder.path), "maskclip", None), tmp_path)
    assert not clip_only.has_models and clip_only.segment(served.photos / "1.jpg", CLASSES).after is None


def test_the_model_with_just_these_classes_comes_first(session, tmp_path):
    trained = session.model_for(read_classes(CLASSES)).trained
    small = read_classes("sky, heaven\nwood")

    def with_classes(classes):
        state = type(trained.state)(classes, *(getattr(trained.state, k) for k in ("clip", "pretrained", "weights")))
        return type(trained)(trained.folder, state, trained.kind, trained.pretrained)

    other = Session(TINY, with_classes(small), tmp_path)
    other._learnt += [with_classes(read_classes(CLASSES)), with_classes(read_classes(CLASSES))]
    assert other.model_for(small).trained is other.trained
    assert other.model_for(read_classes("wood\nfire")).trained is other._learnt[1]  # the last that was learnt


def test_bias_parts(session, served):
    """The parts of the classes in their order on the page, as the analysis of a trained model gives them."""
    photo = served.photos / "3.jpg"
    result = session.segment(photo, "fire\nsky, heaven\nwood")
    parts = session.bias_parts(result)
    trained = result.model.trained
    model = session.models.trained(trained).model
    mapper = UnlabelledDatasetMapper(trained.config(session.clip.overrides), is_train=False)
    expected = logit_parts(model, mapper, {"file_name": str(photo)})
    for name in ("query", "bias", "rectified", "mask"):
        torch.testing.assert_close(getattr(parts, name), getattr(expected, name)[[2, 0, 1]], rtol=0, atol=0)
    assert parts.bias.abs().max() > 0
    assert session.bias_parts(result) is parts  # not computed again


def test_what_was_learnt_from(session, served):
    """All images that can be read, those of one name too, for the iterations that were asked for."""
    trained = session.model_for(read_classes(CLASSES)).trained
    assert trained.kind == "rectified"
    remembered = json.loads((trained.folder.run / "images.json").read_text())["signatures"]
    assert sorted(remembered) == ["0001 0", "0002 1", "0003 0", "0004 4"]
    assert remembered["0003 0"] == file_digest(served.photos / "1.jpg") != remembered["0001 0"]
    assert torch.load(trained.weights, weights_only=True)["iteration"] == 3
    assert trained.state.classes.classes == read_classes(CLASSES).classes


def test_at_the_end_only_what_was_learnt_is_left(session, served, tmp_path):
    """The copies of the images go; the model still works."""
    learnt = session.model_for(read_classes(CLASSES)).trained.folder.path.parent
    other = Session(TINY, None, tmp_path)
    training = other.own_folder() / "training-1"
    shutil.copytree(learnt, training)
    (training / "images").mkdir()
    (training / "out" / "run" / "working").mkdir(exist_ok=True)
    (training / "out" / "run" / "working" / "large.png").touch()
    other._learnt.append(other._keep(training))
    other.segment(served.photos / "0.jpg", CLASSES)
    other.close()
    assert {path.name for path in tmp_path.iterdir()} == {"learnt-1"}
    assert {path.name for path in (tmp_path / "learnt-1").iterdir()} == {"classes.txt", "out"}
    assert not list(tmp_path.rglob("large.png")) and other._learnt[0].weights.exists()


def test_one_training_at_a_time(session, served, tmp_path, monkeypatch):
    """A second one is rejected, only its owner can stop it, and a stopped one leaves no files."""
    running, stopped = threading.Event(), threading.Event()

    def wait(self, report):
        running.set()
        assert stopped.wait(30)
        raise RunStopped("stopped")

    monkeypatch.setattr(SegmentProcess, "run", wait)
    monkeypatch.setattr(SegmentProcess, "stop", lambda self: stopped.set())
    other = Session(TINY, None, tmp_path / "work")
    ends = []

    def learn():
        with pytest.raises(RunStopped):
            other.learn([served.photos / "0.jpg"], CLASSES, 5, lambda *_: None, "one")
        ends.append(True)

    thread = threading.Thread(target=learn)
    thread.start()
    assert running.wait(30)
    with pytest.raises(ReclipError, match="another training is running"):
        other.learn([served.photos / "0.jpg"], CLASSES, 5, lambda *_: None)
    assert not other.stop("another") and not other.stop(None) and not stopped.is_set()
    assert other.stop("one")
    thread.join(30)
    assert ends == [True] and not other.stop("one") and not other.has_models
    assert not list(other.own_folder().glob("training-*")) and not list((tmp_path / "work").glob("learnt-*"))
    other.close()
    assert list((tmp_path / "work").iterdir()) == []


def test_a_training_whose_page_is_gone(served, tmp_path, monkeypatch):
    """It continues, and the next visitor may stop it."""
    running, stopped = threading.Event(), threading.Event()
    monkeypatch.setattr(SegmentProcess, "run", lambda self, report: running.set() or stopped.wait(30))
    monkeypatch.setattr(SegmentProcess, "stop", lambda self: stopped.set())
    monkeypatch.setattr(Session, "_keep", lambda self, folder: None)
    other = Session(TINY, None, tmp_path)
    arguments = ([served.photos / "0.jpg"], CLASSES, 5, lambda *_: None, "one")
    thread = threading.Thread(target=other.learn, args=arguments)
    thread.start()
    assert running.wait(30)
    other.leave("another")
    assert not other.stop("another")
    other.leave("one")
    assert not stopped.is_set() and other.stop("another") and stopped.is_set()
    thread.join(30)
    other.close()


def test_the_command_of_a_training(tmp_path, served, monkeypatch):
    jobs = []

    def fail(self, report):
        jobs.append(self.job)
        raise ReclipError(f"image {self.job['images'][0]}/0001 0.jpg is bad")

    monkeypatch.setattr(SegmentProcess, "run", fail)
    with pytest.raises(ReclipError) as error:
        Session(TINY, None, tmp_path).learn([served.photos / "0.jpg"], CLASSES, 7, lambda *_: None)
    assert str(error.value) == "image 0001 0.jpg is bad"  # the user knows nothing of our folders
    options = jobs[0]["options"]
    assert (options["iterations"], options["clip"], options["device"]) == (7, "reclip-embedded", "cpu")
    assert options["opts"] == FAST_KEYS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sky\nlake,\nwood", "the class list, line 2: an empty name"),
        ("", "the class list names no class"),
        ("sky", "the class list names only one class"),
        ("sky\n\nsky", "the class list, line 3: 'sky' is also in line 1"),
        ("caf\u00e9\nsky\ncafe\u0301", "the class list, line 3: CLIP reads the name"),
        ("sky\nroad;", "the class list, line 2: an empty name: remove the comma or semicolon"),
        ("sky\n" + "very " * 90 + "long", "the class list, line 2: the name"),
        ("sky\nbackground: " + "very " * 90 + "long", "the class list, line 2: the name"),
        ("sky\nbackground: " + "a" * 50_000, "the class list, line 2: the name"),
        ("sky\nbackground: " + ", ".join(map(str, range(256))), "the class list, line 2: more than 255 background"),
        ("sky\nlake, " + ", ".join(map(str, range(10_000))), "the class list, line 2: more than"),
        ("sky\n" + "# " * 40_000, "the class list has more than 64 KiB"),
    ],
)
def test_wrong_class_lists(session, served, text, words):
    for call in (
        lambda: session.segment(served.photos / "0.jpg", text),
        lambda: session.learn([served.photos / "0.jpg"], text, 1, lambda *_: None),
    ):
        with pytest.raises(ReclipError) as error:
            call()
        assert str(error.value).startswith(words)


def test_wrong_images(session, served, tmp_path):
    Image.fromarray(np.zeros((2, 300, 3), np.uint8)).save(tmp_path / "thin.png")
    for path, words in (
        (served.photos / "broken.jpg", "cannot be read"),
        (tmp_path / "thin.png", "one side more than"),
    ):
        with pytest.raises(ReclipError, match=words):
            session.segment(path, CLASSES)
    with pytest.raises(ReclipError, match="no images to learn from"):
        session.learn([], CLASSES, 5, lambda *_: None)


def test_class_text_is_read_back():
    for text in (CLASSES, "a, b\nc"):
        classes = parse_classes(text, "file")
        again = read_classes(class_text(classes))
        assert (again.classes, again.background) == (classes.classes, classes.background)


def test_suggested_iterations(session):
    """As ``reclip segment`` takes them: for the tiny CLIP 200, the fewest and the config's."""
    assert session.default_iterations == 200
    assert [session.suggested_iterations(count) for count in (0, 1, 1000)] == [200, 200, 200]
