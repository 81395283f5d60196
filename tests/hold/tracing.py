"""A fork that is killed at one of its system calls that change files: inside LMDB's commits too.

The parent traces it (``ptrace``) from call to call. Does not cover: forks with threads, other
processors than x86-64 and 64-bit ARM.
"""

import ctypes
import os
import platform
import signal
import struct
from collections.abc import Callable

# As /usr/include has them: write, pwrite64, writev, pwritev, pwritev2, fsync, fdatasync, msync,
# truncate, ftruncate, fallocate, and whatever makes, moves or removes a name.
_NUMBERS = {
    "x86_64": (1, 18, 20, 296, 328, 74, 75, 26, 76, 77, 285, 2, 257, 82, 264, 316, 83, 258, 84, 87,
               263),
    "aarch64": (64, 68, 66, 70, 287, 82, 83, 227, 45, 46, 47, 56, 38, 276, 34, 35),
}  # fmt: skip
_OPENING = {"x86_64": {2: 1, 257: 2}, "aarch64": {56: 2}}
"""Which calls open a file, and which argument of theirs has the flags: counted if they make one."""
_TRACEME, _SYSCALL, _SETOPTIONS, _SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_SYSGOOD, _EXITKILL = 1, 1 << 20
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_ENTRY = 1
_INFO = struct.Struct("<B3xIQQQ6Q")
"""Kind, architecture, two pointers, the call's number and arguments."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def killed_at_call(work: Callable[[], None], kill_at: int) -> bool:
    """Do ``work`` in a fork that ends with SIGKILL before its N-th call; ``False`` if it survived.

    Raises ``ChildProcessError`` if it failed.
    """
    child = os.fork()
    if not child:
        status = 1
        try:
            _ptrace(_TRACEME, 0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            status = 0
        finally:
            os._exit(status)
    os.waitpid(child, 0)
    _ptrace(_SETOPTIONS, child, _SYSGOOD | _EXITKILL)
    calls, passed_on = 0, 0
    while True:
        _ptrace(_SYSCALL, child, passed_on)
        status, passed_on = os.waitpid(child, 0)[1], 0
        if os.WIFEXITED(status):
            if status:
                raise ChildProcessError(f"the fork ended with {os.WEXITSTATUS(status)}")
            return False
        if os.WIFSIGNALED(status):
            raise ChildProcessError(f"the fork ended with signal {os.WTERMSIG(status)}")
        if os.WSTOPSIG(status) != _SYSCALL_STOP:
            passed_on = os.WSTOPSIG(status)
        elif _changes_files(child):
            calls += 1
            if calls == kill_at:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return True


def _changes_files(child: int) -> bool:
    """Whether a fork stands before a call that changes files."""
    buffer = ctypes.create_string_buffer(_INFO.size)
    _ptrace(_SYSCALL_INFO, child, ctypes.addressof(buffer), address=_INFO.size)
    kind, _, _, _, number, *arguments = _INFO.unpack(buffer.raw)
    machine = platform.machine()
    if kind != _ENTRY or number not in _NUMBERS[machine]:
        return False
    flags = _OPENING[machine].get(number)
    return flags is None or bool(arguments[flags] & os.O_CREAT)


def _ptrace(request: int, pid: int, data: int, address: int = 0) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"can't trace: {os.strerror(number)}")
