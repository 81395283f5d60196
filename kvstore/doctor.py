"""What on this machine is in the way of a tier, what an old one left behind, and what to do.

Looks, and changes nothing. Every check is a function of what it looks at, so that tests can show
it another machine. Does not cover: a running tier's own figures (`samovar status`).

Left behind is what carries a tier's mark and belongs to no record in the state folder: an arena
whose lock nobody holds, an embedded tier's too, a process, a folder of Ray's.
"""

import fcntl
import importlib.metadata
import mmap
import os
import platform
import re
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pynvml

from kvstore.cli_options import mebibytes
from kvstore.cluster import head, processes
from kvstore.cluster.launch import check_platform
from kvstore.cluster.plan import nvme_folders
from kvstore.cluster.ray_local import TOKEN_VARIABLE
from kvstore.config import ClusterConfig, NodeConfig
from kvstore.embedded import FOLDER_PREFIX
from kvstore.errors import SamovarError, UsageError
from kvstore.leaves import Implementation, implementation
from kvstore.machine import SMALL_ARENA_BYTES, default_arena_bytes, host_id
from kvstore.node_folder import LOCK_FILE
from kvstore.secret import read_secret
from kvstore.state import Remains, TierFolder
from kvstore.tiers.nvme.capacity import default_bytes_in, free_bytes_of, slab_bytes_in
from kvstore.tiers.nvme.disk import takes_direct

SMALL_DISK = (
    "a tenth of the free disk is less than 64 MiB for each node; name another disk with "
    "--nvme-folder, or a size with --nvme-bytes"
)
OPEN_FILES_MIN = 4096
RAY_MIN = (2, 52)
OURS = re.compile(r"samovar-(?:[a-z][a-z0-9-]*-)?([0-9a-f]{12})(?:-\d+)?")
_FAST_HASH_FLAGS = {"x86_64": "avx2", "aarch64": "asimd"}


class Level(Enum):
    """How much a finding matters: a tier cannot run whole (FAIL), or as well as it could (WARN)."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line for a person: what was looked at, what was found, and what to do."""

    level: Level
    subject: str
    sentence: str


def examine(cluster: ClusterConfig, node: NodeConfig) -> list[Finding]:
    """Look at everything."""
    tiers = list(known_tiers(cluster.state_folder))
    remains = [found for _, found in tiers]
    return [
        machine(),
        page_size(mmap.PAGESIZE),
        processor(platform.machine(), Path("/proc/cpuinfo")),
        native_code(implementation()),
        shared_memory(node.shm_folder, Path("/proc/mounts")),
        nvme(node.nvme_bytes, nvme_folders(cluster, node)),
        open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        *ports(node),
        *token_file(node.token_file),
        ray_version(importlib.metadata.version),
        ray_folder(Path(tempfile.gettempdir())),
        state_folder(cluster.state_folder),
        *(token(TierFolder(path)) for path, _ in tiers),
        *(tier(path, found, host_id()) for path, found in tiers),
        *left_arenas(node.shm_folder, remains),
        *left_embedded(node.shm_folder),
        *left_ray_folders(Path(tempfile.gettempdir()), remains),
        *left_processes(remains),
        gpu(),
    ]


def machine() -> Finding:
    """Operating system and processor architecture."""
    try:
        check_platform()
    except UsageError as error:
        return Finding(Level.FAIL, "machine", str(error))
    return Finding(Level.OK, "machine", f"{platform.system()} on {platform.machine()}")


def page_size(page_bytes: int) -> Finding:
    """Slots are whole pages."""
    if page_bytes > 64 << 10:
        text = f"pages of {page_bytes} bytes waste memory with small blocks"
        return Finding(Level.WARN, "page size", text)
    return Finding(Level.OK, "page size", f"{page_bytes} bytes")


def processor(architecture: str, cpuinfo: Path) -> Finding:
    """Every byte is hashed as it is delivered: that needs vector instructions."""
    flag = _FAST_HASH_FLAGS.get(architecture, "")
    try:
        words = set(cpuinfo.read_text().split())
    except OSError as error:
        return Finding(Level.WARN, "processor", f"cannot read {cpuinfo}: {error.strerror}")
    if flag not in words:
        text = f"without {flag or 'known vector instructions'} every get is slower to verify"
        return Finding(Level.WARN, "processor", text)
    return Finding(Level.OK, "processor", f"has {flag}, hashing is fast")


def native_code(used: Implementation) -> Finding:
    """Who copies and hashes: with Python's interpreter lock, or without it."""
    if used is Implementation.PYTHON:
        text = (
            "leaves are copied and hashed in Python, slower: install a C compiler, then Samovar "
            "again from its source"
        )
        return Finding(Level.WARN, "native code", text)
    return Finding(Level.OK, "native code", f"leaves are copied and hashed by {used.value}")


