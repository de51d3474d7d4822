"""Initial weights of the student's ResNet: Detectron2's model zoo, torchvision, or a local file."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torchvision
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from reclip_d2.errors import ReclipError
from reclip_d2.utils.digest import check_digest
from reclip_d2.utils.tensor_files import check_tensors, dtype_mismatches, read_tensor_file, state_dict_of

KEY = "MODEL.STUDENT.WEIGHTS"
# The names of PyTorch's files end with the first digits of their SHA-256: resnet50-0676ba61.pth.
_PUBLISHED_HASH = re.compile(r"^https://download\.pytorch\.org/.*-([0-9a-f]{8,64})\.pth$")

logger = logging.getLogger(__name__)


def load_backbone_weights(backbone: nn.Module, source: str) -> None:
    """Load ``MODEL.STUDENT.WEIGHTS`` into a ResNet with Detectron2's names.

    Args:
        backbone: built by :func:`~reclip_d2.modeling.student.network.build_dilated_resnet_backbone`.
        source: ``detectron2://ImageNetPretrained/...``, ``torchvision://resnet50`` (or
            ``torchvision://resnet50/IMAGENET1K_V1``), or a file: Detectron2's ``.pkl``, torchvision's state dict
            (``.pth``), or ``.safetensors`` with the names of either. Only tensors are read.

    Raises:
        ReclipError: the file cannot be fetched or read, or belongs to another network.
    """
    weights = _detectron2_names(read_backbone_weights(_local_path(source), source), backbone)
    own = backbone.state_dict()
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    if missing:
        raise ReclipError(
            f"MODEL.STUDENT.WEIGHTS {source} is of another backbone: {missing[0]} is missing"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''};"
            " check MODEL.RESNETS: DEPTH, NORM, RES2_OUT_CHANNELS (64 below depth 50, else 256)"
        )
    for key, value in own.items():
        if key in weights and weights[key].shape != value.shape:
            raise ReclipError(
                f"MODEL.STUDENT.WEIGHTS {source} is of another backbone: {key} has shape {tuple(weights[key].shape)}"
                f" instead of {tuple(value.shape)};"
                " check MODEL.RESNETS: DEPTH, NORM, RES2_OUT_CHANNELS (64 below depth 50, else 256)"
            )
    for mismatch in dtype_mismatches(weights, own):
        raise ReclipError(f"MODEL.STUDENT.WEIGHTS {source} does not fit: {mismatch}")
    backbone.load_state_dict({key: weights.get(key, value) for key, value in own.items()})
    logger.info("Backbone weights from %s", source)


def _local_path(source: str) -> str:
    """The local file of a source, downloaded if needed."""
    url = source
    if source.startswith("torchvision://"):
        name, _, tag = source.removeprefix("torchvision://").partition("/")
        try:
            choices = torchvision.models.get_model_weights(name)
            url = (choices[tag] if tag else choices.DEFAULT).url
        except (ValueError, KeyError, AttributeError) as error:
            raise ReclipError(
                f"MODEL.STUDENT.WEIGHTS {source!r} is not known to torchvision: use for example"
                " torchvision://resnet50 or torchvision://resnet50/IMAGENET1K_V1"
            ) from error
    elif "://" not in source:
        if not Path(source).is_file():
            raise ReclipError(f"MODEL.STUDENT.WEIGHTS {source} does not exist: check the path")
        return source
    try:
        path = PathManager.get_local_path(url)
    except (KeyError, RuntimeError) as error:
        raise ReclipError(f"MODEL.STUDENT.WEIGHTS {source!r} is not in Detectron2's model zoo") from error
    except Exception as error:  # no network: each client raises its own errors
        raise ReclipError(
            f"MODEL.STUDENT.WEIGHTS {source} cannot be fetched ({type(error).__name__}): get it where there is a"
            " network, copy the file to this machine and set the key to its path"
        ) from error
    if not Path(path).is_file():  # for unknown schemes Detectron2 returns the URL itself
        raise ReclipError(
            f"MODEL.STUDENT.WEIGHTS {source!r} is not a known source: use detectron2://..., torchvision://...,"
            " https://... or a local file"
        )
    if published := _PUBLISHED_HASH.search(url):
        check_digest(path, published[1], f"{KEY} {source}")
    return path


def read_backbone_weights(path: str, source: str) -> dict[str, Tensor]:
    """Tensors of a weight file, by their names in the file.

    Raises:
        ReclipError: the file is damaged, contains code, or contains no weights.
    """
    what = f"{KEY} {source}"
    tensors = state_dict_of(read_tensor_file(path, KEY, source).content, what, ("model", "state_dict", "blobs"))
    if not tensors:
        raise ReclipError(f"{what} contains no weights")
    check_tensors(tensors, what)
    return tensors


def _detectron2_names(weights: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Rename weights to Detectron2's ResNet, from Detectron2's, torchvision's or Caffe2's names."""
    if any(key.startswith("layer1.") for key in weights):
        return {name: value for key, value in weights.items() if (name := _torchvision_name(key)) is not None}
    if any(key.startswith("res2_0_branch") for key in weights):
        return align_and_update_state_dicts(backbone.state_dict(), weights, c2_conversion=True)
    return {key.removeprefix("backbone.").removeprefix("bottom_up."): value for key, value in weights.items()}


def _torchvision_name(key: str) -> str | None:
    """Detectron2's name for a tensor of torchvision's ResNet; None for the classifier."""
    if key.startswith("fc."):
        return None
    key = re.sub(r"^conv1\.", "stem.conv1.", key)
    key = re.sub(r"^bn1\.", "stem.conv1.norm.", key)
    key = re.sub(r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}.", key)
    key = re.sub(r"\.bn(\d)\.", r".conv\1.norm.", key)
    return key.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")
