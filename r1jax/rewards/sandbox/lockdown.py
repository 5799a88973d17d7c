"""Gives up a process's own rights for good: limits, system calls, files. Linux, through ctypes.

Runs inside the process that is about to start an untrusted program, so it imports the standard
library only. Three layers, and none trusts another:

  - `limit`: rlimits. Since a program may not start processes, a limit per process is the limit.
  - `filter_calls`: a seccomp filter. It lists what is allowed and answers ENOSYS to all else,
    which libraries take as an old kernel's answer and fall back. What a program may not do at
    all: open a file for writing (and so fill a disk), start a process (and so leave one behind),
    open a socket, signal anyone but itself, trace, mount, change namespaces, use keys or shared
    memory.
  - `hide_files`: landlock, where no mount namespace hides the files.

Source: seccomp(2), landlock(7), and the kernel's include/uapi/linux headers.
"""

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Iterable

# x86-64's number, then that of 64-bit ARM; - where it has none.
_ALLOWED = """
read 0 63; write 1 64; close 3 57; fstat 5 80; lseek 8 62; mmap 9 222; mprotect 10 226;
munmap 11 215; brk 12 214; rt_sigaction 13 134; rt_sigprocmask 14 135; rt_sigreturn 15 139;
pread64 17 67; pwrite64 18 68; readv 19 65; writev 20 66; access 21 -; pipe 22 -; select 23 -;
sched_yield 24 124; mremap 25 216; madvise 28 233; dup 32 23; dup2 33 -; nanosleep 35 101;
getitimer 36 102; alarm 37 -; setitimer 38 103; getpid 39 172; sendto 44 206; recvfrom 45 207;
exit 60 93; exit_group 231 94; uname 63 160; getdents64 217 61; getcwd 79 17; readlink 89 -;
getrlimit 97 163; getrusage 98 165; sysinfo 99 179; times 100 153; getuid 102 174; getgid 104 176;
geteuid 107 175; getegid 108 177; getppid 110 173; getpgrp 111 -; getgroups 115 158;
getresuid 118 148; getresgid 120 150; sigaltstack 131 132; rt_sigpending 127 136;
rt_sigsuspend 130 133; rt_sigtimedwait 128 137; arch_prctl 158 -; gettid 186 178; futex 202 98;
sched_getaffinity 204 123; time 201 -; set_tid_address 218 96; clock_gettime 228 113;
clock_getres 229 114; clock_nanosleep 230 115; epoll_wait 232 -; epoll_ctl 233 21;
newfstatat 262 79; readlinkat 267 78; faccessat 269 48; pselect6 270 72; ppoll 271 73; poll 7 -;
set_robust_list 273 99; epoll_pwait 281 22; eventfd2 290 19; epoll_create1 291 20; dup3 292 24;
pipe2 293 59; getrandom 318 278; membarrier 324 283; statx 332 291; rseq 334 293;
faccessat2 439 439; stat 4 -; lstat 6 -; gettimeofday 96 169; getcpu 309 168; fadvise64 221 223;
restart_syscall 219 128; statfs 137 43; fstatfs 138 44
"""
_BY_ARGUMENT = """
ioctl 16 29; fcntl 72 25; clone 56 220; kill 62 129; tgkill 234 131; socketpair 53 199;
prlimit64 302 261; openat 257 56
"""
_EXECUTE = "execve 59 221; execveat 322 281"
# What a compiler needs besides: it starts its parts, and writes.
_COMPILE = """
fork 57 -; vfork 58 -; wait4 61 260; waitid 247 95; unlink 87 -; unlinkat 263 35; rename 82 -;
renameat 264 38; renameat2 316 276; chmod 90 -; fchmod 91 52; fchmodat 268 53; umask 95 166;
ftruncate 77 46; chdir 80 49; fallocate 285 47; mkdir 83 -; mkdirat 258 34; getpgid 121 155
"""
# machine -> (column above, AUDIT_ARCH)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LOAD, _JUMP_EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06  # classic BPF
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_EPERM, _EACCES, _ENOSYS = 1, 13, 38

_CLONE_THREAD, _CLONE_NAMESPACES = 0x00010000, 0x7E020000
_WRITES = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | 0o20000000  # the last is __O_TMPFILE
# No F_SETOWN, F_SETSIG, FIOSETOWN: they have the kernel send any signal to any process.
_FCNTL = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)

_libc = ctypes.CDLL(None, use_errno=True)


class LockdownError(Exception):
    """The kernel refused a restriction: nothing untrusted may start."""


