"""The step as a function of tensors: padded rows, and torch.compile without graph breaks."""

import pytest
import torch

from reclip_d2.errors import ReclipError
from reclip_d2.layers import NoiseCounter, kernels_available, use_kernels
from reclip_d2.modeling.pooling import pack_hypotheses
from reclip_d2.modeling.training_step import StepInputs
from tests.helpers import make_distillation, make_reclip, make_rectified, random_image

WEIGHTS = {"contrastive": 1.0, "coverage": 0.5, "outside": 0.5, "anchor": 0.5}


def batch(*specs: tuple[tuple[int, int], list[int]]) -> list[dict]:
    return [
        {"image": random_image(i, *size), "hypothesis": torch.tensor(h, dtype=torch.int64), "file_name": f"{i}.jpg"}
        for i, (size, h) in enumerate(specs)
    ]


USUAL = [((32, 40), [0, 2]), ((32, 40), [1]), ((32, 40), [])]
PADDED = [((32, 40), [0, 2]), ((17, 20), [1, 3])]
MODELS = {
    "rectified": lambda: make_rectified(loss_weights=WEIGHTS),
    "no decoder": lambda: make_rectified(decoder=False, gumbel_hard=False),
    "ReCLIP": make_reclip,
    "distillation": make_distillation,
}


def results(model, step, inputs: StepInputs) -> list[torch.Tensor]:
    """Losses and gradients."""
    model.zero_grad()
    losses = step(inputs).losses
    sum(losses.values()).backward()
    return [*losses.values(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("specs", [USUAL, PADDED], ids=["one size", "padding"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_padding_change_nothing(name, specs):
    model = MODELS[name]().train()
    found = []
    for rows in (0, 16):
        inputs = model.encode(model.step_inputs(batch(*specs), rows))._replace(noise=torch.tensor([5, 6]))
        assert len(inputs.tensors["class_ids"]) == (rows or sum(len(h) for _, h in specs))
        assert ("valid" in inputs.tensors) == (specs is PADDED)
        found.append(results(model, model.step, inputs))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_too_few_rows():
    assert pack_hypotheses([torch.tensor([3])], 2).class_ids.tolist() == [3, 0]
    with pytest.raises(ReclipError, match="have 3 classes, more than the 2 rows"):
        pack_hypotheses([torch.tensor([0, 1, 2])], 2)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "specs"), [*((name, USUAL) for name in MODELS), ("rectified", PADDED)])
def test_compiles_without_graph_breaks(name, backend, specs):
    if not kernels_available("cpu"):
        pytest.skip("the twins read the rows on the host")
    model = MODELS[name]().train()
    torch._dynamo.reset()
    inputs = model.encode(model.step_inputs(batch(*specs), 16))
    found = []
    with use_kernels(True):
        for step in (model.step, torch.compile(model.step, fullgraph=True, backend=backend)):
            # The counter is advanced inside the compiled step.
            counter = NoiseCounter(torch.tensor([5, 6]))
            found.append(results(model, step, inputs._replace(noise=counter)))
            assert counter.state.tolist() == [5, 7]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-5)
