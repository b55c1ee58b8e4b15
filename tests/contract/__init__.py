"""The comparison of runc and husk: a table of OCI spec features (rows_*.py) and what runs it (sides.py, compare.py).

A case is one container, started by the same spec on both; a row is one command in it whose output and exit status must be the same. Where a
virtual machine must differ, the row names both forms and the reason, and fails when the difference is gone."""
