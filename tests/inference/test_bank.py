"""The bank: what it keeps of unlabelled images, its file, and how it changes logits."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.inference import ImagePredictor
from reclip_d2.inference.bank import BankBuilder, build_bank
from reclip_d2.inference.bank_file import FORMAT, Bank, bank_identity
from reclip_d2.inference.refinements.bank import mix_with_bank, nearest_similarity
from reclip_d2.utils.tensor_files import save_safetensors
from tests.helpers import make_maskclip, make_rectified, make_student, watch_opened_files, write_scenes


def test_entries_by_hand():
    """The most confident patch of four, and of three; the mean is over all patches."""
    builder = BankBuilder(3, 2, size=8)
    features = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [4.0, 3.0], [1.0, 2.0]]])
    scores = torch.tensor([[5.0, 1, 2, 3, 0, 0, 0], [0, 0, 0, 0, 2, 9, 1], [0, 0, 0, 0, 0, 0, 0]])
    builder.add(features, scores[:, None])
    bank = builder.finish({})
    rows = F.normalize(features[0], dim=1)
    torch.testing.assert_close(bank.mean, rows.mean(0))
    assert bank.counts.tolist() == [1, 1, 0]
    expected = F.normalize(rows[[0, 5]] - rows.mean(0), dim=1)
    torch.testing.assert_close(bank.entries.float(), expected, atol=2e-3, rtol=0)
    assert torch.equal(bank.of_class(1), bank.entries[1:]) and len(bank.of_class(2)) == 0


def test_only_the_most_confident_stay():
    """However many images there are, and in whichever order: memory is bounded by ``size``."""
    scores = torch.randperm(50, generator=torch.Generator().manual_seed(0)).float() / 10
    angles = torch.linspace(0, 3, 50)
    builder = BankBuilder(2, 2, size=3)
    for score, angle in zip(scores, angles, strict=True):
        feature = torch.stack([angle.cos(), angle.sin()])
        builder.add(
            feature[None, None],
            torch.stack([score, torch.zeros(())])[:, None, None] + torch.tensor([1.0, 0])[:, None, None],
        )
        assert max(map(len, builder._regions)) <= 6
    bank = builder.finish({})
    best = scores.topk(3).indices
    points = torch.stack([angles.cos(), angles.sin()], 1)
    expected = F.normalize(points[best].half().float() - points.mean(0), dim=1)
    torch.testing.assert_close(bank.entries.float(), expected, atol=2e-3, rtol=0)


def test_nearest_similarity_by_hand():
    entries = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), dim=1)
    found = nearest_similarity(torch.tensor([[1.0, 0.0]]), entries, 2)
    torch.testing.assert_close(found, torch.tensor([(1 + 0.5**0.5) / 2]))
    torch.testing.assert_close(
        nearest_similarity(torch.tensor([[1.0, 0.0]]), entries, 9), torch.tensor([(1 + 0.5**0.5) / 3])
    )


def test_mixture_in_double_precision():
    log_p = torch.randn(4, 6, dtype=torch.float64).log_softmax(0)
    similarity, known = torch.rand(4, 6, dtype=torch.float64), torch.tensor([True, False, True, True])
    found = mix_with_bank(log_p, similarity, known, 0.3, 7.0)
    for i in range(6):
        total = sum((7.0 * similarity[c, i]).exp() for c in (0, 2, 3))
        inside = sum(log_p[c, i].exp() for c in (0, 2, 3))
        assert found[1, i] == log_p[1, i]
        for c in (0, 2, 3):
            bank = ((7.0 * similarity[c, i]).exp() / total * inside).log()
            torch.testing.assert_close(found[c, i], 0.7 * log_p[c, i] + 0.3 * bank)
    assert torch.equal(mix_with_bank(log_p, similarity, torch.zeros(4, dtype=torch.bool), 0.3, 7.0), log_p)
    torch.testing.assert_close(mix_with_bank(log_p, similarity, known, 0.0, 7.0), log_p)


@pytest.fixture
def records(tmp_path) -> list[dict]:
    found = write_scenes(tmp_path / "scenes", 4, size=(48, 64))
    return [{key: record[key] for key in ("file_name", "image_id")} for record in found]


KEYS = ("INPUT.MIN_SIZE_TEST", 0, "TEST.BANK.SIZE", 16)


def config(*keys: object):
    return load_config("", [*map(str, (*KEYS, *keys))])


@pytest.mark.parametrize("make", [make_maskclip, make_rectified])
def test_from_images_to_refined_labels(tmp_path, records, make):
    """Made without labels, written, read, and used; weight 0 changes nothing."""
    model = make().eval()
    plain = ImagePredictor.from_config(model, config())

    def guard(path: str) -> None:
        assert "annotations" not in path, f"the bank opens a label: {path}"

    with watch_opened_files(guard):
        bank = build_bank(config(), plain, records)
    with pytest.raises(AssertionError, match="carries a label"):
        build_bank(config(), plain, [{**records[0], "sem_seg_file_name": "x.png"}])
    file = tmp_path / "new" / "bank.safetensors"
    bank.save(file)
    read = Bank.read(file, model)
    assert all(torch.equal(getattr(read, name), getattr(bank, name)) for name in ("mean", "entries", "counts"))
    image = np.asarray(Image.open(records[0]["file_name"]))
    labels = {}
    for weight in (0, 1):
        keys = ("TEST.REFINE", "['bank']", "TEST.BANK.FILE", file, "TEST.BANK.WEIGHT", weight)
        labels[weight] = ImagePredictor.from_config(model, config(*keys)).labels(image)
    assert (labels[0] == plain.labels(image)).mean() > 0.99
    assert (labels[1] != labels[0]).any()
    subset = ImagePredictor.from_config(model, config(*keys)).for_classes([1, 0]).labels(image)
    assert subset.max() <= 1


def test_an_image_that_cannot_be_read_is_left_out(tmp_path, records):
    model = make_maskclip().eval()
    predictor = ImagePredictor.from_config(model, config())
    (tmp_path / "bad.png").write_bytes(b"")
    bad = {"file_name": str(tmp_path / "bad.png"), "image_id": "bad"}
    assert torch.equal(
        build_bank(config(), predictor, [bad, *records]).mean, build_bank(config(), predictor, records).mean
    )
    with pytest.raises(ReclipError, match="none could be read"):
        build_bank(config(), predictor, [bad])


def test_wrong_files(tmp_path):
    model, file = make_maskclip().eval(), tmp_path / "bank.safetensors"
    count, width = model.num_classes, model.backbone.embed_dim
    tensors = {
        "mean": torch.zeros(width),
        "entries": torch.zeros(count, width, dtype=torch.float16),
        "counts": torch.ones(count, dtype=torch.int64),
    }
    identity = bank_identity(model)
    right = {"format": FORMAT, "identity": json.dumps(identity)}

    def refused(match: str, metadata: dict = right, **changes: torch.Tensor) -> None:
        save_safetensors({**tensors, **changes}, file, metadata)
        with pytest.raises(ReclipError, match=match):
            Bank.read(file, model)

    with pytest.raises(ReclipError, match="does not exist: make it with reclip segment --bank"):
        Bank.read(file, model)
    save_safetensors(tensors, file, right)
    assert Bank.read(file, model).counts.sum() == count
    refused("is not a bank", {"format": "x"})
    refused("another class_names", {**right, "identity": json.dumps({**identity, "class_names": [["a"]]})})
    refused("damaged", counts=torch.full((count,), 2))
    refused("damaged", entries=torch.zeros(count, width))
    refused("damaged", mean=torch.full((width,), torch.nan))
    with pytest.raises(ReclipError, match="a student does not have"):
        bank_identity(make_student(make_maskclip()))
    with pytest.raises(ReclipError, match="bank needs TEST.BANK.FILE"):
        ImagePredictor.from_config(model, config("TEST.REFINE", "['bank']"))
