"""Volumes: what of the host's files a pod is given is what its containers see, and what can't be given is refused."""

import contextlib
import os
import pathlib
import shutil
import socket
import tempfile
import time

from harness.command import Failed, output, run
from harness.containerd import NAMESPACE, SOCKET, needs
from harness.crictl import crictl, pod

CTR = ["ctr", "-a", SOCKET, "-n", NAMESPACE]
# Python and what it needs, from the machine that runs the tests.
PYTHON = [{"host_path": os.path.realpath(f"/{name}"), "container_path": f"/{name}", "readonly": True} for name in ("usr", "lib", "lib64")]


@contextlib.contextmanager
def folder():
    """A folder of the host's."""
    with tempfile.TemporaryDirectory(dir="/run/husk-test") as path:
        yield pathlib.Path(path)


@contextlib.contextmanager
def mounted(*arguments):
    """mount(8) with these arguments, the last being the mount point; and a plain unmount, which fails while anybody holds a file in it."""
    run("mount", *arguments)
    try:
        yield pathlib.Path(arguments[-1])
    finally:
        run("umount", "-R", arguments[-1])


def bind(source, target, **options):
    """A mount as CRI has it."""
    return {"host_path": str(source), "container_path": target, **options}


def fails(container, *command):
    """What a command in the container that must fail says."""
    try:
        said = container.exec(*command)
    except Failed as error:
        return str(error)
    raise AssertionError(f"{command} did not fail and said {said!r}")


def refused(it, *words, **config):
    """A container with this configuration is refused with all of these words, and nothing of it is left."""
    box = it.create(["sleep", "1000"], **config)
    said = crictl("start", box.id, check=False)
    assert said.returncode, "it started"
    missing = [word for word in words if word not in said.stderr]
    assert not missing, f"no {missing} in: {said.stderr}"
    crictl("rm", box.id)


def ctr(name, *options, command):
    """What a container of its own prints."""
    return output(*CTR, "run", "--rm", "--runtime", "io.containerd.husk.v2", *options, "husk.test/busybox:1", name, *command)


def eventually(check, within=5):
    """Waits until check() is true; how long it took."""
    start = time.monotonic()
    while not check():
        assert time.monotonic() - start < within, f"not so after {within} s"
        time.sleep(0.01)
    return time.monotonic() - start


def test_propagation():
    """A mount made on the host below a HostToContainer volume appears in the running container at once and goes again; below a private one
    it does not. Bidirectional is refused."""
    with folder() as top, mounted("-t", "tmpfs", "tmpfs", top), pod() as it:
        run("mount", "--make-shared", top)
        late = top / "late"
        late.mkdir()
        box = it.start(["sleep", "1000"], mounts=[bind(top, "/slave", propagation=1), bind(top, "/private", propagation=0)])
        assert box.exec("ls", "/slave/late", "/private/late").split() == ["/private/late:", "/slave/late:"]
        with mounted("-t", "tmpfs", "tmpfs", late):
            (late / "file").write_text("late")
            assert box.exec("cat", "/slave/late/file") == "late"
            fails(box, "cat", "/private/late/file")
            box.exec("sh", "-c", "echo back > /slave/late/back")
            assert (late / "back").read_text() == "back\n"
        assert box.exec("ls", "/slave/late") == ""
        refused(it, "Bidirectional", "/both", mounts=[bind(top, "/both", propagation=2)])


def test_mounts_of_the_container_stay_its_own():
    """A mount made by a privileged container in a volume is seen by nobody else."""
    with folder() as top, pod(linux={"security_context": {"privileged": True}}) as it:
        (top / "below").mkdir()
        (top / "other").mkdir()
        (top / "other/file").write_text("")
        mounts = [bind(top, "/data", propagation=1)]
        box = it.start(["sleep", "1000"], mounts=mounts, linux={"security_context": {"privileged": True}})
        other = it.start(["sleep", "1000"], mounts=mounts)
        box.exec("mount", "-o", "bind", "/data/other", "/data/below")
        assert box.exec("ls", "/data/below") == "file"
        assert other.exec("ls", "/data/below") == ""
        assert not os.listdir(top / "below")


