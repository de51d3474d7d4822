"""That a CUDA graph can hold the training step: it waits for no GPU and reads no pageable memory. Shown without a GPU.

The step runs on "meta" tensors, which have no values: reading one on the host raises. A dispatch mode sees every
operator of the forward pass, the backward pass and the optimizer, and finds copies from the host.
"""

import contextlib
import sys

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reclip_d2.backbones.dense_attention import DENSE_ATTENTION_REGISTRY, build_dense_attention
from reclip_d2.config import load_config
from reclip_d2.engine.solver import build_optimizer
from reclip_d2.engine.static_step import StaticStep
from reclip_d2.layers import NoiseCounter, draw_seed
from reclip_d2.modeling.training_step import StepInputs
from tests.helpers import EMBED_DIM, make_distillation, make_reclip, make_rectified, random_image

NO_HINT = {"coverage": 0.5, "outside": 0.5, "anchor": 0.5}
MODELS = {
    "rectified": make_rectified,
    "without decoder": lambda: make_rectified(decoder=False),
    "zeros": lambda: make_rectified(decoder={"padding_mode": "zeros", "norm": ""}),
    "soft masks, all losses": lambda: make_rectified(gumbel_hard=False, loss_weights=NO_HINT),
    "without decoder, all losses": lambda: make_rectified(decoder=False, loss_weights=NO_HINT),
    "added": lambda: make_rectified(rectification="add"),
    "not rectified": lambda: make_rectified(rectification="none"),
    "ReCLIP": make_reclip,
    "distillation": make_distillation,
    "distillation on the grid": lambda: make_distillation(feature_size="grid", gumbel_hard=False),
}
READS_VALUES = {
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2", "_unique",
    "unique_consecutive", "unique_dim_consecutive", "bincount", "allclose", "lift_fresh", "pin_memory",
}  # fmt: skip


class NoConstants(TorchFunctionMode):
    """Raises for a tensor made from Python numbers, which is copied from pageable memory."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            raise AssertionError(f"{function.__name__}() copies a constant from the host")
        return function(*args, **(kwargs or {}))


class AsInACapture(TorchDispatchMode):
    """Raises for operators that a capture on a GPU forbids; "meta" takes the place of the GPU."""

    def __enter__(self):
        self.constants = NoConstants()
        self.constants.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.constants.__exit__(*error)

    def __init__(self) -> None:
        super().__init__()
        self.warm_up = False  # what is made once may come from the host
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name.startswith("_fused_"):  # the optimizers, in place; not registered for "meta"
            self.names.append(name)
            return None
        if self.warm_up:
            return function(*args, **(kwargs or {}))
        self.names.append(name)
        if name in READS_VALUES or str(function) == "aten.repeat_interleave.Tensor":
            raise AssertionError(f"{function} waits for the GPU, or copies a constant from the host")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                raise AssertionError(f"{function} by a mask waits for the GPU")
        if any(x.device.type != "meta" for x in tensors):
            raise AssertionError(f"{function} uses a tensor of the host: {[tuple(x.shape) for x in tensors]}")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def on_meta(monkeypatch):
    """Lets the operators, their checks and autocast take "meta" for a GPU."""
    monkeypatch.setattr("reclip_d2.layers._extension._served", frozenset({"cpu", "meta"}))
    for optimizer in (SGD, Adam):
        module = sys.modules[optimizer.__module__]
        monkeypatch.setattr(module, "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())


def captured(model, batch, optimizer="SGD") -> list[str]:
    """Names of the operators of a step on "meta" tensors."""
    model = model.train()
    inputs = model.step_inputs(batch, rows=16)
    model = model.to("meta")
    tensors = {name: x.to("meta") for name, x in inputs.tensors.items()}
    inputs = StepInputs(tensors, inputs.layout, NoiseCounter(draw_seed(), "meta"))
    keys = ["SOLVER.OPTIMIZER", optimizer, "SOLVER.CLIP_GRADIENTS.ENABLED", "True"]
    step = StaticStep(model, build_optimizer(load_config("", keys), model))
    step._make_capturable()
    for group in step.optimizer.param_groups:
        group["lr"] = torch.zeros((), device="meta")
    with AsInACapture() as watch:
        watch.warm_up = True
        step._step(inputs)  # creates gradients and momenta
        watch.warm_up = False
        watch.names.clear()
        step._step(inputs)
    return watch.names


def batch_of(*sizes):
    return [{"image": random_image(k, *size), "hypothesis": torch.arange(k + 1)} for k, size in enumerate(sizes)]


def views_of(*grids):
    """Stored features of views on these grids."""
    views = [torch.nn.functional.normalize(torch.randn(*grid, EMBED_DIM), dim=-1).half() for grid in grids]
    return [
        {"features": view, "view_size": (8 * view.shape[0], 8 * view.shape[1]), "hypothesis": torch.arange(k + 1)}
        for k, view in enumerate(views)
    ]


BATCHES = {
    "same": batch_of((32, 40), (32, 40)),
    "padded": batch_of((32, 40), (24, 32)),
    "views": views_of((4, 5), (4, 5)),
    "padded views": views_of((4, 5), (5, 3)),
}


NEEDS_A_FILE = {"proxy"}  # another tower
# Without views for distillation, whose student reads images.
CASES = [(name, batch) for name in MODELS for batch in BATCHES if not ("distillation" in name and "views" in batch)]


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_a_graph_can_hold_the_step(name, batch, on_meta):
    names = captured(MODELS[name](), BATCHES[batch])
    assert "rectify_and_pool_backward" in names and "_fused_sgd_" in names


@pytest.mark.parametrize("name", sorted({name for name, _ in DENSE_ATTENTION_REGISTRY} - NEEDS_A_FILE))
def test_a_graph_can_hold_every_dense_attention(name, on_meta):
    model = make_rectified()
    cfg = load_config("", ["MODEL.CLIP.DENSE_ATTENTION", name])
    model.backbone.attention = build_dense_attention(cfg).requires_grad_(False).eval()
    model.backbone.attention.patch_size = 8  # the tiny CLIP's, where the attention has one
    names = captured(model, batch_of((32, 40), (32, 40)))
    assert "native_layer_norm" in names


def test_adamw(on_meta):
    assert "_fused_adamw_" in captured(make_rectified(), BATCHES["same"], "AdamW")


def test_a_long_sequence_of_names(on_meta, monkeypatch):
    """Texts that are encoded group by group."""
    monkeypatch.setattr("reclip_d2.backbones.packed_texts.LONGEST_MASKED", 3)
    captured(make_rectified(), BATCHES["same"])


HOST = torch.tensor([1, 2])
FORBIDDEN = {
    "value": lambda x: x[0].item(),
    "branch": lambda x: bool(x[0] > 0),
    "repeat": lambda x: x.repeat_interleave(x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "selection": lambda x: x.masked_select(x > 0),
    "assignment": lambda x: x.index_put_((x > 0,), x[0]),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "constant": lambda x: torch.tensor([1, 2], device=x.device),
    "copy": lambda x: x.copy_(HOST),
    "move": lambda x: HOST.to(x.device),
    "sum with the host": lambda x: x + HOST,
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_is_found(name):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), AsInACapture():
        FORBIDDEN[name](torch.empty(2, dtype=torch.int64, device="meta"))
