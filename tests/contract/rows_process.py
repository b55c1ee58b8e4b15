"""What a process is given: users, capabilities, limits, environment, directory, descriptors, signals; and the same in an exec."""

from .base import CAPABILITIES
from .case import Case, Row
from .forms import streams, words

STATUS = "grep -E '^({})' /proc/self/status"


def status(name, *fields):
    """Lines of /proc/self/status."""
    return Row(name, STATUS.format("|".join(f"{field}:" for field in fields)), words)


CREDENTIALS = [status("uids", "Uid"), status("gids", "Gid"), status("groups", "Groups"), status("bounding set", "CapBnd"),
               status("effective set", "CapEff"), status("permitted set", "CapPrm"), status("inheritable set", "CapInh"),
               status("ambient set", "CapAmb")]


def plain(_spec):
    """No change."""


BASE = [
    *CREDENTIALS, status("no_new_privs", "NoNewPrivs"), status("no seccomp", "Seccomp"), status("signals blocked", "SigBlk"),
    status("signals ignored", "SigIgn"), status("umask", "Umask"), status("group and session", "NSpgid", "NSsid"),
    Row("environment", "env | sort | grep -v ^_="), Row("directory", "pwd"), Row("id", "id"), Row("limit of open files", "ulimit -n; ulimit -Hn"),
    Row("open descriptors", "ls -l /proc/$$/fd", streams), Row("first process", "cat /proc/1/comm; tr '\\0' ' ' < /proc/1/cmdline | cut -d' ' -f1,2"),
    Row("oom_score_adj", "cat /proc/self/oom_score_adj"), Row("personality", "uname -m; cat /proc/self/personality"),
    Row("no terminal", "cut -d' ' -f7 /proc/self/stat; cat < /dev/tty"), Row("coredump filter", "cat /proc/self/coredump_filter"),
    Row("nice and policy", "cut -d' ' -f19,40,41 /proc/self/stat"), Row("timer slack", "cat /proc/self/timerslack_ns")]


def _capabilities(name, sets, **process):
    def change(spec):
        spec["process"]["capabilities"] = {which: [f"CAP_{one}" for one in ones] for which, ones in sets.items()}
        spec["process"].update(process)
    return Case(name, change, [Row(f"{name}: {row.name}", row.command, row.form) for row in CREDENTIALS[3:]])


WORKER = {"user": {"uid": 1000, "gid": 1000}}
ALL = CAPABILITIES + ["CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SYS_PTRACE", "CAP_SYS_TIME", "CAP_BPF", "CAP_PERFMON", "CAP_CHECKPOINT_RESTORE"]


def _user(spec):
    spec["process"]["user"] = {"uid": 1000, "gid": 100, "additionalGids": [5, 2000, 100], "umask": 0o77}
    spec["process"]["cwd"] = "/home/user"
    spec["process"]["capabilities"] = {which: ["CAP_CHOWN", "CAP_NET_RAW"] for which in ("bounding", "effective", "permitted")}


USER = [*CREDENTIALS, Row("umask of a user", "umask; touch /home/user/x; stat -c '%a %u %g' /home/user/x"), Row("id of a user", "id"),
        Row("HOME of a user", "echo $HOME"), Row("a user's directory", "pwd"), Row("a user's files", "cat /etc/shadow; touch /etc/x"),
        Row("a user's streams", "echo here > /dev/stdout; echo there > /dev/stderr")]

RLIMITS = {"CPU": 1000, "FSIZE": 1 << 20, "DATA": 1 << 30, "STACK": 4 << 20, "CORE": 0, "RSS": 1 << 30, "NPROC": 512, "NOFILE": 500,
           "MEMLOCK": 65536, "AS": 1 << 32, "LOCKS": 100, "SIGPENDING": 64, "MSGQUEUE": 4096, "NICE": 5, "RTPRIO": 3, "RTTIME": 1000000}
LINES = {"CPU": "cpu time", "FSIZE": "file size", "DATA": "data size", "STACK": "stack size", "CORE": "core file size", "RSS": "resident set",
         "NPROC": "processes", "NOFILE": "open files", "MEMLOCK": "locked memory", "AS": "address space", "LOCKS": "file locks",
         "SIGPENDING": "pending signals", "MSGQUEUE": "msgqueue size", "NICE": "nice priority", "RTPRIO": "realtime priority",
         "RTTIME": "realtime timeout"}


