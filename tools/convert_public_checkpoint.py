#!/usr/bin/env python
"""Convert a checkpoint of the public ReCLIP or ReCLIP++ code.

    python tools/convert_public_checkpoint.py best_weight.pth output/public/voc20.pth --dataset voc20_val \
        --class-token utils/cls_token.pt --reference-names names.txt

The model is detected from the tensors. Writes the checkpoint, its class token (``<name>.class_token.safetensors``) and
a config (``<name>.yaml``) whose keys reproduce that code: logits agree to 1e-4 given the same Query features. The
public code has a separate class list for the Reference prompt; pass it with ``--reference-names`` if it differs from
the data set's.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

import reclip_d2.data.datasets  # noqa: F401  (registers the data sets)
import reclip_d2.modeling  # noqa: F401  (registers the models)
from reclip_d2.backbones.query import check_class_names
from reclip_d2.config import flatten, load_config
from reclip_d2.data.classes import class_names_of
from reclip_d2.engine.public_checkpoint import (
    check_fits,
    compatibility_keys,
    read_public_checkpoint,
    read_public_class_token,
)
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.modeling.bias_head import build_bias_head
from reclip_d2.modeling.build import build_clip_backbone
from reclip_d2.modeling.checkpoint import IDENTITY_VERSION
from reclip_d2.modeling.mask_decoder import MaskDecoder
from reclip_d2.modeling.meta_arch.segmentor import checkpoint_identity
from reclip_d2.utils.files import MIB, read_text
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.output_paths import check_output_path
from reclip_d2.utils.tensor_files import save_archive, save_safetensors

SUFFIXES = (".pth", ".safetensors")


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, metavar="IN", help="checkpoint of the public code")
    parser.add_argument("output", metavar="OUT", help="checkpoint to write: .pth or .safetensors")
    names = parser.add_mutually_exclusive_group(required=True)
    names.add_argument("--dataset", help="registered data set with the model's classes")
    names.add_argument("--class-names", type=Path, help="the model's classes, one per line")
    parser.add_argument(
        "--reference-names", type=Path, help="names in the Reference prompt, one per line (default: same)"
    )
    parser.add_argument("--class-token", help="the public code's utils/cls_token.pt; 'clip' for CLIP's own class token")
    parser.add_argument("--clip", default="ViT-B-16-quickgelu", help="MODEL.CLIP.NAME (default: %(default)s)")
    parser.add_argument("--pretrained", default="openai", help="MODEL.CLIP.PRETRAINED (default: %(default)s)")
    parser.add_argument(
        "--image-activation",
        choices=("own", "gelu"),
        default="own",
        help="gelu for checkpoints of the revision whose image tower has GELU instead of QuickGELU",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser


def read_names(path: Path) -> list[str]:
    """Class names of a text file, one per line."""
    text = read_text(path, "class list", limit=MIB, remedy="give a text file with one name per line")
    names = [line.strip() for line in text.splitlines()]
    while names and not names[-1]:
        names.pop()
    return names


def merge(into: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested dictionaries."""
    for key, value in other.items():
        into[key] = merge(into.get(key, {}), value) if isinstance(value, dict) else value
    return into


def choose_class_token(args: argparse.Namespace, found: Tensor | None) -> Tensor | None:
    """The class token of the command line, otherwise of the checkpoint; None for CLIP's own."""
    if args.class_token == "clip":
        return None
    if args.class_token:
        return read_public_class_token(args.class_token)
    if found is None:
        raise ReclipError(
            f"{args.checkpoint} does not contain the class token: give --class-token utils/cls_token.pt of the public"
            " code, or --class-token clip for CLIP's own"
        )
    return found


def save(path: Path, state: dict[str, Tensor], identity: str) -> None:
    """Write a checkpoint that ``ReclipCheckpointer`` loads."""
    with atomic_write(path) as temporary:
        if path.suffix == ".safetensors":
            state = {name: tensor.contiguous() for name, tensor in state.items()}
            save_safetensors(state, temporary, {"identity": identity, "identity_version": IDENTITY_VERSION})
        else:
            save_archive({"model": state, "identity": identity, "identity_version": IDENTITY_VERSION}, temporary)


@exit_on_error
def main(argv: Sequence[str] | None = None) -> None:
    """Convert."""
    args = argument_parser().parse_args(argv)
    args.output = check_output_path(args.output, "OUT")
    output: Path = args.output.resolve()
    config_file, token_file = output.with_suffix(".yaml"), output.with_suffix(".class_token.safetensors")
    if output.suffix not in SUFFIXES:
        raise ReclipError(f"{args.output}: the output must end in .pth or .safetensors")
    for path in (output, config_file, token_file):
        if path.exists() and not args.overwrite:
            raise ReclipError(f"{path} exists: add --overwrite, or name another output")

    checkpoint = read_public_checkpoint(args.checkpoint)
    class_token = choose_class_token(args, checkpoint.class_token)
    class_names = class_names_of(args.dataset) if args.dataset else [[name] for name in read_names(args.class_names)]
    check_class_names(class_names)
    if len(class_names) != checkpoint.num_classes:
        raise ReclipError(f"{args.checkpoint} has {checkpoint.num_classes} classes, the class list {len(class_names)}")

    reference_names = read_names(args.reference_names) if args.reference_names else []
    keys = compatibility_keys(
        checkpoint, str(token_file) if class_token is not None else "", reference_names, args.image_activation
    )
    merge(keys, {"MODEL": {"CLIP": {"NAME": args.clip, "PRETRAINED": args.pretrained}, "WEIGHTS": str(output)}})
    if args.dataset:
        merge(keys, {"DATASETS": {"TEST": [args.dataset]}})

    with tempfile.TemporaryDirectory() as folder:
        opts = [part for item in flatten(keys).items() for part in item]
        if class_token is not None:
            temporary = Path(folder) / token_file.name
            save_safetensors({"class_embedding": class_token}, temporary)
            opts += ["MODEL.CLIP.CLASS_TOKEN", str(temporary)]
        cfg = load_config("", opts)
        backbone = build_clip_backbone(cfg)
        head = build_bias_head(cfg, backbone, [names[0] for names in class_names])
        modules = nn.ModuleDict({"bias_head": head})
        if cfg.MODEL.MASK_DECODER.ENABLED:
            modules["mask_decoder"] = MaskDecoder(cfg, backbone.embed_dim, len(class_names))
    check_fits(checkpoint, modules, args.checkpoint)
    statistics = (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    identity = json.dumps(checkpoint_identity(backbone, class_names, cfg.MODEL.CLIP.TEMPLATES, head, statistics))

    if class_token is not None:
        with atomic_write(token_file) as path:
            save_safetensors({"class_embedding": class_token}, path)
    save(output, checkpoint.state, identity)
    with atomic_write(config_file) as path:
        path.write_text(
            f"# Written by tools/convert_public_checkpoint.py: the public {checkpoint.model} code with {output.name}.\n"
            + yaml.safe_dump({**keys, "VERSION": 2}, sort_keys=False),
            encoding="utf-8",
        )
    print(f"wrote {output}, {config_file.name}{f', {token_file.name}' if class_token is not None else ''}")


if __name__ == "__main__":
    main()
