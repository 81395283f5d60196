"""A storage node as a process of its own, for tests that kill it. Ends with its standard input.

python -m tests.integration.node_process INDEX NODE_ID STATE_FOLDER ARENA_FOLDER HOST_ID
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from pydantic import ByteSize

from kvstore.config import NodeConfig
from kvstore.errors import SamovarError
from kvstore.replication import GRACE_S
from kvstore.server import PATIENCE_S, NodePlace, NodeServer

ARENA_BYTES = ByteSize(4 << 20)
NO_DISK = ByteSize(0)


def main() -> int:
    """Start, say where, wait; a node that cannot start says why in one line and exits with 2."""
    arguments = parsed()
    config = NodeConfig(
        state_folder=arguments.folder,
        shm_folder=arguments.folder,
        arena_bytes=arguments.arena_bytes,
        nvme_bytes=arguments.nvme_bytes,
        nvme_folder=arguments.nvme_folder,
        host_id=arguments.host_id,
        bind_host=arguments.bind_host,
        advertise_host=arguments.advertise_host,
        token_file=arguments.token_file,
    )
    place = NodePlace(arguments.index, arguments.node_id, arguments.folder, arguments.arena_folder)
    server = NodeServer(
        config, place, patience_s=arguments.patience_s, copy_grace_s=arguments.copy_grace_s
    )
    try:
        info = server.start()
    except SamovarError as fault:
        print(fault, file=sys.stderr)
        return 2
    print(json.dumps(asdict(info)), flush=True)
    sys.stdin.read()
    server.stop()
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("index", type=int)
    parser.add_argument("node_id")
    parser.add_argument("folder", type=Path)
    parser.add_argument("arena_folder", type=Path)
    parser.add_argument("host_id")
    parser.add_argument("--arena-bytes", type=ByteSize, default=ARENA_BYTES)
    parser.add_argument("--nvme-bytes", type=ByteSize, default=NO_DISK)
    parser.add_argument("--nvme-folder", type=Path)
    parser.add_argument("--bind-host", default="127.0.0.1")
    parser.add_argument("--advertise-host")
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("--patience-s", type=float, default=PATIENCE_S)
    parser.add_argument("--copy-grace-s", type=float, default=GRACE_S)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
