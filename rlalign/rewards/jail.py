"""Locking the current process in, for good: the layers between untrusted Python and the machine.

Each layer returns whether it is active, and the weaker ones stand where a kernel lacks a stronger
one. Linux only, standard library only, no root needed: `sandbox_main` runs this by file path in an
interpreter that knows nothing of the project. Numbers are from the kernel's uapi headers
(landlock.h, seccomp.h, bpf_common.h, sched.h, mount.h) and its system call tables.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterable, Mapping

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = (
    0x00020000,
    0x08000000,
    0x10000000,
    0x40000000,
)
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 16384, 1 << 18
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
LANDLOCK_EXECUTE, LANDLOCK_WRITE, LANDLOCK_READ, LANDLOCK_READ_DIR = 1, 2, 4, 8
LANDLOCK_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}  # file rights known to each ABI; from 5 on: 16
LANDLOCK_NET = 3  # bind and connect TCP
LANDLOCK_SCOPE = 3  # abstract unix sockets and signals
FILE_RIGHTS = LANDLOCK_EXECUTE | LANDLOCK_WRITE | LANDLOCK_READ | 1 << 14  # truncate

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# (x86_64, aarch64); None: the architecture has no such call.
_DENIED = {
    "socket": (41, 198), "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kcmp": (312, 272), "unshare": (272, 97), "setns": (308, 268),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "io_uring_setup": (425, 425), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "tkill": (200, 130),
    "process_madvise": (440, 440), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "memfd_create": (319, 279), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273),
    "reboot": (169, 142), "swapon": (167, 224),
}  # fmt: skip
# First argument must be this process (0 as well for prlimit64).
_OWN_PID = {
    "kill": (62, 129),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}
_PRLIMIT, _CLONE, _CLONE3, CLONE_THREAD = (302, 261), (56, 220), 435, 0x00010000


def set_limits(limits: Mapping[str, int]) -> bool:
    """Resource limits by name ("CPU", "AS", ...), soft and hard. CPU gets a second more before
    SIGXCPU becomes SIGKILL."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        ceiling = resource.getrlimit(kind)[1]
        wanted = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(kind, (wanted, wanted + 1 if name == "CPU" else wanted))
    return True


def enter_namespaces() -> bool:
    """A network without interfaces, and mounts, IPC and privileges of its own."""
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC):
        return False
    try:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False  # the kernel gave a namespace and withheld its privileges
    return True


def mount_scratch(folder: str, max_bytes: int) -> bool:
    """Put a bounded file system in memory over `folder`, seen by this process only."""
    if _libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None):
        return False
    options = f"size={max_bytes},nr_inodes=1024,mode=0700".encode()
    return not _libc.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options)


def drop_capabilities() -> bool:
    """Give up every privilege that root, or the owner of a user namespace, has."""
    header, data = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    if _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return not _libc.syscall(
        {"x86_64": 126, "aarch64": 91}.get(platform.machine(), -1), header, data
    )


def restrict_files(
    readable: Iterable[str], writable: Iterable[str], devices: Iterable[str]
) -> bool:
    """Landlock: nothing of the file system but these; no TCP, no signals to other processes where
    the kernel knows those rights. Needs no_new_privs."""
    abi = _libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    rights = (1 << LANDLOCK_FS_BITS.get(abi, 16)) - 1
    attributes = [rights, LANDLOCK_NET if abi >= 4 else 0, LANDLOCK_SCOPE if abi >= 6 else 0]
    attributes = attributes[: 1 + (abi >= 4) + (abi >= 6)]
    packed = struct.pack(f"={len(attributes)}Q", *attributes)
    ruleset = _libc.syscall(LANDLOCK_CREATE, packed, ctypes.c_size_t(len(packed)), 0)
    if ruleset < 0:
        return False
    read = LANDLOCK_EXECUTE | LANDLOCK_READ | LANDLOCK_READ_DIR
    granted = [(p, read) for p in readable] + [(p, rights) for p in writable]
    granted += [(p, LANDLOCK_READ | LANDLOCK_WRITE) for p in devices]
    for path, right in granted:
        _allow(ruleset, path, right & rights)
    done = not _libc.syscall(LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)
    return done


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not on this machine
    rule = struct.pack("=Qi", rights if os.path.isdir(path) else rights & FILE_RIGHTS, handle)
    failed = _libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0)
    os.close(handle)
    if failed:
        raise OSError(ctypes.get_errno(), "landlock_add_rule", path)


def filter_calls(pid: int) -> bool:
    """seccomp: no sockets, no new processes (threads are fine), no signals to others, none of the
    calls that reach into other processes or the kernel's configuration. Needs no_new_privs."""
    machine = platform.machine()
    if machine not in AUDIT_ARCH:
        return False
    program = _filter_program(("x86_64", "aarch64").index(machine), AUDIT_ARCH[machine], pid)
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    return not _libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)


def _filter_program(column: int, arch: int, pid: int) -> list[tuple[int, int, int, int]]:
    """BPF instructions (code, jump if true, jump if false, constant)."""
    load, equal, at_least, bit_set, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, absent, kill = (
        0x7FFF0000,
        0x50000 | errno.EPERM,
        0x50000 | errno.ENOSYS,
        0x80000000,
    )
    program = [
        (load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000), (give, 0, 0, deny),  # the x32 twins of every call
        (equal, 0, 1, _CLONE3), (give, 0, 0, absent),  # its flags cannot be read; libc uses clone
        (equal, 0, 4, _CLONE[column]),
        (load, 0, 0, 16), (bit_set, 0, 1, CLONE_THREAD), (give, 0, 0, allow), (give, 0, 0, deny),
    ]  # fmt: skip
    for numbers, others in [(n, ()) for n in _OWN_PID.values()] + [(_PRLIMIT, (0,))]:
        program += [(equal, 0, 4 + len(others), numbers[column]), (load, 0, 0, 16)]
        program += [(equal, 1 + len(others) - i, 0, v) for i, v in enumerate((pid, *others))]
        program += [(give, 0, 0, deny), (give, 0, 0, allow)]
    for numbers in _DENIED.values():
        if numbers[column] is not None:
            program += [(equal, 0, 1, numbers[column]), (give, 0, 0, deny)]
    return [*program, (give, 0, 0, allow)]
