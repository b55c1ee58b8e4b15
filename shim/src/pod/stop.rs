//! The end of a pod: wanted (its sandbox killed, containerd's Shutdown) or not (the death of VMM, fs daemon or agent). Either way one
//! task sees it, tells containerd of every process that ended with it, and takes back what the machine had.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use containerd_shim_protos::events::task::TaskOOM;
use husk_agent_api::agent::event::Kind as EventKind;
use husk_agent_api::agent::{Event, ProcessExit};
use tracing::{debug, error, info, warn};

use super::machine::{Held, Machine};
use super::{Pod, Slot};
use crate::container::Kind;
use crate::container::process::{Ending, Exit, Process, State};
use crate::container::stdio::Written;
use crate::error::chain;
use crate::peer::agent::Events;
use crate::peer::fs;

/// Longest wait for the agent's own shutdown, and again for the VMM's end after it; containerd gives Shutdown 3 s in all.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(1);

/// Longest wait for events that the agent sent before the end.
const LAST_EVENTS_LIMIT: Duration = Duration::from_secs(1);

impl Pod {
    /// Passes the agent's events on until the machine ends, and then does all that its end needs.
    pub(super) async fn watch(self: Arc<Self>, machine: Arc<Machine>, mut events: Events) {
        let held = machine.held.read().await;
        let (mut cause, is_agents_end) = self.pass_on_all(&machine, &held, &mut events).await;
        machine.set_down(&cause);
        let ending_processes = async {
            // The agent's connection is the first to break when the guest ends: the VMM knows why.
            if let (true, Some(vmm)) = (is_agents_end, &held.vmm)
                && let Ok(reason) = tokio::time::timeout(SHUTDOWN_LIMIT, vmm.ended()).await
            {
                cause = reason;
                machine.set_down(&cause);
            }
            if machine.is_stopping() {
                info!("pod stopped: {cause}");
            } else {
                error!("the pod's virtual machine is gone: {cause}");
            }
            held.end_processes().await;
        };
        // The last output ends with the VMM.
        tokio::join!(ending_processes, self.end_containers(Kind::Guest, Exit::killed()));
        drop(held);
        machine.set_gone();
        let status = *self.sandbox_status.lock().unwrap_or_else(PoisonError::into_inner);
        self.end_containers(Kind::Sandbox, status.map_or_else(Exit::killed, Exit::now)).await;
    }

    /// Passes events on to the machine's end: why it ended, and whether only the agent's connection has.
    async fn pass_on_all(self: &Arc<Self>, machine: &Arc<Machine>, held: &Held, events: &mut Events) -> (String, bool) {
        let vmm_ended = async {
            match &held.vmm {
                Some(vmm) => vmm.ended().await,
                None => std::future::pending().await,
            }
        };
        let fs_ended = fs::ended(held.fs.as_ref(), held.vmm.as_ref());
        tokio::pin!(vmm_ended, fs_ended);
        loop {
            tokio::select! {
                biased;
                event = events.next() => match event {
                    Some(Event { kind: Some(EventKind::MemoryWanted(_)), .. }) => machine.memory_wanted(),
                    Some(event) => self.pass_on(event).await,
                    None => return ("the connection to the agent ended".to_owned(), true),
                },
                cause = &mut vmm_ended => {
                    // What the agent said before is still told as it was.
                    let rest = async { while let Some(event) = events.next().await { self.pass_on(event).await; } };
                    let _ = tokio::time::timeout(LAST_EVENTS_LIMIT, rest).await;
                    return (cause, false);
                }
                cause = &mut fs_ended => return (cause, false),
            }
        }
    }

    /// Notes and tells the end of every process of a kind of containers, each after its last output. What the guest has said of an end holds.
    async fn end_containers(&self, kind: Kind, exit: Exit) {
        let containers = self.all().into_iter().filter(|container| container.kind == kind);
        let ends = containers.map(async |container| {
            let processes = container.processes();
            futures::future::join_all(processes.iter().map(|process| process.settle())).await;
            for process in processes {
                let exit = process.ending().map_or(exit, |ending| ending.exit);
                if process.end(exit) {
                    self.tell_exit(&container, &process, exit).await;
                }
            }
        });
        futures::future::join_all(ends).await;
    }

    /// One event of the agent's. It is the guest's word: what it names must be there, and each end is told once.
    async fn pass_on(self: &Arc<Self>, event: Event) {
        match event.kind {
            Some(EventKind::Exit(ProcessExit { id, exec_id, status, stdout_bytes, stderr_bytes, .. })) => {
                let Ok(seen) = self.find(&id, &exec_id) else {
                    debug!("a process that containerd has not asked for ended: {id:?} {exec_id:?}");
                    return;
                };
                if seen.container.kind == Kind::Sandbox {
                    return;
                }
                // The time is the host's: the guest's clock is the guest's.
                let exit = Exit::now(status & 0xff);
                let written = Written { stdout: stdout_bytes, stderr: stderr_bytes };
                if !seen.process.set_ending(Ending { exit, written }) {
                    return;
                }
                let pod = Arc::clone(self);
                // Others' ends don't wait for this one's output.
                tokio::spawn(async move {
                    seen.process.settle().await;
                    if seen.process.end(exit) {
                        pod.tell_exit(&seen.container, &seen.process, exit).await;
                    }
                });
            }
            Some(EventKind::Oom(oom)) => {
                let Ok(seen) = self.find(&oom.id, "") else { return };
                if seen.container.is_first_oom() {
                    self.around.publisher.publish(TaskOOM { container_id: oom.id, ..Default::default() }).await;
                }
            }
            _ => {}
        }
    }

    /// A signal to the sandbox, which the pause program would have got: SIGINT and SIGTERM end it with 0, SIGKILL kills it, others
    /// do nothing. With the sandbox its machine ends.
    pub(super) fn kill_sandbox(self: &Arc<Self>, process: &Process, signal: u32) {
        let status = match signal {
            2 | 15 => 0,
            9 => 137,
            _ => return,
        };
        if matches!(process.state(), State::Exited(_)) {
            return;
        }
        *self.sandbox_status.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
        match self.current() {
            Some(machine) => {
                tokio::spawn(async move { stop(&machine).await });
            }
            None => {
                let pod = Arc::clone(self);
                tokio::spawn(async move { pod.end_containers(Kind::Sandbox, Exit::now(status)).await });
            }
        }
    }

    /// containerd's Shutdown: once no container is left (or at once, with `now`) ends the machine and takes everything back; then the
    /// shim has nothing left to do.
    pub(crate) async fn shutdown(&self, now: bool) {
        if !now && !self.all().is_empty() {
            return;
        }
        if matches!(*self.machine.lock().unwrap_or_else(PoisonError::into_inner), Slot::Starting) {
            return;
        }
        if let Some(machine) = self.current() {
            stop(&machine).await;
            machine.held.write().await.release().await;
        }
        self.finished.send_replace(true);
    }
}

/// Ends the machine: the agent is asked first, so that the guest writes back what it has, then the VMM is killed.
async fn stop(machine: &Machine) {
    if machine.begin_stop() && machine.cause().is_none() {
        if let Err(error) = machine.agent.shutdown(SHUTDOWN_LIMIT).await {
            warn!("{}", chain(&error));
        }
        if tokio::time::timeout(SHUTDOWN_LIMIT, machine.gone()).await.is_err()
            && let Some(vmm) = &machine.held.read().await.vmm
        {
            vmm.helper.kill();
        }
    }
    machine.gone().await;
}
