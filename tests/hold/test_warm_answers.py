"""The warm answer equals the engine's own, wherever its blocks come from. Real Ray, real gRPC."""

from collections.abc import Iterator

import pytest

from tests.hold.warm_scene import BOUNDARIES, DTYPES, Scene
from tests.ray_tier import RayTier, ray_tier

pytestmark = [pytest.mark.cluster, pytest.mark.engine]


@pytest.fixture(scope="module")
def tier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayTier]:
    with ray_tier(tmp_path_factory.mktemp("tier")) as up:
        yield up


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_hold_warm_equals_own_hit_on_the_same_node(
    tier: RayTier, dtype: str, boundary: int
) -> None:
    scene = Scene(dtype, boundary, "same node")
    scene.produce(tier, 0)
    scene.assert_warm(tier, 0, "local")


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_hold_warm_equals_own_hit_on_another_node(tier: RayTier, dtype: str, boundary: int) -> None:
    scene = Scene(dtype, boundary, "other node")
    scene.produce(tier, 0)
    scene.assert_warm(tier, 1, "remote")


@pytest.mark.parametrize(("reader", "source"), [(0, "local"), (1, "remote")])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_hold_warm_equals_own_hit_after_a_storage_actor_was_killed(
    tier: RayTier, dtype: str, reader: int, source: str
) -> None:
    scene = Scene(dtype, BOUNDARIES[0], f"killed, {source}")
    scene.produce(tier, 0)
    tier.kill_storage(0)
    scene.assert_warm(tier, reader, source)