def test_read_only():
    """A read-only volume refuses writes and shows itself as read-only; a file system mounted in it stays writable, unless the volume is
    recursively read-only."""
    with folder() as top, mounted("-t", "tmpfs", "tmpfs", top), pod() as it:
        (top / "plain").mkdir()
        (top / "sub").mkdir()
        with mounted("-t", "tmpfs", "tmpfs", top / "sub"):
            box = it.start(["sleep", "1000"], mounts=[bind(top, "/data", readonly=True), bind(top / "plain", "/plain", readonly=True)])
            for place in ("/data/new", "/plain/new"):
                assert "Read-only file system" in fails(box, "touch", place), place
            assert "Read-only file system" in fails(box, "chmod", "700", "/plain")
            assert " ro," in box.exec("grep", " /plain ", "/proc/self/mountinfo")
            box.exec("touch", "/data/sub/new")
            assert (top / "sub/new").exists()
            rro = ["--mount", f"type=bind,src={top},dst=/data,options=rbind:rro"]
            said = ctr("rro", *rro, command=["sh", "-c", "touch /data/x; touch /data/sub/x; ls /data/sub"])
            assert said == "new", said


def write_payload(volume, number, content):
    """What the kubelet's atomic writer does with a ConfigMap's volume (pkg/volume/util/atomic_writer.go): a new directory, a link to it beside
    `..data`, which is renamed over `..data`; then the old directory goes."""
    old = volume / "..data"
    former = volume / os.readlink(old) if old.is_symlink() else None
    new = volume / f"..2026_{number}"
    new.mkdir()
    (new / "key").write_text(content)
    (volume / "..data_tmp").symlink_to(new.name)
    os.rename(volume / "..data_tmp", old)
    if former:
        shutil.rmtree(former)
    else:
        (volume / "key").symlink_to("..data/key")


def test_config_map_update():
    """An update of a ConfigMap, made as the kubelet makes it, is seen by a process that reads it all the time: at once."""
    with folder() as top, pod() as it:
        volume, seen = top / "volume", top / "seen"
        volume.mkdir()
        seen.mkdir()
        write_payload(volume, 0, "0\n")
        loop = 'while read v < /config/key; do [ "$v" = "$w" ] || { w=$v; echo $v > /seen/$v; }; done'
        box = it.start(["sh", "-c", loop], mounts=[bind(volume, "/config", readonly=True), bind(seen, "/seen")])
        eventually(lambda: (seen / "0").exists(), within=20)
        delays = []
        for number in range(1, 8):
            time.sleep(0.3)
            write_payload(volume, number, f"{number}\n")
            delays.append(eventually(lambda: (seen / str(number)).exists()))
        print(f"    delays in ms: {' '.join(f'{delay * 1000:.0f}' for delay in delays)}", flush=True)
        assert sorted(delays)[3] < 0.25, delays
        assert box.exec("ls", "-A", "/config").split() == ["..2026_7", "..data", "key"]


def test_watches_within_the_pod():
    """A watch (inotify) on a volume wakes for what another container of the pod does there."""
    # IN_CREATE; the event's name begins at byte 16 (inotify(7)).
    watcher = ("import ctypes, os; c = ctypes.CDLL(None); f = c.inotify_init(); c.inotify_add_watch(f, b'/data', 0x100); print('ready', flush=True); "
               "print(os.read(f, 4096)[16:].decode())")
    with folder() as top, pod() as it:
        watch = it.start(["python3", "-c", watcher], mounts=[bind(top, "/data"), *PYTHON])
        other = it.start(["sleep", "1000"], mounts=[bind(top, "/data")])
        eventually(lambda: "ready" in watch.logs(), within=30)
        other.exec("touch", "/data/new")
        eventually(lambda: "new" in watch.logs())


@contextlib.contextmanager
def bound(source, target):
    """What the kubelet does for a subPath (pkg/volume/util/subpath/subpath_linux.go): a bind by a descriptor, so that nobody can exchange what
    was looked at."""
    descriptor = os.open(source, os.O_PATH | os.O_NOFOLLOW)
    try:
        with mounted("--bind", "--no-canonicalize", f"/proc/{os.getpid()}/fd/{descriptor}", target) as it:
            yield it
    finally:
        os.close(descriptor)


