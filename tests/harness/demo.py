"""What deploy/quickstart shows: a pod of two containers on husk under a private containerd, and what became of it.
`python3 -m harness.demo --binaries DIR --images DIR [--keep]`, as root, where KVM can run a guest."""

import argparse
import os
import sys
import time

from . import leftovers
from .containerd import SOCKET, Containerd
from .crictl import Pod, first_pod, host_kernel

LOGS = "/run/husk-test/demo"
SERVER = "echo \"$(hostname) says hello from Linux $(uname -r)\" > /index.html; echo serving; httpd -f -p 127.0.0.1:8080 -h /"
CLIENT = "until wget -qO- http://127.0.0.1:8080/index.html; do :; done; sleep 1000"


def wait_for(container, text, within=30):
    """Waits until the container's log holds the text."""
    end = time.monotonic() + within
    while text not in container.logs():
        if time.monotonic() > end:
            sys.exit(f"container {container.name} did not write {text!r} within {within} s; it wrote: {container.logs()!r}")
        time.sleep(0.05)


def show(pod, server, client, times):
    """Prints what happened."""
    print(f"""
  container one wrote   {server.logs()}
  container two wrote   {client.logs()}
  guest's kernel        {client.exec('uname', '-r')}
  host's kernel         {host_kernel()}
  pod's address         {pod.address()}
  request to running    pod {times[0]:.2f} s, first container {times[1]:.2f} s, second {times[2]:.2f} s
  logs                  {LOGS}/containerd.log (containerd and husk's shims), {pod.logs} (the containers)
""", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binaries", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    os.environ["PATH"] = f"{options.binaries}:{os.environ['PATH']}"
    os.makedirs(LOGS, exist_ok=True)
    containerd = Containerd(LOGS, options.binaries, options.images)
    containerd.start()
    try:
        containerd.load("pause", "busybox")
        first_pod()
        before = leftovers.snapshot()
        times = [time.monotonic()]
        pod = Pod(name="hello").run()
        times.append(time.monotonic())
        server = pod.start(["sh", "-c", SERVER], name="one")
        times.append(time.monotonic())
        client = pod.start(["sh", "-c", CLIENT], name="two")
        times.append(time.monotonic())
        wait_for(client, "says hello")
        show(pod, server, client, [b - a for a, b in zip(times, times[1:])])
        if options.keep:
            print(f"""The pod runs on. Go on with:
  export CONTAINER_RUNTIME_ENDPOINT=unix://{SOCKET} PATH={os.environ['PATH'].split(':')[0]}:$PATH
  crictl ps; crictl exec -it {client.id[:13]} sh
and end with:
  crictl rmp -f {pod.id[:13]}; kill {containerd.process.pid}""")
            return
        pod.remove()
        leftovers.expect_none(before)
        print("The pod is gone without a trace.")
    finally:
        if not options.keep:
            containerd.stop()


main()
