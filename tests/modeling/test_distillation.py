"""The distillation stage: inputs, trained parameters, and the losses of a batch against loops.

Shape letters: B images, n = h*w positions of the student's grid, C classes, D width of the joint embedding, (H, W)
size of the padded batch in pixels.
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from reclip_d2.backbones.dense import DenseCLIP
from reclip_d2.errors import ReclipError
from reclip_d2.layers import draw_seed, gumbel_softmax
from reclip_d2.modeling.meta_arch.distillation import inherit
from reclip_d2.modeling.meta_arch.mask_folder import MaskFolder
from reclip_d2.modeling.student.inherited import HEADS
from tests.helpers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PIXEL_MEAN,
    PIXEL_STD,
    make_distillation,
    make_maskclip,
    make_reclip,
    make_rectified,
    make_student,
    random_image,
    tiny_clip,
    tiny_tokenizer,
)
from tests.processes import run_processes

ALONE = {
    "mask": {"mask_weight": 1.0, "feature_weight": 0.0, "text_weight": 0.0},
    "feature": {"mask_weight": 0.0, "feature_weight": 0.5, "text_weight": 0.0},
    "text": {"mask_weight": 0.0, "feature_weight": 0.0, "text_weight": 0.5},
}
TEACHERS = {"ReCLIP++": make_rectified, "ReCLIP": make_reclip, "MaskCLIP": make_maskclip}


def batch(*specs: tuple[tuple[int, int], list[int]]) -> list[dict]:
    """Inputs of the given sizes and hypotheses."""
    return [
        {"image": random_image(i, *size), "hypothesis": torch.tensor(h, dtype=torch.int64), "file_name": f"{i}.jpg"}
        for i, (size, h) in enumerate(specs)
    ]


USUAL = [((32, 40), [0, 2]), ((32, 40), [1]), ((32, 40), [0, 1, 3])]
PADDED = [((32, 40), [0, 2]), ((17, 20), [1, 3]), ((9, 33), [0, 1, 3])]


def everything(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, those that stay out of checkpoints too."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def changed(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in everything(module).items() if not torch.equal(tensor, before[name])}


def train_step(model, inputs: list[dict], seed: int = 0) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=5e-4)
    torch.manual_seed(seed)
    sum(model(inputs).values()).backward()
    optimizer.step()


# ---- who trains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("loss", ALONE)
def test_each_loss_alone_changes_the_students_backbone_and_nothing_that_is_inherited(teacher, loss):
    model = make_distillation(TEACHERS[teacher](), **ALONE[loss])
    parts = {"teacher": model.teacher, "inherited": model.student.inherited}
    before = {name: everything(part) for name, part in parts.items()}
    backbone, head = everything(model.student.backbone), everything(model.student.feature_head)
    losses = model(batch(*USUAL))
    assert set(losses) == {f"loss_{loss}"} and losses[f"loss_{loss}"].item() > 0
    train_step(model, batch(*USUAL))
    for name, part in parts.items():
        assert before[name] and changed(part, before[name]) == set(), name
    trained = {name for name, parameter in model.student.backbone.named_parameters() if parameter.requires_grad}
    assert trained <= changed(model.student.backbone, backbone)
    assert {name for name in head if name.endswith("weight")} <= changed(model.student.feature_head, head)


def test_the_gradient_of_a_loss_reaches_the_first_layer_of_the_student_and_no_teacher():
    for loss, weights in ALONE.items():
        model = make_distillation(**weights)
        model(batch(*USUAL))[f"loss_{loss}"].backward()
        assert model.student.backbone.stem.conv1.weight.grad.abs().max() > 0, loss
        assert all(parameter.grad is None for parameter in model.teacher.parameters())
        assert all(parameter.grad is None for parameter in model.student.inherited.parameters())


def test_the_text_guided_loss_trains_through_features_and_masks():
    """Both ways into Eq. (7): without the masks' gradient another one comes out."""
    model = make_distillation(**ALONE["text"], gumbel_hard=False)
    inputs = batch(*USUAL)
    grads = []
    inherited = model.student.inherited.forward
    for detach in (False, True):
        model.zero_grad()
        model.student.inherited.forward = lambda x, d=detach: inherited(x).detach() if d else inherited(x)
        torch.manual_seed(0)
        model(inputs)["loss_text"].backward()
        grads.append(model.student.feature_head.branches[0].weight.grad.clone())
    assert grads[1].abs().max() > 0
    assert (grads[0] - grads[1]).abs().max() > 0.01 * grads[1].abs().max()


