"""What a sandboxed process does to itself before it runs foreign code: resource limits, Landlock, seccomp.

Runs inside the child (its code is sent there by `sandbox`), so it imports only the standard library. Everything here is
irrevocable for the process: Landlock and seccomp need no privileges, and no later code can take them off.
"""

import ctypes
import os
import platform
import resource
import struct
import sys

# System calls that fail with EPERM, as name x86_64/aarch64 ("-": not there): what Landlock does not cover of files
# (chmod, chown, times, attributes), every way to reach another process, the network, kernel state, memory that
# RLIMIT_AS does not count, and asynchronous interfaces that would go round this filter.
_DENIED = """
socket 41/198 connect 42/203 bind 49/200 listen 50/201 accept 43/202 accept4 288/242
fork 57/- vfork 58/- execve 59/221 execveat 322/281 setsid 112/157 setpgid 109/154 ptrace 101/117
process_vm_readv 310/270 process_vm_writev 311/271 kcmp 312/272 process_madvise 440/440 process_mrelease 448/448
pidfd_open 434/434 pidfd_getfd 438/438 pidfd_send_signal 424/424 tkill 200/130 rt_sigqueueinfo 129/138
rt_tgsigqueueinfo 297/240 setpriority 141/140 ioprio_set 251/30 sched_setaffinity 203/122 sched_setscheduler 144/119
sched_setparam 142/118 sched_setattr 314/274 migrate_pages 256/238 move_pages 279/239 mlock 149/228 mlock2 325/284
mlockall 151/230 memfd_create 319/279 memfd_secret 447/447 shmget 29/194 shmat 30/196 shmctl 31/195 shmdt 67/197
msgget 68/186 msgsnd 69/189 msgrcv 70/188 msgctl 71/187 semget 64/190 semop 65/193 semtimedop 220/192 semctl 66/191
mq_open 240/180 mq_unlink 241/181 mq_timedsend 242/182 mq_timedreceive 243/183 mq_notify 244/184 mq_getsetattr 245/185
chmod 90/- fchmod 91/52 fchmodat 268/53 fchmodat2 452/452 chown 92/- fchown 93/55 lchown 94/- fchownat 260/54
setxattr 188/5 lsetxattr 189/6 fsetxattr 190/7 removexattr 197/14 lremovexattr 198/15 fremovexattr 199/16 utime 132/-
utimes 235/- futimesat 261/- utimensat 280/88 mknod 133/- mknodat 259/33 setuid 105/146 setgid 106/144 setreuid 113/145
setregid 114/143 setresuid 117/147 setresgid 119/149 setfsuid 122/151 setfsgid 123/152 setgroups 116/159 capset 126/91
personality 135/92 mount 165/40 umount2 166/39 pivot_root 155/41 chroot 161/51 open_tree 428/428 move_mount 429/429
fsopen 430/430 fsconfig 431/431 fsmount 432/432 fspick 433/433 mount_setattr 442/442 statmount 457/457 listmount 458/458
unshare 272/97 setns 308/268 name_to_handle_at 303/264 open_by_handle_at 304/265 io_uring_setup 425/425
io_uring_enter 426/426 io_uring_register 427/427 io_setup 206/0 io_submit 209/2 bpf 321/280 perf_event_open 298/241
userfaultfd 323/282 keyctl 250/219 add_key 248/217 request_key 249/218 splice 275/76 tee 276/77 vmsplice 278/75
fanotify_init 300/262 fanotify_mark 301/263 quotactl 179/60 quotactl_fd 443/443 acct 163/89 swapon 167/224
swapoff 168/225 reboot 169/142 kexec_load 246/104 kexec_file_load 320/294 init_module 175/105 finit_module 313/273
delete_module 176/106 syslog 103/116 iopl 172/- ioperm 173/- modify_ldt 154/- settimeofday 164/170
clock_settime 227/112 adjtimex 159/171 clock_adjtime 305/266 sethostname 170/161 setdomainname 171/162 vhangup 153/58
"""
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH constant
_NEWEST_KNOWN = 462  # later system calls do not exist as far as the process can tell

_LOAD, _EQUAL, _ABOVE, _MASK, _RETURN = 0x20, 0x15, 0x25, 0x54, 0x06  # classic BPF: ld abs, jeq, jgt, and, ret
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOTTY, _ENOSYS = 1, 25, 38


def supported() -> bool:
    """Whether this machine's system-call table is known here, so that `confine` can install a filter."""
    return sys.platform == "linux" and platform.machine() in _ARCHITECTURES


