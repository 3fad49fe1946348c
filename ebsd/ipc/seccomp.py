"""The filter of system calls: what a process may ask of the kernel from now on, for all its threads (seccomp(2)).

1. It is a list of what is allowed. What nobody listed is answered ENOSYS, as an older kernel answers, so that a library
   that tries a new call first falls back to an old one; what is listed as forbidden is answered EPERM.
2. No process gets: new programs, namespaces, mounts, kernel modules, tracing and memory of other processes, keyrings,
   BPF, open by handle, I/O rings. Those of a client's files and of the guest's bytes get no sockets either, and no
   process beside themselves to signal.
3. The filter is assembled by libseccomp2, which is on every host with systemd: it knows the numbers of each
   architecture, and ends a process that uses the calls of another one.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable
from enum import Enum
from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_LIBRARY: Final = "libseccomp.so.2"

_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_NO_SUCH_CALL: Final = -1
_ATTRIBUTE_TSYNC: Final = 4
_NE, _EQ, _MASKED_EQ = 1, 4, 7

_AF_UNIX, _SOCK_DGRAM, _SOCKET_TYPE = 1, 2, 0xF
_CLONE_THREAD: Final = 0x00010000
_CLONE_NAMESPACES: Final = 0x7E020080
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME."""

_REQUESTS: Final = (
    0x5401,  # TCGETS, isatty
    0x5421,  # FIONBIO
    0x541B,  # FIONREAD
    0x5450,  # FIONCLEX
    0x5451,  # FIOCLEX
    0x80081272,  # BLKGETSIZE64
    0x1268,  # BLKSSZGET
)
"""ioctl(2) requests; TIOCSTI, those of loop devices and of file systems are not among them."""

_BASE: Final = _words("""
read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek _llseek close close_range
open openat openat2 creat dup dup2 dup3 fcntl fcntl64 flock fsync fdatasync sync_file_range
ftruncate ftruncate64 truncate truncate64 fallocate fadvise64 fadvise64_64 arm_fadvise64_64 copy_file_range
sendfile sendfile64 splice tee cachestat fstat fstat64 stat stat64 lstat lstat64 newfstatat fstatat64 statx
fstatfs fstatfs64 statfs statfs64 getdents getdents64 readlink readlinkat access faccessat faccessat2
mkdir mkdirat rmdir rename renameat renameat2 unlink unlinkat link linkat
chmod fchmod fchmodat fchmodat2 chown fchown fchownat lchown fchown32 utimensat umask getcwd chdir fchdir
memfd_create memfd_secret mmap mmap2 munmap mremap mprotect madvise msync mincore brk membarrier
mlock mlock2 munlock mlockall munlockall
futex futex_time64 futex_waitv futex_wait futex_wake futex_requeue set_robust_list get_robust_list rseq
set_tid_address exit exit_group
gettid getpid getppid getuid getuid32 geteuid geteuid32 getgid getgid32 getegid getegid32 getgroups getgroups32
getresuid getresuid32 getresgid getresgid32 getpgrp getpgid getsid
sched_yield sched_getaffinity sched_setaffinity sched_getparam sched_getscheduler sched_setscheduler sched_getattr
sched_get_priority_max sched_get_priority_min getpriority setpriority ioprio_get ioprio_set
getrusage getrlimit ugetrlimit setrlimit times sysinfo uname getcpu prctl arch_prctl capget
clock_gettime clock_gettime64 clock_getres clock_getres_time64 clock_nanosleep clock_nanosleep_time64 nanosleep
gettimeofday time timer_create timer_settime timer_settime64 timer_gettime timer_delete timer_getoverrun
timerfd_create timerfd_settime timerfd_settime64 timerfd_gettime setitimer getitimer alarm
eventfd eventfd2 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
poll ppoll ppoll_time64 select _newselect pselect6 pselect6_time64 pipe pipe2 signalfd signalfd4
socketpair recv recvfrom recvmsg recvmmsg send sendto sendmsg sendmmsg shutdown accept accept4
getsockname getpeername getsockopt setsockopt
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigreturn sigaltstack
restart_syscall pause wait4 waitid getrandom
""")

_NUMBERS: Final = {"cachestat": 451}
"""Calls that an older libseccomp has no name for; new ones have the same number on all architectures of ours."""

_NETWORK: Final = ("socket", "connect", "bind", "listen")
_PROGRAMS: Final = _words("""
execve execveat fork vfork kill pidfd_open pidfd_send_signal setsid setpgid
seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self capset
""")
"""The second line is what they need to give up more than who started them."""

FORBIDDEN: Final = _words("""
execve execveat fork vfork ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_open pidfd_getfd
pidfd_send_signal kill tkill rt_sigqueueinfo rt_tgsigqueueinfo
socket connect bind listen mount umount umount2 pivot_root chroot unshare setns open_tree move_mount fsopen fsconfig
fsmount fspick mount_setattr swapon swapoff mknod mknodat
bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register
init_module finit_module delete_module kexec_load kexec_file_load reboot
keyctl add_key request_key open_by_handle_at name_to_handle_at
setuid setgid setreuid setregid setresuid setresgid setgroups setfsuid setfsgid capset
iopl ioperm modify_ldt personality syslog acct quotactl quotactl_fd settimeofday adjtimex clock_settime clock_adjtime
sethostname setdomainname vhangup fanotify_init lookup_dcookie nfsservctl uselib ustat migrate_pages move_pages
""")
"""What is refused with EPERM rather than ENOSYS, where a process does not keep it."""


