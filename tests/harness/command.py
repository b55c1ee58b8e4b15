"""Runs programs for the tests: the test's own deadline ends them (a backstop where none runs), and a failure shows what was run and all
that it said."""

import contextlib
import subprocess
import time


class Failed(AssertionError):
    """A program that should have succeeded did not."""


def run(*command, timeout=600, check=True, stdin=None, text=True, env=None):
    """Runs a command to its end; its result has returncode, stdout and stderr."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, input=stdin, stdin=None if stdin is not None else subprocess.DEVNULL,
                              capture_output=True, text=text, timeout=timeout, env=env)
    except subprocess.TimeoutExpired as late:
        raise Failed(f"`{' '.join(words)}` was not done after {timeout} s; so far: {late.stdout!r} {late.stderr!r}") from None
    if check and done.returncode:
        raise Failed(f"`{' '.join(words)}` ended with {done.returncode}:\n{done.stdout[-2000:]!s}\n{done.stderr[-4000:]!s}")
    return done


def output(*command, **options):
    """What a command that succeeds prints, without the last newline."""
    return run(*command, **options).stdout.rstrip("\n")


def wait(what, within=20, despite=()):
    """Until `what` gives something true, which comes back; an error of the kinds `despite` is as good as not yet."""
    end = time.monotonic() + within
    while True:
        with contextlib.suppress(*despite):
            if found := what():
                return found
        assert time.monotonic() < end, f"not so within {within} s: {what}"
        time.sleep(0.05)
