"""Progress of a training (``reclip_d2.workspace.training``)."""

from types import SimpleNamespace

from reclip_d2.utils.progress import report_to
from reclip_d2.workspace.training import ReportProgress


def test_progress_follows_an_end_that_is_brought_forward():
    """Of 400 iterations, a plateau after 100 leaves 140."""
    events = []
    hook = ReportProgress("rectification")
    history = SimpleNamespace(median=lambda size: 1.5)
    hook.trainer = SimpleNamespace(
        max_iter=400, start_iter=0, iter=0, storage=SimpleNamespace(history=lambda name: history)
    )
    with report_to(events.append):
        hook.before_train()
        for hook.trainer.iter in range(140):
            if hook.trainer.iter == 99:
                hook.trainer.max_iter = 140
            hook.after_step()
        hook.after_train()
    assert (events[0].done, events[0].total) == (0, 400)
    last = events[-1]
    assert (last.done, last.total, last.ended, last.message) == (140, 140, True, "loss 1.500")
    assert sum(event.ended for event in events) == 1
    assert {event.total for event in events if event.done > 100} == {140}
