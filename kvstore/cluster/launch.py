"""A tier on one machine: bringing it up, taking it down, and what is left in between.

    up:    claim the state folder -> clear what a former tier left -> record -> Ray
           -> record its processes -> coordinator and nodes -> record theirs
    again: nothing where the tier stands; only Ray's head where nothing else has ended
    down:  end the tier's processes -> remove its folders -> drop the record

The record is written before the first process starts, with the random id that all of them carry:
whatever happens to `up`, the next command finds them. Nothing here imports Ray; its processes get
an environment of their own, so that no other Ray on the machine is ever reached.
"""

import logging
import os
import platform
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from kvstore.clock import Clock, Deadline
from kvstore.cluster import head, processes, ray_local
from kvstore.cluster.children import bootstrap, run_all
from kvstore.cluster.plan import StoragePlan, TierPlan, node_resource, nvme_folders
from kvstore.cluster_map import ClusterMap
from kvstore.config import ClusterConfig, NodeConfig
from kvstore.errors import UsageError
from kvstore.logs import log_to, stop_logging
from kvstore.machine import default_arena_bytes, host_id
from kvstore.secret import read_secret
from kvstore.server import NodePlace
from kvstore.state import FOLDER_MODE, TOKEN_BYTES, Remains, TierFolder, TierRecord
from kvstore.tiers.nvme.capacity import (
    default_bytes_in,
    extents_for,
    free_bytes_of,
    slab_bytes_in,
)

log = logging.getLogger(__name__)

START_PATIENCE_S = 120.0
END_PATIENCE_S = 1.0
"""For being asked to end; a tier loses nothing by being killed, and Ray takes 10 s over it."""
ANSWER_PATIENCE_S = 10.0
ANSWER_POLL_S = 0.1
MEND_PATIENCE_S = 60.0
"""For storage nodes that died with the head, or while it was away: Ray restarts them first."""
TIER_ID_BYTES = 6
SOURCE = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Standing:
    """A tier that runs; `fresh` if this very command started it."""

    record: TierRecord
    cluster_map: ClusterMap
    fresh: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """What `down` found and removed."""

    processes: int
    folders: int


