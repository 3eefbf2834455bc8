"""Load of the server: clients of locust against `ov_kvcrush-serve`, and the same questions asked of the engine itself.

    python tests/load/load.py                                           # the default model; 1, 8, 32 and 128 clients
    python tests/load/load.py MODEL --clients 8 --seconds 60 --rounds 3 --json load.json
    python tests/load/load.py MODEL --against llama.cpp=http://127.0.0.1:9000   # a server that runs, beside ours

Prints a table and writes JSON. Runs of one number of clients follow each other and are repeated in rounds: on a shared
machine compare the rows of a round, not those of two days. The clients' own processor time is told, since it is taken
from the server's where both share cores. docs/server_load.md has what came out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from summary import PERCENTILES, Answer, Figures, summarise

HERE = Path(__file__).parent
SERVER, ENGINE = "ov_kvcrush-serve", "engine, direct"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shared_options(args: argparse.Namespace) -> list[str]:
    """What server and engine are told alike."""
    given = {"--budget": args.budget, "--max-kv-mb": args.max_kv_mb, "--max-waiting": args.max_waiting}
    return [text for name, value in given.items() if value is not None for text in (name, str(value))]


@contextmanager
def server(args: argparse.Namespace, *more: str) -> Iterator[tuple[str, int]]:
    """`ov_kvcrush-serve`, ready: its address and process id. more: arguments. Raises RuntimeError where it is not."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    start = [sys.executable, "-m", "ov_kvcrush.server.main", *([args.model] if args.model else []), "--port", str(port)]
    process = subprocess.Popen([*start, *shared_options(args), *more], stderr=subprocess.DEVNULL)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # who is told to end ends the server, too
    try:
        end = time.monotonic() + 300
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{' '.join(start)} must come up, ended with {process.poll()}")
            time.sleep(0.2)
        yield url, process.pid
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        signal.signal(signal.SIGTERM, before)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def model_name(url: str, key: str) -> str:
    """The first model of a server."""
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(json.load(response)["data"][0]["id"])


def resident_mib(pid: int) -> float | None:
    """What a process holds in memory now."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return None
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def over_http(url: str, clients: int, args: argparse.Namespace) -> tuple[Figures, float]:
    """Figures of locust's clients, and the processor seconds that locust took a second."""
    run_time = args.warmup + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.json"
        command = [sys.executable, "-m", "locust", "-f", str(HERE / "locustfile.py"), "--headless", "--only-summary"]
        command += ["--host", url, "-u", str(clients), "-r", str(clients), "-t", f"{round(run_time)}s", "-s", "300"]
        command += ["--answers", str(answers), "--model-name", model_name(url, args.key), "--key", args.key]
        command += ["--prompt-words", str(args.prompt_words), "--max-tokens", str(args.max_tokens)]
        # Its exit code is 1 where requests failed: they are counted here.
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=_environment())
        if not answers.exists():
            raise RuntimeError(f"locust must write its answers, ended with {done.returncode}: {done.stderr[-2000:]}")
        found = json.loads(answers.read_text())
    rows = [Answer(**row) for row in found["answers"]]
    if not rows:
        raise RuntimeError(f"locust must have asked something, ended with {done.returncode}: {done.stderr[-2000:]}")
    return _figures(rows, min(row.begin for row in rows), args), found["cpu_s"] / run_time


