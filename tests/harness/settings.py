"""husk's configuration, for the length of a test."""

import contextlib
import pathlib


@contextlib.contextmanager
def settings(path, text):
    """The file of configuration `path` has this text within."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    try:
        yield
    finally:
        path.unlink()
        with contextlib.suppress(OSError):  # others' settings are in there
            path.parent.rmdir()
