"""Files, folders and texts as users bring them: links, spellings, endless runs of one character, other programs' files."""
import glob
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import fineweb
from conftest import ROOT, SMALL, log_lines, losses, run, save_llama2_tokenizer, spawn, wait_for
from conftest import refused as train_refused
from test_fineweb import expected_stream, refused


def tokens_of(folder):
    paths = fineweb.list_shards(folder, "val") + fineweb.list_shards(folder, "train")
    return np.concatenate([fineweb.read_shard(path) for path in paths])


def test_one_file_counts_once(tmp_path):
    """Whatever the spelling of its path, and through links."""
    (tmp_path / "x").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"The text of {name}.\n" * 20)
    (tmp_path / "c.txt").symlink_to("a.txt")
    files = ["a.txt", "./a.txt", "x/../a.txt", "c.txt", "*.txt", str(tmp_path / "b.txt")]
    out, _ = run("fineweb.py", "--files", *files, "--out", "shards", "--workers", 1, cwd=tmp_path)
    assert out.startswith("2 documents")
    (tmp_path / "one").mkdir()
    (tmp_path / "one/only.txt").write_text("To be, or not to be")
    out, _ = run("fineweb.py", "--files", tmp_path / "one", "--out", tmp_path / "only", "--tokenizer", "byte", "--workers", 1)
    assert out.startswith("1 document, 20 tokens, 2 shards, ")
    texts = [(tmp_path / f"{name}.txt").read_text() for name in ("a", "b")]
    assert sorted(tokens_of(tmp_path / "shards")) == sorted(expected_stream(texts))


def test_a_folder_is_everything_known_in_it_and_links_end(tmp_path):
    (tmp_path / "books/more").mkdir(parents=True)
    (tmp_path / "books/one.txt").write_text("one\n" * 10)
    (tmp_path / "books/more/two.txt").write_text("two\n" * 10)
    (tmp_path / "books/more/notes.pdf").write_text("no text")
    (tmp_path / "books/loop").symlink_to(".")
    (tmp_path / "books/more/up").symlink_to("..")
    for i, pattern in enumerate(["books", "books/**/*.txt", str(tmp_path / "books/**/*.txt"), "**/*.txt"]):
        out, _ = run("fineweb.py", "--files", pattern, "--out", f"shards{i}", "--workers", 1, cwd=tmp_path)
        assert out.startswith("2 documents"), pattern
        expected = expected_stream(["two\n" * 10, "one\n" * 10])  # in the sorted order of their paths
        assert np.array_equal(tokens_of(tmp_path / f"shards{i}"), expected), pattern


def test_a_path_is_taken_as_it_stands_and_none_is_lost(tmp_path):
    """Brackets in a file's name, which glob would read as a set of characters, and a file that is not there."""
    names = ["a[1].txt", "b?.txt", "c.txt"]
    (tmp_path / "texts [old]").mkdir()
    for name in names:
        (tmp_path / "texts [old]" / name).write_text(f"The text of {name}.\n" * 20)
    paths = [tmp_path / "texts [old]" / name for name in names]
    expected = expected_stream([path.read_text() for path in paths])
    for i, files in enumerate([paths, paths[:1] + [tmp_path / "texts [old]"]]):
        run("fineweb.py", "--files", *files, "--out", tmp_path / f"shards{i}", "--workers", 1)
        assert np.array_equal(tokens_of(tmp_path / f"shards{i}"), expected)
    for missing in (tmp_path / "gone.txt", tmp_path / "*.jsonl"):
        said = refused("--files", *paths, missing, "--out", tmp_path / "no", "--workers", 1)
        assert f"{missing}: no such file" in said
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/a.zip").write_bytes(b"")
    assert f"{tmp_path / 'packed'}: holds no" in refused("--files", tmp_path / "packed", "--out", tmp_path / "no")


@pytest.mark.parametrize("seed", range(4))
def test_patterns_mean_what_glob_means_by_them(seed, tmp_path, monkeypatch):
    """In trees of folders whose names hold brackets, stars and dots."""
    rng = np.random.default_rng(seed)
    names = ["a", "d", "d1", "[old]", "x[1]", "s*r", "q?", ".hidden", "d**", "b c"]
    folders = [tmp_path]
    for name in rng.choice(names, 14):
        folders.append(folders[rng.integers(len(folders))] / name)
        folders[-1].mkdir(exist_ok=True)
    for folder in folders:
        for name in rng.choice(["one.txt", "[2].txt", "d.txt", "n.md"], 2):
            (folder / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    for pattern in ["**/*.txt", "d**/*.txt", "**d/*.txt", "d**", "**", "*/**/*.txt", "**/d/**/*.txt", "**/**/one.txt",
                    "**/[[]old]/*", "d/**", "./**/*.md", "**/[[]2].txt", "**//*.md", "d**/**/*.txt", "*/d**/*"]:
        for start in ("", f"{tmp_path}/"):
            ours = {os.path.realpath(path) for path in fineweb.expand(start + pattern) if os.path.isfile(path)}
            theirs = {os.path.realpath(path) for path in glob.glob(start + pattern, recursive=True) if os.path.isfile(path)}
            assert ours == theirs, pattern


def test_folders_with_brackets_in_a_pattern(tmp_path):
    for i, name in enumerate(["plain", "with [brackets]", "d1/deeper"]):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "text.txt").write_text(f"The text of {name}.\n" * 20)
    for pattern, number in (("**/*.txt", 3), ("d**/*.txt", 0), ("d**/*/*.txt", 1), ("**[[]*/*.txt", 1)):
        command = ["--files", pattern, "--out", f"out{pattern.replace('/', '')}", "--workers", 1]
        if number:
            out, _ = run("fineweb.py", *command, cwd=tmp_path)
            assert re.match(rf"{number} documents?, ", out), pattern
        else:
            assert f"{pattern}: no such file" in train_refused("fineweb.py", *command, cwd=tmp_path)


