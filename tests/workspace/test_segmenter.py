"""The Python API, as users call it."""

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from reclip_d2 import ReclipError, Segmenter
from reclip_d2.cli.main import main
from reclip_d2.data.datasets.custom import CUSTOM
from reclip_d2.utils.progress import Progress
from reclip_d2.workspace import saved_model
from tests.cli.conftest import FAST_KEYS, picture, read_mask, segment_arguments, write_inputs
from tests.helpers import isolated_cache

__all__ = ["isolated_cache"]

CLASSES, BACKGROUND = ["sky, heaven", ["wood"], "fire"], ["road", "snow"]  # those of the class file of write_inputs
MASKS = ["0", "1", "2", "3", "in/4", "in/5"]


@pytest.fixture(autouse=True)
def forget_custom():
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        if CUSTOM in catalog.list():
            catalog.remove(CUSTOM)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of the module: photos, a class file, and ``out``, the run of ``fitted``."""
    folder = tmp_path_factory.mktemp("segmenter")
    write_inputs(folder)
    return folder


def untrained(**arguments):
    keys = {"classes": CLASSES, "background": BACKGROUND, "device": "cpu", "opts": FAST_KEYS}
    return Segmenter.from_clip("reclip-embedded", **{**keys, **arguments})


@pytest.fixture(scope="module")
def fitted(place, tmp_path_factory):
    """A rectified model and the events of its training, whose run is ``out``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        model, events = untrained(), []
        assert (
            model.fit(place / "photos", output=place / "out", progress=events.append, iterations=6, keep="rectified")
            is model
        )
        model.events = events
        yield model


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    return fitted.save(tmp_path_factory.mktemp("saved") / "model")


def reclip(folder, monkeypatch, *arguments):
    """Call the command in this process."""
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def same(first, second):
    """Whether two models are the same in their predictions."""
    image = picture(7, 90, 110)
    return np.array_equal(first(image).logits(), second(image).logits())


def test_the_import_is_light():
    lines = (
        "import sys, reclip_d2\n"
        "assert 'Segmenter' in dir(reclip_d2) and not hasattr(reclip_d2, 'segmenter')\n"
        "print([name for name in ('torch', 'numpy', 'detectron2', 'open_clip') if name in sys.modules])\n"
        "from reclip_d2 import Segmenter\n"
        "print(Segmenter.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n") == ["[]", "Segmenter", ""] and result.stderr == ""


# ---- the four lines -------------------------------------------------------------------------------------------------


def test_fit_reports_its_progress(fitted):
    assert fitted.kind == "rectified" and fitted.problems == {}
    events = fitted.events
    assert all(type(event) is Progress for event in events)
    ends = {event.stage: (event.done, event.total) for event in events if event.ended}
    assert ends == {"images": (6, 6), "features": (12, 12), "hypotheses": (6, 6), "rectification": (6, 6)}
    # No masks: nobody asked for them.
    assert str(events[-1]).startswith("rectification: 6 of 6 iterations (100 %)")


def test_a_result(fitted, place, capfd):
    result = fitted(place / "photos" / "1.jpg")
    assert result.classes == fitted.classes == ["sky", "wood", "fire"]
    assert result.labels.shape == (96, 128) and result.labels.dtype == np.uint8
    assert set(np.unique(result.labels)) <= {0, 1, 2, 255}
    logits = result.logits()
    assert logits.shape == (3, 96, 128) and logits.dtype == np.float32
    known = result.labels != 255
    assert known.any() and (logits.argmax(0)[known] == result.labels[known]).all()
    bands = list(result.logit_bands())
    assert np.array_equal(np.concatenate([band for _, band in bands], axis=1), logits)
    assert result.path == (place / "photos" / "1.jpg").absolute()

    overlay = np.asarray(result.overlay(opacity=0.25))
    expected = 0.75 * result.image + 0.25 * result.colors[np.where(known, result.labels, 0)]
    assert np.abs(overlay - expected)[known].max() <= 1  # rounding
    assert (overlay == result.image)[~known].all()
    assert capfd.readouterr() == ("", "")


