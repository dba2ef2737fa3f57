"""fineweb.py and hellaswag.py, beside what others do."""
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.shared import ROOT, descendants, fineweb, table

import hellaswag

# -----------------------------------------------------------------------------
# fineweb.py

SHARD_SIZE = 5_000_000

# What build-nanogpt's fineweb.py does, written from its description: every document goes alone through Pool.imap, with
# half the cores and chunks of 16, comes back as an array, and is copied into a buffer of one shard.
PEER = """
import multiprocessing, os, sys
import datasets, numpy as np
sys.path.insert(0, ROOT)
import fineweb

encoding = fineweb.get_tokenizer("gpt2").encoding

def tokens_of(document):
    ids = np.array([50256] + encoding.encode_ordinary(document["text"]))
    assert (0 <= ids).all() and (ids < 2**16).all()
    return ids.astype(np.uint16)

if __name__ == "__main__":
    files, out, shard_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    documents = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=out + "/cache")
    buffer, filled, shard = np.empty(shard_size, dtype=np.uint16), 0, 0

    def save():
        np.save(f"{out}/edufineweb_{'train' if shard else 'val'}_{shard:06d}.npy", buffer[:filled])

    with multiprocessing.Pool(max(1, os.cpu_count() // 2)) as pool:
        for ids in pool.imap(tokens_of, documents, chunksize=16):
            while len(ids) > shard_size - filled:
                room = shard_size - filled
                buffer[filled:], filled = ids[:room], shard_size
                save()
                ids, filled, shard = ids[room:], 0, shard + 1
            buffer[filled:filled + len(ids)] = ids
            filled += len(ids)
    save()
"""

# tiktoken alone, one process for each core, the texts already in its memory: no program can do better with it.
BOUND = """
import glob, multiprocessing, os, sys, time
sys.path.insert(0, ROOT)
import fineweb
from pyarrow import parquet

def encode(part):
    encoding, parts, texts = fineweb.get_tokenizer("gpt2").encoding, os.cpu_count(), []
    for path in sorted(glob.glob(sys.argv[1])):
        texts += parquet.read_table(path, columns=["text"])["text"].to_pylist()
    barrier.wait()
    begun = time.time()
    tokens = sum(len(encoding.encode_ordinary(text)) + 1 for text in texts[part::parts])
    return tokens, time.time() - begun

def start(shared):
    global barrier
    barrier = shared

if __name__ == "__main__":
    parts = os.cpu_count()
    with multiprocessing.Pool(parts, start, (multiprocessing.Barrier(parts),)) as pool:
        results = pool.map(encode, range(parts), chunksize=1)
    print(sum(tokens for tokens, _ in results), max(seconds for _, seconds in results))
"""


def documents(megabytes, seed=0):
    """English-like documents of a few thousand characters: a Markov chain over the words of the corpus, with one word
    in twenty made up, because real text never runs out of new ones."""
    words = re.findall(r"\S+\s*", (ROOT / "input.txt").read_text(encoding="utf-8"))
    followers = {}
    for word, after in zip(words, words[1:]):
        followers.setdefault(word, []).append(after)
    rng = random.Random(seed)
    syllables = "ba con de er fi gra ho in ka lum mo nor pri qui re sta tion ur ve wi xa y 1 20 99 ’s é".split()
    word, written = words[0], 0
    while written < megabytes * 1e6:
        text = []
        for _ in range(int(rng.lognormvariate(6.2, 0.8)) + 20):
            word = rng.choice(followers.get(word, words))
            is_new = rng.random() < 0.05
            text.append("".join(rng.choices(syllables, k=rng.randrange(2, 5))) + " " if is_new else word)
        text = "".join(text)
        written += len(text.encode())
        yield text


