"""Replication: which other node has a copy of what is held here, and what is to be done about it.

    hold with replicas=2 ──> its partner: the first that answers and takes it, by rendezvous,
              those on other hosts before those on this one
    survey    Carry, part by part: the partner keeps what it has, and names what it lacks
    parcel    what it lacks is sent, as many bytes a second as the pace allows; then the same survey
    complete  looked at again every ``SURVEY_S``, and as soon as the partner was away or restarted
    partner away for ``grace_s``: another one

A node that carries a copy has a hold of its own for it, whose partner is the node that it came
from, and looks after that in the same way. While both live and have it nothing moves; when either
is gone the other one finds a third.

Plain: it is told who answers and asked for the next step, one at a time, by the node's thread.
Steps are carried out by ``kvstore.rpc.replicator``. Does not cover: how bytes move
(``kvstore.copying``), what a node promises that carries a copy (``kvstore.holds``).
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvstore.burials import Ids
from kvstore.calls import CARRY_CELLS_MAX, CarryReply, CarryRequest, CopyState, HoldOutcome
from kvstore.clock import Clock
from kvstore.hold import Hold, Name
from kvstore.holds import LATER_S, Holds
from kvstore.key import Keys
from kvstore.table import Cells

log = logging.getLogger(__name__)

COPY_BYTES_PER_S = 64 << 20
GRACE_S = 10.0
"""A node may be starved, or restarting, for so long before its copies are made anew."""
SURVEY_S = 30.0
SETTLE_S = 0.5
"""After a change: a client asks several nodes for their parts of one hold."""
PAUSE_MIN_S = 0.5
PAUSE_MAX_S = 30.0
SILENCE_MAX_S = 4.0
"""Between two attempts to reach a node that does not answer."""
RETRY_S = 1.0
TRIES_MAX = 6
"""Surveys in a row that find nothing more there: then somebody else is to have the copy."""
DECLINED_S = 60.0
"""For so long a node that declined a hold is not asked again."""
SHORT_S = 5.0
"""So soon is asked again who lacks what this node's disk refuses to read."""
STEP_MAX_S = 1.0
"""What goes beyond it between two looks was this node's own standstill, and nobody's absence."""
BURST_S = 0.25
SURVEY_BYTES_MAX = 64 << 20
PARCEL_BYTES_MAX = 8 << 20
PARCEL_CELLS_MAX = 64

Row = npt.NDArray[np.intp]

_WORDS = {
    CopyState.ALONE: "no other node answers",
    CopyState.DECLINED: "no other node took it",
}


@dataclass(frozen=True, slots=True)
class Other:
    """Another node of the map that answers: in which of its lives, and where."""

    incarnation: int
    is_near: bool = False
    """On the host of this node, with which it may be lost."""


Others = Mapping[str, Other]
"""By their ids."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast copies are made, 0 for no limit, and how long a node may be away before that."""

    bytes_per_s: int = COPY_BYTES_PER_S
    grace_s: float = GRACE_S


DEFAULT_PACE = Pace()


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """Ask a node to keep these cells; ``Replication.surveyed`` takes the answer."""

    node: str
    request: CarryRequest


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """Send a node these cells, unless it knows of newer deletes than ``burials``.

    ``Replication.delivered`` is told how many have arrived.
    """

    node: str
    keys: Keys
    cells: Cells
    burials: Ids


Step = Survey | Parcel


@dataclass(frozen=True, slots=True)
class _Silence:
    """Of a node that did not answer: how long it is left alone, and until when."""

    pause_s: float
    until_s: float


@dataclass(slots=True)
class _Duty:
    """What is known of the copy of one hold."""

    hold: Hold
    due_s: float
    partner: str
    incarnation: int | None = None
    """Of the partner, when the copy was complete."""
    start: int = 0
    """The first row of the part that is looked at."""
    wanted: Row = field(default_factory=lambda: np.empty(0, np.intp))
    lacking: int | None = None
    """The fewest cells of this part that the partner was seen to lack."""
    tries: int = 0
    is_short: bool = False
    """Whether the partner lacks what can't be read here just now, either."""
    declined: dict[str, float] = field(default_factory=dict)
    """Who declined it, and until when it is not asked again."""
    state: CopyState = CopyState.UNDER_WAY

    def start_over(self, due_s: float) -> None:
        self.due_s, self.start, self.tries, self.is_short = due_s, 0, 0, False
        self.wanted, self.lacking = np.empty(0, np.intp), None


