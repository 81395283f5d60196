"""Lasting: the small files in which a node keeps what it must not forget, besides its cells.

    burials    which blocks were deleted (``kvstore.burial_log``)
    holds/     what it has promised to keep (``kvstore.hold_files``)
    tenants    which tenants were erased, how often (``kvstore.tenants``)
    company    is there once the node has been in a map with others

They are in the node's own folder (``kvstore.node_folder``). Does not cover: what is in them.
"""

from dataclasses import dataclass
from pathlib import Path

from kvstore.fs import DurableFiles, MemoryFiles

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
        """Whether the node has been in a map with others: what it holds they may have deleted."""
        return self.files.read(self.folder / _COMPANY_FILE) is not None

    def keep_company(self) -> None:
        """The node is in a map with others."""
        if not self.had_company:
            self.files.replace(self.folder / _COMPANY_FILE, b"\n")