@pytest.mark.parametrize("loss", ["mask", "text"])
def test_a_classifier_of_the_students_own_trains(loss):
    teacher = make_rectified()
    model = make_distillation(teacher, student=make_student(teacher, head="original"), **ALONE[loss])
    before = everything(model.student.inherited)
    train_step(model, batch(*USUAL))
    assert changed(model.student.inherited, before) == {"classifier.weight", "classifier.bias"}


def test_a_classifier_that_no_loss_would_reach():
    teacher = make_rectified()
    with pytest.raises(ReclipError, match="MODEL.STUDENT.HEAD original"):
        make_distillation(teacher, student=make_student(teacher, head="original"), **ALONE["feature"])


def test_modes_whatever_a_trainer_calls():
    model = make_distillation()

    def modes(module: torch.nn.Module) -> set[bool]:
        return {child.training for child in module.modules()}

    for mode in (True, False, True):
        assert model.train(mode) is model and model.training == mode
        assert modes(model.teacher) == {False} and modes(model.student.inherited.mask_decoder) == {False}
        assert modes(model.student.backbone) == modes(model.student.feature_head) == {mode}
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def test_losses_fall():
    model = make_distillation(make_maskclip())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.003)
    values = []
    for step in range(15):
        torch.manual_seed(step)
        optimizer.zero_grad()
        losses = model(batch(*USUAL))
        sum(losses.values()).backward()
        optimizer.step()
        values.append({key: value.item() for key, value in losses.items()})
    assert set(values[0]) == {"loss_mask", "loss_feature", "loss_text"}
    for key in ("loss_mask", "loss_feature"):
        assert values[-1][key] < 0.8 * values[0][key], key


# ---- who sees what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_teacher_and_student_see_images_as_each_expects(image_format):
    teacher = make_rectified()
    flipped = image_format == "BGR"
    mean, std = ([103.53, 116.28, 123.675], [1.0, 1.0, 1.0]) if flipped else (IMAGENET_MEAN, IMAGENET_STD)
    student = make_student(teacher, image_format=image_format, pixel_mean=mean, pixel_std=std)
    model, seen = make_distillation(teacher, student=student), {}
    teacher.backbone.clip.visual.conv1.register_forward_pre_hook(lambda _, args: seen.update(teacher=args[0]))
    student.backbone.register_forward_pre_hook(lambda _, args: seen.update(student=args[0]))
    inputs = batch(*PADDED)
    model(inputs)
    for name, (center, spread) in {"teacher": (PIXEL_MEAN, PIXEL_STD), "student": (mean, std)}.items():
        assert seen[name].shape == (3, 3, 32, 40)
        for record, pixels in zip(inputs, seen[name], strict=True):
            image = record["image"].flip(0) if name == "student" and flipped else record["image"]
            height, width = image.shape[1:]
            expected = (image.float() - torch.tensor(center).view(3, 1, 1)) / torch.tensor(spread).view(3, 1, 1)
            torch.testing.assert_close(pixels[:, :height, :width], expected)
            assert pixels[:, height:].abs().sum() == pixels[:, :, width:].abs().sum() == 0


def test_sides_that_suit_patches_of_14_px_and_a_stride_of_8():
    backbone = DenseCLIP(tiny_clip(patch_size=14, image_size=28), tiny_tokenizer(), name="tiny")
    teacher = make_maskclip(backbone=backbone)
    student = make_student(teacher)
    model, seen = make_distillation(teacher, student=student), []
    student.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    inputs = batch(((57, 100), [0]), ((30, 112), [1, 2]))
    features, labels = model.teach(inputs)
    assert features.shape == (2, 24, 8, 8) and labels.shape == (2, 112, 112)
    assert all(torch.isfinite(value) for value in model(inputs).values())
    assert seen == [(2, 3, 112, 112)]
    assert model.divisibility == 56


def test_pseudo_labels_are_the_teachers_predictions_and_padding_has_none():
    teacher = make_rectified()
    model = make_distillation(teacher)
    inputs = batch(*PADDED)
    features, labels = model.teach(inputs)
    images = teacher.preprocess_image(inputs).tensor
    with torch.no_grad():
        expected_features, logits = teacher.segment(images)
        expected = F.interpolate(logits, (32, 40), mode="bilinear").argmax(1)
    torch.testing.assert_close(features, expected_features)
    for record, label, wanted in zip(inputs, labels, expected, strict=True):
        height, width = record["image"].shape[1:]
        assert (label[:height, :width] == wanted[:height, :width]).float().mean() > 0.99  # ties may go either way
        assert label[:height, :width].min() >= 0
        assert (label[height:] == -1).all() and (label[:, width:] == -1).all()
    # One image without padding: what the teacher predicts in a test.
    predicted = teacher(inputs[:1])[0]["sem_seg"].argmax(0)
    assert (model.teach(inputs[:1])[1][0] == predicted).float().mean() > 0.99