def write_files(folder, megabytes, num_files=4):
    """Parquet files with FineWeb-Edu's columns; returns the bytes of text in them."""
    import pyarrow as pa
    from pyarrow import parquet
    texts = list(documents(megabytes))
    for i in range(num_files):
        part = texts[i::num_files]
        rows = len(part)
        columns = {
            "text": part, "id": [f"<urn:uuid:{j}>" for j in range(rows)], "dump": ["CC-MAIN-2024-10"] * rows,
            "url": ["https://example.org"] * rows, "file_path": ["s3://x"] * rows, "language": ["en"] * rows,
            "language_score": [0.9] * rows, "token_count": [len(text) // 4 for text in part], "score": [3.0] * rows,
            "int_score": [3] * rows}
        parquet.write_table(pa.table(columns), os.path.join(folder, f"{i:03d}.parquet"), row_group_size=1000)
    return sum(len(text.encode()) for text in texts)


def resident(pid):
    """MiB that a process and its descendants hold; pages that they share count once."""
    total = 0
    for process in (pid, *descendants(pid)):
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += int(re.search(r"Pss:\s*(\d+)", text)[1]) / 1024
        except (OSError, TypeError):  # it has just ended, or this system tells nothing
            pass
    return total


def timed(command):
    """(seconds, peak MiB) of a command and all its processes."""
    started, peak = time.time(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{command} ended with exit code {process.returncode}")
    return time.time() - started, round(peak)


def tokenize_rows(megabytes, repeats=2, copies=1):
    """For so many megabytes of text, `copies` times. One row for each method, the best of `repeats` alternating runs:
    method, tokens_per_s, MB_per_s, seconds, peak_rss_mb (all processes together), ratio (to the peer's speed). Raises
    AssertionError if the tokens differ."""
    with tempfile.TemporaryDirectory() as folder:
        size = write_files(folder, megabytes) * copies
        for path in list(Path(folder).glob("*.parquet")):
            for i in range(1, copies):
                shutil.copy(path, path.with_stem(f"{path.stem}_{i}"))
        pattern = os.path.join(folder, "*.parquet")
        scripts = {}
        for name, code in (("peer", PEER), ("bound", BOUND)):
            scripts[name] = Path(folder, f"{name}.py")
            scripts[name].write_text(code.replace("ROOT", repr(str(ROOT))), encoding="utf-8")
        peer_out, our_out = os.path.join(folder, "peer"), os.path.join(folder, "ours")
        peer = [sys.executable, str(scripts["peer"]), pattern, peer_out, str(SHARD_SIZE)]
        ours = [sys.executable, str(ROOT / "fineweb.py"), "--files", pattern, "--out", our_out, "--shard_size",
                str(SHARD_SIZE)]
        best, streams = {}, {}
        for _ in range(repeats):
            for method, out, command in (("imap of documents", peer_out, peer), ("fineweb.py", our_out, ours)):
                shutil.rmtree(out, ignore_errors=True)
                os.mkdir(out)
                best[method] = min(best.get(method, (1e9, 0)), timed(command))
                paths = fineweb.list_shards(out, "val") + fineweb.list_shards(out, "train")
                streams[method] = np.concatenate([fineweb.read_shard(path) for path in paths])
            command = [sys.executable, str(scripts["bound"]), pattern]
            num_tokens, seconds = subprocess.check_output(command, text=True).split()
            alone = best.get("tiktoken alone, all cores", (1e9, None))
            best["tiktoken alone, all cores"] = min(alone, (float(seconds), None))
    first, second = streams.values()
    if not np.array_equal(first, second) or int(num_tokens) != len(first):
        raise AssertionError("the methods do not give the same tokens")
    peer_seconds = best["imap of documents"][0]
    return [{"method": method, "tokens_per_s": round(len(first) / seconds),
             "MB_per_s": round(size / 1e6 / seconds, 1), "seconds": round(seconds, 2), "peak_rss_mb": peak,
             "ratio": round(peer_seconds / seconds, 2)} for method, (seconds, peak) in best.items()]


def tokenize(args):
    """A short run, in which starting tells, and a long one."""
    tables = []
    for repeats, copies in ((2, 1), (1, args.copies)):
        rows = tokenize_rows(args.megabytes, repeats, copies)
        tables.append(table(f"Tokenizing {args.megabytes * copies} MB of parquet on {os.cpu_count()} cores, start and "
                            "end of the processes included", rows))
    return tables

# -----------------------------------------------------------------------------
# hellaswag.py

BLOCKS, HEAD = 85.0e6, 38.6e6  # GPT-2 124M: parameters that multiply every token, and every scored position


def realistic_examples(n, encode, seed=0):
    """n examples with the validation set's shape: contexts of about 25 tokens and endings of about 14, both spread."""
    rng = random.Random(seed)
    words = ("the a man woman is are was and with into over across holding water paint snow kitchen camera crowd ball "
             "rope hair slowly then begins to clean cut place your of in on it he she they while behind").split()
    words = [word for word in words if len(encode(" " + word)) == 1]

    def text(mean, deviation, least, most):
        length = min(max(rng.gauss(mean, deviation), least), most)
        return " ".join(rng.choice(words) for _ in range(round(length)))

    examples = []
    for _ in range(n):
        middle = rng.gauss(13, 5)  # the four endings of an example resemble each other in length
        ctx = text(*rng.choice([(14, 6), (36, 12)]), 4, 90)
        examples.append({"ctx": ctx, "ctx_a": ctx, "ctx_b": "", "activity_label": "Cleaning windows",
                         "label": rng.randrange(4), "endings": [text(middle, 4, 2, 45) for _ in range(4)]})
    return examples


@torch.no_grad()
def one_at_a_time(model, examples, encode):
    """build-nanogpt's way: the four rows of an example padded to the longest, fp32, all the logits and their losses.
    Returns (seconds, predictions by mean loss)."""
    started, predictions = time.perf_counter(), []
    for example in examples:
        context, endings = encode(example["ctx"]), [encode(" " + ending) for ending in example["endings"]]
        width = len(context) + max(map(len, endings))
        tokens, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width)
        for i, ending in enumerate(endings):
            tokens[i, :len(context) + len(ending)] = torch.tensor(context + ending)
            mask[i, len(context):len(context) + len(ending)] = 1
        logits = model(tokens).logits[:, :-1].contiguous()
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        mask = mask[:, 1:].contiguous()
        predictions.append(int(((losses * mask).sum(1) / mask.sum(1)).argmin()))
    return time.perf_counter() - started, predictions


def matmul_rate(dtype):
    """Multiply-adds this machine does, in FLOP/s: the best of the model's largest products."""
    rates = []
    for rows, inside, outside in ((2048, 768, 3072), (2048, 3072, 768), (512, 768, 50257)):
        a, b = (torch.randn(n, inside, dtype=getattr(torch, dtype)) for n in (rows, outside))
        for _ in range(4):
            started = time.perf_counter()
            F.linear(a, b)
            rates.append(2 * rows * inside * outside / (time.perf_counter() - started))
    return max(rates)


def operations_of(examples, encode):
    """FLOP of an example that no way of scoring can do without."""
    read = scored = 0
    for example in examples:
        lengths = [len(encode(" " + ending)) for ending in example["endings"]]
        read += len(encode(example["ctx"])) + sum(lengths) - 4  # an ending's last token is never read
        scored += sum(lengths)
    return (2 * BLOCKS * read + 2 * HEAD * scored) / len(examples)


def hellaswag_rows(n=120, compare=40, dtypes=("float32",), rounds=2):
    """Rows {method, dtype, examples_per_s, ratio, same answers}. Ours scores n examples, the one-at-a-time method the
    first `compare` of them, in turns: the speed of a machine that others share drifts. ratio is to the one-at-a-time
    method. A last row for each dtype: the operations that ours cannot do without, at the measured matmul rate."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = fineweb.get_tokenizer("gpt2")
    examples = realistic_examples(n, tokenizer.encode)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    ours, seconds, rates = {}, dict.fromkeys(dtypes, 0.0), {dtype: [] for dtype in dtypes}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for dtype in dtypes:  # as `hellaswag.py --model` opens it
            opened, encode = hellaswag.open_model(folder, "completion")
            ours[dtype] = opened.to(getattr(torch, dtype))
            hellaswag.evaluate(ours[dtype], examples[:4], encode)
    one_at_a_time(model, examples[:2], tokenizer.encode)
    peer_seconds, answers = one_at_a_time(model, examples[:compare], tokenizer.encode)
    answered = [example | {"label": answer} for example, answer in zip(examples, answers)]
    agreement = {dtype: hellaswag.evaluate(opened, answered, encode)["acc_norm"] for dtype, opened in ours.items()}
    for _ in range(rounds):
        for dtype in dtypes:
            rates[dtype].append(matmul_rate(dtype))
            started = time.perf_counter()
            hellaswag.evaluate(ours[dtype], examples, encode)
            seconds[dtype] += time.perf_counter() - started
        peer_seconds += one_at_a_time(model, examples[:compare], tokenizer.encode)[0]
    peer_speed = compare * (rounds + 1) / peer_seconds
    speeds = [("one at a time, padded", "float32", peer_speed, None)]
    for dtype in dtypes:
        same = f"{agreement[dtype]:.1%} of {compare}"
        speeds.append(("hellaswag.py", dtype, n * rounds / seconds[dtype], same))
    for dtype in dtypes:
        speeds.append(("operations that it cannot do without, at this chip's best matmul rate", dtype,
                       max(rates[dtype]) / operations_of(examples, tokenizer.encode), None))
    return [{"method": method, "dtype": dtype, "examples_per_s": speed, "ratio": speed / peer_speed,
             "same answers": same} for method, dtype, speed, same in speeds]


def score(args):
    fastest = str(hellaswag.pick_dtype("auto", "cpu", (256, 768, 3072))[0])[6:]
    rows = hellaswag_rows(args.examples, dtypes=tuple(dict.fromkeys(["float32", fastest])))
    return [table("HellaSwag, GPT-2 124M's shape untrained, whose near ties bfloat16 may decide otherwise", rows)]