def test_labels_are_the_masks_of_the_command(fitted, place, saved, tmp_path, monkeypatch):
    """``reclip segment`` takes the run as finished; ``reclip predict`` reads the run and the saved model."""
    weights = (place / "out" / "run" / "rectified" / "model_final.pth").stat()
    assert reclip(place, monkeypatch, *segment_arguments()) == 0
    assert (place / "out" / "run" / "rectified" / "model_final.pth").stat() == weights  # not trained again
    folders = [place / "out" / "masks"]
    for number, model in enumerate((place / "out", saved)):
        output = tmp_path / str(number)
        arguments = ("predict", "photos", "--model", model, "--output", output, "--device", "cpu")
        assert reclip(place, monkeypatch, *arguments) == 0
        folders.append(output / "masks")
    for name in MASKS:
        (path,) = place.glob(f"photos/{name}.*")
        labels = fitted(path).labels
        assert all(np.array_equal(labels, read_mask(folder / f"{name}.png")) for folder in folders)


def test_a_class_has_the_maximum_of_its_queries(place):
    single = untrained(classes=["sky", "wood", "fire"], background=())
    both = untrained(classes=["sky; fire", "wood"], background=())
    assert both.classes == ["sky", "wood"]
    image = place / "photos" / "0.jpg"
    one, two = single(image), both(image)
    assert np.array_equal(two.labels, np.array([0, 1, 0])[one.labels]) and 2 in one.labels
    logits = one.logits()
    np.testing.assert_allclose(two.logits(), np.stack([logits[[0, 2]].max(0), logits[1]]), atol=1e-5)


def test_before_fit_it_is_maskclip(place, tmp_path, monkeypatch):
    model = untrained(classes=place / "classes.txt", background=())
    assert model.kind == "maskclip" and model.classes == ["sky", "wood", "fire"]
    arguments = segment_arguments("--fast", "--background", "keep", output=str(tmp_path / "out"))
    assert reclip(place, monkeypatch, *arguments) == 0
    kept = untrained(keep_background=True)
    assert kept.classes == ["sky", "wood", "fire", "background"]
    for name in ("0", "3"):
        mask = read_mask(tmp_path / "out" / "masks" / f"{name}.png")
        assert np.array_equal(kept(place / "photos" / f"{name}.jpg").labels, mask)
        assert np.array_equal(model(place / "photos" / f"{name}.jpg").labels, np.where(mask == 3, 255, mask))
    logits = kept(place / "photos" / "0.jpg").logits()
    assert logits.shape[0] == 4 and np.array_equal(logits.argmax(0), read_mask(tmp_path / "out" / "masks" / "0.png"))


# ---- images ---------------------------------------------------------------------------------------------------------


def test_images_of_all_kinds(fitted, place, tmp_path):
    path = place / "photos" / "1.jpg"
    expected = fitted(path).labels
    with Image.open(path) as image:
        image.load()
    array = np.asarray(image)
    for given in (str(path), image, array, np.asfortranarray(array)):
        assert np.array_equal(fitted(given).labels, expected)
    assert fitted(array).path is None

    results = fitted([path, array])
    assert isinstance(results, list) and all(np.array_equal(result.labels, expected) for result in results)
    drawn = []
    lazy = fitted(drawn.append(number) or array for number in range(3))
    assert drawn == [] and np.array_equal(next(lazy).labels, expected) and drawn == [0]

    # An EXIF orientation and transparency count for a PIL image as they do for its file.
    turned = image.copy()
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.arange(128, dtype=np.uint8), (96, 1))))
    clear.save(tmp_path / "clear.png")
    for name in ("turned.png", "clear.png"):
        with Image.open(tmp_path / name) as opened:
            result = fitted(opened)
        from_file = fitted(tmp_path / name)
        assert np.array_equal(result.image, from_file.image) and np.array_equal(result.labels, from_file.labels)
    assert fitted(tmp_path / "turned.png").labels.shape == (128, 96)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("none.jpg", "none.jpg"),
        (np.zeros((4, 4), np.uint8), r"array \(4, 4\) of uint8"),
        (np.zeros((4, 4, 3)), "of float64"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (np.zeros((1, 400, 3), np.uint8), "crop it"),
        (torch.zeros(3, 4, 4), "type Tensor"),
        (Image.new("I;16", (4, 4)), "PIL mode I;16"),
        (7, "type int"),
        (None, "type NoneType"),
    ],
)
def test_what_is_no_image(fitted, image, words):
    with pytest.raises(ReclipError, match=words):
        fitted(image)


