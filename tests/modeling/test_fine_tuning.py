"""Fine-tuning CLIP's image tower (Table VI): gradients, checkpoints, hypotheses, and a fine-tuned teacher.

Shape letters: C classes, D width of the joint embedding.
"""

import copy

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from reclip_d2.backbones.dense_attention import ValueAttention
from reclip_d2.config import load_config
from reclip_d2.engine.solver import build_optimizer
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.training_records import build_training_records
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from reclip_d2.modeling.meta_arch.distillation import build_teacher
from reclip_d2.modeling.meta_arch.rectified_clip import RectifiedCLIP
from tests.helpers import (
    make_distillation,
    make_reclip,
    make_rectified,
    random_image,
    register_tiny_model,
    tiny_dense,
    write_scenes,
)

TOWER = "backbone.clip.visual."


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_tuned(make=make_rectified, *, residual: bool = True, **arguments: object) -> RectifiedCLIP:
    """A model as ``make`` gives it, whose image tower trains too."""
    model = make(**arguments)
    model.backbone = tiny_dense(fine_tune=True, attention=ValueAttention(residual))
    return model.train()


def batch() -> list[dict]:
    """One image is smaller than the others: the batch is padded."""
    return [
        {"image": random_image(i, *size), "hypothesis": torch.tensor(h), "file_name": f"{i}.jpg"}
        for i, (size, h) in enumerate([((32, 40), [0, 2]), ((24, 33), [1]), ((32, 40), [0, 1, 3])])
    ]


def loss_of(model: RectifiedCLIP, seed: int = 5) -> torch.Tensor:
    torch.manual_seed(seed)
    return sum(model(batch()).values())


