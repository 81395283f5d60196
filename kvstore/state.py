"""A tier's state folder: what runs, who may call it, and which map was published last.

    <state_folder>/<name>/
      lock         held (flock) by the one command that changes the tier just now
      tier.json    what the tier consists of: processes, ports, folders (`TierRecord`)
      token        secret of the tier's own Ray
      map.json     the coordinator's last map: its epoch never goes back
      disks.json   folders elsewhere in which its nodes have had their NVMe tiers
      nodes/<i>/   each storage node's own folder
      logs/        rotated logs

Files are 0600, folders 0700, and a file is replaced whole or not at all. A record of another
version is refused by `read`; `remains` reads of any version just what is needed to clear it away.
Does not cover: starting and ending processes (`kvstore.cluster`), a node's own files
(`kvstore.node_folder`).
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvstore.block import FORMAT_VERSION
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.errors import StateError, UsageError
from kvstore.fs import FILE_MODE, replace_file

STATE_VERSION = 1
FOLDER_MODE = 0o700
TOKEN_BYTES = 32


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """One process of the tier; the start time tells it from a later one with the same number."""

    role: str
    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class Remains:
    """What must go when a tier goes, whatever version started it.

    `tier_id` is random: every process of the tier carries it in its environment. `folders` lie
    outside the state folder: arenas and Ray's own.
    """

    tier_id: str
    boot_id: str
    folders: tuple[str, ...]
    processes: tuple[ProcessRecord, ...]


@dataclass(frozen=True, slots=True)
class TierRecord:
    """What a tier consists of. `ray_port` is 0 while nothing runs, `nvme_bytes` without a disk."""

    name: str
    nodes: int
    arena_bytes: int
    ray_port: int
    ray_folder: str
    arena_folders: tuple[str, ...]
    remains: Remains
    nvme_bytes: int = 0


class TierFolder:
    """The state folder of one tier. Nothing is made before `claim`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token_file = path / "token"
        self.log_folder = path / "logs"
        self._record_file = path / "tier.json"
        self._map_file = path / "map.json"
        self._disks_file = path / "disks.json"

    @classmethod
    def of(cls, state_folder: Path, name: str) -> "TierFolder":
        """The folder of the tier called `name`."""
        return cls(state_folder / name)

    def node_folder(self, index: int) -> Path:
        """A storage node's own folder."""
        return self.path / "nodes" / str(index)

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Make the folder and hold its lock; raises StateError while another command does."""
        try:
            self.path.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
            self.log_folder.mkdir(FOLDER_MODE, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        except OSError as error:
            raise UsageError(
                f"cannot write to {self.path} ({error.strerror}): name another folder with "
                "--state-folder"
            ) from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StateError(
                    f"another samovar command is at work in {self.path}: wait for it to end"
                ) from None
            yield
        finally:
            os.close(lock)

    def read(self) -> TierRecord | None:
        """The record, or None where no tier is; raises StateError for another version's."""
        content = self._content()
        if content is None:
            return None
        theirs = (content.get("state_version"), content.get("format_version"))
        if theirs != (STATE_VERSION, FORMAT_VERSION):
            raise StateError(
                f"{self.path} was written with state version {theirs[0]} and block format "
                f"{theirs[1]}, this samovar has {STATE_VERSION} and {FORMAT_VERSION}: discard it "
                "with `samovar down --purge`"
            )
        try:
            return TierRecord(
                name=str(content["name"]),
                nodes=int(content["nodes"]),
                arena_bytes=int(content["arena_bytes"]),
                ray_port=int(content["ray_port"]),
                ray_folder=str(content["ray_folder"]),
                arena_folders=tuple(str(folder) for folder in content["arena_folders"]),
                remains=_remains(content["remains"]),
                nvme_bytes=int(content.get("nvme_bytes", 0)),
            )
        except (KeyError, TypeError, ValueError):
            raise self._damaged() from None

    def remains(self) -> Remains | None:
        """What is left of a tier of any version, or None where there was none."""
        content = self._content()
        if content is None:
            return None
        try:
            return _remains(content["remains"])
        except (KeyError, TypeError, ValueError):
            raise self._damaged() from None

    def write(self, record: TierRecord) -> None:
        """Replace the record."""
        versions = {"state_version": STATE_VERSION, "format_version": FORMAT_VERSION}
        replace_file(self._record_file, _json(versions | asdict(record)))

    def token(self, fresh: bytes) -> str:
        """The tier's secret; made of `fresh` random bytes if there is none yet."""
        if not self.token_file.exists():
            replace_file(self.token_file, fresh.hex().encode() + b"\n")
        return self.token_file.read_text().strip()

    def read_map(self) -> ClusterMap:
        """The map that was published last; of epoch 0 and without nodes before the first."""
        try:
            content = json.loads(self._map_file.read_text())
            nodes = [NodeInfo(**node) for node in content["nodes"]]
            block_tokens, tier_id = int(content["block_tokens"]), str(content["tier_id"])
            return ClusterMap.of(int(content["epoch"]), nodes, block_tokens, tier_id)
        except FileNotFoundError:
            return ClusterMap(0, ())
        except (KeyError, TypeError, ValueError):
            raise StateError(
                f"{self._map_file} is damaged: discard it with `samovar down --purge`"
            ) from None

    def write_map(self, cluster_map: ClusterMap) -> None:
        """Replace the map; what is published is first written here."""
        nodes = [asdict(node) for node in cluster_map.nodes]
        common = {
            "epoch": cluster_map.epoch,
            "block_tokens": cluster_map.block_tokens,
            "tier_id": cluster_map.tier_id,
        }
        replace_file(self._map_file, _json(common | {"nodes": nodes}))

    def note_disk(self, folder: Path) -> None:
        """Remember where else the tier has files; they outlive the record, as `forget` says."""
        folders = self.disks()
        if folder not in folders:
            replace_file(self._disks_file, _json([str(each) for each in (*folders, folder)]))

    def disks(self) -> tuple[Path, ...]:
        """Every folder that was noted, of whichever life of the tier."""
        try:
            return tuple(Path(str(each)) for each in json.loads(self._disks_file.read_text()))
        except FileNotFoundError:
            return ()
        except (TypeError, ValueError):
            raise StateError(
                f"{self._disks_file} is damaged: remove it, and what the tier has on other disks"
            ) from None

    def forget(self) -> None:
        """Drop the record once nothing of the tier is left; numbers that must grow stay."""
        self._record_file.unlink(missing_ok=True)

    def purge(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _content(self) -> dict[str, Any] | None:
        try:
            content = json.loads(self._record_file.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            raise self._damaged() from None
        if not isinstance(content, dict):
            raise self._damaged()
        return content

    def _damaged(self) -> StateError:
        return StateError(
            f"{self._record_file} is damaged: remove {self.path} after a look at what still runs "
            "with `samovar doctor`"
        )


def _json(content: object) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"


def _remains(content: dict[str, Any]) -> Remains:
    return Remains(
        tier_id=str(content["tier_id"]),
        boot_id=str(content["boot_id"]),
        folders=tuple(str(folder) for folder in content["folders"]),
        processes=tuple(
            ProcessRecord(str(each["role"]), int(each["pid"]), int(each["start_ticks"]))
            for each in content["processes"]
        ),
    )