class Keeps(Enum):
    """What some processes keep beyond reading, writing, waiting and threads."""

    NETWORK = "sockets of any family"
    PROGRAMS = "starting programs and ending them"
    DATAGRAMS = "Unix datagrams, which tell a service manager of readiness and life"


class _Comparison(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def _library() -> ctypes.CDLL:
    """Return libseccomp; raises OSError where it is not installed."""
    library = ctypes.CDLL(_LIBRARY)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = (ctypes.c_uint32,)
    library.seccomp_release.argtypes = (ctypes.c_void_p,)
    library.seccomp_release.restype = None
    library.seccomp_load.argtypes = (ctypes.c_void_p,)
    library.seccomp_attr_set.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32)
    library.seccomp_syscall_resolve_name.argtypes = (ctypes.c_char_p,)
    library.seccomp_rule_add_array.argtypes = (
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Comparison),
    )  # fmt: skip
    return library


def is_available() -> bool:
    """Say whether filters can be assembled on this host."""
    try:
        _library()
    except OSError:
        return False
    return os.path.exists("/proc/sys/kernel/seccomp")


class _Filter:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._context = library.seccomp_init(_ERRNO | errno.ENOSYS)
        if not self._context:
            raise MemoryError("seccomp_init")

    def add(self, names: Iterable[str], action: int, *comparisons: _Comparison) -> None:
        """Answer calls of these names so, those that this architecture or library does not have left out."""
        array = (_Comparison * len(comparisons))(*comparisons)
        for name in names:
            number = self._library.seccomp_syscall_resolve_name(name.encode())
            if number == _NO_SUCH_CALL:
                number = _NUMBERS.get(name, number)
            if number != _NO_SUCH_CALL:
                self._check(
                    self._library.seccomp_rule_add_array(self._context, action, number, len(comparisons), array)
                )

    def load(self) -> None:
        """Put the filter in force, for all threads."""
        self._check(self._library.seccomp_attr_set(self._context, _ATTRIBUTE_TSYNC, 1))
        self._check(self._library.seccomp_load(self._context))

    def close(self) -> None:
        self._library.seccomp_release(self._context)

    def _check(self, result: int) -> None:
        if result != 0:
            raise OSError(abs(result), os.strerror(abs(result)))


def confine(keeps: frozenset[Keeps]) -> list[str]:
    """``restrict``; returns what could not be done instead of raising."""
    try:
        restrict(keeps)
    except (OSError, AttributeError) as exc:  # no library, or one without a function
        return [f"any system call stays possible: {exc}"]
    return []


def restrict(keeps: frozenset[Keeps]) -> None:
    """Allow this process, all its threads and what it starts nothing but the list. Raises OSError.

    no_new_privs must be set. A second call restricts further.
    """
    rules = _Filter(_library())
    refused = _ERRNO | errno.EPERM
    try:
        extra: tuple[str, ...] = (_NETWORK if Keeps.NETWORK in keeps else ()) + (
            _PROGRAMS if Keeps.PROGRAMS in keeps else ()
        )
        allowed = dict.fromkeys((*_BASE, *extra))
        rules.add(allowed, _ALLOW)
        judged = {"kill", "socket", "connect"} if Keeps.DATAGRAMS in keeps else {"kill"}
        rules.add((name for name in FORBIDDEN if name not in allowed and name not in judged), refused)
        if Keeps.DATAGRAMS in keeps and Keeps.NETWORK not in keeps:
            datagram = (_Comparison(0, _EQ, _AF_UNIX, 0), _masked(1, _SOCKET_TYPE, _SOCK_DGRAM))
            rules.add(("socket",), _ALLOW, *datagram)
            rules.add(("socket",), refused, _Comparison(0, _NE, _AF_UNIX, 0))
            rules.add(("connect",), _ALLOW)
        if Keeps.PROGRAMS in keeps:
            rules.add(("clone",), _ALLOW, _masked(0, _CLONE_NAMESPACES, 0))
            rules.add(("tgkill", "prlimit64"), _ALLOW)
        else:
            rules.add(("clone",), _ALLOW, _masked(0, _CLONE_THREAD | _CLONE_NAMESPACES, _CLONE_THREAD))
            rules.add(("clone",), refused, _masked(0, _CLONE_THREAD, 0))
            rules.add(("tgkill", "kill"), _ALLOW, _Comparison(0, _EQ, os.getpid(), 0))
            rules.add(("tgkill", "kill"), refused, _Comparison(0, _NE, os.getpid(), 0))
            rules.add(("prlimit64",), _ALLOW, _Comparison(0, _EQ, 0, 0))
            rules.add(("prlimit64",), refused, _Comparison(0, _NE, 0, 0))
        for request in _REQUESTS:
            rules.add(("ioctl",), _ALLOW, _masked(1, 0xFFFFFFFF, request))
        rules.load()
    finally:
        rules.close()


def _masked(argument: int, mask: int, value: int) -> _Comparison:
    return _Comparison(argument, _MASKED_EQ, mask, value)
