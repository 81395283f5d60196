"""One inference worker of the demo: a process of its own that answers prompts.

It reads one JSON object per line and answers with one. ``worker.demo.worker_process`` is the
other end.

    {"do": "ask", "prompt": [ids], "boundaries": [n], "new_tokens": n}
        -> {"tokens": [ids], "report": {...}}
    {"do": "look_up", "prompt": [ids], "boundaries": [n]}
        -> {"tokens": n, "cells": n}    what the tier holds of it
    {"do": "delete", "prompt": [ids], "start": n}
        -> {}    the tier holds nothing of it any more that lies behind its first n tokens
    {"do": "flush"}    -> {}    once the tier has everything
    {"do": "forget"}   -> {}    the engine's own cache is empty then
"""

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import click
import torch
from transformers import PreTrainedModel

from kvstore.client import Samovar
from kvstore.clock import SystemClock
from kvstore.namespace import Namespace
from kvstore.plan import Plan
from worker.connector import Connector
from worker.engines.answer import Completion
from worker.engines.transformers import TransformersEngine, layout_for, load_model, numerics_of
from worker.geometry import grid_of, namespace_of
from worker.weights import DigestMemory, weights_revision

LookUp = Callable[[Sequence[int], Sequence[int]], Plan]
"""What the tier holds of a prompt's tokens, with tails at these boundaries."""
Delete = Callable[[Sequence[int], int], object]
"""Have the tier delete what it holds of a prompt's tokens behind the first so many."""


class Engine(Protocol):
    """What orders an engine is given."""

    def generate(
        self, prompt: Sequence[int], max_new_tokens: int, *, boundaries: Sequence[int]
    ) -> Completion: ...

    def flush(self) -> None: ...

    def forget(self) -> None: ...


class Desk:
    """Where orders become calls: of the engine, and of the tier where there is one."""

    def __init__(
        self, engine: Engine, look_up: LookUp | None = None, delete: Delete | None = None
    ) -> None:
        self._engine = engine
        self._look_up = look_up
        self._delete = delete

    def obey(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out an order; what is to be answered."""
        match order["do"]:
            case "ask":
                answer = self._engine.generate(
                    order["prompt"], order["new_tokens"], boundaries=order["boundaries"]
                )
                return {"tokens": list(answer.tokens), "report": asdict(answer.report)}
            case "look_up":
                if self._look_up is None:
                    return {"tokens": 0, "cells": 0}
                plan = self._look_up(order["prompt"], order["boundaries"])
                return {"tokens": plan.tokens, "cells": plan.nodes.size}
            case "delete":
                if self._delete is not None:
                    self._delete(order["prompt"], order["start"])
            case "flush":
                self._engine.flush()
            case "forget":
                self._engine.forget()
            case unknown:
                raise ValueError(f"a worker of the demo does not know {unknown!r}")
        return {}


@click.command()
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--digests", required=True, type=click.Path(path_type=Path))
@click.option("--threads", required=True, type=int)
@click.option("--address", help="A storage node's gRPC address; none: no tier.")
@click.option("--host-id", help="The host identity of the node that is this worker's own.")
@click.option("--token-file", type=click.Path(path_type=Path, exists=True))
def main(
    model: Path,
    digests: Path,
    threads: int,
    address: str | None,
    host_id: str | None,
    token_file: Path | None,
) -> None:
    """Answer prompts from standard input until it ends."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    torch.set_num_threads(threads)
    loaded = load_model(model)
    with ExitStack() as closing:
        connector, look_up, delete = None, None, None
        if address is not None:
            tier = closing.enter_context(
                Samovar.connect(address, host_id=host_id, token_file=token_file)
            )
            namespace = _namespace(loaded, model, digests, tier.block_tokens)
            connector = Connector(tier, namespace, SystemClock())
            closing.callback(connector.close)
            look_up = partial(tier.longest_prefix, namespace)
            delete = partial(tier.delete, namespace)
        _serve(Desk(TransformersEngine(loaded, SystemClock(), connector), look_up, delete))


def _namespace(loaded: PreTrainedModel, model: Path, digests: Path, block_tokens: int) -> Namespace:
    layout = layout_for(loaded)
    grid = grid_of(layout, block_tokens)
    weights = weights_revision(model, loaded.config.to_dict(), DigestMemory(digests))
    return namespace_of(loaded.config, grid, layout, weights, numerics_of(loaded))


def _serve(desk: Desk) -> None:
    _say({})
    for line in sys.stdin:
        _say(desk.obey(json.loads(line)))


def _say(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
