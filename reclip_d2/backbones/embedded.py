"""The tiny CLIP that ships with the package: an open_clip config and its checkpoints.

Pretrained by ``tools/pretrain_embedded_clip.py`` on the embedded worlds (``reclip_d2.toy``), it stands in for a real
CLIP on machines without network or GPU.

Shape letters: V = 49408 tokens of CLIP's vocabulary, K kept tokens, E = 64 width of the text transformer.
"""

from __future__ import annotations

import os
from pathlib import Path

import open_clip
import torch
from torch import Tensor

from reclip_d2.backbones import EMBEDDED_MODEL_NAME
from reclip_d2.errors import ReclipError
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.tensor_files import check_tensors, read_tensor_file, save_safetensors, state_dict_of

EMBEDDED_CONFIG = Path(__file__).parent / "assets" / f"{EMBEDDED_MODEL_NAME}.json"
EMBEDDED_CHECKPOINT = EMBEDDED_CONFIG.with_suffix(".safetensors")
# By the value of MODEL.CLIP.PRETRAINED: the name of the world. "openai" is the key's default.
EMBEDDED_CHECKPOINTS = {
    "embedded": EMBEDDED_CHECKPOINT,
    "openai": EMBEDDED_CHECKPOINT,
    "embedded_longtail": EMBEDDED_CONFIG.with_name(f"{EMBEDDED_MODEL_NAME}-longtail.safetensors"),
}

_TOKEN_ROWS = "token_embedding.weight"


def register_embedded_config() -> None:
    """Register ``reclip-embedded`` with open_clip, for ``create_model`` and ``get_tokenizer``."""
    if EMBEDDED_MODEL_NAME not in open_clip.list_models():
        open_clip.add_model_config(EMBEDDED_CONFIG)


def embedded_checkpoint(pretrained: str) -> Path:
    """Checkpoint of ``reclip-embedded`` for a value of ``MODEL.CLIP.PRETRAINED``: the name of a world, or a file.

    Raises:
        ReclipError: it is neither.
    """
    path = EMBEDDED_CHECKPOINTS.get(pretrained) or Path(pretrained).expanduser()
    if not path.is_file():
        raise ReclipError(
            f"MODEL.CLIP.PRETRAINED {pretrained!r} of {EMBEDDED_MODEL_NAME} is neither a file, nor embedded or"
            " embedded_longtail: tools/pretrain_embedded_clip.py makes others"
        )
    return path


def create_embedded_clip(seed: int = 0) -> open_clip.CLIP:
    """The tiny CLIP with open_clip's initialisation from ``seed``; torch's global generator is not advanced."""
    register_embedded_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Not open_clip.create_model, which would warn that no weights are loaded: the caller loads them next.
        return open_clip.CLIP(**open_clip.get_model_config(EMBEDDED_MODEL_NAME))


def build_embedded_clip(checkpoint: str | os.PathLike[str] = EMBEDDED_CHECKPOINT) -> open_clip.CLIP:
    """The pretrained tiny CLIP, float32, in eval mode, on the CPU.

    The checkpoint holds float16 weights, and only the K rows of the token embedding whose words occurred in
    pretraining. All other rows keep open_clip's initialisation from a fixed seed: an unseen word gets a distinct, but
    meaningless feature.

    Raises:
        ReclipError: the checkpoint is missing, damaged or of another model.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise ReclipError(f"{path}: no checkpoint of the embedded CLIP; make one with tools/pretrain_embedded_clip.py")
    model = create_embedded_clip()
    try:
        state = state_dict_of(read_tensor_file(path, "MODEL.CLIP.PRETRAINED checkpoint").content, f"checkpoint {path}")
        check_tensors(state, f"checkpoint {path}")
        token_ids, rows = state.pop("token_ids"), state.pop(_TOKEN_ROWS)
        embedding = model.token_embedding.weight.detach().clone()
        embedding[token_ids] = rows.float()
        state = {name: value.float() for name, value in state.items()}
        model.load_state_dict({**state, _TOKEN_ROWS: embedding})
    except (KeyError, IndexError, RuntimeError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ReclipError(
            f"{path}: not a checkpoint of {EMBEDDED_MODEL_NAME} ({cause}); "
            "make one with tools/pretrain_embedded_clip.py"
        ) from error
    return model.float().eval()


def save_embedded_checkpoint(
    path: str | os.PathLike[str], model: open_clip.CLIP, token_ids: Tensor, metadata: dict[str, str]
) -> None:
    """Write the file that :func:`build_embedded_clip` reads, atomically.

    Args:
        model: a tiny CLIP whose token embedding has V rows, or the K rows of ``token_ids``.
        token_ids: int64 (K,), ascending ids of the tokens to keep.
        metadata: text entries for the file's header (seed, steps, ...).
    """
    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    if len(state[_TOKEN_ROWS]) != len(token_ids):
        state[_TOKEN_ROWS] = state[_TOKEN_ROWS][token_ids].contiguous()
    state["token_ids"] = token_ids.to(torch.int64)
    with atomic_write(path) as temporary:
        save_safetensors(state, temporary, metadata)
