//! Starts further processes in a running container.

use std::sync::Arc;

use husk_agent_api::agent::ExecProcessRequest;

use super::Container;
use super::process::Process;
use super::stdio::Pending;
use crate::error::Error;
use crate::pod::machine::Machine;

/// Lets the agent make and start the process, with its streams joined.
pub(crate) async fn start(
    machine: &Machine,
    namespace: &str,
    container: &Container,
    process: &Arc<Process>,
) -> Result<(), Error> {
    let pending = Pending::open(&process.stdio, &machine.dial, namespace, &container.id).await?;
    let request = ExecProcessRequest {
        id: container.id.to_string(),
        exec_id: process.exec_id.clone(),
        process: process.spec.clone(),
        stdio: Some(pending.request(process.size())).into(),
        ..Default::default()
    };
    machine.agent.exec_process(&request).await?;
    *process.streams.lock().await = Some(pending.join().await?);
    Ok(())
}
