"""Where the tier's processes log to: one rotated file per process, in the tier's state folder.

Covers: the handler, for the loggers below `kvstore`. Does not cover: what is logged, which is one
line per change of state and never one per block.
"""

import logging
import logging.handlers
import os
from io import TextIOWrapper
from pathlib import Path

from kvstore.fs import FILE_MODE

FILE_BYTES_MAX = 4 << 20
FILES_KEPT = 3


class PrivateRotatingFile(logging.handlers.RotatingFileHandler):
    """A rotated file that only its owner reads."""

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        descriptor = os.open(self.baseFilename, flags, FILE_MODE)
        return TextIOWrapper(os.fdopen(descriptor, "ab"), "utf-8", write_through=True)


def log_to(folder: Path, process: str, level: str) -> PrivateRotatingFile:
    """Log to `<folder>/<process>.log` from now on; answers the handler, for `stop_logging`."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handler = PrivateRotatingFile(
        folder / f"{process}.log", maxBytes=FILE_BYTES_MAX, backupCount=FILES_KEPT
    )
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s")
    )
    logger = logging.getLogger("kvstore")
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    return handler


def stop_logging(handler: PrivateRotatingFile) -> None:
    """Undo `log_to`."""
    logging.getLogger("kvstore").removeHandler(handler)
    handler.close()
