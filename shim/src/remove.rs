//! The `delete` action: containerd calls it when a shim is gone, to clean up after it and to learn how its container ended.

use std::io;

use containerd_shim::Flags;
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{self, Message, MessageField};
use thiserror::Error;

use crate::container::process::Exit;
use crate::id::{Id, IdError};
use crate::pod::recover;

/// Why the action failed.
#[derive(Debug, Error)]
pub(crate) enum RemoveError {
    /// The id.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The runtime.
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    /// The answer.
    #[error("cannot write the answer")]
    Answer(#[from] protobuf::Error),
}

/// Cleans up and gives the answer for containerd: the container counts as killed.
pub(crate) fn delete(flags: &Flags) -> Result<Vec<u8>, RemoveError> {
    let id = Id::parse(&flags.id)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(RemoveError::Runtime)?;
    runtime.block_on(recover::delete(&id, &flags.namespace));
    let exit = Exit::killed();
    let response = DeleteResponse {
        exit_status: exit.status,
        exited_at: MessageField::some(exit.timestamp()),
        ..Default::default()
    };
    Ok(response.write_to_bytes()?)
}
