//! husk-jail.
