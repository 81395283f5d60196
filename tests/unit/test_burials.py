"""The book of burials and its log: what was deleted is known after any crash, by all neighbours."""

from pathlib import Path

import numpy as np
import pytest

from kvstore import burials as burials_module
from kvstore.burial_log import BURIAL_LOG_FILE, ROW, BurialLog
from kvstore.burials import BURIAL_S, Burial, BurialBook, BurialDigest, BurialPage, DeleteClock
from kvstore.fs import DurableFiles, LinuxFileSystem
from tests.faults import FaultyFiles, UnreadableFiles
from tests.worlds import key_number

NOW_MS = 1_700_000_000_000
FOLDER = Path("/node")
FILE = FOLDER / BURIAL_LOG_FILE


def book_of(*rows: tuple[int, int]) -> BurialBook:
    """A book with burials (number of a key, id), in this order."""
    book = BurialBook()
    for number, delete_id in rows:
        book.enter(key_number(number), Burial(delete_id, NOW_MS))
    return book


def every_page(book: BurialBook, count: int) -> list[BurialPage]:
    pages = [book.page(0, count, NOW_MS)]
    while pages[-1].next:
        pages.append(book.page(pages[-1].next, count, NOW_MS))
    return pages


def known(book: BurialBook) -> dict[bytes, int]:
    return {key: burial.id for key, burial in book.items()}


def test_the_newest_delete_of_a_block_counts() -> None:
    book = book_of((1, 10), (2, 20))
    keys = np.stack([np.frombuffer(key_number(n), np.uint8) for n in (1, 1, 2, 3)])
    assert book.newer(keys, np.array([10, 11, 19, 1], np.uint64)).tolist() == [
        False, True, False, True,
    ]  # fmt: skip
    assert not book.enter(key_number(1), Burial(9, NOW_MS))
    assert book.enter(key_number(1), Burial(12, NOW_MS))
    assert len(book) == 2
    assert book.get(key_number(1)) == Burial(12, NOW_MS)
    assert book.get(key_number(3)) is None


def test_equal_books_have_equal_digests_however_they_came_about() -> None:
    assert BurialBook().digest() == BurialDigest()
    one, other = book_of((1, 10), (2, 20), (1, 30)), book_of((1, 30), (2, 20))
    assert one.digest() == other.digest()
    assert one.digest() != book_of((1, 30)).digest()
    assert one.digest() != book_of((1, 30), (2, 21)).digest()
    assert one.digest() != book_of((1, 30), (3, 20)).digest()


def test_pages_together_are_the_book_newest_first() -> None:
    book = book_of(*((number, 100 + number % 5) for number in range(11)))
    pages = every_page(book, count=4)
    assert [len(page) for page in pages] == [4, 4, 3]
    ids = [one for page in pages for one in page.ids.tolist()]
    assert ids == sorted(ids, reverse=True)
    taught = BurialBook()
    for page in pages:
        for key, delete_id, age_ms in zip(page.keys, page.ids, page.ages_ms, strict=True):
            taught.enter(key.tobytes(), Burial(int(delete_id), NOW_MS - int(age_ms)))
    assert taught.digest() == book.digest()
    assert every_page(BurialBook(), 4)[0].keys.shape == (0, 32)


def test_what_is_too_old_is_forgotten_and_no_news_any_more() -> None:
    book = book_of((1, 10), (2, 20))
    book.enter(key_number(3), Burial(30, NOW_MS + 5000))
    book.forget_outdated(NOW_MS + BURIAL_S * 1000 - 1)
    assert len(book) == 3
    book.forget_outdated(NOW_MS + BURIAL_S * 1000)
    assert known(book) == {key_number(3): 30}
    assert not book.enter(key_number(1), Burial(10, NOW_MS)), "a neighbour's book is slower"
    assert book.enter(key_number(1), Burial(21, NOW_MS))
    assert book.digest() == book_of((3, 30), (1, 21)).digest()


def test_too_many_burials_forget_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burials_module, "BURIALS_MAX", 3)
    book = book_of((1, 50), (2, 20), (3, 30), (4, 40))
    book.forget_outdated(NOW_MS)
    assert set(known(book).values()) == {50, 30, 40}
    assert book.floor == 20


def test_ids_grow_whatever_the_clocks_say() -> None:
    clock = DeleteClock()
    first = clock.next_id(NOW_MS)
    assert clock.next_id(NOW_MS - 10_000) == first + 1, "the clock was set back"
    clock.see(first + 1000)
    assert clock.next_id(NOW_MS) == first + 1001
    assert clock.next_id(NOW_MS + 1) > first + 1001


