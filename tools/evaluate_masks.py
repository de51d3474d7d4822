#!/usr/bin/env python
"""Score any system's masks on a registered data set, by the evaluator of this project.

    python tools/evaluate_masks.py masks/ --dataset voc20_val                    # pixels are the data set's class ids
    python tools/evaluate_masks.py masks/ --dataset voc20_val --names names.txt  # ids in the order of a list of names
    python tools/evaluate_masks.py clusters/ --dataset voc20_val --hungarian     # clusters without names

One index PNG per image, with the image's name; 255 (65535 in 16 bits) means no class and is wrong for every label.
Clusters are matched to classes by means of the labels: one to one (--hungarian), or each to its most frequent class
(--match many-to-one). Such scores use labels, and scores of named classes do not: compare each with its own kind.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
import dataclasses
import json
import math
from pathlib import Path

import reclip_d2.data.datasets  # noqa: F401  (registers the data sets)
from reclip_d2.data.class_file import read_class_file
from reclip_d2.data.classes import check_registered
from reclip_d2.data.mask_files import SIZE_RULES, MaskFiles
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.evaluation.folder_scores import FolderEvaluation, FolderScores, class_ids
from reclip_d2.evaluation.label_evaluator import plain_json
from reclip_d2.evaluation.matching import MATCHINGS
from reclip_d2.utils.files import check_output_file
from reclip_d2.utils.io import atomic_write


def argument_parser() -> argparse.ArgumentParser:
    """Arguments of the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", help="folder of index PNGs")
    parser.add_argument("--dataset", required=True, help="registered data set with labels")
    parser.add_argument("--names", help="class file with the names of the ids, in order; unknown names are no class")
    parser.add_argument(
        "--suffix", default="", help="what the masks' names have after the images': _pred for a_pred.png"
    )
    parser.add_argument("--size", choices=SIZE_RULES, default="same", help="masks of another size than their image")
    parser.add_argument("--match", choices=MATCHINGS, default="", help="the ids are clusters: match them to classes")
    parser.add_argument(
        "--hungarian", action="store_const", const=MATCHINGS[0], dest="match", help=f"same as --match {MATCHINGS[0]}"
    )
    parser.add_argument("--match-by", choices=("pixels", "iou"), default="pixels", help="what --hungarian maximises")
    parser.add_argument("--bias", action="store_true", help="also measure the space-preference bias")
    parser.add_argument("--json", help="file for the results")
    return parser


def report(scores: FolderScores) -> str:
    """The scores as text for the terminal."""
    lines = [f"{name:<24} {value:6.2f}" for name, value in scores.ious.items() if not math.isnan(value)]
    lines += ["", *(f"{name:<24} {value:6.2f}" for name, value in scores.scores.items())]
    lines.append(f"{'class preference':<24} {scores.class_preference:6.3f}")
    if scores.space_preference:
        space = scores.space_preference
        lines.append(f"{'space preference':<24} {space['score']:6.2f} +- {space['standard_error']:.2f}")
    if scores.without_class:
        lines.append(f"{100 * scores.without_class:.1f} % of the labelled pixels have no predicted class: wrong")
    if scores.clusters is not None:
        pairs = ", ".join(f"{k} {name or 'none'}" for k, name in enumerate(scores.clusters))
        lines.append(f"clusters, matched by labels: {pairs}")
    return "\n".join(lines)


@exit_on_error
def main(arguments: list[str] | None = None) -> None:
    """See the module."""
    args = argument_parser().parse_args(arguments)
    if args.json:
        check_output_file(args.json, "--json")
    if args.match and args.names:
        raise ReclipError("--names is for ids that are classes, --match and --hungarian for clusters: give one of them")
    check_registered(args.dataset)
    names = read_class_file(args.names, "--names").model_classes if args.names else None
    ids = None if args.match else class_ids(args.dataset, names)
    masks = MaskFiles(args.folder, ids=ids, suffix=args.suffix, size_rule=args.size)
    scores = FolderEvaluation(args.dataset, masks).evaluate(args.match, args.match_by, args.bias)
    print(f"{args.folder} on {args.dataset}, {scores.images} images; percent")
    print(report(scores))
    if args.json:
        result = {
            "dataset": args.dataset,
            "folder": str(args.folder),
            "match": args.match,
            **dataclasses.asdict(scores),
        }
        with atomic_write(Path(args.json)) as temporary:
            temporary.write_text(json.dumps(plain_json(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
