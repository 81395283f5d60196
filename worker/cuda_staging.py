"""Staging for an engine whose cache is on a GPU: pinned bounce rows and a stream for copies.

    host rows, pinned   [head][ token rows ]  ──land──>  [head][ token rows ]   the cache
                                              <──lift──  one copy per layer and head

Rows of one head lie behind one another on both sides, so a copy of them is one transfer by the
GPU's copy engine. All heads of a layer at once would not be contiguous: such a copy goes through
temporary memory that is not pinned, and nothing of it runs beside anything.

The bounce rows are as large as the cache, and torch rounds each layer of them up to a power of two,
so this suits caches that fit host memory. Pinning takes about a second for two gigabytes, once.

Its own tests need a GPU; the connector's run the same interface on a device that defers its copies.

See also: ``worker.staging``, which says what loads and saves do.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvstore.rows import KVRows
from worker.staging import Landing, Mirror


class _PinnedRows:
    """Host rows in pinned memory, laid out like the engine's cache."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        self.layers = [torch.empty_like(layer, device="cpu", pin_memory=True) for layer in layers]
        self._arrays = [layer.numpy() for layer in self.layers]

    def rows(self, layer: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        return self._arrays[layer][:, start:stop]


class CudaLanding:
    """A copy on a CUDA stream."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


class CudaStaging:
    """``layers`` are the cache's buffers as bytes, uint8 ``[heads, capacity, row_bytes]``.

    The side stream first waits for the compute stream, so that no copy overtakes the kernels
    which wrote, or still read, these rows. One thread lands and lifts; any may wait.
    """

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        self._pinned = _PinnedRows(layers)
        self._host_heads = [head for layer in self._pinned.layers for head in layer]
        self._device_heads = [head for layer in layers for head in layer]
        self._stream = torch.cuda.Stream(layers[0].device)
        self._mirror = Mirror()
        for layer in layers:
            # Given up with copies under way, the memory is nobody else's before these have ended.
            layer.record_stream(self._stream)

    @property
    def host_rows(self) -> KVRows:
        return self._pinned

    def land(self, start: int, stop: int) -> Landing:
        return self._copy(self._device_heads, self._host_heads, start, stop)

    def lift(self, start: int, stop: int) -> Landing:
        start = self._mirror.missing(start, stop)
        return self._copy(self._host_heads, self._device_heads, start, stop)

    def rewritten(self, start: int) -> None:
        self._mirror.rewritten(start)

    def _copy(
        self,
        targets: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
        start: int,
        stop: int,
    ) -> Landing:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        event = torch.cuda.Event(blocking=True)  # whoever waits leaves the core to others
        with torch.cuda.stream(self._stream):
            if start < stop:
                for target, source in zip(targets, sources, strict=True):
                    target[start:stop].copy_(source[start:stop], non_blocking=True)
            event.record(self._stream)
        self._mirror.copying(start, stop)
        return CudaLanding(event)