def shared_memory(folder: Path, mounts: Path) -> Finding:
    """The arena's place: a tmpfs with room."""
    subject = "shared memory"
    if not folder.is_dir():
        text = f"{folder} is not there: name a tmpfs folder with --shm-folder"
        return Finding(Level.FAIL, subject, text)
    usage = shutil.disk_usage(folder)
    room = f"{folder} has {mebibytes(usage.free)} of {mebibytes(usage.total)} free"
    kind = _file_system(folder, mounts)
    if kind != "tmpfs":
        text = f"{folder} is on {kind}, not a tmpfs: every block would go to a disk"
        return Finding(Level.WARN, subject, text)
    arena_bytes = default_arena_bytes(folder)
    if arena_bytes < SMALL_ARENA_BYTES:
        text = (
            f"{room}, an arena would get {mebibytes(arena_bytes)}: give the container a larger "
            f"--shm-size, or `mount -o remount,size=8G {folder}`"
        )
        return Finding(Level.WARN, subject, text)
    return Finding(Level.OK, subject, f"{room}, an arena gets {mebibytes(arena_bytes)}")


def nvme(wanted_bytes: int | None, folders: list[Path]) -> Finding:
    """The disk behind the arenas: room for every node's slab, and how bytes get there."""
    subject, place = "nvme disk", folders[0].parent
    if wanted_bytes == 0:
        return Finding(Level.OK, subject, "no NVMe tier is wanted")
    existing = next(path for path in folders[0].parents if path.is_dir())
    try:
        is_direct = takes_direct(existing)
    except OSError as error:
        text = f"cannot write to {existing} ({error.strerror}): name another with --nvme-folder"
        return Finding(Level.FAIL, subject, text)
    each_bytes = default_bytes_in(folders) if wanted_bytes is None else wanted_bytes
    if not each_bytes:
        return Finding(Level.WARN, subject, f"no NVMe tier in {place}: {SMALL_DISK}")
    free_bytes = free_bytes_of(existing)
    gets = f"a node's NVMe tier gets {mebibytes(each_bytes)}"
    room = f"{place} has {mebibytes(free_bytes)} free, {gets}"
    if each_bytes * len(folders) > free_bytes + sum(map(slab_bytes_in, folders)):
        return Finding(Level.FAIL, subject, f"{room}: give a smaller one, or another --nvme-folder")
    if not is_direct:
        return Finding(Level.WARN, subject, f"{room}; no O_DIRECT there: buffered, with fdatasync")
    return Finding(Level.OK, subject, f"{room}, with O_DIRECT")


def open_files(soft_limit: int) -> Finding:
    """Ray and gRPC hold many connections."""
    if soft_limit != resource.RLIM_INFINITY and soft_limit < OPEN_FILES_MIN:
        text = f"{soft_limit} are few for Ray and many clients: `ulimit -n {OPEN_FILES_MIN}`"
        return Finding(Level.WARN, "open files", text)
    return Finding(Level.OK, "open files", f"{soft_limit} allowed")


def ports(node: NodeConfig) -> Iterator[Finding]:
    """Whether the ports asked for can be had; without any, whether loopback works at all."""
    wanted = {"control_port": node.control_port, "bulk_port": node.bulk_port}
    for name, port in wanted.items():
        try:
            with socket.create_server((node.bind_host, port)):
                pass
        except OSError as error:
            text = f"{node.bind_host}:{port} cannot be had ({error.strerror}): choose another"
            # A tier that runs has its own port, which is as it should be.
            yield Finding(Level.WARN if port else Level.FAIL, name, text)
        else:
            text = f"{node.bind_host}:{port or 'any'} can be had"
            yield Finding(Level.OK, name, text)


def token_file(file: Path | None) -> Iterator[Finding]:
    """The secret that callers of this tier are to show, where there is to be one."""
    if file is None:
        return
    try:
        read_secret(file)
    except UsageError as error:
        yield Finding(Level.FAIL, "token file", str(error))
    else:
        yield Finding(Level.OK, "token file", f"{file} can be used")


def ray_version(version_of: Callable[[str], str]) -> Finding:
    """Token authentication came with Ray 2.52."""
    try:
        version = version_of("ray")
    except importlib.metadata.PackageNotFoundError:
        text = "is not installed: pip install ray; embedded use does without"
        return Finding(Level.FAIL, "ray", text)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < RAY_MIN:
        text = f"{version} knows no token authentication: pip install 'ray>=2.52'"
        return Finding(Level.FAIL, "ray", text)
    return Finding(Level.OK, "ray", f"{version}, with token authentication")


def ray_folder(temporary: Path) -> Finding:
    """Where Ray's sockets are to be."""
    free_bytes = shutil.disk_usage(temporary).free
    if not os.access(temporary, os.W_OK):
        return Finding(Level.FAIL, "ray folder", f"cannot write to {temporary}: set TMPDIR")
    if free_bytes < 100 << 20:
        text = f"{temporary} has {mebibytes(free_bytes)} free, Ray's logs need more"
        return Finding(Level.WARN, "ray folder", text)
    return Finding(Level.OK, "ray folder", f"{temporary} has {mebibytes(free_bytes)} free")


