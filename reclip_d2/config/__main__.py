"""Print a config: the values of its files and overrides, with the source of each.

    python -m reclip_d2.config --config-file configs/datasets/voc20.yaml \\
        --config-file configs/methods/reclip_rectify.yaml SEED 3

The output is YAML that ``--config-file`` accepts.
"""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from reclip_d2.config.checks import value_at
from reclip_d2.config.files import ConfigFiles, add_config_file_argument
from reclip_d2.config.load import load_config
from reclip_d2.errors import exit_on_error


def argument_parser() -> argparse.ArgumentParser:
    """Arguments of the program."""
    parser = argparse.ArgumentParser(prog="python -m reclip_d2.config", description=__doc__.splitlines()[0])
    add_config_file_argument(parser)
    parser.add_argument("--all", action="store_true", help="print all keys, including Detectron2's, without sources")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="overrides; must come last"
    )
    return parser


@exit_on_error
def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    args = argument_parser().parse_args(arguments)
    cfg = load_config(args.config_file, args.opts)
    if args.all:
        print(cfg.dump(), end="")
        return
    sources = {key: value.source for key, value in ConfigFiles(args.config_file).values.items() if value.value != {}}
    sources |= dict.fromkeys(args.opts[::2], "command line")
    print("\n".join(_lines({key: (value_at(cfg, key), source) for key, source in sources.items()})))


def _lines(values: dict[str, tuple[Any, str]]) -> list[str]:
    """YAML of ``{full key: (value, source)}``, with the source of each value in a comment."""
    lines: list[str] = []
    above: list[str] = []
    for key in sorted(values):
        value, source = values[key]
        *nodes, leaf = key.split(".")
        shared = next(
            (i for i, (a, b) in enumerate(zip(nodes, above, strict=False)) if a != b), min(len(nodes), len(above))
        )
        lines += [f"{'  ' * depth}{nodes[depth]}:" for depth in range(shared, len(nodes))]
        text = (
            yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
            .removesuffix("...\n")
            .strip()
        )
        lines.append(f"{'  ' * len(nodes)}{leaf}: {text}  # {source.removeprefix('config file ')}")
        above = nodes
    return lines


if __name__ == "__main__":
    main()
