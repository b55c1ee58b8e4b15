"""deploy/install and deploy/uninstall leave the machine as its owner had it."""

import pathlib
import shutil
import tempfile

from harness.command import output, run

DEPLOY = pathlib.Path(__file__).resolve().parent.parent.parent / "deploy"
OWN = 'version = 2\n\n[plugins."io.containerd.grpc.v1.cri".registry]\n  config_path = "/etc/containerd/mine"\n'


def test_install_twice_and_uninstall():
    """Installed twice is installed once; containerd's own configuration stays; uninstall takes all back."""
    source = pathlib.Path(shutil.which("husk-vmm")).parent.parent
    with tempfile.TemporaryDirectory(dir="/run/husk-test") as root:
        config = pathlib.Path(root) / "etc/containerd/config.toml"
        config.parent.mkdir(parents=True)
        config.write_text(OWN)
        for _ in range(2):
            run(DEPLOY / "install", "--destdir", root, "--from", source)
        for file in ("bin/containerd-shim-husk-v2", "bin/husk-vmm", "bin/husk-fs", "bin/husk", "share/husk/vmlinux", "share/husk/initramfs"):
            assert (pathlib.Path(root) / "opt/husk" / file).is_file(), file
        assert config.read_text().startswith(OWN) and config.read_text().count("io.containerd.husk.v2") == 1
        meaning = output("containerd", "-c", config, "config", "dump")
        assert "io.containerd.husk.v2" in meaning and "io.containerd.runc.v2" in meaning and "/etc/containerd/mine" in meaning
        run(DEPLOY / "uninstall", "--destdir", root)
        assert config.read_text() == OWN
        assert not (pathlib.Path(root) / "opt/husk/bin").exists()
