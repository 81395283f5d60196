"""The coordinator as an actor, and how a process outside the cluster waits for it.

Does not cover: what the coordinator decides (`kvstore.cluster.coordinator`), starting Ray
(`kvstore.cluster.launch`).
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError

from kvstore.clock import Clock, Deadline, SystemClock
from kvstore.cluster.coordinator import Coordinator, Progress, Rounds
from kvstore.cluster.detached import detached
from kvstore.cluster.plan import RAY_NAMESPACE, TierPlan, actor_name
from kvstore.cluster.ray_nodes import RayNodes
from kvstore.errors import UnavailableError, UsageError
from kvstore.logs import log_to

POLL_S = 0.1


class CoordinatorActor:
    """Runs rounds from construction until its process ends; goes on from the map that was kept."""

    def __init__(self, plan: TierPlan) -> None:
        log_to(plan.folder.log_folder, "coordinator", plan.log_level)
        plans = {storage.place.index: storage for storage in plan.storage}
        last = plan.folder.read_map()
        coordinator = Coordinator(
            sorted(plans), last, SystemClock(), plan.block_tokens, plan.tier_id
        )
        self._rounds = Rounds(coordinator, RayNodes(plan.name, plans), plan.folder.write_map)
        self._rounds.start()

    def progress(self) -> Progress:
        """How far the tier is."""
        return self._rounds.progress()


def bring_up(
    address: str,
    plan: TierPlan,
    clock: Clock,
    patience_s: float,
    tell: Callable[[Progress], None],
) -> Progress:
    """Make the coordinator in the Ray at `address` and wait until all nodes go by one map."""
    ray.init(address, namespace=RAY_NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    try:
        coordinator = detached(CoordinatorActor, actor_name(plan.name, "coordinator"), plan)
        return _wait(coordinator, plan, clock, patience_s, tell)
    finally:
        ray.shutdown()


def _wait(
    coordinator: Any,
    plan: TierPlan,
    clock: Clock,
    patience_s: float,
    tell: Callable[[Progress], None],
) -> Progress:
    deadline = Deadline.after(clock, patience_s)
    pause = threading.Event()
    while True:
        try:
            progress: Progress = ray.get(coordinator.progress.remote(), timeout=patience_s)
        except (RayActorError, TimeoutError) as error:
            raise UnavailableError(f"the coordinator did not start: {error}") from None
        tell(progress)
        if len(progress.current) == len(plan.storage):
            return progress
        for index, reason in progress.reasons.items():
            raise UsageError(f"node {index} did not start: {reason}")
        if deadline.passed():
            raise UnavailableError(
                f"{len(progress.current)} of {len(plan.storage)} nodes came up within "
                f"{patience_s:g} s; see {plan.folder.log_folder}"
            )
        pause.wait(POLL_S)