def test_results_as_files(fitted, place, tmp_path):
    path = place / "photos" / "1.jpg"
    result = fitted(path)
    assert result.save(tmp_path / "mask.png") == tmp_path / "mask.png"
    assert np.array_equal(read_mask(tmp_path / "mask.png"), result.labels)
    for number, made in enumerate((result, fitted(result.image))):
        folder = made.save(tmp_path / str(number), formats=["index", "overlay", "coco", "scores", "yolo"])
        stem = ("1", "image")[number]
        assert np.array_equal(read_mask(folder / "index" / f"{stem}.png"), result.labels)
        scores = np.load(folder / "scores" / f"{stem}.npz")["scores"]
        assert np.array_equal(scores, result.logits().astype(np.float16))
        assert (folder / "overlay" / f"{stem}.jpg").is_file() and (folder / "coco").is_dir()
        assert [p.exists() for p in (folder / "yolo" / "images").iterdir()] == [True]
    with pytest.raises(ReclipError, match=r"^path .*mask\.jpg does not end in \.png"):
        result.save(tmp_path / "mask.jpg")
    with pytest.raises(ReclipError, match="nonsense"):
        result.save(tmp_path / "other", formats=["nonsense"])
    assert not (tmp_path / "other").exists()


# ---- training -------------------------------------------------------------------------------------------------------


