"""Helper vision models for dense attentions: timm's Vision Transformers, such as DINO, DINOv2, DINOv3 and RADIO.

Shape letters: B images, (H, W) size in pixels, (h, w) grid, n = h*w patches, F width of the helper.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from reclip_d2.backbones.download import is_reachable
from reclip_d2.backbones.settings import pixel_statistics
from reclip_d2.backbones.timm_tokens import embed_patches
from reclip_d2.errors import ReclipError
from reclip_d2.utils.tensor_files import check_tensors, read_tensor_file, state_dict_of

NAME_KEY, WEIGHTS_KEY = "MODEL.CLIP.HELPER_NAME", "MODEL.CLIP.HELPER_WEIGHTS"
HELPER_KEYS = (NAME_KEY, WEIGHTS_KEY)
# timm's modules of each kind of model, with their converters of other projects' weights.
_KINDS = {vision_transformer.VisionTransformer: vision_transformer, eva.Eva: eva}


class HelperModel(nn.Module):
    """A frozen timm ``VisionTransformer`` or ``Eva`` on images that are normalised for a CLIP.

    Positional embeddings are resized bicubically without antialiasing, so that the model can be exported.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        """
        Args:
            model: the timm model.
            name: its name, for messages and checkpoints.
            mean, std: pixel statistics of the CLIP, in [0, 1]; the helper's are in its ``pretrained_cfg``.
        """
        super().__init__()
        if not isinstance(model, tuple(_KINDS)):
            raise ReclipError(f"{NAME_KEY} {name!r} is not a Vision Transformer of timm: use one such as a DINOv2")
        self.model = model.eval().requires_grad_(False)
        self.name = name
        digest = hashlib.sha256()
        for key, tensor in sorted(model.state_dict().items()):
            digest.update(key.encode() + tensor.detach().float().contiguous().cpu().numpy().tobytes())
        self.fingerprint = digest.hexdigest()
        own_mean, own_std = (torch.tensor(model.pretrained_cfg.get(key, usual)) for key, usual in
                             (("mean", (0.5, 0.5, 0.5)), ("std", (0.5, 0.5, 0.5))))  # fmt: skip
        given_mean, given_std = torch.tensor(mean), torch.tensor(std)
        self.register_buffer("factor", (given_std / own_std).view(3, 1, 1), persistent=False)
        self.register_buffer("offset", ((given_mean - own_mean) / own_std).view(3, 1, 1), persistent=False)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.model.patch_embed.patch_size[0]

    def forward(self, images: Tensor, grid: tuple[int, int], valid: Tensor | None = None) -> Tensor:
        """Features ``(B, n, F)`` of length 1 of the images, resized so that they have ``grid`` (h, w).

        Args:
            images: ``(B, 3, H, W)``, normalised for the CLIP.
            valid: ``(B, n)`` bool, patches that others may attend to; None for all.
        """
        model = self.model
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        pixels = F.interpolate(images * self.factor + self.offset, size=size, mode="bilinear", align_corners=False)
        tokens, _ = embed_patches(model, pixels)
        mask = None
        if valid is not None:
            mask = F.pad(valid, [model.num_prefix_tokens, 0], value=True)[:, None, None, :]
        if isinstance(model, eva.Eva):
            rope = None if model.rope is None else model.rope.get_embed(shape=grid)
            mixed = getattr(model, "rope_mixed", False) and rope is not None
            for index, block in enumerate(model.blocks):
                tokens = block(tokens, rope=rope[index] if mixed else rope, attn_mask=mask)
        else:
            for block in model.blocks:
                tokens = block(tokens, attn_mask=mask)
        return F.normalize(model.norm(tokens)[:, model.num_prefix_tokens :], dim=-1)

    def identity(self) -> dict[str, Any]:
        """The name, and a hash of the weights."""
        return {NAME_KEY: self.name, "helper_fingerprint": self.fingerprint}


def build_helper(cfg: CfgNode) -> HelperModel:
    """The model of ``MODEL.CLIP.HELPER_NAME`` with the weights of ``HELPER_WEIGHTS``.

    Raises:
        ReclipError: the name is unknown or no Vision Transformer, or the weights are not available or do not fit.
    """
    name, weights = cfg.MODEL.CLIP.HELPER_NAME, cfg.MODEL.CLIP.HELPER_WEIGHTS
    if not name:
        raise ReclipError(f"{NAME_KEY} is empty: set it to a model of timm, such as vit_small_patch14_dinov2.lvd142m")
    if not timm.is_model(name):
        raise ReclipError(f"{NAME_KEY} {name!r} is not known to timm: see timm.list_models()")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = timm.create_model(name, pretrained=False, num_classes=0)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ReclipError(f"timm cannot build {NAME_KEY} {name!r}: {' '.join(str(error).split())[:120]}") from error
    statistics = pixel_statistics(cfg)
    mean, std = ([value / 255 for value in values] for values in (statistics.mean, statistics.std))
    helper = HelperModel(model, name=name, mean=mean, std=std)
    if weights != "random":
        file = _hub_file(model, name) if weights == "pretrained" else Path(weights).expanduser()
        _load(model, name, file)
        helper = HelperModel(model, name=name, mean=mean, std=std)  # with the hash of the weights
    return helper


def _hub_file(model: nn.Module, name: str) -> Path:
    """timm's weights of a model in safetensors, from the Hub's cache or the network."""
    from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache

    config = model.pretrained_cfg
    repository = config.get("hf_hub_id") or ""
    if repository.endswith("/"):
        repository += f"{config['architecture']}.{config['tag']}" if config.get("tag") else config["architecture"]
    if not repository:
        raise ReclipError(f"timm has no weights for {NAME_KEY} {name!r}: set {WEIGHTS_KEY} to a file")
    found = try_to_load_from_cache(repository, "model.safetensors")
    if isinstance(found, str):
        return Path(found)
    remedy = f"get model.safetensors of {repository} elsewhere, and set {WEIGHTS_KEY} to its path"
    if not is_reachable(hf_hub_url(repository, "model.safetensors")):
        raise ReclipError(f"the weights of {NAME_KEY} {name} are not on this machine, and cannot be reached: {remedy}")
    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:  # no network: each client raises its own errors
        raise ReclipError(f"the weights of {name} cannot be fetched ({type(error).__name__}): {remedy}") from error


def _load(model: nn.Module, name: str, file: Path) -> None:
    """Load a file in timm's format, or in one that timm converts (DINOv2's, DINOv3's, RADIO's own)."""
    if not file.is_file():
        raise ReclipError(f"{WEIGHTS_KEY} {str(file)!r} is neither a file, nor pretrained or random")
    what = f"{WEIGHTS_KEY} {file}"
    state = state_dict_of(read_tensor_file(file, WEIGHTS_KEY).content, what)
    check_tensors(state, what)
    kind = next(module for cls, module in _KINDS.items() if isinstance(model, cls))
    own = model.state_dict()
    try:
        state = kind.checkpoint_filter_fn(state, model)
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        raise ReclipError(f"{what} is not of {NAME_KEY} {name}") from error
    state = {key: value.float() for key, value in state.items() if key in own or not key.startswith("head")}
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in own]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ReclipError(f"{what} is not of {NAME_KEY} {name}: {problems[0]}{more}")
    model.load_state_dict(state)
