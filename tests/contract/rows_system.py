"""What a process sees of its machine: /dev, /proc, namespaces, cgroup, names, parameters, terminals."""

from .base import KINDS, mount
from .case import Case, Row
from .forms import listing, mountinfo, streams, terminal, words
from .rows_process import CREDENTIALS, plain


def _devices(spec):
    spec["linux"]["devices"] = [
        {"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 1000, "gid": 100},
        {"path": "/dev/sub/null", "type": "c", "major": 1, "minor": 3}, {"path": "/dev/fifo", "type": "p", "fileMode": 0o600},
        {"path": "/elsewhere", "type": "u", "major": 1, "minor": 8, "fileMode": 0o444},
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666}]
    spec["linux"]["resources"]["devices"] += [{"allow": True, "type": "c", "major": 1, "minor": 5, "access": "rw"},
                                              {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "r"}]
    spec["process"]["capabilities"] = {which: ["CAP_MKNOD", "CAP_DAC_OVERRIDE"] for which in ("bounding", "effective", "permitted")}


DEVICES = Case("devices", _devices, [
    Row("/dev", "ls -ln /dev", listing), Row("given devices", "ls -ln /dev/mine /dev/sub/null /elsewhere", listing),
    Row("given fifo", "stat -c '%F %a %u %g' /dev/fifo"), Row("links of /dev", "for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done"),
    Row("use of the usual", "head -c 3 /dev/zero | wc -c; echo x > /dev/null; head -c 3 /dev/urandom | wc -c; echo x > /dev/full"),
    Row("use of a given device", "head -c 2 /dev/mine | wc -c; head -c 2 /elsewhere | wc -c"), Row("a device without its right", ": <> /dev/fuse"),
    Row("mknod of a forbidden device", "mknod /tmp/kmsg c 1 11 && cat /tmp/kmsg"), Row("mknod of a block device", "mknod /tmp/disk b 8 0 && cat /tmp/disk"),
    Row("mknod of an allowed one", "mknod /tmp/zero c 1 5 && head -c 1 /tmp/zero | wc -c"),
    Row("/dev/shm", "stat -f -c '%T' /dev/shm; stat -c '%a %u %g' /dev/shm; df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2"),
    Row("/dev/pts", "ls /dev/pts; stat -c '%a %t:%T' /dev/pts/ptmx"), Row("/dev/mqueue", "stat -c '%a %u %g' /dev/mqueue; ls /dev/mqueue"),
])

BASE = Case("machine", plain, [
    Row("every mount", "cat /proc/self/mountinfo", mountinfo), Row("hostname", "hostname; cat /proc/sys/kernel/hostname"),
    # "exe" is runc itself, until it has become the process of an exec.
    Row("cgroup", "cat /proc/self/cgroup"), Row("processes", "ps -o comm | grep -vE 'ps|grep|sort|^exe$' | sort -u"),
    Row("network", "ip -o link | cut -d' ' -f2,3 | cut -d, -f1,2; ip -4 -o addr | tr -s ' ' | cut -d' ' -f2-4"),
    Row("/proc/sys is read-only", "echo x > /proc/sys/kernel/hostname; echo 1 > /proc/sys/net/ipv4/ip_forward; echo b > /proc/sysrq-trigger"),
    Row("secrets of /proc are hidden", "wc -c < /proc/keys; wc -c < /proc/timer_list; test -s /proc/kcore || echo hidden or not there"),
    Row("/sys is read-only", "echo x > /sys/kernel/notes; mkdir /sys/fs/x"),
    Row("/sys/firmware is hidden", "ls /sys/firmware"), Row("cgroup is read-only", "mkdir /sys/fs/cgroup/x; echo 1 > /sys/fs/cgroup/pids.max"),
    Row("/proc/1", "readlink /proc/1/cwd /proc/1/root /proc/1/exe"), Row("keyring", "cut -d: -f2 /proc/self/sessionid; cat /proc/self/loginuid"),
    Row("the root", "ls -lnd /; stat -c %i / > /dev/null; ls /", listing),
])


def _hosts(*kinds):
    def change(spec):
        spec["linux"]["namespaces"] = [{"type": kind} for kind in KINDS if kind not in kinds]
    return change


NAMESPACES = [
    Case("no cgroup namespace", _hosts("cgroup"), [Row("without a cgroup namespace", "cut -d: -f1,2 /proc/self/cgroup; wc -c < /proc/self/cgroup > /dev/null")]),
]


