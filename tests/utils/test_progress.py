"""Progress events: reports of a stage, their listeners, and their text."""

import math
import os
import pty
import select
import sys

import pytest

from reclip_d2.utils import progress as module
from reclip_d2.utils.progress import Progress, ProgressBars, count_steps, duration_in_words, report_to, say


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the test moves it."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def events():
    """What is reported in the test."""
    heard = []
    with report_to(heard.append):
        yield heard


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Progress("hypotheses"), "hypotheses ..."),
        (Progress("rectification", message="done before"), "rectification: done before"),
        (Progress("masks", 1, 3), "masks: 1 of 3 images (33 %)"),
        (Progress("masks", 1, 1), "masks: 1 of 1 image (100 %)"),
        (Progress("file hashes", 512, 2048, "MiB"), "file hashes: 512 of 2,048 MiB (25 %)"),
        (Progress("rectification", 999, 4000, "iteration", "loss 3.141", 7300.0),
         "rectification: 999 of 4,000 iterations (24 %), loss 3.141, about 2 h left"),
    ],
)  # fmt: skip
def test_events_as_text(event, line):
    assert str(event) == line


def test_durations_in_words():
    words = {0: "1 s", 40.4: "40 s", 89: "89 s", 95: "2 min", 60 * 75: "75 min", 3600 * 3 + 60 * 21: "3 h 20 min",
             3600 * 5: "5 h", 3600 * 52: "2 days 4 h", 3600 * 48: "2 days"}  # fmt: skip
    assert {seconds: duration_in_words(seconds) for seconds in words} == words
    assert [duration_in_words(3600 + 60 * minutes, step=1) for minutes in (29, 31, 60)] == [
        "89 min",
        "1 h 31 min",
        "2 h",
    ]


def test_steps_are_reported_with_the_time_that_is_left(clock, events):
    with count_steps("training", 10, unit="iteration", done=4) as steps:
        for _ in range(6):
            clock[0] += 2
            steps.advance(message="loss 1")
    assert [event.done for event in events] == [4, 5, 6, 7, 8, 9, 10]
    # Two seconds for each that was made now; the first event cannot know it, the last has nothing left.
    left = [event.seconds_left for event in events]
    assert left[0] is None and left[1:-1] == pytest.approx([10, 8, 6, 4, 2]) and left[-1] is None
    assert [event.ended for event in events] == [False] * 6 + [True]
    assert events[-1] == Progress("training", 10, 10, "iteration", "loss 1", None, ended=True)


def test_recent_steps_weigh_more(clock, events):
    """After a load on the machine ends, the estimate follows within a few steps."""
    with count_steps("training", 200) as steps:
        for seconds in [10] * 30 + [1] * 120:
            clock[0] += seconds
            steps.advance()
    # By weight, 1 - 1/e^2 of the time is in steps of a second, the rest in steps of ten.
    assert events[30].done == 30 and events[30].seconds_left == pytest.approx(170 * 10)
    before, after = math.exp(-120 / 60), 1 - math.exp(-120 / 60)
    assert events[-2].done == 150
    assert events[-2].seconds_left == pytest.approx(50 / (before / 10 + after), rel=0.05)


def test_many_steps_are_reported_by_the_hundredth_or_every_ten_seconds(clock, events):
    with count_steps("masks", 10_000) as steps:
        for _ in range(10_000):
            clock[0] += 0.05
            steps.advance()
    assert len(events) == 1 + 100 and [event.done for event in events[:3]] == [0, 100, 200]
    events.clear()
    with count_steps("masks", 10_000) as steps:
        for _ in range(5):
            clock[0] += 4
            steps.advance()
    assert [event.done for event in events] == [0, 3, 5]  # after 12 s, and at the end
    events.clear()
    with count_steps("masks", 50) as steps:
        for _ in range(50):
            steps.advance()  # in no time
    assert [event.done for event in events] == [0, 50]


def test_a_failure_ends_the_count(events):
    with pytest.raises(ValueError, match="broken"), count_steps("images", 3) as steps:
        steps.advance()
        raise ValueError("broken")
    assert events[-1] == Progress("images", 1, 3, ended=True)
    assert [event.ended for event in events].count(True) == 1


def test_nothing_to_count(events):
    with count_steps("images", 0), count_steps("hypotheses", 5, silent=True) as steps:
        steps.advance(5)
    assert events == []


def test_listeners_are_nested_and_come_back(capsys):
    outer, inner = [], []
    with report_to(outer.append):
        with report_to(inner.append):
            say("masks")
        with report_to(None):
            say("formats")
        say("masks", "done before")
    assert [str(event) for event in inner] == ["masks ..."] and [str(event) for event in outer] == [
        "masks: done before"
    ]
    written = capsys.readouterr()
    assert written.out == written.err == ""


def test_print_is_a_listener(capsys):
    with report_to(print), count_steps("masks", 1) as steps:
        steps.advance()
    assert capsys.readouterr().out == "masks: 0 of 1 image (0 %)\nmasks: 1 of 1 image (100 %)\n"


def test_what_a_listener_raises_ends_the_work():
    def stop(event):
        raise KeyboardInterrupt

    with report_to(stop), pytest.raises(KeyboardInterrupt), count_steps("masks", 1):
        raise AssertionError("goes on")


def test_lines_in_a_log(capsys, clock):
    """No bars and no escape codes: a line at the end of a stage, and every 30 seconds of it."""
    with count_steps("images", 2) as steps:
        steps.advance(2)
    assert capsys.readouterr().err == "images: 2 of 2 images (100 %)\n"
    bars = ProgressBars()
    for seconds in range(0, 100, 10):
        clock[0] = seconds
        bars(Progress("masks", seconds, 100, message="loss 2"))
    bars(Progress("formats", 0, 2))
    bars(Progress("formats"))
    bars(Progress("formats", 1, 2, ended=True))
    bars.close()
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.splitlines() == [
        *(f"masks: {k} of 100 images ({k} %), loss 2" for k in (30, 60, 90)),
        "formats: 1 of 2 images (50 %)",
    ]


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard error a pseudo-terminal; returns a function for what was written to it. To be called in the test:
    pytest sets standard error after the fixtures."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    stream = open(slave, "w")

    def begin():
        monkeypatch.setattr(sys, "stderr", stream)

        def read() -> str:
            stream.flush()
            parts = []
            while select.select([master], [], [], 0.1)[0]:  # one read may return a part of it
                parts.append(os.read(master, 1 << 20))
            return b"".join(parts).decode()

        return read

    yield begin
    monkeypatch.undo()
    stream.close()
    os.close(master)


def test_bars_in_a_terminal(terminal):
    read = terminal()
    bars = ProgressBars()
    bars(Progress("masks", 0, 4))
    bars(Progress("masks [1/2]", 3, 4, message="loss [2]", seconds_left=20.0))
    bars(Progress("masks [1/2]", 4, 4, ended=True))
    text = read()
    assert "\x1b[" in text and "masks" in text and "4/4 images" in text and "━" in text
    assert "\n" in text and "\x1b[?25h" in text  # a bar stays, and the cursor is shown again
    bars(Progress("formats", 1, 2))
    bars.close()
    assert "1/2 images" in read()


def test_a_terminal_without_a_cursor_gets_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    read = terminal()
    with count_steps("images", 2) as steps:
        steps.advance(2)
    assert read() == "images: 2 of 2 images (100 %)\r\n"


def test_without_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    ProgressBars()(Progress("masks", 4, 4, ended=True))
    assert capsys.readouterr().out == ""