class Replication:
    """The copies of one node's holds. ``node_id`` is the node's own."""

    def __init__(
        self,
        holds: Holds,
        newest_deletes: Callable[[Keys], Ids],
        clock: Clock,
        node_id: str,
        pace: Pace,
    ) -> None:
        self.copied_cells = 0
        self._holds = holds
        self._newest_deletes = newest_deletes
        self._clock = clock
        self._node_id = node_id
        self._pace = pace
        self._duties: dict[Name, _Duty] = {}
        self._step: tuple[_Duty, Hold, Row] | None = None
        self._looked_s = clock.monotonic_s()
        self._purse_bytes = 0.0
        """What may be sent now; below 0 when a parcel took more than was there."""
        self._away_s: dict[str, float] = {}
        """For how long partners have not answered."""
        self._silent: dict[str, _Silence] = {}
        self._others: Others = {}

    def next(self, others: Others) -> Step | None:
        """What to do now, ``None`` for nothing. Its outcome is told before this is asked again."""
        self._others = others
        self._take_stock()
        self._pass_time()
        now_s = self._clock.monotonic_s()
        due = [duty for duty in self._duties.values() if duty.due_s <= now_s]
        for duty in sorted(due, key=lambda duty: duty.due_s):
            if self._has_partner(duty) and (step := self._step_of(duty)) is not None:
                return step
        return None

    def surveyed(self, reply: CarryReply | None) -> None:
        """The answer to a ``Survey``, ``None`` if there was none."""
        duty, hold, rows = self._taken_step()
        if reply is None or reply.outcome is HoldOutcome.SEALED:
            former = self._silent.get(duty.partner)
            pause_s = PAUSE_MIN_S if former is None else min(SILENCE_MAX_S, 2 * former.pause_s)
            until_s = self._clock.monotonic_s() + pause_s
            self._silent[duty.partner] = _Silence(pause_s, until_s)
            return
        self._silent.pop(duty.partner, None)
        if reply.outcome is HoldOutcome.RELEASED:
            self._holds.end(hold)
        elif reply.outcome is not HoldOutcome.GRANTED:
            self._decline(duty, reply.outcome.name)
        elif duty.hold is hold:
            self._compare(duty, rows, rows[reply.wanted])

    def delivered(self, arrived: int) -> None:
        """So many cells of a ``Parcel`` are there now; the next survey shows which."""
        duty, hold, rows = self._taken_step()
        self.copied_cells += arrived
        if duty.hold is hold:
            left = np.setdiff1d(duty.wanted, rows)
            duty.wanted = left if arrived else left[:0]

    def _take_stock(self) -> None:
        """A duty for every hold that is to have a copy, as it is now."""
        now_s = self._clock.monotonic_s()
        current = {
            hold.name: hold
            for hold in self._holds.with_copies()
            if hold.until_s - now_s > LATER_S  # else it ends while it is on its way
        }
        for name in self._duties.keys() - current.keys():
            del self._duties[name]
        for name, hold in current.items():
            duty = self._duties.get(name)
            if duty is None:
                self._duties[name] = _Duty(hold, now_s + SETTLE_S, hold.partner)
            elif duty.hold is not hold:
                duty.hold = hold
                duty.start_over(now_s + SETTLE_S)

    def _pass_time(self) -> None:
        """What may be sent by now, and who was away or has restarted meanwhile."""
        now_s = self._clock.monotonic_s()
        passed_s, self._looked_s = now_s - self._looked_s, now_s
        earned = self._purse_bytes + passed_s * self._pace.bytes_per_s
        self._purse_bytes = min(earned, BURST_S * self._pace.bytes_per_s)
        partners = {duty.partner for duty in self._duties.values()} - {""}
        for node, silence in list(self._silent.items()):
            if node not in self._others or (node not in partners and silence.until_s <= now_s):
                del self._silent[node]
        away = partners - (self._others.keys() - self._silent.keys())
        self._away_s = {
            node: self._away_s.get(node, 0.0) + min(passed_s, STEP_MAX_S) for node in away
        }
        for duty in self._duties.values():
            if duty.incarnation not in (None, self._incarnation(duty.partner)):
                duty.incarnation = None  # it is asked as soon as it answers
                duty.start_over(now_s)

    def _has_partner(self, duty: _Duty) -> bool:
        """Whether somebody can be asked just now; chooses another one for one that is gone."""
        now_s = self._clock.monotonic_s()
        duty.declined = {node: at_s for node, at_s in duty.declined.items() if at_s > now_s}
        resting = {node for node, silence in self._silent.items() if silence.until_s > now_s}
        able = self._others.keys() - resting
        if duty.partner and self._away_s.get(duty.partner, 0.0) < self._pace.grace_s:
            return duty.partner in able
        able -= duty.declined.keys()
        if able == {duty.partner}:
            return True  # there is no other one
        able -= {duty.partner}
        if not able:
            is_declined = bool(self._others.keys() & duty.declined.keys())
            self._tell(duty, CopyState.DECLINED if is_declined else CopyState.ALONE)
            duty.due_s = now_s + RETRY_S
            return False
        if duty.partner:
            log.warning("%r gets another copy: node %s is gone", duty.hold.handle, duty.partner)
        duty.partner = max(
            able, key=lambda node: (not self._others[node].is_near, _score(duty.hold, node), node)
        )
        duty.start_over(duty.due_s)
        return True

    def _step_of(self, duty: _Duty) -> Step | None:
        hold = duty.hold
        if not len(duty.wanted):
            stops = np.cumsum(hold.sizes_bytes[duty.start : duty.start + CARRY_CELLS_MAX])
            count = max(1, int(np.searchsorted(stops, SURVEY_BYTES_MAX, side="right")))
            rows = np.arange(duty.start, min(len(hold), duty.start + count))
            self._step = duty, hold, rows
            return Survey(duty.partner, self._request(hold, rows))
        if self._purse_bytes < 0 and self._pace.bytes_per_s:
            return None
        sizes_bytes = hold.sizes_bytes[duty.wanted[:PARCEL_CELLS_MAX]]
        fit = int(np.searchsorted(np.cumsum(sizes_bytes), PARCEL_BYTES_MAX, side="right"))
        rows = duty.wanted[: max(1, fit)]
        self._purse_bytes -= int(hold.sizes_bytes[rows].sum())
        self._step = duty, hold, rows
        keys = hold.keys[rows]
        return Parcel(duty.partner, keys, hold.cells[rows], self._newest_deletes(keys))

    def _request(self, hold: Hold, rows: Row) -> CarryRequest:
        now_s = self._clock.monotonic_s()
        return CarryRequest(
            tenant=hold.tenant,
            handle=hold.handle,
            origin=self._node_id,
            keys=hold.keys[rows],
            cells=hold.cells[rows],
            sizes_bytes=hold.sizes_bytes[rows],
            more_bytes=int(hold.sizes_bytes[rows[-1] + 1 :].sum()),
            ttl_ms=max(1, round(1000 * (hold.until_s - now_s))),
            granter=hold.granter,
            grant=hold.grant,
            released=hold.released,
            tenant_epoch=hold.tenant_epoch,
        )

    def _taken_step(self) -> tuple[_Duty, Hold, Row]:
        assert self._step is not None, "no step is under way"
        step, self._step = self._step, None
        return step

    def _compare(self, duty: _Duty, rows: Row, wanted: Row) -> None:
        """The partner lacks ``wanted`` of ``rows``: send that, go on, or wait a while."""
        now_s = self._clock.monotonic_s()
        if len(wanted):
            here = self._holds.are_here(
                duty.hold.select(np.isin(np.arange(len(duty.hold)), wanted))
            )
            duty.is_short |= not here.all()
            wanted = wanted[here]  # nobody else is to be asked for what can't be sent to anybody
        if not len(wanted):
            duty.start, duty.tries, duty.lacking = int(rows[-1]) + 1, 0, None
            duty.due_s = now_s
            if duty.start >= len(duty.hold):
                self._complete(duty)
            return
        self._tell(duty, CopyState.UNDER_WAY)
        is_progress = duty.lacking is None or len(wanted) < duty.lacking
        duty.tries = 0 if is_progress else duty.tries + 1
        duty.lacking = len(wanted)
        if duty.tries >= TRIES_MAX:
            self._decline(duty, "what is sent does not stay there")
            return
        duty.wanted = wanted
        duty.due_s = now_s
        if not is_progress:
            duty.due_s += min(PAUSE_MAX_S, PAUSE_MIN_S * 2**duty.tries)

    def _complete(self, duty: _Duty) -> None:
        """All of it was looked at, and what can be read here is there."""
        if duty.is_short:
            self._tell(duty, CopyState.UNDER_WAY)
            duty.start_over(self._clock.monotonic_s() + SHORT_S)
            return
        duty.hold = self._holds.meet(duty.hold, duty.partner)
        duty.incarnation = self._incarnation(duty.partner)
        duty.start_over(self._clock.monotonic_s() + SURVEY_S)
        duty.declined.clear()
        self._tell(duty, CopyState.COMPLETE)

    def _incarnation(self, node: str) -> int | None:
        other = self._others.get(node)
        return None if other is None else other.incarnation

    def _decline(self, duty: _Duty, why: str) -> None:
        log.info("node %s does not take %r: %s", duty.partner, duty.hold.handle, why)
        now_s = self._clock.monotonic_s()
        duty.declined[duty.partner] = now_s + DECLINED_S
        duty.partner, duty.incarnation = "", None
        duty.start_over(now_s)

    def _tell(self, duty: _Duty, state: CopyState) -> None:
        """How it is about the copy, for whoever looks; said once for each change."""
        self._holds.note_copies(duty.hold, state)
        if duty.state is state:
            return
        duty.state = state
        count = duty.hold.replicas
        if state is CopyState.COMPLETE:
            log.info("%r has %d of %d copies, one on %s",
                     duty.hold.handle, count, count, duty.partner)  # fmt: skip
        elif state in _WORDS:
            log.warning("%r has 1 of %d copies: %s", duty.hold.handle, count, _WORDS[state])


def _score(hold: Hold, node_id: str) -> int:
    """Rendezvous: every node scores every hold, the highest score wins."""
    seed = xxh3_64_intdigest(hold.tenant + hold.handle.encode())
    return xxh3_64_intdigest(node_id.encode(), seed=seed)
