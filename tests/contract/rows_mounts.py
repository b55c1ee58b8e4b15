"""Mounts of every kind and option, masked and read-only paths, the root's own flags."""

from .base import bind, mount
from .case import Case, Row
from .forms import bound, listing, mountinfo


def at(name, *paths, form=mountinfo, **options):
    """The mounts at these paths."""
    return Row(name, f"grep -E ' ({'|'.join(paths)}) ' /proc/self/mountinfo", form, **options)


ONE = "the guest sees a volume and what the host has mounted in it as one file system (shim/docs/volumes.md)"


def _file_systems(spec):
    spec["mounts"] += [
        mount("/m/plain", "tmpfs"), mount("/m/ro", "tmpfs", None, "ro"), mount("/m/nosuid", "tmpfs", None, "nosuid"),
        mount("/m/nodev", "tmpfs", None, "nodev"), mount("/m/noexec", "tmpfs", None, "noexec"), mount("/m/noatime", "tmpfs", None, "noatime"),
        mount("/m/strictatime", "tmpfs", None, "strictatime"), mount("/m/relatime", "tmpfs", None, "relatime"),
        mount("/m/nodiratime", "tmpfs", None, "nodiratime"), mount("/m/last", "tmpfs", None, "nosuid", "noexec", "ro", "suid", "exec", "rw"),
        mount("/m/size", "tmpfs", None, "size=64k", "mode=1770", "uid=1000", "gid=100"), mount("/m/inodes", "tmpfs", None, "nr_inodes=10"),
        mount("/m/source", "tmpfs", "my source"), mount("/m/sync", "tmpfs", None, "sync", "dirsync"),
        mount("/etc", "tmpfs", None, "tmpcopyup"), mount("/home", "tmpfs", None, "tmpcopyup", "ro"),
        mount("/m/private", "tmpfs", None, "private"), mount("/m/shared", "tmpfs", None, "shared"), mount("/m/slave", "tmpfs", None, "rslave"),
        mount("/m/unbindable", "tmpfs", None, "unbindable"),
        mount("/m/over", "tmpfs", "first"), mount("/m/over", "tmpfs", "second"), mount("/m/over/in", "tmpfs", "third"),
        mount("/m/proc", "proc", None, "ro", "hidepid=2"), mount("/m/sys", "sysfs", None, "ro"), mount("/m/cgroup", "cgroup"),
        mount("/m/cgroup2", "cgroup2", None, "ro"), mount("/m/mqueue", "mqueue"), mount("/m/pts", "devpts", None, "newinstance", "mode=600"),
        mount("/m/../m/dots", "tmpfs"), mount("/links/inside/deep", "tmpfs"), mount("/links/up/deep", "tmpfs"), mount("m/relative", "tmpfs")]


FILE_SYSTEMS = Case("file systems", _file_systems, [
    at("tmpfs without options", "/m/plain"), at("tmpfs ro", "/m/ro"), at("tmpfs nosuid", "/m/nosuid"), at("tmpfs nodev", "/m/nodev"),
    at("tmpfs noexec", "/m/noexec"), at("tmpfs noatime", "/m/noatime"), at("tmpfs strictatime", "/m/strictatime"),
    at("tmpfs relatime", "/m/relatime"), at("tmpfs nodiratime", "/m/nodiratime"), at("the last option wins", "/m/last"),
    at("tmpfs size, mode, owner", "/m/size"), at("tmpfs nr_inodes", "/m/inodes"), at("tmpfs source", "/m/source"), at("tmpfs sync", "/m/sync"),
    at("mount private", "/m/private"),
    at("mount shared", "/m/shared"), at("mount rslave", "/m/slave"), at("mount unbindable", "/m/unbindable"),
    at("mounts on one another", "/m/over", "/m/over/in"), at("proc ro with hidepid", "/m/proc"), at("a second sysfs", "/m/sys"),
    at("cgroup, writable", "/m/cgroup"), at("cgroup2 by name", "/m/cgroup2"), at("a second mqueue", "/m/mqueue"), at("a second devpts", "/m/pts"),
    at("destination with ..", "/m/dots"), at("destination by a link", "/links/target/deep", "/target/deep"),
    at("destination without a slash", "/m/relative"), at("links that lead up end at the root", "/links/up/deep", "/target-up/deep"),
    Row("write to a read-only tmpfs", "touch /m/ro/x"),
    Row("run from noexec", "cp /bin/busybox /m/noexec/echo && /m/noexec/echo no"),
    Row("more than the size", "dd if=/dev/zero of=/m/size/x bs=1k count=65 2>&1 | grep -v copied; rm -f /m/size/x"),
    Row("more than the inodes", "for n in 1 2 3 4 5 6 7 8 9 10; do touch /m/inodes/$n || break; done"),
    Row("owner and mode of a tmpfs", "stat -c '%a %u %g' /m/plain  /m/size"),
    Row("tmpcopyup", "ls -ln /etc; cat /etc/passwd; touch /etc/x", listing),
    Row("tmpcopyup, read-only", "ls -ln /home; touch /home/x", listing),
    Row("made mount points", "stat -c '%n %a %u %g' /m /links/target /target-up"),
    Row("new cgroup in a writable mount", "mkdir /m/cgroup/x && rmdir /m/cgroup/x && echo made"),
])


