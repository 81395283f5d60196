"""Hold files: a node's holds on disk, one small file each, replaced whole.

    holds/<digest of tenant, handle and granter>
    head (magic, tenant, epoch, until, ttl, grant, released, counts)
    names   keys   cells   sizes   checksum

``until`` is wall time; a clock that was set back makes nobody's hold longer than it was promised. A
file without cells says that a hold was released, and lies beside those that have some. A file that
does not verify is said once, and dropped; so is one of another version.

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
_MAGIC = b"SMVHOLD4"
_HEAD = struct.Struct(f"<8s{TENANT_BYTES}sQQQQQIIIII")
"""Magic, tenant, epoch, until, ttl, grant, released; rows, replicas; bytes of handle, granter and
partner."""
_HELD, _RELEASED = b"\0", b"\0released\0"
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
        names = [text.encode() for text in (hold.handle, hold.granter, hold.partner)]
        head = _HEAD.pack(
            _MAGIC, hold.tenant, hold.tenant_epoch, until_ms, hold.ttl_ms, hold.grant,
            hold.released, len(hold), hold.replicas, *map(len, names),
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
        kind = _HELD if len(hold) else _RELEASED
        said = hold.tenant + hold.handle.encode() + kind + hold.granter.encode()
        name = blake3(said).hexdigest()
        return self._folder / name[:32]


def _parse(data: bytes, clock: Clock) -> Hold | None:
    """What a file says, ``None`` if it is not one of ours, and whole."""
    body = data[:-_CHECKSUM_BYTES]
    if len(body) < _HEAD.size or xxh3_64_digest(body) != data[-_CHECKSUM_BYTES:]:
        return None
    magic, tenant, epoch, *rest = _HEAD.unpack_from(body)
    until_ms, ttl_ms, grant, released, rows, replicas, *lengths = rest
    at = _HEAD.size + sum(lengths)
    if magic != _MAGIC or len(body) != at + rows * _ROW_BYTES:
        return None
    edges = pairwise(accumulate(lengths, initial=_HEAD.size))
    handle, granter, partner = (body[start:stop].decode() for start, stop in edges)
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
        granter=granter,
        grant=grant,
        released=released,
        replicas=replicas,
        partner=partner,
        tenant_epoch=epoch,
    )
