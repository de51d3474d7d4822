"""A loss that is not finite names the key that is likely to be wrong."""

import pytest
import torch
from torch import nn

from reclip_d2.errors import ReclipError
from reclip_d2.modeling.nonfinite import check_finite
from tests.helpers import make_rectified
from tests.modeling.test_rectified_clip_training import USUAL, batch

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
