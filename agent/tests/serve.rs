//! Drives the agent as the shim does, with containers of busybox: `husk-agent serve` in namespaces of its own, the RPC connection and
//! the streams by Unix sockets. Needs root, cgroup v2 at /sys/fs/cgroup and busybox-static, so it runs in the test host:
//! `tests/testhost/testhost target/debug/deps/serve-… --ignored`

#![allow(clippy::unwrap_used, reason = "a test, helpers included")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use husk_agent_api::FIRST_STREAM_PORT;
use husk_agent_api::agent::*;
use husk_agent_api::agent_ttrpc::AgentClient;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_core::Emitable;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::RouteScope;
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use serde_json::{Value, json};
use tempfile::TempDir;
use ttrpc::Code;
use ttrpc::r#async::{Client, ClientStreamReceiver};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{Context, with_duration};

const PATIENCE: Duration = Duration::from_secs(60);

fn context() -> Context {
    with_duration(PATIENCE)
}

/// An agent, and what the tests call it with.
struct Pod {
    agent: Option<Child>,
    client: AgentClient,
    events: ClientStreamReceiver<Event>,
    directory: TempDir,
    port: AtomicU32,
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().ok();
            agent.wait().ok();
        }
    }
}

/// The shim's ends of a process's streams.
struct Streams {
    stdin: UnixStream,
    stdout: UnixStream,
    stderr: Option<UnixStream>,
}

fn read_all(mut stream: UnixStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn code(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("no status: {other}"),
    }
}

impl Pod {
    async fn start() -> Self {
        Self::start_with(
            "true",
            StartPodRequest { hostname: "pod-1".into(), entropy: vec![1; 64], ..Default::default() },
        )
        .await
    }

    /// The shell's command is run in the agent's namespaces before it.
    async fn start_with(prepare: &str, request: StartPodRequest) -> Self {
        let directory = tempfile::tempdir().unwrap();
        make_rootfs(&directory.path().join("rootfs"));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = Command::new("unshare")
            .args(["--mount", "--mount-proc", "--pid", "--fork", "--kill-child", "--net", "--uts", "--ipc", "sh", "-c"])
            .arg(format!("mount -t tmpfs run /run && mkdir -p /run/husk/shm && {prepare} && exec \"$0\" serve \"$1\""))
            .arg(env!("CARGO_BIN_EXE_husk-agent"))
            .arg(directory.path())
            .stdin(OwnedFd::from(theirs))
            .spawn()
            .unwrap();
        ours.set_nonblocking(true).unwrap();
        let client = Client::new(Socket::new(tokio::net::UnixStream::from_std(ours).unwrap()));
        let client = AgentClient::new(client);
        let response = client.start_pod(context(), &request).await.unwrap();
        assert!(!response.kernel.is_empty());
        let events = client.events(ttrpc::context::with_timeout(0), &Empty::new()).await.unwrap();
        Self { agent: Some(agent), client, events, directory, port: AtomicU32::new(FIRST_STREAM_PORT) }
    }

    fn listen(&self) -> (u32, UnixListener) {
        let port = self.port.fetch_add(1, Ordering::Relaxed);
        (port, UnixListener::bind(self.directory.path().join(port.to_string())).unwrap())
    }

