"""The VM with husk-fs beside it."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import tempfile

from .machine import machine


@contextlib.contextmanager
def husk_fs(root):
    """husk-fs over a folder, and a socket connected to it; ends when its front end does."""
    with tempfile.TemporaryDirectory() as folder:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"{folder}/socket")
        listener.listen(1)
        config, write = os.pipe()
        os.write(write, json.dumps(dict(id="test", root=str(root), socket=listener.fileno(), request_queues=1)).encode())
        os.close(write)
        process = subprocess.Popen(["husk-fs", "--config-fd", str(config)], pass_fds=[config, listener.fileno()])
        os.close(config)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(f"{folder}/socket")
        listener.close()
        try:
            yield connection, process
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def share():
    """A folder as the shim makes it: a mount point, read-only for husk-fs, with a mount below that can be written."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        subprocess.run(["mount", "-t", "tmpfs", "share", root], check=True)
        try:
            (root / "volume").mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "volume", root / "volume"], check=True)
            yield root
        finally:
            subprocess.run(["umount", "--recursive", root], check=True)


def test_files():
    """The guest reads and writes the shared folder; husk-fs ends with the VM. Both in their jails."""
    with share() as root:
        (root / "question").write_text("6 x 9")
        with husk_fs(root) as (connection, process), machine("files", fs_socket=connection, jail=dict(uid=64123, gid=64123)) as vm:
            vm.until("ready")
            assert "file=6 x 9" in vm.lines, vm.said()
            assert (root / "volume/answer").read_text() == "42"
            assert vm.exit() == 0, vm.said()
            assert process.wait(20) == 0