def _sysctls(spec):
    spec["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1", "net.core.somaxconn": "99", "kernel.shm_rmid_forced": "1", "kernel.msgmax": "4096",
                               "fs.mqueue.msg_max": "20", "net/ipv4/conf/lo/rp_filter": "1", "kernel.domainname": "nis.example"}
    spec["hostname"] = "another.name"
    spec["linux"]["readonlyPaths"] = []


SYSCTLS = Case("parameters", _sysctls, [
    *[Row(f"sysctl {name}", f"cat /proc/sys/{name.replace('.', '/')}") for name in (
        "net.ipv4.ip_forward", "net.core.somaxconn", "kernel.shm_rmid_forced", "kernel.msgmax", "fs.mqueue.msg_max", "net.ipv4.conf.lo.rp_filter",
        "kernel.domainname")],
    Row("hostname with a dot", "hostname"),
    Row("namespaces of its own", "echo 7 > /proc/sys/net/ipv4/ip_forward; cat /proc/sys/net/ipv4/ip_forward; hostname changed; hostname"),
])


def _cgroup(spec):
    spec["linux"]["resources"].update({
        "memory": {"limit": 64 << 20, "reservation": 32 << 20}, "cpu": {"shares": 512, "quota": 50000, "period": 100000}, "pids": {"limit": 50},
        "unified": {"memory.high": str(48 << 20), "cpu.max.burst": "1000"}})


CGROUP = Case("cgroup", _cgroup, [
    *[Row(name, f"cat /sys/fs/cgroup/{name}") for name in (
        "memory.max", "memory.low", "memory.high", "cpu.max", "cpu.weight", "cpu.max.burst", "pids.max", "cgroup.type", "cgroup.freeze",
        "memory.oom.group", "memory.min", "cgroup.max.depth", "cgroup.subtree_control")],
    Row("own processes", "grep -c . /sys/fs/cgroup/cgroup.procs | grep -E '^[1-9]$' > /dev/null && echo few"),
    Row("more processes than allowed", "(i=0; while [ $i -lt 60 ]; do sleep 100 > /dev/null 2>&1 & i=$((i+1)); done) 2>&1 | grep -o \"can't fork.*\" | head -1"),
])


def _unlimited(spec):
    spec["linux"]["resources"].update({"memory": {"limit": -1, "swap": -1}, "cpu": {"shares": 2, "quota": -1}, "pids": {"limit": -1}})
    spec["mounts"] = [one for one in spec["mounts"] if one["destination"] != "/sys/fs/cgroup"]
    spec["mounts"].append(mount("/sys/fs/cgroup", "cgroup", None, "rw"))


UNLIMITED = Case("cgroup without limits", _unlimited, [
    *[Row(f"unlimited {name}", f"cat /sys/fs/cgroup/{name}") for name in ("memory.max", "cpu.max", "cpu.weight", "pids.max")],
    Row("a cgroup within", "mkdir /sys/fs/cgroup/x && cat /sys/fs/cgroup/x/cgroup.procs && rmdir /sys/fs/cgroup/x && echo made")])


def _terminal(spec):
    spec["process"]["terminal"] = True
    spec["process"]["consoleSize"] = {"height": 33, "width": 101}


TERMINAL = [
    Row("tty", "tty"), Row("controlling terminal", "test $(cut -d' ' -f7 /proc/$$/stat) -ne 0 && echo some"),
    Row("/dev/console", "ls -ln /dev/console /dev/pts", listing), Row("streams on a terminal", "ls -l /proc/$$/fd", streams),
    Row("settings", "stty -a | sed -n '2,$p'", terminal), Row("/dev/tty", "echo seen > /dev/tty")]

CASES = [
    BASE, DEVICES, *NAMESPACES, SYSCTLS, CGROUP, UNLIMITED,
    Case("terminal", _terminal, [*TERMINAL, Row("terminal's mounts", "grep /dev/console /proc/self/mountinfo", mountinfo)], "terminal"),
    Case("exec on a terminal", plain, [Row(f"exec: {row.name}", row.command, row.form) for row in TERMINAL], "exec terminal"),
    Case("single", plain, [Row(f"single: {row.name}", row.command, row.form) for row in [*BASE.rows, *CREDENTIALS]], "single"),
]
