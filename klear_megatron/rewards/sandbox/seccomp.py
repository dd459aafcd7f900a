"""A filter for the kernel: the system calls that a program in the sandbox may not make."""

import errno
import platform
import socket
import struct

from klear_megatron.errors import UserError

# Each of them would get around a limit (no limit counts memory that belongs to no process), get
# around the separation of processes, or reach parts of the kernel that no solution needs.
_DENIED = {
    "x86_64": {
        "shmget": 29, "semget": 64, "msgget": 68, "memfd_create": 319, "memfd_secret": 447,
        "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_getfd": 438,
        "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155,
        "add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "userfaultfd": 323,
        "perf_event_open": 298, "io_uring_setup": 425,
    },
    "aarch64": {
        "shmget": 194, "semget": 190, "msgget": 186, "memfd_create": 279, "memfd_secret": 447,
        "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "pidfd_getfd": 438,
        "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41,
        "add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280, "userfaultfd": 282,
        "perf_event_open": 241, "io_uring_setup": 425,
    },
}  # fmt: skip
_SOCKET = {"x86_64": (41, 53), "aarch64": (198, 199)}  # socket, socketpair
# In their own network namespace these reach nobody; other families do not all keep to namespaces
# (AF_VSOCK reaches the hypervisor), or open parts of the kernel that no solution needs.
_ALLOWED_SOCKETS = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
_FIRST_X32_CALL = 0x40000000  # x86-64's other set of numbers, which this list does not cover
_CLONE_NEW_NAMESPACE = 0x7E020080  # all CLONE_NEW* flags except NEWTIME, which clone() lacks

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_FAIL = 0x00050000  # plus the error number that the call returns


def seccomp_filter() -> bytes:
    """A classic BPF program (`struct sock_filter[]`), as `bwrap --seccomp` takes it.

    Raises:
        UserError: no filter is known for this kind of processor.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURE:
        raise UserError(
            f"rewards.code.sandbox: no system call filter is known for {machine} processors; "
            f"grade code on one of: {', '.join(sorted(_ARCHITECTURE))}"
        )
    number, architecture, first_argument = 0, 4, 16  # offsets in struct seccomp_data
    program = [
        (_LOAD, 0, 0, architecture),
        (_JUMP_EQUAL, 1, 0, _ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, number),
        (_JUMP_GREATER_EQUAL, 0, 1, _FIRST_X32_CALL),
        (_RETURN, 0, 0, _KILL),
        # A filter cannot see the flags of clone3. Libraries fall back to clone without it.
        (_JUMP_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _FAIL | errno.ENOSYS),
    ]
    for call in _DENIED[machine].values():
        program += [(_JUMP_EQUAL, 0, 1, call), (_RETURN, 0, 0, _FAIL | errno.EPERM)]
    for call in _SOCKET[machine]:
        families = len(_ALLOWED_SOCKETS)
        program += [
            (_JUMP_EQUAL, 0, families + 3, call),
            (_LOAD, 0, 0, first_argument),
            *((_JUMP_EQUAL, families - i, 0, f) for i, f in enumerate(_ALLOWED_SOCKETS)),
            (_RETURN, 0, 0, _FAIL | errno.EAFNOSUPPORT),
            (_RETURN, 0, 0, _ALLOW),
        ]
    program += [
        (_JUMP_EQUAL, 0, 3, _CLONE[machine]),
        (_LOAD, 0, 0, first_argument),
        (_JUMP_ANY_BIT, 0, 1, _CLONE_NEW_NAMESPACE),
        (_RETURN, 0, 0, _FAIL | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
