"""The demo's tier: what it asks of the machine before it starts anything."""

from pathlib import Path

import pytest

from kvstore.errors import UsageError
from worker.demo.tier import check_room


def test_a_disk_that_is_too_full_is_named_before_anything_starts(tmp_path: Path) -> None:
    check_room(tmp_path, 1 << 12)
    with pytest.raises(UsageError, match=r"needs \d+ MiB of disk in .*--cache-folder"):
        check_room(tmp_path, 1 << 62)
