"""Epochs of tenants: they only grow, on every node, through any crash."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore import tenants as tenants_module
from kvstore.errors import StateError, UnavailableError, UsageError
from kvstore.fs import LinuxFileSystem
from kvstore.lasting import Lasting
from kvstore.tenants import (
    EPOCH_MAX,
    TENANT_BYTES,
    TENANTS_FILE,
    EpochDigest,
    EpochPage,
    TenantEpochs,
    tenant_digest,
)
from tests.faults import FaultyFiles, UnreadableFiles

FOLDER = Path("/node")
ACME, OTHER = tenant_digest("acme"), tenant_digest("other")


def epochs_in(files: FaultyFiles) -> TenantEpochs:
    return TenantEpochs(Lasting(files, FOLDER))


def pages_of(epochs: TenantEpochs, count: int) -> Iterator[EpochPage]:
    page = epochs.page(0, count)
    yield page
    while page.next:
        page = epochs.page(page.next, count)
        yield page


def one_page(tenant: bytes, epoch: int) -> EpochPage:
    return EpochPage(np.frombuffer(tenant, np.uint8).reshape(1, -1), np.array([epoch], np.uint64))


def test_a_tenants_digest_is_the_same_everywhere() -> None:
    assert tenant_digest("") != tenant_digest("acme")
    assert len(ACME) == TENANT_BYTES
    assert ACME.hex() == "a570e49af2cda44e92727b55c5363d2f"


def test_epochs_grow_and_outlive_the_node(tmp_path: Path) -> None:
    lasting = Lasting(LinuxFileSystem(), tmp_path)
    epochs = TenantEpochs(lasting)
    assert (epochs.epoch_of(ACME), epochs.version, epochs.digest()) == (0, 0, EpochDigest())
    assert [epochs.erase(ACME), epochs.erase(ACME), epochs.erase(OTHER)] == [1, 2, 1]
    assert epochs.version == 3
    again = TenantEpochs(lasting)
    assert (again.epoch_of(ACME), again.epoch_of(OTHER)) == (2, 1)
    assert again.digest() == epochs.digest()
    assert again.erase(ACME) == 3


def test_two_nodes_end_up_with_the_larger_epochs() -> None:
    one, other = epochs_in(FaultyFiles()), epochs_in(FaultyFiles())
    for number in range(5):
        one.erase(tenant_digest(str(number)))
    one.erase(ACME)
    other.erase(ACME)
    other.erase(ACME)
    assert one.digest() != other.digest()
    for page in pages_of(one, 2):
        other.merge(page)
    assert [one.merge(page) for page in pages_of(other, 99)] == [[ACME]]
    assert one.digest() == other.digest()
    version = one.version
    assert [one.merge(page) for page in pages_of(other, 99)] == [[]]
    assert one.version == version, "nothing to tell"
    assert one.epoch_of(ACME) == 2


@pytest.mark.parametrize("count", [1, 2, 99])
def test_what_has_changed_since_a_version_comes_in_the_order_of_change(count: int) -> None:
    epochs = epochs_in(FaultyFiles())
    names = [tenant_digest(str(number)) for number in range(4)]
    for tenant in (*names, names[1], names[0]):
        epochs.erase(tenant)
    found, since = [], 2
    while since < epochs.version:
        news = epochs.news(since, count)
        assert 0 < len(news.page) <= count
        rows = zip(news.page.tenants, news.page.epochs.tolist(), strict=True)
        found += [(tenant.tobytes(), epoch) for tenant, epoch in rows]
        assert news.version > since
        since = news.version
    assert found == [(names[2], 1), (names[3], 1), (names[1], 2), (names[0], 2)]
    assert len(epochs.news(epochs.version, count).page) == 0
    again = epochs_in_order(epochs.news(0, 99).page)
    assert again == [names[2], names[3], names[1], names[0]], "each once"


def epochs_in_order(page: EpochPage) -> list[bytes]:
    return [tenant.tobytes() for tenant in page.tenants]


def test_an_erasure_that_is_not_durable_is_said_and_tried_again() -> None:
    files = FaultyFiles(fail_at=2)
    epochs = epochs_in(files)
    with pytest.raises(StateError, match="once more"):
        epochs.erase(ACME)
    assert epochs_in(files.copy()).epoch_of(ACME) == 0
    assert epochs.mend()
    assert epochs_in(files.copy()).epoch_of(ACME) == 1


@pytest.mark.parametrize("cut", [1, 8, 24, 31])
def test_a_damaged_file_is_said(caplog: pytest.LogCaptureFixture, cut: int) -> None:
    files = FaultyFiles()
    epochs_in(files).erase(ACME)
    data = files.read(FOLDER / TENANTS_FILE) or b""
    files.replace(FOLDER / TENANTS_FILE, data[:-cut])
    assert epochs_in(files).epoch_of(ACME) == 0
    assert caplog.text.count("is damaged") == 1


@pytest.fixture
def unreadable() -> UnreadableFiles:
    files = UnreadableFiles()
    epochs = epochs_in(files)
    for tenant in (ACME, ACME, OTHER):
        epochs.erase(tenant)
    files.away = TENANTS_FILE
    return files


def test_a_file_that_cannot_be_read_is_said_once_and_kept(
    unreadable: UnreadableFiles, caplog: pytest.LogCaptureFixture
) -> None:
    kept = unreadable.copy()
    epochs = epochs_in(unreadable)
    assert not epochs.is_read
    assert epochs.digest() == EpochDigest()
    for _ in range(3):
        assert not epochs.mend()
        with pytest.raises(UnavailableError, match="before it can be read"):
            epochs.erase(ACME)
    assert caplog.text.count(str(FOLDER / TENANTS_FILE)) == 1
    unreadable.away = ""
    assert unreadable._files == kept._files, "it is not written over"
    assert epochs.mend()
    assert epochs.is_read
    assert (epochs.epoch_of(ACME), epochs.epoch_of(OTHER)) == (2, 1)
    assert epochs.digest() == epochs_in(unreadable).digest()
    assert unreadable._files == kept._files, "there is no news"
    assert epochs.erase(ACME) == 3


@pytest.mark.parametrize("heard", [1, 2, 3])
def test_what_is_heard_before_the_file_can_be_read_is_merged(
    unreadable: UnreadableFiles, heard: int
) -> None:
    kept = unreadable.copy()
    epochs = epochs_in(unreadable)
    assert epochs.merge(one_page(ACME, heard)) == [ACME]
    assert epochs.epoch_of(ACME) == heard, "nobody is to hear of an older one"
    unreadable.away = ""
    assert unreadable._files == kept._files
    version = epochs.version
    assert epochs.mend()
    assert epochs.version > version, "clients are to hear of it"
    assert (epochs.epoch_of(ACME), epochs.epoch_of(OTHER)) == (max(heard, 2), 1)
    again = epochs_in(unreadable)
    assert again.digest() == epochs.digest(), "what was heard is durable"
    assert (unreadable._files == kept._files) == (heard <= 2)


def test_an_erasure_reads_the_file_that_could_not_be_read(unreadable: UnreadableFiles) -> None:
    epochs = epochs_in(unreadable)
    unreadable.away = ""
    assert epochs.erase(ACME) == 3
    assert epochs_in(unreadable).epoch_of(OTHER) == 1


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants_module, "TENANTS_MAX", 1)
    epochs = epochs_in(FaultyFiles())
    with pytest.raises(UsageError, match="tenant_digest"):
        epochs.erase(b"acme")
    epochs.erase(ACME)
    with pytest.raises(UsageError, match="no further"):
        epochs.erase(OTHER)
    assert epochs.erase(ACME) == 2
    assert epochs.merge(one_page(ACME, EPOCH_MAX + 1)) == []
    assert epochs.merge(one_page(OTHER, 3)) == [OTHER], "a neighbour's are taken in"
