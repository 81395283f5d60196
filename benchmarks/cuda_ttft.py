"""Row ``cuda_ttft``: a warm prompt's first token on a GPU, beside cold and beside the own hit.

    warm     look-up ─> get: copied and verified, into pinned memory ─> device copy ─> the tail
    own hit  the document is still in the GPU's memory: the tail is run
    cold     plain transformers on the same GPU: everything is run

The model is an 8B Llama in shape, with random weights in bfloat16 made on the GPU, since what they
are takes no time; ``--model`` names another one. The tier is embedded: its arena is this host's
shared memory. The device copy has a limit of its own: as many pinned bytes in one piece.

Does not cover: several GPUs, other engines, or a tier on another host.
"""

import shutil
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.document import TAIL_TOKENS, Document
from benchmarks.engines import ColdReference, namespace_for, prompt_of
from benchmarks.figure import Figure, Skip, Skipped
from benchmarks.measure import Pairs, Run, Timed, paired, timed
from kvstore.client import Samovar
from kvstore.clock import SystemClock
from kvstore.machine import SHM_FOLDER
from kvstore.namespace import Namespace
from kvstore.plan import Fetched, Plan
from kvstore.rows import KVRows
from worker.connector import Abandoned, Connector, Matched, Request
from worker.cuda_staging import CudaStaging
from worker.engines.transformers import TransformersEngine, layout_for, load_model
from worker.geometry import Layout

ROW = "cuda_ttft"
PROMPT_TOKENS = (4096, 16384)
PROMPT_TOKENS_QUICK = (1024,)
SPARE_BYTES = 1 << 30
"""Arena for what every request leaves behind besides the document: its tail's block."""


def measure(run: Run) -> Iterator[Figure | Skipped]:
    """Every prompt length whose KV fits the shared memory, in one tier and one engine."""
    if not torch.cuda.is_available():
        raise Skip("needs a GPU that torch finds")
    model = _model(run)
    layout = layout_for(model)
    lengths: list[int] = []
    for tokens in PROMPT_TOKENS_QUICK if run.quick else PROMPT_TOKENS:
        needed, free = _arena_bytes(layout, [*lengths, tokens]), shutil.disk_usage(SHM_FOLDER).free
        if needed <= free:
            lengths.append(tokens)
        else:
            why = f"needs {needed >> 20} MiB of shared memory, {free >> 20} are free"
            yield Skipped(ROW, f"{tokens} tokens", why)
    if lengths:
        yield from _on(run, model, layout, lengths)


def _on(
    run: Run, model: PreTrainedModel, layout: Layout, lengths: Sequence[int]
) -> Iterator[Figure]:
    with WatchedTier.open(_arena_bytes(layout, lengths)) as tier:
        clock = SystemClock()
        connector = WatchedConnector(tier, namespace_for(model, tier.block_tokens), clock)
        engine = TransformersEngine(model, clock, connector, max(lengths))
        vocabulary = int(model.config.vocab_size)
        for seed, tokens in enumerate(lengths, start=4):
            document = Document(engine, prompt_of(model, tokens - TAIL_TOKENS, seed), vocabulary)
            document.ask()  # cold, and from then on the tier has it
            yield from _figures(run, model, layout, document, connector)
        engine.close()
        connector.close()


def _figures(
    run: Run,
    model: PreTrainedModel,
    layout: Layout,
    document: Document,
    connector: "WatchedConnector",
) -> Iterator[Figure]:
    tokens = len(document.tokens)
    size_bytes = tokens * layout.layers * layout.kv_heads * layout.row_bytes
    cold = ColdReference(model)
    parts: list[tuple[float, ...]] = []

    def warm_s() -> float:
        seconds = document.warm_s()
        parts.append((*connector.last_s(), seconds))
        return seconds

    rounds = run.track(range(run.of(11, 2)), f"warm and own hit, {tokens} tokens")
    own = paired(warm_s, document.own_s, rounds)
    rounds = run.track(range(run.of(7, 1)), f"warm and cold, {tokens} tokens")
    full = paired(warm_s, lambda: cold.ttft_s(document.prompt()), rounds)
    rounds = run.track(range(run.of(9, 2)), f"device copy, {tokens} tokens")
    copy = paired(*_device_copies(layout, tokens), rounds)
    found, got, landed, ttft = (median(part) for part in zip(*parts, strict=True))
    way = (
        f"warm: look-up {found * 1e3:.1f} ms, get {got * 1e3:.1f} ({size_bytes / got / 1e9:.1f} "
        f"GB/s), device copy {landed * 1e3:.1f}, the rest {1e3 * (ttft - found - got - landed):.1f}"
    )
    details = {
        "gpu": torch.cuda.get_device_name(),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "kv_bytes": size_bytes,
        "lookup_s": found,
        "get_s": got,
        "land_s": landed,
    }
    cached = f"{tokens} cached tokens, {size_bytes / 2**20:.0f} MiB, tail {TAIL_TOKENS}"
    cost = f"{_ms(own.ours_median_s)}, own hit {_ms(own.limit_median_s)}; {cached}; {way}"
    yield _figure(f"{tokens} tokens, own hit", own, own.costs, "x own hit", cost, details)
    gain = f"{_ms(full.ours_median_s)}, cold {_ms(full.limit_median_s)}; {_told(model)}"
    yield _figure(f"{tokens} tokens, cold", full, full.speeds, "x faster", gain, details)
    pinned = (
        f"{size_bytes / copy.ours_median_s / 1e9:.1f} GB/s into the cache's rows, "
        f"{size_bytes / copy.limit_median_s / 1e9:.1f} in one piece"
    )
    share = "of a pinned copy"
    yield _figure(f"{tokens} tokens, device copy", copy, copy.speeds, share, pinned, details)


