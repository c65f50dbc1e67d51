"""Two nodes, one of which is cut off in the middle: the job ends, says what was lost, and goes on as if nothing had been.

    sudo python -m tests.faults.two_nodes [--timeout 20]

Two network namespaces with addresses and host names of their own, joined by a switch in a third, run the published two-node
command on generated data. Needs root and iproute2; nothing outside of the namespaces is touched. Prints a line for each
case, and compares the ends of all runs with that of a run that was left alone: weights, optimiser, random states, log.txt.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.compare import differences
from tests.faults.one_node import training_flags
from tests.helpers import ROOT, environment
from util.errors import EXIT_LOST_PROCESS

SWITCH = f"switch{os.getpid()}"
NAMES = [f"node{node}-{os.getpid()}" for node in (0, 1)]
ADDRESSES = ["10.77.0.1", "10.77.0.2"]
LEAVING = 15  # seconds that may pass after --dist_timeout: the launchers ask each other for the reason, and end what is left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=int, default=20, help="--dist_timeout of the runs, in seconds (20)")
    args = parser.parse_args()
    if os.geteuid() or not shutil.which("ip"):
        print("this needs root, and iproute2")
        return 2
    with tempfile.TemporaryDirectory() as work, namespaces():
        return 0 if all(list(results(Path(work), args.timeout))) else 1


def results(work: Path, timeout: int) -> Iterator[bool]:
    flags = training_flags(work, timeout)
    whole = [Node(node, [*flags, str(work / "whole")]) for node in (0, 1)]
    yield report("left alone", [node.wait() for node in whole] == [0, 0], f"exit codes {codes(whole)}", whole)
    yield from cut_off([*flags, str(work / "cut")], work / "cut", work / "whole", timeout)
    yield link_fails([*flags, str(work / "link")], work / "link", work / "whole")
    yield comes_back([*flags, str(work / "back")], work / "back", work / "whole")


def cut_off(flags: list[str], folder: Path, whole: Path, timeout: int) -> Iterator[bool]:
    """Packets vanish on the way to node 1 in the second epoch; when all has ended, both are started again by hand."""
    nodes = [Node(node, flags) for node in (0, 1)]
    nodes[0].wait_for(r"epoch 1 \[ *6/")
    block()
    start = time.monotonic()
    for node in nodes:
        node.wait()
    seconds = time.monotonic() - start
    unblock()
    told = [next((line for line in node.lines if line.startswith("error: ")), "").strip() for node in nodes]
    expected = ("no sign of life from rank 1 on node1", "the job's store at 10.77.0.1:29500 has not answered")
    clear = all(text in line and "epoch 1" in line for text, line in zip(expected, told, strict=True))  # what it trains, or saves
    quiet = not any("Traceback" in line for node in nodes for line in node.lines)
    sound = clear and quiet and seconds < timeout + LEAVING and codes(nodes) == [EXIT_LOST_PROCESS] * 2
    what = f"exit codes {codes(nodes)}, {seconds:.0f} s after it (--dist_timeout {timeout})"
    yield report("cut off: both ended", sound, what, nodes)
    for node, line in enumerate(told):
        print(f"    node {node}: {line}")
    yield ends_alike("cut off, started again by hand", [Node(node, flags) for node in (0, 1)], folder, whole)


def link_fails(flags: list[str], folder: Path, whole: Path) -> bool:
    """The interface of node 1 goes down, and up again when both have noticed: with MAX_RESTARTS=1 they meet by themselves."""
    nodes = [Node(node, flags, MAX_RESTARTS="1") for node in (0, 1)]
    nodes[0].wait_for(r"epoch 1 \[ *6/")
    link("down")
    for node in nodes:
        node.wait_for("starting again: attempt 1 of 1")
    link("up")
    return ends_alike("link down and up, met again", nodes, folder, whole)


def comes_back(flags: list[str], folder: Path, whole: Path) -> bool:
    """Node 1 loses its power, and comes back: the same command there joins the job, which waits with MAX_RESTARTS=1."""
    nodes = [Node(node, flags, MAX_RESTARTS="1") for node in (0, 1)]
    nodes[0].wait_for(r"epoch 1 \[ *6/")
    block()
    nodes[1].power_off()
    nodes[0].wait_for("starting again: attempt 1 of 1")
    unblock()
    nodes[1] = Node(1, flags, MAX_RESTARTS="1")
    return ends_alike("power off, started there again, joined", nodes, folder, whole)


def ends_alike(name: str, nodes: list[Node], folder: Path, whole: Path) -> bool:
    """Wait for the end, and compare it with that of the run that was left alone."""
    sound = [node.wait() for node in nodes] == [0, 0]
    wrong = differences(whole, folder) if sound else ["did not end"]
    return report(name, sound and not wrong, str(wrong or "identical"), nodes)


def report(name: str, sound: bool, what: str, nodes: list[Node]) -> bool:
    print(f"{'ok' if sound else 'FAILED'}: {name}: {what}", flush=True)
    if not sound:
        for number, node in enumerate(nodes):
            print(f"--- node {number}", *node.lines[-40:], sep="\n")
    return sound


def codes(nodes: list[Node]) -> list[int | None]:
    return [node.process.poll() for node in nodes]


class Node:
    """The published two-node command in a namespace."""

    def __init__(self, number: int, flags: list[str], **variables: str) -> None:
        place = {"MASTER_ADDR": ADDRESSES[0], "NODE_RANK": str(number), "GPUS_PER_NODE": "1", "JOIN_SECONDS": "120"}
        named = ["unshare", "--uts", "sh", "-c", f'hostname node{number}; exec "$@"', "sh"]
        command = ["./tools/run_dist_launch.sh", "2", "main.py", *flags]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", NAMES[number], *named, *command], cwd=ROOT,
            env=environment(**place, **variables), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._number = number
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait(self) -> int:
        code = self.process.wait(300)
        self._reader.join(10)
        return code

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + 300
        while not any(re.search(pattern, line) for line in self.lines):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"node {self._number} never said {pattern!r}:\n" + "\n".join(self.lines))
            time.sleep(0.02)

    def power_off(self) -> None:
        """Kill everything in the namespace at once."""
        pids = run("ip", "netns", "pids", NAMES[self._number]).split()
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
        self.wait()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line.rstrip())


@contextmanager
def namespaces() -> Iterator[None]:
    try:
        for name in (SWITCH, *NAMES):
            run("ip", "netns", "add", name)
        run("ip", "-n", SWITCH, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", SWITCH, "link", "set", "bridge", "up")
        for number, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            port = ("name", f"port{number}", "netns", SWITCH)
            run("ip", "-n", name, "link", "add", "net", "type", "veth", "peer", *port)
            run("ip", "-n", SWITCH, "link", "set", f"port{number}", "master", "bridge", "up")
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "net")
            run("ip", "-n", name, "link", "set", "net", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in (*NAMES, SWITCH):
            for pid in run("ip", "netns", "pids", name, check=False).split():
                os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "delete", name, check=False)


def block() -> None:
    """The switch swallows what comes and goes; the nodes see a link that is up."""
    run("bridge", "-n", SWITCH, "link", "set", "dev", "port1", "state", "0")


def unblock() -> None:
    run("bridge", "-n", SWITCH, "link", "set", "dev", "port1", "state", "3")


def link(state: str) -> None:
    run("ip", "-n", NAMES[1], "link", "set", "net", state)


def run(*command: str, check: bool = True) -> str:
    return subprocess.run(command, check=check, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
