"""``reclip_d2.layers.frozen_linear``: the value and gradient of a linear layer, by oneDNN or not."""

import pytest
import torch
import torch.nn.functional as F

from reclip_d2.layers import frozen_linear
from reclip_d2.layers.frozen_linear import FEWEST_OPERATIONS, _onednn_works, uses_onednn


def arguments(rows=(2, 64), inputs=64, outputs=96, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (*rows, inputs), (outputs, inputs), (outputs,), (*rows, outputs)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_value_and_gradient(biased, transposed):
    x, weight, bias, grad = arguments()
    if transposed:
        weight = weight.t().contiguous().t()
    bias = bias if biased else None
    assert uses_onednn(x, weight, bias) == _onednn_works()
    x.requires_grad_(True)
    frozen_linear(x, weight, bias).backward(grad)
    expected = F.linear(x.detach().double(), weight.double(), None if bias is None else bias.double())
    scale = expected.abs().max()
    assert (frozen_linear(x, weight, bias) - expected).abs().max() <= 1e-6 * scale
    expected = grad.double() @ weight.double()
    assert (x.grad - expected).abs().max() <= 1e-6 * expected.abs().max()
    with torch.no_grad():
        assert not frozen_linear(x, weight, bias).requires_grad


def test_where_onednn_is_not_used_it_is_torchs():
    x, weight, bias, _ = arguments()
    trained = torch.nn.Parameter(weight)
    assert not uses_onednn(x, trained, bias) and not uses_onednn(x, weight, torch.nn.Parameter(bias))
    frozen_linear(x, trained, bias).sum().backward()
    torch.testing.assert_close(trained.grad, x.sum((0, 1)).expand(96, 64))
    assert not uses_onednn(x.double(), weight.double()) and not uses_onednn(x.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen_linear(x, weight, bias).dtype == torch.bfloat16
    few = x[0, : FEWEST_OPERATIONS // (64 * 96) - 1]
    assert not uses_onednn(few, weight) and torch.equal(frozen_linear(few, weight), F.linear(few, weight))
    torch.testing.assert_close(frozen_linear(x[:0], weight, bias), torch.zeros(0, 64, 96))


def test_traced_and_compiled_graphs_have_a_linear_layer():
    x, weight, bias, _ = arguments()

    class Layer(torch.nn.Module):
        def forward(self, x):
            return frozen_linear(x, weight, bias)

    assert "mkldnn" not in str(torch.jit.trace(Layer(), x, check_trace=False).graph)
    assert "linear" in str(torch.export.export(Layer(), (x,)).graph)