def make_mask_folder() -> MaskFolder:
    """A teacher with masks from files, with the CLIP of :func:`make_maskclip`."""
    teacher = make_maskclip()
    teacher.__class__ = MaskFolder
    return teacher


@pytest.mark.parametrize("feature_weight", [0.0, 0.5])
def test_masks_from_files(feature_weight, monkeypatch):
    """Pseudo labels are those of the inputs; the image encoder runs only for the features of Eq. (9)."""
    teacher = make_mask_folder()
    model = make_distillation(teacher, mask_weight=1.0, feature_weight=feature_weight, text_weight=0.0)
    inputs = batch(*PADDED)
    for k, record in enumerate(inputs):
        record["pseudo_labels"] = torch.full(record["image"].shape[1:], k)
        record["pseudo_labels"][0] = -1
    if feature_weight:
        expected = make_distillation(make_maskclip()).teach(inputs)[0]
    else:
        monkeypatch.setattr(teacher, "segment", None)
    features, labels = model.teach(inputs)
    for k, (record, label) in enumerate(zip(inputs, labels, strict=True)):
        height, width = record["image"].shape[1:]
        assert (label[1:height, :width] == k).all() and (label[0] == -1).all()
        assert (label[height:] == -1).all() and (label[:, width:] == -1).all()
    if feature_weight:
        torch.testing.assert_close(features, expected)
    else:
        assert features is None
    assert set(model(inputs)) == ({"loss_mask", "loss_feature"} if feature_weight else {"loss_mask"})


@pytest.mark.parametrize(("make", "texts"), [(make_rectified, 1), (make_reclip, 1)])
def test_what_does_not_depend_on_the_images_is_computed_once(make, texts, monkeypatch):
    """The Reference text and, for each grid, the shared bias, through inheritance, training and changes of mode."""
    teacher = make()
    counts = {"reference_features": 0, "shared_bias": 0}

    def counted(name: str):
        inner = getattr(teacher.bias_head, name)

        def call(*args):
            counts[name] += 1
            return inner(*args)

        return call

    for name in counts:
        monkeypatch.setattr(teacher.bias_head, name, counted(name))
    teacher.eval()
    student = make_student(teacher, grid=(4, 5))
    counts_of_inheritance = dict(counts)
    model = make_distillation(teacher, student=student)
    for _ in range(3):
        model(batch(*USUAL))
    model.eval().train()
    model(batch(*USUAL))
    model(batch(((32, 32), [0]), ((32, 32), [1])))
    assert counts_of_inheritance == {"reference_features": texts, "shared_bias": 1}
    assert counts == {"reference_features": texts, "shared_bias": 2}  # of (4, 5) and of (4, 4)


# ---- the losses of a batch ----------------------------------------------------------------------------------------


def inside(inputs: list[dict], size: tuple[int, int], step: float) -> torch.Tensor:
    """``(B, *size)``: cells of ``step`` pixels whose centre lies in the image."""
    valid = torch.zeros(len(inputs), *size, dtype=torch.bool)
    for b, record in enumerate(inputs):
        height, width = record["image"].shape[1:]
        for i in range(size[0]):
            for j in range(size[1]):
                valid[b, i, j] = (i + 0.5) * step < height and (j + 0.5) * step < width
    return valid


