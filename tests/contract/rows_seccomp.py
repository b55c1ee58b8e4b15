"""Seccomp profiles: actions, values, conditions, flags, architectures."""

from .case import Case, Row
from .rows_process import status


def _rule(names, action, errno=None, *args):
    rule = {"names": names, "action": f"SCMP_ACT_{action}", "args": [dict(zip(("index", "value", "valueTwo", "op"), one)) for one in args]}
    return {**rule, **({} if errno is None else {"errnoRet": errno})}


def _rules(spec):
    spec["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"], "syscalls": [
            _rule(["mkdir", "mkdirat"], "ERRNO"), _rule(["rmdir"], "ERRNO", 38), _rule(["symlink", "symlinkat"], "ERRNO", 0),
            _rule(["sethostname"], "KILL"), _rule(["swapoff"], "KILL_PROCESS"), _rule(["swapon"], "KILL_THREAD"), _rule(["sync"], "TRAP"),
            _rule(["mknod", "mknodat"], "TRACE", 5), _rule(["reboot"], "LOG"), _rule(["no_such_call", "chroot"], "ERRNO", 13),
            _rule(["personality"], "ERRNO", 22, (0, 8, 0, "SCMP_CMP_EQ")),
            _rule(["kill"], "ERRNO", 2, (1, 10, 0, "SCMP_CMP_GE"), (1, 12, 0, "SCMP_CMP_LE")),
            _rule(["umask"], "ERRNO", 7, (0, 0o700, 0o700, "SCMP_CMP_MASKED_EQ")),
            _rule(["setpriority"], "ERRNO", 17, (2, 5, 0, "SCMP_CMP_GT")),
            _rule(["chmod", "fchmodat"], "ERRNO", 28, (1, 0o777, 0, "SCMP_CMP_NE"), (2, 0o777, 0, "SCMP_CMP_NE"))]}
    spec["process"]["capabilities"] = {which: ["CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_CHROOT", "CAP_MKNOD"] for which in
                                       ("bounding", "effective", "permitted")}
    spec["process"]["noNewPrivileges"] = False


RULES = [
    status("seccomp mode", "Seccomp"), status("number of filters", "Seccomp_filters"), Row("errno, default", "mkdir /tmp/x"), Row("errno 38", "rmdir /tmp"),
    Row("errno 0", "ln -s a /tmp/link; ls /tmp"), Row("kill", "hostname x"), Row("kill process", "swapoff /tmp"), Row("kill thread", "swapon /tmp"),
    Row("trap", "sync"), Row("trace without a tracer", "mknod /tmp/fifo p"), Row("names that are not known are left out", "chroot / true"),
    Row("condition equal", "setarch linux32 uname -m"), Row("condition not met", "setarch linux64 uname -m"),
    Row("conditions on one argument: any", "kill -10 $$ ; kill -0 $$ && echo allowed"), Row("condition masked", "umask 077 && echo yes; umask 707 && echo set"),
    Row("condition greater", "nice -n 5 true && echo allowed; nice -n 6 true"), Row("condition not equal", "touch /tmp/f; chmod 600 /tmp/f; chmod 777 /tmp/f; ls -l /tmp/f | cut -c1-10"),
    Row("filters are inherited", "sh -c 'rmdir /tmp'")]


def _allow_list(spec):
    calls = """access arch_prctl brk clone clone3 close dup dup2 dup3 execve exit exit_group faccessat faccessat2 fchdir fcntl fstat fstatfs futex getcwd
        getdents64 getegid geteuid getgid getpgrp getpid getppid getrandom getuid ioctl lseek lstat mmap mprotect mremap munmap newfstatat open openat
        pipe pipe2 poll pread64 prlimit64 read readlink readlinkat readv rseq rt_sigaction rt_sigprocmask rt_sigreturn set_robust_list set_tid_address
        setgid setgroups setuid sigaltstack stat statfs statx sysinfo uname vfork wait4 waitid write writev capget capset chdir prctl sendfile sendfile64
        setsid setresgid setresuid close_range copy_file_range""".split()
    spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 95, "architectures": ["SCMP_ARCH_X86_64"],
                                "syscalls": [_rule(calls, "ALLOW")]}


CASES = [
    Case("seccomp rules", _rules, RULES),
    Case("seccomp in exec", _rules, [Row(f"exec: {row.name}", row.command, row.form) for row in RULES[:4]], "exec"),
    Case("seccomp allow list", _allow_list, [
        Row("default errno", "mkdir /tmp/x; ln -s a /tmp/b; sync; echo $?"), Row("allowed calls", "cat /etc/hostname /etc/passwd"),
        status("seccomp with no_new_privs", "Seccomp", "NoNewPrivs")]),
]
