"""Where rows have their files: temporary folders in shared memory and on a disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from kvstore.machine import SHM_FOLDER

_PREFIX = "samovar-bench-"


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder in shared memory, gone afterwards."""
    with TemporaryDirectory(prefix=_PREFIX, dir=SHM_FOLDER) as name:
        yield Path(name)


@contextmanager
def node_folders() -> Iterator[tuple[Path, Path]]:
    """One on a disk, which TMPDIR chooses, and one in shared memory."""
    with TemporaryDirectory(prefix=_PREFIX) as name, shared_folder() as shared:
        yield Path(name), shared