def _rlimits(spec):
    spec["process"]["rlimits"] = [{"type": f"RLIMIT_{kind}", "soft": soft, "hard": soft * 2} for kind, soft in RLIMITS.items()]


def _unlimited(spec):
    spec["process"]["rlimits"] = [{"type": "RLIMIT_MEMLOCK", "soft": 2 ** 64 - 1, "hard": 2 ** 64 - 1},
                                  {"type": "RLIMIT_NOFILE", "soft": 1048576, "hard": 1048576}]
    spec["process"]["noNewPrivileges"] = False
    spec["process"]["oomScoreAdj"] = 500
    spec["process"]["cwd"] = "/made/by/the/runtime"
    spec["process"]["env"] += ["EMPTY=", "TWICE=first", "TWICE=second", "WITH=an = and spaces", "HOME=/elsewhere", "ä=ö"]
    spec["process"]["args"] = ["sh", "-c", "SCRIPT", "name", "", "two words", "*$'\"\\\n"]


def _scheduled(spec):
    spec["process"]["ioPriority"] = {"class": "IOPRIO_CLASS_BE", "priority": 6}
    spec["process"]["scheduler"] = {"policy": "SCHED_BATCH", "nice": 7}
    spec["linux"]["personality"] = {"domain": "LINUX32"}
    spec["domainname"] = "nis.example"


# containerd 1.6 does not know them either, and drops them from the spec.
OLD_RUNC = "runc 1.1 does not know it (1.2 does): it leaves out what the OCI spec asks for"
SCHEDULED = [
    Row("ioPriority", "ionice", str, "none: prio [04]", "best-effort: prio 6|none: prio [04]", OLD_RUNC),
    Row("scheduler", "cut -d' ' -f19,41 /proc/self/stat", str, "0 0", "7 3|0 0", OLD_RUNC),
    Row("personality LINUX32", "uname -m", str, "x86_64", "i686", OLD_RUNC),
    Row("domainname", "cat /proc/sys/kernel/domainname", str, r"\(none\)", "nis.example", OLD_RUNC)]

CASES = [
    Case("base", plain, BASE),
    _capabilities("no capabilities", {}),
    _capabilities("all capabilities", {which: [one[4:] for one in ALL] for which in ("bounding", "effective", "permitted", "inheritable", "ambient")}),
    _capabilities("bounding only", {"bounding": ["KILL", "CHOWN"]}),
    _capabilities("permitted not effective", {"bounding": ["KILL", "CHOWN"], "permitted": ["KILL", "CHOWN"], "effective": ["KILL"]}),
    _capabilities("inheritable", {"bounding": ["KILL"], "permitted": ["KILL"], "effective": ["KILL"], "inheritable": ["KILL"]}),
    _capabilities("ambient of a user", {which: ["NET_BIND_SERVICE"] for which in ("bounding", "effective", "permitted", "inheritable", "ambient")}, **WORKER),
    _capabilities("effective of a user", {which: ["NET_BIND_SERVICE"] for which in ("bounding", "effective", "permitted")}, **WORKER),
    Case("user", _user, [Row(f"user: {row.name}", row.command, row.form) for row in USER]),
    Case("rlimits", _rlimits, [Row(f"RLIMIT_{kind}", f"grep -i '{LINES[kind]}' /proc/self/limits", words) for kind in RLIMITS]),
    Case("limits and environment", _unlimited, [
        Row("unlimited", "grep -iE 'locked memory|open files' /proc/self/limits", words), status("new privileges are possible", "NoNewPrivs"),
        Row("oom_score_adj given", "cat /proc/self/oom_score_adj"), Row("a directory that is made", "pwd; stat -c '%a %u %g' /made /made/by/the/runtime"),
        Row("environment as given", "tr '\\0' '\\n' < /proc/1/environ"), Row("arguments as given", "tr '\\0' '|' < /proc/1/cmdline | sed 's/.*name|/name|/'")]),
    Case("scheduling", _scheduled, SCHEDULED),
    Case("exec", _user, [
        Row("exec: umask", "umask", str, "0022", "0077", "runc forgets the spec's umask in an exec"),
        *[Row(f"exec: {row.name}", row.command, row.form) for row in [
            *[row for row in USER if row.name != "umask of a user"], *BASE[8:12], *[row for row in BASE if row.name in ("environment", "limit of open files", "open descriptors", "oom_score_adj", "no terminal")],
            Row("cgroup", "cat /proc/self/cgroup")]]], "exec"),
]
