"""The system calls that a sandboxed program is refused, as a seccomp filter.

Namespaces and resource limits cover most of what a program could do; the calls listed here go round them: memory that
no limit counts (System V segments, anonymous files), namespaces of its own with file systems of its own, sockets that
no network namespace holds, looking into other processes, and parts of the kernel with a long history of holes. Each
fails with "not permitted", which an honest program sees as an exception.
"""

import errno
import platform
import struct
import sys

# name: (x86-64, arm64)
_REFUSED = {
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "open_by_handle_at": (304, 265),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, and AUDIT_ARCH of linux/audit.h
_CLONE, _SOCKET, _CLONE3 = (56, 220), (41, 198), 435
_NEW_NAMESPACE = 0x7E020000  # every CLONE_NEW* flag
_UNIX = 1  # the address family whose sockets stay inside the network namespace
_X32 = 0x40000000  # x86-64 has a second table of calls above this number

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little endian
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000


def supported() -> bool:
    """Whether a filter can be written for this machine."""
    return sys.platform == "linux" and platform.machine() in _MACHINES


def seccomp_filter() -> bytes:
    """The filter as the kernel takes it: an array of struct sock_filter (classic BPF)."""
    column, machine = _MACHINES[platform.machine()]
    refuse = (_RETURN, 0, 0, _REFUSE | errno.EPERM)
    steps = [
        (_LOAD, 0, 0, _MACHINE),
        (_EQUAL, 1, 0, machine),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        refuse,
        # The flags of clone3 lie in memory, where no filter can look; where it is missing, libc falls back to clone.
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _REFUSE | errno.ENOSYS),
    ]
    for numbers in _REFUSED.values():
        steps += [(_EQUAL, 0, 1, numbers[column]), refuse]
    steps += [
        (_EQUAL, 0, 3, _CLONE[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 0, 4, _NEW_NAMESPACE),
        refuse,
        (_EQUAL, 0, 2, _SOCKET[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 0, 1, _UNIX),
        (_RETURN, 0, 0, _ALLOW),
        refuse,
    ]
    return b"".join(struct.pack("<HBBI", *step) for step in steps)
