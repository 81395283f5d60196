"""Clients: real ``Samovar`` connections that put, look up, get and check every byte.

Each is a process of its own, on a node's machine (it maps that node's arena) or elsewhere. What a
client promises its engine is checked right here: right bytes, no exception, an answer in time.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

import numpy as np

from kvstore.client import Samovar
from kvstore.config import ClientConfig
from kvstore.errors import UnavailableError
from kvstore.rpc.wire import CALL_DEADLINE_S
from tests.sim.graves import Graves
from tests.sim.keeper import Keeper, KeptWorld
from tests.sim.memory import MachineClock
from tests.sim.prompts import Prompt, Rows, delivered, keys_behind
from tests.sim.scheduler import Process, current

Answer = TypeVar("Answer")

MARGIN_S = 1.0
PUT_DEADLINE_S = 30.0
PERSISTENT_READS = 8
GET_DEADLINES_S = (0.3, 1.0, 5.0)
DELETE_DEADLINE_S = 10.0
TTLS_S = (0, 0, 0, 0, 2, 4)
KEEPING = 0.25
"""Of what a client does where it holds and erases."""
HEADS_OF_MASK = {1: slice(0, 1), 2: slice(1, 2), 3: slice(0, 2)}


class Workload(KeptWorld, Protocol):
    """What clients need of a world."""

    prompts: list[Prompt]
    given_up: set[int]
    graves: Graves
    deletes: float
    keeps: bool
    """Whether clients hold prompts, and erase tenants."""
    calm: bool

    def entry(self, machine: str) -> str: ...


class SimClient:
    """One client process."""

    def __init__(self, world: Workload, process: Process, clock: MachineClock) -> None:
        self.process = process
        self.busy = False
        self.tier: Samovar | None = None
        self._world = world
        self._clock = clock
        self._random = world.scheduler.random
        self._address = ""
        self._keeper = Keeper(world, process, self._timed)

    def start(self) -> None:
        """Begin to work; idle, but connected, when the world is calm."""
        self.process.start(f"{self.process.name}/work", self._live)

    def read_all(
        self, prompts: Sequence[Prompt], expected: Mapping[int, int], tries: int
    ) -> dict[int, int]:
        """What can be read of each prompt, the best of some tries: tokens by its number."""
        found = dict.fromkeys(expected, 0)
        for _ in range(tries):
            short = [one for one in prompts if found[one.number] < expected[one.number]]
            for prompt in short:
                tokens = self.get(prompt, 3, 5.0, persistent=True)
                found[prompt.number] = max(found[prompt.number], tokens)
            if short:
                self._sleep(0.3)
        return found

    def connect(self) -> Samovar | None:
        """A connection to the own machine's node, or to another one."""
        self._address = self._world.entry(self.process.machine)
        config = ClientConfig(address=(self._address,), host_id=self.process.machine)
        try:
            return self._timed(
                "connect", 2 * CALL_DEADLINE_S,
                lambda: Samovar.from_config(config, self._clock),
            )  # fmt: skip
        except UnavailableError:
            return None

    def get(self, prompt: Prompt, mask: int, deadline_s: float, persistent: bool = False) -> int:
        """Look up and read; how many tokens came, all of them right.

        A node leases half of a small arena at most: who is ``persistent`` asks for the rest.
        """
        tier, heads = self.tier, HEADS_OF_MASK[mask]
        assert tier is not None
        dead = self._world.graves.read_begins(key for key, _, _ in prompt.blocks)
        erased = self._is_erased(prompt)
        homes_s = CALL_DEADLINE_S * (2 * self._world.node_count() + 1)
        plan = self._timed(
            "look-up", homes_s,
            lambda: tier.longest_prefix(prompt.namespace, prompt.tokens, prompt.boundaries, mask),
        )  # fmt: skip
        rows = Rows.empty(len(prompt.tokens), heads)
        stop = 0
        for _ in range(PERSISTENT_READS if persistent else 1):
            read = partial(tier.get_into, plan, rows, deadline_s, stop)
            got = self._timed("get", deadline_s + 2 * CALL_DEADLINE_S, read)
            stop = got.stop
            if "REFUSED" not in got.failures:
                break
            self._sleep(0.1)
        if not np.array_equal(rows.kv[:, heads, :stop], prompt.kv[:, heads, :stop]):
            self._world.scheduler.fault(f"{self.process.name} got wrong bytes of {prompt.number}")
        if erased and (plan.tokens or stop):
            self._world.scheduler.fault(f"{self.process.name} found what was erased")
        risen = self._world.graves.risen(dead, delivered(prompt, stop))
        if risen:
            self._world.scheduler.fault(f"{self.process.name} got deleted {risen[0].hex()[:8]}")
        self._say(f"get {prompt.number} planned {plan.tokens} got {stop} {got.failures}")
        return stop

    def put(self, prompt: Prompt, mask: int, start: int, ttl_s: int) -> None:
        """Offer a prompt's right bytes."""
        tier = self.tier
        assert tier is not None
        rows = Rows(prompt.kv, HEADS_OF_MASK[mask])
        keys = keys_behind(prompt, start)
        self._world.graves.put_begins(keys)
        erased = self._is_erased(prompt)
        stored = self._timed(
            "put", PUT_DEADLINE_S + 4 * CALL_DEADLINE_S,
            lambda: tier.put(
                prompt.namespace, prompt.tokens, rows, start, prompt.boundaries, mask, ttl_s
            ),
        )  # fmt: skip
        self._world.graves.put_ends(keys)
        if erased and (stored.stored or stored.present):
            self._world.scheduler.fault(f"{self.process.name} stored for a tenant that was erased")
        self._say(
            f"put {prompt.number} of {stored.blocks}: stored {stored.stored} "
            f"present {stored.present} {dict(stored.reasons)}"
        )

    def delete(self, prompt: Prompt, start: int) -> None:
        """Have a prompt's blocks deleted everywhere."""
        tier, graves = self.tier, self._world.graves
        assert tier is not None
        dug = graves.delete_begins(keys_behind(prompt, start))
        self._world.vows.delete(keys_behind(prompt, start))
        try:
            deleted = self._timed(
                "delete", DELETE_DEADLINE_S,
                lambda: tier.delete(prompt.namespace, prompt.tokens, start, prompt.boundaries),
            )  # fmt: skip
        except UnavailableError as fault:
            self._say(f"delete {prompt.number} unknown: {fault}")
            return
        graves.delete_ends(dug, not deleted.pending, True)
        self._say(f"delete {prompt.number} of {deleted.blocks}: pending {deleted.pending}")

    def hold(self, prompt: Prompt, ttl_s: float, replicas: int) -> None:
        """Have what there is of a prompt kept."""
        assert self.tier is not None
        self._keeper.hold(self.tier, prompt, ttl_s, replicas)

    def release(self) -> None:
        """End its last hold."""
        assert self.tier is not None
        self._keeper.release(self.tier, *self._keeper.handles.pop())

    def erase(self, tenant: str) -> None:
        """Have all that a tenant has stored out of reach."""
        assert self.tier is not None
        self._keeper.erase(self.tier, tenant)

    def _live(self) -> None:
        while not self._world.calm:
            self.busy = True
            self._turn()
            self.busy = False
            self._sleep(self._random.expovariate(2.5))

    def _turn(self) -> None:
        moved = self._address != self._world.entry(self.process.machine)
        if self.tier is not None and (moved or self._random.random() < 0.02):
            self._timed("close", 4 * CALL_DEADLINE_S, self.tier.close)
            self.tier = None
        if self.tier is None:
            self.tier = self.connect()
            return
        prompt = self._random.choice(self._world.prompts)
        if self._world.keeps:
            prompt = self._keeper.edition(self.tier, prompt, self._random)
            if self._random.random() < KEEPING:
                if self._random.random() < 0.5:
                    self.put(prompt, 3, 0, self._random.choice(TTLS_S))  # something to keep
                self._keeper.keep(self.tier, prompt, self._random)
                return
        mask = self._random.choice([1, 2, 3, 3, 3])
        choice = self._random.random()
        if self._random.random() < self._world.deletes:
            if self._random.random() < 0.5:
                self._world.given_up.add(prompt.number)
            self.delete(prompt, self._random.choice([0, 0, len(prompt.tokens) // 2]))
        elif choice < 0.5 and prompt.number not in self._world.given_up:
            start = self._random.choice([0, 0, len(prompt.tokens) // 2])
            self.put(prompt, mask, start, self._random.choice(TTLS_S))
        else:
            self.get(prompt, mask, self._random.choice(GET_DEADLINES_S))

    def _is_erased(self, prompt: Prompt) -> bool:
        """Whether it is of an epoch that everybody knows to be over."""
        namespace = prompt.namespace
        return namespace.tenant_epoch < self._world.epochs.known(namespace.tenant)

    def _timed(self, what: str, within_s: float, operation: Callable[[], Answer]) -> Answer:
        """An operation, which must end in time; time in which it was stopped does not count."""
        world, process = self._world, self.process
        begun = (world.scheduler.now_s, process.paused_s, world.hesitated_s)
        try:
            return operation()
        finally:
            took_s = world.scheduler.now_s - begun[0]
            stopped_s = process.paused_s - begun[1] + world.hesitated_s - begun[2]
            if took_s - stopped_s > within_s + MARGIN_S and not world.scheduler.over:
                world.scheduler.fault(f"{process.name}: {what} took {took_s:.1f} s")

    def _sleep(self, seconds: float) -> None:
        current(self._world.scheduler).wait(None, seconds)

    def _say(self, what: str) -> None:
        self._world.scheduler.say(self.process.name, what)
