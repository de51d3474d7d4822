"""The learnable Query (Table IV): where it starts, what it replaces, and its checkpoint.

Shape letters: C classes, D width of the joint embedding.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from reclip_d2.modeling.meta_arch.distillation import inherit
from reclip_d2.modeling.meta_arch.rectified_clip import RectifiedCLIP
from reclip_d2.modeling.query_head import LearnableQuery
from tests.helpers import CLASS_NAMES, EMBED_DIM, make_rectified, random_image, register_tiny_model, tiny_dense

NAMES = [names[0] for names in CLASS_NAMES]
KEY = "query_head.prompt.vectors"


def make_learnable(**arguments: object) -> RectifiedCLIP:
    return make_rectified(query_head=LearnableQuery(tiny_dense(), NAMES), **arguments)


def batch() -> list[dict]:
    return [
        {"image": random_image(i, 32, 40), "hypothesis": torch.tensor(h), "file_name": f"{i}.jpg"}
        for i, h in enumerate([[0, 2], [1], [0, 1, 3]])
    ]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def disturb(head: LearnableQuery, amount: float = 1.0) -> None:
    """Move the prompt's vectors (each number by itself: a layer norm would not feel a common shift)."""
    with torch.no_grad():
        head.prompt.vectors.add_(amount * torch.randn_like(head.prompt.vectors))


def loss_of(model: RectifiedCLIP, seed: int = 5) -> torch.Tensor:
    torch.manual_seed(seed)
    return sum(model(batch()).values())


# ---- the head alone -------------------------------------------------------------------------------------------


def test_starts_as_clips_own_features_of_a_photo():
    """As CLIP encodes the texts one by one, templates and packing left aside; of synonyms the first."""
    dense = tiny_dense()
    head = LearnableQuery(dense, NAMES)
    tokens = dense.text_encoder.tokenizer(
        [f"a photo of a {name}" for name in ("sky", "tall tree", "water", "brick wall")]
    )
    expected = dense.clip.encode_text(tokens)
    expected = expected / expected.square().sum(1, keepdim=True).sqrt()
    assert head.prompt.vectors.shape == (4, 32)  # a, photo, of, a
    torch.testing.assert_close(head(dense), expected, rtol=1e-4, atol=1e-5)


def test_rows_of_length_1_and_gradients_for_the_prompt_alone():
    dense = tiny_dense()
    head = LearnableQuery(dense, NAMES)
    disturb(head)
    features = head(dense)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    (features * torch.randn(4, EMBED_DIM)).sum().backward()
    assert (head.prompt.vectors.grad.abs().amax(1) > 0).all()
    assert all(p.grad is None for p in dense.parameters())


def test_a_name_that_fills_the_context_leaves_room_for_the_last_words():
    dense = tiny_dense()
    long_name = " ".join(["sky"] * 73)  # 77 tokens less start and end: room for "of a"
    head = LearnableQuery(dense, ["water", long_name])
    words = torch.tensor(dense.text_encoder.name_tokens("of a"))
    assert torch.equal(head.prompt.vectors, dense.text_encoder.token_embedding(words))


# ---- in the model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [True, False])
def test_takes_the_place_of_the_fixed_query_in_masks_and_loss(decoder):
    """The same losses as a model whose fixed W_q has the same values, also after a change of the prompt."""
    model, fixed = make_learnable(decoder=decoder), make_rectified(decoder=decoder)
    disturb(model.query_head, 0.1)
    trained = {key: value for key, value in model.state_dict().items() if key != KEY}
    fixed.load_state_dict(trained)
    assert loss_of(fixed).item() != pytest.approx(loss_of(model).item(), rel=1e-4)
    fixed.template_query_features = model.query_features.detach()
    assert loss_of(fixed).item() == pytest.approx(loss_of(model).item(), rel=1e-5)
    fixed.load_state_dict({key: value for key, value in model.state_dict().items() if key != KEY})
    record = {"image": random_image(3)}
    torch.testing.assert_close(model.eval()([record])[0]["sem_seg"], fixed.eval()([record])[0]["sem_seg"])


@pytest.mark.parametrize("decoder", [True, False])
def test_gradient_of_the_prompt_against_differences(decoder):
    """Through M_q and through Eq. (7): soft masks, whose gradient is exact, in float64."""
    model = make_learnable(decoder=decoder, gumbel_hard=False, gumbel_tau=0.5).double()
    vectors = model.query_head.prompt.vectors
    loss_of(model).backward()
    step = 1e-5
    for i, j in [(0, 0), (1, 7), (3, 31)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                vectors[i, j] += sign * step
                values.append(loss_of(model).item())
                vectors[i, j] -= sign * step
        assert vectors.grad[i, j].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-9)


