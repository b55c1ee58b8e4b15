//! husk-backend.
