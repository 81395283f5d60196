"""A process that damages what a real slab and a real catalog hold, and looks at what comes of it.

``python -m tests.hold.damage_child FOLDER SEED COUNT``: a script is played to its end; then COUNT
times a copy of its files is damaged in one place, and a fork begins anew on them, at a moment
hours before or after. It must find no wrong byte and nothing that was deleted, lose no more than
was damaged, take every cell again, and be in order after one more start. At the end it is printed
how often which damage was done.
"""

import os
import random
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kvstore.tiers.nvme.catalog import DATA_FILE, CatalogDamage, Content, read_catalog
from kvstore.tiers.nvme.spill import Declined, Phase, Result
from kvstore.tiers.nvme.walk import pack, unpack
from tests.hold.disk_child import FusedCatalog, RealWorld, check, play, real_world, told_last
from tests.nvme_script import NAMES
from tests.worlds import key_number

HOURS = (-30, -5, 0, 5, 30)


def read_in_a_fork(folder: Path) -> Content | None:
    """What ``walk`` does, without the start of a whole interpreter."""
    if not (folder / DATA_FILE).exists():
        return None
    answer = folder.parent / "answer"
    child = os.fork()
    if not child:
        os.close(2)  # a reader that aborts says so there
        try:
            answer.write_bytes(pack(read_catalog(folder)))
        except CatalogDamage:
            os._exit(3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        raise CatalogDamage(f"its reader ended with status {status}")
    return unpack(answer.read_bytes())


def flip(file: Path, rng: random.Random) -> None:
    """One bit."""
    with file.open("r+b") as opened:
        at = rng.randrange(file.stat().st_size)
        opened.seek(at)
        found = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([found ^ 1 << rng.randrange(8)]))


def tear(file: Path, rng: random.Random) -> None:
    """A sector of noise."""
    with file.open("r+b") as opened:
        opened.seek(rng.randrange(file.stat().st_size // 512) * 512)
        opened.write(rng.randbytes(512))


def truncate(file: Path, rng: random.Random) -> None:
    """The end is gone, at any byte."""
    os.truncate(file, rng.randrange(file.stat().st_size))


def remove(file: Path, rng: random.Random) -> None:
    """All of it is gone."""
    file.unlink()


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    flip, flip, flip, flip, tear, tear, truncate, remove
)  # fmt: skip


class Trial:
    """One start on damaged files."""

    world: RealWorld

    def __init__(self, folder: Path, seed: int, hours: int) -> None:
        self._folder, self._seed, self._hours = folder, seed, hours

    def run(self, loses_at_most: int) -> None:
        world = self.world = real_world(self._folder, self._seed, kill_at=0)
        world.promised, world.offered, world.deleted = told_last(self._folder)
        world.clock.wall_now_ms += self._hours * 3_600_000
        world.start()
        assert world.tier.phase is Phase.OPEN, world.tier.reason
        held = world.held()
        assert held <= world.offered, "a cell that nobody stored"
        assert not {key for key, _ in held} & world.deleted, "a deleted block came back"
        world.check_accounting()
        world.check_all_load()
        lost = world.promised - world.held()
        assert len(lost) <= loses_at_most, f"{len(lost)} cells are lost"
        self._check_clock()
        self._repair()
        world.check_accounting()
        world.tell()

    def _check_clock(self) -> None:
        """What had a minute to live has no more, wherever the clock went."""
        self.world.clock.advance(61)
        self.world.take(self.world.tier.tick())
        self.world.settle()
        assert not self.world.tier.held_records()["ttl_s"].any(), "a cell outlives its class"

    def _repair(self) -> None:
        world = self.world
        for number in range(NAMES):
            for cell in range(2):
                answer = world.store(number, cell)
                world.settle()
                if answer is not Declined.HELD:
                    assert isinstance(answer, int), answer
                    assert world.results[answer] is Result.STORED, "the next store does not repair"
                assert (key_number(number), cell) in world.held()


def losses(file: str, damage: Callable[[Path, random.Random], None], promised: int) -> int:
    """How many cells it may cost."""
    if file != "slab":
        return 0
    return 1 if damage is flip or damage is tear else promised


def in_a_fork(life: Callable[[], None]) -> int:
    """How a life of its own ended: 0 if well."""
    child = os.fork()
    if not child:
        try:
            life()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main() -> None:
    folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    whole = folder / "whole"
    whole.mkdir()
    assert not in_a_fork(partial(play, whole, seed, 0))
    FusedCatalog.read = lambda self: read_in_a_fork(self.folder)  # type: ignore[method-assign]
    rng, done = random.Random(seed), Counter[str]()
    for number in range(count):
        damaged = folder / str(number)
        shutil.copytree(whole, damaged)
        file, damage = rng.choice(("slab", "catalog/data.mdb")), rng.choice(DAMAGES)
        damage(damaged / file, rng)
        may_lose = losses(file, damage, len(told_last(damaged)[0]))
        hours = rng.choice(HOURS)
        trial = partial(Trial(damaged, seed, hours).run, may_lose)
        for life in (trial, partial(check, damaged, seed)):
            if in_a_fork(life):
                what = f"{damage.__name__} {file}, {hours} h"
                raise SystemExit(f"seed {seed}, number {number}: {what}")
        done[f"{damage.__name__} {file}"] += 1
        shutil.rmtree(damaged)
    print(dict(done))


if __name__ == "__main__":
    main()
