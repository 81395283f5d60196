"""Hold files: a node's holds on disk, one small file each, replaced whole.

    holds/<digest of tenant, handle and origin>
    head (magic, tenant, epoch, until, ttl, born, counts)   names   keys   cells   sizes   checksum

``until`` and ``born`` are wall time; a clock that was set back makes nobody's hold longer than it
was promised. A file without cells says that a hold was released, and lies beside those that have
some. A file that does not verify is said once, and dropped; so is one of another version.

Does not cover: what a hold means (``kvstore.holds``).
"""

import logging
import struct
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from blake3 import blake3
from xxhash import xxh3_64_digest

from kvstore.clock import Clock
from kvstore.hold import Hold
from kvstore.key import KEY_BYTES
from kvstore.lasting import Lasting
from kvstore.tenants import TENANT_BYTES

log = logging.getLogger(__name__)

HOLDS_FOLDER = "holds"
_MAGIC = b"SMVHOLD3"
_HEAD = struct.Struct(f"<8s{TENANT_BYTES}sQQQQIIIII")
"""Magic, tenant, epoch, until, ttl, born, rows, replicas; bytes of handle, origin and partner."""
_RELEASED = b"\0released"
_CHECKSUM_BYTES = 8
_ROW_BYTES = KEY_BYTES + 1 + 8


class HoldFiles:
    """The files below a node's own folder."""

    def __init__(self, lasting: Lasting, clock: Clock) -> None:
        self._files = lasting.files
        self._folder = lasting.folder / HOLDS_FOLDER
        self._clock = clock

    def read(self) -> list[Hold]:
        """All holds and releases whose time is not up; what is over, or damaged, is removed."""
        try:
            self._files.make_folder(self._folder)
            names = self._files.names(self._folder)
        except OSError as fault:
            log.warning("holds from before this start are unknown: %s", fault)
            return []
        found = [hold for name in names if (hold := self._read_one(name)) is not None]
        now_s = self._clock.monotonic_s()
        for hold in found:
            if hold.until_s <= now_s:
                self.remove(hold)
        return [hold for hold in found if hold.until_s > now_s]

    def write(self, hold: Hold) -> None:
        """Durable when this returns; ``OSError`` says that the former one is there."""
        now_s, wall_ms = self._clock.monotonic_s(), self._clock.wall_ms()
        until_ms = wall_ms + max(0, round(1000 * (hold.until_s - now_s)))
        born_ms = max(0, wall_ms - max(0, round(1000 * (now_s - hold.born_s))))
        names = [text.encode() for text in (hold.handle, hold.origin, hold.partner)]
        head = _HEAD.pack(
            _MAGIC, hold.tenant, hold.tenant_epoch, until_ms, hold.ttl_ms, born_ms, len(hold),
            hold.replicas, *map(len, names),
        )  # fmt: skip
        arrays = hold.keys.tobytes() + hold.cells.tobytes() + hold.sizes_bytes.tobytes()
        data = head + b"".join(names) + arrays
        self._files.replace(self._path(hold), data + xxh3_64_digest(data))

    def remove(self, hold: Hold) -> None:
        """Forget a hold that is over."""
        self._remove(self._path(hold))

    def _read_one(self, name: str) -> Hold | None:
        path = self._folder / name
        if name.startswith("."):
            self._remove(path)  # a crash left it half written, so nobody was told of it
            return None
        try:
            data = self._files.read(path) or b""
        except OSError as fault:
            log.warning("the hold in %s is dropped: %s", path, fault)
            return None
        hold = _parse(data, self._clock)
        if hold is None:
            log.warning("the hold in %s is dropped: the file is damaged", path)
            self._remove(path)
        return hold

    def _remove(self, path: Path) -> None:
        try:
            self._files.remove(path)
        except OSError as fault:
            log.warning("a hold that is over may come back at the next start: %s", fault)

    def _path(self, hold: Hold) -> Path:
        kind = b"\0" + hold.origin.encode() if len(hold) else _RELEASED
        name = blake3(hold.tenant + hold.handle.encode() + kind).hexdigest()
        return self._folder / name[:32]


def _parse(data: bytes, clock: Clock) -> Hold | None:
    """What a file says, ``None`` if it is not one of ours, and whole."""
    body = data[:-_CHECKSUM_BYTES]
    if len(body) < _HEAD.size or xxh3_64_digest(body) != data[-_CHECKSUM_BYTES:]:
        return None
    magic, tenant, epoch, *rest = _HEAD.unpack_from(body)
    until_ms, ttl_ms, born_ms, rows, replicas, *lengths = rest
    at = _HEAD.size + sum(lengths)
    if magic != _MAGIC or len(body) != at + rows * _ROW_BYTES:
        return None
    edges = pairwise(accumulate(lengths, initial=_HEAD.size))
    handle, origin, partner = (body[start:stop].decode() for start, stop in edges)
    now_s, wall_ms = clock.monotonic_s(), clock.wall_ms()
    left_ms = min(until_ms - wall_ms, ttl_ms)
    cells_at, sizes_at = at + rows * KEY_BYTES, at + rows * (KEY_BYTES + 1)
    return Hold(
        tenant=tenant,
        handle=handle,
        keys=np.frombuffer(body, np.uint8, rows * KEY_BYTES, at).reshape(-1, KEY_BYTES),
        cells=np.frombuffer(body, np.uint8, rows, cells_at),
        sizes_bytes=np.frombuffer(body, np.uint64, rows, sizes_at),
        ttl_ms=ttl_ms,
        until_s=now_s + left_ms / 1000,
        born_s=now_s - max(0, wall_ms - born_ms) / 1000,
        replicas=replicas,
        origin=origin,
        partner=partner,
        tenant_epoch=epoch,
    )
