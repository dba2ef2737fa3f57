"""How many tokens less the modern recipe needs than GPT-2's, at three sizes, each at its best learning rate; and how
the presets begin at 124M.

A run of `sizes` is a line in a file of results, so that what is cut off goes on from there; a failed one has a val_loss
of null, and is tried again where its line is deleted. One of `full_size` is a folder, and is resumed."""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.shared import ROOT, pyplot, refuse, script, spread, table, train_gpt2

RECIPES = {"gpt2": "--preset gpt2 --tokenizer byte --hellaswag_every 0".split(), "modern": "--preset tiny".split()}
COMMON = ("--block_size 256 --total_batch_size 4096 --batch_size 16 --warmup_steps 25 --eval_tokens 131072 "
          "--sample_every 0 --checkpoint_every 0 --dtype bfloat16 --compile --quiet --device cpu").split()
DEPTHS = (2, 4, 6)
# Where the search for a rate begins. Deeper models take up from the next smaller one's best.
FIRST_RATES = {"gpt2": (1e-3, 2e-3, 4e-3, 8e-3, 16e-3), "modern": (1.5e-3, 3e-3, 6e-3, 12e-3, 24e-3)}
SEEDS = (1337, 1)  # the second at the best rate and beside it
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
KEYS = ("depth", "recipe", "lr", "seed", "steps", "tag")  # of a run
FIGURES = ("val_loss", "val_bpb", "tokens", "training_seconds", "tokens_per_second", "parameters")

# -----------------------------------------------------------------------------
# the runs

