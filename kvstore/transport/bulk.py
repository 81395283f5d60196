"""The process that moves a storage node's bytes: ``python -m kvstore.transport.bulk``.

A process of its own, and niced, so that look-ups of the node keep their latency while it sends.
It maps the node's folder, opens the bulk port, writes the port's number to the ready pipe, and
ends with its parent: the kernel tells it through a pidfd, however the parent ended and whichever
of its threads started us. Says nothing per request.

Does not cover: the parent's side (``bulk_process``), the protocol (``frame``).
"""

import argparse
import os
import socket
import sys
from pathlib import Path

from kvstore import child
from kvstore.clock import SystemClock
from kvstore.errors import SamovarError
from kvstore.fs import LinuxFileSystem
from kvstore.secret import read_secret
from kvstore.transport.bulk_server import BulkServer
from kvstore.transport.mapped import MappedNode

NICENESS = 5


def main() -> int:
    """Serve until the parent ends."""
    arguments = _parse()
    parent = child.follow(arguments.parent)
    if parent is None:
        return 1
    os.nice(NICENESS)
    try:
        secret = read_secret(arguments.token_file)
        token = None if secret is None else secret.encode()
        node = MappedNode.map(LinuxFileSystem(), arguments.folder)
        listener = _listen(arguments.host, arguments.port)
    except (SamovarError, OSError) as fault:
        print(f"bulk process: {fault}", file=sys.stderr)
        return 2
    with listener:
        os.write(arguments.ready, b"%d\n" % listener.getsockname()[1])
        os.close(arguments.ready)
        node.populate_in_background()
        _serve(BulkServer(node, SystemClock(), token), listener, parent)
    # Connections are threads in the middle of copies: nobody waits for them.
    os._exit(0)


def _listen(host: str, port: int) -> socket.socket:
    if ":" not in host:
        return socket.create_server((host, port))
    # "::" is every address, IPv4 ones too, as it is for the control port.
    both = socket.has_dualstack_ipv6()
    address = (host.strip("[]"), port)
    return socket.create_server(address, family=socket.AF_INET6, dualstack_ipv6=both)


def _serve(server: BulkServer, listener: socket.socket, parent: int) -> None:
    for _ in child.until_end(parent, listener):
        try:
            connected, _ = listener.accept()
        except OSError:
            continue  # the client has left again, or we are short of descriptors
        server.admit(connected)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kvstore.transport.bulk")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--ready", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
