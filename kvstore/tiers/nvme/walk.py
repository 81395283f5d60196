"""The walk: a catalog is read for the first time in a process that may die of it.

A damaged LMDB file can end its reader with SIGBUS or SIGSEGV. ``python -m kvstore.tiers.nvme.walk``
reads every row, checks it, and writes all of it to its standard output; whoever asked goes on with
rows that are known to be whole, or with the knowledge that they are not.

Does not cover: what is done then (``recovery``).
"""

import argparse
import errno
import signal
import struct
import subprocess
import sys
from pathlib import Path

from kvstore.tiers.nvme.catalog import CatalogDamage, Content, read_catalog
from kvstore.tiers.nvme.record import rows_in

WALK_S = 60.0
_DAMAGED = 3
_UNREAD = 4
_SOMEBODYS = (-signal.SIGKILL, -signal.SIGTERM)
"""How a child ends that somebody has ended: that says nothing of the catalog."""
_COUNTS = struct.Struct("<QQQ")
"""Bytes of the identity, records, tombstones."""


def walk(folder: Path) -> Content:
    """``read_catalog`` in a child; raises ``CatalogDamage``, also for a child that died of it.

    Raises ``OSError`` where the catalog could not be read, and may be as whole as ever.
    """
    command = [sys.executable, "-m", "kvstore.tiers.nvme.walk", "--folder", str(folder)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=WALK_S, check=False
        )
    except subprocess.TimeoutExpired as fault:
        raise CatalogDamage(f"reading it took over {WALK_S:.0f} s") from fault
    if done.returncode == 0:
        return unpack(done.stdout)
    if done.returncode == _DAMAGED:
        raise CatalogDamage(done.stderr.decode(errors="replace").strip())
    if done.returncode == _UNREAD:
        raise OSError(errno.EIO, done.stderr.decode(errors="replace").strip())
    if done.returncode in _SOMEBODYS:
        raise OSError(errno.EINTR, "the reader of the NVMe catalog was killed")
    raise CatalogDamage(f"its reader ended with status {done.returncode}")


def pack(content: Content) -> bytes:
    """A catalog's content as the child writes it."""
    counts = _COUNTS.pack(len(content.identity), len(content.records), len(content.tombstones))
    rows = (content.records.tobytes(), content.tombstones.tobytes())
    return b"".join((counts, content.identity, *rows))


def unpack(packed: bytes) -> Content:
    """What ``pack`` wrote."""
    identity_bytes, records, tombstones = _COUNTS.unpack_from(packed)
    at = _COUNTS.size + identity_bytes
    return Content(packed[_COUNTS.size : at], *rows_in(packed, at, records, tombstones))


def main() -> int:
    """Read one catalog."""
    parser = argparse.ArgumentParser(prog="kvstore.tiers.nvme.walk")
    parser.add_argument("--folder", type=Path, required=True)
    try:
        packed = pack(read_catalog(parser.parse_args().folder))
    except CatalogDamage as damage:
        print(damage, file=sys.stderr)
        return _DAMAGED
    except OSError as fault:
        print(fault, file=sys.stderr)
        return _UNREAD
    sys.stdout.buffer.write(packed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