def filter_program(machine: str, pid: int) -> list[tuple[int, int, int, int]]:
    """The seccomp filter for the process `pid` as (code, jump if true, jump if false, constant)."""
    column, architecture = _ARCHITECTURES[machine]
    words = _DENIED.split()
    denied = [numbers.split("/")[column] for numbers in words[1::2]]

    def number(x86_64: int, aarch64: int) -> int:
        return (x86_64, aarch64)[column]

    def when(call: int, *body: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
        return [(_EQUAL, 0, len(body), call), *body]

    def only(call: int, argument: int, allowed: tuple[int, ...], error: int, mask: int | None = None) -> list:
        """`call` fails with `error` unless its argument (low 32 bits, `mask`ed) is one of `allowed`."""
        masked = [(_MASK, 0, 0, mask)] if mask is not None else []
        hits = [(_EQUAL, len(allowed) - i, 0, value) for i, value in enumerate(allowed)]
        refuse, again = (_RETURN, 0, 0, _ERRNO | error), (_LOAD, 0, 0, 0)
        return when(call, (_LOAD, 0, 0, 16 + 8 * argument), *masked, *hits, refuse, again)

    def never(call: int, argument: int, refused: tuple[int, ...]) -> list:
        """`call` fails with EPERM if its argument is one of `refused`."""
        hits = [(_EQUAL, len(refused) - 1 - i, int(i == len(refused) - 1), value) for i, value in enumerate(refused)]
        return when(call, (_LOAD, 0, 0, 16 + 8 * argument), *hits, (_RETURN, 0, 0, _ERRNO | _EPERM), (_LOAD, 0, 0, 0))

    clone_thread, type_mask, unix, stream = 0x10000, 0xF, 1, 1
    f_setown, f_setsig, f_setown_ex = 8, 10, 15  # they make the kernel send signals to other processes
    fionclex, fioclex, fionread, fionbio, tcgets, tiocgwinsz = 0x5450, 0x5451, 0x541B, 0x5421, 0x5401, 0x5413
    set_name, get_name, set_vma = 15, 16, 0x53564D41
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += [(_ABOVE, 0, 1, _NEWEST_KNOWN), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]  # x32 calls are above it, too
    program += when(435, (_RETURN, 0, 0, _ERRNO | _ENOSYS))  # clone3: libc falls back to clone, whose flags we see
    program += only(number(56, 220), 0, (clone_thread,), _EPERM, mask=clone_thread)  # threads yes, processes no
    program += only(number(62, 129), 0, (pid,), _EPERM)  # kill
    program += only(number(234, 131), 0, (pid,), _EPERM)  # tgkill
    program += only(number(302, 261), 0, (0, pid), _EPERM)  # prlimit64
    program += only(number(53, 199), 0, (unix,), _EPERM)  # socketpair: asyncio needs one
    program += only(number(53, 199), 1, (stream,), _EPERM, mask=type_mask)
    program += never(number(72, 25), 1, (f_setown, f_setsig, f_setown_ex))  # fcntl
    program += only(number(16, 29), 1, (fionclex, fioclex, fionread, fionbio, tcgets, tiocgwinsz), _ENOTTY)  # ioctl
    program += only(number(157, 167), 0, (set_name, get_name, set_vma), _EPERM)  # prctl
    for call in denied:
        if call != "-":
            program += when(int(call), (_RETURN, 0, 0, _ERRNO | _EPERM))
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    version_3 = 0x20080522
    header, data = struct.pack("Ii", version_3, 0), struct.pack("6I", *[0] * 6)
    _check(libc.capset(header, data), "capset")


def _landlock(libc: ctypes.CDLL, readable: list[str], writable: list[str], devices: list[str]) -> None:
    """Files: read and execute below `readable`, everything below `writable`, read and write `devices`; no others."""
    create, add, restrict, version_flag, beneath = 444, 445, 446, 1, 1
    abi = _check(libc.syscall(create, None, ctypes.c_size_t(0), version_flag), "Landlock is not there")
    execute, write_file, read_file, read_dir, truncate = 1, 1 << 1, 1 << 2, 1 << 3, 1 << 14
    everything = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1  # REFER, TRUNCATE, IOCTL_DEV came one by one
    attributes = struct.pack(
        "QQQ", everything, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0
    )  # TCP; sockets, signals
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    rules = _check(libc.syscall(create, attributes, ctypes.c_size_t(size), 0), "landlock_create_ruleset")
    grants = ((readable, execute | read_file | read_dir), (writable, everything), (devices, read_file | write_file))
    for path, access in ((path, access) for paths, access in grants for path in paths):
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        of_files = everything if os.path.isdir(path) else execute | write_file | read_file | truncate
        rule = struct.pack("=Qi", access & of_files & everything, fd)
        _check(libc.syscall(add, rules, beneath, rule, 0), f"landlock_add_rule {path}")
        os.close(fd)
    _check(libc.syscall(restrict, rules, 0), "landlock_restrict_self")
    os.close(rules)


def _seccomp(libc: ctypes.CDLL) -> None:
    set_seccomp, mode_filter = 22, 2
    instructions = filter_program(platform.machine(), os.getpid())
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in instructions))
    program = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(code))
    _check(libc.prctl(set_seccomp, mode_filter, program, 0, 0), "seccomp")


def confine(spec: dict) -> None:
    """Applies `spec`: cpu_seconds, memory_bytes, file_bytes, open_files; isolation ("bwrap", "landlock",
    "limits"); readable, writable and devices (paths, for Landlock).

    Raises `OSError` where a layer cannot be applied: then nothing foreign may run.
    """
    limits = (
        (resource.RLIMIT_CPU, spec["cpu_seconds"], spec["cpu_seconds"] + 1),
        (resource.RLIMIT_AS, spec["memory_bytes"], spec["memory_bytes"]),
        (resource.RLIMIT_FSIZE, spec["file_bytes"], spec["file_bytes"]),
        (resource.RLIMIT_NOFILE, spec["open_files"], spec["open_files"]),
        (resource.RLIMIT_CORE, 0, 0),
    )
    for which, soft, hard in limits:
        ceiling = resource.getrlimit(which)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(which, (soft, hard))
    if spec["isolation"] == "limits":
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        return
    libc = ctypes.CDLL(None, use_errno=True)
    set_pdeathsig, set_no_new_privs, sigkill = 1, 38, 9
    _check(libc.prctl(set_pdeathsig, sigkill, 0, 0, 0), "prctl")
    _check(libc.prctl(set_no_new_privs, 1, 0, 0, 0), "no_new_privs")
    _drop_capabilities(libc)
    if spec["isolation"] == "landlock":  # under bubblewrap there is nothing else to see
        _landlock(libc, spec["readable"], spec["writable"], spec["devices"])
    _seccomp(libc)
