"""Staging on a real GPU: which bytes go where, and that no copy runs before its time.

A slow kernel stands in front of what a copy must wait for, so that one that doesn't wait shows.
"""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from worker.cuda_staging import CudaStaging
from worker.engines.cache import InPlaceCache
from worker.geometry import Attention, Layout

pytestmark = pytest.mark.engine
if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU", allow_module_level=True)

LAYERS, HEADS, CAPACITY = 3, 2, 96
ROW_BYTES = (24, 40, 24)
"""Layers of differing width, so that one of them in the place of another shows."""
SLOW_CYCLES = 200_000_000
"""About a tenth of a second."""
RANGES = [(0, CAPACITY), (0, 1), (3, 70), (63, 65), (95, 96), (40, 40)]

Sides = list[npt.NDArray[np.uint8]]


def device_layers(seed: int) -> list[torch.Tensor]:
    """A cache of random bytes on the GPU."""
    torch.manual_seed(seed)
    shapes = [(HEADS, CAPACITY, row_bytes) for row_bytes in ROW_BYTES]
    return [torch.randint(256, shape, dtype=torch.uint8, device="cuda") for shape in shapes]


def filled(staging: CudaStaging, seed: int) -> Sides:
    """Random bytes in all host rows; gives a copy of them."""
    random = np.random.default_rng(seed)
    for layer in range(LAYERS):
        rows = host_rows(staging, layer)
        rows[:] = random.integers(0, 256, rows.shape, np.uint8)
    return host_side(staging)


def host_rows(staging: CudaStaging, layer: int) -> npt.NDArray[np.uint8]:
    return staging.host_rows.rows(layer, 0, CAPACITY)


def host_side(staging: CudaStaging) -> Sides:
    return [host_rows(staging, layer).copy() for layer in range(LAYERS)]


def device_side(layers: list[torch.Tensor]) -> Sides:
    return [layer.cpu().numpy() for layer in layers]


def assert_same(got: Sides, inside: Sides, outside: Sides, start: int, stop: int) -> None:
    """``got`` has the bytes of ``inside`` in rows [start, stop), those of ``outside`` elsewhere."""
    for found, moved, kept in zip(got, inside, outside, strict=True):
        expected = kept.copy()
        expected[:, start:stop] = moved[:, start:stop]
        np.testing.assert_array_equal(found, expected)


def keep_busy(stream: torch.cuda.Stream) -> None:
    """Give a stream something long to do before all else; returns at once."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLOW_CYCLES)


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_a_land_moves_just_these_rows(start: int, stop: int) -> None:
    layers = device_layers(seed=1)
    before = device_side(layers)
    staging = CudaStaging(layers)
    host = filled(staging, seed=2)
    staging.land(start, stop).wait()
    assert_same(device_side(layers), host, before, start, stop)
    assert_same(host_side(staging), host, host, 0, CAPACITY)


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_a_lift_moves_just_these_rows(start: int, stop: int) -> None:
    layers = device_layers(seed=1)
    before = device_side(layers)
    staging = CudaStaging(layers)
    host = filled(staging, seed=2)
    staging.lift(start, stop).wait()
    assert_same(host_side(staging), before, host, start, stop)
    assert_same(device_side(layers), before, before, 0, CAPACITY)


def test_a_row_is_k_then_v() -> None:
    layout = Layout(Attention.GQA, 2, HEADS, 8, 4, "bfloat16")
    device = torch.device("cuda", 0)
    cache, other = (InPlaceCache(layout, CAPACITY, torch.bfloat16, device) for _ in range(2))
    keys = torch.randn(1, HEADS, 70, 8, dtype=torch.bfloat16, device=device)
    values = torch.randn(1, HEADS, 70, 4, dtype=torch.bfloat16, device=device)
    staging, target = CudaStaging(cache.bytes), CudaStaging(other.bytes)
    for layer in range(2):
        cache.update(keys + layer, values - layer, layer)
    staging.lift(0, 70).wait()
    for layer in range(2):
        rows = staging.host_rows.rows(layer, 0, 70)
        both = torch.cat([keys + layer, values - layer], dim=-1)[0].view(torch.uint8)
        np.testing.assert_array_equal(rows, both.cpu().numpy())
        target.host_rows.rows(layer, 0, 70)[:] = rows
    target.land(0, 70).wait()
    assert all(map(torch.equal, cache.bytes, other.bytes))


def test_a_lift_waits_for_the_kernel_that_writes_its_rows() -> None:
    layers = device_layers(seed=1)
    staging = CudaStaging(layers)
    filled(staging, seed=2)
    layers[0].fill_(5)  # loading a kernel would wait for all that is under way
    keep_busy(torch.cuda.current_stream())
    layers[0].fill_(7)
    staging.lift(0, CAPACITY).wait()
    assert (host_rows(staging, 0) == 7).all()


def test_a_land_waits_for_the_kernel_that_still_reads_its_rows() -> None:
    layers = device_layers(seed=1)
    before, seen = device_side(layers), torch.zeros_like(layers[0])
    staging = CudaStaging(layers)
    filled(staging, seed=2)
    keep_busy(torch.cuda.current_stream())
    seen.copy_(layers[0])
    staging.land(0, CAPACITY).wait()
    np.testing.assert_array_equal(seen.cpu().numpy(), before[0])


def test_a_kernel_behind_a_land_sees_what_landed() -> None:
    layers = device_layers(seed=1)
    staging = CudaStaging(layers)
    host, seen = filled(staging, seed=2), torch.zeros_like(layers[0])
    keep_busy(staging._stream)
    staging.land(0, CAPACITY).wait()
    seen.copy_(layers[0])
    np.testing.assert_array_equal(seen.cpu().numpy(), host[0])


def test_what_was_lifted_is_there_after_the_wait() -> None:
    layers = device_layers(seed=1)
    staging = CudaStaging(layers)
    filled(staging, seed=2)
    keep_busy(staging._stream)
    staging.lift(0, CAPACITY).wait()
    lifted = host_side(staging)
    assert_same(lifted, device_side(layers), lifted, 0, CAPACITY)


def test_nobody_waits_for_a_copy_who_does_not_ask_to() -> None:
    staging = CudaStaging(device_layers(seed=1))
    keep_busy(torch.cuda.current_stream())
    landing = staging.lift(0, CAPACITY)
    assert not staging._stream.query()
    landing.wait()
    assert staging._stream.query()


def test_only_rows_that_differ_are_lifted() -> None:
    layers = device_layers(seed=1)
    staging = CudaStaging(layers)
    filled(staging, seed=2)
    staging.land(0, 50).wait()
    host = filled(staging, seed=3)
    staging.lift(0, 70).wait()
    assert_same(host_side(staging), device_side(layers), host, 50, 70)
    staging.rewritten(20)
    staging.lift(0, 70).wait()
    assert_same(host_side(staging), device_side(layers), host, 20, 70)


def test_memory_that_is_given_up_is_nobody_elses_while_a_copy_is_under_way() -> None:
    layers = device_layers(seed=1)
    staging = CudaStaging(layers)
    filled(staging, seed=2)
    keep_busy(staging._stream)
    staging.land(0, CAPACITY)
    del staging, layers
    shapes = [(HEADS, CAPACITY, row_bytes) for row_bytes in ROW_BYTES]
    others = [torch.zeros(shape, dtype=torch.uint8, device="cuda") for shape in shapes]
    torch.cuda.synchronize()
    assert not any(bool(other.any()) for other in others)
