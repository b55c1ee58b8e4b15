//! husk-cell.
