"""Read CLIP weights from a local file: OpenAI's TorchScript archives, open_clip's and Hugging Face's files.

Only tensors are read; nothing in a file is executed. Names follow open_clip's ``CLIP``.

Shape letters: D width of the joint embedding, E width of a transformer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor, nn

from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import MIB
from reclip_d2.utils.json_files import read_json
from reclip_d2.utils.tensor_files import check_tensors, dtype_mismatches, read_tensor_file, state_dict_of

KEY = "MODEL.CLIP.PRETRAINED"

# Entries of OpenAI's state dicts that are settings, not weights.
_OPENAI_SETTINGS = ("input_resolution", "context_length", "vocab_size")

# Of open_clip's ViTs, of timm's, and of MobileCLIP's files.
_IMAGE_TOWERS = ("visual.conv1.weight", "visual.trunk.", "image_encoder.model.")


@dataclasses.dataclass(frozen=True)
class ClipWeights:
    """Weights from a file.

    Attributes:
        state: tensors by open_clip's names, float32.
        source: ``OpenAI``, ``Hugging Face`` or ``open_clip``, by the file's format.
        quick_gelu: whether these weights need QuickGELU; None if the file does not tell.
    """

    state: dict[str, Tensor]
    source: str
    quick_gelu: bool | None


def read_clip_weights(path: str | Path) -> ClipWeights:
    """Read the weights of a local file in any of the supported formats.

    Raises:
        ReclipError: the file is damaged, holds something else than tensors, or does not hold a CLIP.
    """
    path = Path(path)
    file = read_tensor_file(path, KEY)
    what = f"{KEY} {path}"
    state = state_dict_of(file.content, what)
    if any(name.startswith("vision_model.") for name in state):
        return ClipWeights(_float(open_clip_names(state), what), "Hugging Face", _hidden_act_is_quick(path))
    openai = file.is_torchscript or any(name in state for name in _OPENAI_SETTINGS)
    state = {
        name: tensor
        for name, tensor in state.items()
        # Not weights: attention masks are computed, and position ids are 0, 1, 2, ...
        if name not in _OPENAI_SETTINGS and not name.endswith(("attn_mask", "position_ids"))
    }
    if not any(name.startswith(_IMAGE_TOWERS) for name in state):
        raise ReclipError(f"{what} holds no weights of a CLIP with a Vision Transformer")
    return ClipWeights(_float(state, what), "OpenAI" if openai else "open_clip", True if openai else None)


def _float(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    check_tensors(state, what)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _hidden_act_is_quick(path: Path) -> bool | None:
    """Whether the ``config.json`` next to a Hugging Face file asks for QuickGELU; None if there is none."""
    try:
        config = read_json(path.parent / "config.json", {"type": "object"}, "config", "replace it", max_bytes=MIB)
        towers = [config.get("vision_config") or {}, config.get("text_config") or {}]
        acts = {tower.get("hidden_act", "quick_gelu") for tower in towers}  # the default of transformers' CLIPConfig
    except (ReclipError, AttributeError):
        return None
    return "quick_gelu" in acts


# Parts of a block: Hugging Face's names to open_clip's.
_BLOCK_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OTHER_PARTS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # sic
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "logit_scale": "logit_scale",
}
_BLOCK = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict of transformers' ``CLIPModel`` to open_clip's names.

    The three projections of an attention are packed into one ``in_proj``, and the projections to the joint embedding,
    linear layers ``(D, E)``, become matrices ``(E, D)``. Unknown names are kept, so that loading reports them.
    """
    out: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _BLOCK.fullmatch(name)
        if name.endswith("position_ids"):
            continue
        if match:
            tower, layer, part, kind = match.groups()
            prefix = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{layer}"
            if part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                packed.setdefault(f"{prefix}.attn.in_proj_{kind}", {})[part[10]] = tensor
            else:
                out[f"{prefix}.{_BLOCK_PARTS.get(part, part)}.{kind}"] = tensor
        elif name in ("visual_projection.weight", "text_projection.weight"):
            out["visual.proj" if name.startswith("visual") else "text_projection"] = tensor.T.contiguous()
        else:
            out[_OTHER_PARTS.get(name, name)] = tensor
    for name, parts in packed.items():
        if set(parts) != set("qkv"):
            raise ReclipError(f"the weights lack a part of {name}: the file is incomplete")
        out[name] = torch.cat([parts[letter] for letter in "qkv"])
    return out


def tower_sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Sizes of a CLIP, derived from its weights (open_clip's names); missing parts are left out."""
    state = {name.removeprefix("text."): tensor for name, tensor in state.items()}

    def size(name: str, dim: int) -> int | None:
        tensor = state.get(name)
        return tensor.shape[dim] if tensor is not None and tensor.ndim > dim else None

    def layers(prefix: str) -> int:
        return len({name.split(".")[prefix.count(".")] for name in state if name.startswith(prefix)})

    patch, tokens = size("visual.conv1.weight", 3), size("visual.positional_embedding", 0)
    sizes = {
        "image width": size("visual.conv1.weight", 0),
        "image layers": layers("visual.transformer.resblocks."),
        "patch": patch,
        "image side": round((tokens - 1) ** 0.5) * patch if tokens and patch else None,
        "text width": size("token_embedding.weight", 1),
        "text layers": layers("transformer.resblocks."),
        "context length": size("positional_embedding", 0),
        "vocabulary": size("token_embedding.weight", 0),
        "embedding": size("visual.proj", 1),
    }
    return {name: value for name, value in sizes.items() if value is not None}


def load_clip_weights(model: nn.Module, weights: ClipWeights, name: str, source: str) -> None:
    """Load weights into a model; names, shapes and dtypes must match.

    Args:
        name: the model's open_clip name, for messages.
        source: the file, for messages.

    Raises:
        ReclipError: the towers have other sizes, or weights are missing or unknown.
    """
    own = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("position_ids")}
    given = convert_state_dict(model, weights.state)  # MobileCLIP's names
    if weights.source == "Hugging Face" and any(key.startswith("visual.trunk.") for key in own):
        raise ReclipError(
            f"MODEL.CLIP.PRETRAINED {source} has the names of transformers, but {name} needs open_clip's: get"
            " open_clip_model.safetensors"
        )
    theirs, ours = tower_sizes(given), tower_sizes(own)
    wrong = [
        f"{part} {theirs[part]} instead of {ours[part]}" for part in ours if theirs.get(part, ours[part]) != ours[part]
    ]
    if wrong:
        raise ReclipError(
            f"MODEL.CLIP.PRETRAINED {source} is of another model than {name}: {', '.join(wrong)}; set MODEL.CLIP.NAME"
        )
    state = dict(given)
    if "positional_embedding" in state and "text.positional_embedding" in own:
        state = convert_to_custom_text_state_dict(state)
    for key in ("logit_scale", "logit_bias"):  # a scalar in some files, a vector of length 1 in others
        if key in state and key in own and state[key].numel() == own[key].numel():
            state[key] = state[key].reshape(own[key].shape)
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in own]
    problems += [
        f"{key} has shape {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems += dtype_mismatches(state, own)
    if problems:
        raise ReclipError(
            f"MODEL.CLIP.PRETRAINED {source} does not fit {name}: {problems[0]}"
            f"{f' (and {len(problems) - 1} more)' if len(problems) > 1 else ''}"
        )
    model.load_state_dict(state, strict=False)  # position ids are not weights