def test_an_interrupted_fit_resumes_in_its_temporary_folder(place, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = untrained()

    def stop(event):
        if event.stage == "rectification" and event.done == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr("reclip_d2.utils.progress._SHORTEST_GAP", 0)  # every iteration is reported
    with pytest.raises(KeyboardInterrupt):
        model.fit([place / "photos"], iterations=6, seed=3, progress=stop, keep="rectified")
    assert model.kind == "maskclip" and len(list(tmp_path.glob("reclip-*"))) == 1
    events = []
    model.fit([place / "photos"], iterations=6, seed=3, progress=events.append, keep="rectified")
    begun = [event.done for event in events if event.stage == "rectification" and event.total]
    assert begun[0] == 4 and begun[-1] == 6  # a checkpoint is written after every two iterations
    assert [event.message for event in events if event.stage == "hypotheses"] == ["done before"]

    # The trained model outlives the object's run only in a saved model.
    target = model.save(tmp_path / "kept")
    assert not list(tmp_path.glob("reclip-*"))
    again = Segmenter.load(target, device="cpu")
    assert same(model, again)
    other = untrained().fit(place / "photos", iterations=6, seed=3, keep="rectified")  # the same seed: the same model
    assert same(model, other)
    del other
    gc.collect()
    assert not list(tmp_path.glob("reclip-*"))


def test_the_folder_of_another_run(fitted, place):
    model = untrained()
    with pytest.raises(ReclipError, match=r"^output .* contains a run: give resume=True, overwrite=True"):
        model.fit(place / "photos", output=place / "out", iterations=6, resume=False, keep="rectified")
    with pytest.raises(ReclipError, match=r"was made with SOLVER.MAX_ITER|was made with iterations") as error:
        model.fit(place / "photos", output=place / "out", iterations=7, keep="rectified")
    assert "--" not in str(error.value) and "give overwrite=True" in str(error.value)
    assert model.kind == "maskclip"
    assert same(model.fit(place / "photos", output=place / "out", iterations=6, keep="rectified"), fitted)  # as it is


def test_a_student(fitted, place, tmp_path):
    """Distilled from the run that is there; it is saved without its teacher, and runs without CLIP's weights."""
    shutil.copytree(place / "out", tmp_path / "out")
    model = untrained()
    keys = ("HYPOTHESIS.FILE", str(place / "out" / "run" / "hypotheses.jsonl"))
    model.fit(
        place / "photos", output=tmp_path / "out", student=True, iterations=6, student_iterations=2, student_weights="",
        opts=keys, keep="rectified",
    )  # fmt: skip
    assert model.kind == "student"
    path = model.save(tmp_path / "saved")
    assert same(Segmenter.from_pretrained(path, device="cpu"), model)
    assert not same(model, fitted)


def test_broken_images_are_left_out(place, tmp_path):
    shutil.copytree(place / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    model = untrained().fit(tmp_path / "photos", iterations=1, keep="rectified")
    assert list(model.problems) == ["bad"] and "bad.jpg" in model.problems["bad"] and model.kind == "rectified"


# ---- keeping --------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(fitted, saved, place):
    assert {path.name for path in saved.iterdir()} == {"config.json", "config.yaml", "model.safetensors", "README.md"}
    for again in (Segmenter.load(saved, device="cpu"), Segmenter.from_pretrained(str(saved), device="cpu")):
        assert again.classes == fitted.classes and again.kind == "rectified" and again.clip == "reclip-embedded"
        assert same(again, fitted)
    assert same(Segmenter.load(place / "out", device="cpu"), fitted)
    maskclip = Segmenter.load(place / "out", use="maskclip", device="cpu", opts=FAST_KEYS)
    assert same(maskclip, untrained())
    # A loaded model can be trained further on other images, with the names that it knows.
    assert Segmenter.load(saved, device="cpu", opts=FAST_KEYS).fit(place / "photos" / "in", iterations=1).decision


def test_maskclip_is_saved_without_weights(tmp_path):
    model = untrained()
    model.save(tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.safetensors"))
    again = Segmenter.from_pretrained(tmp_path / "model", device="cpu")
    assert again.kind == "maskclip" and same(again, model)


def test_saved_whole_or_not_at_all(fitted, tmp_path, monkeypatch):
    target = fitted.save(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saved_model, "save_safetensors", fail)
        for folder, overwrite in ((tmp_path / "new", False), (target, True)):
            with pytest.raises(OSError, match="No space"):
                fitted.save(folder, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before

    with pytest.raises(ReclipError, match=r"contains a saved model: give overwrite=True"):
        fitted.save(target)
    fitted.save(target, overwrite=True)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ReclipError, match="contains other files"):
        fitted.save(target, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine" and same(Segmenter.load(target, device="cpu"), fitted)


def test_nothing_but_a_saved_model_is_from_pretrained(place, fitted, saved, tmp_path):
    """No pickle is read; what a config from elsewhere says of files has no effect."""
    with pytest.raises(ReclipError, match="is not a saved model.*Segmenter.load"):
        Segmenter.from_pretrained(place / "out")
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    text = (folder / "config.yaml").read_text()
    assert str(place) not in text and "out/run" not in text
    assert "\nOUTPUT_DIR: ./output\n" in text
    text = text.replace("OUTPUT_DIR: ./output", f"OUTPUT_DIR: {tmp_path / 'made'}").replace("FILE: ''", "FILE: /none")
    (folder / "config.yaml").write_text(text)
    assert same(Segmenter.from_pretrained(folder, device="cpu"), fitted) and not (tmp_path / "made").exists()

    (folder / "model.safetensors").rename(folder / "model.pth")
    with pytest.raises(ReclipError, match="no finished model"):
        Segmenter.from_pretrained(folder)
    content = json.loads((saved / "config.json").read_text())
    for key, value in (("kind", "other"), ("clip", "../clip.json"), ("format", "reclip_d2 model 9")):
        (folder / "config.json").write_text(json.dumps({**content, key: value}))
        with pytest.raises(ReclipError, match=r"model file .*config\.json is damaged"):
            Segmenter.from_pretrained(folder)


# ---- the hub --------------------------------------------------------------------------------------------------------


class FakeHub:
    """Uploads land in a cache as huggingface_hub keeps one, which its own download reads."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.calls = cache, []

    def create_repo(self, api, repo_id, **arguments):
        self.calls.append(("create_repo", repo_id, arguments))

    def upload_folder(self, api, *, repo_id, folder_path, **arguments):
        self.calls.append(("upload_folder", repo_id, arguments))
        repo, commit = self.cache / f"models--{repo_id.replace('/', '--')}", "0" * 40
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        (repo / "blobs").mkdir()
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in Path(folder_path).iterdir():  # a file is a link to its content
            shutil.copyfile(path, repo / "blobs" / path.name)
            (snapshot / path.name).symlink_to(repo / "blobs" / path.name)
        return huggingface_hub.CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/{commit}",
            commit_message="",
            commit_description="",
            oid=commit,
        )


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    for name in ("create_repo", "upload_folder"):
        call = getattr(fake, name)
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda api, *a, call=call, **k: call(api, *a, **k))
    return fake


def test_to_the_hub_and_back(fitted, fake_hub, place, capfd):
    address = fitted.push_to_hub("someone/street", private=True, commit_message="First")
    assert address == f"https://huggingface.co/someone/street/commit/{'0' * 40}"
    assert [call[:2] for call in fake_hub.calls] == [
        ("create_repo", "someone/street"),
        ("upload_folder", "someone/street"),
    ]
    assert fake_hub.calls[0][2] == {"private": True, "exist_ok": True}
    assert fake_hub.calls[1][2]["commit_message"] == "First"

    again = Segmenter.from_pretrained("someone/street", cache_dir=fake_hub.cache, local_files_only=True, device="cpu")
    assert again.classes == fitted.classes and same(again, fitted)
    assert capfd.readouterr() == ("", "")

    (snapshot,) = (fake_hub.cache / "models--someone--street" / "snapshots").iterdir()
    names = {path.name for path in snapshot.iterdir()}
    assert names == {"config.json", "config.yaml", "model.safetensors", "README.md"}
    for name in names:  # nothing of the machine that it was trained on
        assert str(place).encode() not in (snapshot / name).read_bytes()
    card = (snapshot / "README.md").read_text()
    front = card.split("---")[1]
    assert "pipeline_tag: image-segmentation" in front and "license" not in front
    for words in ("1. sky, heaven"[3:], "Background: road, snow", "reclip-embedded", "iterations: 6", "## Licence"):
        assert words in card


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("no/such/folder", {}, "neither a folder nor a name on the Hugging Face Hub"),
        ("someone/unknown", {"local_files_only": True}, "is not completely in the local cache"),
        ("someone/unknown", {"local_files_only": True, "revision": "v2"}, "is not completely in the local cache"),
    ],
)
def test_names_that_the_hub_does_not_have(name, arguments, words, tmp_path):
    with pytest.raises(ReclipError, match=words):
        Segmenter.from_pretrained(name, cache_dir=tmp_path, **arguments)


def test_what_the_hub_refuses(fake_hub, monkeypatch):
    def refuse(api, *arguments, **options):
        import httpx

        request = httpx.Request("POST", "https://huggingface.co/api/repos/create")
        raise huggingface_hub.errors.HfHubHTTPError("401 Unauthorized", response=httpx.Response(401, request=request))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ReclipError, match=r"'someone/street'.*cannot be reached \(.*401.*your token"):
        untrained().push_to_hub("someone/street")


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda place: Segmenter.from_clip("ViT-B-99", classes=CLASSES), "^clip ViT-B-99 is not known"),
        (lambda place: Segmenter.from_clip("ViT-B-16", "nobody", classes=CLASSES), "^pretrained nobody is neither"),
        (lambda place: untrained(device="tpu"), "^device tpu is unknown"),
        (lambda place: untrained(classes=["sky", "lake,"]), "^classes, line 2: an empty name"),
        (lambda place: untrained(classes=["sky", ""]), "^classes: '' is not a name"),
        (lambda place: untrained(classes=["sky"], background=()), "^classes names only one class"),
        (lambda place: untrained(classes=["sky", "café", "cafe\u0301"]), "^classes, line 3: CLIP reads the name"),
        (lambda place: untrained(classes=place / "none.txt"), r"class file .*none\.txt"),
        (lambda place: untrained(classes=place / "classes.txt"), "omit background"),
        (
            lambda place: untrained(classes="sky, lake"),
            "^classes is the name of a class file, and 'sky, lake' does not",
        ),
        (lambda place: untrained(classes=[1, 2]), "^classes: give a class file, or a list of names"),
        (lambda place: untrained(classes=None), "^classes: give a class file, or a list of names"),
        (lambda place: untrained(classes=[]), "^classes is empty"),
        (lambda place: untrained(opts=["NO.SUCH.KEY", "1"]), "NO.SUCH.KEY"),
        (lambda place: untrained().fit(None), "^images is of type NoneType"),
        (lambda place: untrained().fit(place / "photos", iterations="5"), "^iterations '5' is not a whole number"),
        (lambda place: untrained().fit(place / "photos", progress="yes"), "^progress 'yes' is not callable"),
        (lambda place: untrained().fit(place / "none"), "^images .*none does not exist"),
        (lambda place: untrained().fit(place / "photos", iterations=0), "^iterations 0: give a number above 0"),
        (lambda place: untrained().fit(place / "photos", tile=-1), "^tile -1: give a number above 0"),
        (lambda place: untrained().fit(place / "photos", output=""), "^output is empty"),
        (lambda place: untrained().fit(place / "photos", output=place), "contains other files"),
        (
            lambda place: Segmenter.load(place / "photos"),
            "^folder .* is neither an output folder of .* nor a saved model",
        ),
        (lambda place: Segmenter.load(place / "out", use="other"), "^use 'other' is unknown"),
        (lambda place: untrained().save(place), "^folder .* contains other files"),
    ],
)
def test_mistakes_name_the_argument(call, words, fitted, place):
    with pytest.raises(ReclipError, match=words) as error:
        call(place)
    assert "--" not in str(error.value) and "\n" not in str(error.value)


def test_a_bank_of_the_training_images(place, tmp_path):
    """Predictions use the bank; a saved model does not contain it, and predicts without."""
    model = untrained()
    images = place / "photos"
    model.fit(
        images, output=tmp_path / "out", iterations=2, keep="rectified", bank=True, opts=["TEST.BANK.WEIGHT", "1.0"]
    )
    assert (tmp_path / "out" / "run" / "rectified" / "bank.safetensors").is_file()
    (image,) = images.glob("0.*")
    labels = model(image).labels
    plain = Segmenter.load(tmp_path / "out", device="cpu", opts=["TEST.REFINE", "[]"])(image).labels
    assert np.array_equal(labels, Segmenter.load(tmp_path / "out", device="cpu")(image).labels)
    assert not np.array_equal(labels, plain)
    saved = Segmenter.load(model.save(tmp_path / "saved"), device="cpu")
    assert np.array_equal(saved(image).labels, plain)
