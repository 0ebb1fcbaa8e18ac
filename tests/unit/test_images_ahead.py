"""Images for generation are made ahead of the model: one batch, not more; and a storage that is silent ends a batch at once."""

from __future__ import annotations

import threading

import pytest

from raysft.errors import StorageFailed
from raysft.generate.engines.bisection import complete
from raysft.generate.engines.media import ahead

SECONDS = 20.0


def test_one_batch_is_made_while_the_one_before_is_used():
    made = [threading.Event() for _ in range(4)]

    def make(number: int) -> int:
        made[number].set()
        return -number

    batches = ahead(make, range(4))
    assert not any(each.is_set() for each in made), "nothing before it is asked for"
    for number in range(4):
        assert next(batches) == -number
        assert all(each.wait(SECONDS) for each in made[: number + 2])
        assert not any(each.is_set() for each in made[number + 2 :])
    assert next(batches, None) is None


def test_what_cannot_be_made_is_raised_where_it_is_used():
    def make(number: int) -> int:
        return 6 // number

    batches = ahead(make, [3, 0, 2])
    assert next(batches) == 2
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_a_storage_that_does_not_answer_is_not_asked_again_for_each_half_of_a_batch():
    class Silent:
        calls = 0
        steps = 0

        def complete(self, ids, prompts, media=()):
            self.calls += 1
            raise StorageFailed("s3://b: no answer")

    engine = Silent()
    with pytest.raises(StorageFailed, match="s3://b: no answer"):
        complete(engine, list("abcd"), [[1]] * 4)
    assert engine.calls == 1
