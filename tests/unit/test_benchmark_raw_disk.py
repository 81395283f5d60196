"""The NVMe rows' limit: what is read from fio, and what is made of one that does not run."""

from pathlib import Path

import pytest

from benchmarks.figure import Skip
from benchmarks.raw_disk import DEPTH, Fio

BLOCK_BYTES = 8192
BLOCKS = 3


def fio(folder: Path, script: str) -> Fio:
    """A program in fio's place, which notes what it is asked for."""
    program = folder / "fio"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/asked\n{script}\n')
    program.chmod(0o755)
    return Fio(str(program), folder / "limit", "read", BLOCK_BYTES, BLOCKS)


def test_seconds_are_those_of_fios_own_clock(tmp_path: Path) -> None:
    report = '{"jobs": [{"read": {"io_bytes": 3000, "bw_bytes": 1500}, "write": {}}]}'
    assert fio(tmp_path, f"echo '{report}'")() == 2.0
    asked = (tmp_path / "asked").read_text().splitlines()
    assert {f"--bs={BLOCK_BYTES}", f"--iodepth={DEPTH}", "--direct=1", "--rw=read"} <= set(asked)


def test_a_fio_that_fails_is_a_reason_to_skip(tmp_path: Path) -> None:
    broken = fio(tmp_path, "echo no libaio here >&2; exit 1")
    with pytest.raises(Skip, match="no libaio here"):
        broken()