@pytest.mark.parametrize("pattern", ["**/*.json", "**/*", "shards/*", "**", "listed", "**/*.txt"])
def test_a_pattern_that_matches_the_output(pattern, tmp_path):
    """The same command continues, and is complete when it is: with a tokenizer's files there, too. Texts of the user's
    in the folder of the output are read."""
    save_llama2_tokenizer(tmp_path / "tok", ["some", "text"])
    here = tmp_path / "here"
    (here / "shards").mkdir(parents=True)
    (here / "shards/a.json").write_text(json.dumps([{"text": "some text"}] * 2000))
    (here / "shards/b.txt").write_text("some text " * 500)

    def command():  # as a shell lists the files
        listed = sorted(str(path.relative_to(here)) for path in (here / "shards").rglob("*.json"))
        return ["--files", *(listed if pattern == "listed" else [pattern]), "--out", "shards", "--shard_size", 1000,
                "--workers", 1, "--tokenizer", tmp_path / "tok"]
    first, _ = run("fineweb.py", *command(), cwd=here)
    (here / "shards/edufineweb_train_000001.npy").unlink()
    for remark in (" MB/s", "complete already"):
        again, _ = run("fineweb.py", *command(), cwd=here)
        assert again.split(" shards")[0] == first.split(" shards")[0] and remark in again
    only_ours = ["--files", "shards/manifest.json", "--out", "shards"]
    assert "only what a build wrote into shards" in train_refused("fineweb.py", *only_ours, cwd=here)


@pytest.mark.parametrize("files", ["texts", "texts/*", "texts/*.parquet", "texts/corpus.parquet", "**/*.parquet", "."])
def test_a_folder_named_like_a_file(files, tmp_path):
    """As Spark writes them: its parts are meant."""
    folder = tmp_path / "texts/corpus.parquet"
    folder.mkdir(parents=True)
    for i in range(2):
        parquet.write_table(pa.table({"text": [f"text {i}"] * 20}), folder / f"part-0000{i}.snappy.parquet")
    (folder / "_SUCCESS").touch()
    (folder / ".part-00000.snappy.parquet.crc").write_bytes(b"crc")
    out, _ = run("fineweb.py", "--files", files, "--out", "shards", "--workers", 1, cwd=tmp_path)
    assert out.startswith("40 documents")
    assert np.array_equal(tokens_of(tmp_path / "shards"), expected_stream(["text 0"] * 20 + ["text 1"] * 20))


def test_the_home_folder_in_a_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("some text\n" * 20)
    run("fineweb.py", "--files", "~/a.txt", "--out=~/shards", "--workers", 1)
    assert (tmp_path / "shards/manifest.json").exists()


def least_seconds(function, *args):
    """Of this thread's CPU time in three calls, however fast the machine is and whatever else it does."""
    seconds = []
    for _ in range(3):
        started = time.thread_time()
        function(*args)
        seconds.append(time.thread_time() - started)
    return min(seconds)


@pytest.mark.parametrize("text", [" " * 1_000_000, "\n" * 3_000_000, "\t" * 3_000_000, " \n" * 1_000_000, "a" * 500_000,
                                  "東" * 300_000, "-" * 500_000, "7" * 500_000],
                         ids=["spaces", "newlines", "tabs", "both", "letters", "CJK", "dashes", "digits"])
def test_long_runs_take_bounded_time_and_memory(text, tmp_path):
    """Both ways into the tokenizer; what stands before and after the run keeps its tokens, and nothing is lost."""
    tokenizer = fineweb.get_tokenizer("gpt2")
    once, twice = (least_seconds(tokenizer.encode, text[:4 * times * fineweb.LONGEST_RUN]) for times in (1, 2))
    assert twice < 3 * once  # four times as long where the time grows with the square, as that of tiktoken 0.12 does
    text = f"Before it.{text}\nAnd what comes after it, as ever.\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and ids == tokenizer.encode_array(text).tolist()
    tail = tokenizer.encoding.encode_ordinary("And what comes after it, as ever.\n")
    assert ids[:3] == tokenizer.encoding.encode_ordinary("Before it.") and ids[-len(tail):] == tail
    (tmp_path / "text.txt").write_text(text, newline="")
    run("fineweb.py", "--files", tmp_path / "text.txt", "--out", tmp_path / "shards", "--workers", 1)
    assert tokenizer.decode(tokens_of(tmp_path / "shards")[1:].tolist()) == text


def test_ordinary_text_is_not_cut():
    """Runs up to the bound keep tiktoken's tokens; so do texts that hold many of them."""
    tokenizer = fineweb.get_tokenizer("gpt2")
    bound = fineweb.LONGEST_RUN
    words = (ROOT / "input.txt").read_text()[:200_000]
    for text in ("", " ", words, words.replace(" ", ""), f"x{' ' * (bound - 1)}y" * 3, f"{'ab' * (bound // 2 - 1)} " * 3):
        if max(map(len, text.split()), default=0) < bound:
            assert list(fineweb.cut_long_runs(text)) == [text]
            assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)
        assert "".join(fineweb.cut_long_runs(text)) == text



BUILD = """
import re, resource, sys
sys.path.insert(0, sys.argv[1])
import fineweb
if __name__ == "__main__":
    fineweb.main(["--files", sys.argv[2], "--out", sys.argv[3], "--workers", "1", "--shard_size", "1000000"])
    own = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]  # of this program alone, not of who started it
    print(int(own) // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def test_three_million_newlines_in_300_mb(tmp_path):
    (tmp_path / "text.txt").write_text("\n" * 3_000_000)
    (tmp_path / "build.py").write_text(BUILD)
    done = subprocess.run([sys.executable, tmp_path / "build.py", ROOT, tmp_path / "text.txt", tmp_path / "shards"],
                          capture_output=True, text=True, timeout=600, check=True)
    assert sum(map(int, done.stdout.splitlines()[-1].split())) < 300


@pytest.mark.parametrize("manifest", [{"shards": ["a.npy"]}, {"shards": [{"name": "a.npy"}]}, {"shards": {"a": 1}},
                                      {"name": "a page's", "icons": []}, {"shards": [], "settings": 1},
                                      {"shards": ["a.npy"], "settings": {}, "vocab_size": 1, "tokens": 1, "complete": True}])
def test_another_programs_manifest_is_one_line(manifest, tmp_path):
    (tmp_path / "text.txt").write_text("some text\n" * 20)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/manifest.json").write_text(json.dumps(manifest))
    for command in (["--verify", tmp_path / "shards"], ["--files", tmp_path / "text.txt", "--out", tmp_path / "shards"]):
        assert "manifest.json: not one of fineweb.py's" in refused(*command)


def test_json_that_is_nested_too_deep_is_one_line(tmp_path):
    (tmp_path / "deep.jsonl").write_text('{"text": "good"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    said = refused("--files", tmp_path / "deep.jsonl", "--out", tmp_path / "shards", "--workers", 1)
    assert "deep.jsonl: row 2: not JSON" in said


def test_two_builds_into_one_folder(tmp_path):
    """The second is refused at once and names the first, which goes on; a lock of a killed one does not stay."""
    text = (ROOT / "input.txt").read_text()
    (tmp_path / "text.txt").write_text(text * 40)
    command = ["--files", tmp_path / "text.txt", "--out", tmp_path / "shards", "--shard_size", 100_000, "--workers", 1]
    first = spawn("fineweb.py", *command)
    wait_for(lambda: len(fineweb.list_shards(tmp_path / "shards", "train")) > 1, first)
    assert f"process {first.pid} is writing into it" in refused(*command)
    before = len(fineweb.list_shards(tmp_path / "shards", "train"))
    wait_for(lambda: len(fineweb.list_shards(tmp_path / "shards", "train")) > before, first)
    first.kill()
    first.wait()
    run("fineweb.py", *command)
    run("fineweb.py", "--verify", tmp_path / "shards")


# -----------------------------------------------------------------------------
# CSV

@pytest.mark.parametrize("name, separator", [("a.csv", ","), ("a.csv.gz", ","), ("a.tsv", "\t")])
def test_a_quote_that_is_never_closed_is_told(name, separator, tmp_path):
    rows = [f"{i}{separator}text {i}" for i in range(40)]
    rows[2] = f'2{separator}"open'
    data = "\n".join([f"id{separator}text", *rows]).encode() + b"\n"
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    said = refused("--files", tmp_path / name, "--out", tmp_path / "shards", "--workers", 1)
    assert f"{name}: row 3: a quote is opened and never closed" in said
    assert not (tmp_path / "shards").exists() or not fineweb.list_shards(tmp_path / "shards", "train")


@pytest.mark.parametrize("data, says", [
    (b'text\n"a"b\n', "row 1: "), (b"text\n" + b"x" * (1 + (1 << 24)) + b"\n", "row 1: field larger than field limit (16777216)"),
    (b'text\nfine\n"' + b"x y\n" * (1 + (1 << 22)) + b'"\n', "row 2: field larger than field limit (16777216)"),
    (b"text\nfine\n" + b"x\xff\n", "not UTF-8"), (b"id\ttext\n1\tone\n", "row 1: no field 'text', only id\ttext")])
def test_csv_that_is_none(data, says, tmp_path):
    (tmp_path / "a.csv").write_bytes(data)
    assert says in refused("--files", tmp_path / "a.csv", "--out", tmp_path / "shards", "--workers", 1)


def what_reading_takes(path):
    """(the characters of a file's documents, or the error; MB of memory at the highest)."""
    code = """if 1:
        import sys
        sys.path.insert(0, sys.argv[1])
        import fineweb
        files = fineweb.LocalFiles(fineweb.Config(files=(sys.argv[2],)))
        try:
            print(sum(len(text) for *_, text in files.texts(fineweb.Place(0, 0, 0), None, True)))
        except fineweb.UserError as error:
            print(error)
        print(int(next(l for l in open("/proc/self/status") if "VmHWM" in l).split()[1]) // 1024)
    """
    done = subprocess.run([sys.executable, "-c", code, ROOT, path], capture_output=True, text=True, check=True)
    said, megabytes = done.stdout.splitlines()
    return said, int(megabytes)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_large_rows_of_other_kinds_take_bounded_memory(kind, tmp_path):
    """300 MB in rows of 10 MB."""
    texts = ["some words " * 950_000] * 30
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False, write_batch_size=1)
    said, megabytes = what_reading_takes(tmp_path / f"a.{kind}")
    assert megabytes < 350 and int(said) == sum(map(len, texts))


@pytest.mark.parametrize("last", ["", '"late\n'])
def test_large_csv_rows_take_bounded_memory(last, tmp_path):
    """120 MB in rows of 10 MB; and where a quote opens late nothing is read beyond the longest row."""
    with open(tmp_path / "a.csv", "w") as f:
        f.write("id,text\n")
        for i in range(12):
            f.write(f'{i},"{"some words " * 950_000}"\n')
        f.write(last)
    said, megabytes = what_reading_takes(tmp_path / "a.csv")
    assert megabytes < 250
    assert "row 13: a quote is opened and never closed" in said if last else int(said) == 12 * 11 * 950_000


# -----------------------------------------------------------------------------
# kinds of files

def test_every_kind_of_text_and_of_rows(tmp_path):
    texts = [f"text number {i}\nof some" for i in range(12)]
    (tmp_path / "a.md").write_text(texts[0])
    (tmp_path / "b.json").write_text(json.dumps([{"text": text} for text in texts[1:4]], indent=1))
    (tmp_path / "c.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[4:6]))
    (tmp_path / "d.ndjson").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[6:8]))
    (tmp_path / "e.tsv").write_text("id\ttext\n" + "".join(f'{i}\t"{text}"\n' for i, text in enumerate(texts[8:10])))
    (tmp_path / "f.json.gz").write_bytes(gzip.compress(json.dumps([{"text": texts[10]}]).encode()))
    (tmp_path / "g.rst").write_text(texts[11])
    (tmp_path / "h.html").write_text("<p>no plain text</p>")
    run("fineweb.py", "--files", tmp_path, "--out", tmp_path / "shards", "--workers", 1)
    assert np.array_equal(tokens_of(tmp_path / "shards"), expected_stream(texts))


def test_nested_fields(tmp_path):
    """A field that has the dots in its name goes first."""
    texts = [f"text number {i}" for i in range(20)]
    nested = [{"meta": {"text": text, "id": i}} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in nested))
    parquet.write_table(pa.Table.from_pylist(nested), tmp_path / "b.parquet")
    flat = [{"meta.text": text, "meta": {"text": "not this"}} for text in texts]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flat))
    parquet.write_table(pa.Table.from_pylist([{"meta.text": text} for text in texts]), tmp_path / "d.parquet")
    run("fineweb.py", "--files", tmp_path, "--text_field", "meta.text", "--out", tmp_path / "shards", "--workers", 1)
    assert np.array_equal(tokens_of(tmp_path / "shards"), expected_stream(4 * texts))
    for name in ("a.jsonl", "b.parquet"):
        said = refused("--files", tmp_path / name, "--text_field", "meta.body", "--out", tmp_path / "no", "--workers", 1)
        assert f"{name}: row 1: no field 'meta.body', only meta" in said


@pytest.mark.parametrize("name, says", [("a.zip", "unzip"), ("a.tar", "tar -xf"), ("a.tar.gz", "tar -xf"), ("a.tgz", "tar -xf"),
                                        ("a.7z", "7z x"), ("a.jsonl.bz2", "bunzip2"), ("a.jsonl.xz", "unxz"),
                                        ("a.tar.bz2", "tar -xf"), ("a.tar.xz", "tar -xf"), ("A.ZIP", "unzip"),
                                        ("a.html", "pandoc -t plain -o text.txt"), ("a.html.gz", "gunzip")])
