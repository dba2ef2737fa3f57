"""What the parts share: processes of their own, time and memory, tables, and runs of train_gpt2.py."""
import concurrent.futures
import contextlib
import multiprocessing
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import fineweb  # noqa: E402
import train_gpt2  # noqa: E402

ROUNDS = 3  # of what is measured in turns
QUIETLY = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

# -----------------------------------------------------------------------------
# processes: a row has one of its own, so that its peak memory is its own

def isolated(function, **arguments):
    """The dict that function(**arguments) returns from a process of its own, and that process's peak memory in GiB,
    `peak_gb`; None where it ran out of memory."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, function, arguments).result()


def attempted(function, **arguments):
    """The same, and None where it fails otherwise, so that the other rows are still measured."""
    try:
        return isolated(function, **arguments)
    except Exception as error:  # not in this torch, not to be compiled, ...
        print(f"{function.__name__} {arguments}: {fineweb.one_line(error)}", file=sys.stderr)


def measured(function, arguments):
    """See `isolated`. arguments: `function`'s, and with `memory_limit_gb` (0: none) the GPU has no more than that."""
    limit = arguments.pop("memory_limit_gb", 0)
    device = arguments.get("device", "cpu")
    on_cuda = device.startswith("cuda")
    if limit and on_cuda:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(limit * 2**30 / total)
    before = 0 if on_cuda else peak_memory(device)  # what Python and torch take is not the row's
    try:
        result = function(**arguments)
    except torch.OutOfMemoryError:
        return None
    return result | {"peak_gb": round((peak_memory(device) - before) / 2**30, 2)}


def peak_memory(device):
    """In bytes, of this process so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # a process begins with the ru_maxrss of the one that started it
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def descendants(pid):
    """The processes that a process started, those that these started, and so on (Linux; elsewhere none)."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has just ended
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found

# -----------------------------------------------------------------------------
# time

def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds_of(function, device, repeats=5, warm=True):
    """The median time of a call. warm: after one that is not counted."""
    times = []
    for _ in range(repeats + warm):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm:])


def in_turns(cases):
    """cases: {name: function without arguments that returns a dict of numbers, or None}. Returns {name: dict of their
    medians} over rounds, in each of which every case has its turn: a shared machine's speed drifts."""
    results = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, case in cases.items():
            results[name].append(case())
            print(name, results[name][-1], file=sys.stderr, flush=True)
    return {name: medians([row for row in rows if row]) for name, rows in results.items()}


def medians(rows):
    """Of rows with the same keys; None for no row."""
    if rows:
        return {key: value and statistics.median(row[key] for row in rows) for key, value in rows[0].items()}


def spread(values):
    return f"{statistics.mean(values):.4f} ± {(max(values) - min(values)) / 2:.4f}"


def refuse(problem):
    """Ends the command with one line."""
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)

# -----------------------------------------------------------------------------
# tables

def make_table(title, rows):
    """rows: dicts; one that lacks keys of the longest, for it failed, has no figures there. Returns a dict of the
    title, the rows and both in Markdown."""
    rows = [{name: row.get(name) for name in max(rows, key=len)} for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [list(map(cell, row.values())) for row in rows]
    markdown = "\n".join([f"\n**{title}**\n", *("| " + " | ".join(line) + " |" for line in lines)])
    return {"title": title, "rows": rows, "markdown": markdown}


def cell(value):
    if value is None:
        return "–"
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:,.4g}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)


def table(title, rows):
    """As `make_table`, and prints it."""
    made = make_table(title, rows)
    print(made["markdown"] + "\n", flush=True)
    return made


def chip(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.exists() else []
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"

# -----------------------------------------------------------------------------
# runs of train_gpt2.py

def script(*args):
    """The command line of a run in a process of its own."""
    return [sys.executable, str(ROOT / "train_gpt2.py"), *map(str, args)]


def train(**flags):
    """A run in this process. True stands for --flag, False for --no_flag; None leaves it out. Returns the log's
    lines."""
    argv = []
    for name, value in flags.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            argv += [f"--{name}", str(value)]
    with contextlib.redirect_stdout(sys.stderr):  # the tables alone go to stdout
        train_gpt2.train(argv)
    return list(train_gpt2.read_log(Path(flags["out_dir"], "log.jsonl")))


def pyplot():
    """matplotlib's, to draw into files; None, said so, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot
