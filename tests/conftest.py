"""What the tests share: ways to run the scripts, small corpora, and runs made once.

run() calls a script's main in the test's own process, run_ranks() in a few forks of it that know each other as torchrun's
workers do: a monkeypatch holds in both. spawn() starts a process as a user does, for what only a process shows.
The time limits are for what hangs: a busy machine may take ten times as long as a quiet one.

With the lowest versions that requirements.txt promises, in a new environment (xdist is for `-n 2`):
$ sed "s/>=/==/" requirements.txt | pip install -r /dev/stdin pytest-xdist && python -m pytest -q tests"""
import contextlib
import gc
import importlib
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", COLUMNS="200",
                  OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
                  PYTORCH_NVML_BASED_CUDA_CHECK="1",  # asking for CUDA before a fork would keep it from the fork
                  OMP_WAIT_POLICY="PASSIVE",  # threads that spin starve the other processes of a test
                  TORCHINDUCTOR_VEC_ISA_OK="1",  # no trial compilations of what /proc/cpuinfo says: ten seconds
                  TORCHINDUCTOR_COMPILE_THREADS="1")  # no pool, whose processes import torch: ten seconds too

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job: the scripts would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("PYTHONUNBUFFERED", None)  # as users have it: what is not flushed is not seen

import torch  # noqa: E402  after the thread count is set

import fineweb  # noqa: E402
import hellaswag  # noqa: E402

torch.set_num_threads(1)  # small models: two processes side by side gain more than two threads; and forks are sound

# A model that trains in milliseconds a step, on the recipe whose runs are comparable to 1e-5.
SMALL = ("--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --total_batch_size 512 --max_steps 6 --eval_every 3 "
         "--eval_tokens 2048 --sample_every 0 --checkpoint_every 0 --hellaswag_every 0 --no_compile --dtype float32 "
         "--optimizer adamw --lr 1e-3 --schedule cosine --device cpu").split()


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)  # they end a run well


def call_main(script, args):
    """What `python script args` does, in this process. Returns the exit code."""
    main = importlib.import_module(script.removesuffix(".py")).main
    handlers = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGCONT)}
    deterministic = torch.are_deterministic_algorithms_enabled()
    locks, lock_folder = [], fineweb.lock_folder

    def lock_until_the_end(folder):
        locks.append(lock_folder(folder))
        return locks[-1]
    try:
        with mock.patch.object(sys, "argv", [script, *map(str, args)]), mock.patch.object(fineweb, "lock_folder", lock_until_the_end):
            fineweb.run_cli(main)
        return 0
    except SystemExit as stop:
        return stop.code or 0
    finally:
        for lock in locks:  # what the end of a process does
            with contextlib.suppress(OSError):
                os.close(lock)
        gc.enable()
        gc.unfreeze()
        torch.use_deterministic_algorithms(deterministic)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(script, *args, expect=0, env=None, cwd=None):
    """Runs a script of the repository in this process and returns (stdout, stderr). `expect`: the exit code."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, env or {}), contextlib.chdir(cwd or Path.cwd()), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = call_main(script, args)
    assert code == expect, f"exit code {code}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def refused(script, *args, code=2, **how):
    """Runs a script that must refuse: returns its one line of error."""
    out, err = run(script, *args, expect=code, **how)
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def free_port():
    """Below the range from which systems give ports away: nobody takes it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port


