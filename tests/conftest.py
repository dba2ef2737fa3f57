"""What the tests share: the scripts as subprocesses, small corpora, and runs made once."""
import contextlib
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
                  OMP_WAIT_POLICY="PASSIVE",  # threads that spin starve the other processes of a test
                  TORCHINDUCTOR_VEC_ISA_OK="1",  # no trial compilations of what /proc/cpuinfo says: ten seconds
                  TORCHINDUCTOR_COMPILE_THREADS="1")  # no pool, whose processes import torch: ten seconds too

import torch  # noqa: E402  after the thread count is set

torch.set_num_threads(1)  # small models: two processes side by side gain more than two threads

# A model that trains in milliseconds a step, on the recipe whose runs are comparable to 1e-5.
SMALL = ("--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --total_batch_size 512 --max_steps 6 --eval_every 3 "
         "--eval_tokens 2048 --sample_every 0 --checkpoint_every 0 --hellaswag_every 0 --no-compile --dtype float32 "
         "--optimizer adamw --lr 1e-3 --schedule cosine --device cpu").split()


FORKS = multiprocessing.get_context("forkserver")  # forks of a process that has imported torch: four seconds less each
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.run", "pytest", "tqdm", "tiktoken", "safetensors.torch",
                              "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"])
TORCHRUN = str(Path(torch.__file__).parent / "distributed/run.py")


def run_as_main(script, args, env, cwd, out, err):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.environ.update(env)
    os.chdir(cwd)
    if script == "-c":
        sys.argv, sys.path[0] = ["-c", *args[1:]], ""
        exec(args[0], {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = [script, *args], str(ROOT) if script == TORCHRUN else os.path.dirname(os.path.abspath(script))
        runpy.run_path(os.path.abspath(script), run_name="__main__")


class Forked:
    """A script in a process of its own, with the methods of subprocess.Popen that the tests use."""

    def __init__(self, script, args, env, cwd):
        self.files = [tempfile.NamedTemporaryFile("r") for _ in range(2)]
        self.process = FORKS.Process(target=run_as_main, args=(script, args, env, cwd, *(f.name for f in self.files)))
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def output(self):
        return tuple(Path(f.name).read_text() for f in self.files)

    def communicate(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.process.name, timeout, *self.output())
        return self.output()


def start(script, *args, torchrun=(), env=None, cwd=None):
    """Starts a script of the repository; under torchrun where `torchrun` says how: a number of processes on this
    machine, or its flags. By its flags torchrun forks the processes from itself."""
    script, args = str(ROOT / script), [*map(str, args)]
    if isinstance(torchrun, int):
        torchrun = ["--standalone", "--nproc_per_node", torchrun]
    if torchrun:
        script, args = TORCHRUN, [*map(str, torchrun), "--start-method", "fork", "--run-path", script, *args]
    return Forked(script, args, env or {}, str(cwd or Path.cwd()))


def run(script, *args, expect=0, timeout=300, **how):
    """Runs a script to its end and returns (stdout, stderr). `expect`: the exit code, None for any."""
    process = start(script, *args, **how)
    out, err = process.communicate(timeout=timeout)
    assert expect is None or process.returncode == expect, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


CLIENT = """
import os, sys
from multiprocessing.connection import Client
with Client(sys.argv[1]) as server:
    server.send((sys.argv[2:], dict(os.environ), os.getcwd(), os.getpid()))
    code = server.recv()
sys.exit(code if code >= 0 else 128 - code)
"""


def serve(listener):
    """Runs the scripts that shells ask for, into their pipes."""
    while True:
        with contextlib.suppress(OSError, EOFError), listener.accept() as client:
            (script, *args), env, cwd, pid = client.recv()
            process = FORKS.Process(target=run_as_main, args=(script, args, env, cwd, f"/proc/{pid}/fd/1", f"/proc/{pid}/fd/2"))
            process.start()
            process.join()
            client.send(process.exitcode)


@functools.cache
def server():
    listener = multiprocessing.connection.Listener()
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    return listener.address


def shell(code, cwd=None):
    """Runs lines of bash as they are printed; python script.py and python -c are forks too. Returns what they wrote on stdout."""
    python = shlex.quote(sys.executable)
    functions = (f"python() {{ case $1 in *.py|-c) {python} -S -c {shlex.quote(CLIENT)} {shlex.quote(server())} \"$@\";; "
                 f"*) {python} \"$@\";; esac; }}\n")
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", functions + code], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "HF_DATASETS_OFFLINE": "1"})
    assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def refused(script, *args, code=2, **how):
    """Runs a script that must refuse: returns its one line of error."""
    out, err = run(script, *args, expect=code, **how)
    assert "Traceback" not in out + err, err
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("step ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def log_lines(out_dir, kind):
    lines = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


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