    /// Creates a container that is to run a shell's script.
    async fn create(&self, id: &str, script: &str, change: impl FnOnce(&mut Value)) -> Streams {
        let mut spec = spec(id, &self.directory.path().join("rootfs"), script);
        change(&mut spec);
        let terminal = spec["process"]["terminal"].as_bool().unwrap();
        let (stdio, streams) = self.streams(terminal);
        let request = CreateContainerRequest {
            id: id.into(),
            spec: serde_json::to_vec(&spec).unwrap(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        assert!(self.client.create_container(context(), &request).await.unwrap().pid > 1);
        streams()
    }

    fn streams(&self, terminal: bool) -> (Stdio, impl FnOnce() -> Streams + use<>) {
        let (stdin_port, stdin) = self.listen();
        let (stdout_port, stdout) = self.listen();
        let (stderr_port, stderr) = self.listen();
        let stdio = Stdio {
            stdin_port,
            stdout_port,
            stderr_port: if terminal { 0 } else { stderr_port },
            terminal,
            width: 80,
            height: 24,
            ..Default::default()
        };
        let accept = move || Streams {
            stdin: stdin.accept().unwrap().0,
            stdout: stdout.accept().unwrap().0,
            stderr: (!terminal).then(|| stderr.accept().unwrap().0),
        };
        (stdio, accept)
    }

    async fn exec(&self, id: &str, exec_id: &str, arguments: Value) -> ttrpc::Result<Streams> {
        let (stdio, streams) = self.streams(false);
        let process = json!({
            "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": arguments,
            "env": ["PATH=/bin"], "terminal": false, "noNewPrivileges": true,
        });
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            process: serde_json::to_vec(&process).unwrap(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.client.exec_process(context(), &request).await?;
        Ok(streams())
    }

    async fn start_container(&self, id: &str) -> ttrpc::Result<Empty> {
        self.client.start_container(context(), &of(id)).await
    }

    async fn signal(&self, id: &str, exec_id: &str, signal: i32, all: bool) -> ttrpc::Result<Empty> {
        let request = SignalProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.client.signal_process(context(), &request).await
    }

    async fn delete(&self, id: &str) {
        self.client.delete_container(context(), &of(id)).await.unwrap();
        assert!(!Path::new("/sys/fs/cgroup/pod").join(cgroup(id)).exists());
    }

    async fn event(&mut self) -> Event {
        tokio::time::timeout(PATIENCE, self.events.recv())
            .await
            .expect("an event in time")
            .unwrap()
            .expect("a stream of events")
    }

    /// The next event, which is the end of that process.
    async fn exit_of(&mut self, id: &str, exec_id: &str) -> u32 {
        let event = self.event().await;
        assert!(event.has_exit(), "{event:?}");
        let exit = event.exit();
        assert_eq!((exit.id.as_str(), exit.exec_id.as_str()), (id, exec_id));
        assert!(exit.time_ns > 1_600_000_000_000_000_000);
        exit.status
    }
}

fn of(id: &str) -> ContainerRequest {
    ContainerRequest { id: id.into(), ..Default::default() }
}

fn cgroup(id: &str) -> String {
    format!("husk-test-{}-{id}", std::process::id())
}

fn make_rootfs(root: &Path) {
    for directory in ["bin", "proc", "dev", "sys", "tmp", "etc"] {
        std::fs::create_dir_all(root.join(directory)).unwrap();
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "echo", "sleep", "hostname", "head", "tty", "stty", "kill", "ps", "wc", "tail", "grep", "ls",
        "true", "ip",
    ] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
}

fn spec(id: &str, root: &Path, script: &str) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "terminal": false, "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["/bin/sh", "-c", script],
            "env": ["PATH=/bin"], "noNewPrivileges": true,
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
        },
        "root": {"path": root, "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev"]},
        ],
        "linux": {
            "cgroupsPath": format!("/{}", cgroup(id)),
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}],
            "resources": {"memory": {"limit": 64 << 20}, "pids": {"limit": 64}},
        },
    })
}

#[tokio::test]
#[ignore = "needs root and cgroup v2"]
async fn runs_a_container_and_tells_its_end() {
    let mut pod = Pod::start().await;
    let streams = pod.create("c", "hostname; echo bad >&2; cat; exit 7", |_| {}).await;
    let again = code(pod.exec("c", "x", json!(["true"])).await.err().unwrap());
    assert_eq!(again.0, Code::FAILED_PRECONDITION, "{}", again.1);
    pod.start_container("c").await.unwrap();
    assert_eq!(code(pod.start_container("c").await.unwrap_err()).0, Code::FAILED_PRECONDITION);
    (&streams.stdin).write_all(b"from stdin").unwrap();
    streams.stdin.shutdown(Shutdown::Write).unwrap();
    assert_eq!(pod.exit_of("c", "").await, 7);
    assert_eq!(read_all(streams.stdout), "pod-1\nfrom stdin");
    assert_eq!(read_all(streams.stderr.unwrap()), "bad\n");
    assert_eq!(code(pod.signal("c", "", 9, false).await.unwrap_err()).0, Code::NOT_FOUND);
    assert_eq!(code(pod.exec("c", "x", json!(["true"])).await.err().unwrap()).0, Code::FAILED_PRECONDITION);
    pod.delete("c").await;
    pod.delete("c").await;
    assert_eq!(code(pod.start_container("c").await.unwrap_err()).0, Code::NOT_FOUND);
}

/// A route over interface 71 of the host, as the shim sends it.
fn route<T>(builder: RouteMessageBuilder<T>) -> Vec<u8> {
    bytes(&builder.output_interface(71).build())
}