def test_trains_with_bias_head_and_decoder():
    model = make_learnable()
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"bias_head", "mask_decoder", "query_head"}
    before = model.query_features.detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    assert not torch.allclose(model.query_features, before)
    assert torch.equal(model.template_query_features, make_rectified().template_query_features)


def test_is_encoded_once_a_batch_in_training_and_once_in_all_in_eval_mode(monkeypatch):
    model = make_learnable()
    calls = []
    forward = model.query_head.forward
    monkeypatch.setattr(model.query_head, "forward", lambda backbone: calls.append(1) or forward(backbone))
    model(batch())
    model(batch())
    assert len(calls) == 2
    model.eval()
    for size in [(32, 32), (32, 40), (32, 32)]:
        model([{"image": random_image(0, *size)}])
    assert len(calls) == 3


def test_features_of_other_weights_are_forgotten():
    model, other = make_learnable().eval(), make_learnable().eval()
    disturb(other.query_head)
    with torch.no_grad():
        before = model.query_features
        assert model.query_features is before
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert not torch.allclose(model.query_features, before, atol=1e-3)
    model.train()
    with torch.no_grad():
        model.query_head.prompt.vectors.copy_(make_learnable().query_head.prompt.vectors)
    assert model.query_features.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(model.eval().query_features, before, rtol=1e-4, atol=1e-5)


def test_a_student_inherits_what_the_prompt_has_become():
    model = make_learnable()
    disturb(model.query_head)
    state = inherit(model.eval(), "query_bias_decoder", (4, 5))
    expected = F.normalize(model.query_head.prompt(model.backbone), dim=1)
    torch.testing.assert_close(state["query_features"], expected)
    assert not state["query_features"].requires_grad


# ---- checkpoints and keys -------------------------------------------------------------------------------------


def test_checkpoint_round_trip(tmp_path):
    model, other = make_learnable(), make_learnable()
    disturb(model.query_head)
    assert set(model.state_dict()) == {KEY, *make_rectified().state_dict()}
    ReclipCheckpointer(model, str(tmp_path)).save("model")
    ReclipCheckpointer(other).load(str(tmp_path / "model.pth"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert torch.equal(model.eval().query_features, other.eval().query_features)


@pytest.mark.parametrize("saves, loads", [(make_learnable, make_rectified), (make_rectified, make_learnable)])
def test_checkpoint_of_the_other_kind_is_refused(tmp_path, saves, loads):
    ReclipCheckpointer(saves(), str(tmp_path)).save("model")
    with pytest.raises(ReclipError, match=r"of another MODEL\.CLIP\.LEARNABLE_QUERY: (True|False) instead of"):
        ReclipCheckpointer(loads()).load(str(tmp_path / "model.pth"))


def test_without_the_key_the_identity_does_not_speak_of_it():
    assert "MODEL.CLIP.LEARNABLE_QUERY" in make_learnable().identity()
    assert json.loads(json.dumps(make_rectified().identity())).keys() == {
        "clip", "fingerprint", "class_names", "templates",
    }  # fmt: skip


def test_from_the_config(tmp_path, datasets):
    datasets("reclip_test_query", [], ["sky", "water", "brick wall"])
    cfg = load_config("")
    cfg.merge_from_list(
        [
            "MODEL.META_ARCHITECTURE", "RectifiedCLIP", "MODEL.BACKBONE.NAME", "DenseCLIP", "MODEL.DEVICE", "cpu",
            "MODEL.CLIP.NAME", register_tiny_model(tmp_path), "MODEL.CLIP.PRETRAINED", "random",
            "MODEL.CLIP.TEMPLATES", "photo", "DATASETS.TRAIN", ("reclip_test_query",),
        ]
    )  # fmt: skip
    assert build_model(cfg).query_head is None
    cfg.MODEL.CLIP.LEARNABLE_QUERY = True
    model = build_model(cfg).eval()
    photos = model.backbone.text_features(["a photo of a sky", "a photo of a water", "a photo of a brick wall"])
    torch.testing.assert_close(model.query_features, photos, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["LEARNABLE_QUERY", "FINE_TUNE"])
@pytest.mark.parametrize(
    "architecture",
    [["MODEL.META_ARCHITECTURE", "MaskCLIP"],
     ["MODEL.META_ARCHITECTURE", "Distillation", "MODEL.TEACHER.META_ARCHITECTURE", "MaskCLIP"]],
)  # fmt: skip
def test_maskclip_has_nothing_to_train(key, architecture):
    load_config("", architecture)
    with pytest.raises(ReclipError, match=f"MODEL.CLIP.{key} is for RectifiedCLIP; MaskCLIP has nothing to train"):
        load_config("", [*architecture, f"MODEL.CLIP.{key}", "True"])
    load_config("", ["MODEL.META_ARCHITECTURE", "RectifiedCLIP", f"MODEL.CLIP.{key}", "True"])
