"""Tenants: how often each was erased. Its epoch is in the root of all its key chains.

    erase ──> epoch + 1 ──> nobody computes the old keys any more ──> the old blocks are evicted

A tenant is named by a digest here. Epochs only grow: two nodes merge theirs by the larger one, and
none is ever forgotten, because an epoch that came back would bring the blocks back. One file keeps
them, written anew with every change. As long as it can't be read nobody knows what is in it: it is
not written over, and no tenant is erased here.

Does not cover: how engines learn an epoch (``kvstore.rpc``), keys (``kvstore.namespace``).
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from kvstore.errors import StateError, UnavailableError, UsageError
from kvstore.lasting import Lasting

log = logging.getLogger(__name__)

TENANT_BYTES = 16
TENANTS_MAX = 1 << 16
EPOCH_MAX = (1 << 63) - 1
PAGE_TENANTS_MAX = 4096
TENANTS_FILE = "tenants"
ROW = np.dtype([("tenant", f"V{TENANT_BYTES}"), ("epoch", "<u8")])
_CHECKSUM_BYTES = 8


def tenant_digest(name: str) -> bytes:
    """What a tenant is called among nodes."""
    return blake3(name.encode(), derive_key_context="samovar 2026 tenant v1").digest(TENANT_BYTES)


def check_tenant(tenant: bytes) -> None:
    """Raises ``UsageError`` for what can be no ``tenant_digest``."""
    if len(tenant) != TENANT_BYTES:
        raise UsageError(f"a tenant has {TENANT_BYTES} bytes here: take its tenant_digest")


@dataclass(frozen=True, slots=True)
class EpochDigest:
    """How many tenants were erased, and the XOR of what names their epochs."""

    tenants: int = 0
    fold: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class EpochPage:
    """Some tenants, uint8 ``[n, 16]``, and their epochs. ``next`` is where the next page starts."""

    tenants: npt.NDArray[np.uint8]
    epochs: npt.NDArray[np.uint64]
    next: int = 0

    def __len__(self) -> int:
        return len(self.epochs)


@dataclass(frozen=True, slots=True, eq=False)
class EpochNews:
    """Some tenants whose epochs have changed: who knows them goes by that ``version``."""

    page: EpochPage
    version: int


class TenantEpochs:
    """The epochs of all tenants that were ever erased."""

    def __init__(self, lasting: Lasting) -> None:
        self.version = 0
        """Grows with every change."""
        self._files = lasting.files
        self._path = lasting.folder / TENANTS_FILE
        self._epochs: dict[bytes, int] = {}
        self._changed: dict[bytes, int] = {}
        """The version in which each has changed last, in that order."""
        self._fold = 0
        self._is_durable = True
        self.is_read = True
        """Whether what is in the file is known. ``mend`` reads it where it could not be read."""
        try:
            self._read()
        except OSError as fault:
            self.is_read = False
            log.warning(
                "%s can't be read, which says which tenants were erased: until it can, nothing is "
                "shown, stored or erased here: %s",
                self._path,
                fault,
            )

    def epoch_of(self, tenant: bytes) -> int:
        """How often a tenant was erased."""
        return self._epochs.get(tenant, 0)

    def digest(self) -> EpochDigest:
        """Equal for two nodes exactly when they know the same epochs, but for rare chance."""
        return EpochDigest(len(self._epochs), self._fold)

    def page(self, start: int, count: int) -> EpochPage:
        """At most ``count`` tenants from the ``start``-th on, those first that were erased first.

        Epochs that change between two pages move nobody.
        """
        tenants = list(self._epochs)[start : start + min(count, PAGE_TENANTS_MAX)]
        stop = start + len(tenants)
        return self._page(tenants, stop if stop < len(self._epochs) else 0)

    def news(self, since: int, count: int) -> EpochNews:
        """At most ``count`` tenants that have changed since a version, in the order of change.

        Those that are left out have changed after the version that is answered.
        """
        newer = takewhile(lambda tenant: self._changed[tenant] > since, reversed(self._changed))
        tenants = list(newer)[::-1]
        shown = tenants[: min(count, PAGE_TENANTS_MAX)]
        is_all = len(shown) == len(tenants)
        return EpochNews(self._page(shown), self.version if is_all else self._changed[shown[-1]])

    def erase(self, tenant: bytes) -> int:
        """Begin a new epoch of a tenant; durable when this returns.

        ``UnavailableError``: nothing was done, the epoch of now is unknown here.
        """
        check_tenant(tenant)
        self.mend()
        if not self.is_read:
            raise UnavailableError(f"{self._path}: no tenant is erased here before it can be read")
        if tenant not in self._epochs and len(self._epochs) >= TENANTS_MAX:
            raise UsageError(f"{TENANTS_MAX} tenants were erased already: no further one can be")
        epoch = self.epoch_of(tenant) + 1
        self._enter(tenant, epoch)
        self.mend()
        if not self._is_durable:
            raise StateError(f"{self._path} could not be written: ask for the erasure once more")
        return epoch

    def merge(self, page: EpochPage) -> list[bytes]:
        """Take over larger epochs; whose."""
        rows = zip(page.tenants, page.epochs.tolist(), strict=True)
        news = [
            (tenant.tobytes(), epoch)
            for tenant, epoch in rows
            if self.epoch_of(tenant.tobytes()) < epoch <= EPOCH_MAX
        ]
        for tenant, epoch in news:
            self._enter(tenant, epoch)
        self.mend()
        return [tenant for tenant, _ in news]

    def goes_by(self, page: EpochPage) -> bool:
        """Whether these are the epochs of now."""
        rows = zip(page.tenants, page.epochs.tolist(), strict=True)
        return all(self.epoch_of(tenant.tobytes()) == epoch for tenant, epoch in rows)

    def mend(self) -> bool:
        """Read what could not be read, write down what is not written; whether all is durable."""
        if not self.is_read:
            with suppress(OSError):  # it was said at the start
                self._read()
                self.is_read = True
                log.warning("%s could be read", self._path)
        if self._is_durable or not self.is_read:
            return self.is_read
        rows = np.array(
            [(np.void(tenant), epoch) for tenant, epoch in self._epochs.items()], ROW
        ).tobytes()
        try:
            self._files.replace(self._path, rows + xxh3_64_digest(rows))
        except OSError as fault:
            log.warning("%s could not be written, it is tried again: %s", self._path, fault)
            return False
        self._is_durable = True
        return True

    def _page(self, tenants: Sequence[bytes], next_start: int = 0) -> EpochPage:
        return EpochPage(
            np.frombuffer(b"".join(tenants), np.uint8).reshape(-1, TENANT_BYTES),
            np.array([self._epochs[tenant] for tenant in tenants], np.uint64),
            next_start,
        )

    def _enter(self, tenant: bytes, epoch: int) -> None:
        former = self._epochs.get(tenant)
        if former is not None:
            self._fold ^= _name(tenant, former)
        self._epochs[tenant] = epoch
        self._fold ^= _name(tenant, epoch)
        self.version += 1
        self._changed.pop(tenant, None)
        self._changed[tenant] = self.version
        self._is_durable = False

    def _read(self) -> None:
        """Merge what the file says with what was heard meanwhile."""
        data = self._files.read(self._path)
        rows = b"" if data is None else data[:-_CHECKSUM_BYTES]
        is_whole = data is None or xxh3_64_digest(rows) == data[-_CHECKSUM_BYTES:]
        if len(rows) % ROW.itemsize or not is_whole:
            log.warning("%s is damaged: erasures before this start are unknown", self._path)
            rows = b""
        told = {bytes(row["tenant"]): int(row["epoch"]) for row in np.frombuffer(rows, ROW)}
        for tenant, epoch in told.items():
            if epoch > self.epoch_of(tenant):
                self._enter(tenant, epoch)
        self._is_durable = told == self._epochs


def _name(tenant: bytes, epoch: int) -> int:
    return xxh3_64_intdigest(tenant + epoch.to_bytes(8, "little"))
