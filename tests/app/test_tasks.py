"""Visitors' requests: queued and stopped."""

import threading
import time

import pytest

from reclip_d2.app.tasks import Task, TaskStopped, TaskSuperseded, Turns, Visitors


def test_turns_are_in_order():
    """Who holds the turn again and again lets those in who asked in between, in their order."""
    turns, order = Turns(), []
    waiting = [threading.Event() for _ in range(3)]

    def once(number):
        waiting[number].set()
        with Task(turns).turn():
            order.append(number)

    threads = [threading.Thread(target=once, args=(number,)) for number in range(3)]
    greedy = Task(turns)
    with greedy.turn():
        for thread, event in zip(threads, waiting, strict=True):
            thread.start()
            assert event.wait(10)
            time.sleep(0.05)  # until it is in the queue
    with greedy.turn():
        order.append("greedy")
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, "greedy"]


def test_one_at_a_time():
    turns, inside, most = Turns(), 0, 0
    lock = threading.Lock()

    def work():
        nonlocal inside, most
        for _ in range(50):
            with Task(turns).turn():
                with lock:
                    inside += 1
                    most = max(most, inside)
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == 1 and inside == 0


def test_a_waiting_task_is_stopped():
    turns, task, ends = Turns(), None, []
    task = Task(turns)

    def wait():
        with pytest.raises(TaskStopped), task.turn():
            raise AssertionError("it was not stopped")
        ends.append(True)

    with Task(turns).turn():
        thread = threading.Thread(target=wait)
        thread.start()
        task.stop()
        thread.join(10)
        assert ends == [True]
    with Task(turns).turn():  # the queue is in order
        pass


def test_the_turn_is_given_back_after_an_error():
    turns = Turns()
    with pytest.raises(ZeroDivisionError), Task(turns).turn():
        raise ZeroDivisionError
    with Task(turns).turn():
        pass


def test_a_newer_request_ends_the_older():
    visitors = Visitors()
    with visitors.task("one") as first, visitors.task("two") as other:
        with visitors.task("one") as second:
            with pytest.raises(TaskSuperseded):
                first.check()
            second.check()
            other.check()
        assert not visitors.stop("one")  # the older one's end takes nothing of the newer one's place
        assert visitors.stop("two") and not visitors.stop("nobody")
        with pytest.raises(TaskStopped):
            other.check()
    assert not visitors.stop("two")


def test_requests_of_nobody_end_together():
    visitors = Visitors()
    with visitors.task() as nobody, visitors.task() as another, visitors.task("one") as one:
        nobody.check()
        visitors.stop_all()
        another.check()  # nobody waits for it, and nobody can stop it
        with pytest.raises(TaskStopped):
            one.check()
