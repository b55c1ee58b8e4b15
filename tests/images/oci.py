"""OCI images out of folders, for the builders beside this file."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(*command):
    """Runs a command, its output shown only if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"tests/images: {' '.join(map(str, command))} failed:\n{done.stdout[-3000:]}")


def layer(root):
    """The tree as one tar with fixed times, in a fixed order."""
    out = io.BytesIO()

    def plain(member):
        member.mtime = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(root.rglob("*")):
            if path.is_symlink() or not (path.is_block_device() or path.is_char_device() or path.is_socket()):
                tar.add(path, arcname=str(path.relative_to(root)), recursive=False, filter=plain)
    return out.getvalue()


def image(layers, config):
    """The descriptor of an image's manifest, and all its blobs by their digest (sha256, hexadecimal)."""
    blobs = {}

    def blob(data, media):
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": f"application/vnd.oci.image.{media}", "digest": f"sha256:{digest}", "size": len(data)}

    settings = {"architecture": "amd64", "os": "linux", "config": {"Env": [PATH], **config},
                "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(tar).hexdigest() for tar in layers]}}
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": blob(json.dumps(settings).encode(), "config.v1+json"),
                "layers": [blob(tar, "layer.v1.tar") for tar in layers]}
    return blob(json.dumps(manifest).encode(), "manifest.v1+json"), blobs
