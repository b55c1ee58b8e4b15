"""Runs tests inside a host: `python3 -m harness.runner SUITE --results FILE [--shard I/N] [NAME...]`.

A test is a function test_* of tests/SUITE/*.py, its docstring the sentence that is checked. It has a deadline (its attribute
`deadline` in seconds, else 120) after which it fails with a report. A test that lacks something raises Skip, which is
counted and printed. Tests are dealt to shards in turn. What a suite's tests need around them is `environment` of tests/SUITE/__init__.py."""

import argparse
import importlib
import json
import os
import pathlib
import signal
import sys
import time
import traceback

from . import leftovers, report

HERE = pathlib.Path(__file__).resolve().parent.parent


class Skip(Exception):
    """The test needs something that this machine lacks; the message says what."""


class Older(Skip):
    """This containerd is older than the test needs; tests/run runs the test on a newer one."""


class Late(AssertionError):
    """The test's deadline passed."""


def deadline(seconds):
    """Gives a test another deadline than the usual."""
    def mark(test):
        test.deadline = seconds
        return test
    return mark


def full(usual, whole):
    """A test's usual measure, or with HUSK_TEST_FULL=1 in the environment the whole one, which takes long in an emulator."""
    return whole if os.environ.get("HUSK_TEST_FULL") == "1" else usual


def collect(suite, names):
    """The suite's tests in order of file and place, or what its own `collect` gives; with names, only those whose full name, closed by a
    `$`, contains one of them."""
    own = getattr(importlib.import_module(suite), "collect", None)
    if own:
        return own(names)
    found = []
    for file in sorted((HERE / suite).glob("[a-z]*.py")):
        module = importlib.import_module(f"{suite}.{file.stem}")
        tests = [f for n, f in vars(module).items() if n.startswith("test_") and f.__module__ == module.__name__]
        for test in sorted(tests, key=lambda f: f.__code__.co_firstlineno):
            found.append((f"{suite}.{file.stem}.{test.__name__[5:]}", test))
    return [(n, t) for n, t in found if not names or any(name in f"{n}$" for name in names)]


def run_one(name, test, environment, logs):
    """One test; returns its result as a dictionary. A test that takes an argument gets the suite's environment."""
    def late(_signal, _frame):
        # Before anything is tidied up, since only now the hang can be looked at.
        raise Late(f"not done after {limit} s\n{report.emulator(name)}")

    limit = getattr(test, "deadline", 120)
    signal.signal(signal.SIGALRM, late)
    start = time.monotonic()
    log = getattr(environment, "log", None)
    offset = log.stat().st_size if log else 0
    result = {"name": name, "result": "passed"}
    signal.alarm(limit)
    try:
        test(environment) if test.__code__.co_argcount else test()
    except Skip as why:
        result.update(result="skipped", why=str(why), older=isinstance(why, Older))
    except BaseException as error:
        signal.alarm(0)
        if isinstance(error, KeyboardInterrupt):
            raise
        result.update(result="failed", why=traceback.format_exc(), report=report.write(logs, name, log, offset))
        if isinstance(error, Late) and "mark 1 seen" in str(error):
            result["emulator"] = True
    finally:
        signal.alarm(0)
    result["seconds"] = round(time.monotonic() - start, 1)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite")
    parser.add_argument("--results", required=True)
    parser.add_argument("--binaries", required=True, help="folder of husk's programs")
    parser.add_argument("--images", required=True, help="folder of tests/images")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("names", nargs="*")
    options = parser.parse_intermixed_args()
    index, count = map(int, options.shard.split("/"))
    logs = pathlib.Path(options.results).parent
    tests = collect(options.suite, options.names)[index::count]
    os.environ["PATH"] = f"{options.binaries}:{os.environ['PATH']}"
    results = []
    with importlib.import_module(options.suite).environment(logs, options.binaries, options.images) as environment:
        for name, test in tests:
            before = leftovers.snapshot()
            result = run_one(name, test, environment, logs)
            if result.get("emulator"):
                # The emulator's known defect, shown by its mark: told, counted, and the test has its one other run.
                print(f"emulator {name}: {result['why']}", flush=True)
                result = {**run_one(name, test, environment, logs), "emulator": True}
            if result["result"] == "passed" and not getattr(test, "leaves", False):
                try:
                    leftovers.expect_none(before)
                except AssertionError as error:
                    result.update(result="failed", why=str(error))
            results.append(result)
            print(f"{result['result']:7} {name} ({result['seconds']} s)", flush=True)
            if result["result"] != "passed":
                print("    " + result["why"].rstrip().replace("\n", "\n    "), flush=True)
            pathlib.Path(options.results).write_text(json.dumps(results, indent=1))
    return int(any(r["result"] == "failed" for r in results))


if __name__ == "__main__":
    # By its name, since tests import Skip from there: __main__ is another module.
    from harness import runner
    sys.exit(runner.main())