def literal_losses(model, inputs: list[dict], seed: int) -> dict[str, float]:
    """Eqs. (7) to (9) of the section's text, image by image, in float64."""
    student = model.student
    teacher_features, teacher_logits = model.teacher.segment(model.teacher.preprocess_image(inputs).tensor)
    with torch.no_grad():
        features, logits = copy.deepcopy(student).segment(student.preprocess_image(inputs).tensor)
    torch.manual_seed(seed)
    masks = gumbel_softmax(logits.flatten(2).transpose(1, 2), model.gumbel_tau, model.gumbel_hard, draw_seed())
    size = tuple(student.preprocess_image(inputs).tensor.shape[-2:])
    grid = tuple(features.shape[-2:])
    pixels, cells = inside(inputs, size, 1), inside(inputs, grid, student.output_stride)
    labels = F.interpolate(teacher_logits, size, mode="bilinear").argmax(1)
    probabilities = F.interpolate(logits.double(), size, mode="bilinear").log_softmax(1)
    where = size if model.feature_size == "image" else grid
    ours, theirs = (
        x.double() if tuple(x.shape[-2:]) == where else F.interpolate(x.double(), where, mode="bilinear")
        for x in (features, teacher_features)
    )
    sums = {"mask": 0.0, "feature": 0.0, "text": 0.0}
    for b, record in enumerate(inputs):
        picked = probabilities[b].gather(0, labels[b][None])[0]
        sums["mask"] -= picked[pixels[b]].mean().item()
        distance = (ours[b] - theirs[b]).abs().sum(0)
        sums["feature"] += distance[(pixels if model.feature_size == "image" else cells)[b]].mean().item()
        rows = []
        for k in record["hypothesis"].tolist():
            mask = masks[b, :, k].double() * cells[b].flatten()
            if mask.sum() > 0:
                pooled = (features[b].double().flatten(1) * mask).sum(1) / mask.sum()
                scores = student.inherited.query_features.double() @ F.normalize(pooled, dim=0)
                rows.append(-torch.log_softmax(scores / model.loss_tau, 0)[k].item())
        sums["text"] += sum(rows) / len(record["hypothesis"])
    return {name: value / len(inputs) for name, value in sums.items()}


@pytest.mark.parametrize("specs", [USUAL, PADDED], ids=["one size", "padding"])
@pytest.mark.parametrize("feature_size", ["image", "grid"])
@pytest.mark.parametrize(("teacher", "stride"), [("ReCLIP++", 8), ("ReCLIP", 8), ("MaskCLIP", 16)])
@torch.no_grad()
def test_losses_of_a_batch_against_loops(specs, feature_size, teacher, stride):
    teacher = TEACHERS[teacher]()
    model = make_distillation(
        teacher,
        student=make_student(teacher, stride=stride),
        mask_weight=2.0,
        feature_weight=0.3,
        text_weight=0.7,
        feature_size=feature_size,
    )
    inputs = batch(*specs)
    inputs[0]["image"] = inputs[0]["image"][..., : 40 - 8 * (stride == 16)]  # sides that both divide
    inputs[-1]["image"] = inputs[-1]["image"][..., :32] if stride == 16 else inputs[-1]["image"]
    inputs = inputs if stride == 8 else [inputs[0], inputs[-1]]
    expected = literal_losses(model, inputs, seed=3)
    torch.manual_seed(3)
    losses = {key: value.item() for key, value in model(inputs).items()}
    assert losses == pytest.approx(
        {
            "loss_mask": 2.0 * expected["mask"],
            "loss_feature": 0.3 * expected["feature"],
            "loss_text": 0.7 * expected["text"],
        },
        rel=1e-4,
    )


@pytest.mark.parametrize("kernels", [True, False])
def test_kernels_and_their_twins(kernels):
    teacher = make_rectified()
    torch.manual_seed(1)
    model = make_distillation(teacher, student=make_student(teacher, kernels=kernels))
    torch.manual_seed(2)
    losses = model(batch(*PADDED))
    expected = literal_losses(model.train(), batch(*PADDED), seed=2)
    assert losses["loss_text"].item() == pytest.approx(0.5 * expected["text"], rel=1e-4)


def test_a_loss_of_weight_zero_is_not_computed(monkeypatch):
    """MaskCLIP+ needs no hypothesis."""
    model = make_distillation(make_maskclip(), **ALONE["mask"])
    inputs = [{"image": random_image(0), "file_name": "0.jpg"}, {"image": random_image(1), "file_name": "1.jpg"}]
    assert set(model(inputs)) == {"loss_mask"}


@pytest.mark.parametrize(
    ("make", "head", "tau", "expected"),
    [
        (make_rectified, "query_bias_decoder", 0.0, "1/scale"),
        (make_rectified, "query_bias_decoder", 2.0, "2"),
        (make_rectified, "query", 2.0, "1"),  # 2 is meant for the decoder's logits, not for cosines
        (make_reclip, "query_bias_decoder", 0.0, "1"),  # on scale * cosines, as 1/scale on cosines
        (make_reclip, "query_bias", 0.02, "0.02 * scale"),
        (make_maskclip, "query", 0.0, "1"),
    ],
)
def test_temperature_of_the_students_masks(make, head, tau, expected):
    teacher = make()
    model = make_distillation(teacher, student=make_student(teacher, head=head), gumbel_tau=tau)
    scale = teacher.backbone.logit_scale
    assert model.gumbel_tau == pytest.approx(eval(expected, {"scale": scale}))
    assert model.loss_tau == pytest.approx(1 / scale)


