"""A thread that prepares adapters rests while steps run, and nobody else does; some of its work waits for the step."""

import threading
import time
from collections.abc import Callable

from flora_vllm.pacing import REST_S, WORK_S, Turns, pace, pace_while


def _in_thread(work: Callable[[], None]) -> float:
    """Seconds that `work` took in a thread of its own."""
    took = []

    def run() -> None:
        begin = time.perf_counter()
        work()
        took.append(time.perf_counter() - begin)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return took[0]


def _work(seconds: float) -> None:
    """CPU time of this thread, with a `pace()` every now and then."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pace()


def _paced(busy: bool) -> None:
    pace_while(lambda: busy)
    _work(20 * WORK_S)


def test_it_rests_while_steps_run():
    # Whatever the machine does beside, so many rests take at least so long.
    assert _in_thread(lambda: _paced(True)) > 15 * REST_S


def test_it_does_not_rest_otherwise():
    turns, naps = Turns(), []
    with turns.step():
        assert turns.steps_run()
    assert turns.steps_run(), "the next step is expected"
    turns._last_step -= 10
    assert not turns.steps_run()

    def work() -> None:
        pace_while(lambda: naps.append(turns.steps_run()) or naps[-1])
        _work(5 * WORK_S)

    _in_thread(work)
    assert naps
    assert not any(naps)


def test_other_threads_are_not_paced():
    asked = []
    _in_thread(lambda: pace_while(lambda: asked.append(1) is None))
    _work(5 * WORK_S)
    assert not asked


def test_no_step_runs_beside_what_is_between_steps():
    turns, ended = Turns(), []

    def between() -> None:
        with turns.between_steps():
            ended.append("between")

    thread = threading.Thread(target=between)
    with turns.step():
        thread.start()
        time.sleep(0.05)
        ended.append("step")
    thread.join(10)
    assert ended == ["step", "between"]
