"""What is compared: runc, husk with and without templates, and another build of husk."""

import contextlib
import functools
import json
import os
import pathlib

from harness.command import run
from harness.crictl import Pod
from harness.settings import settings as settings_in

SETTINGS = pathlib.Path("/etc/husk/config.d/99-bench.toml")


@functools.cache
def _knows_templates(husk):
    return run(husk, "template", "list", check=False).returncode == 0


@functools.cache
def sides():
    """Each side's handler and its keys of husk's configuration. No template is built while something is measured."""
    found = {"runc": ("runc", {})}
    before = os.environ.get("HUSK_BENCH_BEFORE")
    if before:
        found["before"] = ("before", {"templates": "off"} if _knows_templates(f"{before}/bin/husk") else {})
    if not _knows_templates("husk"):
        return {**found, "cold": ("husk", {})}
    run("husk", "template", "build")
    return {**found, "cold": ("husk", {"templates": "off"}), "template": ("husk", {"templates": "existing"})}


def fastest():
    """husk as it is by default: from a template, once there is one."""
    return "template" if "template" in sides() else "cold"


def settings(keys):
    """Keys of husk's configuration for the pods that are started within."""
    return settings_in(SETTINGS, "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))


@contextlib.contextmanager
def side(name, **more):
    """What makes a pod of that side; within, husk is configured for it."""
    handler, keys = sides()[name]
    with settings({**keys, **more}):
        yield functools.partial(Pod, handler=handler)


@contextlib.contextmanager
def pod_of(name, **config):
    """A running pod of that side."""
    with side(name) as make:
        it = make(**config).run()
    try:
        yield it
    finally:
        it.remove()
