"""Convert checkpoints of the public code of ReCLIP and ReCLIP++ to checkpoints of this project.

That code saves the whole state dict, including the frozen CLIP; only trained tensors are converted.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reclip_d2.errors import ReclipError
from reclip_d2.utils.tensor_files import check_tensors, read_tensor_file, state_dict_of

_PROMPT = "bias_head.reference_prompt.vectors"


def _norm(theirs: str, ours: str) -> dict[str, str]:
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in parts}


# Trained tensors of each model: the public code's names to ours.
_NAMES: dict[str, dict[str, str]] = {
    "ReCLIP++": {
        "text_encoder.prompt_token": _PROMPT,
        "pe_proj.weight": "bias_head.positional_projection.conv.weight",
        "pe_proj.bias": "bias_head.positional_projection.conv.bias",
        "decoder_conv2.weight": "mask_decoder.conv.weight",
        "decoder_conv2.bias": "mask_decoder.conv.bias",
        **_norm("decoder_norm2", "mask_decoder.norm"),
    },
    "ReCLIP": {
        "text_encoder.prompt_token": _PROMPT,
        **{
            f"proj_net.{3 * i}.{part}": f"bias_head.space_projection.convs.{i}.{part}"
            for i in range(3)
            for part in ("weight", "bias")
        },
        # Convolution, norm and ReLU are numbered in turn.
        **{
            theirs: ours
            for i in range(3)
            for theirs, ours in _norm(f"proj_net.{3 * i + 1}", f"bias_head.space_projection.norms.{i}").items()
        },
    },
}
# Tensors whose first dimension is the classes.
_CLASSES = {"ReCLIP++": "mask_decoder.conv.bias", "ReCLIP": "bias_head.space_projection.convs.2.bias"}
_CLASS_TOKEN = "vit.cls_token"


@dataclasses.dataclass(frozen=True)
class PublicCheckpoint:
    """Content of a public checkpoint.

    Attributes:
        model: ``ReCLIP++``, or ``ReCLIP`` (the conference model).
        state: the trained tensors by our names, float32.
        class_token: ``(E,)`` class token of its image tower, if the file has one.
    """

    model: str
    state: dict[str, Tensor]
    class_token: Tensor | None

    @property
    def num_classes(self) -> int:
        return len(self.state[_CLASSES[self.model]])

    @property
    def prompt_length(self) -> int:
        return len(self.state[_PROMPT])

    def model_keys(self) -> dict[str, Any]:
        """Keys below ``MODEL`` for the kind of model and the widths of its layers."""
        if self.model == "ReCLIP":
            hidden = [len(self.state[f"bias_head.space_projection.convs.{i}.weight"]) for i in (0, 1)]
            return {
                "BIAS_HEAD": {"NAME": "ReCLIPBiasHead", "SPACE_CHANNELS": hidden, "NORM": "BN"},
                "MASK_DECODER": {"ENABLED": False},
            }
        return {
            "BIAS_HEAD": {"NAME": "ReCLIPPPBiasHead"},
            "MASK_DECODER": {
                "ENABLED": True,
                "KERNEL_SIZE": self.state["mask_decoder.conv.weight"].shape[-1],
                "NORM": "BN",
                "PADDING_MODE": "zeros",
            },
        }


def read_public_checkpoint(path: str | Path) -> PublicCheckpoint:
    """Read a checkpoint of the public code of ReCLIP++ or ReCLIP, which its tensors distinguish.

    Raises:
        ReclipError: the file is damaged, contains code, or is not such a checkpoint.
    """
    what = f"checkpoint {path}"
    state = state_dict_of(read_tensor_file(path, "checkpoint").content, what)
    model = "ReCLIP" if any(name.startswith("proj_net.") for name in state) else "ReCLIP++"
    names = _NAMES[model]
    missing = [name for name in names if name not in state and not name.endswith("num_batches_tracked")]
    if missing:
        raise ReclipError(f"{path} is not a checkpoint of the public {model} code: it lacks {missing[0]}")
    # Files written by old PyTorch versions have no num_batches_tracked.
    converted = {ours: state.get(theirs, torch.tensor(0)) for theirs, ours in names.items()}
    check_tensors(converted, what)
    prompt, classes = converted[_PROMPT], converted[_CLASSES[model]]
    kernels = [value for name, value in converted.items() if ".conv" in name and name.endswith("weight")]
    if prompt.ndim != 3 or len(prompt) != 1 or classes.ndim != 1 or any(kernel.ndim != 4 for kernel in kernels):
        raise ReclipError(f"{path} is not a checkpoint of the public {model} code: its tensors have other shapes")
    converted[_PROMPT] = prompt[0]
    token = state.get(_CLASS_TOKEN)
    return PublicCheckpoint(
        model,
        {name: (value.float() if value.is_floating_point() else value).clone() for name, value in converted.items()},
        None if token is None else token.flatten().float(),
    )


def read_public_class_token(path: str | Path) -> Tensor:
    """Class token ``(E,)`` of the public code's ``utils/cls_token.pt``: one tensor of any shape."""
    token = read_tensor_file(path, "class token").content
    if not isinstance(token, Tensor) or not token.is_floating_point():
        raise ReclipError(f"{path} is not the public code's class token: it must hold one tensor")
    check_tensors(token, f"class token {path}")
    return token.detach().flatten().float()


def compatibility_keys(
    checkpoint: PublicCheckpoint, class_token: str, reference_names: list[str], activation: str = "own"
) -> dict[str, Any]:
    """Config keys with which our model computes the same as the public model, as a nested dictionary.

    They cover prediction only: checkpoints do not contain training settings (hypotheses, temperatures, solver).

    Args:
        class_token: value of ``MODEL.CLIP.CLASS_TOKEN``.
        reference_names: value of ``MODEL.BIAS_HEAD.REFERENCE_NAMES``.
        activation: value of ``MODEL.CLIP.IMAGE_ACTIVATION``.
    """
    own = checkpoint.model_keys()
    return {
        "MODEL": {
            "META_ARCHITECTURE": "RectifiedCLIP",
            "BACKBONE": {"NAME": "DenseCLIP"},
            # The public code normalises images with ImageNet's statistics.
            "PIXEL_MEAN": [123.675, 116.28, 103.53],
            "PIXEL_STD": [58.395, 57.12, 57.375],
            "CLIP": {
                "VALUE_PATH_RESIDUAL": True,
                "LAYER_NORM_EPS": 1e-6,
                "IMAGE_ACTIVATION": activation,
                "CLASS_TOKEN": class_token,
            },
            "BIAS_HEAD": {
                **own["BIAS_HEAD"],
                "PROMPT_LENGTH": checkpoint.prompt_length,
                "NAME_TOKENS": 3,
                "REFERENCE_NAMES": reference_names,
                "REFERENCE_NORM": "matrix",
                "RECTIFICATION": "subtract",
            },
            "MASK_DECODER": own["MASK_DECODER"],
        },
        # Test images of the public code: short side 512 pixels, long side at most 2048.
        "INPUT": {"MIN_SIZE_TEST": 512, "MAX_SIZE_TEST": 2048},
    }


def check_fits(checkpoint: PublicCheckpoint, modules: nn.ModuleDict, path: str | Path) -> None:
    """Raise :class:`ReclipError` unless the tensors have the same shapes as those of our modules."""
    own = modules.state_dict()
    for name, tensor in checkpoint.state.items():
        if tensor.shape != own[name].shape:
            raise ReclipError(
                f"{path} does not fit this CLIP and class list: {name} has shape {tuple(tensor.shape)} instead of"
                f" {tuple(own[name].shape)}"
            )
