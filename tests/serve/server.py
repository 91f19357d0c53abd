"""A server as `phatgoose serve` starts it, in a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

# Of pytest's processes, each puts its engines on a core of its own.
FIRST_CORE = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 2
STARTS = 300  # seconds that a start may take on a busy machine
API_KEY, ADMIN_KEY = "user-key", "admin-key"


def on_cores(ranks=1):
    """vLLM's setting for an engine whose ranks have a core each."""
    cores = [(FIRST_CORE + rank) % 2 for rank in range(ranks)]
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores))}


class Server:
    """Listens on a free port until `end`; what it prints is in `log`."""

    def __init__(self, folder, *words, root=None, environment=None):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = Path(folder) / "server.log"
        command = [sys.executable, "-m", "phatgoose.cli", "serve", "--port", str(self.port)]
        given = ["--experts-root", str(root)] if root else []
        given += [] if "--base" in words else ["--base", "tiny"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--dtype", "float32", *given, *map(str, words)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **os.environ,
                    "VLLM_API_KEY": API_KEY,
                    "PHATGOOSE_ADMIN_KEY": ADMIN_KEY,
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    "VLLM_NO_USAGE_STATS": "1",
                    **on_cores(),
                    **(environment or {}),
                },
            )

    def wait(self):
        """Until it answers."""
        end = time.monotonic() + STARTS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.tail()
            try:
                if self.call("GET", "/health")[0] == 200:
                    return self
            except OSError:
                time.sleep(0.3)
        raise TimeoutError(self.tail())

    def call(self, method, path, body=None, key=None):
        """Status and JSON, or text."""
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        return status, json.loads(text) if text[:1] in "{[" and text else text

    def workers(self):
        """Process ids of those that have the model."""
        return [pid for pid, name in self.processes().items() if "Worker" in name]

    def processes(self):
        """The server's and those it started, by id, with what they call themselves."""
        parents, names = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                stat = (folder / "stat").read_text()
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
            names[int(folder.name)] = words
        mine = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
            mine |= more
        return {pid: names[pid] for pid in mine if pid in names}

    def end(self, number=signal.SIGTERM, seconds=60):
        """The exit code, once it was told to stop."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)

    def kill(self):
        """Whatever is left of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def tail(self):
        return self.log.read_text(errors="replace")[-6000:]


def runs(pid):
    """Whether a process is there, and no mere entry that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
