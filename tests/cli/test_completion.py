"""``reclip completion``: the parser is given to shtab (a stand-in), and a missing shtab is named."""

import sys
import types

import pytest

from reclip_d2.cli.arguments import COMMANDS, COMPLETION_SHELLS
from reclip_d2.cli.main import main


def completion(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["completion", *arguments])
    assert stop.value.code == 0


@pytest.mark.parametrize("shell", COMPLETION_SHELLS)
def test_the_script_is_of_the_whole_command(shell, monkeypatch, capsys):
    seen = []

    def complete(parser, shell):
        seen.append((parser, shell))
        return "# script"

    monkeypatch.setitem(sys.modules, "shtab", types.SimpleNamespace(complete=complete))
    completion(shell)
    ((parser, given),) = seen
    assert capsys.readouterr().out == "# script\n" and given == shell and parser.prog == "reclip"
    assert set(COMMANDS) <= set(parser.format_help().replace("{", " ").replace(",", " ").replace("}", " ").split())


def test_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as stop:
        main(["completion", "bash"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: shtab is not installed: pip install 'reclip_d2[completion]'\n"
