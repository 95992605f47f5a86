"""What is measured. Each workload has cases, and measures one case of one contender at a time."""

import contextlib
import csv
import json
import socket
import subprocess
import time
from dataclasses import dataclass
from functools import partial
from typing import Callable

from contenders import FOLDER, Cpu, Failed, Lbd, ask, find

BODY = 64 << 20
CLOSE = ["-H", "Connection: close"]


@dataclass(frozen=True)
class Case:
    """One row of a table for each contender."""

    label: str
    # Of a `Run` and the `Context`; gives back a `Sample`.
    measure: Callable
    workers: int = 4


def everybody(contenders):
    return contenders


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    unit: str
    cases: tuple
    # What has to be installed for it.
    programs: tuple = ("wrk",)
    less_is_better: bool = False
    digits: int = 0
    # Made of the contenders that were chosen: those that take part.
    field: Callable = everybody
    # Whether the cases are one thing growing, so that each is to be compared with the first.
    grows: bool = False


@dataclass(frozen=True)
class Sample:
    """What one measurement came to."""

    value: float
    # In microseconds for each request, where there are requests.
    cpu: Cpu | None = None


def load(run, context, *arguments, connections=50, path=""):
    """Drives the contender with wrk, first to warm up, and gives back wrk's counts."""

    def once(seconds):
        command = [find("wrk"), "-t", "1", "-c", str(connections), "-d", f"{seconds}s", "-s",
                   FOLDER / "wrk.lua", "--timeout", "30s", *arguments, run.url + path]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    once(1)
    before = run.cpu()
    counts = once(context.seconds)
    if counts["failed"] or not counts["bytes"]:
        raise Failed(f"{run.contender.name}: requests failed: {counts['failed'] or 'all'}")
    # Of bodies the bytes say more, since they are few, and some are cut off at the end.
    count = counts["bytes"] / BODY if path else counts["requests"]
    counts["cpu"] = run.cpu().since(before, count)
    return counts


def requests(run, context, *arguments):
    counts = load(run, context, *arguments)
    return Sample(counts["requests"] / counts["seconds"], counts["cpu"])


def bodies(run, context):
    counts = load(run, context, connections=8, path="big")
    return Sample(counts["bytes"] / counts["seconds"] / 1e9, counts["cpu"])


def idle_memory(run, context):
    # What is allocated once, for the first connections, is not what an idle one costs.
    with hold(run, 100):
        pass
    time.sleep(0.5)
    before = run.private_bytes()
    count = 3000
    with hold(run, count):
        return Sample((run.private_bytes() - before) / count / 1024)


def beside_held(count, run, context):
    with hold(run, count):
        return requests(run, context, *CLOSE)


@contextlib.contextmanager
def hold(run, count):
    """Connections that have had an answer each, and stay open."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(socket.create_connection(run.address, 10))
            ask(client)
        yield


def latency(run, context, keep_alive=False):
    """p99 in milliseconds at half of what the better peer can do, from when each was due."""
    rate = context.rate(keep_alive)
    count = int(rate * context.seconds)
    table = run.folder / "latency.csv"
    command = [context.lbd, "bench", "--url", run.url, "--requests", count, "--concurrency", 100,
               "--rate", rate, "--csv", table] + ["--keep-alive"] * keep_alive
    before = run.cpu()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    cpu = run.cpu().since(before, count)
    if done.returncode != 0:
        raise Failed(f"lbd bench: {done.stderr.strip()}")
    with table.open() as file:
        row = next(csv.DictReader(file))
    if row["Failed requests"] != "0":
        raise Failed(f"{run.contender.name}: {row['Failed requests']} requests failed")
    return Sample(float(row["p99 (ms)"]), cpu)


def by_ab(run, context):
    """The same as new connections, by the tool that everybody has; HTTP/1.0."""

    def once(seconds):
        command = [find("ab"), "-q", "-t", str(seconds), "-n", "10000000", "-c", "50", run.url]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        fields = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
        if int(fields["Failed requests"]):
            raise Failed(f"{run.contender.name}: requests failed by ab")
        return int(fields["Complete requests"]), float(fields["Time taken for tests"].split()[0])

    once(1)
    before = run.cpu()
    count, seconds = once(context.seconds)
    return Sample(count / seconds, run.cpu().since(before, count))


def new_connections(run, context):
    return requests(run, context, *CLOSE)


def with_and_without_log(contenders):
    """lbd against itself: the one without a log is the peer."""
    programs = [contender.program for contender in contenders if isinstance(contender, Lbd)]
    pairs = [(Lbd("log on", program, log=True), Lbd("log off", program)) for program in programs[:1]]
    for _, without in pairs:
        without.is_peer = True
    return [contender for pair in pairs for contender in pair]


ALL = (
    Workload("new-connections", "A new connection for each request, 50 at a time", "requests/s",
             (Case("", new_connections),)),
    Workload("keep-alive", "Requests on 50 kept connections", "requests/s",
             (Case("", requests),)),
    Workload("bodies", "64 MiB bodies, 8 at a time", "GB/s",
             (Case("", bodies),), digits=2),
    Workload("memory", "Memory of an idle connection, of 3,000 held", "KiB",
             (Case("", idle_memory),), programs=(), less_is_better=True, digits=2),
    Workload("latency", "p99 at half of the better peer's peak, counted from when each was due",
             "ms", (Case("new connections", latency),
                    Case("keep-alive", partial(latency, keep_alive=True))),
             less_is_better=True, digits=2),
    Workload("access-log", "New connections, 50 at a time, with a line in lbd's log for each",
             "requests/s", (Case("", new_connections),), field=with_and_without_log),
    Workload("held", "New connections, 50 at a time, beside others that are held", "requests/s",
             tuple(Case(f"{count:,} held", partial(beside_held, count))
                   for count in (10, 100, 1000, 8000)), grows=True),
    Workload("workers", "New connections, 50 at a time, by the number of workers", "requests/s",
             tuple(Case(f"{count} workers", new_connections, workers=count)
                   for count in (2, 4, 16, 64)), grows=True),
    Workload("ab", "A new connection for each request, 50 at a time, by ab", "requests/s",
             (Case("", by_ab),), programs=("ab",)),
)