def test_sub_path():
    """subPath: a file and a directory within a volume, bound on the host by descriptor as the kubelet does, are volumes like any other; a file
    that is replaced on the host stays the one that was bound."""
    with folder() as top, contextlib.ExitStack() as stack:
        (top / "volume/inner").mkdir(parents=True)
        (top / "volume/inner/file").write_text("of the file\n")
        (top / "sub0").write_text("")
        (top / "sub1").mkdir()
        for number, source in enumerate(("volume/inner/file", "volume/inner")):
            stack.enter_context(bound(top / source, top / f"sub{number}"))
        box = stack.enter_context(pod()).start(["sleep", "1000"], mounts=[bind(top / "sub0", "/etc/app/file"), bind(top / "sub1", "/inner")])
        assert box.exec("cat", "/etc/app/file", "/inner/file") == "of the file\nof the file"
        box.exec("sh", "-c", "echo more >> /etc/app/file")
        assert (top / "volume/inner/file").read_text() == "of the file\nmore\n"
        (top / "volume/inner/new").write_text("another\n")
        os.rename(top / "volume/inner/new", top / "volume/inner/file")
        assert box.exec("cat", "/etc/app/file") == "of the file\nmore"


def test_sub_path_expr():
    """subPathExpr: each container of a pod writes below a directory of one volume that is named by its variables, which the kubelet expands,
    makes where it is missing, and binds anew for the container's next attempt; none sees another's."""
    expression = "$(POD_NAME)/$(NAME) of [$(POD_IP)]"
    with folder() as top, pod() as it:
        (top / "volume").mkdir()

        def attempt(name, stack):
            variables = {"POD_NAME": "web-0", "NAME": name, "POD_IP": it.address()}
            expanded = expression
            for key, value in variables.items():
                expanded = expanded.replace(f"$({key})", value)
            (top / "volume" / expanded).mkdir(parents=True, exist_ok=True)
            (top / name).mkdir(exist_ok=True)
            source = stack.enter_context(bound(top / "volume" / expanded, top / name))
            box = it.start(["sh", "-c", 'echo "$POD_NAME $NAME" >> /logs/log; sleep 1000'], mounts=[bind(source, "/logs")],
                           envs=[{"key": key, "value": value} for key, value in variables.items()])
            return box, top / "volume" / expanded / "log"

        with contextlib.ExitStack() as stack:
            (one, log), (two, other) = attempt("one", stack), attempt("two", stack)
            eventually(lambda: log.exists() and other.exists() and other.read_text(), within=20)
            assert (one.exec("cat", "/logs/log"), two.exec("cat", "/logs/log")) == ("web-0 one", "web-0 two")
            assert one.exec("ls", "/logs") == "log" and sorted(os.listdir(top / "volume/web-0")) == sorted(log.parent.name for log in (log, other))
            crictl("stop", "--timeout", "0", one.id)
            crictl("rm", one.id)
            with contextlib.ExitStack() as again:
                one, _ = attempt("one", again)
                eventually(lambda: log.read_text() == "web-0 one\n" * 2, within=20)
                assert two.exec("cat", "/logs/log") == "web-0 two"
                crictl("rm", "-f", one.id)
            crictl("rm", "-f", two.id)


def test_empty_dir_in_memory():
    """An emptyDir in memory with a size limit gives ENOSPC at the limit, to all containers that share it."""
    with folder() as top, mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", top), pod() as it:
        one, two = (it.start(["sleep", "1000"], mounts=[bind(top, "/cache")]) for _ in range(2))
        one.exec("dd", "if=/dev/zero", "of=/cache/half", "bs=64k", "count=8")
        assert "No space left on device" in fails(two, "dd", "if=/dev/zero", "of=/cache/rest", "bs=64k", "count=16")
        assert one.exec("stat", "-f", "-c", "%S %b %f", "/cache") == "4096 256 0"
        one.exec("rm", "/cache/half", "/cache/rest")
        two.exec("dd", "if=/dev/zero", "of=/cache/new", "bs=64k", "count=15")


