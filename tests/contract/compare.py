"""Runs cases on both sides and compares."""

import contextlib
import re
import subprocess
import sys

from harness.command import run

from . import base, rows_ends, rows_mounts, rows_process, rows_seccomp, rows_system, sides
from .case import Case, Ends, Refused

GROUPS = {"mounts": rows_mounts.CASES, "process": rows_process.CASES, "system": rows_system.CASES, "seccomp": rows_seccomp.CASES,
          "ends": rows_ends.CASES}
MARK = "@@row"


def rows(group):
    """Names of a group's rows."""
    return [name for case in GROUPS[group] for name in ([row.name for row in case.rows] if isinstance(case, Case) else [case.name])]


def script(case):
    """A shell script that runs the rows one after another, whatever each does to itself."""
    lines = ["exec 2>&1"]
    for row in case.rows:
        lines += [f"echo '{MARK}'", "(", row.command, ")", "status=$?", f"echo; echo \"{MARK}s $status\""]
    return "\n".join(lines)


def answers(case, text):
    """Each row's output, with its status if it is not 0; and what was written around them."""
    parts = re.split(rf"^{MARK}\n", text, flags=re.M)
    found = []
    for row, part in zip(case.rows, parts[1:]):
        output, marked, status = part.partition(f"{MARK}s ")
        formed = row.form(output.strip("\n")).strip("\n")
        status = status.split("\n")[0] if marked else "none: it did not end"
        found.append(formed if status == "0" else f"{formed}\n(status {status})")
    return found, parts[0]


def run_case(side, case):
    """The answers of one side."""
    ident = f"{side.name}{next(sides.COUNT)}"
    spec = base.spec()
    case.change(spec)
    text = script(case)
    given = spec["process"]["args"]
    probe = [text if word == "SCRIPT" else word for word in given] if "SCRIPT" in given else ["sh", "-c", text, "probe"]
    spec["process"]["args"] = ["sleep", "1000"] if case.by.startswith("exec") else probe
    with sides.rootfs(ident) as root:
        spec = sides.finished(spec, ident, root)
        if not case.by.startswith("exec"):
            said = _said(side.command(spec, ident, case.by == "single"), case.by == "terminal")
        else:
            side.start(spec, ident)
            try:
                said = _said(side.exec(ident, probe, case.by == "exec terminal"), case.by == "exec terminal")
            finally:
                side.remove(ident)
    found, around = answers(case, said)
    if len(found) < len(case.rows):
        raise AssertionError(f"{len(found)} of {len(case.rows)} rows were answered; it said: {around}{said[-2000:]}")
    return found


def _said(command, terminal):
    if terminal:
        return sides.on_terminal(command)[1]
    done = run(*command, stdin="", check=False, timeout=sides.LIMIT)
    return done.stdout + done.stderr


def differences(case, runc, husk):
    """The rows of a case that are not as they should be."""
    for row, one, other in zip(case.rows, runc, husk):
        if row.why:
            for side, given, wanted in (("runc", one, row.runc), ("husk", other, row.husk)):
                if not re.fullmatch(wanted, given, re.S):
                    yield row.name, f"{side} should differ here ({row.why}) and say {wanted!r}, but says {given!r}"
        elif one != other:
            yield row.name, f"runc {one!r}\n      husk {other!r}"


def refused(side, case):
    """What is wrong with a side's refusal, or nothing."""
    ident = f"{side.name}{next(sides.COUNT)}"
    spec = base.spec()
    spec["process"]["args"] = ["true"]
    case.change(spec)
    with sides.rootfs(ident) as root:
        done = run(*side.command(sides.finished(spec, ident, root), ident), stdin="", check=False, timeout=sides.LIMIT)
    said = done.stdout + done.stderr
    if not done.returncode:
        return f"{side.name} starts it"
    return "" if any(word in said for word in case.words) else f"{side.name} has none of {case.words} in {said!r}"


def ended(side, case, running):
    """A process's exit status."""
    if case.by == "exec":
        return run(*side.exec(running, case.args), stdin="", check=False, timeout=sides.LIMIT).returncode
    ident = f"{side.name}{next(sides.COUNT)}"
    spec = base.spec()
    spec["process"]["args"] = case.args
    with sides.rootfs(ident) as root:
        command = [str(word) for word in side.command(sides.finished(spec, ident, root), ident)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            if case.signal:
                said = process.stdout.readline()
                if said != "ready\n":
                    return f"{process.wait(sides.LIMIT)}, never ready: {said}"
                side.kill(ident, case.signal)
            return process.wait(sides.LIMIT)


def compare(group):
    """Compares every row of a group; fails with the list of those that differ."""
    cases = GROUPS[group]
    wrong, different, count = [], 0, 0
    with sides.place(), sides.Husk() as husk, contextlib.ExitStack() as stack:
        both = (sides.Runc(), husk)
        running = {}
        if any(isinstance(case, Ends) and case.by == "exec" for case in cases):
            running = {side.name: stack.enter_context(sides.sleeping(side)) for side in both}
        for case in cases:
            if isinstance(case, Refused):
                wrong += [(case.name, problem) for problem in (refused(side, case) for side in both) if problem]
                count += 1
            elif isinstance(case, Ends):
                one, other = (ended(side, case, running.get(side.name)) for side in both)
                wrong += [] if one == other else [(case.name, f"runc ends with {one}, husk with {other}")]
                count += 1
            else:
                count += len(case.rows)
                different += sum(bool(row.why) for row in case.rows)
                try:
                    one, other = (run_case(side, case) for side in both)
                except (AssertionError, subprocess.SubprocessError) as error:
                    wrong.append((case.name, f"the whole case: {error}"))
                    continue
                wrong += differences(case, one, other)
    print(f"    {group}: {count} rows compared, {different} of them differ for a reason that is told", flush=True)
    if wrong:
        raise AssertionError(f"{len(wrong)} of {count} rows of {group} differ:\n" + "\n".join(f"  {name}:\n      {problem}" for name, problem in wrong))


if __name__ == "__main__":
    for name in sys.argv[1:] or GROUPS:
        print(name, len(rows(name)))
