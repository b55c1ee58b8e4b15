"""A database in a pod, which depends on what a file system does right: PostgreSQL under pgbench, its files on an ext4 volume."""

import time

from harness.command import run
from harness.crictl import crictl, pod
from harness.runner import deadline, full

from .judges import volume
from .single import CTR

# What must hold among pgbench's tables after any number of whole transactions: a division by zero if it does not.
SUMS = """SELECT 1 / (count(*) = {transactions})::int FROM pgbench_history;
SELECT 1 / ((SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)
        AND (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(delta) FROM pgbench_history)
        AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(delta) FROM pgbench_history))::int;
"""
SERVE = "[ -e /volume/db ] || initdb --pgdata=/volume/db --auth=trust --no-locale && exec postgres -D /volume/db -k /tmp -c listen_addresses="


@deadline(full(240, 3000))
def test_postgres(containerd):
    """PostgreSQL has its files on a volume (which it makes there with HUSK_TEST_FULL): pgbench's transactions pass, it ends when told to, and
    another container finds all of them."""
    containerd.load("judges")
    user = {"security_context": {"run_as_user": {"value": 1000}}}
    transactions = full(25, 5000)
    with volume() as folder, pod() as it:
        if not full(False, True):
            # The image's empty database, by runc: thousands of new files take a minute in the emulated guest.
            run(*CTR, "run", "--rm", "--mount", f"type=bind,src={folder},dst=/volume,options=rbind:rw", "husk.test/judges:1", "copies",
                "cp", "-a", "/home/user/db", "/volume/db")
        mounts = [{"host_path": folder, "container_path": "/volume"}]
        server = it.start(["sh", "-c", SERVE], image="judges", mounts=mounts, linux=dict(user))
        _serves(server)
        server.exec("pgbench", "-h", "/tmp", "-i", "-I", "dtGp", "postgres")
        said = server.exec("pgbench", "-h", "/tmp", "-n", "-c", "2", "-t", str(transactions), "postgres")
        assert f"actually processed: {2 * transactions}/{2 * transactions}" in said, said
        crictl("stop", "--timeout", "60", server.id)
        assert server.status()["exitCode"] == 0, server.log_file().read_text()
        assert "database system is shut down" in server.log_file().read_text(), server.log_file().read_text()
        again = it.start(["sh", "-c", SERVE], image="judges", mounts=mounts, linux=dict(user))
        _serves(again)
        assert "database system was shut down at" in again.log_file().read_text(), again.log_file().read_text()
        again.exec("sh", "-c", f"echo '{SUMS.format(transactions=2 * transactions)}' > /tmp/sums")
        said = again.exec("pgbench", "-h", "/tmp", "-n", "-t", "1", "-f", "/tmp/sums", "postgres")
        assert "actually processed: 1/1" in said, said


def _serves(server, within=full(60, 600)):
    end = time.monotonic() + within
    while "ready to accept connections" not in (said := server.log_file().read_text()):
        assert time.monotonic() < end and server.state() == "CONTAINER_RUNNING", said
        time.sleep(0.2)
