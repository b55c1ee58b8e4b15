"""Measures husk with runc beside it, in turn in the same run; figures go to bench.json and the terminal. Lines: SPEC.md."""

from e2e import environment  # the same containerd

__all__ = ["environment"]