def test_special_files():
    """A volume that is a socket or a fifo of the host's is refused, since nobody would be at its other end; a directory that holds sockets is
    fine, and to connect to one of the host's is ECONNREFUSED; within the pod they work. A device that the guest has is the guest's."""
    with folder() as top, pod() as it:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(top / "socket"))
            server.listen()
            os.mkfifo(top / "fifo")
            refused(it, "socket", "/run/it.sock", mounts=[bind(top / "socket", "/run/it.sock")])
            refused(it, "fifo", "/run/it", mounts=[bind(top / "fifo", "/run/it")])
            refused(it, "device", "/dev/loop-control", mounts=[bind("/dev/loop-control", "/dev/loop-control")])
            one = it.start(["sleep", "1000"], mounts=[bind(top, "/shared"), bind("/dev/zero", "/etc/zeros"), *PYTHON])
            dial = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
            assert "Connection refused" in fails(one, "python3", "-c", dial, "/shared/socket")
            assert one.exec("head", "-c", "3", "/etc/zeros") == "\0\0\0"
            serve = ("import os, socket; s = socket.socket(socket.AF_UNIX); s.bind('/shared/inner'); s.listen(); os.mkfifo('/shared/pipe'); "
                     "c = s.accept()[0]; c.send(open('/shared/pipe').read().encode())")
            it.start(["python3", "-c", serve], mounts=[bind(top, "/shared"), *PYTHON])
            eventually((top / "pipe").exists, within=30)
            talk = ("import socket; s = socket.socket(socket.AF_UNIX); s.connect('/shared/inner'); "
                    "f = open('/shared/pipe', 'w'); f.write('by pipe and socket'); f.close(); print(s.recv(99).decode())")
            assert one.exec("python3", "-c", talk) == "by pipe and socket"


def test_shared_memory():
    """/dev/shm is the pod's, of 64 MiB as containerd makes it; a volume in memory can take its place, and a container without a pod has its
    own."""
    with folder() as top, mounted("-t", "tmpfs", "-o", "size=128m", "tmpfs", top), pod() as it:
        one, two = (it.start(["sleep", "1000"]) for _ in range(2))
        size = ["stat", "-f", "-c", "%S %b", "/dev/shm"]
        assert one.exec(*size) == "4096 16384"
        one.exec("sh", "-c", "echo hello > /dev/shm/x")
        assert two.exec("cat", "/dev/shm/x") == "hello"
        large = it.start(["sleep", "1000"], mounts=[bind(top, "/dev/shm")])
        assert large.exec(*size) == "4096 32768"
        assert ctr("shm", command=size) == "4096 16384"


def test_files_of_the_pod():
    """/etc/hosts, /etc/hostname and /etc/resolv.conf are the pod's; what a container writes to its termination log is on the host when it has
    ended."""
    with folder() as top, pod(hostname="fig", dns_config={"servers": ["10.9.8.7"], "searches": ["a.test", "b.test"], "options": ["ndots:3"]}) as it:
        log = top / "log"
        log.write_text("")
        box = it.start(["sleep", "1000"])
        assert box.exec("cat", "/etc/hostname") == "fig"
        assert box.exec("cat", "/etc/resolv.conf") == "search a.test b.test\nnameserver 10.9.8.7\noptions ndots:3"
        assert "localhost" in box.exec("cat", "/etc/hosts")
        ends = it.start(["sh", "-c", "echo the last words > /dev/termination-log"], mounts=[bind(log, "/dev/termination-log")])
        eventually(lambda: ends.state() == "CONTAINER_EXITED", within=20)
        assert log.read_text() == "the last words\n"


def test_devices():
    """Device nodes that the guest has are given, as are the container's own; others are refused by name."""
    with pod() as it:
        devices = [{"host_path": f"/dev/{name}", "container_path": f"/dev/{name}", "permissions": "rwm"} for name in ("fuse", "net/tun")]
        for device in devices:
            if not os.path.exists(device["host_path"]):
                run("modprobe", "-q", os.path.basename(device["host_path"]), check=False)
        box = it.start(["sleep", "1000"], devices=devices)
        assert "10, 229" in box.exec("ls", "-l", "/dev/fuse")
        assert "10, 200" in box.exec("ls", "-l", "/dev/net/tun")
        box.exec("sh", "-c", ": < /dev/fuse; : < /dev/net/tun; echo x > /dev/null; head -c 1 /dev/urandom > /dev/full || true")
        refused(it, "/dev/loop-control", devices=[{"host_path": "/dev/loop-control", "container_path": "/dev/loop-control", "permissions": "rwm"}])


