"""A process with a client, which forks: what its child may do, and what it may still do itself.

One of its own, with no server in it: gRPC's asyncio server does not survive a fork.
"""

import os
import sys

from kvstore.rpc.client import ControlClient


def main(address: str) -> int:
    client = ControlClient(address)
    assert client.session
    child = os.fork()
    if child == 0:
        print(*_in_child(client), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print(client.stats().sessions)
    client.close()
    return 0


def _in_child(client: ControlClient) -> list[str]:
    words = []
    for call in (client.stats, lambda: client.session):
        try:
            call()
            words.append("answered")
        except Exception as fault:
            words.append(type(fault).__name__)
    client.close()
    return [*words, "closed"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
