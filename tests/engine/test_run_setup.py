"""A run's log: no colours in files, the config and the model at the debug level only, one log a run."""

import argparse
import io
import logging

import pytest
import torch
import yaml
from torch import nn

from reclip_d2.config import load_config
from reclip_d2.engine import run_setup
from reclip_d2.engine.run_setup import describe_model, log_to, set_up_run
from reclip_d2.errors import ReclipError


@pytest.fixture(autouse=True)
def usual_logging(monkeypatch):
    monkeypatch.setattr(run_setup, "collect_env_info", lambda: "none")  # a second, for compilers


def config(folder, *keys):
    cfg = load_config("", ["OUTPUT_DIR", str(folder), "SEED", "5", *keys])
    cfg.freeze()
    return cfg


def test_a_run(tmp_path, capsys):
    cfg = config(tmp_path / "a" / "b")
    set_up_run(cfg, argparse.Namespace(eval_only=True, config_file=""))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    logging.getLogger("fvcore.common.checkpoint").info("\x1b[34mweights\x1b[0m of \x1b[1;31mred\x1b[0m")
    logging.getLogger("detectron2.engine").warning("careful")
    describe_model(nn.Linear(1000, 100).requires_grad_(False))
    folder = tmp_path / "a" / "b"
    text, out = (folder / "log.txt").read_text(), capsys.readouterr().out
    assert "\x1b" not in text + out and "weights of red" in text and "weights of red" in out
    assert "detectron2.engine WARNING: careful" in text
    assert "Linear, 0.00 M of 0.10 M weights train" in text and "in_features" not in text
    assert "POLY_POWER" not in text and "POLY_POWER" not in out
    assert yaml.safe_load((folder / "config.yaml").read_text())["SEED"] == 5


def test_the_debug_level(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RECLIP_LOG_LEVEL", "debug")
    set_up_run(config(tmp_path), argparse.Namespace(eval_only=True))
    describe_model(nn.Linear(2, 3))
    text = (tmp_path / "log.txt").read_text()
    assert "POLY_POWER" in text and "in_features=2" in text
    monkeypatch.setenv("RECLIP_LOG_LEVEL", "loud")
    with pytest.raises(ReclipError, match="RECLIP_LOG_LEVEL is 'LOUD'"):
        log_to(tmp_path)


def test_the_next_run_has_a_log_of_its_own(tmp_path, capsys):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        log_to(tmp_path / name)
        logging.getLogger("reclip_d2.x").info("in the %s", name)
    assert (tmp_path / "first" / "log.txt").read_text().count("in the") == 1
    assert capsys.readouterr().out.count("in the second") == 1
    log_to(tmp_path / "second", rank=3)
    logging.getLogger("reclip_d2.x").info("of a rank")
    assert "of a rank" in (tmp_path / "second" / "log.txt.rank3").read_text()
    assert "of a rank" not in capsys.readouterr().out


def test_a_terminal_has_colours(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    log_to(tmp_path)
    logging.getLogger("reclip_d2.x").warning("careful")
    assert "\x1b[31mWARNING" in terminal.getvalue() and "careful" in terminal.getvalue()
    assert "\x1b" not in (tmp_path / "log.txt").read_text()
