"""A child of a storage node: a process that serves the node and ends with it, however that ends.

    the node    start   ──>  python -m MODULE ... --parent NUMBER
    the child   follow  ──>  a descriptor that becomes readable when the node has ended
                until_end    what else is to be read, until then

Does not cover: what the two say to each other, and what a child is for (``kvstore.transport.bulk``,
``kvstore.tiers.nvme.worker``, ``kvstore.copier``).
"""

import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

Process = subprocess.Popen[bytes]
_PR_SET_PDEATHSIG = 1


def start(module: str, words: Sequence[str], inherited: int) -> Process:
    """Run a module of ours with these words, and with one descriptor; its stderr is ours."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *words, "--parent", str(os.getpid())],
        stdin=subprocess.DEVNULL,
        pass_fds=(inherited,),
    )


def follow(parent: int) -> int | None:
    """Serve ``parent``: the answer is a descriptor that becomes readable when it has ended.

    ``None`` if it has ended already. Ctrl-C is the parent's to handle from now on.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Ends a stop (SIGSTOP) that would keep us from noticing that the parent is gone.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    try:
        watched = os.pidfd_open(parent)
    except ProcessLookupError:
        return None
    # If it ended before we looked, its number may be somebody else's by now.
    return watched if os.getppid() == parent else None


def until_end(parent: int, source: socket.socket) -> Iterator[None]:
    """Again and again, as soon as ``source`` can be read, until the followed parent has ended."""
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        selector.register(parent, selectors.EVENT_READ)
        while True:
            for ready, _ in selector.select():
                if ready.fileobj is not source:
                    return
                yield
