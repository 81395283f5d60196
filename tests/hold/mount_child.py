"""A process that keeps an NVMe tier on a small file system of its own, and spoils that.

``unshare --user --map-root-user --mount python -m tests.hold.mount_child FOLDER SCENE``: a file
system of four MiB is mounted at FOLDER/disk, in a namespace that ends with this process. It exits
with 0 if everything went as it must.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvstore.tiers.nvme.open_slab import PAUSE_S
from kvstore.tiers.nvme.spill import Declined, Phase, Result
from kvstore.tiers.nvme.tier import RESTART_S
from tests.disk_node import Node

NUMBERS = range(1, 200)
"""More than any file system here has room for the rows of."""


def mount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)], check=True)


@contextmanager
def ballast(disk: Path) -> Iterator[None]:
    """Somebody else fills the file system to its last byte."""
    file = disk / "ballast"
    with file.open("wb", buffering=0) as stream, suppress(OSError):
        while stream.write(bytes(4096)) == 4096:
            pass
    assert not os.statvfs(disk).f_bfree
    yield
    file.unlink()


def refused_start(node: Node, why: str) -> None:
    """It says why in one sentence, takes nothing, and asks the disk again."""
    node.begin()
    while not node.tier.reason:
        node.step()
    assert why in node.tier.reason, node.tier.reason
    assert "\n" not in node.tier.reason
    assert node.tier.store(node.spill(1)) is Declined.CLOSED


def begin_again(node: Node) -> None:
    node.clock.advance(RESTART_S[0])
    node.tier.tick()
    node.wait_for_phase()
    assert node.tier.phase is Phase.OPEN, node.tier.reason


def full_at_the_start(node: Node, disk: Path) -> None:
    with ballast(disk):
        refused_start(node, "No space left on device")
    begin_again(node)
    assert node.store(1) is Result.STORED
    assert node.load(1) is Result.LOADED


def full_while_it_runs(node: Node, disk: Path) -> None:
    node.start()
    assert node.store(1) is Result.STORED
    stored = [1]
    with ballast(disk):
        for number in NUMBERS[1:]:
            result = node.store(number, pages=2)
            if result is not Result.STORED:
                break
            stored.append(number)
        assert result is Result.FAILED, "the catalog always found room"
        assert node.tier.store(node.spill(number)) is Declined.CLOSED, "nothing for a while"
        assert all(node.load(kept) is Result.LOADED for kept in stored if node.holds(kept))
    node.clock.advance(PAUSE_S)
    node.take(node.tier.tick())
    assert node.store(number) is Result.STORED, "the next put does not repair"
    node.tier.stop()
    node.start()
    assert node.load(number) is Result.LOADED
    assert node.load(stored[-1]) is Result.LOADED, "what was promised before is not there"


def read_only_at_the_start(node: Node, disk: Path) -> None:
    node.start()
    assert node.store(1) is Result.STORED
    node.tier.stop()
    mount(disk, "remount,ro")
    refused_start(node, "Read-only file system")
    mount(disk, "remount,rw")
    begin_again(node)
    assert node.load(1) is Result.LOADED


SCENES: dict[str, Callable[[Node, Path], None]] = {
    scene.__name__: scene
    for scene in (full_at_the_start, full_while_it_runs, read_only_at_the_start)
}


def main() -> None:
    folder, scene = Path(sys.argv[1]), SCENES[sys.argv[2]]
    arena, disk = folder / "arena", folder / "disk"
    arena.mkdir()
    disk.mkdir()
    mount(disk, "size=4m")
    (disk / "nvme").mkdir()
    node = Node(arena, disk / "nvme")
    scene(node, disk)
    node.tier.stop()


if __name__ == "__main__":
    main()
