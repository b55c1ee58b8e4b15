"""What the table is made of."""

import dataclasses
import typing


@dataclasses.dataclass
class Row:
    """One command in a case's container. `form` makes its output comparable. With `why`, runc and husk differ: each must be as given here (a
    regular expression for the whole output), and `why` says what the reason is."""
    name: str
    command: str
    form: typing.Callable[[str], str] = str
    runc: str = ""
    husk: str = ""
    why: str = ""


@dataclasses.dataclass
class Case:
    """One container. `change` edits the base spec; `by` says how the rows' commands run in it: "init" (its first process), "exec" (a further
    process), "terminal" (its first process, on a terminal), "exec terminal", or "single" (its first process; on husk without a pod around it)."""
    name: str
    change: typing.Callable[[dict], None]
    rows: list
    by: str = "init"


@dataclasses.dataclass
class Refused:
    """A container that must not start, on neither side, and whose message has these words (any one of a tuple) on both."""
    name: str
    change: typing.Callable[[dict], None]
    words: tuple


@dataclasses.dataclass
class Ends:
    """A container, or with `by` "exec" a further process, whose exit status is compared. `signal` is sent to it once it has said `ready`."""
    name: str
    args: list
    by: str = "init"
    signal: str = ""
