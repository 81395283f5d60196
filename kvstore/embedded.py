"""An embedded tier: a storage node inside the process that uses it, without a server.

    make a folder in shared memory ──> lock ──> arena and table, mapped ──> remove the folder

The mappings keep the memory for as long as this process has them, and nobody else is to find it.
So nothing is left behind, however the process ends: a name is there only while the arena is being
made, and for that time a lock says whose it is (``samovar doctor`` looks for those whose maker was
killed). Does not cover: what clients do with it (``kvstore.client``).
"""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from kvstore.access import InProcessNode
from kvstore.calls import NodeIdentity
from kvstore.clock import Clock
from kvstore.errors import UsageError
from kvstore.fs import LinuxFileSystem
from kvstore.machine import host_id
from kvstore.node import Node
from kvstore.node_folder import NodeFolder
from kvstore.routes import OneNode
from kvstore.tiers.host import HostTier
from kvstore.tiers.start import default_slots
from kvstore.transport.local import LocalTransport

FOLDER_PREFIX = "samovar-embedded-"


def embedded_tier(size_bytes: int, shm_folder: Path, clock: Clock, block_tokens: int) -> OneNode:
    """A node of ``size_bytes`` below ``shm_folder``, which only this process can reach."""
    fs = LinuxFileSystem()
    try:
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=shm_folder))
    except OSError as error:
        raise UsageError(
            f"cannot make a folder in {shm_folder} ({error.strerror}): name a tmpfs folder with "
            "shm_folder"
        ) from None
    with ExitStack() as named:
        named.callback(shutil.rmtree, folder, ignore_errors=True)
        claim = NodeFolder.claim(folder, clock, patience_s=0.0)
        named.callback(claim.release)
        slots = default_slots(size_bytes)
        tier = HostTier.create(fs, clock, folder, size_bytes, slots, incarnation=1)
        transport = LocalTransport.open(fs, folder)
    identity = NodeIdentity("embedded", 1, host_id(), str(folder))
    return OneNode(InProcessNode(Node(identity, tier, clock)), transport, tier.table, block_tokens)
