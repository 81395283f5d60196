"""Behind: what a node's NVMe tier does for its host tier.

    host tier ── write-behind ──> NVMe tier      union of both: what the node holds, and announces
        ^────────── promotion ────────┘

Does not cover: either tier, sessions and leases (``kvstore.node``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.changes import Changes
from kvstore.clock import Clock
from kvstore.key import Keys, as_keys
from kvstore.table import Cells, Found, Slots
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.disk_queue import Event
from kvstore.tiers.nvme.requests import Request
from kvstore.tiers.nvme.spill import Done, NvmeStats, Phase, Result
from kvstore.tiers.nvme.tier import NvmeTier
from kvstore.tiers.promotion import Promotion, Promotions
from kvstore.tiers.union import Name, joined
from kvstore.tiers.write_behind import WriteBehind


@dataclass(slots=True, eq=False)
class Erasure:
    """Blocks that are being wiped from the disk, so that no crash brings them back.

    ``is_owed`` says that the disk is not opened in this life of the node: it is to be asked again
    when it is.
    """

    is_done: bool = False
    is_owed: bool = False


class Behind:
    """An NVMe tier behind a host tier. Driven by the node's one thread; nothing here waits."""

    def __init__(self, host: HostTier, nvme: NvmeTier, clock: Clock, daily_bytes: int = 0) -> None:
        self.has_disk = True
        """Whether there is any: it need not be open."""
        self._host = host
        self._nvme = nvme
        self._writes = WriteBehind(host, nvme, clock, daily_bytes)
        self._promotions = Promotions(host, nvme)
        self.cells_max = nvme.cells_max
        host.lie_above(self._writes)
        self._is_left = False
        self._erasures: dict[int, Erasure] = {}
        """By ticket."""
        self._epoch = nvme.epoch
        self._followers: list[Callable[[], None]] = []

    @classmethod
    def nothing(cls, host: HostTier, clock: Clock, is_left: bool = False) -> "Behind":
        """No NVMe tier: one that never opens. ``is_left`` if there are files of one still."""
        behind = cls(host, NvmeTier(NoDisk(), clock, 1, 0), clock)
        behind.has_disk, behind._is_left = False, is_left
        host.lie_above(None)
        return behind

    @property
    def stats(self) -> NvmeStats:
        """Of the NVMe tier."""
        return self._nvme.stats

    @property
    def epoch(self) -> int:
        """Grows when what is on the disk was replaced as a whole."""
        return self._nvme.epoch

    def follow(self, follower: Callable[[], None]) -> None:
        """Have this done with every new ``epoch``, before anything makes way for what is new."""
        if self.has_disk:  # without one no cycle is to keep the memory of a tier that is over
            self._followers.append(follower)

    def seal(self, sealed: bool) -> None:
        """Let nobody find what is on the disk for now, or again."""
        self._nvme.is_sealed = sealed

    def locate(self, keys: Keys, cells: Cells) -> Found:
        """What is on the disk, expired or not, in doubt or not, sealed or not."""
        return self._nvme.locate(keys, cells)

    def find(self, keys: Keys, cells: Cells) -> npt.NDArray[np.bool_]:
        """Which cells are on the disk, have not expired and are not in doubt."""
        return self._nvme.find(keys, cells).held

    def touch(
        self, keys: Keys, cells: Cells, stamp: int, ttl_s: int | None = None
    ) -> npt.NDArray[np.bool_]:
        """Slide what is on the disk, as ``HostTier.touch`` does; which of the cells are there."""
        found = self._nvme.find(keys, cells)
        if found.held.any():
            self._nvme.touch(found.slots[found.held], stamp, ttl_s)
        return found.held

    def want(self, slots: Slots) -> None:
        """Cells of the host tier were used again that are not on the disk."""
        if self.has_disk:
            self._writes.want(slots)

    def keep_ahead(self) -> None:
        """A put takes room in the arena: what leaves next is to be on the disk before."""
        self._writes.step()

    def are_held(self, numbers: Slots) -> npt.NDArray[np.bool_]:
        """Of which records that ``locate`` has named the cells are on the disk still."""
        return self._nvme.are_held(numbers)

    def are_in_doubt(self, numbers: Slots) -> npt.NDArray[np.bool_]:
        """Of which records that ``locate`` has named the disk refused to read the cells."""
        return self._nvme.are_in_doubt(numbers)

    def drop(self, keys: Keys) -> None:
        """What the arena had of a block was damaged: so may be what was written of it.

        A copy that stayed would come up again and again, and keep its own repair out.
        """
        if self._nvme.phase is Phase.OPEN:
            self._nvme.delete(keys)

    @property
    def disk(self) -> NvmeTier | None:
        """The NVMe tier while it is open."""
        return self._nvme if self._nvme.phase is Phase.OPEN else None

    def erase(self, keys: Keys) -> Erasure:
        """Let blocks be on the disk no more, from now on; done when that is for good.

        A disk that is away just now does it when it is back.
        """
        if self._is_left or self._nvme.phase is Phase.REFUSED:
            return Erasure(is_owed=True)
        if not self.has_disk or not len(keys):
            return Erasure(is_done=True)
        return self._erasures.setdefault(self._nvme.delete(keys), Erasure())

    def begin(self, keys: Keys, cells: Cells) -> Promotion:
        """Bring cells up into the host tier, and keep them there until ``end``."""
        return self._promotions.begin(keys, cells)

    def end(self, promotion: Promotion) -> None:
        """The caller has leased what it wants."""
        self._promotions.end(promotion)

    def poll(self) -> None:
        """Go on with what the disk has done."""
        self._take(self._nvme.poll())

    def tick(self) -> None:
        """``poll``, and whatever time has brought."""
        self._take(self._nvme.tick())
        self._writes.step()

    def stop(self) -> None:
        """End the disk work."""
        self._nvme.stop()

    def drain_changes(self) -> Changes:
        """Cells that came to both tiers together, and went, since the last call."""
        changes = self._host.drain_changes()
        if self._nvme.phase is Phase.OPEN:
            lower = self._nvme.drain_changes()
            if changes or lower:
                changes = joined(changes, lower, self._held_above, self._held_below)
        if not changes:
            return Changes.empty()
        return Changes(
            keys=as_keys(b"".join(change.key for change in changes)),
            cells=np.array([change.cell for change in changes], np.uint8),
            spans=np.array([change.span for change in changes], np.uint64),
            added=np.array([change.added for change in changes], np.bool_),
        )

    def snapshot(self) -> Changes:
        """All that either tier holds and that is not in doubt, as if it had just come."""
        table, slots = self._host.table, self._host.held_slots()
        below = self._nvme.sure_records()
        below = below[~table.find(as_keys(below["key"].tobytes()), below["cell"].copy()).held]
        return Changes(
            keys=np.concatenate([table.keys_of(slots), as_keys(below["key"].tobytes())]),
            cells=np.concatenate([table.slots["cell"][slots], below["cell"]]),
            spans=np.concatenate([table.slots["span"][slots], below["span"]]),
            added=np.ones(len(slots) + len(below), np.bool_),
        )

    def metadata_bytes(self) -> int:
        """Memory for bookkeeping."""
        return self._nvme.metadata_bytes()

    def _take(self, done: Sequence[Done]) -> None:
        if self._epoch != self._nvme.epoch:
            self._epoch = self._nvme.epoch
            for follower in self._followers:
                follower()
        if self._nvme.phase is Phase.REFUSED:
            while self._erasures:
                self._erasures.popitem()[1].is_owed = True
        for one in done:
            if one.result is Result.DELETED and one.ticket in self._erasures:
                self._erasures.pop(one.ticket).is_done = True
            elif not self._writes.take(one):
                self._promotions.take(one)
        if done:
            self._writes.step()
            self._promotions.advance()

    def _held_above(self, names: Sequence[Name]) -> list[bool]:
        held: list[bool] = self._host.table.find(*_packed(names)).held.tolist()
        return held

    def _held_below(self, names: Sequence[Name]) -> list[bool]:
        held: list[bool] = self._nvme.holds(*_packed(names)).tolist()
        return held


class NoDisk:
    """A ``DiskQueue`` of which nothing ever comes."""

    def start(self) -> None:
        return

    def submit(self, requests: Sequence[Request]) -> None:
        raise AssertionError("asked while away")

    def poll(self) -> list[Event]:
        return []

    def stop(self) -> None:
        return


def _packed(names: Sequence[Name]) -> tuple[Keys, Cells]:
    """Cells as tiers are asked for many."""
    cells = np.array([cell for _, cell in names], np.uint8)
    return as_keys(b"".join(key for key, _ in names)), cells
