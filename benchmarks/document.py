"""A long document that a tier holds, and an engine that is asked about it.

    prompt   0 ................ document ................ boundary .. tail of 32 tokens
    warm     the engine has nothing, the tier has the document: fetched, the tail is run
    own hit  the engine itself still has the document: continued in place, the tail is run
    cold     plain transformers: everything is run

Every request has another tail, so nothing but the document is ever cached. The tier is embedded,
or the document lies on a node with another host identity and comes over TCP.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
from transformers import PreTrainedModel

from benchmarks.engines import engine_for, prompt_of
from benchmarks.figure import Figure, Skip, Skipped
from benchmarks.measure import Run
from benchmarks.storage_nodes import storage_nodes
from kvstore.client import Samovar
from kvstore.key import Tokens
from worker.engines.answer import Report
from worker.engines.transformers import TransformersEngine

DOCUMENT_TOKENS = 4090
DOCUMENT_TOKENS_QUICK = 1000
TAIL_TOKENS = 32
ARENA_BYTES = 1 << 30
KNOWN_S = 20.0
EMBEDDED, OTHER_NODE = "embedded", "other node"
"""Where the tier has the document: variants of a row."""

Tiers = Callable[[], AbstractContextManager[tuple[Samovar, Samovar]]]
"""Opens the tier twice: for who stores the document, and for who asks about it."""


class Document:
    """Requests about one document, to an engine whose tier holds it."""

    def __init__(self, engine: TransformersEngine, tokens: Tokens, vocabulary: int) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._seeds = itertools.count(1)
        self.tokens = tokens

    def prompt(self) -> Tokens:
        """The document with a tail that nobody has asked yet."""
        rng = np.random.default_rng([4, next(self._seeds)])
        tail = rng.integers(0, self._vocabulary, TAIL_TOKENS, np.int32)
        return np.concatenate([self.tokens, tail])

    def warm_s(self) -> float:
        """Seconds to the first token when only the tier has the document."""
        self._engine.forget()
        report = self.ask()
        assert report.local_tokens + report.remote_tokens == len(self.tokens), report
        return report.ttft_s

    def own_s(self) -> float:
        """Seconds to the first token when the engine has just answered about it."""
        report = self.ask()
        assert report.own_tokens == len(self.tokens), report
        return report.ttft_s

    def ask(self) -> Report:
        """One request, and all that it leaves in the background."""
        done = self._engine.generate(self.prompt(), 1, boundaries=[len(self.tokens)])
        self._engine.flush()
        assert done.report.prefilled_tokens == TAIL_TOKENS or not done.report.cached_tokens
        return done.report


def on_tiers(
    row: str, run: Run, model: PreTrainedModel, measure: Callable[[str, Document], Figure]
) -> Iterator[Figure | Skipped]:
    """Measure with the document in an embedded tier, and on another node."""
    with _told(run, model, _embedded) as document:
        yield measure(EMBEDDED, document)
    try:
        with _told(run, model, _other_node) as document:
            yield measure(OTHER_NODE, document)
    except Skip as reason:
        yield Skipped(row, OTHER_NODE, str(reason))


@contextmanager
def _told(run: Run, model: PreTrainedModel, tiers: Tiers) -> Iterator[Document]:
    """Have one engine read the document, so that its tier has it, and ask another one."""
    tokens = prompt_of(model, run.of(DOCUMENT_TOKENS, DOCUMENT_TOKENS_QUICK), seed=4)
    vocabulary = int(model.config.vocab_size)
    with tiers() as (writing, reading):
        with engine_for(model, writing) as engine:
            engine.generate(tokens, 1, boundaries=[len(tokens)])
        with engine_for(model, reading) as engine:
            document = Document(engine, tokens, vocabulary)
            until_s = time.monotonic() + KNOWN_S
            # The directory hears of new blocks a moment after they were stored.
            while (report := document.ask()).cached_tokens != len(tokens):
                if time.monotonic() > until_s:
                    raise Skip(f"the tier gave {report.cached_tokens} of {len(tokens)} tokens")
                engine.forget()
            yield document


@contextmanager
def _embedded() -> Iterator[tuple[Samovar, Samovar]]:
    with Samovar.open(ARENA_BYTES) as tier:
        yield tier, tier


@contextmanager
def _other_node() -> Iterator[tuple[Samovar, Samovar]]:
    with (
        storage_nodes(ARENA_BYTES, ARENA_BYTES // 4) as (far, near),
        far.client() as writing,
        near.client() as reading,
    ):
        yield writing, reading