def run_rank(script, args, env, files):
    gc.freeze()  # what the parent left for its collector is not this process's to end
    for number, path in zip((1, 2), files):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ.update(env)
    code = call_main(script, args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_ranks(size, script, *args, expect=0, env=None, timeout=600):
    """The same in `size` forks, which find each other as torchrun's workers do, and are ended as torchrun ends them when
    one fails. Returns what all of them wrote, as (stdout, stderr); `expect`: the highest exit code."""
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        processes = []
        for rank in range(size):
            values = {"RANK": rank, "LOCAL_RANK": rank, **common, **(env or {})}
            values = {name: str(value) for name, value in values.items()}
            fork = multiprocessing.get_context("fork").Process
            processes.append(fork(target=run_rank, args=(script, args, values, (out.name, err.name))))
            processes[-1].start()
        deadline = time.time() + timeout
        while any(process.exitcode is None for process in processes) and time.time() < deadline:
            if any(process.exitcode for process in processes):
                time.sleep(0.1)
                for process in processes:
                    process.terminate()
            time.sleep(0.01)
        for process in processes:
            process.kill()
            process.join()
        said, complained = out.read(), err.read()
    codes = [process.exitcode for process in processes]
    assert max(codes) == expect and (expect or not any(codes)), f"exit codes {codes}\n{said}\n{complained}"
    return said, complained


# Runs train_gpt2.py with steps of so many seconds at least: they outlast a test that has to act before the last one.
SLOW_STEPS = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import fineweb, train_gpt2
seconds, train_step = float(sys.argv.pop(1)), train_gpt2.Run.train_step
train_gpt2.Run.train_step = lambda run: (time.sleep(seconds), train_step(run))[1]
fineweb.run_cli(train_gpt2.main)
"""


class spawn(subprocess.Popen):
    """A script in a process of its own, as a user starts it. `torchrun`: a number of processes, or torchrun's flags.
    `step_seconds`: of train_gpt2.py, at least. It ends with its test."""
    running = []

    def __init__(self, script, *args, torchrun=(), env=None, cwd=None, step_seconds=0):
        if isinstance(torchrun, int):
            torchrun = ["--standalone", "--nproc_per_node", torchrun]
        command = [str(ROOT / script)]
        if step_seconds:
            command = ["-c", SLOW_STEPS, str(ROOT), str(step_seconds)]
        if torchrun:
            python = ["--no_python", sys.executable] if step_seconds else []
            command = ["-m", "torch.distributed.run", *map(str, torchrun), *python, *command]
        self.files = [tempfile.NamedTemporaryFile("r") for _ in range(2)]
        super().__init__([sys.executable, *command, *map(str, args)], env={**os.environ, **(env or {})}, cwd=cwd,
                         stdout=open(self.files[0].name, "w"), stderr=open(self.files[1].name, "w"))
        self.running.append(self)

    def output(self):
        """What it wrote so far, as (stdout, stderr)."""
        return tuple(Path(file.name).read_text() for file in self.files)

    def finish(self, expect=0, timeout=600):
        """Waits for its end; returns its output. `expect`: the exit code, None for any."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError("did not end\n" + "\n".join(self.output())) from None
        assert expect is None or self.returncode == expect, f"exit code {self.returncode}\n" + "\n".join(self.output())
        return self.output()


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    """One that a failed test left would take a core from all others."""
    yield
    for process in spawn.running:
        if process.poll() is None:
            process.terminate()  # torchrun ends its workers
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()
    spawn.running.clear()


def wait_for(condition, process, seconds=600):
    """Until the condition holds, while the process lives."""
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, "\n".join(process.output())
        assert time.time() < deadline, "nothing happened"
        time.sleep(0.001)


def shell(code, cwd=None):
    """Runs lines of bash as they are printed, with this Python. Returns what they wrote on stdout."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PATH": path})
    assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def log_lines(out_dir, kind):
    text = (Path(out_dir) / "log.jsonl").read_text()
    lines = [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]  # another may be half written
    return [line for line in lines if line["kind"] == kind]


def is_untouched(folder):
    """Whether nothing was begun in it: a start that is refused may leave an empty folder."""
    return not folder.exists() or not any(folder.iterdir())


def losses(out_dir):
    return [line["loss"] for line in log_lines(out_dir, "train")]


def write_shards(folder, ids, special):
    generator = np.random.default_rng(0)
    for i, (split, n) in enumerate([("val", 3000), ("train", 2500), ("train", 2111), ("train", 2900)]):
        tokens = (generator.zipf(1.3, n) % ids).astype(np.uint16)
        tokens[::97] = special
        np.save(folder / f"edufineweb_{split}_{i:06d}.npy", tokens)
    return folder


def save_llama2_tokenizer(folder, words):
    """Files of a tokenizer as Llama 2's: it puts a space before any text, and drops a text's first space again."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", "\u2581", *("\u2581" + word for word in words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>",
                                                              "unk_token": "<unk>"}))
    return len(vocab)


@pytest.fixture(scope="session")
def gpt2_shards(tmp_path_factory):
    """Short shards of GPT-2 tokens as other people's scripts write them: no manifest."""
    return write_shards(tmp_path_factory.mktemp("gpt2"), 50257, 50256)


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory):
    """The same of byte tokens: quicker to train on."""
    folder = write_shards(tmp_path_factory.mktemp("bytes"), 256, 256)
    (folder / "manifest.json").write_text('{"tokenizer": "byte", "vocab_size": 257}')
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((ROOT / "input.txt").read_text()[:40_000])
    return path


@pytest.fixture
def chip(monkeypatch):
    """A function that makes a CPU: what it has, and how many seconds a matmul takes in either dtype."""
    def make(float32, bfloat16, **found):
        seconds = {torch.float32: float32, torch.bfloat16: bfloat16}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
        monkeypatch.setattr(hellaswag, "matmul_seconds", lambda dtype, *matmul: seconds[dtype])
    return make