@pytest.mark.parametrize("loss", ALONE)
def test_a_loss_that_is_not_finite_names_the_key(loss):
    model = make_distillation(**ALONE[loss])
    with torch.no_grad():
        model.student.feature_head.branches[0].bias.fill_(float("nan"))
    with pytest.raises(ReclipError, match=rf"loss_{loss} is not finite: the training has diverged") as caught:
        model(batch(*USUAL))
    assert "SOLVER.BASE_LR" in str(caught.value) and "\n" not in str(caught.value)


def test_mixed_precision_comes_close():
    model = make_distillation(feature_size="grid")
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    full = model(batch(*USUAL))
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = twin(batch(*USUAL))
    sum(mixed.values()).backward()
    for key, value in full.items():
        assert mixed[key].dtype == torch.float32
        assert mixed[key].item() == pytest.approx(value.item(), rel=0.2), key
    assert all(torch.isfinite(p.grad).all() for p in twin.student.parameters() if p.grad is not None)


def test_pictures_at_intervals():
    model = make_distillation(vis_period=2)
    with EventStorage() as storage:
        for iteration in range(3):
            storage.iter = iteration
            model(batch(*PADDED[1:], *PADDED[:1]))
        names = [name for name, *_ in storage._vis_data]
        shapes = [picture.shape for _, picture, _ in storage._vis_data]
    assert names == ["image | student | teacher"] * 2
    assert shapes == [(3, 17, 60)] * 2


# ---- its state is the student's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_state_and_identity_are_the_students(head):
    teacher = make_rectified()
    model = make_distillation(teacher, student=make_student(teacher, head=head))
    assert set(model.state_dict()) == set(model.student.state_dict())
    assert {key.split(".")[0] for key in model.state_dict()} == {"backbone", "feature_head", "inherited"}
    assert model.identity() == model.student.identity()
    other = make_student(teacher, head=head)
    assert not other.load_state_dict(model.state_dict()).missing_keys
    model.load_state_dict(other.state_dict())
    inputs = batch(((32, 40), []))
    expected = other.eval()(inputs)[0]["sem_seg"]
    assert torch.equal(model.eval()(inputs)[0]["sem_seg"], expected)


def test_inference_asks_the_student_alone(monkeypatch):
    model = make_distillation().eval()
    monkeypatch.setattr(model.teacher, "segment", None)
    assert model(batch(((20, 30), [])))[0]["sem_seg"].shape == (4, 20, 30)


def test_inheritance_leaves_the_teacher_as_it_was():
    for make in TEACHERS.values():
        teacher = make().eval()
        before = everything(teacher)
        inherit(teacher, "query_bias_decoder", (6, 3))
        assert changed(teacher, before) == set() and not teacher.training


# ---- several processes --------------------------------------------------------------------------------------------


CASES = (("query_bias_decoder", "all"), ("original", "mask"), ("query", "feature"))


def _distributed(rank: int, folder: Path) -> None:
    for head, loss in CASES:
        torch.manual_seed(0)
        teacher = make_rectified()
        student = make_student(teacher, head=head)
        model = make_distillation(teacher, student=student, **ALONE.get(loss, {}))
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
        inputs = batch(*USUAL)[rank : rank + 1]
        for _ in range(2):  # parameters that no loss reached would be found in the second iteration
            model.zero_grad()
            torch.manual_seed(rank)
            sum(parallel(inputs).values()).backward()
        grads = {name: p.grad for name, p in model.student.named_parameters() if p.requires_grad}
        torch.save({"grads": grads, "state": model.state_dict()}, folder / f"{head}-{rank}.pt")


def test_processes_average_their_gradients_and_no_parameter_is_left_over(tmp_path):
    run_processes(_distributed, tmp_path / "run")
    for head, _ in CASES:
        first, second = (torch.load(tmp_path / "run" / f"{head}-{rank}.pt", weights_only=True) for rank in range(2))
        for key, value in first["grads"].items():
            assert value is not None and torch.equal(value, second["grads"][key]), key
        assert {key.split(".")[0] for key in first["state"]} == {"backbone", "feature_head", "inherited"}
