"""
What the README and tests/RESULTS.md state, measured on the machine at hand: the baseline and the new code in one run.

$ python tests/benchmark.py all --write tests/RESULTS.md  # all of it; an hour on two CPU cores
$ python tests/benchmark.py ladder heads --write tests/RESULTS.md  # these parts again, the others stay
$ python tests/benchmark.py default       # `python train_gpt2.py`, from start to exit
$ python tests/benchmark.py killed        # a run that is killed and resumed against one that is not
$ python tests/benchmark.py simulated     # a GPU's memory and kernels, on a pretended one
$ python tests/benchmark.py limit         # what this machine's matmuls, attention and copies allow
$ python tests/benchmark.py ladder --memory_limit_gb 16  # from 2019's script to this one, as on a 16 GB card
$ python tests/benchmark.py heads         # ways to compute the loss of 50,304 columns
$ python tests/benchmark.py loader        # how long a step waits for its input
$ python tests/benchmark.py tokenize      # fineweb.py, on a short and a long run
$ python tests/benchmark.py architecture  # the modern parts, at T = 1024 and 8192
$ python tests/benchmark.py hellaswag     # hellaswag.py
$ python tests/benchmark.py tokens        # how many tokens less the modern recipe needs
$ python tests/benchmark.py sizes --data novels.txt  # the same at three sizes; hours, goes on where it was cut off,
$ python tests/benchmark.py sizes --only_table       # and its table and picture of what there is; not in `all`
$ python tests/benchmark.py full_size --data novels.txt  # how gpt2 and modern begin at 124M; hours, likewise
$ python tests/benchmark.py gpu           # what one GPU makes of it, in six pieces, an hour; not in `all`
$ python tests/benchmark.py gpu --piece 2 # one of them, each under ten minutes: 1 attention and tests/test_cuda.py,
                                          # 2 a step of gpt2, 3 of modern, 4 the ladder in 16 GB, 5 runs on the
                                          # machine's own text, 6 memory, resuming and T=8192
$ python tests/benchmark.py gpu --minutes 7         # what tells most, written as it comes, over after so many minutes
$ python tests/benchmark.py gpu --minutes 7 --tiny  # a rehearsal of it on any machine

The parts themselves are in tests/benchmarks. Tables are Markdown; --json FILE keeps the rows too. Each row runs in a
process of its own, so that its peak memory is its own. Timings are medians over steps; on a machine that others share,
compare within one run only.
"""
import argparse
import json
import re
import sys
import time
import traceback
from pathlib import Path

STARTED = time.time()  # before torch, which takes ten seconds from a cold disk

import torch  # noqa: E402

from benchmarks import data, gpu, learning, quick, sizes, speed  # noqa: E402
from benchmarks.shared import ROOT, chip, fineweb, table  # noqa: E402

import hellaswag  # noqa: E402


def on_gpu(args):
    return quick.quick_pass(args, STARTED) if args.minutes else gpu.gpu(args)


COMMANDS = {"default": learning.default_run, "killed": learning.killed, "simulated": speed.simulated,
            "limit": speed.limit, "ladder": speed.ladder, "heads": speed.heads, "loader": speed.loader,
            "tokenize": data.tokenize, "architecture": speed.architecture, "hellaswag": data.score,
            "tokens": learning.tokens, "sizes": sizes.sizes, "full_size": sizes.full_size,
            "gpu": on_gpu}  # in the order of RESULTS.md
NOT_IN_ALL = ("sizes", "full_size", "gpu")  # hours, and for another machine
HEADER = """# Results

Written by `python tests/benchmark.py all --write tests/RESULTS.md`: each part on the machine, and by the command, that stand
below its name. Where others share the machine its speed drifts: compare within one table.
"""