class WatchedTier(Samovar):
    """A tier that knows how long the look-up and the get of the last request took."""

    lookup_s = get_s = 0.0

    def longest_prefix(self, *args: Any, **kwargs: Any) -> Plan:
        plan: list[Plan] = []
        seconds = timed(
            lambda: plan.append(super(WatchedTier, self).longest_prefix(*args, **kwargs))
        )
        self.lookup_s = self.lookup_s or seconds  # that of its save comes later
        return plan[0]

    def get_into(
        self, plan: Plan, rows: KVRows, deadline_s: float | None = None, start: int = 0
    ) -> Fetched:
        got: list[Fetched] = []
        whole = super().get_into
        self.get_s = timed(lambda: got.append(whole(plan, rows, deadline_s, start)))
        return got[0]


class WatchedConnector(Connector[Plan]):
    """A connector that knows how long the device copy of the last request took."""

    def __init__(self, tier: WatchedTier, namespace: Namespace, clock: SystemClock) -> None:
        super().__init__(tier, namespace, clock)
        self._watched = tier
        self._land_s = 0.0

    def match_now(self, request: Request) -> Matched | Abandoned:
        self._watched.lookup_s = 0.0
        return super().match_now(request)

    def load(self, request: Request, matched: Matched) -> None:
        whole = super().load
        self._land_s = timed(lambda: whole(request, matched))

    def last_s(self) -> tuple[float, float, float]:
        """Seconds of look-up, get and device copy."""
        return self._watched.lookup_s, self._watched.get_s, self._land_s


def _model(run: Run) -> PreTrainedModel:
    """The model, on the GPU and run once."""
    if run.model is not None:
        model = load_model(run.model, "bfloat16", "cuda")
    else:
        config = LlamaConfig(
            hidden_size=run.of(4096, 512),
            intermediate_size=run.of(14336, 1024),
            num_hidden_layers=run.of(32, 4),
            num_attention_heads=run.of(32, 4),
            num_key_value_heads=run.of(8, 2),
            head_dim=128,
            vocab_size=run.of(128256, 1000),
            max_position_embeddings=max(PROMPT_TOKENS),
        )
        with torch.device("cuda"):
            made: Any = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            )
        model = made.eval()
    # The first run of each shape is slower than all others.
    ColdReference(model).ttft_s(prompt_of(model, 256, 0))
    return model


def _arena_bytes(layout: Layout, lengths: Sequence[int]) -> int:
    """An arena for all of these prompts, headers and unused ends included."""
    kv_bytes = sum(lengths) * layout.layers * layout.kv_heads * layout.row_bytes
    return kv_bytes * 9 // 8 + SPARE_BYTES


def _device_copies(layout: Layout, tokens: int) -> tuple[Timed, Timed]:
    """Landing a document's rows in a cache, and one copy of as many bytes; both until done."""
    shape = (layout.kv_heads, tokens + TAIL_TOKENS, layout.row_bytes)
    device = torch.device("cuda")
    layers = [torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(layout.layers)]
    staging = CudaStaging(layers)
    size_bytes = tokens * layout.layers * layout.kv_heads * layout.row_bytes
    flat = torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.zeros(size_bytes, dtype=torch.uint8, device=device)

    def land() -> None:
        staging.land(0, tokens).wait()
        torch.cuda.synchronize()

    def copy() -> None:
        target.copy_(flat, non_blocking=True)
        torch.cuda.synchronize()

    return lambda: timed(land), lambda: timed(copy)


def _figure(
    variant: str,
    pairs: Pairs,
    ratios: Sequence[float],
    unit: str,
    beside: str,
    details: dict[str, float | int | str],
) -> Figure:
    """A figure without a budget: what a GPU must reach is not settled."""
    return Figure(
        row=ROW,
        variant=variant,
        value=median(ratios),
        unit=unit,
        beside=beside,
        low=min(ratios),
        high=max(ratios),
        rounds=len(ratios),
        others_cores=pairs.others_cores,
        details={**details, "ours_s": pairs.ours_median_s, "limit_s": pairs.limit_median_s},
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _told(model: PreTrainedModel) -> str:
    """What was run on what."""
    billions = sum(weight.numel() for weight in model.parameters()) / 1e9
    gpu, cuda = torch.cuda.get_device_name(), torch.version.cuda
    return f"{billions:.2f}B parameters, {model.dtype}, {gpu}, CUDA {cuda}"
