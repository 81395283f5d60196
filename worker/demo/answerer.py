"""One inference worker of the demo: a process of its own that answers prompts.

It reads one JSON object per line and answers with one. ``worker.demo.worker_process`` is the
other end.

    {"do": "ask", "prompt": [ids], "boundaries": [n], "new_tokens": n}
        -> {"tokens": [ids], "report": {...}}
    {"do": "flush"}    -> {}    once the tier has everything
    {"do": "forget"}   -> {}    the engine's own cache is empty then
"""

import json
import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from transformers import PreTrainedModel

from kvstore.client import Samovar
from kvstore.clock import SystemClock
from kvstore.namespace import Namespace
from worker.connector import Connector
from worker.engines.transformers import TransformersEngine, layout_for, load_model, numerics_of
from worker.geometry import grid_of, namespace_of
from worker.weights import DigestMemory, weights_revision


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
        connector = None
        if address is not None:
            tier = closing.enter_context(
                Samovar.connect(address, host_id=host_id, token_file=token_file)
            )
            connector = Connector(
                tier, _namespace(loaded, model, digests, tier.block_tokens), SystemClock()
            )
            closing.callback(connector.close)
        _serve(TransformersEngine(loaded, SystemClock(), connector))


def _namespace(loaded: PreTrainedModel, model: Path, digests: Path, block_tokens: int) -> Namespace:
    layout = layout_for(loaded)
    grid = grid_of(layout, block_tokens)
    weights = weights_revision(model, loaded.config.to_dict(), DigestMemory(digests))
    return namespace_of(loaded.config, grid, layout, weights, numerics_of(loaded))


def _serve(engine: TransformersEngine) -> None:
    _say({})
    for line in sys.stdin:
        _say(_obey(engine, json.loads(line)))


def _obey(engine: TransformersEngine, order: Mapping[str, Any]) -> dict[str, Any]:
    match order["do"]:
        case "ask":
            answer = engine.generate(
                order["prompt"], order["new_tokens"], boundaries=order["boundaries"]
            )
            return {"tokens": list(answer.tokens), "report": asdict(answer.report)}
        case "flush":
            engine.flush()
        case "forget":
            engine.forget()
        case unknown:
            raise ValueError(f"a worker of the demo does not know {unknown!r}")
    return {}


def _say(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
