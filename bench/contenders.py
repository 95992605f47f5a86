"""Who is measured: each starts workers, and what stands in front of them, on free ports.

A further one is a class with `launch` and a line in `known()`; see README.md.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import string
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


class Failed(Exception):
    """What could not be measured, in one sentence."""


class Contender:
    """One way to get a connection from a client to one of several workers.

    Used as `with contender.run(workers) as run:`, where `run.address` is what clients connect to.
    """

    name = ""
    # Those that lbd is measured against.
    is_peer = False
    # No balancer at all, to see what one costs.
    is_limit = False
    # The signal that ends it at once, whatever it holds.
    stop = signal.SIGTERM

    def version(self):
        """What it calls itself, or None where it is not installed."""
        raise NotImplementedError

    def launch(self, run):
        """Starts everything, by `run.start`; clients will connect to `run.listen`."""
        raise NotImplementedError

    def await_workers(self, run):
        """Returns once every worker takes connections, where an answer to a client says less."""

    def run(self, worker, workers):
        return Run(self, worker, workers)


class Peer(Contender):
    """One that takes workers as they are: they are started beside it."""

    is_peer = True
    program = ""

    def version(self):
        path = find(self.program)
        if not path:
            return None
        shown = subprocess.run([path, "-v"], capture_output=True, text=True)
        return (shown.stdout + shown.stderr).splitlines()[0]

    def start_workers(self, run):
        for port in run.ports:
            run.start([run.worker, str(port)])
        # A balancer that finds one missing leaves it out for a while, or resets connections.
        for port in run.ports:
            run.wait_for(("127.0.0.1", port), 1)


class Haproxy(Peer):
    name = program = "haproxy"

    def launch(self, run):
        self.start_workers(run)
        lines = [f"    server w{port} 127.0.0.1:{port}" for port in run.ports]
        config = run.fill("haproxy.cfg", servers="\n".join(lines))
        run.start([find("haproxy"), "-db", "-f", config], stop=self.stop)


class Nginx(Peer):
    name = program = "nginx"

    def version(self):
        module = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
        return super().version() if module.exists() else None

    def launch(self, run):
        self.start_workers(run)
        lines = [f"        server 127.0.0.1:{port};" for port in run.ports]
        config = run.fill("nginx.conf", servers="\n".join(lines))
        run.start([find("nginx"), "-e", run.folder / "nginx.log", "-c", config], stop=self.stop)


class Lbd(Contender):
    """lbd starts its workers itself."""

    stop = signal.SIGQUIT

    def __init__(self, name, program, config="lbd.toml", log=False, prefix=()):
        self.name, self.program, self.config, self.log = name, program, config, log
        # What runs it.
        self.prefix = prefix

    def version(self):
        if not os.access(self.program, os.X_OK):
            return None
        shown = subprocess.run([self.program, "--version"], capture_output=True, text=True)
        return shown.stdout.strip()

    def launch(self, run):
        config = run.fill(self.config, access=str(self.log).lower())
        run.start([*self.prefix, self.program, "--config", config], stop=self.stop)

    def await_workers(self, run):
        # It serves as soon as the first is healthy.
        command = [self.program, "status", "--json", "--config", run.folder / self.config]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            shown = subprocess.run(list(map(str, command)), capture_output=True, check=True)
            workers = json.loads(shown.stdout)["services"][0]["workers"]
            if all(worker["state"] == "healthy" for worker in workers):
                return
            time.sleep(0.05)
        raise Failed(f"{self.name} has workers that do not become healthy")


class Shared(Contender):
    """No balancer: the workers share the port by SO_REUSEPORT, and the kernel spreads connections by
    a hash. What `route = "direct"` is held against."""

    name = "reuseport"
    is_limit = True

    def version(self):
        return "plain SO_REUSEPORT, no lbd"

    def launch(self, run):
        for _ in run.ports:
            run.start([run.worker, str(run.address[1]), "--reuseport"])


def known(program):
    """All contenders, in the order of the tables. The first is what the others are compared with."""
    direct = [Lbd("lbd direct", program, config="lbd-direct.toml")]
    setpriv = find("setpriv")
    if os.geteuid() == 0 and setpriv:
        # As any other user, for whom "lbd direct" is the same: without a capability for eBPF.
        without = [setpriv, "--bounding-set=-bpf,-sys_admin"]
        direct.append(Lbd("lbd classic", program, config="lbd-direct.toml", prefix=without))
    return [
        Lbd("lbd", program),
        Lbd("lbd unix", program, config="lbd-unix.toml"),
        Haproxy(),
        Nginx(),
        *direct,
        Shared(),
    ]


@dataclass(frozen=True)
class Cpu:
    """CPU time in seconds: of the balancer's processes, and of these, the workers and the load."""

    balancer: float
    everything: float

    def since(self, before, requests):
        """Microseconds for each of so many requests."""
        return Cpu(
            (self.balancer - before.balancer) / requests * 1e6,
            (self.everything - before.everything) / requests * 1e6,
        )