def test_mount_points():
    """Mount points that are missing are made, files and links in the image are covered, and no path leads out of the root."""
    with folder() as top, pod() as it:
        (top / "d").mkdir()
        (top / "d/mark").write_text("directory")
        (top / "f").write_text("file")
        (top / "links").mkdir()
        (top / "links/out").symlink_to("../../../../../../made/by/link")
        (top / "links/absolute").symlink_to("/etc/covered")
        mounts = [bind(top / "d", "/a/b/c/d"), bind(top / "f", "/a/new/file"), bind(top / "f", "/etc/passwd"), bind(top / "d", "/bin/../../../up"),
                  bind(top / "links", "/links"), bind(top / "d", "/links/out"), bind(top / "f", "/links/absolute")]
        box = it.start(["sleep", "1000"], mounts=mounts)
        assert box.exec("cat", "/a/b/c/d/mark", "/up/mark", "/made/by/link/mark") == "directory" * 3
        assert box.exec("cat", "/a/new/file", "/etc/passwd", "/etc/covered") == "file" * 3
        assert sorted(os.listdir(top)) == ["d", "f", "links"] and not os.path.exists("/made") and not os.path.exists("/etc/covered")


def test_read_only_root():
    """A read-only root has writable volumes and a writable /dev/shm."""
    with folder() as top, pod() as it:
        box = it.start(["sleep", "1000"], mounts=[bind(top, "/data")], linux={"security_context": {"readonly_rootfs": True}})
        assert "Read-only file system" in fails(box, "touch", "/etc/new")
        box.exec("touch", "/data/new", "/dev/shm/new")
        assert (top / "new").exists()


def test_two_hundred_mounts():
    """A container has 200 volumes, each its own."""
    with folder() as top, pod() as it:
        mounts = []
        for number in range(200):
            (top / str(number)).mkdir()
            (top / str(number) / "name").write_text(f"{number}\n")
            mounts.append(bind(top / str(number), f"/volumes/{number}"))
        box = it.start(["sleep", "1000"], mounts=mounts)
        said = box.exec("sh", "-c", "cd /volumes && for n in $(seq 0 199); do read name < $n/name; echo $name; done")
        assert said.split() == [str(number) for number in range(200)]


def test_shared_and_kept():
    """A volume is shared by two containers of the pod, and keeps what a container wrote when that is replaced by its next attempt."""
    with folder() as top, pod() as it:
        one = it.start(["sh", "-c", "echo first > /data/log; sleep 1000"], mounts=[bind(top, "/data")])
        two = it.start(["sleep", "1000"], mounts=[bind(top, "/data")])
        eventually(lambda: (top / "log").exists() and (top / "log").read_text(), within=20)
        assert two.exec("cat", "/data/log") == "first"
        crictl("stop", "--timeout", "0", one.id)
        crictl("rm", one.id)
        again = it.start(["sleep", "1000"], mounts=[bind(top, "/data")])
        two.exec("sh", "-c", "echo second >> /data/log")
        assert again.exec("cat", "/data/log") == "first\nsecond"


