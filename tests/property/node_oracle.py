"""What a storage node must do, told without its data structures: a dict and a map of pages.

The oracle knows every rule (who is evicted, what expires, what is retired) and none of the
mechanisms. It takes from the node only what the node is free to choose: offsets and the numbers of
slots, sessions and leases. Everything else it predicts. Freed memory that rests counts as free,
because it is given out before anybody is evicted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from kvstore.leases import LEASE_MARGIN_S, PINNED_SHARE_MAX
from kvstore.sessions import SESSION_DEAD_S, STALL_S

Name = tuple[bytes, int]
"""A cell: key and cell index."""


class Page(Enum):
    """What a page of the arena is used for."""

    FREE = auto()
    USED = auto()
    RETIRED = auto()


@dataclass
class Held:
    """A cell that is held, or (not yet visible) being written."""

    slot: int
    generation: int
    first_page: int
    pages: int
    depth: int
    stamp: int
    ttl_s: int
    expires_ms: int

    def rank(self) -> tuple[int, int]:
        """Evicted in this order."""
        return self.stamp, -self.depth

    def expired(self, wall_ms: int) -> bool:
        return self.expires_ms != 0 and self.expires_ms <= wall_ms

    def slide(self, wall_ms: int, ttl_s: int | None) -> None:
        """A touch, or with ``ttl_s`` another put: the longer life counts, 0 is the longest."""
        if self.expires_ms == 0 or ttl_s == 0:
            self.expires_ms = self.ttl_s = 0
            return
        self.ttl_s = max(self.ttl_s, ttl_s or 0)
        self.expires_ms = max(self.expires_ms, wall_ms + 1000 * self.ttl_s)


@dataclass
class Session:
    beat_s: float
    stamps: dict[int, int] = field(default_factory=dict)
    """By operation."""


@dataclass
class Lease:
    session: int
    until_s: float
    names: list[Name]


@dataclass
class NodeOracle:
    """One node's world. Methods are named after the node's."""

    capacity_pages: int
    slots: int
    now_s: float
    pages: list[Page] = field(default_factory=list)
    held: dict[Name, Held] = field(default_factory=dict)
    writing: dict[Name, tuple[int, Held]] = field(default_factory=dict)
    sessions: dict[int, Session] = field(default_factory=dict)
    leases: dict[int, Lease] = field(default_factory=dict)
    holds: dict[str, tuple[float, list[Name]]] = field(default_factory=dict)
    """By handle: until when, which cells."""
    doomed: dict[int, tuple[int, Held]] = field(default_factory=dict)
    """Deleted while being written, by generation; whose."""
    withdrawn: dict[Name, Held] = field(default_factory=dict)
    """Deleted under a lease, by a name that nobody else has."""
    stamp: int = 0
    ticked_s: float = 0.0

    def __post_init__(self) -> None:
        self.pages = [Page.FREE] * self.capacity_pages
        self.ticked_s = self.now_s

    def next_stamp(self) -> int:
        self.stamp += 1
        return self.stamp

    def stamp_of(self, session: int, operation: int) -> int:
        """One for all calls of an operation, if they come soon; of nobody's, one for each."""
        stamps = self.sessions[session].stamps if session in self.sessions else {}
        stamps[operation] = stamps.get(operation) or self.next_stamp()
        return stamps[operation]

    def pinned(self, name: Name) -> bool:
        """By a reader, or by a promise."""
        leased = any(name in lease.names for lease in self.leases.values())
        return leased or self.is_held_for_somebody(name)

    def is_held_for_somebody(self, name: Name) -> bool:
        return any(name in names for _, names in self.holds.values())

    def visible(self, name: Name, wall_ms: int) -> bool:
        return name in self.held and not self.held[name].expired(wall_ms)

    def loose_and_expired(self, names: list[Name], wall_ms: int) -> list[Name]:
        """Those of the cells that are held for nothing: expired, and nobody is reading them."""
        here = [name for name in dict.fromkeys(names) if name in self.held]
        return [n for n in here if self.held[n].expired(wall_ms) and not self.pinned(n)]

    def has_room(self, pages: int) -> bool:
        """Memory in one piece, and a slot record."""
        free = "".join("." if p is Page.FREE else "#" for p in self.pages)
        writing = len(self.writing) + len(self.doomed)
        taken = len(self.held) + len(self.withdrawn) + writing
        return taken < self.slots and "." * pages in free

    def loose(self, stamp: int) -> list[Name]:
        """Those that may be evicted for an operation with this stamp: it keeps its own."""
        older = [name for name, cell in self.held.items() if cell.stamp < stamp]
        return [name for name in older if not self.pinned(name)]

    def could_have_room(self, pages: int, stamp: int) -> bool:
        """Whether evicting everything that may be evicted would make room."""
        loose = [self.held[name] for name in self.loose(stamp)]
        pages_of = {cell.first_page + at for cell in loose for at in range(cell.pages)}
        free = "".join(
            "." if page is Page.FREE or at in pages_of else "#"
            for at, page in enumerate(self.pages)
        )
        return bool(loose) and "." * pages in free

    def shrunk_below(self, pages: int) -> bool:
        """Whether what was retired leaves no stretch of that many pages."""
        return "." * pages not in "".join("#" if p is Page.RETIRED else "." for p in self.pages)

    def victims(self, stamp: int) -> list[Name]:
        """Those that may be evicted next; several only where their order does not matter."""
        loose = self.loose(stamp)
        if not loose:
            return []
        oldest = min(self.held[name].rank() for name in loose)
        return [name for name in loose if self.held[name].rank() == oldest]

    def take(self, cell: Held) -> None:
        """The node has given out these pages."""
        for page in range(cell.first_page, cell.first_page + cell.pages):
            assert page < len(self.pages), "beyond what has memory"
            assert self.pages[page] is Page.FREE, f"page {page} given out again"
            self.pages[page] = Page.USED

    def drop(self, name: Name) -> None:
        """No longer held."""
        self.mark(self.held.pop(name), Page.FREE)

    def delete(self, key: bytes) -> None:
        """A block is gone; memory that somebody uses is his until he is done."""
        for handle, (until_s, names) in list(self.holds.items()):
            self.holds[handle] = until_s, [name for name in names if name[0] != key]
            if not self.holds[handle][1]:
                del self.holds[handle]
        for name in [name for name in self.held if name[0] == key]:
            if not self.pinned(name):
                self.drop(name)
                continue
            cell = self.held.pop(name)
            alias = b"withdrawn %d" % cell.generation, name[1]
            self.withdrawn[alias] = cell
            for lease in self.leases.values():
                lease.names = [alias if one == name else one for one in lease.names]
        for name in [name for name in self.writing if name[0] == key]:
            session, cell = self.writing.pop(name)
            self.doomed[cell.generation] = session, cell

    def hold(self, handle: str, names: list[Name], ttl_s: int, wall_ms: int) -> None:
        """Promise cells; the same handle again is the union until the later end."""
        until_s, before = self.holds.get(handle, (0.0, []))
        until_s = max(until_s, self.now_s + ttl_s)
        self.holds[handle] = until_s, list(dict.fromkeys([*before, *names]))
        until_ms = wall_ms + round(1000 * (until_s - self.now_s))
        for name in self.holds[handle][1]:
            cell = self.held[name]
            cell.expires_ms = max(cell.expires_ms, until_ms) if cell.expires_ms else 0

    def held_pages(self) -> int:
        """What is promised, each cell counted once."""
        names = {name for _, names in self.holds.values() for name in names}
        return sum(self.held[name].pages for name in names)

    def release_hold(self, handle: str, wall_ms: int) -> None:
        """A cell that nobody is promised any more lives as after a use just now."""
        _, names = self.holds.pop(handle)
        for name in names:
            cell = self.held[name]
            if not self.is_held_for_somebody(name):
                cell.expires_ms = min(cell.expires_ms, wall_ms + 1000 * cell.ttl_s)

    def forget_leases(self, over: Callable[[int, Lease], bool]) -> None:
        """End leases; what was deleted is free when nobody reads it any more."""
        self.leases = {k: v for k, v in self.leases.items() if not over(k, v)}
        for alias in [alias for alias in self.withdrawn if not self.pinned(alias)]:
            self.mark(self.withdrawn.pop(alias), Page.FREE)

    def give_up(self, cell: Held) -> None:
        """The writer itself says that it will not write any more."""
        self.end_writing(cell)
        self.mark(cell, Page.FREE)

    def end_writing(self, cell: Held) -> None:
        self.doomed.pop(cell.generation, None)
        self.writing = {k: v for k, v in self.writing.items() if v[1] is not cell}

    def retire(self, cell: Held) -> None:
        """The writer may still write: replaced by fresh pages, never used again."""
        self.end_writing(cell)
        self.mark(cell, Page.RETIRED)
        self.pages += [Page.FREE] * cell.pages

    def mark(self, cell: Held, use: Page) -> None:
        for page in range(cell.first_page, cell.first_page + cell.pages):
            assert self.pages[page] is Page.USED
            self.pages[page] = use

    def close_session(self, session: int) -> None:
        """Ends a session; what it leaves half written is retired."""
        del self.sessions[session]
        self.forget_leases(lambda _, lease: lease.session == session)
        for owner, cell in [*self.writing.values(), *self.doomed.values()]:
            if owner == session:
                self.retire(cell)

    def leasable(self, session: int, names: list[Name]) -> list[bool]:
        """Which of the names one session may lease: the leading ones, until it has its share."""
        mine = {name for v in self.leases.values() if v.session == session for name in v.names}
        granted, full = [], False
        for name in names:
            here = self.held | self.withdrawn
            pages = sum(here[one].pages for one in mine | {name})
            full = full or (bool(mine - {name}) and pages > PINNED_SHARE_MAX * self.capacity_pages)
            granted.append(not full)
            mine |= {name} if not full else set()
        return granted

    def tick(self, now_s: float, wall_ms: int) -> None:
        self.now_s = now_s
        late_s = now_s - self.ticked_s - STALL_S
        self.ticked_s = now_s
        if late_s > 0:
            for session in self.sessions.values():
                session.beat_s += late_s
            for lease in self.leases.values():
                lease.until_s += late_s
        for number, session in list(self.sessions.items()):
            if now_s - session.beat_s >= SESSION_DEAD_S:
                self.close_session(number)
        self.forget_leases(lambda _, lease: lease.until_s <= now_s)
        for handle in [handle for handle, (until_s, _) in self.holds.items() if until_s <= now_s]:
            self.release_hold(handle, wall_ms)

    def lease(self, number: int, session: int, names: list[Name], now_s: float, ms: int) -> None:
        self.leases[number] = Lease(session, now_s + ms / 1000 + LEASE_MARGIN_S, names)

    def restart(self, wall_ms: int) -> None:
        """The process was killed; all that is whole is there again, nobody is connected."""
        for cell in self.held.values():
            if cell.expires_ms and cell.ttl_s:
                cell.expires_ms = min(cell.expires_ms, wall_ms + 1000 * cell.ttl_s)
        for handle, (_, names) in list(self.holds.items()):
            self.hold(handle, names, 0, wall_ms)
        self.sessions.clear()
        self.forget_leases(lambda *_: True)
        for _, cell in [*self.writing.values(), *self.doomed.values()]:
            self.retire(cell)
