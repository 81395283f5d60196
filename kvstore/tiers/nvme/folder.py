"""The folder of an NVMe tier: ``slab``, and ``catalog/`` beside it.

Does not cover: what is in the files (``slab``, ``catalog``).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from kvstore.fs import sync_folder
from kvstore.tiers.nvme.catalog import DATA_FILE, Catalog, Change, Content, LmdbCatalog
from kvstore.tiers.nvme.identity import Identity
from kvstore.tiers.nvme.walk import walk

CATALOG_FOLDER = "catalog"
_FRESH_FOLDER = "fresh"
"""Where a catalog is made, in the folder of the one that it replaces."""


@dataclass(frozen=True, slots=True)
class CatalogFolder:
    """The catalog's place in such a folder; it is read in a throw-away child."""

    path: Path
    cells_max: int

    def read(self) -> Content | None:
        """All rows, ``None`` if there is no catalog; raises ``CatalogDamage``."""
        return walk(self.path) if (self.path / DATA_FILE).exists() else None

    def discard(self) -> None:
        """Remove it."""
        if self.path.exists():
            shutil.rmtree(self.path)

    def open(self, identity: Identity, change: Change) -> Catalog:
        """A new catalog with what ``change`` puts, which takes the place of the one that is there.

        Of that one every row may be whole, and a page damaged that only writing comes to. Where the
        disk has no room for two it goes on all the same, without what ``change`` removes.
        """
        fresh = self.path / _FRESH_FOLDER
        shutil.rmtree(fresh, ignore_errors=True)
        is_there = (self.path / DATA_FILE).exists()
        try:
            LmdbCatalog.open(fresh, identity, self.cells_max, change).close()
            (fresh / DATA_FILE).replace(self.path / DATA_FILE)
            sync_folder(self.path)
        except OSError:
            if not is_there:
                raise
            kept = Change(removals=change.removals)
            return LmdbCatalog.open(self.path, identity, self.cells_max, kept)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return LmdbCatalog.open(self.path, identity, self.cells_max)