def logged(files: DurableFiles, folder: Path = FOLDER) -> tuple[BurialBook, BurialLog]:
    """As a node starts."""
    book = BurialBook()
    return book, BurialLog(files, folder, book, NOW_MS)


def bury(book: BurialBook, log: BurialLog, number: int, delete_id: int) -> bool:
    burial = Burial(delete_id, NOW_MS)
    book.enter(key_number(number), burial)
    return log.append([(key_number(number), burial)])


def test_the_log_on_a_real_disk_is_read_again(tmp_path: Path) -> None:
    book, log = logged(LinuxFileSystem(), tmp_path)
    assert len(book) == 0
    assert all(bury(book, log, number, 10 + number) for number in range(5))
    again, _ = logged(LinuxFileSystem(), tmp_path)
    assert again.items() == book.items()
    assert (tmp_path / BURIAL_LOG_FILE).stat().st_mode & 0o777 == 0o600


def test_every_torn_tail_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    whole = FaultyFiles()
    book, log = logged(whole)
    for number in range(3):
        bury(book, log, number, 10 + number)
    data = whole.read(FILE)
    assert data is not None
    for length in range(2 * ROW.itemsize, len(data)):
        files = FaultyFiles()
        files.replace(FILE, data[:length])
        caplog.clear()
        again, after = logged(files)
        assert known(again) == {key_number(0): 10, key_number(1): 11}
        assert ("was torn" in caplog.text) == (length > 2 * ROW.itemsize)
        assert bury(again, after, 9, 99)
        assert known(logged(files)[0]) == {key_number(0): 10, key_number(1): 11, key_number(9): 99}


@pytest.mark.parametrize("at", [0, 35, 44, ROW.itemsize - 1])
def test_a_row_with_a_flipped_bit_is_passed_over(at: int) -> None:
    files = FaultyFiles()
    book, log = logged(files)
    for number in range(3):
        bury(book, log, number, 10 + number)
    data = bytearray(files.read(FILE) or b"")
    data[ROW.itemsize + at] ^= 4
    files.replace(FILE, bytes(data))
    assert known(logged(files)[0]) == {key_number(0): 10, key_number(2): 12}


def test_whatever_write_fails_what_was_answered_is_there() -> None:
    """Fail the first operation, the second, ...: the log is whole again with the next chance."""
    for fail_at in range(1, 100):
        files = FaultyFiles(fail_at)
        book, log = logged(files)
        answered = {}
        for number in range(4):
            if bury(book, log, number, 10 + number):
                answered = known(book)
        assert answered.items() <= known(logged(files.copy())[0]).items()
        assert log.mend()
        assert known(logged(files.copy())[0]) == known(book)
        if not files.faults:
            return
    raise AssertionError("the sweep has no end")


def test_a_log_that_cannot_be_read_is_said_once_and_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = UnreadableFiles()
    assert bury(*logged(files), 1, 10)
    written = files.read(FILE)
    files.away = FILE.name
    book, log = logged(files)
    assert not log.is_read
    assert not bury(book, log, 2, 20), "nothing is durable that the file does not say"
    assert not log.mend()
    assert caplog.text.count("can't be read") == 1
    files.away = ""
    assert files.read(FILE) == written, "it is not written over"
    assert log.mend()
    assert log.is_read
    assert known(book) == known(logged(files)[0]) == {key_number(1): 10, key_number(2): 20}


def test_a_log_that_is_mostly_outdated_is_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.burial_log.OUTDATED_ROWS_MAX", 4)
    files = FaultyFiles()
    book, log = logged(files)
    book.raise_floor(7)
    for delete_id in range(10, 60):
        assert bury(book, log, 1, delete_id)
    assert len(files.read(FILE) or b"") <= 7 * ROW.itemsize
    again, _ = logged(files)
    assert known(again) == {key_number(1): 59}
    assert again.floor == 7


def test_a_clock_that_was_set_back_makes_no_burial_last_longer() -> None:
    files = FaultyFiles()
    book, log = logged(files)
    burial = Burial(10, NOW_MS + 1_000_000)
    book.enter(key_number(1), burial)
    log.append([(key_number(1), burial)])
    assert logged(files)[0].get(key_number(1)) == Burial(10, NOW_MS)