def disturb(model: RectifiedCLIP) -> None:
    """Move all that trains."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


# ---- gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("make", [make_rectified, make_reclip])
def test_gradients_reach_the_image_tower_only_with_the_key_on(decoder, make):
    options = {"decoder": decoder, "gumbel_hard": False}  # hard masks might jump at the last digit
    frozen, tuned = make(**options), make_tuned(make, **options)
    tuned.load_state_dict(frozen.state_dict(), strict=False)
    losses = [loss_of(frozen), loss_of(tuned)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)  # before a step the models are one
    for loss in losses:
        loss.backward()
    assert all(p.grad is None for p in frozen.backbone.parameters())
    for name, parameter in tuned.named_parameters():
        assert parameter.requires_grad == name.startswith((TOWER, "bias_head.", "mask_decoder.")), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None and name.startswith(TOWER):
            assert parameter.grad.abs().max() > 0, name


def test_without_the_residual_the_last_mlp_asks_for_no_gradient():
    model = make_tuned(residual=False)
    loss_of(model).backward()
    without = {name for name, p in model.backbone.clip.visual.named_parameters() if not p.requires_grad}
    assert without == {
        f"transformer.resblocks.2.{name}.{kind}"
        for name in ("ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    }
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("make", [make_rectified, make_reclip])
def test_gradient_of_the_tower_against_differences(decoder, make):
    """Through the masks and through the pooled features: soft masks, whose gradient is exact, in float64."""
    model = make_tuned(make, decoder=decoder, gumbel_hard=False, gumbel_tau=0.5).double()
    visual = model.backbone.clip.visual
    loss_of(model).backward()
    step = 1e-5
    for parameter in (visual.conv1.weight, visual.proj, visual.transformer.resblocks[1].mlp.c_fc.weight):
        values, flat = [], parameter.data.view(-1)
        for sign in (1, -1):
            flat[7] += sign * step
            with torch.no_grad():
                values.append(loss_of(model).item())
            flat[7] -= sign * step
        expected = (values[0] - values[1]) / (2 * step)
        assert parameter.grad.view(-1)[7].item() == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_the_bias_head_reads_the_positional_embedding_and_does_not_bend_it():
    """The bias alone gives PE no gradient; M_b follows a change of PE."""
    model = make_tuned(decoder=False)
    bias = model.bias_logits((4, 4))
    bias.sum().backward()
    assert model.backbone.clip.visual.positional_embedding.grad is None
    assert model.bias_head.positional_projection.conv.weight.grad.abs().max() > 0
    with torch.no_grad():
        model.backbone.clip.visual.positional_embedding.add_(1.0)
    assert not torch.allclose(model.bias_logits((4, 4)), bias, atol=1e-3)


def test_training_moves_the_image_tower_and_no_text():
    model = make_tuned()
    before = {name: value.clone() for name, value in model.backbone.clip.named_parameters()}
    queries, fingerprint = model.query_features.clone(), model.identity()["fingerprint"]
    optimizer = build_optimizer(load_config("", ["SOLVER.BASE_LR", "0.1"]), model)
    at_first = sum(loss_of(model, seed).item() for seed in range(5))
    for seed in range(15):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
    assert sum(loss_of(model, seed).item() for seed in range(5)) < at_first
    for name, value in model.backbone.clip.named_parameters():
        assert torch.equal(value, before[name]) != name.startswith("visual."), name
    assert torch.equal(model.query_features, queries) and model.identity()["fingerprint"] == fingerprint
    assert not any(module.training for module in model.backbone.modules())


# ---- checkpoints ----------------------------------------------------------------------------------------------


def test_checkpoint_round_trip(tmp_path):
    model, other = make_tuned(), make_tuned()
    disturb(model)
    state = model.state_dict()
    visual = {TOWER + name for name in model.backbone.clip.visual.state_dict()}
    assert set(state) == visual | set(make_rectified().state_dict())
    ReclipCheckpointer(model, str(tmp_path)).save("model")
    ReclipCheckpointer(other).load(str(tmp_path / "model.pth"))
    for key, value in state.items():
        assert torch.equal(value, other.state_dict()[key]), key
    record = {"image": random_image(3)}
    assert torch.equal(model.eval()([record])[0]["sem_seg"], other.eval()([record])[0]["sem_seg"])
    assert model.identity() == other.identity()


def test_a_frozen_model_has_the_state_that_it_always_had():
    model = make_rectified()
    assert not any(key.startswith("backbone.") for key in model.state_dict())
    assert set(model.identity()) == {"clip", "fingerprint", "class_names", "templates"}


@pytest.mark.parametrize("saves, loads", [(make_tuned, make_rectified), (make_rectified, make_tuned)])
def test_checkpoint_of_the_other_kind_is_refused(tmp_path, saves, loads):
    ReclipCheckpointer(saves(), str(tmp_path)).save("model")
    with pytest.raises(ReclipError, match=r"of another MODEL\.CLIP\.FINE_TUNE: (True|False) instead of"):
        ReclipCheckpointer(loads()).load(str(tmp_path / "model.pth"))


def test_a_checkpoint_without_a_weight_of_the_tower_is_refused(tmp_path):
    model = make_tuned()
    ReclipCheckpointer(model, str(tmp_path)).save("model")
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    del content["model"][TOWER + "proj"]
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ReclipError, match=r"backbone\.clip\.visual\.proj is missing"):
        ReclipCheckpointer(model).load(str(tmp_path / "model.pth"))


def test_resumed_training_ends_as_an_unbroken_one(tmp_path):
    cfg = load_config("", ["SOLVER.BASE_LR", "0.1"])

    def train(model: RectifiedCLIP, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()

    unbroken = make_tuned()
    stopped, resumed = copy.deepcopy(unbroken), make_tuned()
    train(unbroken, build_optimizer(cfg, unbroken), range(4))
    optimizer = build_optimizer(cfg, stopped)
    train(stopped, optimizer, range(2))
    ReclipCheckpointer(stopped, str(tmp_path), optimizer=optimizer).save("model_1", iteration=1)
    optimizer = build_optimizer(cfg, resumed)
    ReclipCheckpointer(resumed, str(tmp_path), optimizer=optimizer).resume_or_load("", resume=True)
    train(resumed, optimizer, range(2, 4))
    for key, value in unbroken.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=1e-5, atol=1e-7, msg=key)


# ---- from the config ------------------------------------------------------------------------------------------


@pytest.fixture
def cfg(tmp_path, datasets) -> CfgNode:
    names = ["sky", "tall tree", "water", "brick wall"]
    datasets("reclip_test_train", write_scenes(tmp_path / "scenes", 3), names)
    return load_config(
        "",
        [
            "MODEL.META_ARCHITECTURE", "RectifiedCLIP", "MODEL.BACKBONE.NAME", "DenseCLIP", "MODEL.DEVICE", "cpu",
            "MODEL.CLIP.NAME", register_tiny_model(tmp_path), "MODEL.CLIP.PRETRAINED", "random",
            "MODEL.CLIP.TEMPLATES", "photo", "MODEL.BIAS_HEAD.PROMPT_LENGTH", "4", "HYPOTHESIS.WINDOW_RATIO", "0.5",
            "DATASETS.TRAIN", "('reclip_test_train',)", "MODEL.CLIP.FINE_TUNE", "True",
        ],
    )  # fmt: skip


def test_hypotheses_are_those_of_the_pretrained_clip(cfg, monkeypatch, tmp_path):
    """Also when they are made while a model of the process has been trained."""
    model = build_model(cfg)
    assert model.backbone.fine_tune
    disturb(model)
    tuned = build_training_records(cfg)
    monkeypatch.setenv("RECLIP_CACHE", str(tmp_path / "another"))
    cfg.MODEL.CLIP.FINE_TUNE = False
    plain = build_training_records(cfg)
    assert [r["hypothesis"] for r in tuned] == [r["hypothesis"] for r in plain]
    assert all(len(r["hypothesis"]) for r in plain)


def test_a_fine_tuned_teacher_teaches_frozen(cfg, tmp_path):
    model = build_model(cfg)
    disturb(model)
    ReclipCheckpointer(model, str(tmp_path / "run")).save("model")
    cfg.MODEL.TEACHER.WEIGHTS = str(tmp_path / "run" / "model.pth")
    teacher = build_teacher(cfg)
    for key, value in model.backbone.clip.state_dict().items():
        assert torch.equal(teacher.backbone.clip.state_dict()[key], value), key
    distillation = make_distillation(teacher)
    trained = {name.split(".")[0] for name, p in distillation.named_parameters() if p.requires_grad}
    assert trained == {"student"} and not any(p.requires_grad for p in teacher.parameters())
    assert not any("clip" in key for key in distillation.state_dict())
    features, labels = distillation.teach(batch())
    expected, logits = model.eval().segment(distillation.teacher.preprocess_image(batch()).tensor)
    torch.testing.assert_close(features, expected)
    assert not features.requires_grad and labels.shape[1:] == (32, 40)
    torch.manual_seed(0)
    losses = distillation(batch())
    sum(losses.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_float16_would_lose_the_gradients():
    options = ["MODEL.META_ARCHITECTURE", "RectifiedCLIP", "MODEL.CLIP.FINE_TUNE", "True", "MODEL.CLIP.AUTOCAST"]
    load_config("", [*options, "bfloat16"])
    with pytest.raises(
        ReclipError, match=r"MODEL\.CLIP\.FINE_TUNE does not work with MODEL\.CLIP\.AUTOCAST float16: set float32"
    ):
        load_config("", [*options, "float16"])


def test_trains_under_autocast():
    full, low = make_tuned(), make_tuned()
    low.load_state_dict(full.state_dict())
    low.backbone.autocast_dtype = torch.bfloat16
    for model in (full, low):
        loss_of(model).backward()
    grads = [model.backbone.clip.visual.proj.grad.flatten() for model in (full, low)]
    assert grads[1].dtype == torch.float32 and torch.isfinite(grads[1]).all()
    assert grads[1].abs().max() > 0 and not torch.equal(*grads)
