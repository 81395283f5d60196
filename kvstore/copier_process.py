"""A node's handle on the process that sends copies of its cells (``copier`` is what runs in it).

It is started with the first errand, so that a tier without copies has none, and again when it has
died. Does not cover: which cells go where (``kvstore.replication``).
"""

import asyncio
import socket
from pathlib import Path

from kvstore import child
from kvstore.errand import Done, Errand

ERRAND_S = 10.0
PATIENCE_S = 10.0
"""Besides: a process that is just starting takes its time."""


class CopierProcess:
    """One errand at a time. It ends with ``stop``, or with this process, however that ends."""

    def __init__(self, control: str, folder: Path, token_file: Path | None) -> None:
        self._control = control
        self._folder = folder
        self._token_file = token_file
        self._process: child.Process | None = None
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    @property
    def pid(self) -> int | None:
        """Its process number, ``None`` while there is none."""
        return None if self._process is None else self._process.pid

    async def run(self, errand: Errand) -> Done:
        """Have it done; a process that dies meanwhile has done nothing."""
        try:
            reader, writer = await self._connected()
            writer.write(errand.pack())
            await writer.drain()
            line = await asyncio.wait_for(reader.readline(), ERRAND_S + PATIENCE_S)
        except (OSError, TimeoutError):
            line = b""
        if not line.endswith(b"\n"):
            await self.stop()
            return Done(0, "the copying process has died or stood still, it is started again")
        return Done.unpack(line)

    async def stop(self) -> None:
        """Kill it: it has nothing to save."""
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].close()
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            await asyncio.to_thread(process.wait)

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = await asyncio.to_thread(self._start, theirs)
            self._streams = await asyncio.open_connection(sock=ours)
        return self._streams

    def _start(self, theirs: socket.socket) -> child.Process:
        words = ["--control", self._control, "--folder", str(self._folder)]
        words += ["--socket", str(theirs.fileno())]
        if self._token_file is not None:
            words += ["--token-file", str(self._token_file)]
        return child.start("kvstore.copier", words, theirs.fileno())
