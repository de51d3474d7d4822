"""What stays in float32 under autocast: logits, losses, norm, noise; and the key that a loss which is not finite names.

Shape letters: B images, n = h*w patches, C classes, D width of the joint embedding.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reclip_d2.errors import ReclipError
from reclip_d2.layers import draw_seed, rectify_and_pool, use_kernels
from reclip_d2.modeling.bias_head import bias_logits, query_logits
from reclip_d2.modeling.losses import anchor_loss, contrastive_loss, coverage_loss, outside_hypothesis_penalty
from reclip_d2.modeling.mask_decoder import MaskDecoder
from reclip_d2.modeling.numerics import check_finite, full_precision
from reclip_d2.modeling.pooling import PooledHypotheses
from tests.helpers import make_rectified, random_image
from tests.modeling.test_rectified_clip_training import USUAL, batch


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_decorator():
    @full_precision
    def product(a, b, *, scale):
        """Its text."""
        return a @ b * scale

    a, b = torch.randn(3, 4).bfloat16(), torch.randn(4, 5)
    with autocast():
        assert (a @ b).dtype == torch.bfloat16
        found = product(a, b, scale=torch.tensor(2.0).half())
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found, a.float() @ b * 2)
    assert product(a.double(), b.double(), scale=1).dtype == torch.float64
    assert product.__doc__ == "Its text." and product.__name__ == "product"


def test_logits_and_losses_are_those_of_float32():
    """Inputs in bfloat16, as the networks give them under autocast; the arithmetic on them is float32's."""
    features = F.normalize(torch.randn(2, 6, 3, 4), dim=1)
    queries = F.normalize(torch.randn(5, 6), dim=1)
    ids, offsets = torch.tensor([0, 3, 1]), torch.tensor([0, 2, 3])
    logits = torch.randn(2, 12, 5).bfloat16()
    inside, valid = torch.rand(2, 5) > 0.5, torch.rand(2, 12) > 0.2
    pooled = PooledHypotheses(torch.randn(3, 6).bfloat16(), torch.ones(3), ids, offsets)
    calls = (
        (query_logits, (features.bfloat16(), queries)),
        (bias_logits, (torch.randn(12, 6).bfloat16(), queries)),
        (contrastive_loss, (pooled, queries, 0.01)),
        (coverage_loss, (logits, inside, valid, 0.5)),
        (outside_hypothesis_penalty, (logits, inside, valid, 0.5)),
        (anchor_loss, (logits, torch.randn(2, 12, 5).bfloat16(), valid, 0.5, 20.0)),
    )
    for function, arguments in calls:
        wide = [a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in arguments]
        if function is contrastive_loss:
            wide[0] = pooled._replace(features=pooled.features.float())
        expected = function(*wide)
        with autocast():
            found = function(*arguments)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected), function.__name__


def test_the_decoders_norm():
    decoder = MaskDecoder(6, 5)
    logits, features = torch.randn(2, 5, 4, 4), torch.randn(2, 6, 4, 4)
    with autocast():
        out = decoder(logits, features)
    assert out.dtype == torch.float32
    # Statistics of a bfloat16 mean would be off by thousandths.
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(5), atol=1e-6, rtol=0)
    assert decoder.double()(logits.double(), features.double()).dtype == torch.float64


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("hard", [True, False])
def test_the_operator_takes_low_precision_logits_beside_float32_features(kernels, hard):
    logits, bias = torch.randn(2, 12, 5).bfloat16(), torch.randn(12, 5).bfloat16()
    features = torch.randn(2, 12, 6)
    ids, offsets, seed = torch.tensor([0, 3, 1]), torch.tensor([0, 2, 3]), draw_seed()
    results = []
    for cast in (False, True):
        inputs = [(x.float() if cast else x.clone()).requires_grad_() for x in (logits, bias)]
        with use_kernels(kernels), autocast():
            pooled, area = rectify_and_pool(*inputs, features, ids, offsets, 0.7, hard, seed)
            assert pooled.dtype == area.dtype == torch.float32
            (pooled.square().sum() + area.sum()).backward()
        results.append((pooled.detach(), area.detach(), *(x.grad for x in inputs)))
    for low, full in zip(*results, strict=True):
        torch.testing.assert_close(low.float(), full, rtol=2**-8, atol=1e-5)
    assert results[0][2].dtype == torch.bfloat16


@pytest.mark.parametrize("decoder", [True, False])
def test_losses_of_a_model(decoder):
    model = make_rectified(decoder=decoder, gumbel_hard=False, loss_weights={"coverage": 1.0, "outside": 1.0})
    inputs = [{"image": random_image(i), "hypothesis": torch.tensor([i, 3])} for i in range(3)]
    results = []
    for enabled in (False, True):
        model.zero_grad()
        torch.manual_seed(4)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = model(inputs)
        assert all(value.dtype == torch.float32 for value in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        results.append({name: value.item() for name, value in losses.items()})
    for name, value in results[0].items():
        assert results[1][name] == pytest.approx(value, rel=0.05), name
        assert results[1][name] != value  # bfloat16 was at work


# ---- losses that are not finite -------------------------------------------------------------------------------------


TAUS = {"MODEL.GUMBEL.TAU": 0.5, "MODEL.LOSS.TAU": 1e-30}


def message_of(loss: float, **parts) -> str:
    arguments = {
        "trained": nn.Linear(2, 2),
        "frozen_features": torch.ones(1, 2),
        "temperatures": TAUS,
        **parts,
    }
    arguments["logits"] = lambda: parts.get("logits", torch.tensor([[3.0, -1200.0]]))
    with pytest.raises(ReclipError) as caught:
        check_finite({"loss_a": torch.tensor(1.0), "loss_b": torch.tensor(loss)}, **arguments)
    message = str(caught.value)
    assert message.startswith("loss_b is not finite: ") and "\n" not in message
    return message


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_causes(loss):
    bad, diverged = torch.tensor([[loss]]), nn.Linear(2, 2)
    nn.init.constant_(diverged.weight, loss)
    assert "MODEL.CLIP.AUTOCAST float32" in message_of(loss, frozen_features=bad, trained=diverged, logits=bad)
    assert "diverged" in (message := message_of(loss, trained=diverged, logits=bad)) and "SOLVER.BASE_LR" in message
    assert "mask logits overflow" in (message := message_of(loss, logits=bad)) and message.endswith("SOLVER.BASE_LR")
    assert "up to 1.2e+03" in (message := message_of(loss)) and "MODEL.LOSS.TAU 1e-30: raise it" in message


def test_half_precision_is_named():
    with torch.autocast("cpu", torch.float16):
        assert "SOLVER.AMP.DTYPE bfloat16" in message_of(float("nan"), logits=torch.tensor([[float("inf")]]))


def test_frozen_weights_are_not_blamed():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    nn.init.constant_(frozen.weight, float("nan"))
    assert "raise it" in message_of(float("nan"), trained=frozen)


def test_finite_losses_pass():
    check_finite(
        {"loss": torch.tensor(0.0)},
        trained=nn.Linear(1, 1),
        frozen_features=torch.ones(1),
        logits=lambda: pytest.fail("the mask logits are for the message alone"),
        temperatures=TAUS,
    )


@pytest.mark.parametrize("decoder", [True, False])
def test_a_temperature_that_is_too_low(decoder):
    model = make_rectified(decoder=decoder, gumbel_tau=1e-42, gumbel_hard=False)
    with pytest.raises(ReclipError, match="MODEL.GUMBEL.TAU 1e-42: raise it"):
        model(batch(*USUAL))
