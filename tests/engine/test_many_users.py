"""Many users of one engine: each gets the answer that it would get alone, and nothing is left behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from covering import rarely
from many_users import KINDS, Users, resident_bytes


@pytest.mark.parametrize("seconds", [25, *rarely(120)])
def test_each_of_64_is_answered_as_if_alone(seconds: float, tiny_ir: Callable[[str], Path]) -> None:
    users = Users.on(tiny_ir("llama"))
    users.learn()
    users.run(64, 0, lambda n: n < 400)  # kernels for every number of rows, and as many threads as there will be
    before, begin = resident_bytes(), time.monotonic()
    users.run(64, 1, lambda n: n < 2000 or time.monotonic() - begin < seconds)
    assert not users.wrong, users.wrong[:5]
    assert set(users.done) == set(KINDS)
    assert users.done.total() >= 2000
    assert not any(users.left().values()), users.left()
    # What 2000 requests leave behind would be more: the KV of one of 100 tokens takes 50 KB.
    assert resident_bytes() - before < 24 << 20
