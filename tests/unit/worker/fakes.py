"""Stand-ins for what surrounds a connector: a tier in a dict, rows in an array, a lazy device.

``DeferredStaging`` is a device on which a copy lands only when it is awaited, in the order of
the copies, so that a forgotten wait shows as wrong bytes.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from kvstore.key import BlockSpan, Chain, Tokens
from kvstore.namespace import Namespace
from kvstore.rows import KVRows
from worker.staging import Landing, Mirror


@dataclass(frozen=True)
class FakePlan:
    """The blocks of one longest prefix, and the rows' layers."""

    tokens: int
    blocks: tuple[tuple[bytes, BlockSpan], ...]


@dataclass(frozen=True)
class FakeFetched:
    start: int
    tokens: int
    by_source: dict[str, int]


@dataclass(frozen=True)
class FakeTaken:
    complete: bool


class MemoryTier:
    """Keeps blocks in a dict; behaves like a client whose node is always ``source``."""

    def __init__(self, layers: int, source: str = "local") -> None:
        self.layers = layers
        self.source = source
        self.blocks: dict[bytes, list[bytes]] = {}
        self.shapes: dict[bytes, list[tuple[int, ...]]] = {}
        self.touched: list[tuple[int, int]] = []
        self.put_tails: list[tuple[int, ...]] = []
        self.put_from: list[int] = []
        self.loaded: list[tuple[int, ...]] = []
        self.lookups = 0
        self.full = False
        self.error: Exception | None = None
        self.get_error: Exception | None = None
        self.deliver_tokens: int | None = None
        self.gate: threading.Event | None = None
        self.put_gate = threading.Event()
        self.put_gate.set()
        self.epoch = 0

    def longest_prefix(
        self, namespace: Namespace, tokens: Tokens, boundaries: Sequence[int] = ()
    ) -> FakePlan:
        self.lookups += 1
        if self.error is not None:
            raise self.error
        chain = Chain.of(namespace, tokens, boundaries)
        found = []
        for index in range(chain.blocks):
            if (key := chain.keys[index].tobytes()) not in self.blocks:
                break
            found.append((key, chain.block(index)))
        covered = len(found) * chain.block_tokens
        for boundary in sorted(chain.tails, reverse=True):
            span = chain.tail(boundary)
            if span.start <= covered < boundary and chain.tails[boundary] in self.blocks:
                found = [*found[: span.index], (chain.tails[boundary], span)]
                covered = boundary
                break
        return FakePlan(covered, tuple(found))

    def renewed(self, namespace: Namespace) -> Namespace:
        return replace(namespace, tenant_epoch=self.epoch)

    def get_into(
        self, plan: FakePlan, rows: KVRows, deadline_s: float | None = None, start: int = 0
    ) -> FakeFetched:
        if self.gate is not None:
            self.gate.wait(30)
        wanted = [(key, span) for key, span in plan.blocks if span.stop > start]
        self.loaded.append(tuple(span.start for _, span in wanted))
        for key, span in wanted:
            for layer in range(self.layers):
                data = np.frombuffer(self.blocks[key][layer], np.uint8)
                target = rows.rows(layer, span.start, span.stop)
                target[:] = data.reshape(self.shapes[key][layer])
        if self.get_error is not None:
            raise self.get_error
        first = wanted[0][1].start if wanted else start
        stop = plan.tokens if self.deliver_tokens is None else self.deliver_tokens
        tokens = max(0, stop - first)
        return FakeFetched(first, tokens, {self.source: tokens})

    def put(
        self,
        namespace: Namespace,
        tokens: Tokens,
        rows: KVRows,
        start: int = 0,
        boundaries: Sequence[int] = (),
    ) -> FakeTaken:
        if self.error is not None:
            raise self.error
        self.put_gate.wait(30)
        self.put_from.append(start)
        self.put_tails.append(tuple(boundaries))
        if self.full:
            return FakeTaken(False)
        chain = Chain.of(namespace, tokens, boundaries)
        spans = [(chain.keys[i].tobytes(), chain.block(i)) for i in range(chain.blocks)]
        spans += [(bytes(key), chain.tail(boundary)) for boundary, key in chain.tails.items()]
        for key, span in spans:
            if span.stop > start and key not in self.blocks:
                views = [rows.rows(layer, span.start, span.stop) for layer in range(self.layers)]
                self.blocks[key] = [view.tobytes() for view in views]
                self.shapes[key] = [view.shape for view in views]
        return FakeTaken(True)

    def touch(self, plan: FakePlan, start: int = 0) -> None:
        self.touched.append((start, plan.tokens))


class ArrayRows:
    """KV rows in one numpy array ``[layer, head, token, row]``."""

    def __init__(self, layers: int, heads: int, capacity: int, row_bytes: int) -> None:
        self.array = np.zeros((layers, heads, capacity, row_bytes), np.uint8)

    def rows(self, layer: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        return self.array[layer, :, start:stop]


@dataclass
class DeferredCopy:
    """A copy that happens when it is awaited, after all that were started before it."""

    staging: "DeferredStaging"
    target: npt.NDArray[np.uint8]
    source: npt.NDArray[np.uint8]
    landed: bool = False

    def wait(self) -> None:
        while not self.landed:
            copy = self.staging.queue.pop(0)
            copy.target[:] = copy.source
            copy.landed = True


@dataclass
class DeferredStaging:
    """Device rows and host rows apart, with a queue of copies between them."""

    device: ArrayRows
    host: ArrayRows
    queue: list[DeferredCopy] = field(default_factory=list)
    mirror: Mirror = field(default_factory=Mirror)
    lifted: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def over(cls, device: ArrayRows) -> "DeferredStaging":
        layers, heads, capacity, row_bytes = device.array.shape
        return cls(device, ArrayRows(layers, heads, capacity, row_bytes))

    @property
    def host_rows(self) -> KVRows:
        return self.host

    def land(self, start: int, stop: int) -> Landing:
        return self._copy(self.device, self.host, start, stop)

    def lift(self, start: int, stop: int) -> Landing:
        start = self.mirror.missing(start, stop)
        self.lifted.append((start, stop))
        return self._copy(self.host, self.device, start, stop)

    def rewritten(self, start: int) -> None:
        self.mirror.rewritten(start)

    def _copy(self, target: ArrayRows, source: ArrayRows, start: int, stop: int) -> Landing:
        copy = DeferredCopy(self, target.array[:, :, start:stop], source.array[:, :, start:stop])
        self.queue.append(copy)
        self.mirror.copying(start, stop)
        return copy
