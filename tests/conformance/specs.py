"""critest's specs as tests: each is run by a critest of its own, so that what it leaves behind and where it hangs is seen at once."""

import json
import os
import pathlib
import re
import tomllib

from harness.command import run
from harness.containerd import SOCKET, version
from harness.crictl import HANDLER, crictl
from harness.runner import Skip

REPORT = pathlib.Path("/run/husk-test/critest/report.json")
EXCEPTIONS = pathlib.Path(__file__).with_name("exceptions.toml")
GROUP = "[k8s.io] "


def critest(*arguments):
    """Runs critest and returns the reports of its specs (github.com/onsi/ginkgo/v2, types.SpecReport) that it did not leave out."""
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.unlink(missing_ok=True)
    done = run(f"{os.environ['HUSK_CRITEST']}/critest", f"--runtime-endpoint=unix://{SOCKET}", f"--runtime-handler={HANDLER}",
               "--ginkgo.no-color", f"--ginkgo.json-report={REPORT}", *arguments, check=False)
    assert REPORT.exists(), f"critest made no report; it said: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    suite, = json.loads(REPORT.read_text())
    left_out = [spec for spec in suite["SpecReports"] if spec["State"] == "skipped" and "Failure" not in spec]
    return [spec for spec in suite["SpecReports"] if spec not in left_out]


def text(spec):
    """A spec's whole name, as ginkgo shows it."""
    return " ".join([*(spec["ContainerHierarchyTexts"] or []), spec["LeafNodeText"]])


def exceptions():
    """Names of specs that must fail, with the reason: of the runtime and of the version of containerd."""
    tables = tomllib.loads(EXCEPTIONS.read_text())
    major, minor = version()
    return {**tables.get(HANDLER, {}), **tables.get(f"containerd {major}.{minor}", {})}


def test_of(spec, reason):
    """The test that runs a spec; with a reason it is an exception."""
    def test(_containerd):
        found = critest(f"--ginkgo.focus={re.escape(spec)}$")
        # Besides the spec, a failed preparation of the suite is told as a spec of its own.
        bad = [one for one in found if one["State"] not in ("passed", "skipped")]
        if bad:
            crictl("rmp", "--all", "--force", check=False)
        if bad and reason:
            raise Skip(f"fails, as exceptions.toml says: {reason}")
        failure = (bad or found)[-1].get("Failure", {})
        assert not bad, f"{failure.get('Message')}\nat {failure.get('Location', {}).get('FileName')}:{failure.get('Location', {}).get('LineNumber')}"
        assert not reason, "does not fail, but is listed in exceptions.toml"
        if found[-1]["State"] == "skipped":
            raise Skip(failure["Message"])
    return test


def collect(names):
    """The specs of the validation part (critest leaves out its benchmarks), and a check of the exceptions."""
    # Sorted, since ginkgo deals them out by chance and the hosts of a run must agree.
    specs = sorted(text(spec) for spec in critest("--ginkgo.dry-run") if spec["LeafNodeType"] == "It")
    excepted = exceptions()

    def every_exception_is_a_spec():
        unknown = [name for name in excepted if GROUP + name not in specs]
        assert not unknown, f"exceptions.toml names what is no spec: {unknown}"

    tests = [("conformance.exceptions", every_exception_is_a_spec)]
    for spec in specs:
        name = spec.removeprefix(GROUP)
        tests.append((f"conformance.{name}", test_of(spec, excepted.get(name))))
    return [(name, test) for name, test in tests if not names or any(part in name for part in names)]