class Run:
    """One contender at work: its processes, its ports and its temporary folder."""

    def __init__(self, contender, worker, workers):
        self.contender, self.worker = contender, str(worker)
        port, *self.ports = free_ports(workers + 1)
        self.address = ("127.0.0.1", port)
        self.listen = f"127.0.0.1:{port}"
        self.url = f"http://{self.listen}/"
        self.started = []
        self.folder = None

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="lbd-bench-"))
        try:
            self.contender.launch(self)
            self.wait()
            self.contender.await_workers(self)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_):
        self.end()

    def fill(self, template, **values):
        """Writes a configuration file from the one of this folder, and returns its path."""
        text = string.Template((FOLDER / template).read_text()).substitute(
            folder=self.folder,
            listen=self.listen,
            ports=", ".join(map(str, self.ports)),
            workers=len(self.ports),
            worker=self.worker,
            # For the balancer's own connections; the workers have those of their processes.
            descriptors=20000,
            **values,
        )
        path = self.folder / template
        path.write_text(text)
        return path

    def start(self, command, stop=signal.SIGKILL):
        """Starts a process, which `stop` will end."""
        output = open(self.folder / "output.log", "ab")
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # As a service manager would. The kernel shares the cores between sessions (sched(7),
            # autogroup), and lbd's workers have their own.
            start_new_session=True,
        )
        output.close()
        self.started.append((process, stop))

    def wait(self):
        """Returns once every worker has answered through the address that clients connect to."""
        self.wait_for(self.address, 2 * len(self.ports))

    def wait_for(self, address, count):
        """Returns after so many answers in a row."""
        deadline = time.monotonic() + 20
        answers = 0
        while answers < count:
            has_ended = any(process.poll() is not None for process, _ in self.started)
            if has_ended or time.monotonic() > deadline:
                said = [path.read_text(errors="replace") for path in self.folder.glob("*.log")]
                how = "ended at once" if has_ended else "does not answer"
                raise Failed(f"{self.contender.name} {how}: {' '.join(said).strip()[-1000:]}")
            try:
                with socket.create_connection(address, 5) as client:
                    ask(client)
                answers += 1
            except OSError:
                answers = 0
                time.sleep(0.01)

    def end(self):
        """Ends what was started, the last first, each by its pid."""
        for process, stop in reversed(self.started):
            if process.poll() is None:
                process.send_signal(stop)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.started = []
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def balancer(self):
        """The pids of what was started, and its descendants, but the workers."""
        return [pid for pid in self.processes() if not is_running(pid, self.worker)]

    def processes(self):
        """The pids of what was started, and its descendants."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    # Behind the name, which is in parentheses and may have any byte in it.
                    after = (entry / "stat").read_text(errors="replace").rpartition(")")[2]
                    parents[int(entry.name)] = int(after.split()[1])
                except OSError:
                    pass  # It has ended meanwhile.
        pids = {process.pid for process, _ in self.started}
        while more := {pid for pid, parent in parents.items() if parent in pids} - pids:
            pids |= more
        return pids

    def cpu(self):
        """The time that was spent so far, in user and in kernel mode."""
        of_balancer, of_workers = (
            sum(map(cpu_seconds, pids))
            for pids in (self.balancer(), self.processes() - set(self.balancer()))
        )
        # Of the load generators that have ended.
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return Cpu(of_balancer, of_balancer + of_workers + children.ru_utime + children.ru_stime)

    def private_bytes(self):
        """The memory that only the balancer's processes have, as far as it is in RAM."""
        kilobytes = 0
        for pid in self.balancer():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Private_Clean:", "Private_Dirty:")):
                    kilobytes += int(line.split()[1])
        return kilobytes * 1024


def ask(client):
    """One request, whose answer is of 200 and whole; an OSError otherwise."""
    client.sendall(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n")
    answer = b""
    while not answer.endswith(b"\r\n\r\nHello, world\n"):
        more = client.recv(4096)
        if not more:
            raise ConnectionResetError("the connection ended before its answer")
        answer += more
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise ConnectionError(f"an answer that begins with {answer[:20]!r}")


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2]
    return sum(map(int, fields.split()[11:13])) / os.sysconf("SC_CLK_TCK")


def is_running(pid, program):
    try:
        return os.path.samefile(f"/proc/{pid}/exe", program)
    except OSError:
        return False


def find(program):
    """Its path, also where sbin is not searched."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def free_ports(count):
    """Ports that nobody has, below those that outgoing connections get theirs from."""
    ports = []
    for port in random.sample(range(10_000, 32_000), 5_000):
        with socket.socket() as probe:
            # As the servers do, so that connections that ended just now are not in the way.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise Failed("there are no free ports")