def test_what_is_not_read_as_it_is_is_refused_with_the_command(name, says, tmp_path):
    (tmp_path / name).write_bytes(b"")
    said = refused("--files", tmp_path / name, "--out", tmp_path / "shards")
    assert name in said and f"{says} {tmp_path / name}" in said


@pytest.mark.parametrize("encoding, command", [("utf-16", "iconv -f utf-16 "), ("utf-16-le", "iconv -f utf-16le "),
                                               ("utf-16-be", "iconv -f utf-16be "), ("latin1", "iconv -f latin1 ")])
@pytest.mark.parametrize("name", ["a.txt", "a.md.gz", "a.jsonl", "a.json", "a.ndjson.gz", "a.csv", "a.tsv"])
def test_other_encodings_are_told_the_command_that_converts_them(name, encoding, command, tmp_path):
    rows = [{"text": f"caf\u00e9 {i}"} for i in range(20)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = {"json": f"[{', '.join(lines)}]", "jsonl": "\n".join(lines), "ndjson": "\n".join(lines)}.get(name.split(".")[1])
    data = (text or "text\n" + "\n".join(row["text"] for row in rows)).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    said = refused("--files", tmp_path / name, "--out", tmp_path / "shards", "--workers", 1)
    plain = tmp_path / name.removesuffix(".gz")
    assert f"{name}: " in said and f"not UTF-8; {'unpack and ' if name.endswith('gz') else ''}convert it: {command}" in said
    assert said.endswith(f"-t utf-8 {plain} > utf8.{plain.suffix[1:]}")


@pytest.mark.parametrize("name, kept", [("a.txt", "na\u00efve caf\u00e9s. " * 20), ("a.jsonl", '{"text": "na\u00efve"}\n' * 20)])
def test_damaged_utf8_is_mended_by_the_command_that_is_printed(name, kept, tmp_path):
    """What is right in it stays as it is: not read as Latin-1."""
    damaged = kept.encode().replace(b"na", b"na\xff", 1) if name.endswith(".jsonl") else kept.encode() + b"\xc3"
    (tmp_path / name).write_bytes(damaged)
    said = refused("--files", tmp_path / name, "--out", tmp_path / "shards", "--workers", 1)
    subprocess.run(said.partition("convert it: ")[2], shell=True, cwd=tmp_path)
    assert (tmp_path / f"utf8.{name[2:]}").read_text() == kept


@pytest.mark.parametrize("name", ["a.docx", "a.pdf", "a.txt"])
def test_binary_data_is_no_text(name, tmp_path):
    (tmp_path / name).write_bytes(b"PK\x03\x04" + np.random.default_rng(0).bytes(10_000))
    said = train_refused("train_gpt2.py", "--data", tmp_path / name, *SMALL, "--preset", "tiny", "--out_dir", tmp_path / "log")
    assert "not a text, but binary data" in said and "iconv" not in said


def test_a_text_of_parquet_that_is_not_utf8(tmp_path):
    column = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"b\xffd"]).buffers())
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    said = refused("--files", tmp_path / "a.parquet", "--out", tmp_path / "shards", "--workers", 1)
    assert "at or after row 1 is not UTF-8" in said and "iconv" not in said


def test_capitals_in_an_ending(tmp_path):
    (tmp_path / "DATA.JSONL").write_text('{"text": "one"}\n' * 200)
    said = train_refused("train_gpt2.py", "--data", tmp_path / "DATA.JSONL", *SMALL, "--out_dir", tmp_path / "log")
    assert "neither plain text nor" in said and "make shards by" in said


def test_no_file_is_not_the_data_set(tmp_path):
    """A shell's list of files may be empty: that must not start a download."""
    assert "--files: no file" in refused("--files", "--out", tmp_path / "shards")


def test_the_output_inside_the_input(tmp_path):
    """A folder of texts that holds the shards, too: the same command continues."""
    (tmp_path / "a.txt").write_text((ROOT / "input.txt").read_text()[:20_000])
    command = ["--files", ".", "--out", "shards", "--workers", 1, "--shard_size", 1000]
    run("fineweb.py", *command, cwd=tmp_path)
    whole = tokens_of(tmp_path / "shards")
    (tmp_path / "shards/edufineweb_train_000002.npy").unlink()
    run("fineweb.py", *command, cwd=tmp_path)
    assert np.array_equal(tokens_of(tmp_path / "shards"), whole)


def test_a_folder_that_was_written_while_this_run_started(tmp_path, monkeypatch):
    """Another build ends between reading the manifest and the lock."""
    (tmp_path / "a.txt").write_text("one two three\n" * 500)
    (tmp_path / "b.txt").write_text("four five six\n" * 500)
    command = ["--out", tmp_path / "shards", "--workers", 1, "--shard_size", 500]
    honest = fineweb.lock_folder

    def late(folder):
        monkeypatch.setattr(fineweb, "lock_folder", honest)
        run("fineweb.py", "--files", tmp_path / "b.txt", *command)
        return honest(folder)
    monkeypatch.setattr(fineweb, "lock_folder", late)
    assert "has just written into it" in refused("--files", tmp_path / "a.txt", *command)
    run("fineweb.py", "--verify", tmp_path / "shards")