def _binds(spec):
    spec["mounts"] += [
        bind("dir", "/b/dir"), bind("tree", "/b/rbind", "rbind"), bind("tree", "/b/ro", "rbind", "ro"), bind("tree", "/b/rro", "rbind", "rro"),
        bind("file", "/b/file"), bind("file", "/b/rofile", "ro"), bind("dir", "/b/noexec", "nosuid", "nodev", "noexec"),
        bind("dir", "/b/noatime", "noatime"), bind("tree", "/b/private", "rbind", "rprivate"), bind("tree", "/b/slave", "rbind", "rslave"),
        bind("file", "/etc/hostname"), bind("dir", "/links/inside"), bind("link", "/b/link"), {**bind("dir", "/b/none"), "type": "none"},
        {**bind("tree", "/b/typeless", "rbind"), "type": ""}, bind("file", "/b/new/deep/file"), bind("dir/run", "/b/run", "ro", "noexec")]


BINDS = Case("bind mounts", _binds, [
    at("bind", "/b/dir", form=bound), at("rbind brings what is below", "/b/rbind", "/b/rbind/below", form=bound, runc="/b/rbind rw,relatime\n/b/rbind/below rw,relatime",
       husk="/b/rbind rw,relatime", why=ONE),
    at("bind ro is of the mount alone", "/b/ro", "/b/ro/below", form=bound, runc="/b/ro ro,relatime\n/b/ro/below rw,relatime",
       husk="/b/ro rw,relatime", why=f"{ONE}, and shows ro only where it holds for all of it"),
    at("bind of a file", "/b/file", form=bound), at("bind of a file ro", "/b/rofile", form=bound),
    at("bind nosuid nodev noexec", "/b/noexec", form=bound), at("bind noatime", "/b/noatime", form=bound),
    at("bind rprivate", "/b/private", form=bound), at("bind onto a file", "/etc/hostname", form=bound),
    at("bind type none", "/b/none", form=bound), at("bind without type", "/b/typeless", form=bound),
    Row("bind without what is below", "ls /b/dir /b/dir/below"), Row("rbind with what is below", "cat /b/rbind/below/deep"),
    Row("write", "echo new > /b/dir/new && cat /b/none/new && rm /b/dir/new"), Row("write to ro", "touch /b/ro/x"),
    Row("write below ro", "touch /b/ro/below/x && rm /b/ro/below/x && echo written"), Row("write below rro", "touch /b/rro/below/x"),
    Row("write to rro", "touch /b/rro/x"), Row("write to a file", "echo text >> /b/file && tail -1 /b/file"),
    Row("write to a read-only file", "echo text >> /b/rofile"), Row("run from a bind", "/b/dir/run"), Row("run from a noexec bind", "/b/noexec/run"),
    Row("run a noexec file", "/b/run"), Row("bind through a link of the host", "ls /b/link"), Row("bind through a link of the image", "ls /target"),
    Row("made mount points of binds", "stat -c '%n %a %u %g' /b /b/new /b/new/deep"),
    Row("owner and mode of a bound file", "stat -c '%a %u %g' /b/rofile"),
])


def _hidden(spec):
    spec["mounts"].append(bind("dir", "/b"))
    spec["linux"]["maskedPaths"] = ["/etc/passwd", "/home", "/none/such", "/links/inside", "/b/inner", "/proc/self/environ"]
    spec["linux"]["readonlyPaths"] = ["/tmp", "/etc/group", "/none/such", "/dev/shm", "/b/below"]
    spec["root"]["readonly"] = True
    spec["mounts"].append(mount("/run", "tmpfs", None, "nosuid"))


HIDDEN = Case("masked and read-only", _hidden, [
    Row("masked file", "cat /etc/passwd; echo x > /etc/passwd; stat -c '%F %t:%T' /etc/passwd"), Row("masked directory", "ls -a /home; touch /home/x"),
    Row("masked through a link", "ls /target"), Row("masked in a volume", "cat /b/inner"), Row("masked and missing", "ls /none"),
    Row("masked in /proc", "wc -c < /proc/1/environ"),
    at("mounts that mask", "/etc/passwd", "/home"), Row("read-only directory", "touch /tmp/x"), Row("read-only file", "echo x >> /etc/group"),
    Row("read-only mount", "touch /dev/shm/x"), Row("read-only in a volume", "touch /b/below/x; touch /b/x && rm /b/x && echo written"),
    Row("read-only root", "touch /x; mkdir /y"), Row("a mount in a read-only root", "touch /run/x && echo written"),
    Row("/dev in a read-only root", "touch /dev/x && rm /dev/x && echo written"),
    Row("the root's mount", "awk '$5 == \"/\"' /proc/self/mountinfo", bound),
])


def _unmasked(spec):
    """What CRI's proc mount type Unmasked comes to."""
    spec["linux"].update(maskedPaths=[], readonlyPaths=[])


UNMASKED = Case("nothing masked", _unmasked, [
    Row("nothing covers /proc", "grep -c ' /proc/' /proc/self/mountinfo"), Row("what is usually masked", "head -c 1 /proc/timer_list | wc -c"),
    Row("/proc/sys is writable", "echo 777 > /proc/sys/kernel/msgmni && cat /proc/sys/kernel/msgmni"),
])


def _propagation(word):
    def change(spec):
        spec["linux"]["rootfsPropagation"] = word
        spec["mounts"].append(bind("dir", "/b", "rbind"))
    rows = [Row(f"{'no' if not word else word} rootfsPropagation: the root", "awk '$5 == \"/\"' /proc/self/mountinfo", bound)]
    return Case(f"rootfsPropagation {word}", change, rows)


CASES = [FILE_SYSTEMS, BINDS, HIDDEN, UNMASKED, *map(_propagation, ("", "private", "rslave", "shared", "unbindable"))]
