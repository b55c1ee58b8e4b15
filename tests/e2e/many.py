"""Many at once."""

import concurrent.futures

from harness.crictl import Pod
from harness.runner import deadline


@deadline(300)
def test_ten_pods_at_once():
    """10 pods started together all run, and are gone without a trace after removal."""
    pods = [Pod() for _ in range(10)]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        try:
            list(pool.map(lambda it: it.run(timeout=200), pods))
            boxes = list(pool.map(lambda it: it.start(["sleep", "1000"]), pods))
            assert [box.state() for box in boxes] == ["CONTAINER_RUNNING"] * 10
            assert len({it.address() for it in pods}) == 10
        finally:
            list(pool.map(lambda it: it.remove() if it.id else None, pods))


@deadline(240)
def test_twenty_execs_at_once():
    """20 execs at once in one container each give their own output."""
    it = Pod().run()
    try:
        box = it.start(["sleep", "1000"])
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            said = list(pool.map(lambda n: box.exec("echo", f"number {n}", timeout=200), range(20)))
        assert said == [f"number {n}" for n in range(20)]
    finally:
        it.remove()
