"""The training step with fixed buffers: on a GPU a CUDA graph (``SOLVER.CUDA_GRAPH``).

A step of the rectification launches some hundred small kernels; with stored features, launching them takes longer than
running them. A graph launches all at once: image tower, losses, backward pass, gradient clipping and optimizer.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

from reclip_d2.layers import NoiseCounter, draw_seed, kernels_enabled, use_kernels
from reclip_d2.modeling.training_step import StepInputs, StepOutputs

logger = logging.getLogger(__name__)

WARM_UP = 3  # steps of a layout before its capture: they create gradients, momenta and the libraries' workspaces
MOST_GRAPHS = 8  # layouts of batches with a graph; each keeps its activations
ROWS_STEP = 16  # hypothesis rows are padded to a multiple
LOG_PERIOD = 20  # iterations between checks of the losses: Detectron2 logs as often


@dataclasses.dataclass
class _Graph:
    """One layout of batches."""

    steps: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    inputs: StepInputs | None = None
    encoded: StepInputs | None = None
    outputs: StepOutputs | None = None


class StaticStep:
    """Runs training steps from fixed buffers, one set for each layout of batches (shapes, grids of views).

    Hypothesis rows are padded to a fixed number, and the seed of the noise, the rows and the learning rates are in
    device memory: nothing that differs between steps is read by the host. The first steps of a layout run without a
    graph, as do all of a layout beyond the eighth. Losses are checked later, by :meth:`check`.

    On a CPU the same steps run from the same buffers, without a graph.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, amp_dtype: torch.dtype | None = None
    ) -> None:
        """
        Args:
            model: with ``step_inputs``, ``encode``, ``step`` and ``check_step``, see
                :mod:`~reclip_d2.modeling.training_step`.
            optimizer: SGD or AdamW, of the model's parameters; on a GPU its fused implementation is used.
            amp_dtype: autocast dtype of the forward pass.
        """
        self.model = model
        self.optimizer = optimizer
        self.amp_dtype = amp_dtype
        self.device = next(model.parameters()).device
        self.on_gpu = self.device.type == "cuda"
        self.rows = ROWS_STEP
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.latest: tuple[StepInputs, StepOutputs] | None = None
        self._graphs: dict[Any, _Graph] = {}
        self._rates = [torch.zeros((), device=self.device) for _ in optimizer.param_groups]
        self._warned = False
        self._stream = torch.cuda.Stream() if self.on_gpu else None
        self._pool = torch.cuda.graph_pool_handle() if self.on_gpu else None

    def run(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One step. The losses are valid until the next."""
        rows = sum(len(record.get("hypothesis", ())) for record in batch)
        self.rows = max(self.rows, -(-rows // ROWS_STEP) * ROWS_STEP)
        with use_kernels(self._kernels), torch.no_grad(), self._autocast():
            inputs = self.model.step_inputs(batch, self.rows)
        layout = (inputs.layout, *((k, tuple(x.shape), x.dtype, x.stride()) for k, x in sorted(inputs.tensors.items())))
        if layout not in self._graphs and len(self._graphs) >= MOST_GRAPHS:
            if not self._warned:
                logger.warning(
                    "SOLVER.CUDA_GRAPH: batches have more than %d combinations of sizes: the others run without a"
                    " graph; use INPUT.CROP.SIZE or FEATURE_STORE.KIND crops for fewer",
                    MOST_GRAPHS,
                )
                self._warned = True
            found = _Graph()
        else:
            found = self._graphs.setdefault(layout, _Graph())
        self._fill(found, inputs)
        found.steps += 1
        if not self.on_gpu:
            found.encoded, found.outputs = self._step(found.inputs)
        elif found.graph is not None:
            found.graph.replay()
        elif found.steps <= WARM_UP:
            found.encoded, found.outputs = self._warm_up(found.inputs)
        else:
            self._capture(found)
            found.graph.replay()
        self.latest = found.encoded, found.outputs
        return dict(found.outputs.losses)

    def check(self) -> None:
        """Raise :class:`ReclipError` if a loss was not finite since the start. Waits for the GPU."""
        if self.latest is None or bool(self.finite):
            return
        self.model.check_step(*self.latest)  # names the cause, if it persists
        inputs, outputs = self.latest
        losses = {name: torch.full_like(value, float("nan")) for name, value in outputs.losses.items()}
        self.model.check_step(inputs, outputs._replace(losses=losses))

    @property
    def _kernels(self) -> bool:
        return getattr(self.model, "kernels", True)

    def _autocast(self) -> torch.autocast:
        # Without autocast's cache of weights, whose copies would be made in one graph and read in another.
        enabled = self.amp_dtype is not None
        return torch.autocast(self.device.type, self.amp_dtype, enabled=enabled, cache_enabled=False)

    def _fill(self, found: _Graph, inputs: StepInputs) -> None:
        """Copy a batch, a new seed and the learning rates into the buffers."""
        seed = draw_seed()
        if found.inputs is None:
            tensors = {name: torch.empty_like(x, device=self.device) for name, x in inputs.tensors.items()}
            found.inputs = StepInputs(tensors, inputs.layout, NoiseCounter(seed, self.device))
        for name, tensor in inputs.tensors.items():
            found.inputs.tensors[name].copy_(self._for_copy(tensor), non_blocking=True)
        found.inputs.noise.set(self._for_copy(seed))
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(float(group["lr"]))

    def _for_copy(self, tensor: Tensor) -> Tensor:
        """Pinned memory, from which a copy does not wait."""
        return tensor.pin_memory() if self.on_gpu and tensor.device.type == "cpu" else tensor

    def _step(self, inputs: StepInputs) -> tuple[StepInputs, StepOutputs]:
        """The frozen tower, losses, backward pass and update."""
        self.optimizer.zero_grad(set_to_none=True)
        with use_kernels(self._kernels), self._autocast():
            encoded = self.model.encode(inputs)
            outputs = self.model.step(encoded)
        total = sum(outputs.losses.values())
        total.backward()
        self.finite.logical_and_(torch.isfinite(total.detach()))
        self.optimizer.step()
        return encoded, outputs.detach()

    def _warm_up(self, inputs: StepInputs) -> tuple[StepInputs, StepOutputs]:
        """A step on a side stream, as graphs need it before they are captured."""
        self._make_capturable()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            results = self._step(inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return results

    def _capture(self, found: _Graph) -> None:
        """Capture the step, without running it, on the stream of the warm-up: gradients are accumulated on the stream
        that the parameters' first gradient came from."""
        self.optimizer.zero_grad(set_to_none=True)  # so that the gradients are allocated in the graph
        rates = [group["lr"] for group in self.optimizer.param_groups]
        found.graph = torch.cuda.CUDAGraph()
        try:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate  # read by the graph; the scheduler sees the number
            with torch.cuda.graph(found.graph, pool=self._pool, stream=self._stream):
                found.encoded, found.outputs = self._step(found.inputs)
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        logger.info("SOLVER.CUDA_GRAPH: captured the training step (%d hypothesis rows)", self.rows)

    def _make_capturable(self) -> None:
        """Let the optimizer read learning rates and step counts from device memory."""
        for group in self.optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
            if "capturable" in group:
                group["capturable"] = True
        for state in self.optimizer.state.values():  # of a resumed run
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(self.device, torch.float32)


def why_not_static(
    model: nn.Module, *, device_type: str, processes: int, accumulate_steps: int, amp_dtype: torch.dtype | None
) -> str | None:
    """Why a training cannot use :class:`StaticStep`; None if it can."""
    if device_type != "cuda":
        return "it needs a GPU"
    if processes > 1:
        return "it does not work on several GPUs yet"
    if accumulate_steps > 1:
        return "it does not work with SOLVER.ACCUMULATE_STEPS"
    if amp_dtype is torch.float16:
        return "it does not work with SOLVER.AMP.DTYPE float16, whose scaling reads gradients on the host: set bfloat16"
    if not hasattr(model, "step"):
        return f"{type(model).__name__} does not have a step of fixed shapes"
    if not kernels_enabled(device_type) or not getattr(model, "kernels", True):
        return "it needs the compiled kernels"
    backbone = getattr(model, "backbone", None)
    if backbone is not None and any(parameter.requires_grad for parameter in backbone.parameters()):
        return "it does not work with MODEL.CLIP.FINE_TUNE"
    return None


def build_static_step(
    cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer, amp_dtype: torch.dtype | None
) -> StaticStep | None:
    """The step of ``SOLVER.CUDA_GRAPH``; None if it is off or not possible, which is logged."""
    if not cfg.SOLVER.CUDA_GRAPH:
        return None
    reason = why_not_static(
        model,
        device_type=cfg.MODEL.DEVICE.split(":")[0],
        processes=comm.get_world_size(),
        accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
        amp_dtype=amp_dtype,
    )
    if reason is not None:
        logger.warning("SOLVER.CUDA_GRAPH: training without a graph: %s", reason)
        return None
    return StaticStep(model, optimizer, amp_dtype=amp_dtype)
