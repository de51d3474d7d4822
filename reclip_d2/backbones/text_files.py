"""Files of Hugging Face that a text tower needs besides its weights: the tokenizer's, and the configuration of a tower
of transformers."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

from reclip_d2.backbones.download import is_reachable
from reclip_d2.errors import ReclipError
from reclip_d2.utils.lazy_transformers import use_transformers

KEY = "MODEL.CLIP.TEXT_FILES"
# One of these is in every folder of a tokenizer.
_TOKENIZER = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.txt", "vocab.json")
_CONFIG = ("config.json",)
_INSTALL = "pip install 'reclip_d2[text]'"


def load_tokenizer(name: str, config: dict[str, Any], pretrained: str = "", folder: str = "") -> object:
    """The tokenizer of an open_clip model: CLIP's, or one of Hugging Face from files.

    Args:
        name: open_clip's name of the model.
        config: its config.
        pretrained: ``MODEL.CLIP.PRETRAINED``: a tokenizer next to a local file is used.
        folder: ``MODEL.CLIP.TEXT_FILES``.

    Raises:
        ReclipError: transformers is not installed, or the files are missing or damaged.
    """
    text = config["text_cfg"]
    repository = text.get("hf_tokenizer_name")
    context = text.get("context_length", DEFAULT_CONTEXT_LENGTH)
    if not repository:  # open_clip's get_tokenizer also looks at the name
        return SimpleTokenizer(context_length=context, **text.get("tokenizer_kwargs", {}))
    _require_transformers(name)
    place = _place(name, repository, "tokenizer", _TOKENIZER, pretrained, folder)
    options = {"clean": "whitespace", **text.get("tokenizer_kwargs", {})}
    try:
        return HFTokenizer(place, context_length=context, **options)
    except Exception as error:  # transformers raises errors of many kinds
        raise ReclipError(f"the tokenizer of {name} cannot be read from {place}: {_cause(error)}") from error


def with_local_text_config(name: str, config: dict[str, Any], pretrained: str = "", folder: str = "") -> dict[str, Any]:
    """``text_cfg`` of a model with a text tower of transformers, whose configuration is then read from a place that
    exists; empty for other models.

    Raises:
        ReclipError: as :func:`load_tokenizer`.
    """
    repository = config["text_cfg"].get("hf_model_name")
    if not repository:
        return {}
    _require_transformers(name)
    text = copy.deepcopy(config["text_cfg"])
    text["hf_model_name"] = _place(name, repository, "text tower", _CONFIG, pretrained, folder)
    text["hf_model_pretrained"] = False
    try:
        use_transformers()
    except ImportError as error:
        raise ReclipError(f"the installed transformers cannot be imported ({_cause(error)}): {_INSTALL}") from error
    return {"text_cfg": text}


def _require_transformers(name: str) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise ReclipError(f"MODEL.CLIP.NAME {name} needs the package transformers: {_INSTALL}")


def _place(name: str, repository: str, what: str, files: tuple[str, ...], pretrained: str, folder: str) -> str:
    """A local folder with one of the files, or the name of a repository that is cached or can be reached."""
    if folder:
        if not any((Path(folder).expanduser() / file).is_file() for file in files):
            raise ReclipError(f"{KEY} {folder} has no {what} of {name}: it must contain {' or '.join(files)}")
        return str(Path(folder).expanduser())
    beside = Path(pretrained).expanduser().parent if pretrained else Path()
    for local in [beside] * Path(pretrained).expanduser().is_file() + [Path(repository).expanduser()]:
        if any((local / file).is_file() for file in files):
            return str(local)
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    cached = any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)
    if not cached and not is_reachable(hf_hub_url(repository, files[0])):
        raise ReclipError(
            f"the {what} of {name} is not on this machine, and its server cannot be reached: copy the Hugging Face"
            f" repository {repository} (without weights) to this machine, and set {KEY} to its folder"
        )
    return repository


def _cause(error: Exception) -> str:
    return (" ".join(str(error).split())[:160] or type(error).__name__).rstrip(".")
