"""Network namespaces made by hand and by CNI plugins (the CNI specification, section 2: the protocol between runtime and plugins), for
pods that run in one by `ctr run`, and a neighbour that plays the outside."""

import contextlib
import json
import os
import subprocess

from .command import Failed, output, run
from .containerd import NAMESPACE, SOCKET
from .crictl import HANDLER

PLUGINS = "/usr/lib/cni"
CTR = ["ctr", "-a", SOCKET, "-n", NAMESPACE]


def ip(*arguments, **options):
    """iproute2's ip."""
    return run("ip", *arguments, **options)


class Netns:
    """A network namespace with its loopback up."""

    def __init__(self, name):
        self.name = name
        self.path = f"/var/run/netns/{name}"
        self.attached = []
        # Not by `ip netns add`, which makes a mount for all namespaces that stays.
        os.makedirs("/var/run/netns", exist_ok=True)
        open(self.path, "x").close()
        run("unshare", f"--net={self.path}", "true")
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments):
        """`ip` within it."""
        return output("ip", "-n", self.name, *arguments)

    def run(self, *command, **options):
        """What a command within it prints."""
        return output("ip", "netns", "exec", self.name, *command, **options)

    def _call(self, command, interface, config):
        env = {**os.environ, "CNI_COMMAND": command, "CNI_CONTAINERID": self.name, "CNI_NETNS": self.path,
               "CNI_IFNAME": interface, "CNI_PATH": PLUGINS}
        done = run(f"{PLUGINS}/{config['type']}", stdin=json.dumps(config), env=env, check=False)
        if done.returncode:
            raise Failed(f"{command} of CNI's {config['type']} failed: {done.stdout} {done.stderr}")
        return json.loads(done.stdout) if done.stdout.strip() else None

    def attach(self, interface, *plugins):
        """Adds an interface by a chain of plugins; returns its addresses."""
        result = None
        for plugin in plugins:
            config = {"cniVersion": "0.4.0", "name": f"net-{self.name}-{interface}", **plugin}
            if result:
                config["prevResult"] = result
            result = self._call("ADD", interface, config)
            self.attached.append((interface, config))
        return [address["address"].partition("/")[0] for address in result["ips"]]

    def remove(self):
        """Takes everything back, as a runtime does."""
        for interface, config in reversed(self.attached):
            self._call("DEL", interface, config)
        run("umount", self.path)
        os.unlink(self.path)


@contextlib.contextmanager
def netns(name):
    """A namespace for the length of a test."""
    it = Netns(name)
    try:
        yield it
    finally:
        it.remove()


def host_local(*subnets, routes=("0.0.0.0/0", "::/0")):
    """Addresses from the given networks, one each; `network>address` begins at that address."""
    parts = [subnet.partition(">") for subnet in subnets]
    ranges = [[{"subnet": subnet, **({"rangeStart": start} if start else {})}] for subnet, _, start in parts]
    return {"type": "host-local", "dataDir": "/run/husk-test/ipam", "ranges": ranges,
            "routes": [{"dst": route} for route in routes]}


class Single:
    """A container without a pod in a namespace of the test's."""

    def __init__(self, name, where, *command, image="busybox", annotations=None):
        self.name = name
        self.count = 0
        given = [word for key, value in (annotations or {}).items() for word in ("--annotation", f"{key}={value}")]
        run(*CTR, "run", "-d", "--runtime", f"io.containerd.{HANDLER}.v2", "--with-ns", f"network:{where}", *given, f"husk.test/{image}:1", name,
            *command)

    def exec(self, *command, **options):
        """What a command in the container prints."""
        self.count += 1
        return output(*CTR, "task", "exec", "--exec-id", f"e{self.count}", self.name, *command, **options)

    def remove(self):
        """Ends and removes it."""
        run(*CTR, "task", "rm", "-f", self.name)
        run(*CTR, "container", "rm", self.name)


@contextlib.contextmanager
def single(name, where, *command, **options):
    """A running container for the length of a test."""
    it = Single(name, where, *command, **options)
    try:
        yield it
    finally:
        it.remove()


@contextlib.contextmanager
def outside():
    """A neighbour of the host: 192.0.2.2 and 2001:db8::2 with a web server that says `outside`, on the other end of the host's
    interface `toout`, which has 192.0.2.1 and 2001:db8::1."""
    with netns("outside") as it:
        ip("link", "add", "name", "toout", "type", "veth", "peer", "name", "out0", "netns", it.name)
        ip("link", "set", "toout", "up")
        ip("addr", "add", "192.0.2.1/24", "dev", "toout")
        ip("addr", "add", "2001:db8::1/64", "dev", "toout", "nodad")
        it.ip("link", "set", "out0", "up")
        it.ip("addr", "add", "192.0.2.2/24", "dev", "out0")
        it.ip("addr", "add", "2001:db8::2/64", "dev", "out0", "nodad")
        it.ip("route", "add", "default", "via", "192.0.2.1")
        it.ip("route", "add", "default", "via", "2001:db8::1")
        folder = "/run/husk-test/outside"
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/index.html", "w") as page:
            page.write("outside\n")
        server = subprocess.Popen(["ip", "netns", "exec", it.name, "busybox", "httpd", "-f", "-p", "80", "-h", folder])
        try:
            yield it
        finally:
            server.kill()
            server.wait()
            ip("link", "del", "toout")
