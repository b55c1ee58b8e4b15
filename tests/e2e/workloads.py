"""Real programs in a pod: a Debian user space, Python, a web server reached from outside the pod."""

import time
import urllib.request

from harness.crictl import pod
from harness.runner import deadline


@deadline(240)
def test_debian_and_python(containerd):
    """dpkg lists its packages, Python runs."""
    containerd.load("debian")
    with pod() as it:
        box = it.start(["sleep", "1000"], image="debian")
        assert "ii  dpkg" in box.exec("dpkg", "-l")
        assert box.exec("python3", "-c", "import os, socket; print(os.getpid() > 0, 2**100)") == f"True {2**100}"


@deadline(240)
def test_nginx_serves_a_client_outside(containerd):
    """nginx in a pod answers a client on the node at the pod's address."""
    containerd.load("debian")
    with pod() as it:
        it.start(None, image="debian")
        end = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"http://{it.address()}/", timeout=5) as page:
                    assert page.read() == b"served from a pod\n"
                return
            except OSError:
                assert time.monotonic() < end, "no answer in 30 s"
                time.sleep(0.2)
