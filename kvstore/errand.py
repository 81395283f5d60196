"""What a node has its copying process do, and what became of it: a line of JSON each.

Does not cover: either end (``kvstore.copier_process``, ``kvstore.copier``).
"""

import json
from dataclasses import asdict, dataclass

import numpy as np

from kvstore.burials import Ids
from kvstore.key import Keys, as_keys
from kvstore.table import Cells


@dataclass(frozen=True, slots=True, eq=False)
class Errand:
    """Cells that another node, at these addresses, is to have as well; see ``copying.copy``."""

    control: str
    bulk: str
    keys: Keys
    cells: Cells
    burials: Ids

    def pack(self) -> bytes:
        """One line."""
        fields = {
            "control": self.control,
            "bulk": self.bulk,
            "keys": self.keys.tobytes().hex(),
            "cells": self.cells.tolist(),
            "burials": self.burials.tolist(),
        }
        return json.dumps(fields).encode() + b"\n"

    @classmethod
    def unpack(cls, line: bytes) -> "Errand":
        """The other way."""
        fields = json.loads(line)
        return cls(
            fields["control"],
            fields["bulk"],
            as_keys(bytes.fromhex(fields["keys"])),
            np.array(fields["cells"], np.uint8),
            np.array(fields["burials"], np.uint64),
        )


@dataclass(frozen=True, slots=True)
class Done:
    """How many of the cells are there now, and what was in the way."""

    arrived: int
    fault: str = ""

    def pack(self) -> bytes:
        """One line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def unpack(cls, line: bytes) -> "Done":
        """The other way."""
        return cls(**json.loads(line))
