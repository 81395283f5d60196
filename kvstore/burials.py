"""Burials: which blocks were deleted, by which delete, and what two nodes know of that together.

A delete has an *id*: a number of a hybrid clock, which grows with every delete that a node makes
or hears of, and follows the time of day besides. Ids are an order, not a time. A block's *burial*
is the newest delete of it that is known here. Nodes compare digests of all their burials, and
where they differ, show each other their pages, newest first.

A burial is kept for ``BURIAL_S``; there are ``BURIALS_MAX`` at most, and the oldest go first.
What has gone is not taken in again: all ids up to its own are known, and no news.

Does not cover: what a delete does (``kvstore.deletes``), the book on disk (``kvstore.burial_log``).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvstore.key import Keys, as_keys

BURIAL_S = 30 * 24 * 3600
BURIALS_MAX = 1 << 16
PAGE_BURIALS_MAX = 4096
"""So many are in one page."""
ID_TIME_BITS = 16
"""So far to the left the milliseconds are in an id."""

Ids = npt.NDArray[np.uint64]
Milliseconds = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class BurialDigest:
    """How many burials there are, and the XOR of what names them."""

    burials: int = 0
    fold: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class BurialPage:
    """Some burials: keys uint8 ``[n, 32]``, the ids of their deletes, how long ago they were.

    ``next`` is where the next page starts, 0 if there is none.
    """

    keys: Keys
    ids: Ids
    ages_ms: Milliseconds
    next: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Burial:
    """Of one block: by which delete, and when this node heard of it (wall time)."""

    id: int
    when_ms: int


class BurialBook:
    """What was deleted, the newest delete of each block."""

    def __init__(self) -> None:
        self.floor = 0
        """Deletes up to this id are no news: they were forgotten here."""
        self._burials: dict[bytes, Burial] = {}
        self._fold = 0
        self._newest: list[tuple[bytes, Burial]] | None = None
        """All of them, newest first; ``None`` when that has changed."""

    def __len__(self) -> int:
        return len(self._burials)

    def get(self, key: bytes) -> Burial | None:
        """The burial of a block, if one is known."""
        return self._burials.get(key)

    def items(self) -> list[tuple[bytes, Burial]]:
        """All burials, newest first."""
        if self._newest is None:
            ordered = self._burials.items()
            self._newest = sorted(ordered, key=lambda item: (item[1].id, item[0]), reverse=True)
        return self._newest

    def digest(self) -> BurialDigest:
        """Equal for two books exactly when they have the same burials, but for rare chance."""
        return BurialDigest(len(self._burials), self._fold)

    def newer(self, keys: Keys, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which of these deletes are news."""
        return np.array(
            [self.is_news(key.tobytes(), one) for key, one in zip(keys, ids.tolist(), strict=True)],
            np.bool_,
        )

    def is_news(self, key: bytes, delete_id: int) -> bool:
        """Whether a delete of this block is newer than what is known."""
        known = self._burials.get(key)
        return delete_id > self.floor and (known is None or delete_id > known.id)

    def enter(self, key: bytes, burial: Burial) -> bool:
        """Know of a delete; ``False`` if it is no news."""
        if not self.is_news(key, burial.id):
            return False
        self._take_out(key)
        self._burials[key] = burial
        self._fold ^= _name(key, burial.id)
        return True

    def forget_outdated(self, wall_ms: int) -> None:
        """Forget what is too old, or one too many."""
        oldest_ms = wall_ms - BURIAL_S * 1000
        outdated = [key for key, burial in self._burials.items() if burial.when_ms <= oldest_ms]
        excess = len(self._burials) - BURIALS_MAX
        if excess > 0:
            outdated += [key for key, _ in self.items()[-excess:]]
        for key in dict.fromkeys(outdated):
            self.floor = max(self.floor, self._burials[key].id)
            self._take_out(key)

    def raise_floor(self, floor: int) -> None:
        """Take over what an earlier life had forgotten."""
        self.floor = max(self.floor, floor)

    def page(self, start: int, count: int, wall_ms: int) -> BurialPage:
        """At most ``count`` burials from the ``start``-th on, newest first.

        A burial that comes between two pages moves the others back: rows are seen twice then, and
        none is missed.
        """
        found = self.items()[start : start + min(count, PAGE_BURIALS_MAX)]
        stop = start + len(found)
        return BurialPage(
            keys=as_keys(b"".join(key for key, _ in found)),
            ids=np.array([burial.id for _, burial in found], np.uint64),
            ages_ms=np.array([max(0, wall_ms - burial.when_ms) for _, burial in found], np.uint64),
            next=stop if stop < len(self) else 0,
        )

    def _take_out(self, key: bytes) -> None:
        known = self._burials.pop(key, None)
        if known is not None:
            self._fold ^= _name(key, known.id)
        self._newest = None


class DeleteClock:
    """Gives ids to deletes."""

    def __init__(self) -> None:
        self._last = 0

    def see(self, delete_id: int) -> None:
        """Every later id of ours is larger."""
        self._last = max(self._last, delete_id)

    def next_id(self, wall_ms: int) -> int:
        """An id for a delete that is made here now."""
        self._last = max(self._last + 1, wall_ms << ID_TIME_BITS)
        return self._last


def _name(key: bytes, delete_id: int) -> int:
    return xxh3_64_intdigest(key + delete_id.to_bytes(8, "little"))
