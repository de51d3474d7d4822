"""Progress events: reports of a stage, their listeners, and their text."""

import math

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


def test_bars(capsys):
    """One bar per stage on standard error, each ended by a newline: without a listener, or with this one."""
    with count_steps("images", 2) as steps:
        steps.advance(2)
    err = capsys.readouterr().err
    assert "images: 100%" in err and "2/2" in err and err.endswith("\n")
    bars = ProgressBars()
    for event in (Progress("masks", 0, 4), Progress("masks", 3, 4, message="loss 2"), Progress("formats", 0, 2)):
        bars(event)
    bars.close()
    written = capsys.readouterr()
    assert written.out == "" and "masks:" in written.err and "formats:" in written.err
    assert "loss 2" in written.err and "3/4" in written.err and written.err.endswith("\n")
