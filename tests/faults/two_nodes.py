"""Two nodes, one of which is cut off in the middle: the job ends, names the other node, and goes on
as if nothing had been.

    sudo python -m tests.faults.two_nodes [--trials 20] [--at_once 3] [--timeout 15]

Two network namespaces with addresses and host names of their own, joined by a switch in a third,
run the published two-node command on generated data. Needs root and iproute2; nothing outside of
the namespaces is touched. Prints a line for each case, and compares the ends of runs that went on
with that of a run that was left alone: weights, optimiser, random states, log.txt.
"""

from __future__ import annotations

import argparse
import itertools
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.faults.compare import differences
from tests.faults.one_node import LEAVING, training_flags
from tests.helpers import ROOT, environment
from util.errors import EXIT_LOST_PROCESS

ADDRESSES = ["10.77.0.1", "10.77.0.2"]
MIDDLE = r"epoch 1 \S+ \[ *6/"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20, help="how often a node is cut off (20)")
    parser.add_argument("--at_once", type=int, default=3, help="pairs of nodes at the same time (3)")
    parser.add_argument("--timeout", type=int, default=15, help="--dist_timeout of the runs, in seconds (15)")
    args = parser.parse_args()
    if os.geteuid() or not shutil.which("ip"):
        print("this needs root, and iproute2")
        return 2
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.at_once) as pool:
        work = Path(name)
        flags = training_flags(work, args.timeout)
        with network() as net:
            whole = [Node(net, node, [*flags, str(work / "whole")]) for node in (0, 1)]
            sound = report(
                "left alone", [node.wait() for node in whole] == [0, 0], f"exit codes {codes(whole)}", whole
            )
        cut = list(
            pool.map(
                lambda number: cut_off([*flags, str(work / f"cut{number}")], args.timeout), range(args.trials)
            )
        )
        seconds = [trial[1] for trial in cut]
        print(
            f"cut off: {sum(good for good, _ in cut)} of {len(cut)} ended and named the other "
            f"node, {min(seconds):.0f} to {max(seconds):.0f} s after it (--dist_timeout "
            f"{args.timeout})",
            flush=True,
        )
        sound &= all(good for good, _ in cut)
        with network() as net:
            again = [Node(net, node, [*flags, str(work / "cut0")]) for node in (0, 1)]
            sound &= ends_alike("cut off, started again by hand", again, work / "cut0", work / "whole")
        sound &= comes_back([*flags, str(work / "cable")], work / "cable", work / "whole", power=False)
        sound &= comes_back([*flags, str(work / "power")], work / "power", work / "whole", power=True)
    return 0 if sound else 1


def cut_off(flags: list[str], timeout: int) -> tuple[bool, float]:
    """Packets vanish on the way to node 1 in the second epoch. Whether all was as it should be, and
    the seconds to the end.
    """
    with network() as net:
        nodes = [Node(net, node, flags) for node in (0, 1)]
        nodes[0].wait_for(MIDDLE)
        net.block()
        start = time.monotonic()
        for node in nodes:
            node.wait()
        seconds = time.monotonic() - start
        told = [next((line for line in node.lines if line.startswith("error: ")), "") for node in nodes]
        at_fault = (r"no sign of life for \d+ s from rank 1 on node1 ", r"no answer .* and rank 0 on node0 ")
        operation = r".*last known operation: '[^']*epoch 1"
        named = all(re.search(who + operation, line) for who, line in zip(at_fault, told, strict=True))
        quiet = not any("Traceback" in line for node in nodes for line in node.lines)
        sound = named and quiet and seconds < timeout + LEAVING and codes(nodes) == [EXIT_LOST_PROCESS] * 2
        report("cut off", sound, f"exit codes {codes(nodes)}, {seconds:.0f} s after it", nodes)
        print(*(f"    node {node}: {line}" for node, line in enumerate(told)), sep="\n", flush=True)
    return sound, seconds


def comes_back(flags: list[str], folder: Path, whole: Path, power: bool) -> bool:
    """Node 1 loses its power, or its cable is pulled until its launcher gives up. The same command
    there joins the job again, which waits with MAX_RESTARTS=1.
    """
    with network() as net:
        nodes = [Node(net, node, flags, MAX_RESTARTS="1") for node in (0, 1)]
        nodes[0].wait_for(MIDDLE)
        net.block()
        if power:
            nodes[1].power_off()
        else:
            nodes[1].wait()
        nodes[0].wait_for("^error: no sign of life")
        net.unblock()
        nodes[1] = Node(net, 1, flags, MAX_RESTARTS="1")
        what = "power off" if power else "cable pulled"
        return ends_alike(f"{what}, started there again, joined", nodes, folder, whole)


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

    def __init__(self, net: Network, number: int, flags: list[str], **variables: str) -> None:
        place = {
            "MASTER_ADDR": ADDRESSES[0],
            "NODE_RANK": str(number),
            "GPUS_PER_NODE": "1",
            "JOIN_SECONDS": "120",
        }
        named = ["unshare", "--uts", "sh", "-c", f'hostname node{number}; exec "$@"', "sh"]
        command = ["./tools/run_dist_launch.sh", "2", "main.py", *flags]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", net.nodes[number], *named, *command],
            cwd=ROOT,
            env=environment(**place, **variables),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._number, self._name = number, net.nodes[number]
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
        pids = run("ip", "netns", "pids", self._name).split()
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
        self.wait()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line.rstrip())


class Network:
    """Two namespaces as nodes, and one as the switch between them."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        job = f"{os.getpid()}-{next(self._numbers)}"
        self.switch, self.nodes = f"switch-{job}", [f"node{node}-{job}" for node in (0, 1)]
        for name in (self.switch, *self.nodes):
            run("ip", "netns", "add", name)
        run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", self.switch, "link", "set", "bridge", "up")
        for number, (name, address) in enumerate(zip(self.nodes, ADDRESSES, strict=True)):
            port = ("name", f"port{number}", "netns", self.switch)
            run("ip", "-n", name, "link", "add", "net", "type", "veth", "peer", *port)
            run("ip", "-n", self.switch, "link", "set", f"port{number}", "master", "bridge", "up")
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "net")
            run("ip", "-n", name, "link", "set", "net", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")

    def block(self) -> None:
        """The switch swallows what comes and goes; the nodes see a link that is up."""
        run("bridge", "-n", self.switch, "link", "set", "dev", "port1", "state", "0")

    def unblock(self) -> None:
        run("bridge", "-n", self.switch, "link", "set", "dev", "port1", "state", "3")

    def remove(self) -> None:
        for name in (*self.nodes, self.switch):
            for pid in run("ip", "netns", "pids", name, check=False).split():
                os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "delete", name, check=False)


@contextmanager
def network() -> Iterator[Network]:
    net = Network()
    try:
        yield net
    finally:
        net.remove()


def run(*command: str, check: bool = True) -> str:
    return subprocess.run(command, check=check, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