def test_files_that_are_all_empty(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(9000):  # more than a task's
        (tmp_path / f"texts/{i}.txt").touch()
    out, _ = run("fineweb.py", "--files", tmp_path / "texts", "--out", tmp_path / "shards", "--workers", 1)
    assert out.startswith("9,000 documents, 9,000 tokens")


def test_missing_shards_are_noticed(tmp_path):
    """A copy that was broken off would train on less without a word."""
    (tmp_path / "a.txt").write_text((ROOT / "input.txt").read_text()[:40_000])
    run("fineweb.py", "--files", tmp_path / "a.txt", "--out", tmp_path / "shards", "--workers", 1, "--shard_size", 2000)
    (tmp_path / "shards/edufineweb_train_000002.npy").unlink()
    said = train_refused("train_gpt2.py", "--data", tmp_path / "shards", *SMALL, "--out_dir", tmp_path / "log")
    assert "edufineweb_train_000002.npy is missing" in said


@pytest.mark.parametrize("name, data", [("a.json", '[{"text": "one"}]'), ("a.json", '{"text": "one"}\n'),
                                        ("a.jsonl", '{"text": "one"}\n'), ("a.csv", "text\none\n"), ("a.txt", "one")])
def test_a_byte_order_mark_is_no_text(name, data, tmp_path):
    (tmp_path / name).write_bytes(data.encode("utf-8-sig"))
    run("fineweb.py", "--files", tmp_path / name, "--out", tmp_path / "shards", "--workers", 1)
    assert np.array_equal(tokens_of(tmp_path / "shards"), expected_stream(["one"]))


@pytest.mark.parametrize("content, says", [("[1, 2", "not JSON"), ('[{"text": "a"}, 5]', "row 2: no field 'text'"),
                                           ('[{"text": "a"}, {"text": 5}]', "row 2: field 'text' holds int")])
def test_json_arrays_that_are_none(content, says, tmp_path):
    (tmp_path / "a.json").write_text(content)
    assert says in refused("--files", tmp_path / "a.json", "--out", tmp_path / "shards", "--workers", 1)


# -----------------------------------------------------------------------------
# shards of other trainers

def llmc(tokens):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + tokens.tobytes()


@pytest.mark.parametrize("kind", ["nanoGPT", "llm.c"])
def test_shards_of_other_trainers_train_alike(kind, gpt2_shards, tmp_path):
    for path in fineweb.list_shards(gpt2_shards, "train") + fineweb.list_shards(gpt2_shards, "val"):
        split, tokens = path.split("_")[-2], np.load(path)
        if kind == "nanoGPT":
            with open(tmp_path / f"{split}.bin", "ab") as f:
                f.write(tokens.tobytes())
        else:
            (tmp_path / f"fineweb_{split}_{path[-10:-4]}.bin").write_bytes(llmc(tokens))
    together = tmp_path / "together"
    together.mkdir()
    for split in ("train", "val"):
        parts = [np.load(path) for path in fineweb.list_shards(gpt2_shards, split)]
        np.save(together / f"edufineweb_{split}_000000.npy", np.concatenate(parts))
    flags = ["--preset", "tiny", *SMALL, "--max_steps", 2, "--eval_every", 2]
    run("train_gpt2.py", *flags, "--data", gpt2_shards if kind == "llm.c" else together, "--out_dir", tmp_path / "npy")
    run("train_gpt2.py", *flags, "--data", tmp_path, "--out_dir", tmp_path / "bin")
    assert losses(tmp_path / "npy") == losses(tmp_path / "bin")
    assert log_lines(tmp_path / "npy", "val")[0]["loss"] == log_lines(tmp_path / "bin", "val")[0]["loss"]
    tokens = fineweb.read_shard(fineweb.list_shards(tmp_path, "train")[0])
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16


def test_a_folder_with_npy_and_bin_shards(gpt2_shards, tmp_path):
    """The .npy files are read, whoever made the others."""
    for path in fineweb.list_shards(gpt2_shards, "train") + fineweb.list_shards(gpt2_shards, "val"):
        shutil.copy(path, tmp_path)
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(b"odd")
    for split in ("train", "val"):
        names = [path.split("/")[-1] for path in fineweb.list_shards(tmp_path, split)]
        assert names == [path.split("/")[-1] for path in fineweb.list_shards(gpt2_shards, split)]


@pytest.mark.parametrize("content, says", [
    (llmc(np.arange(3000, dtype="<u2"))[:-2], "holds 2,999 tokens, its header says 3,000"),
    (np.array([20240520, 7, 9], dtype="<i4").tobytes() + bytes(5000), "version 7"),
    (np.array([20240801, 7, 9], dtype="<i4").tobytes() + bytes(5000), "uint32"),
    (b"\1\2\3", "odd"), (b"", "empty"), (np.full(3000, 60000, dtype="<u2").tobytes(), "token 60000 at offset")])
def test_a_bad_bin_is_one_line(content, says, tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(content)
    said = train_refused("train_gpt2.py", "--preset", "tiny", *SMALL, "--quiet", "--data", tmp_path, "--out_dir", tmp_path / "log")
    assert says in said and str(tmp_path / "train.bin") in said


def test_nanogpts_characters_are_refused(tmp_path):
    """Their ids are of a vocabulary in a pickle, which nobody should open."""
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(np.arange(60, dtype="<u2").repeat(50).tobytes())
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    said = train_refused("train_gpt2.py", "--preset", "tiny", *SMALL, "--data", tmp_path, "--out_dir", tmp_path / "log")
    assert "meta.pkl" in said and "input.txt" in said


# -----------------------------------------------------------------------------
# tokenizers

def test_shards_of_any_tokenizer(tmp_path):
    words = ["to", "be", "or", "not", "that", "is", "the", "question"]
    size = save_llama2_tokenizer(tmp_path / "tok", words)
    rng = np.random.default_rng(0)
    texts = [" ".join(words[i] for i in rng.integers(8, size=300)) for _ in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["--files", tmp_path / "a.jsonl", "--out", tmp_path / "shards", "--workers", 1, "--shard_size", 2000]
    run("fineweb.py", *command, "--tokenizer", "tok", cwd=tmp_path)
    manifest = fineweb.read_manifest(tmp_path / "shards")
    assert [manifest[name] for name in ("tokenizer", "vocab_size", "eot", "documents")] == ["tok", size, 1, 20]
    tokenizer = fineweb.get_tokenizer(str(tmp_path / "tok"))
    expected = [token for text in texts for token in [tokenizer.eot, *tokenizer.encode(text)]]
    assert tokens_of(tmp_path / "shards").tolist() == expected
    run("fineweb.py", "--verify", tmp_path / "shards")
    for other in ("gpt2", "byte"):
        assert f'made with tokenizer "tok", now it is "{other}"' in refused(*command, "--tokenizer", other)
    shutil.rmtree(tmp_path / "tok")  # the shards' folder has its files
    run("train_gpt2.py", "--preset", "tiny", *SMALL, "--data", tmp_path / "shards", "--checkpoint_every", 6,
        "--out_dir", tmp_path / "log")
    assert abs(losses(tmp_path / "log")[0] - np.log(size)) < 0.1
    run("train_gpt2.py", "--resume", "--max_steps", 8, "--out_dir", tmp_path / "log")
    out, _ = run("train_gpt2.py", "eval", "--checkpoint", tmp_path / "log/latest")
    last = log_lines(tmp_path / "log", "val")[-1]
    assert f"validation loss {last['loss']:.4f}" in out and f"{last['bpb']:.4f} bits per byte" in out
    out, _ = run("train_gpt2.py", "--preset", "tiny", "--init_from", tmp_path / "log/latest", "--data", tmp_path / "shards",
                 "--max_steps", 2, "--total_batch_size", 64, "--eval_tokens", 64, "--sample_every", 0, "--out_dir", tmp_path / "2")
    save_llama2_tokenizer(tmp_path / "tok", words[::-1])  # as many ids, other words
    for file in (tmp_path / "tok").iterdir():
        shutil.copy(file, tmp_path / "log/step_000008")
    said = train_refused("train_gpt2.py", "eval", "--checkpoint", tmp_path / "log/step_000008", "--data", tmp_path / "shards")
    assert "tok tokens" in said


def test_another_tokenizer_under_the_same_name(tmp_path):
    """Trained again into its folder: the shards of both must not be mixed. A slash after the name changes nothing."""
    words = ["to", "be", "or", "not"]
    save_llama2_tokenizer(tmp_path / "tok", words)
    (tmp_path / "a.txt").write_text("to be or not to be " * 500)
    command = ["--files", tmp_path / "a.txt", "--out", tmp_path / "shards", "--workers", 1, "--shard_size", 500,
               "--tokenizer", tmp_path / "tok"]
    run("fineweb.py", *command)
    (tmp_path / "shards/edufineweb_train_000002.npy").unlink()
    run("fineweb.py", *command[:-1], f"{tmp_path}/tok/")
    before = tokens_of(tmp_path / "shards")
    save_llama2_tokenizer(tmp_path / "tok", words[::-1])
    (tmp_path / "shards/edufineweb_train_000002.npy").unlink()
    assert f"with a tokenizer that was in {tmp_path}/tok before" in refused(*command)
    save_llama2_tokenizer(tmp_path / "tok", words)
    run("fineweb.py", *command)
    assert np.array_equal(tokens_of(tmp_path / "shards"), before)


def test_shards_that_are_not_all_there_train_no_run(tmp_path):
    """Their build was broken off, or their copy: the remedies do what they say."""
    folder, flags = tmp_path / "shards", ["--preset", "tiny", *SMALL, "--data", tmp_path / "shards", "--out_dir", tmp_path / "log"]
    command = ["--files", ROOT / "input.txt", "--tokenizer", "byte", "--shard_size", 200_000, "--workers", 1, "--out", folder]
    run("fineweb.py", *command)
    whole = tokens_of(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "edufineweb_train_000003.npy").unlink()
    said = train_refused("train_gpt2.py", *flags)
    assert "edufineweb_train_000003.npy is missing: copy it or strike it in manifest.json; the same fineweb.py" in said
    for name in ("edufineweb_train_000004.npy", "edufineweb_train_000005.npy"):
        (folder / name).unlink()
    half = manifest | {"complete": False, "shards": manifest["shards"][:3]}
    (folder / "manifest.json").write_text(json.dumps(half))
    said = train_refused("train_gpt2.py", *flags)
    assert "not all of its shards are made; the same fineweb.py command" in said and '"complete": true' in said
    (folder / "manifest.json").write_text(json.dumps(half | {"complete": True}))
    out, _ = run("train_gpt2.py", *flags)
    assert "399,936 tokens to train on" in out  # 2 x 6,249 windows of 32
    (folder / "manifest.json").write_text(json.dumps(half))
    run("fineweb.py", *command)
    assert np.array_equal(tokens_of(folder), whole)


def test_shards_with_their_tokenizer_but_no_manifest(tmp_path):
    """Their copy's name goes into checkpoints, not GPT-2's."""
    save_llama2_tokenizer(tmp_path / "tok", ["to", "be", "or", "not"])
    (tmp_path / "a.txt").write_text("to be or not to be " * 500)
    run("fineweb.py", "--files", tmp_path / "a.txt", "--out", tmp_path / "shards", "--workers", 1, "--tokenizer", tmp_path / "tok")
    (tmp_path / "shards/manifest.json").unlink()
    run("train_gpt2.py", "--preset", "tiny", *SMALL, "--data", tmp_path / "shards", "--checkpoint_every", 6,
        "--out_dir", tmp_path / "log")
    assert json.loads((tmp_path / "log/latest/config.json").read_text())["tokenizer"] == str(tmp_path / "shards/tokenizer")
    out, _ = run("train_gpt2.py", "eval", "--checkpoint", tmp_path / "log/latest")
    bpb = float(out.split(" bits per byte")[0].split()[-1])
    assert bpb == pytest.approx(log_lines(tmp_path / "log", "val")[-1]["bpb"], rel=5e-3)  # eval may take bfloat16


def trained_tokenizer(kind, folder, text):
    """A tokenizer that marks words neither by bytes nor by SentencePiece's space. Returns its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    special = ["<unk>", "</s>"]
    if kind == "WordPiece":
        tokenizer, trainer = Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer(special_tokens=special)
        tokenizer.decoder = decoders.WordPiece(cleanup=False)
    elif kind == "WordLevel":
        tokenizer, trainer = Tokenizer(models.WordLevel(unk_token="<unk>")), trainers.WordLevelTrainer(special_tokens=special)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        tokenizer.decoder = decoders.BPEDecoder("</w>")
        trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, end_of_word_suffix="</w>")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # it takes "</s>" in a text apart
    tokenizer.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["WordPiece", "WordLevel", "BPE with </w>"])
def test_token_bytes_where_spaces_are_between_tokens(kind, tmp_path):
    """Bits per byte count the text that the tokens stand for, with the spaces that decoding puts between words."""
    text = " ".join(re.findall(r"\w+|[^\w\s]+", (ROOT / "input.txt").read_text()[:30_000]))
    tokenizer = fineweb.get_tokenizer(trained_tokenizer(kind, tmp_path / "tok", text))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids).strip() == text
    assert tokenizer.token_bytes()[ids].sum() == pytest.approx(len(text.encode()), rel=0.02)


def save_tokenizer(kind, folder, text):
    """One of those that people bring, trained on the text. Returns it as ours."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    special = ["<unk>", "<s>", "</s>"]
    sizes = {"vocab_size": 600, "special_tokens": special}
    if kind == "Unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(**sizes, unk_token="<unk>")
    elif kind in ("WordPiece", "WordPiece by spaces"):
        tokenizer, trainer = Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer(**sizes)
    elif kind == "WordLevel":
        tokenizer, trainer = Tokenizer(models.WordLevel(unk_token="<unk>")), trainers.WordLevelTrainer(**sizes)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(**sizes, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "WordPiece":
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # it takes "</s>" in a text apart
    if kind in ("Unigram", "Metaspace first", "Metaspace always"):
        scheme = "first" if kind == "Metaspace first" else "always"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme == "always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    elif kind == "Llama 2":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    elif kind in ("GPT-2", "add_prefix_space"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind != "GPT-2")
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "full stops with lines":  # as GPT-4's and Llama 3's pattern
        pattern = Regex(r" ?\p{L}+| ?[^\s\p{L}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"),
                                                           pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([line for line in text.splitlines(True)] if kind != "full stops with lines" else [text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return fineweb.get_tokenizer(str(folder))


KINDS = ["WordPiece", "Metaspace first", "Metaspace always", "Llama 2", "GPT-2", "add_prefix_space", "full stops with lines"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_document_has_the_tokens_of_the_whole(kind, tmp_path):
    """Also of tokenizers that put a space before any text, or have a token of a full stop and the line's end."""
    text = (ROOT / "input.txt").read_text()[:300_000].replace(".\n", ".\n\n")
    assert len(text) > fineweb.CHARS_PER_PIECE
    tokenizer = save_tokenizer(kind, tmp_path / "tok", text[:60_000])
    (tmp_path / "a.txt").write_text(text)
    run("fineweb.py", "--files", tmp_path / "a.txt", "--out", tmp_path / "shards", "--workers", 1, "--tokenizer", tmp_path / "tok")
    assert tokens_of(tmp_path / "shards").tolist() == [tokenizer.eot, *tokenizer.encode(text)]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_text_are_text(kind, tmp_path):
    tokenizer = save_tokenizer(kind, tmp_path / "tok", (ROOT / "input.txt").read_text()[:30_000] + " </s> <s> / s > <" * 50)
    texts = [f"the </s> end{i}</s> <s>and </s>" for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out, _ = run("fineweb.py", "--files", tmp_path / "a.jsonl", "--out", tmp_path / "shards", "--workers", 1,
                 "--tokenizer", tmp_path / "tok")
    assert out.startswith("20 documents")
    tokens = tokens_of(tmp_path / "shards")
    special = tokenizer.tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    assert np.count_nonzero(tokens == tokenizer.eot) == 20 and np.isin(tokens, special).sum() == 20


@pytest.mark.parametrize("special", ["</s>", "<s>"])
@pytest.mark.parametrize("kind", ["Unigram", "WordLevel", "WordPiece by spaces"])
def test_a_tokenizer_whose_special_tokens_a_text_can_make_is_refused(kind, special, tmp_path):
    """Its vocabulary has them as pieces, which no setting changes: a text could end documents."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"the {special} end"}))
    with pytest.raises(fineweb.UserError):
        save_tokenizer(kind, tmp_path / "tok", (ROOT / "input.txt").read_text()[:30_000])
    if special == "<s>":  # here end-of-text is no piece
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "tok"))
        tokenizer.add_special_tokens({"eos_token": "<|end|>"})
        tokenizer.save_pretrained(str(tmp_path / "tok"))
    said = refused("--files", tmp_path / "a.jsonl", "--out", tmp_path / "no", "--tokenizer", tmp_path / "tok")
    assert f"tok: {special!r} in a text would become this special token; take " in said and not (tmp_path / "no").exists()


def test_an_end_of_text_token_that_is_ordinary_text_is_refused(tmp_path):
    from transformers import AutoTokenizer
    (tmp_path / "a.txt").write_text("to be. " * 50)
    save_tokenizer("GPT-2", tmp_path / "tok", "to be . or not")
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "tok"))
    tokenizer.eos_token = "."
    tokenizer.save_pretrained(str(tmp_path / "tok"))
    said = refused("--files", tmp_path / "a.txt", "--out", tmp_path / "no", "--tokenizer", tmp_path / "tok")
    assert "tok: '.' in a text would become this special token; take " in said


@pytest.mark.parametrize("kind", ["GPT-2", "Metaspace first", "WordPiece"])
def test_bytes_of_added_tokens_that_are_not_ascii(kind, tmp_path):
    text = "to be naïve " + "日本語 🙂 na\u00efve " * 3 + "or not to be"
    save_tokenizer(kind, tmp_path / "tok", (ROOT / "input.txt").read_text()[:30_000] + text)
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "tok"))
    tokenizer.add_tokens(["日本語", "naïve", "🙂"])
    tokenizer.save_pretrained(str(tmp_path / "tok"))
    ours = fineweb.get_tokenizer(str(tmp_path / "tok"))
    ids = ours.encode(text)
    assert len(set(ids) & set(tokenizer.added_tokens_decoder)) == 3
    dropped = len(" " * text.count(" ")) if kind != "GPT-2" else 1
    assert abs(ours.token_bytes()[ids].sum() - len(text.encode())) <= dropped


def test_the_copy_of_the_tokenizer_is_written_once(tmp_path, monkeypatch):
    """Whole or not at all: a start that is killed while it writes leaves no shards that nothing opens."""
    save_llama2_tokenizer(tmp_path / "tok", ["to", "be", "or", "not"])
    (tmp_path / "a.txt").write_text("to be or not to be " * 500)
    command = ["--files", tmp_path / "a.txt", "--out", tmp_path / "shards", "--workers", 1, "--shard_size", 500,
               "--tokenizer", tmp_path / "tok"]
    honest = fineweb.FolderTokenizer.save_pretrained

    def killed(self, folder):
        honest(self, folder)
        (tmp_path / "shards" / Path(folder).name / "tokenizer.json").write_text('{"torn')
        raise KeyboardInterrupt
    monkeypatch.setattr(fineweb.FolderTokenizer, "save_pretrained", killed)
    run("fineweb.py", *command, expect=130)
    assert not (tmp_path / "shards/tokenizer").exists()
    monkeypatch.undo()
    run("fineweb.py", *command)
    whole = tokens_of(tmp_path / "shards")
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (tmp_path / "shards/tokenizer").iterdir()}
    (tmp_path / "shards/edufineweb_train_000002.npy").unlink()
    monkeypatch.setattr(fineweb.FolderTokenizer, "save_pretrained", killed)
    run("fineweb.py", *command)
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (tmp_path / "shards/tokenizer").iterdir()}
    assert before == after and np.array_equal(tokens_of(tmp_path / "shards"), whole)
    assert not (tmp_path / "shards/.tokenizer.tmp").exists()


def test_a_text_that_the_tokenizer_has_no_token_for(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path / "tok")
    (tmp_path / "a.txt").write_text("a b " * 100)
    said = refused("--files", tmp_path / "a.txt", "--out", tmp_path / "shards", "--tokenizer", tmp_path / "tok", "--workers", 1)
    assert "tok: a text cannot be tokenized" in said


def test_manifests_without_a_tokenizer_setting_are_gpt2s(tmp_path):
    """Those of older versions: the folder is continued with GPT-2's tokenizer alone."""
    (tmp_path / "a.txt").write_text((ROOT / "input.txt").read_text()[:20_000])
    command = ["--files", tmp_path / "a.txt", "--out", tmp_path / "shards", "--workers", 1, "--shard_size", 1000]
    run("fineweb.py", *command)
    whole = tokens_of(tmp_path / "shards")
    manifest = fineweb.read_manifest(tmp_path / "shards")
    del manifest["settings"]["tokenizer"], manifest["eot"]
    (tmp_path / "shards/manifest.json").write_text(json.dumps(manifest))
    assert 'made with tokenizer "gpt2", now it is "byte"' in refused(*command, "--tokenizer", "byte")
    (tmp_path / "shards/edufineweb_train_000002.npy").unlink()
    run("fineweb.py", *command)
    assert np.array_equal(tokens_of(tmp_path / "shards"), whole)


def test_a_tokenizer_with_gaps_in_its_ids(tmp_path):
    """vocab_size is above every id, not how many there are."""
    save_llama2_tokenizer(tmp_path / "tok", ["one", "two"])
    path = tmp_path / "tok/tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["\u2581two"] = 40
    path.write_text(json.dumps(content))
    (tmp_path / "a.txt").write_text("one two " * 50)
    run("fineweb.py", "--files", tmp_path / "a.txt", "--out", tmp_path / "shards", "--workers", 1, "--tokenizer", tmp_path / "tok")
    assert tokens_of(tmp_path / "shards").max() == 40 and fineweb.read_manifest(tmp_path / "shards")["vocab_size"] == 41
    run("fineweb.py", "--verify", tmp_path / "shards")


def test_a_byte_shard_and_tokenizers_that_are_refused(tmp_path):
    from transformers import ByT5Tokenizer
    (tmp_path / "a.txt").write_text("To be, or not to be: ü\n" * 20)
    run("fineweb.py", "--files", tmp_path / "a.txt", "--out", tmp_path / "shards", "--workers", 1, "--tokenizer", "byte")
    assert tokens_of(tmp_path / "shards").tolist() == [256, *(tmp_path / "a.txt").read_bytes()]
    save_llama2_tokenizer(tmp_path / "big", [f"w{i}" for i in range(66_000)])
    said = refused("--files", tmp_path / "a.txt", "--out", tmp_path / "no", "--tokenizer", tmp_path / "big")
    assert "66003" in said and "65536" in said
    assert "nowhere" in refused("--files", tmp_path / "a.txt", "--out", tmp_path / "no", "--tokenizer", "nowhere")
    ByT5Tokenizer().save_pretrained(tmp_path / "python")
    said = refused("--files", tmp_path / "a.txt", "--out", tmp_path / "no", "--tokenizer", tmp_path / "python")
    assert "python: a tokenizer written in Python" in said


def test_gpt2s_vocabulary_is_not_read_from_a_cache(tmp_path, monkeypatch):
    """Other programs' copies, whose content nobody checked: with each of tiktoken's cache folders full of nonsense."""
    code = """if 1:
        import sys
        sys.path.insert(0, sys.argv[1])
        import fineweb
        print(fineweb.get_tokenizer("gpt2").encode("Hello, world"))
    """
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name).mkdir()
        for path in fineweb.gpt2_files():
            (tmp_path / name / hashlib.sha1(path.encode()).hexdigest()).write_bytes(b"#version: 0.2\n")
        done = subprocess.run([sys.executable, "-c", code, ROOT], capture_output=True, text=True)
        assert done.stdout.strip() == "[15496, 11, 995]", done.stderr


# -----------------------------------------------------------------------------
# damage and changes that look right

@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst"])
def test_an_empty_packed_file_is_a_download_that_never_began(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.jsonl").write_text('{"text": "To be"}\n')
    said = refused("--files", tmp_path / name, tmp_path / "b.jsonl", "--out", tmp_path / "out", "--workers", 1)
    assert f"{name}: empty, so not whole" in said


def test_pages_of_parquet_are_checked_where_they_can_be(tmp_path):
    table = pa.table({"text": [f"text {i} of some length" for i in range(500)]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    at = data.index(b"text 250 of")
    data[at:at + 4] = b"TEXT"
    (tmp_path / "a.parquet").write_bytes(data)
    said = refused("--files", tmp_path / "a.parquet", "--out", tmp_path / "out", "--workers", 1)
    assert "a.parquet" in said


def test_ids_of_four_bytes_are_not_read_as_two(tmp_path):
    for split in ("train", "val"):
        np.random.default_rng(0).integers(1, 50257, 5000).astype("<u4").tofile(tmp_path / f"{split}.bin")
    assert "ids in uint32" in train_refused("train_gpt2.py", "--data", tmp_path, "--out_dir", tmp_path / "log", "--device", "cpu")


@pytest.mark.parametrize("change", [{"tokens": 5}, {"vocab_size": None}, {"shards.tokens": "200"}, {"shards.sha256": None}])
def test_a_manifest_whose_numbers_are_wrong(change, tmp_path):
    (tmp_path / "a.txt").write_text("To be, or not to be. " * 40)
    command = ["--files", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", "byte", "--shard_size", 300, "--workers", 1]
    run("fineweb.py", *command)
    path = tmp_path / "out/manifest.json"
    manifest = json.loads(path.read_text())
    for name, value in change.items():
        (manifest["shards"][1] if "." in name else manifest)[name.split(".")[-1]] = value
    path.write_text(json.dumps(manifest))
    for flags in (["--verify", tmp_path / "out"], command):
        assert "not one of fineweb.py's" in refused(*flags)


def test_a_data_set_that_got_another_file_is_not_gone_on_with(tmp_path):
    """Its files have numbers: one more before the others would be read in their place."""
    (tmp_path / "hub").mkdir()
    for name in "bc":
        table = pa.table({"text": [f"{name}{i} text " * 20 for i in range(40)]})
        parquet.write_table(table, tmp_path / f"hub/{name}.parquet")
    command = ["--dataset", tmp_path / "hub", "--out", tmp_path / "out", "--tokenizer", "byte", "--shard_size", 1500, "--workers", 1]
    run("fineweb.py", *command, "--max_tokens", 12000)
    path = tmp_path / "out/manifest.json"
    manifest = json.loads(path.read_text())
    manifest.update(complete=False, settings={**manifest["settings"], "max_tokens": None})
    path.write_text(json.dumps(manifest))
    parquet.write_table(table, tmp_path / "hub/a.parquet")
    assert "has other files than when this build began" in refused(*command)