class LocalTier:
    """One tier of this machine, by its configuration. Commands exclude each other by a lock."""

    def __init__(
        self,
        cluster: ClusterConfig,
        node: NodeConfig,
        clock: Clock,
        entropy: Callable[[int], bytes],
        tell: Callable[[str], None],
    ) -> None:
        self.folder = TierFolder.of(cluster.state_folder, cluster.name)
        self._cluster = cluster
        self._node = node
        self._clock = clock
        self._entropy = entropy
        self._tell = tell

    def up(self) -> Standing:
        """Bring the tier up, unless it stands; blocks until all its nodes serve."""
        check_platform()
        self._check_nodes()
        with self.folder.claim(), self._logged():
            former = self.folder.read()
            if former is not None and (self._stands(former) or self._mended(former)):
                self._check_equal(former)
                log.info("up: stands")
                return Standing(self._keep(former), self.folder.read_map(), fresh=False)
            if former is not None:
                log.info("clearing what a former start of the tier left")
                self._clear(former.remains, keep=former.arena_folders)
            record = self._planned(former)
            self.folder.write(record)
            if record.nvme_bytes and self._node.nvme_folder is not None:
                self.folder.note_disk(self._node.nvme_folder)
            try:
                record = self._start(record)
                log.info("up: %d nodes", record.nodes)
                return Standing(record, self.folder.read_map(), fresh=True)
            except BaseException as error:
                log.info("not started (%r): clearing", error)
                self._tell("Clearing up")
                found = self.folder.remains()
                assert found is not None, "written above"
                # What an earlier life left warm stays warm for the next try.
                self._clear(found, keep=() if former is None else former.arena_folders)
                if former is None:
                    self.folder.forget()
                raise

    def down(self, purge: bool) -> Ended:
        """End the tier, its arenas too; with `purge`, discard the state folder, any version's."""
        if not self.folder.path.is_dir():
            return Ended(0, 0)
        with self.folder.claim(), self._logged():
            if not purge:
                self.folder.read()  # refuses another version's
            found = self.folder.remains()
            ended = Ended(0, 0) if found is None else self._clear(found, keep=())
            log.info("down: %d processes, %d folders", ended.processes, ended.folders)
            self.folder.forget()
            if purge:
                for disk in self.folder.disks():
                    self._purge_disk(disk)
                self.folder.purge()
            return ended

    def _purge_disk(self, folder: Path) -> None:
        """Remove what nodes of this name have on another disk than that of the state folder."""
        for path in folder.glob(f"{self._cluster.name}-*"):
            if path.name.removeprefix(f"{self._cluster.name}-").isdecimal():
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _logged(self) -> Iterator[None]:
        handler = log_to(self.folder.log_folder, "samovar", self._cluster.log_level)
        try:
            yield
        finally:
            stop_logging(handler)

    def _stands(self, record: TierRecord, patience_s: float = ANSWER_PATIENCE_S) -> bool:
        """Whether Ray is whole and every node answers; waits for one that is just restarting."""
        roles = self._living_roles(record)
        if (
            roles.count(ray_local.HEAD_ROLE) != 1
            or roles.count(ray_local.NODE_ROLE) != record.nodes
        ):
            return False
        deadline = Deadline.after(self._clock, patience_s)
        pause = threading.Event()
        while not self._answers(record.nodes):
            if deadline.passed():
                return False
            pause.wait(ANSWER_POLL_S)
        return True

    def _answers(self, count: int) -> bool:
        """Whether that many nodes are in the map and listen where it says."""
        nodes = self.folder.read_map().nodes
        return len(nodes) == count and all(_listens(node.control) for node in nodes)

    def _mended(self, record: TierRecord) -> bool:
        """Start Ray's head again if nothing else of Ray has ended; whether the tier stands then."""
        roles = self._living_roles(record)
        if ray_local.HEAD_ROLE in roles or roles.count(ray_local.NODE_ROLE) != record.nodes:
            return False
        if not head.start_again(Path(record.ray_folder), self._environment(record)):
            return False
        self._tell("Starting Ray's head again")
        log.info("up: raylets live, their head does not: it is started again")
        return self._stands(self._keep(record), MEND_PATIENCE_S)

    def _living_roles(self, record: TierRecord) -> list[str]:
        """What of the tier runs, by role; none before its Ray was up, or after a boot."""
        if record.ray_port == 0 or record.remains.boot_id != host_id():
            return []
        return [each.role for each in record.remains.processes if processes.is_alive(each)]

    def _check_nodes(self) -> None:
        """What would fail only in the nodes' own processes, where nobody sees it."""
        read_secret(self._node.token_file)
        if self._node.nvme_bytes:
            extents_for(self._node.nvme_bytes)
        if self._cluster.nodes > 1 and (self._node.control_port or self._node.bulk_port):
            raise UsageError("nodes of one machine cannot share a port: leave ports out, or 0")

    def _check_equal(self, record: TierRecord) -> None:
        """Sizes of a running tier cannot be changed by asking for others."""
        block_tokens = self.folder.read_map().block_tokens
        running = {"nodes": record.nodes, "block_tokens": block_tokens}
        # What nobody asked for now is as it was asked for then.
        asked = self._cluster.model_dump(include=self._cluster.model_fields_set & running.keys())
        wanted_bytes = self._node.arena_bytes or record.arena_bytes
        disk_bytes = self._node.nvme_bytes
        same_sizes = wanted_bytes == record.arena_bytes and disk_bytes in (None, record.nvme_bytes)
        if not same_sizes or running | asked != running:
            raise UsageError(
                f"tier {record.name} runs with {record.nodes} nodes of {record.arena_bytes} bytes, "
                f"and {record.nvme_bytes} bytes of disk each, and blocks of {block_tokens} tokens: "
                "end it with `samovar down` first, or choose another --name"
            )

    def _planned(self, former: TierRecord | None) -> TierRecord:
        """The record of the tier to be; takes over the former one's arenas where they fit."""
        tier_id = former.remains.tier_id if former else self._entropy(TIER_ID_BYTES).hex()
        ray_folder = Path(tempfile.gettempdir()) / f"samovar-{tier_id}"
        ray_local.check_folder(ray_folder)
        count = self._cluster.nodes
        shm_folder = self._node.shm_folder
        arenas = tuple(
            str(shm_folder / f"samovar-{self._cluster.name}-{tier_id}-{index}")
            for index in range(count)
        )
        if former is not None:
            for folder in set(former.arena_folders) - set(arenas):
                shutil.rmtree(folder, ignore_errors=True)
        return TierRecord(
            name=self._cluster.name,
            nodes=count,
            arena_bytes=self._arena_bytes(arenas),
            ray_port=0,
            ray_folder=str(ray_folder),
            arena_folders=arenas,
            remains=Remains(tier_id, host_id(), (str(ray_folder), *arenas), ()),
            nvme_bytes=self._nvme_bytes(),
        )

    def _arena_bytes(self, arenas: tuple[str, ...]) -> int:
        """Size of each node's arena; raises UsageError where they do not fit."""
        if not self._node.shm_folder.is_dir():
            raise UsageError(f"{self._node.shm_folder} is no folder: name one with --shm-folder")
        count = len(arenas)
        size_bytes = self._node.arena_bytes or default_arena_bytes(self._node.shm_folder) // count
        ours_bytes = sum(_allocated_bytes(Path(folder)) for folder in arenas)
        free_bytes = shutil.disk_usage(self._node.shm_folder).free + ours_bytes
        if size_bytes * count > free_bytes:
            raise UsageError(
                f"{count} arenas of {size_bytes} bytes do not fit into {self._node.shm_folder}, "
                f"which has {free_bytes} bytes free: give a smaller --arena-bytes"
            )
        return int(size_bytes)

    def _nvme_bytes(self) -> int:
        """Size of each node's NVMe tier, 0 for none; raises UsageError where they do not fit."""
        folders = nvme_folders(self._cluster, self._node)
        size_bytes = self._node.nvme_bytes
        if size_bytes is None:
            return default_bytes_in(folders)
        free_bytes = free_bytes_of(folders[0]) + sum(map(slab_bytes_in, folders))
        if size_bytes * len(folders) > free_bytes:
            raise UsageError(
                f"{len(folders)} NVMe tiers of {size_bytes} bytes do not fit onto the disk of "
                f"{folders[0].parent}, which has {free_bytes} bytes free: give a smaller "
                "--nvme-bytes, or another --nvme-folder"
            )
        return int(size_bytes)

    def _start(self, record: TierRecord) -> TierRecord:
        """Start everything; what runs is recorded step by step."""
        with ExitStack() as held:
            # Held together until Ray takes them, so that two tiers do not get the same.
            ports = [held.enter_context(_free_port()) for _ in range(2)]
            ray_port, unused_port = (port.getsockname()[1] for port in ports)
        self.folder.token(self._entropy(TOKEN_BYTES))
        Path(record.ray_folder).mkdir(FOLDER_MODE)
        environment = self._environment(record)
        record = self._keep(replace(record, ray_port=ray_port))
        self._tell("Starting Ray")
        folder = Path(record.ray_folder)
        commands = [
            ray_local.head_command(folder, ray_port, unused_port, node_resource(0)),
            *(
                ray_local.node_command(folder, ray_port, node_resource(index))
                for index in range(1, record.nodes)
            ),
        ]
        deadline = Deadline.after(self._clock, START_PATIENCE_S)
        run_all(commands, environment, self.folder.log_folder / "ray.log", deadline)
        record = self._keep(record)
        head.note(record.remains, folder)
        log.info("ray is up at %s:%d", ray_local.LOOPBACK, ray_port)
        self._tell(f"Starting {record.nodes} storage nodes")
        address = ray_local.address(ray_port)
        bootstrap(address, self._plan(record), environment, deadline, self._tell)
        return self._keep(record)

    def _environment(self, record: TierRecord) -> dict[str, str]:
        """For the processes of the tier's Ray."""
        mark = record.remains.tier_id
        own = ray_local.environment(os.environ, mark, self.folder.token_file, SOURCE)
        return own | head.variables(Path(record.ray_folder))

    def _keep(self, record: TierRecord) -> TierRecord:
        """Record what of the tier runs now."""
        living = processes.find(record.remains.tier_id, record.remains.processes)
        record = replace(record, remains=replace(record.remains, processes=tuple(living)))
        self.folder.write(record)
        return record

    def _plan(self, record: TierRecord) -> TierPlan:
        """The wanted nodes: each is a host of its own to clients, which map its arena only."""
        storage = [
            StoragePlan(
                config=self._node.model_copy(
                    update={
                        "arena_bytes": record.arena_bytes,
                        "nvme_bytes": record.nvme_bytes,
                        "host_id": self._node.host_id or f"{host_id()}:{record.name}:{index}",
                    }
                ),
                place=NodePlace(
                    index=index,
                    node_id=f"{record.name}-{index}",
                    folder=self.folder.node_folder(index),
                    arena_folder=Path(arena),
                    tier_id=record.remains.tier_id,
                ),
                log_folder=self.folder.log_folder,
            )
            for index, arena in enumerate(record.arena_folders)
        ]
        return TierPlan(
            name=record.name,
            tier_id=record.remains.tier_id,
            folder=self.folder,
            storage=tuple(storage),
            block_tokens=self._cluster.block_tokens,
            log_level=self._cluster.log_level,
        )

    def _clear(self, remains: Remains, keep: tuple[str, ...]) -> Ended:
        """End the processes and remove the folders but those to `keep`."""
        ended = processes.end(remains, host_id(), self._clock, END_PATIENCE_S)
        removed = 0
        for folder in map(Path, remains.folders):
            # A record may be of any version: only what carries the tier's id is taken as its own.
            if str(folder) not in keep and remains.tier_id in folder.name and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
        return Ended(len(ended), removed)


def check_platform() -> None:
    """Raises UsageError where the tier cannot run."""
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        raise UsageError(f"a tier runs on Linux with x86-64 or aarch64, this is {system} {machine}")


def _free_port() -> socket.socket:
    """A listening place that nobody has, held while the socket is open."""
    held = socket.socket()
    held.bind((ray_local.LOOPBACK, 0))
    return held


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


def _allocated_bytes(folder: Path) -> int:
    """Memory behind the files of a folder; 0 where there is none."""
    try:
        return sum(file.stat().st_blocks * 512 for file in folder.iterdir())
    except FileNotFoundError:
        return 0