def limit(
    *,
    cpu_seconds: int,
    memory_bytes: int,
    file_bytes: int,
    threads: int,
) -> None:
    """Sets the process's limits; none can be raised again.

    `memory_bytes` bounds the address space, `threads` all threads of the user on the machine. The
    first second of processor time over the limit brings SIGXCPU, the next one SIGKILL.
    """
    for kind, soft, hard in (
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
        (resource.RLIMIT_STACK, memory_bytes // 2, memory_bytes // 2),
        (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        (resource.RLIMIT_NPROC, threads, threads),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_SIGPENDING, 64, 64),
    ):
        current = resource.getrlimit(kind)[1]
        if current != resource.RLIM_INFINITY:
            soft, hard = min(soft, current), min(hard, current)
        resource.setrlimit(kind, (soft, hard))


def filter_calls(*, execute: bool, compiler: bool) -> None:
    """Installs the filter on this thread and all that it starts.

    `execute`: execve is allowed, to replace this process by a compiled program. `compiler`: also
    what g++ needs to start its parts and to write. Signals may go to this very process only.

    Raises:
      LockdownError: another machine than x86-64 or 64-bit ARM, or a kernel without seccomp.
    """
    program = call_filter(platform.machine(), os.getpid(), execute=execute, compiler=compiler)
    no_new_privileges()
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    _call("prctl(PR_SET_SECCOMP)", _libc.prctl(22, 2, header, 0, 0))


def call_filter(machine: str, pid: int, *, execute: bool, compiler: bool) -> bytes:
    """The filter as a classic BPF program: 8 bytes an instruction."""
    if machine not in _MACHINES:
        raise LockdownError(f"no table of system calls for {machine}; known: {[*_MACHINES]}")
    column, arch = _MACHINES[machine]
    rules = [_rule(number) for number in _numbers(_ALLOWED, column).values()]
    if execute or compiler:
        rules += [_rule(number) for number in _numbers(_EXECUTE, column).values()]
    if compiler:
        rules += [_rule(number) for number in _numbers(_COMPILE, column).values()]
    number = _numbers(_BY_ARGUMENT, column)
    thread = _CLONE_NAMESPACES | (0 if compiler else _CLONE_THREAD)
    rules += [
        _rule(number["clone"], 0, [thread & _CLONE_THREAD], mask=thread, error=_EPERM),
        _rule(number["openat"], 2, None if compiler else [0], mask=_WRITES, error=_EACCES),
        _rule(number["fcntl"], 1, _FCNTL),
        _rule(number["ioctl"], 1, _IOCTL),
        _rule(number["kill"], 0, [pid], error=_EPERM),
        _rule(number["tgkill"], 0, None if compiler else [pid], error=_EPERM),
        _rule(number["socketpair"], 0, [1]),  # AF_UNIX: asyncio wakes itself through one
        _rule(number["prlimit64"], 0, [0, pid], error=_EPERM),
    ]
    return b"".join(
        [
            _step(_LOAD, _ARCH),
            _step(_JUMP_EQUAL, arch, 1, 0),
            _step(_RETURN, _KILL),
            _step(_LOAD, _NUMBER),
            *rules,
            _step(_RETURN, _ERRNO | _ENOSYS),
        ]
    )


def hide_files(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Takes away all files but those beneath `readable`, and `writable` where one may also write.

    Existence, size and dates of other files stay visible, their contents and names do not. Where
    the kernel can, it also refuses TCP and signals to processes outside.

    Raises:
      LockdownError: the kernel has no landlock, or no such path.
    """
    version = _libc.syscall(444, None, 0, 1)
    if version < 1:
        raise LockdownError("the kernel has no landlock (Linux 5.13 or newer, lsm=landlock)")
    # The rights that each version of landlock knows: 13 at first, then refer, truncate, ioctl.
    everything = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
    network = 0b11 if version >= 4 else 0
    scope = 0b11 if version >= 6 else 0  # abstract sockets, signals
    attributes = struct.pack("QQQ", everything, network, scope)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _call("landlock_create_ruleset", _libc.syscall(444, attributes, size, 0))
    read = 0b1101  # execute, read file, read folder
    for path, rights in [(path, read) for path in readable] + [(p, everything) for p in writable]:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            rights &= 0b101
        rule = struct.pack("=Qi", rights, handle)
        _call("landlock_add_rule", _libc.syscall(445, rules, 1, rule, 0))
        os.close(handle)
    no_new_privileges()
    _call("landlock_restrict_self", _libc.syscall(446, rules, 0))
    os.close(rules)


def drop_root(*, keep_reading: bool) -> None:
    """Turns root into user 65534, who has no rights; does nothing for anybody else.

    With `keep_reading` the process may still read files that only root can: for a Python that
    lies in root's home. `hide_files` decides then which.
    """
    if os.geteuid() != 0:
        return
    if keep_reading:
        _call("prctl(PR_SET_KEEPCAPS)", _libc.prctl(8, 1, 0, 0, 0))
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    if keep_reading:
        read_search = 1 << 2  # CAP_DAC_READ_SEARCH
        header = struct.pack("Ii", 0x20080522, 0)
        data = struct.pack("6I", read_search, read_search, 0, 0, 0, 0)
        _call("capset", _libc.capset(header, data))


def no_new_privileges() -> None:
    """From here on no program that is started gains rights by a set-user-id bit."""
    _call("prctl(PR_SET_NO_NEW_PRIVS)", _libc.prctl(38, 1, 0, 0, 0))


def _numbers(table: str, column: int) -> dict[str, int]:
    entries = [entry.split() for entry in table.split(";")]
    return {name: int(both[column]) for name, *both in entries if both[column] != "-"}


def _step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)


def _rule(
    number: int,
    argument: int = 0,
    values: Iterable[int] | None = None,
    *,
    mask: int = 0,
    error: int = _ENOSYS,
) -> bytes:
    """Steps that allow call `number`; with `values`, only where its argument (masked) is one.

    The accumulator holds the call's number before and, if it was another call, after. Only the
    low half of an argument is read: those compared here are 32 bits wide in the kernel, and the
    high half of clone's flags means nothing to it.
    """
    if values is None:
        body = [_step(_RETURN, _ALLOW)]
    else:
        body = [_step(_LOAD, _ARGUMENTS + 8 * argument)]
        body += [_step(_AND, mask)] if mask else []
        for value in values:
            body += [_step(_JUMP_EQUAL, value, 0, 1), _step(_RETURN, _ALLOW)]
        body += [_step(_RETURN, _ERRNO | error)]
    return b"".join([_step(_JUMP_EQUAL, number, 0, len(body)), *body])


def _call(name: str, result: int) -> int:
    if result < 0:
        raise LockdownError(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result
