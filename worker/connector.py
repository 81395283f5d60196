"""The engine-neutral connector: what an engine says to the tier about one request's KV.

A request's life, as its engine drives it:

    match ── AskAgain ──┐        the first match starts look-up and transfer in the background,
      ▲                 │        straight into the request's rows (stage), later ones answer;
      └─────────────────┘        only verified tokens are ever reported (admit)
    match ── Matched ── load     the engine's own first tokens still hold, and those behind them
                                 are usable once load returned
             Abandoned           the deadline passed with a transfer still under way: the rows
                                 may be written at any time and must never be used again
    save                         in the background, once the engine has a first token out, and
                                 again with more tokens: what was offered before is no second use
    settle                       before rows that a save may be reading are written again

A failing tier is a miss: an exception below becomes "nothing cached", logged once when it begins
and once when the tier answers again. Only a caller's bug (``UsageError``) comes through ``match``.

Does not cover: an engine's own cache and its hits (``worker.engines``), or bytes (``kvstore``).
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from kvstore.clock import Clock, Deadline
from kvstore.errors import UsageError
from kvstore.key import Tokens
from kvstore.namespace import Namespace
from kvstore.rows import KVRows
from worker.staging import Staging

MATCH_DEADLINE_S = 5.0
ABANDON_AFTER_S = 1.0
"""How long after its deadline a transfer may still end before its rows are given up."""
FORGET_AFTER_S = 60.0
"""How long after its deadline the answer to a request is kept that nobody asks for any more."""
REQUESTS_MAX = 1024
"""Requests of which the epoch is remembered, and what of them was offered."""
LOADS_MAX = 256
"""Look-ups and transfers under way, each a thread; what comes on top is a miss."""
SAVES_MAX = 256
"""Saves waiting for a slow tier; what comes on top is not offered."""

_log = logging.getLogger(__name__)


class Plan(Protocol):
    """The longest warm prefix that a look-up found."""

    @property
    def tokens(self) -> int: ...


P = TypeVar("P", bound=Plan)


class Fetched(Protocol):
    """What of a plan was delivered and verified: ``tokens`` tokens from ``start`` on."""

    @property
    def start(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def by_source(self) -> Mapping[str, int]: ...


class Taken(Protocol):
    """What became of a put."""

    @property
    def complete(self) -> bool:
        """Whether the tier has all of it."""
        ...


class Tier(Protocol[P]):
    """The part of ``kvstore.client.Samovar`` that a connector needs."""

    def longest_prefix(
        self, namespace: Namespace, tokens: Tokens, boundaries: Sequence[int] = ()
    ) -> P: ...

    def get_into(
        self, plan: P, rows: KVRows, deadline_s: float | None = None, start: int = 0
    ) -> Fetched: ...

    def put(
        self,
        namespace: Namespace,
        tokens: Tokens,
        rows: KVRows,
        start: int = 0,
        boundaries: Sequence[int] = (),
    ) -> Taken: ...

    def touch(self, plan: P, start: int = 0) -> object: ...

    def renewed(self, namespace: Namespace) -> Namespace:
        """The namespace in its tenant's epoch now."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, where its KV lives, and what of it the engine still has itself.

    ``boundaries`` are token counts at which a tail block may end (the end of a document, say).
    The tier is asked only for what it could have beyond the ``resident`` first tokens.
    """

    id: str
    tokens: Tokens
    staging: Staging
    boundaries: tuple[int, ...] = ()
    resident: int = 0


@dataclass(frozen=True, slots=True)
class AskAgain:
    """Look-up or transfer is under way."""


@dataclass(frozen=True, slots=True)
class Matched:
    """``tokens`` tokens behind the first ``kept`` ones wait in the request's host rows, verified.

    ``kept`` of the tokens that the engine had itself still hold: all of them, or those before the
    first block that a transfer wrote to. ``local``, ``remote`` and ``nvme`` say whence the others
    came; they add up to ``tokens``, and 0 is a miss.
    """

    tokens: int
    local: int
    remote: int
    kept: int
    nvme: int = 0

    @property
    def warm(self) -> int:
        """How many first tokens of the prompt need not be run."""
        return self.kept + self.tokens


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A transfer outlived its deadline: the request's rows must never be used again."""


