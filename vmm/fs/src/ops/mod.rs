//! The operations, a file for each group. All are methods of [`crate::server::Server`] that take a request and append the reply's payload.

mod attributes;
mod directory;
mod file;
mod make;
mod names;
mod session;
mod xattr;

use zerocopy::{Immutable, IntoBytes};

/// Appends a structure to a reply.
fn put<T: IntoBytes + Immutable>(out: &mut Vec<u8>, value: &T) {
    out.extend_from_slice(value.as_bytes());
}
