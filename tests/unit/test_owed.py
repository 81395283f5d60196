"""What a disk is owed is told to it at each start until it has done it, and is not forgotten."""

from pathlib import Path
from typing import cast

from kvstore.burials import Burial
from kvstore.key import Keys
from kvstore.lasting import Lasting
from kvstore.owed import OWED_FILE, OwedDeletes
from kvstore.tiers.behind import Behind, Erasure
from tests.faults import FaultyFiles, UnreadableFiles
from tests.worlds import key_number

FOLDER = Path("/node")


class Disk:
    """Notes what it is to forget, and has not done it yet."""

    def __init__(self) -> None:
        self.asked: list[set[bytes]] = []
        self.erasure = Erasure()

    def erase(self, keys: Keys) -> Erasure:
        self.asked.append({key.tobytes() for key in keys})
        return self.erasure


def started(files: FaultyFiles) -> tuple[OwedDeletes, Disk]:
    disk = Disk()
    return OwedDeletes(cast(Behind, disk), Lasting(files, FOLDER), wall_ms=1000), disk


def owe(owed: OwedDeletes, number: int) -> bool:
    return owed.add({key_number(number): Burial(number, 1000)}, wall_ms=1000)


def test_a_disk_is_told_until_it_has_done_it() -> None:
    files = FaultyFiles()
    owed, disk = started(files)
    assert disk.asked == []
    assert owe(owed, 1)
    assert owe(owed, 1), "it is durable already"
    for _ in range(2):
        owed, disk = started(files)
        assert disk.asked == [{key_number(1)}]
        owed.step()
    disk.erasure.is_done = True
    owed.step()
    assert started(files)[1].asked == []


def test_what_is_owed_since_is_not_paid_with_that() -> None:
    files = FaultyFiles()
    owe(started(files)[0], 1)
    owed, disk = started(files)
    disk.erasure.is_done = True
    owe(owed, 2)
    owed.step()
    assert started(files)[1].asked == [{key_number(1), key_number(2)}]


def test_a_debt_that_cannot_be_struck_off_is_paid_twice() -> None:
    files = FaultyFiles()
    owe(started(files)[0], 1)
    owed, disk = started(files)
    disk.erasure.is_done = True
    files.fail_at = files.operations + 1
    owed.step()
    assert started(files)[1].asked == [{key_number(1)}]
    owed.step()
    assert started(files)[1].asked == []


def test_a_debt_that_cannot_be_read_is_paid_when_it_can() -> None:
    files = UnreadableFiles()
    owe(started(files)[0], 1)
    files.away = OWED_FILE
    owed, disk = started(files)
    assert not owed.is_read
    assert not owe(owed, 2)
    owed.mend()
    assert disk.asked == []
    files.away = ""
    owed.mend()
    assert owed.is_read
    assert disk.asked == [{key_number(1), key_number(2)}]
    assert started(files)[1].asked == [{key_number(1), key_number(2)}], "it is not done yet"
    disk.erasure.is_done = True
    owed.step()
    assert started(files)[1].asked == []