def test_sources_on_any_file_system():
    """A volume may lie on tmpfs, ext4 or overlayfs; files are made, renamed, linked and removed in each."""
    with folder() as top, contextlib.ExitStack() as stack:
        for name in ("lower", "upper", "work", "overlay", "ext4", "tmpfs"):
            (top / name).mkdir()
        run("truncate", "-s", "16M", top / "disk")
        run("mkfs.ext4", "-q", top / "disk")
        disk = stack.enter_context(mounted("-o", "loop", top / "disk", top / "ext4"))
        tmpfs = stack.enter_context(mounted("-t", "tmpfs", "tmpfs", top / "tmpfs"))
        for name in ("upper", "work"):
            (tmpfs / name).mkdir()
        (top / "lower/old").write_text("old\n")
        layers = f"lowerdir={top}/lower,upperdir={tmpfs}/upper,workdir={tmpfs}/work"
        overlay = stack.enter_context(mounted("-t", "overlay", "-o", layers, "overlay", top / "overlay"))
        sources = {"ext4": disk, "tmpfs": tmpfs, "overlay": overlay}
        box = stack.enter_context(pod()).start(["sleep", "1000"], mounts=[bind(source, f"/{name}") for name, source in sources.items()])
        for name, source in sources.items():
            box.exec("sh", "-ec", f"cd /{name}; echo new > a; mv a b; ln b c; ln -s b d; mkdir e; mv b e/; rm c; chown 5:6 e/b; chmod 4751 e/b")
            assert os.readlink(source / "d") == "b" and (source / "e/b").read_text() == "new\n", name
            stat = os.stat(source / "e/b")
            assert (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777, stat.st_nlink) == (5, 6, 0o4751, 1), name
        box.exec("sh", "-c", "echo more >> /overlay/old")
        assert (overlay / "old").read_text() == "old\nmore\n" and (top / "lower/old").read_text() == "old\n"


def test_tmpfs_of_the_spec():
    """A tmpfs that the spec asks for has its size, mode and flags."""
    mount = ["--mount", "type=tmpfs,src=tmpfs,dst=/t,options=size=64k:mode=1750:noexec:nosuid"]
    script = "df -k /t | tail -n 1; stat -c %a /t; grep ' /t ' /proc/self/mountinfo; cp /bin/busybox /t/ 2>&1; true"
    said = ctr("tmpfs", *mount, command=["sh", "-c", script])
    assert said.split()[1] == "64" and "\n1750\n" in said and "noexec" in said and "nosuid" in said and "No space left" in said, said


def test_huge_pages():
    """A volume of huge pages is the guest's own, with the size, mode and group of the host's: its containers map the same files, and more than
    the machine holds is ENOMEM."""
    fill = ("import mmap, os, sys; f = os.open('/huge/' + sys.argv[1], os.O_CREAT | os.O_RDWR); n = int(sys.argv[2]) << 20; os.ftruncate(f, n); "
            "m = mmap.mmap(f, n); print(m[:4]); m[::4096] = b'x' * (n // 4096)")
    with folder() as top, mounted("-t", "hugetlbfs", "-o", "pagesize=2M,gid=77", "none", top), pod() as it:
        os.chmod(top, 0o2770)
        one, two = (it.start(["sleep", "1000"], mounts=[bind(top, "/huge"), *PYTHON]) for _ in range(2))
        assert one.exec("stat", "-f", "-c", "%s", "/huge") == str(2 << 20)
        assert one.exec("stat", "-c", "%a %g", "/huge") == "2770 77"
        assert one.exec("python3", "-c", fill, "x", "4") == str(bytes(4))
        assert two.exec("python3", "-c", fill, "x", "4") == str(b"x\0\0\0")
        assert "Cannot allocate memory" in fails(two, "python3", "-c", fill, "y", "4096")
        assert not os.listdir(top)


def test_recursive_read_only():
    """With containerd 2 a volume is recursively read-only as the kubelet asks for it."""
    needs(2)
    with folder() as top, mounted("-t", "tmpfs", "tmpfs", top):
        (top / "sub").mkdir()
        with mounted("-t", "tmpfs", "tmpfs", top / "sub"), pod() as it:
            box = it.start(["sleep", "1000"], mounts=[bind(top, "/data", readonly=True, recursive_read_only=True)])
            for place in ("/data/x", "/data/sub/x"):
                assert "Read-only file system" in fails(box, "touch", place), place


def test_image_volume():
    """With containerd 2 an image is a volume: its files are seen, and not written."""
    needs(2)
    folders = pathlib.Path("/run/husk-test/state/io.containerd.grpc.v1.cri/image-volumes")
    with pod() as it:
        image = {"container_path": "/image", "image": {"image": "husk.test/busybox:1"}, "readonly": True}
        box = it.start(["sleep", "1000"], mounts=[image])
        assert box.exec("cat", "/image/etc/passwd") == box.exec("cat", "/etc/passwd")
        assert "Read-only file system" in fails(box, "touch", "/image/x")
    # containerd makes it with the first such volume, and keeps it; it must be empty.
    folders.rmdir()