class Results:
    """A file of one JSON object a line: KEYS, FIGURES, wall (seconds from start to exit), and vals, [[step, loss]]."""

    def __init__(self, path, data=None):
        self.path = path
        self.data = data  # to train on
        self.lock = threading.Lock()

    def read(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def loss(self, **run):
        """The validation loss of a run, made now unless the file has it; math.inf if it failed."""
        run = {"tag": ""} | run
        for record in self.read():
            if all(record.get(key) == run[key] for key in KEYS):
                break
        else:
            record = run | self.train(**run)
            with self.lock, open(self.path, "a") as f:
                f.write(json.dumps(record) + "\n")
            print(*(f"{key} {record[key]}" for key in (*KEYS, "val_loss")), file=sys.stderr, flush=True)
        return float("inf") if record["val_loss"] is None else record["val_loss"]

    def train(self, depth, recipe, lr, seed, steps, tag):
        shape = ["--n_layer", depth, "--n_head", depth, "--n_embd", 64 * depth]
        started = time.time()
        with tempfile.TemporaryDirectory() as folder:
            flags = [*RECIPES[recipe], *COMMON, *shape, "--data", self.data, "--out_dir", folder, "--lr", lr, "--seed",
                     seed, "--max_steps", steps, "--eval_every", max(1, steps // 8)]
            done = subprocess.run(script(*flags), env=os.environ | ONE_THREAD, capture_output=True, text=True)
            log = Path(folder, "log.jsonl")
            lines = list(train_gpt2.read_log(log)) if log.exists() else []
        wall = time.time() - started
        if done.returncode or not lines or lines[-1]["kind"] != "done":
            print(done.stderr[-2000:], file=sys.stderr)
            return dict.fromkeys(FIGURES) | {"wall": wall, "vals": [done.stderr[-500:]]}
        vals = [[line["step"], line["loss"]] for line in lines if line["kind"] == "val"]
        return {name: lines[-1][name] for name in FIGURES} | {"wall": wall, "vals": vals}


def best_rate(results, rates, **run):
    """The best of the rates, and of up to two more beyond the best where it is at an end; each half of the next."""
    losses = {lr: results.loss(lr=lr, **run) for lr in rates}
    for _ in range(2):
        best = min(losses, key=losses.get)
        if min(losses) < best < max(losses):
            break
        lr = best / 2 if best == min(losses) else best * 2
        losses[lr] = results.loss(lr=lr, **run)
    return min(losses, key=losses.get)


def climb(results, recipe, depths, steps):
    """All runs of a recipe: many rates for the smallest, few for the largest, whose runs are long."""
    rates = FIRST_RATES[recipe]
    for i, depth in enumerate(depths):
        run = dict(recipe=recipe, depth=depth, steps=steps)
        if i < 2:
            best = best_rate(results, rates, seed=SEEDS[0], **run)
        else:
            losses = {lr: results.loss(lr=lr, seed=SEEDS[0], **run) for lr in rates[:2]}
            best = min(losses, key=losses.get)
        if i == 0:
            for lr in (best / 2, best, best * 2):
                results.loss(lr=lr, seed=SEEDS[1], **run)
        elif i == 1:
            for lr in (best, best / 2):
                results.loss(lr=lr, seed=SEEDS[1], **run)
        rates = (best / 2, best, best / 4) if i == 0 else (best, best / 2)

# -----------------------------------------------------------------------------
# the table and the picture

def groups_of(records, steps):
    """{(depth, recipe): the runs of so many steps that did not fail}, without those that have a tag."""
    groups = {}
    for record in sorted(records, key=depth_and_recipe):
        if record["steps"] == steps and not record["tag"] and record["val_loss"] is not None:
            groups.setdefault(depth_and_recipe(record), []).append(record)
    return groups


def best_runs(groups):
    """{(depth, recipe): the runs of all seeds at the best rate}: that of the lowest loss with the first seed."""
    best = {}
    for key, group in groups.items():
        lr = min((record for record in group if record["seed"] == SEEDS[0]), key=loss_of)["lr"]
        best[key] = [record for record in group if record["lr"] == lr]
    return best


def depth_and_recipe(record):
    return record["depth"], record["recipe"]


def rate_and_seed(record):
    return record["lr"], record["seed"] != SEEDS[0]


def loss_of(record):
    return record["val_loss"]


def curve_of(runs):
    """[(tokens, validation loss)], the mean of runs that differ in their seed."""
    tokens_a_step = runs[0]["tokens"] / runs[0]["steps"]
    steps = [step for step, _ in runs[0]["vals"]]
    return [(step * tokens_a_step, statistics.mean(run["vals"][i][1] for run in runs)) for i, step in enumerate(steps)]


def tokens_to(loss, curve):
    """The tokens after which a curve, [(tokens, loss)], first has this loss, on straight lines between its points; None
    where it never does. An upper bound before the first point, and for a schedule that had still to decay."""
    for (tokens, value), (next_tokens, next_value) in zip(curve, curve[1:]):
        if next_value <= loss < value:
            return tokens + (next_tokens - tokens) * (value - loss) / (value - next_value)
    return curve[0][0] if curve[0][1] <= loss else None


def size_rows(records, steps):
    groups = groups_of(records, steps)
    best = best_runs(groups)
    rows = []
    for (depth, recipe), runs in best.items():
        losses = [run["val_loss"] for run in runs]
        rates = {}
        for record in sorted(groups[depth, recipe], key=rate_and_seed):
            rates.setdefault(record["lr"], []).append(f"{record['val_loss']:.4f}")
        row = {"layers x channels": f"{depth} x {64 * depth}", "parameters": runs[0]["parameters"], "recipe": recipe,
               "best rate, first seed": runs[0]["lr"], "tokens": runs[0]["tokens"],
               "loss, nats a byte": spread(losses) if len(losses) > 1 else f"{losses[0]:.4f}",
               "bits per byte": f"{statistics.mean(run['val_bpb'] for run in runs):.3f}",
               "tokens to gpt2's loss": None, "share": None,
               "training, s": statistics.mean(run["training_seconds"] for run in runs),
               "loss at each rate (first / second seed)":
                   ", ".join(f"{lr:g}: {' / '.join(of_seeds)}" for lr, of_seeds in rates.items())}
        peer = best.get((depth, "gpt2"))
        if recipe != "gpt2" and peer:
            needed = tokens_to(statistics.mean(map(loss_of, peer)), curve_of(runs))
            row["tokens to gpt2's loss"] = needed
            row["share"] = needed and f"{needed / peer[0]['tokens']:.0%}"
        rows.append(row)
    return rows


def draw(records, steps, path):
    """Bits per byte against tokens: a colour for each size, dashes for GPT-2's recipe."""
    plt = pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    best = best_runs(groups_of(records, steps))
    depths = sorted({depth for depth, _ in best})
    for (depth, recipe), runs in best.items():
        bits = runs[0]["val_bpb"] / runs[0]["val_loss"]  # of a nat
        tokens, losses = zip(*curve_of(runs))
        axes.plot([count / 1e6 for count in tokens], [loss * bits for loss in losses],
                  "o--" if recipe == "gpt2" else "o-", ms=3, color=f"C{depths.index(depth)}",
                  label=f"{runs[0]['parameters'] / 1e6:.1f}M parameters, {recipe}, rate {runs[0]['lr']:g}")
    axes.set(xlabel="million tokens (bytes)", ylabel="validation, bits per byte")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, handlelength=4, ncols=2, loc="outside lower center")
    figure.savefig(path, dpi=150)


def sizes(args):
    """Both recipes side by side, one thread each, unless --only_table."""
    if not args.only_table:
        if not args.data or not args.data.is_file():
            refuse(f"--data {args.data}: sizes needs a text file, or --only_table and --results")
        results = Results(args.results, args.data)
        with ThreadPoolExecutor(len(RECIPES)) as pool:
            for climbing in [pool.submit(climb, results, recipe, args.depths, args.steps) for recipe in RECIPES]:
                climbing.result()
    records = Results(args.results).read()
    rows = size_rows(records, args.steps)
    if not rows:
        refuse(f"{args.results} holds no run of {args.steps} steps (--results, --steps)")
    draw(records, args.steps, ROOT / "assets/sizes.png" if args.pictures else args.results.with_suffix(".png"))
    title = f"Sizes: bytes, T=256, {args.steps} steps of 4,096 tokens, bfloat16; mean ± half the range over seeds"
    return [table(title, rows)]

# -----------------------------------------------------------------------------
# GPT-2 124M's true shape, for a few steps

MODERN_RATE = train_gpt2.PRESETS["modern"]["lr"]
FULL_SIZE = {"gpt2": ("gpt2", None), "modern": ("modern", None), "modern, half its rate": ("modern", MODERN_RATE / 2),
             "modern, twice its rate": ("modern", MODERN_RATE * 2)}  # {name: (preset, rate)}
FULL_SIZE_FLAGS = ("--tokenizer gpt2 --total_batch_size 4096 --batch_size 2 --sample_every 0 --checkpoint_every 16 "
                   "--hellaswag_every 0 --eval_every 16 --eval_tokens 16384 --dtype bfloat16 --quiet "
                   "--device cpu").split()


def begin_full_size(name, args):
    """Makes the run of this name, or what is missing of it. One at another rate ends after the first quarter, most of
    it at the peak: the validation there is logged before the next step."""
    preset, lr = FULL_SIZE[name]
    out_dir = folder_of(name, args)
    flags = ["--preset", preset, *FULL_SIZE_FLAGS, "--max_steps", args.steps, "--data", args.data, "--out_dir", out_dir,
             *(["--lr", lr] if lr else [])]

    def is_over():
        return lines_of(out_dir, "done") or lr and last_step_of(out_dir) > args.steps // 4

    if is_over():
        return
    resume = ["--resume"] if (out_dir / "log.jsonl").exists() else []
    process = subprocess.Popen(script(*flags, *resume), env=os.environ | ONE_THREAD, stdout=subprocess.DEVNULL)
    while process.poll() is None and not is_over():
        time.sleep(1)
    if lr:
        process.terminate()  # once: then it ends its step and saves
    if process.wait() and not is_over():
        print(f"{name}: ended at step {last_step_of(out_dir)} with exit code {process.returncode}", file=sys.stderr)


def folder_of(name, args):
    return args.runs / f"{name.replace(',', '').replace(' ', '_')}_{args.steps}_steps"


def lines_of(out_dir, kind):
    log = out_dir / "log.jsonl"
    return [line for line in train_gpt2.read_log(log) if line["kind"] == kind] if log.exists() else []


def last_step_of(out_dir):
    return max((line["step"] for line in lines_of(out_dir, "train")), default=0)


def highest(name, lines):
    """None where it was finite in none of the lines."""
    return max((line[name] for line in lines if line[name] is not None), default=None)


def full_size_row(name, trained, steps):
    """trained: the run's lines of training."""
    first, last = steps // 8 + 1, steps // 4  # of those that all runs have
    losses = [line["loss"] for line in trained if first <= line["step"] <= last and line["loss"] is not None]
    after_warmup = [line for line in trained if line["step"] > steps // 10]
    return {"run": name, "peak rate": f"{highest('lr', trained):.3g}", "steps": trained[-1]["step"],
            f"training loss, mean of steps {first} to {last}": f"{statistics.mean(losses):.4f}" if losses else None,
            "highest after the warm-up": highest("loss", after_warmup),
            "highest gradient norm after it": highest("grad_norm", after_warmup),
            "updates skipped, gradient not finite": sum(line.get("skipped", False) for line in trained),
            "seconds a step, median": statistics.median(line["seconds"] for line in trained)}


def full_size(args):
    """Two runs side by side, one thread each, unless --only_table."""
    if not args.only_table:
        if not args.data or not args.data.is_file():
            refuse(f"--data {args.data}: full_size needs a text file, or --only_table and --runs")
        with ThreadPoolExecutor(2) as pool:
            for beginning in [pool.submit(begin_full_size, name, args) for name in FULL_SIZE]:
                beginning.result()
    trained = {name: lines_of(folder_of(name, args), "train") for name in FULL_SIZE}
    rows = [full_size_row(name, lines, args.steps) for name, lines in trained.items() if lines]
    if not rows:
        refuse(f"{args.runs} holds no run of {args.steps} steps (--runs, --steps)")
    losses = {}
    for row in rows:
        for line in lines_of(folder_of(row["run"], args), "val"):
            losses.setdefault(line["step"], {})[row["run"]] = line["loss"] and f"{line['loss']:.4f}"
    curves = [{"after step": step} | {row["run"]: of_runs.get(row["run"]) for row in rows}
              for step, of_runs in sorted(losses.items())]
    title = f"GPT-2 124M's shape, T=1024, GPT-2 tokens, schedules of {args.steps} steps of 4,096 tokens, one seed"
    tables = [table(title, rows)]
    if curves:
        tables.append(table("Validation loss of these runs on 16,384 tokens, nats a token", curves))
    return tables