Match = AskAgain | Matched | Abandoned


@dataclass(slots=True)
class _Health:
    """Says once that the tier fails, and once that it is back."""

    failing: bool = False

    def failed(self, doing: str, error: Exception) -> None:
        if not self.failing:
            self.failing = True
            _log.warning("tier degraded: %s failed with %s: %s", doing, type(error).__name__, error)

    def worked(self) -> None:
        if self.failing:
            self.failing = False
            _log.warning("tier answers again")


@dataclass(slots=True)
class _Course:
    """A request from its match to its last save: its epoch, and how much of it the tier took."""

    namespace: Namespace
    offered: int = 0


@dataclass(frozen=True, slots=True)
class _Load:
    """A request's look-up and transfer in the background."""

    deadline: Deadline
    future: Future[Matched]


class Connector(Generic[P]):
    """One engine's requests against one tier, in one namespace. Any thread may call it."""

    def __init__(
        self,
        tier: Tier[P],
        namespace: Namespace,
        clock: Clock,
        match_deadline_s: float = MATCH_DEADLINE_S,
    ) -> None:
        self._tier = tier
        self._namespace = namespace
        self._clock = clock
        self._match_deadline_s = match_deadline_s
        self._block_tokens = namespace.grid.block_tokens
        self._health = _Health()
        self._courses: dict[str, _Course] = {}
        """By request, the one that was heard of last at the end."""
        self._coursing = threading.Lock()
        self._loads: dict[str, _Load] = {}
        self._running: set[Future[Matched]] = set()
        self._saves: set[Future[None]] = set()
        self._saver = ThreadPoolExecutor(1, "samovar-save")

    def match(self, request: Request) -> Match:
        """How much of the request is warm. Never blocks; ask again until it says something else."""
        load = self._loads.get(request.id)
        if load is None:
            self._forget_unasked()
            if not self._worth_asking(request) or len(self._running) >= LOADS_MAX:
                return _miss(request)
            load = self._start(request)
            self._loads[request.id] = load
        if load.future.done():
            del self._loads[request.id]
            return load.future.result()
        if self._clock.monotonic_s() < load.deadline.at_s + ABANDON_AFTER_S:
            return AskAgain()
        del self._loads[request.id]
        self._health.failed("a load", TimeoutError("a transfer outlived its deadline"))
        return Abandoned()

    def match_now(self, request: Request) -> Matched | Abandoned:
        """``match`` for engines that can only wait: blocks until the deadline at most."""
        while isinstance(answer := self.match(request), AskAgain):
            load = self._loads[request.id]
            wait([load.future], timeout=load.deadline.remaining_s() + ABANDON_AFTER_S)
        return answer

    def load(self, request: Request, matched: Matched) -> None:
        """Bring what was matched into the engine's cache; returns when it may be read."""
        if matched.tokens:
            request.staging.land(matched.kept, matched.warm).wait()

    def save(self, request: Request, tokens: Tokens) -> None:
        """Offer the KV of ``tokens``, whose rows hold still until ``settle``; doesn't block.

        What the tier has already is touched and not sent. ``tokens`` are those whose KV was
        really computed: the request's prompt, or the prompt with generated tokens behind it.
        However often a request is saved, it uses each of its blocks once.
        """
        if len(self._saves) >= SAVES_MAX:
            return
        landing = request.staging.lift(0, len(tokens))
        host_rows = request.staging.host_rows
        boundaries = [at for at in request.boundaries if at <= len(tokens)]

        def offer() -> None:
            landing.wait()
            course = self._course(request.id)
            plan = self._tier.longest_prefix(course.namespace, tokens, boundaries)
            self._tier.touch(plan, course.offered)
            fresh = [at for at in boundaries if at > course.offered]
            stored = self._tier.put(course.namespace, tokens, host_rows, plan.tokens, fresh)
            if stored.complete:
                course.offered = len(tokens)

        future = self._saver.submit(self._save_quietly, offer)
        self._saves.add(future)
        future.add_done_callback(self._saves.discard)

    def settle(self) -> None:
        """Wait until no save reads any rows; each ends by the tier's own deadlines."""
        wait(set(self._saves))

    def close(self) -> None:
        """Let saves under way end, then stop."""
        self._saver.shutdown()

    def _forget_unasked(self) -> None:
        """Drop answers that came long ago: their engines have given the requests up."""
        now_s = self._clock.monotonic_s()
        for id, load in list(self._loads.items()):
            if load.future.done() and now_s > load.deadline.at_s + FORGET_AFTER_S:
                self._loads.pop(id, None)

    def _worth_asking(self, request: Request) -> bool:
        """Whether the tier could add as much as one block, or reach a named boundary."""
        usable = len(request.tokens) - 1
        reach = max((at for at in request.boundaries if at <= usable), default=0)
        return usable - request.resident >= self._block_tokens or reach > request.resident

    def _start(self, request: Request) -> _Load:
        deadline = Deadline.after(self._clock, self._match_deadline_s)
        future: Future[Matched] = Future()
        self._running.add(future)
        future.add_done_callback(self._running.discard)

        def run() -> None:
            try:
                future.set_result(self._stage(request, deadline))
            except UsageError as error:
                future.set_exception(error)

        # Not a pool's thread: those are joined at exit, and a stuck transfer would hang it.
        threading.Thread(target=run, name=f"samovar-load-{request.id}", daemon=True).start()
        return _Load(deadline, future)

    def _stage(self, request: Request, deadline: Deadline) -> Matched:
        """In the background: look up, and fetch if that gives more than the engine has."""
        answer = _miss(request)
        try:
            plan = self._tier.longest_prefix(
                self._course(request.id).namespace, request.tokens, request.boundaries
            )
            gains = min(plan.tokens, len(request.tokens) - 1) > request.resident
            if gains and not deadline.passed():
                # Whatever becomes of it, the transfer may write from this block's first row on.
                before = request.resident - request.resident % self._block_tokens
                answer = Matched(0, 0, 0, kept=before)
                request.staging.rewritten(before)
                rows, left_s = request.staging.host_rows, deadline.remaining_s()
                fetched = self._tier.get_into(plan, rows, left_s, start=request.resident)
                answer = _usable(fetched, len(request.tokens) - 1)
        except UsageError:
            raise
        except Exception as error:
            self._health.failed("a load", error)
        else:
            self._health.worked()
        return answer

    def _course(self, id: str) -> _Course:
        """In its tenant's epoch now a request goes on to its end, whatever is erased since."""
        with self._coursing:
            known = self._courses.get(id)
        course = known or _Course(self._tier.renewed(self._namespace))
        with self._coursing:
            course = self._courses.pop(id, course)
            self._courses[id] = course
            if len(self._courses) > REQUESTS_MAX:
                self._courses.pop(next(iter(self._courses)))
        return course

    def _save_quietly(self, offer: Callable[[], None]) -> None:
        try:
            offer()
        except Exception as error:
            self._health.failed("a save", error)
        else:
            self._health.worked()


def _miss(request: Request) -> Matched:
    return Matched(0, 0, 0, kept=request.resident)


def _usable(fetched: Fetched, usable: int) -> Matched:
    """At least the last token of a prompt is always run, for its logits."""
    tokens = min(fetched.tokens, usable - fetched.start)
    remote = min(int(fetched.by_source.get("remote", 0)), tokens)
    nvme = min(int(fetched.by_source.get("nvme", 0)), tokens - remote)
    local = tokens - remote - nvme
    return Matched(tokens, local=local, remote=remote, kept=fetched.start, nvme=nvme)
