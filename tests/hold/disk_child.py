"""A process that kills itself at every boundary of its disk work, and looks at what is left.

``python -m tests.hold.disk_child FOLDER SEED STRIDE``: a fork plays a script on a real slab and a
real catalog, and ends itself with SIGKILL before its N-th operation on either of them; then the
parent begins anew on the same files and checks them. N grows by STRIDE until a fork survives. At
the end the number of kills is printed.
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
from kvstore.tiers.nvme.catalog import Change, Content, LmdbCatalog, read_catalog
from kvstore.tiers.nvme.disk import LinuxDisk
from kvstore.tiers.nvme.identity import Identity
from tests.nvme_script import OPERATIONS, random_operation
from tests.nvme_world import CELLS_MAX, InlineQueue, NvmeWorld


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
        self._folder = folder
        self._fuse = fuse
        self._catalog: LmdbCatalog | None = None

    def read(self) -> Content | None:
        return read_catalog(self._folder) if (self._folder / "data.mdb").exists() else None

    def discard(self) -> None:
        self._fuse.burn()
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, identity: Identity) -> "FusedCatalog":
        self._fuse.burn()
        self._catalog = LmdbCatalog.open(self._folder, identity, CELLS_MAX)
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


def check(folder: Path, seed: int) -> None:
    """Begin anew on what is left, and compare it with the last that was told."""
    world = real_world(folder, seed, kill_at=0)
    with (folder / "told").open("rb") as told:
        while True:
            try:
                world.promised, world.offered, world.deleted = pickle.load(told)
            except (EOFError, pickle.UnpicklingError):
                break
    world.start()
    world.check_after_start()
    world.tier.stop()
    os.close(world.told)


def main() -> None:
    folder, seed, stride = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    kill_at, kills, status = 1 + seed % stride, 0, 1
    while status:
        run = folder / str(kill_at)
        run.mkdir()
        child = os.fork()
        if not child:
            play(run, seed, kill_at)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status not in (0, signal.SIGKILL):
            raise SystemExit(f"the fork ended with status {status} at operation {kill_at}")
        try:
            check(run, seed)
        except BaseException:
            print(f"seed {seed}, killed before operation {kill_at}", file=sys.stderr)
            raise
        shutil.rmtree(run)
        kill_at, kills = kill_at + stride, kills + bool(status)
    print(kills)


if __name__ == "__main__":
    main()
