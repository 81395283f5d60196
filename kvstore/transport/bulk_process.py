"""A node's handle on the process that moves its bytes (``bulk`` is what runs in it)."""

import os
import select
from pathlib import Path

from kvstore import child
from kvstore.clock import Deadline
from kvstore.errors import StateError


class BulkProcess:
    """A running bulk process. It ends with ``stop``, or with this process, however that ends."""

    def __init__(self, process: child.Process, host: str, port: int) -> None:
        self._process = process
        self._host = host
        self.port = port

    @classmethod
    def start(
        cls, folder: Path, host: str, port: int, token_file: Path | None, deadline: Deadline
    ) -> "BulkProcess":
        """Start it for the node of ``folder`` and wait for its port (0: any free one).

        Raises ``StateError`` when it does not come up; its stderr is this process's.
        """
        words = ["--folder", str(folder), "--host", host, "--port", str(port)]
        if token_file is not None:
            words += ["--token-file", str(token_file)]
        ready, theirs = os.pipe()
        try:
            with os.fdopen(theirs, "wb"):
                words += ["--ready", str(theirs)]
                process = child.start("kvstore.transport.bulk", words, theirs)
            line = _read_line(ready, deadline)
        finally:
            os.close(ready)
        if not line.endswith(b"\n"):
            process.kill()
            code = process.wait()
            raise StateError(
                f"the bulk process of {folder} did not open {host}:{port} (exit code {code}): "
                "see its message above, or choose another bulk port"
            )
        return cls(process, host, int(line))

    @property
    def address(self) -> str:
        """``host:port``, for clients."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self.port}"

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End it at once: it has nothing to save. Connections break off."""
        self._process.kill()
        self._process.wait()


def _read_line(pipe: int, deadline: Deadline) -> bytes:
    """What comes through ``pipe`` until its end of line, its end, or the deadline."""
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([pipe], [], [], deadline.remaining_s())[0]:
            return line
        piece = os.read(pipe, 64)
        if not piece:
            return line
        line += piece
    return line
