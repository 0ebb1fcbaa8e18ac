"""Reading one step's rows ahead."""

import itertools
import threading

import pytest

from raysft.train.read_ahead import ReadAhead


def test_items_come_in_order_and_none_after_the_last():
    with ReadAhead(iter([1, 2, 3])) as items:
        assert [items.take() for _ in range(5)] == [1, 2, 3, None, None]


def test_one_item_is_read_ahead_and_no_more():
    read = []
    with ReadAhead(read.append(number) or number for number in itertools.count()) as items:
        items.wait(60)
        assert items.ready
        assert not items.failed
        assert read == [0]
        assert items.take() == 0
        items.wait(60)
        assert read == [0, 1]


def test_what_reading_raises_is_raised_where_the_item_is_taken():
    def broken():
        yield 1
        raise OSError("the disk is gone")

    with ReadAhead(broken()) as items:
        assert items.take() == 1
        items.wait(60)
        assert items.ready, "nobody must wait for what does not come"
        assert items.failed
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                items.take()


def test_a_wait_ends_in_time_and_loses_nothing():
    may_go = threading.Event()
    with ReadAhead(may_go.wait(60) and 7 for _ in range(1)) as items:
        items.wait(0.01)
        assert not items.ready
        may_go.set()
        assert items.take() == 7
