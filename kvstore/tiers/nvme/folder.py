"""The folder of an NVMe tier: ``slab``, and ``catalog/`` beside it.

Does not cover: what is in the files (``slab``, ``catalog``).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from kvstore.tiers.nvme.catalog import DATA_FILE, Catalog, Content, LmdbCatalog
from kvstore.tiers.nvme.identity import Identity
from kvstore.tiers.nvme.walk import walk

SLAB_FILE = "slab"
CATALOG_FOLDER = "catalog"


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

    def open(self, identity: Identity) -> Catalog:
        """Open it, empty if there is none."""
        return LmdbCatalog.open(self.path, identity, self.cells_max)
