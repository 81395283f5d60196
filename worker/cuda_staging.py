"""Staging for an engine whose cache is on a GPU: pinned bounce rows and a stream for copies.

Needs a GPU, so the connector's tests run the same interface on a device that defers its copies
instead. The bounce rows are as large as the cache, so this suits caches that fit host memory.

See also: ``worker.staging``, which says what loads and saves do.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvstore.rows import KVRows
from worker.staging import Landing


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
    which wrote, or still read, these rows.
    """

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        self._device = list(layers)
        self._pinned = _PinnedRows(layers)
        self._stream = torch.cuda.Stream(self._device[0].device)

    @property
    def host_rows(self) -> KVRows:
        return self._pinned

    def land(self, start: int, stop: int) -> Landing:
        return self._copy(self._device, self._pinned.layers, start, stop)

    def lift(self, start: int, stop: int) -> Landing:
        return self._copy(self._pinned.layers, self._device, start, stop)

    def _copy(
        self,
        targets: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
        start: int,
        stop: int,
    ) -> Landing:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target[:, start:stop].copy_(source[:, start:stop], non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return CudaLanding(event)
