"""A worker of the demo does what it is ordered to."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.engine


class Engine:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def generate(self, prompt: Sequence[int], max_new_tokens: int, **more: Any) -> Any:
        raise AssertionError("nobody asks here")

    def flush(self) -> None:
        self.done.append("flush")

    def forget(self) -> None:
        self.done.append("forget")


def desk(engine: Engine, look_up: Any = None, delete: Any = None) -> Any:
    from worker.demo.answerer import Desk

    return Desk(engine, look_up, delete)


def test_a_look_up_says_tokens_and_cells() -> None:
    asked = []

    def look_up(prompt: Sequence[int], boundaries: Sequence[int]) -> Any:
        asked.append((prompt, boundaries))
        return SimpleNamespace(tokens=70, nodes=np.zeros((3, 2), np.int32))

    order = {"do": "look_up", "prompt": [1, 2], "boundaries": [1]}
    assert desk(Engine(), look_up).obey(order) == {"tokens": 70, "cells": 6}
    assert asked == [([1, 2], [1])]


def test_what_lies_behind_the_document_is_deleted() -> None:
    deleted = []

    def delete(prompt: Sequence[int], start: int) -> None:
        deleted.append((prompt, start))

    order = {"do": "delete", "prompt": [1, 2, 3], "start": 2}
    assert desk(Engine(), delete=delete).obey(order) == {}
    assert deleted == [([1, 2, 3], 2)]


def test_without_a_tier_nothing_is_held_or_deleted() -> None:
    order = {"do": "look_up", "prompt": [1, 2], "boundaries": [1]}
    assert desk(Engine()).obey(order) == {"tokens": 0, "cells": 0}
    assert desk(Engine()).obey({"do": "delete", "prompt": [1, 2], "start": 1}) == {}


def test_orders_reach_the_engine_and_unknown_ones_are_refused() -> None:
    engine = Engine()
    worker = desk(engine)
    assert worker.obey({"do": "flush"}) == worker.obey({"do": "forget"}) == {}
    assert engine.done == ["flush", "forget"]
    with pytest.raises(ValueError, match="does not know 'dance'"):
        worker.obey({"do": "dance"})