def machine(device):
    """For the line below a part's name."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text() if path.exists() else ""
    sets = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if re.search(rf"\b{name}\b", flags)]
    return (f"{chip(device)} ({', '.join(sets) or 'instruction set unknown'}), PyTorch {torch.__version__}, "
            f"{time.strftime('%Y-%m-%d')}")


def write_part(path, name, about, text):
    """Puts a part into the file in place of the one of its name. about: how, where and when it was measured."""
    old = path.read_text() if path.exists() else ""
    parts = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", old, re.M | re.S))
    parts[name] = f"\n{about}\n{text}\n\n"
    order = sorted(parts, key=list(COMMANDS).index)
    path.write_text(HEADER + "".join(f"\n## {name}\n{parts[name].rstrip()}\n" for name in order))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", choices=[*COMMANDS, "all"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: what --dtype auto of train_gpt2.py picks")
    parser.add_argument("--memory_limit_gb", type=float, default=0, help="pretend that the GPU has no more")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-steps a step (ladder)")
    parser.add_argument("--steps", type=int, help="timed steps of each row (ladder: 2, on CUDA 10; gpu: 12); optimizer "
                        "steps (architecture, tokens: 250; sizes: 512; full_size: 128)")
    parser.add_argument("--tokens", type=int, default=65536, help="trained on by each row, twice (architecture)")
    parser.add_argument("--megabytes", type=int, default=80, help="of text (tokenize)")
    parser.add_argument("--copies", type=int, default=7, help="of that text in the long run (tokenize)")
    parser.add_argument("--examples", type=int, default=200, help="scored (hellaswag)")
    parser.add_argument("--seeds", type=int, default=2, help="of each run (architecture, tokens)")
    parser.add_argument("--data", type=Path, help="a text file (sizes, full_size)")
    parser.add_argument("--results", type=Path, default=Path("sizes.jsonl"), help="of all runs so far (sizes)")
    parser.add_argument("--runs", type=Path, default=Path("log_full_size"),
                        help="folder of the runs, 10 GB (full_size)")
    parser.add_argument("--only_table", action="store_true", help="of what there is, with no run (sizes, full_size)")
    parser.add_argument("--depths", type=int, nargs="+", default=sizes.DEPTHS, help="layers of the models (sizes)")
    parser.add_argument("--piece", type=int, choices=range(1, 7), help="only this one (gpu)")
    parser.add_argument("--minutes", type=float, default=0, help="the quick pass, which ends after so many (gpu)")
    parser.add_argument("--tiny", action="store_true", help="small sizes on any machine, a rehearsal (gpu --minutes)")
    parser.add_argument("--bf16_stream", action="store_true",
                        help="residual stream in bfloat16, in the runs of piece 5 (gpu)")
    parser.add_argument("--write", type=Path, help="put the tables into this Markdown file")
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    args = parser.parse_args()
    args.pictures = bool(args.write) and args.write.resolve() == ROOT / "tests/RESULTS.md"  # a trial leaves them alone
    dtype, reason = hellaswag.pick_dtype("auto", args.device.split(":")[0], (256, 768, 3072), torch.float16)
    args.dtypes = ["float32", "bfloat16"]
    if args.dtype or not reason:  # not two that were timed
        args.dtypes = [args.dtype or str(dtype)[6:]]
    args.dtype = args.dtype or str(dtype)[6:]
    return args


def steps_of(name, device):
    """--steps, where it is not given."""
    if name == "ladder":
        return 10 if device.startswith("cuda") else 2
    return {"gpu": 12, "sizes": 512, "full_size": 128}.get(name, 250)


def main():
    args = parse_args()
    if args.commands != ["gpu"]:
        print(f"{machine(args.device)}, {args.dtype}", file=sys.stderr)
    given = " ".join(word for word in sys.argv[1:] if word not in COMMANDS and word != "all")
    flags = re.sub(r"--(write|json)[= ]\S+ ?", "", given).strip()
    names = args.commands
    if "all" in names:
        names = [name for name in COMMANDS if name in names or name not in NOT_IN_ALL]
    tables = []
    for name in names:
        started = time.time()
        try:
            steps = args.steps or steps_of(name, args.device)
            made = COMMANDS[name](argparse.Namespace(**vars(args) | {"steps": steps}))
        except Exception as error:
            if not args.write:
                raise
            traceback.print_exc()
            made = [table("failed", [{"error": fineweb.one_line(error)}])]  # the other parts are still measured
        tables += made
        if args.write:
            command = f"python tests/benchmark.py {name} {flags}".strip()
            about = f"`{command}` ({args.dtype}), {time.time() - started:.0f} s, {machine(args.device)}"
            write_part(args.write, name, about, "\n".join(part["markdown"] for part in made))
    if args.json:
        args.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
