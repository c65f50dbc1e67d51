"""When a GPU had nothing to do in one iteration: python -m tools.gpu_check.idle <trace of benchmark.py --trace>.

Prints how many kernels were launched, how long the GPU was at work and how long it was not, the longest gaps with the operator
that launched the kernel after each, and the kernels that took most of the time. The profiler makes the host slower: where the
host is the limit, the gaps are longer than without it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cpu_op", "cuda_runtime", "cuda_driver")
GAPS, KERNELS = 10, 15


@dataclass(frozen=True)
class Event:
    """start, end: microseconds. thread: of the host. launch: the number that a kernel and the call that launched it share."""

    kind: str
    name: str
    start: float
    end: float
    thread: Any
    launch: int | None


@dataclass(frozen=True)
class Gap:
    """Microseconds without work, and what came before and after; None at the ends of the iteration."""

    length: float
    before: Event | None
    after: Event | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help=".json or .json.gz")
    events = read(parser.parse_args().trace)
    found = gaps(events)
    length, idle = span(events) / 1e3, sum(gap.length for gap in found) / 1e3
    launches = sum(event.kind == "kernel" for event in events)
    print(f"{launches} launches; of {length:.2f} ms the GPU was idle for {idle:.2f} ms ({idle / length:.1%})")
    for gap in sorted(found, key=lambda gap: gap.length, reverse=True)[:GAPS]:
        before = gap.before.name[:60] if gap.before else "the start"
        after = f"{gap.after.name[:60]} of {operator(gap.after, events)}" if gap.after else "the end"
        print(f"{gap.length / 1e3:9.3f} ms after {before}, before {after}")
    for name, time in kernel_times(events).most_common(KERNELS):
        print(f"{time / 1e3:9.3f} ms in {name[:100]}")


def read(path: Path) -> list[Event]:
    """The events of GPU and host that last some time."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [row for row in json.loads(text)["traceEvents"] if row.get("cat") in ON_GPU + ON_HOST and "dur" in row]
    return [
        Event(row["cat"], row["name"], row["ts"], row["ts"] + row["dur"], row["tid"], row.get("args", {}).get("correlation"))
        for row in rows
    ]


def span(events: Iterable[Event]) -> float:
    return max(event.end for event in events) - min(event.start for event in events)


def gaps(events: Sequence[Event]) -> list[Gap]:
    """The times in which nothing ran on any stream, in order."""
    found, last = [], None
    now = min(event.start for event in events)
    for event in sorted((event for event in events if event.kind in ON_GPU), key=lambda event: event.start):
        if event.start > now:
            found.append(Gap(event.start - now, last, event))
        if event.end > now:
            now, last = event.end, event
    rest = max(event.end for event in events) - now
    return found + ([Gap(rest, last, None)] if rest else [])


def kernel_times(events: Iterable[Event]) -> Counter[str]:
    """Microseconds by the names of kernels."""
    times: Counter[str] = Counter()
    for event in events:
        if event.kind == "kernel":
            times[event.name] += event.end - event.start
    return times


def operator(work: Event, events: Sequence[Event]) -> str:
    """The innermost operator of the host in which a kernel or copy was launched."""
    calls = [one for one in events if one.kind in ("cuda_runtime", "cuda_driver") and one.launch == work.launch]
    around = [
        one for call in calls for one in events
        if one.kind == "cpu_op" and one.thread == call.thread and one.start <= call.start < one.end
    ]  # fmt: skip
    return max(around, key=lambda one: one.start).name if around else "no operator"


if __name__ == "__main__":
    sys.exit(main())
