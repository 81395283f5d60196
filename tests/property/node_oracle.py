"""What a storage node must do, told without its data structures: a dict and a map of pages.

The oracle knows every rule (who is evicted, what expires, what is retired) and none of the
mechanisms. It takes from the node only what the node is free to choose: offsets and the numbers of
slots, sessions and leases. Everything else it predicts. Freed memory that rests counts as free,
because it is given out before anybody is evicted.
"""

from dataclasses import dataclass, field
from enum import Enum, auto

from kvstore.leases import LEASE_MARGIN_S, PINNED_SHARE_MAX
from kvstore.node import SESSION_DEAD_S, STALL_S

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
    operation: int = -1
    stamp: int = 0


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
    stamp: int = 0
    ticked_s: float = 0.0

    def __post_init__(self) -> None:
        self.pages = [Page.FREE] * self.capacity_pages
        self.ticked_s = self.now_s

    def next_stamp(self) -> int:
        self.stamp += 1
        return self.stamp

    def pinned(self, name: Name) -> bool:
        return any(name in lease.names for lease in self.leases.values())

    def visible(self, name: Name, wall_ms: int) -> bool:
        return name in self.held and not self.held[name].expired(wall_ms)

    def loose_and_expired(self, names: list[Name], wall_ms: int) -> list[Name]:
        """Those of the cells that are held for nothing: expired, and nobody is reading them."""
        here = [name for name in dict.fromkeys(names) if name in self.held]
        return [n for n in here if self.held[n].expired(wall_ms) and not self.pinned(n)]

    def has_room(self, pages: int) -> bool:
        """Memory in one piece, and a slot record."""
        free = "".join("." if p is Page.FREE else "#" for p in self.pages)
        return len(self.held) + len(self.writing) < self.slots and "." * pages in free

    def could_have_room(self, pages: int) -> bool:
        """Whether evicting everything that may be evicted would make room."""
        loose = [self.held[name] for name in self.held if not self.pinned(name)]
        pages_of = {cell.first_page + at for cell in loose for at in range(cell.pages)}
        free = "".join(
            "." if page is Page.FREE or at in pages_of else "#"
            for at, page in enumerate(self.pages)
        )
        return bool(loose) and "." * pages in free

    def shrunk_below(self, pages: int) -> bool:
        """Whether what was retired leaves no stretch of that many pages."""
        return "." * pages not in "".join("#" if p is Page.RETIRED else "." for p in self.pages)

    def victims(self) -> list[Name]:
        """Those that may be evicted next; several only where their order does not matter."""
        loose = [name for name in self.held if not self.pinned(name)]
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

    def give_up(self, name: Name) -> None:
        """The writer itself says that it will not write any more."""
        self.mark(self.writing.pop(name)[1], Page.FREE)

    def retire(self, name: Name) -> None:
        """The writer may still write: replaced by fresh pages, never used again."""
        _, cell = self.writing.pop(name)
        self.mark(cell, Page.RETIRED)
        self.pages += [Page.FREE] * cell.pages

    def mark(self, cell: Held, use: Page) -> None:
        for page in range(cell.first_page, cell.first_page + cell.pages):
            assert self.pages[page] is Page.USED
            self.pages[page] = use

    def close_session(self, session: int) -> None:
        """Ends a session; what it leaves half written is retired."""
        del self.sessions[session]
        self.leases = {k: v for k, v in self.leases.items() if v.session != session}
        for name in [name for name, (owner, _) in self.writing.items() if owner == session]:
            self.retire(name)

    def leasable(self, session: int, names: list[Name]) -> list[bool]:
        """Which of the names one session may lease: the leading ones, until it has its share."""
        mine = {name for v in self.leases.values() if v.session == session for name in v.names}
        granted, full = [], False
        for name in names:
            pages = sum(self.held[one].pages for one in mine | {name})
            full = full or (bool(mine - {name}) and pages > PINNED_SHARE_MAX * self.capacity_pages)
            granted.append(not full)
            mine |= {name} if not full else set()
        return granted

    def tick(self, now_s: float) -> None:
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
        self.leases = {k: v for k, v in self.leases.items() if v.until_s > now_s}

    def lease(self, number: int, session: int, names: list[Name], now_s: float, ms: int) -> None:
        self.leases[number] = Lease(session, now_s + ms / 1000 + LEASE_MARGIN_S, names)

    def restart(self) -> None:
        """The process was killed; all that is whole is there again, nobody is connected."""
        self.sessions.clear()
        self.leases.clear()
        for name in list(self.writing):
            self.retire(name)
