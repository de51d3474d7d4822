"""Checkpoints of the public code of ReCLIP++, as checkpoints of this project.

That code saves the whole state dict, the frozen CLIP's tensors included; only the trained ones are taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reclip_d2.errors import ReclipError

# Trained tensors: the public code's name, ours.
_NAMES = {
    "text_encoder.prompt_token": "bias_head.reference_prompt.vectors",
    "pe_proj.weight": "bias_head.positional_projection.conv.weight",
    "pe_proj.bias": "bias_head.positional_projection.conv.bias",
    "decoder_conv2.weight": "mask_decoder.conv.weight",
    "decoder_conv2.bias": "mask_decoder.conv.bias",
    **{
        f"decoder_norm2.{name}": f"mask_decoder.norm.{name}"
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    },
}
_CLASS_TOKEN = "vit.cls_token"


@dataclasses.dataclass(frozen=True)
class PublicCheckpoint:
    """What a public checkpoint of ReCLIP++ holds.

    Attributes:
        state: the trained tensors by our names, float32.
        class_token: ``(E,)`` class token of its image tower, if the file has it.
    """

    state: dict[str, Tensor]
    class_token: Tensor | None

    @property
    def num_classes(self) -> int:
        return len(self.state["mask_decoder.conv.bias"])

    @property
    def prompt_length(self) -> int:
        return len(self.state["bias_head.reference_prompt.vectors"])

    @property
    def kernel_size(self) -> int:
        return self.state["mask_decoder.conv.weight"].shape[-1]


def read_tensor_file(path: str | Path) -> Any:
    """A file of ``torch.save``, tensors and plain containers only, on the CPU."""
    if not Path(path).is_file():
        raise ReclipError(f"{path} does not exist: check the path")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # reading rubbish as a pickle may raise nearly anything
        raise ReclipError(f"{path} cannot be read as tensors: it is damaged, or holds code") from error


def read_public_checkpoint(path: str | Path) -> PublicCheckpoint:
    """Read a checkpoint of the public code of ReCLIP++.

    Raises:
        ReclipError: the file is damaged or holds code, or it is a checkpoint of something else.
    """
    loaded = read_tensor_file(path)
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ReclipError(f"{path} holds no state dict: it is not a checkpoint of the public ReCLIP++ code")
    state = {str(name).removeprefix("module."): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if any(name.startswith("proj_net.") for name in state):
        raise ReclipError(
            f"{path} is a checkpoint of ReCLIP (the conference model): its bias head is not part of this project yet;"
            " only checkpoints of ReCLIP++ can be converted"
        )
    missing = [name for name in _NAMES if name not in state and not name.endswith("num_batches_tracked")]
    if missing:
        raise ReclipError(f"{path} is not a checkpoint of the public ReCLIP++ code: it lacks {missing[0]}")
    converted = {ours: state[theirs] for theirs, ours in _NAMES.items() if theirs in state}
    converted.setdefault("mask_decoder.norm.num_batches_tracked", torch.tensor(0))
    prompt = converted["bias_head.reference_prompt.vectors"]
    if prompt.ndim != 3 or len(prompt) != 1 or converted["mask_decoder.conv.weight"].ndim != 4:
        raise ReclipError(f"{path} is not a checkpoint of the public ReCLIP++ code: its tensors have other shapes")
    converted["bias_head.reference_prompt.vectors"] = prompt[0]
    token = state.get(_CLASS_TOKEN)
    return PublicCheckpoint(
        {name: (value.float() if value.is_floating_point() else value).clone() for name, value in converted.items()},
        None if token is None else token.flatten().float(),
    )


def read_public_class_token(path: str | Path) -> Tensor:
    """Class token ``(E,)`` of the public code's ``utils/cls_token.pt``: one tensor of any shape."""
    token = read_tensor_file(path)
    if not isinstance(token, Tensor) or not token.is_floating_point():
        raise ReclipError(f"{path} is not the public code's class token: it must hold one tensor")
    return token.detach().flatten().float()


def compatibility_keys(
    checkpoint: PublicCheckpoint, class_token: str, reference_names: list[str], activation: str = "own"
) -> dict[str, Any]:
    """Config keys under which our model computes what the public model does, as a nested dictionary.

    Args:
        class_token: for ``MODEL.CLIP.CLASS_TOKEN``.
        reference_names: for ``MODEL.BIAS_HEAD.REFERENCE_NAMES``.
        activation: for ``MODEL.CLIP.IMAGE_ACTIVATION``.
    """
    return {
        "MODEL": {
            "META_ARCHITECTURE": "RectifiedCLIP",
            "BACKBONE": {"NAME": "DenseCLIP"},
            # That code normalises images by ImageNet's statistics.
            "PIXEL_MEAN": [123.675, 116.28, 103.53],
            "PIXEL_STD": [58.395, 57.12, 57.375],
            "CLIP": {
                "VALUE_PATH_RESIDUAL": True,
                "LAYER_NORM_EPS": 1e-6,
                "IMAGE_ACTIVATION": activation,
                "CLASS_TOKEN": class_token,
            },
            "BIAS_HEAD": {
                "NAME": "ReCLIPPPBiasHead",
                "PROMPT_LENGTH": checkpoint.prompt_length,
                "NAME_TOKENS": 3,
                "REFERENCE_NAMES": reference_names,
                "REFERENCE_NORM": "matrix",
                "RECTIFICATION": "subtract",
            },
            "MASK_DECODER": {
                "ENABLED": True,
                "KERNEL_SIZE": checkpoint.kernel_size,
                "NORM": "BN",
                "PADDING_MODE": "zeros",
            },
        },
        # Its test images: the short side 512 pixels, the long one at most 2048.
        "INPUT": {"MIN_SIZE_TEST": 512, "MAX_SIZE_TEST": 2048},
    }


def check_fits(checkpoint: PublicCheckpoint, modules: nn.ModuleDict, path: str | Path) -> None:
    """Raise :class:`ReclipError` unless the tensors have the shapes of our modules' (by our names)."""
    own = modules.state_dict()
    for name, tensor in checkpoint.state.items():
        if tensor.shape != own[name].shape:
            raise ReclipError(
                f"{path} does not fit this CLIP and class list: {name} has shape {tuple(tensor.shape)} instead of"
                f" {tuple(own[name].shape)}"
            )