def directly(clients: int, args: argparse.Namespace) -> Figures:
    """Figures of the engine in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.json"
        command = [sys.executable, str(HERE / "direct.py"), *(["--model", args.model] if args.model else [])]
        command += ["--users", str(clients), "--run-time", str(args.warmup + args.seconds), *shared_options(args)]
        command += ["--prompt-words", str(args.prompt_words), "--max-tokens", str(args.max_tokens)]
        subprocess.run([*command, "--answers", str(answers)], check=True, env=_environment())
        found = json.loads(answers.read_text())
    return _figures([Answer(**row) for row in found["answers"]], found["begin"], args)


def _figures(answers: list[Answer], begin: float, args: argparse.Namespace) -> Figures:
    return summarise(answers, begin + args.warmup, begin + args.warmup + args.seconds)


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows: of each number of clients, round by round."""
    others = dict(pair.split("=", 1) for pair in args.against)
    rows: list[dict[str, Any]] = []

    def add(clients: int, number: int, who: str, figures: Figures, **more: Any) -> None:
        rows.append({"clients": clients, "round": number, "who": who, **figures.as_dict(), **more})
        print(line(rows[-1]), flush=True)

    print(header(), flush=True)
    with server(args) as (url, pid):
        for clients in args.clients:
            for number in range(args.rounds):
                figures, cpu = over_http(url, clients, args)
                add(clients, number, SERVER, figures, client_cpu=cpu, resident_mib=resident_mib(pid))
                if not args.no_direct:
                    add(clients, number, ENGINE, directly(clients, args))
                for name, other in others.items():
                    figures, cpu = over_http(other, clients, args)
                    add(clients, number, name, figures, client_cpu=cpu)
    return rows


def overheads(rows: list[dict[str, Any]]) -> dict[int, float]:
    """By number of clients: the share of the engine's throughput that the server loses, the median of the rounds."""
    found: dict[int, list[float]] = {}
    direct = {(row["clients"], row["round"]): row["tokens_per_s"] for row in rows if row["who"] == ENGINE}
    for row in rows:
        if row["who"] == SERVER and direct.get((row["clients"], row["round"])):
            quotient = row["tokens_per_s"] / direct[row["clients"], row["round"]]
            found.setdefault(row["clients"], []).append(1 - quotient)
    return {clients: median(shares) for clients, shares in found.items()}


def header() -> str:
    """The table's first two lines."""
    names = ["clients", "who", "tokens/s", *(f"{t} ms p{'/p'.join(map(str, PERCENTILES))}" for t in ("TTFT", "TPOT"))]
    names += ["answers", "429", "errors", "clients' cores", "server MiB"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def line(row: dict[str, Any]) -> str:
    """One row of it."""

    def of(values: list[float] | None) -> str:
        return " / ".join(f"{value:.0f}" for value in values) if values else "-"

    def told(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    cells = [str(row["clients"]), row["who"], f"{row['tokens_per_s']:.1f}", of(row["ttft_ms"]), of(row["tpot_ms"])]
    cells += [str(row["answers"]), str(row["refused"]), str(row["errors"])]
    cells += [told(row.get("client_cpu"), ".2f"), told(row.get("resident_mib"), ".0f")]
    return f"| {' | '.join(cells)} |"


def machine() -> dict[str, Any]:
    """What the figures are of."""
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    packages = {name: version(name) for name in ("openvino", "openvino-genai", "locust")}
    cpu = names[0].split(":", 1)[1].strip() if names else platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), **packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of an exported model; the default model if omitted")
    parser.add_argument("--clients", default="1,8,32,128", help="numbers of clients, one after the other")
    parser.add_argument("--seconds", type=float, default=60, help="measured, of each run")
    parser.add_argument("--warmup", type=float, default=10, help="seconds before that")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--budget", help="as ov_kvcrush-serve --budget")
    parser.add_argument("--max-kv-mb", type=int, help="as ov_kvcrush-serve --max-kv-mb")
    parser.add_argument("--max-waiting", type=int, help="as ov_kvcrush-serve --max-waiting")
    parser.add_argument("--no-direct", action="store_true", help="without the engine by itself")
    parser.add_argument("--against", action="append", default=[], metavar="NAME=URL", help="another server that runs")
    parser.add_argument("--key", default="", help="API key, for --against")
    parser.add_argument("--json", default="load.json", help="where all figures go")
    args = parser.parse_args()
    args.clients = [int(number) for number in args.clients.split(",")]
    rows = measure(args)
    lost = overheads(rows)
    for clients, share in lost.items():
        print(f"{clients} clients: the server loses {100 * share:.1f} % of the engine's throughput")
    settings = {name: value for name, value in vars(args).items() if name != "key"}
    found = {"machine": machine(), "settings": settings, "http_overhead": lost, "rows": rows}
    Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
