"""Many forwards at once, or one change of the pool."""

import contextlib
import pickle
import sys
import threading
import time

import pytest

from phatgoose.errors import RoutingError
from phatgoose.nn import PoolLock

SOON = 5.0  # seconds that nothing here should take


def start(run, *arguments):
    thread = threading.Thread(target=run, args=arguments, daemon=True)
    thread.start()
    return thread


def is_waiting(thread):
    thread.join(0.05)
    return thread.is_alive()


def change(lock, done=None):
    with lock.changing("a change"):
        if done is not None:
            done.append(lock.version)


def test_readers_are_together_and_a_change_is_alone():
    lock, inside, worst = PoolLock(), [0, 0], []

    def read():
        for _ in range(50):
            with lock.reading():
                inside[0] += 1
                worst.append(inside[1])
                inside[0] -= 1

    def write():
        for _ in range(50):
            with lock.changing("a change"):
                inside[1] += 1
                time.sleep(0)
                inside[1] -= 1

    threads = [start(read) for _ in range(4)] + [start(write) for _ in range(2)]
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert not any(worst)
    assert lock.version == 100


def test_a_change_waits_and_those_who_come_after_it_wait_for_it():
    lock, done = PoolLock(), []
    with lock.reading():
        changing = start(change, lock, done)
        assert is_waiting(changing)
        late = start(lambda: lock.reading().__enter__())
        assert is_waiting(late)
        with lock.reading():  # a forward inside a forward
            assert not done
    changing.join(SOON)
    assert done == [0]
    late.join(SOON)
    assert not late.is_alive()


def test_a_change_from_inside_a_forward_is_refused_rather_than_awaited():
    lock = PoolLock()
    with lock.reading(), pytest.raises(RoutingError, match="a change: called from inside"):
        change(lock)
    change(lock)
    assert lock.version == 1


def test_a_change_may_run_the_base_and_be_part_of_another():
    lock = PoolLock()
    with lock.changing("one"), lock.reading(), lock.reading():
        pass
    with lock.changing("one"), lock.changing("two"):
        assert lock.version == 1
    assert lock.version == 2


def test_a_change_that_fails_lets_the_others_go_on():
    lock = PoolLock()
    with contextlib.suppress(ZeroDivisionError), lock.changing("one"):
        1 / 0  # noqa: B018
    assert not is_waiting(start(change, lock))
    with lock.reading():
        pass


def test_a_reader_that_never_said_it_left_is_forgotten():
    lock = PoolLock()

    def interrupted():
        lock.enter(sys._getframe())

    interrupted()
    change(lock)  # by the same thread, which reads no more
    thread = start(interrupted)
    thread.join()
    changing = start(change, lock)
    changing.join(SOON)
    assert not changing.is_alive()
    interrupted()
    with lock.reading():
        pass
    assert not is_waiting(start(change, lock))


def test_a_copy_is_a_lock_of_its_own():
    lock = PoolLock()
    with lock.reading():
        for other in (pickle.loads(pickle.dumps(lock)),):
            change(other)
