"""Lasting: the small files in which a node keeps what it must not forget, besides its cells.

    burials    which blocks were deleted (``kvstore.burial_log``)
    owed       of these, what the disk was not told of (``kvstore.owed``)
    holds/     what it has promised to keep (``kvstore.hold_files``)
    tenants    which tenants were erased, how often (``kvstore.tenants``)
    company    is there once the node has been in a map with others

They are in the node's own folder (``kvstore.node_folder``). Does not cover: what is in them.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from kvstore.fs import DurableFiles, MemoryFiles

log = logging.getLogger(__name__)

_COMPANY_FILE = "company"


@dataclass(frozen=True, slots=True)
class Lasting:
    """Where they are."""

    files: DurableFiles
    folder: Path

    @classmethod
    def nowhere(cls) -> "Lasting":
        """For a node that is to leave nothing behind."""
        return cls(MemoryFiles(), Path("/"))

    @property
    def had_company(self) -> bool:
        """Whether the node has been in a map with others: what it holds they may have deleted.

        Where the disk does not say, it has: then nothing is shown before the others were asked.
        """
        try:
            return self._says_company()
        except OSError as fault:
            log.warning(
                "whether this node was ever in a map with others can't be read, it is taken for "
                "granted: %s",
                fault,
            )
            return True

    def keep_company(self) -> None:
        """The node is in a map with others."""
        try:
            is_kept = self._says_company()
        except OSError:
            is_kept = False
        if not is_kept:
            self.files.replace(self.folder / _COMPANY_FILE, b"\n")

    def _says_company(self) -> bool:
        return self.files.read(self.folder / _COMPANY_FILE) is not None