def state_folder(folder: Path) -> Finding:
    """Where records, tokens and logs are to be."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    if not os.access(existing, os.W_OK):
        text = f"cannot write to {existing}: name another with --state-folder"
        return Finding(Level.FAIL, "state folder", text)
    return Finding(Level.OK, "state folder", str(folder))


def known_tiers(folder: Path) -> Iterator[tuple[Path, Remains]]:
    """The tiers with a record, of any version; damaged ones show in `left_*`."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            found = TierFolder(path).remains()
        except (SamovarError, OSError):
            continue
        if found is not None:
            yield path, found


def token(folder: TierFolder) -> Finding:
    """The secret of a tier's Ray: there, and nobody else's to read."""
    subject = f"token of {folder.path.name}"
    try:
        mode = folder.token_file.stat().st_mode & 0o777
    except FileNotFoundError:
        return Finding(Level.WARN, subject, "is gone: `samovar down`, then `samovar up`")
    if mode & 0o077:
        text = f"others can read it: chmod 600 {folder.token_file}"
        return Finding(Level.WARN, subject, text)
    return Finding(Level.OK, subject, f"{folder.token_file}, readable to you only")


def tier(path: Path, remains: Remains, boot_id: str) -> Finding:
    """Whether what is recorded runs."""
    subject = f"tier {path.name}"
    try:
        TierFolder(path).read()
    except SamovarError as error:
        return Finding(Level.FAIL, subject, str(error))
    if remains.boot_id != boot_id:
        text = "is from before the last boot: `samovar up` starts it anew, `samovar down` clears it"
        return Finding(Level.WARN, subject, text)
    complaint = head.complaint(remains)
    if complaint is not None:
        return Finding(Level.FAIL, subject, complaint)
    return Finding(Level.OK, subject, f"runs, with {len(remains.processes)} processes")


def left_arenas(shm_folder: Path, known: list[Remains]) -> Iterator[Finding]:
    """Arenas that no record knows and no process holds."""
    for folder in _left(shm_folder, known):
        if not _is_held(folder / LOCK_FILE):
            text = f"{folder} is an arena that no running process holds: rm -r {folder}"
            yield Finding(Level.WARN, "left behind", text)


def left_embedded(shm_folder: Path) -> Iterator[Finding]:
    """Memory of embedded tiers that were killed in the middle of being made."""
    for folder in sorted(shm_folder.glob(f"{FOLDER_PREFIX}*")):
        if folder.is_dir() and not _is_held(folder / LOCK_FILE):
            text = f"{folder} is of an embedded tier that was killed: rm -r {folder}"
            yield Finding(Level.WARN, "left behind", text)


def left_ray_folders(temporary: Path, known: list[Remains]) -> Iterator[Finding]:
    """Ray's folders whose tier has neither a record nor a process."""
    for folder in _left(temporary, known):
        found = OURS.fullmatch(folder.name)
        if found is not None and not processes.find(found[1]):
            text = f"{folder} is of a Ray that is gone: rm -r {folder}"
            yield Finding(Level.WARN, "left behind", text)


def left_processes(known: list[Remains]) -> Iterator[Finding]:
    """Processes of tiers that no record knows, here or in the state folder they were started by."""
    ids = {remains.tier_id for remains in known}
    for tier_id, pids in processes.marked().items():
        if tier_id in ids or any(_is_recorded(pid, tier_id) for pid in pids):
            continue
        numbers = " ".join(map(str, pids))
        text = f"processes run of a tier whose record is gone: kill {numbers}"
        yield Finding(Level.WARN, "left behind", text)


def _is_recorded(pid: int, tier_id: str) -> bool:
    """Whether the state folder that the process was started by still knows its tier."""
    token_file = processes.variable(pid, TOKEN_VARIABLE)
    if token_file is None:
        return False
    try:
        found = TierFolder(Path(token_file).parent).remains()
    except (SamovarError, OSError):
        return False
    return found is not None and found.tier_id == tier_id


def gpu() -> Finding:
    """Without a GPU nothing is lost but speed for engines that have none anyway."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        text = f"none ({error}): blocks are staged through host memory, as they should be here"
        return Finding(Level.OK, "gpu", text)
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        names = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
    return Finding(Level.OK, "gpu", ", ".join(map(str, names)) or "a driver, but no device")


def _left(parent: Path, known: list[Remains]) -> list[Path]:
    ids = {remains.tier_id for remains in known}
    found = []
    for folder in sorted(parent.iterdir()) if parent.is_dir() else ():
        match = OURS.fullmatch(folder.name)
        if match is not None and match[1] not in ids and folder.is_dir():
            found.append(folder)
    return found


def _is_held(lock: Path) -> bool:
    """Whether a process has the lock; a folder of another user counts as held."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _file_system(folder: Path, mounts: Path) -> str:
    """The kind of the file system that holds the folder."""
    best = ("", "unknown")
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return "unknown"
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        # Later lines are mounted over earlier ones.
        if folder.resolve().is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]