fn bytes(message: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

#[tokio::test]
#[ignore = "needs root and cgroup v2"]
async fn sets_the_network_up() {
    // The names are the wrong way round.
    let prepare = "mount -t sysfs sys /sys && mount -t cgroup2 cgroup2 /sys/fs/cgroup && \
        ip link add eth0 address 02:00:00:00:00:02 type veth peer name eth1 address 02:00:00:00:00:01";
    let interface = |index, mac: &str, name: &str, addresses: &[&str]| Interface {
        index,
        mac: mac.into(),
        name: name.into(),
        addresses: addresses.iter().map(|address| address.to_string()).collect(),
        mtu: 1400,
        ..Default::default()
    };
    let routes = [
        route(
            RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix([169, 254, 1, 1].into(), 32)
                .scope(RouteScope::Link),
        ),
        route(RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix("fd00::".parse().unwrap(), 64)),
        route(RouteMessageBuilder::<Ipv4Addr>::new().gateway([169, 254, 1, 1].into())),
        route(RouteMessageBuilder::<Ipv6Addr>::new().gateway("fd00::1".parse().unwrap())),
        route(RouteMessageBuilder::<Ipv4Addr>::new().gateway([169, 254, 1, 1].into()).table_id(300).priority(7)),
    ];
    let mut rule = RuleMessage::default();
    rule.header.family = AddressFamily::Inet;
    rule.header.src_len = 32;
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![RuleAttribute::Source([10, 1, 2, 3].into()), RuleAttribute::Table(300)];
    let neighbour = Neighbour {
        interface: "eth0".into(),
        address: "169.254.1.1".into(),
        mac: "02:00:00:00:00:99".into(),
        ..Default::default()
    };
    let request = StartPodRequest {
        interfaces: vec![
            interface(71, "02:00:00:00:00:01", "eth0", &["10.1.2.3/32", "fd00::3/64", "fe80::3/64"]),
            // A template's device, which gets the pod's address.
            Interface {
                device_mac: "02:00:00:00:00:02".into(),
                ..interface(72, "02:00:00:00:00:12", "net1", &["10.9.0.1/24"])
            },
        ],
        routes: routes.into(),
        rules: vec![bytes(&rule)],
        neighbours: vec![neighbour],
        sysctls: [("net.ipv4.ip_unprivileged_port_start".to_owned(), "80".to_owned())].into(),
        ..Default::default()
    };
    let mut pod = Pod::start_with(prepare, request).await;
    let script = "ip addr; ip route; ip -6 route; ip neigh; ip rule; ip route show table 300; cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
    let streams = pod.create("c", script, |_| {}).await;
    pod.start_container("c").await.unwrap();
    let said = read_all(streams.stdout);
    assert_eq!(pod.exit_of("c", "").await, 0, "{said}");
    for part in [
        "1: lo: <LOOPBACK,UP",
        ": eth0@",
        ": net1@",
        "mtu 1400",
        "inet 10.1.2.3/32",
        "inet 10.9.0.1/24",
        "link/ether 02:00:00:00:00:12",
        "inet6 fe80::ff:fe00:12/64 scope link",
        "inet6 fd00::3/64 scope global",
        "inet6 fe80::3/64 scope link",
        "from 10.1.2.3 lookup 300",
        "default via 169.254.1.1 dev eth0  metric 7",
        "default via 169.254.1.1 dev eth0",
        "169.254.1.1 dev eth0 scope link",
        "default via fd00::1 dev eth0",
        "169.254.1.1 dev eth0 lladdr 02:00:00:00:00:99",
        "\n80\n",
    ] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    assert!(!said.contains("tentative"), "{said}");
    // No route of the kernel's own for an address, no link-local address beside the one given.
    assert!(!said.contains("10.9.0.0/24"), "{said}");
    assert_eq!(said.matches("inet6 fe80::").count(), 2, "{said}");
    pod.delete("c").await;
}

#[tokio::test]
#[ignore = "needs root and cgroup v2"]
async fn nothing_of_the_agents_is_inherited() {
    let mut pod = Pod::start().await;
    // Without a shell, which has signal settings of its own.
    let plain = |arguments| move |spec: &mut Value| spec["process"]["args"] = arguments;
    let status = json!(["/bin/grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"]);
    let streams = pod.create("s", "", plain(status)).await;
    pod.start_container("s").await.unwrap();
    let said = read_all(streams.stdout);
    assert_eq!(pod.exit_of("s", "").await, 0);
    let (blocked, ignored) = said.split_once('\n').unwrap();
    assert_eq!(blocked, "SigBlk:\t0000000000000000");
    // The C library's posix_spawn ignores its two own signals, 32 and 33.
    let ignored = u64::from_str_radix(ignored.trim().strip_prefix("SigIgn:\t").unwrap(), 16).unwrap();
    assert_eq!(ignored & !(3 << 31), 0, "{said}");
    pod.delete("s").await;

    let script = "cd /proc/self; cat oom_score_adj; ls fd";
    let streams = pod.create("c", script, |_| {}).await;
    pod.start_container("c").await.unwrap();
    let said = read_all(streams.stdout);
    assert_eq!(pod.exit_of("c", "").await, 0, "{said}");
    // Descriptor 3 is that of the directory being listed.
    assert_eq!(said, "0\n0\n1\n2\n3\n");
    pod.delete("c").await;
}

#[tokio::test]
#[ignore = "needs root and cgroup v2"]
async fn a_command_that_is_not_there_is_named_at_once() {
    let mut pod = Pod::start().await;
    let missing = |spec: &mut Value| spec["process"]["args"] = json!(["/bin/nope"]);
    let _streams = pod.create("c", "", missing).await;
    let (_, message) = code(pod.start_container("c").await.unwrap_err());
    assert!(message.contains("/bin/nope"), "{message}");
    pod.exit_of("c", "").await;
    pod.delete("c").await;

    let _streams = pod.create("d", "sleep 1000", |_| {}).await;
    pod.start_container("d").await.unwrap();
    let (_, message) = code(pod.exec("d", "x", json!(["nope"])).await.err().unwrap());
    assert!(message.contains("nope"), "{message}");
    pod.delete("d").await;
    assert_eq!(pod.exit_of("d", "").await, 128 + 9);
}

#[tokio::test]
#[ignore = "needs root and cgroup v2"]
async fn execs_have_lives_of_their_own() {
    let mut pod = Pod::start().await;
    let _init = pod.create("c", "sleep 1000", |_| {}).await;
    pod.start_container("c").await.unwrap();
    let streams = pod.exec("c", "one", json!(["sh", "-c", "head -c 3000000 /dev/zero; exit 3"])).await.unwrap();
    assert_eq!(read_all(streams.stdout).len(), 3_000_000);
    assert_eq!(pod.exit_of("c", "one").await, 3);
    let taken = code(pod.exec("c", "one", json!(["true"])).await.err().unwrap());
    assert_eq!(taken.0, Code::ALREADY_EXISTS);
    let of_one = ProcessRequest { id: "c".into(), exec_id: "one".into(), ..Default::default() };
    pod.client.delete_process(context(), &of_one).await.unwrap();

    let streams = pod
        .exec("c", "one", json!(["sh", "-c", "trap 'exit 9' TERM; echo up; while :; do sleep 1; done"]))
        .await
        .unwrap();
    let mut up = [0; 3];
    (&streams.stdout).read_exact(&mut up).unwrap();
    assert_eq!(code(pod.client.delete_process(context(), &of_one).await.unwrap_err()).0, Code::FAILED_PRECONDITION);
    pod.signal("c", "one", 15, false).await.unwrap();
    assert_eq!(pod.exit_of("c", "one").await, 9);

    let _streams = pod.exec("c", "two", json!(["sleep", "1000"])).await.unwrap();
    let listed = pod.client.list_processes(context(), &of("c")).await.unwrap().processes;
    let mut exec_ids: Vec<_> = listed.iter().map(|process| process.exec_id.as_str()).collect();
    exec_ids.sort();
    assert_eq!(exec_ids, ["", "two"], "{listed:?}");
    pod.signal("c", "two", 10, false).await.unwrap();
    assert_eq!(pod.exit_of("c", "two").await, 128 + 10);
    assert_eq!(code(pod.signal("c", "three", 10, false).await.unwrap_err()).0, Code::NOT_FOUND);
    assert_eq!(code(pod.signal("c", "", 99, false).await.unwrap_err()).0, Code::INVALID_ARGUMENT);

    let _streams = pod.exec("c", "last", json!(["sleep", "1000"])).await.unwrap();
    pod.signal("c", "", 9, false).await.unwrap();
    assert_eq!(pod.exit_of("c", "last").await, 128 + 9);
    assert_eq!(pod.exit_of("c", "").await, 128 + 9);
    pod.delete("c").await;
}

#[tokio::test]
#[ignore = "needs root and cgroup v2"]
async fn a_terminal_is_one_stream_each_way() {
    let mut pod = Pod::start().await;
    let script = "tty; read line; stty size; echo got $line";
    let streams = pod.create("c", script, |spec| spec["process"]["terminal"] = true.into()).await;
    pod.start_container("c").await.unwrap();
    let resize = ResizeTerminalRequest { id: "c".into(), width: 123, height: 45, ..Default::default() };
    pod.client.resize_terminal(context(), &resize).await.unwrap();
    let mut name = [0; 12];
    (&streams.stdout).read_exact(&mut name).unwrap();
    assert_eq!(&name, b"/dev/pts/0\r\n");
    (&streams.stdin).write_all(b"word\n").unwrap();
    assert_eq!(pod.exit_of("c", "").await, 0);
    assert_eq!(read_all(streams.stdout), "word\r\n45 123\r\ngot word\r\n");
    pod.delete("c").await;
}

#[tokio::test]
#[ignore = "needs root and cgroup v2"]
async fn pauses_resumes_and_kills_the_paused() {
    let mut pod = Pod::start().await;
    let streams = pod.create("c", "while read line; do echo $line; done; sleep 1000", |_| {}).await;
    pod.start_container("c").await.unwrap();
    pod.client.pause_container(context(), &of("c")).await.unwrap();
    (&streams.stdin).write_all(b"one\n").unwrap();
    streams.stdout.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut line = [0; 4];
    assert!((&streams.stdout).read(&mut line).is_err());
    pod.client.resume_container(context(), &of("c")).await.unwrap();
    streams.stdout.set_read_timeout(Some(PATIENCE)).unwrap();
    (&streams.stdout).read_exact(&mut line).unwrap();
    assert_eq!(&line, b"one\n");
    pod.client.pause_container(context(), &of("c")).await.unwrap();
    pod.delete("c").await;
    assert_eq!(pod.exit_of("c", "").await, 128 + 9);
}

#[tokio::test]
#[ignore = "needs root and cgroup v2"]
async fn limits_figures_and_oom() {
    let mut pod = Pod::start().await;
    let _streams = pod.create("c", "sleep 1; tail /dev/zero", |_| {}).await;
    let stats = pod.client.stats_container(context(), &of("c")).await.unwrap();
    assert_eq!((stats.memory_max, stats.pids_max), (64 << 20, 64));
    let resources = json!({
        "memory": {"limit": 32 << 20},
        "cpu": {"quota": 70000, "period": 100000, "shares": 512, "cpus": "0", "mems": "0"},
        "pids": {"limit": 32},
        "unified": {"memory.high": "31457280"},
    });
    let resources = serde_json::to_vec(&resources).unwrap();
    let update = UpdateContainerRequest { id: "c".into(), resources, ..Default::default() };
    pod.client.update_container(context(), &update).await.unwrap();
    let stats = pod.client.stats_container(context(), &of("c")).await.unwrap();
    assert_eq!((stats.memory_max, stats.pids_max), (32 << 20, 32));
    pod.start_container("c").await.unwrap();
    let event = pod.event().await;
    assert!(event.has_oom() && event.oom().id == "c", "{event:?}");
    assert_eq!(pod.exit_of("c", "").await, 128 + 9);
    pod.delete("c").await;
}

#[tokio::test]
#[ignore = "needs root and cgroup v2"]
async fn a_fork_bomb_with_full_pipes_is_deleted() {
    let mut pod = Pod::start().await;
    let bomb = "bomb() { while :; do (bomb) & echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done; }; bomb 2>&1";
    let streams = pod.create("c", bomb, |_| {}).await;
    pod.start_container("c").await.unwrap();
    let mut some = [0; 1000];
    (&streams.stdout).read_exact(&mut some).unwrap();
    pod.delete("c").await;
    loop {
        let event = pod.event().await;
        if event.has_exit() {
            assert_eq!(event.exit().status, 128 + 9);
            break;
        }
    }
}

#[tokio::test]
#[ignore = "needs root and cgroup v2"]
async fn containers_share_the_pods_processes() {
    let mut pod = Pod::start().await;
    let shared = |spec: &mut Value| spec["linux"]["namespaces"][0] = json!({"type": "pid", "path": "/run/husk/ns/pid"});
    let _one = pod.create("one", "sleep 1000 & sleep 1001", shared).await;
    pod.start_container("one").await.unwrap();
    let two = pod.create("two", "ps", shared).await;
    pod.start_container("two").await.unwrap();
    assert_eq!(pod.exit_of("two", "").await, 0);
    let listed = read_all(two.stdout);
    assert!(listed.contains("sleep 1001"), "{listed}");
    // The end of its first process ends all of a container.
    pod.signal("one", "", 9, false).await.unwrap();
    assert_eq!(pod.exit_of("one", "").await, 128 + 9);
    pod.delete("one").await;
    pod.delete("two").await;
}

#[tokio::test]
#[ignore = "needs root and cgroup v2"]
async fn a_lost_connection_ends_everything() {
    let mut pod = Pod::start().await;
    let _streams = pod.create("c", "sleep 1000", |_| {}).await;
    pod.start_container("c").await.unwrap();
    let Pod { agent, .. } = &mut pod;
    let mut agent = agent.take().unwrap();
    drop(pod);
    let deadline = Instant::now() + PATIENCE;
    while agent.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "the agent is still there");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let directory = Path::new("/sys/fs/cgroup/pod").join(cgroup("c"));
    assert_eq!(std::fs::read_to_string(directory.join("cgroup.procs")).unwrap(), "");
    std::fs::remove_dir(directory).unwrap();
}
