"""The command itself: help, exit statuses, and error messages."""

import subprocess
import sys
from pathlib import Path

import pytest

from reclip_d2.app.guard import Limits
from reclip_d2.cli import arguments as cli_arguments
from reclip_d2.cli.arguments import COMMANDS
from reclip_d2.cli.main import main, missing_package
from reclip_d2.config.files import configs_folder
from reclip_d2.export import export, int8
from reclip_d2.workspace import options, stage_config
from reclip_d2.workspace.options import in_options


def test_help_names_all_commands(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: reclip {command}" in capsys.readouterr().out


def test_arguments_are_parsed_without_the_libraries(tmp_path):
    """Help and errors appear immediately: importing torch takes seconds."""
    lines = [
        "import sys",
        "from reclip_d2.cli.main import main",
        "for line in ('--help', 'segment --help', 'app --help', 'predict', 'segment --tile x', 'none'):",
        "    try:",
        "        main(line.split())",
        "    except SystemExit:",
        "        pass",
        "print('LOADED', sorted({name.partition('.')[0] for name in sys.modules} & set(sys.argv[1:])))",
    ]
    libraries = ["torch", "torchvision", "numpy", "PIL", "detectron2", "fvcore", "open_clip", "yaml", "scipy", "tqdm"]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), *libraries],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "LOADED []"


def test_names_that_arguments_offer_are_those_of_the_library():
    assert tuple(export.FORMATS) == cli_arguments.EXPORT_FORMATS
    assert tuple(export.INPUT_TYPES) == cli_arguments.EXPORT_INPUT_TYPES
    assert export.ExportOptions.tolerance == cli_arguments.EXPORT_TOLERANCE
    assert tuple(int8.METHODS) == cli_arguments.INT8_METHODS
    defaults = int8.Int8Options()
    assert (defaults.method, defaults.min_agreement) == (cli_arguments.INT8_METHOD, cli_arguments.INT8_AGREEMENT)
    assert (Limits.pixels, Limits.file_bytes) == (
        cli_arguments.APP_MEGAPIXELS * 1_000_000,
        cli_arguments.APP_MEGABYTES * 2**20,
    )
    for method in options.METHODS:
        for kind in options.TITLES:
            assert (configs_folder() / "methods" / stage_config.method_file(kind, method)).is_file()


@pytest.mark.parametrize("arguments", [[], ["train"], ["segment"], ["segment", "--fast", "--student"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "usage: reclip" in capsys.readouterr().err


def test_module():
    result = subprocess.run(
        [sys.executable, "-m", "reclip_d2", "predict", "none", "--model", "none", "--output", "other"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert result.returncode == 1 and result.stdout == ""
    assert (
        result.stderr.startswith("error: --model none is neither an output folder") and result.stderr.count("\n") == 1
    )


def test_keys_become_options():
    message = "MODEL.CLIP.PRETRAINED x is of another model: set MODEL.CLIP.NAME"
    assert in_options(message) == "--pretrained x is of another model: set --clip"


def test_packages_that_are_missing():
    assert "module tqdm is not installed" in str(missing_package(ModuleNotFoundError("none", name="tqdm.auto")))
    assert "detectron2._C is not installed" in str(missing_package(ModuleNotFoundError("none", name="detectron2._C")))
    for name in ("reclip_d2.no_such_module", None):  # a bug of ours
        error = ModuleNotFoundError("none", name=name)
        with pytest.raises(ModuleNotFoundError) as caught:
            missing_package(error)
        assert caught.value is error
