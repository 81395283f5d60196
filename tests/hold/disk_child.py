"""A process that kills itself at every boundary of its disk work, and looks at what is left.

``python -m tests.hold.disk_child FOLDER SEED STRIDE WHERE``: a fork plays a script on a real slab
and a real catalog, and ends with SIGKILL before its N-th operation on either of them, or its N-th
system call that changes a file; then the parent begins anew on the same files and checks them. N
grows by STRIDE until a fork survives. At the end the number of kills is printed.
"""

import os
import pickle
import random
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from kvstore.fs import Mapped
from kvstore.tiers.nvme.catalog import DATA_FILE, Catalog, Change, Content, read_catalog
from kvstore.tiers.nvme.disk import LinuxDisk
from kvstore.tiers.nvme.folder import CatalogFolder
from kvstore.tiers.nvme.identity import Identity
from tests.hold.tracing import killed_at_call
from tests.nvme_script import OPERATIONS, random_operation
from tests.nvme_world import CELLS_MAX, InlineQueue, NvmeWorld

Cells = set[tuple[bytes, int]]
Told = tuple[Cells, Cells, set[bytes]]
"""What is held, what was ever offered, and which blocks are deleted."""


class Fuse:
    """Ends this process at the N-th operation; 0 never."""

    def __init__(self, at: int) -> None:
        self._at = at
        self._count = 0

    def burn(self) -> None:
        self._count += 1
        if self._count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)


class FusedDisk:
    """A real file with a fuse before every operation that changes it."""

    def __init__(self, disk: LinuxDisk, fuse: Fuse) -> None:
        self.is_direct = disk.is_direct
        self._disk = disk
        self._fuse = fuse

    def size_bytes(self) -> int:
        return self._disk.size_bytes()

    def allocate(self, size_bytes: int) -> None:
        self._fuse.burn()
        self._disk.allocate(size_bytes)

    def read(self, buffers: Sequence[Mapped], offset: int) -> int:
        return self._disk.read(buffers, offset)

    def write(self, buffers: Sequence[Mapped], offset: int) -> int:
        self._fuse.burn()
        # In two, so that a kill can come in the middle of a slot.
        if len(buffers) > 1:
            return self._disk.write(buffers[:1], offset)
        return self._disk.write(buffers, offset)

    def sync(self) -> None:
        self._fuse.burn()
        self._disk.sync()

    def close(self) -> None:
        self._disk.close()


class FusedCatalog:
    """A real catalog, and its place, with a fuse before and after every commit."""

    def __init__(self, folder: Path, fuse: Fuse) -> None:
        self.folder = folder
        self._fuse = fuse
        self._catalog: Catalog | None = None

    def read(self) -> Content | None:
        return read_catalog(self.folder) if (self.folder / DATA_FILE).exists() else None

    def discard(self) -> None:
        self._fuse.burn()
        shutil.rmtree(self.folder, ignore_errors=True)

    def open(self, identity: Identity, change: Change) -> "FusedCatalog":
        self._fuse.burn()
        self._catalog = CatalogFolder(self.folder, CELLS_MAX).open(identity, change)
        return self

    def commit(self, change: Change) -> None:
        assert self._catalog is not None, "not open"
        self._fuse.burn()
        self._catalog.commit(change)
        self._fuse.burn()

    def close(self) -> None:
        assert self._catalog is not None, "not open"
        self._catalog.close()


class ToldQueue(InlineQueue):
    """Says what its world expects of a successor before it does anything that a kill could cut."""

    world: "RealWorld"

    def work(self) -> None:
        self.world.tell()
        super().work()


class RealWorld(NvmeWorld):
    """A world on real files."""

    folder: Path
    fuse: Fuse
    told: int

    def new_queue(self) -> InlineQueue:
        disk = FusedDisk(LinuxDisk.open(self.folder / "slab"), self.fuse)
        catalog = FusedCatalog(self.folder / "catalog", self.fuse)
        queue = ToldQueue(disk, catalog, self.arena, self.rng)
        queue.world = self
        return queue

    def tell(self) -> None:
        os.write(self.told, pickle.dumps((self.held(), self.offered, self.deleted)))


def real_world(folder: Path, seed: int, kill_at: int) -> RealWorld:
    world = RealWorld(seed)
    world.folder, world.fuse = folder, Fuse(kill_at)
    world.told = os.open(folder / "told", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    return world


def play(folder: Path, seed: int, kill_at: int) -> None:
    world = real_world(folder, seed, kill_at)
    world.start()
    world.queue.is_eager = False
    script = random.Random(seed)
    for _ in range(OPERATIONS):
        random_operation(world, script)
    world.queue.is_eager = True
    world.settle()
    world.tell()


def told_last(folder: Path) -> Told:
    """What the last life said of itself before it ended."""
    last: Told = (set(), set(), set())
    with (folder / "told").open("rb") as told:
        while True:
            try:
                last = pickle.load(told)
            except (EOFError, pickle.UnpicklingError):
                return last


def check(folder: Path, seed: int) -> None:
    """Begin anew on what is left, and compare it with the last that was told."""
    world = real_world(folder, seed, kill_at=0)
    world.promised, world.offered, world.deleted = told_last(folder)
    world.start()
    world.check_after_start()
    world.tier.stop()
    os.close(world.told)


def killed_at_operation(folder: Path, seed: int, kill_at: int) -> bool:
    """Play; the fuse kills."""
    child = os.fork()
    if not child:
        play(folder, seed, kill_at)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"the fork ended with status {status}")
    return bool(status)


def killed_in_a_call(folder: Path, seed: int, kill_at: int) -> bool:
    """Play; killed before a system call, be it LMDB's."""
    return killed_at_call(lambda: play(folder, seed, kill_at=0), kill_at)


def killed_in_a_rebuild(folder: Path, seed: int, kill_at: int) -> bool:
    """Play to the end, lose the catalog; killed while it is made anew from the slab."""
    child = os.fork()
    if not child:
        play(folder, seed, kill_at=0)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the fork failed")
    data = folder / "catalog" / DATA_FILE
    data.write_bytes(bytes(data.stat().st_size))
    return killed_at_call(lambda: real_world(folder, seed, kill_at=0).start(), kill_at)


KILLS = {
    "operation": killed_at_operation,
    "call": killed_in_a_call,
    "rebuild": killed_in_a_rebuild,
}


def main() -> None:
    folder, seed, stride = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    kill = KILLS[sys.argv[4]]
    kill_at, kills, killed = 1 + seed % stride, 0, True
    while killed:
        run = folder / str(kill_at)
        run.mkdir()
        try:
            killed = kill(run, seed, kill_at)
            check(run, seed)
        except BaseException:
            print(f"seed {seed}, killed before {sys.argv[4]} {kill_at}", file=sys.stderr)
            raise
        shutil.rmtree(run)
        kill_at, kills = kill_at + stride, kills + killed
    print(kills)


if __name__ == "__main__":
    main()
