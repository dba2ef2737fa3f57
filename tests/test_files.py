"""Files, folders and texts as users bring them: links, spellings, endless runs of one character, other programs' files."""
import json
import subprocess
import sys
import time

import numpy as np
import pytest

import fineweb
from conftest import ROOT, run, spawn, wait_for
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


def test_the_home_folder_in_a_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("some text\n" * 20)
    run("fineweb.py", "--files", "~/a.txt", "--out=~/shards", "--workers", 1)
    assert (tmp_path / "shards/manifest.json").exists()


@pytest.mark.parametrize("text", [" " * 1_000_000, "\n" * 3_000_000, "\t" * 3_000_000, " \n" * 1_000_000, "a" * 3_000_000,
                                  "東" * 300_000, "-" * 1_000_000, "7" * 1_000_000],
                         ids=["spaces", "newlines", "tabs", "both", "letters", "CJK", "dashes", "digits"])
def test_long_runs_take_bounded_time_and_memory(text, tmp_path):
    """Both ways into the tokenizer; what stands before and after the run keeps its tokens, and nothing is lost."""
    tokenizer = fineweb.get_tokenizer("gpt2")
    text = f"Before it.{text}\nAnd what comes after it, as ever.\n"
    started = time.thread_time()
    ids = tokenizer.encode(text)
    assert time.thread_time() - started < 10
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
                          capture_output=True, text=True, timeout=60, check=True)
    assert sum(map(int, done.stdout.splitlines()[-1].split())) < 300


@pytest.mark.parametrize("manifest", [{"shards": ["a.npy"]}, {"shards": [{"name": "a.npy"}]}, {"shards": {"a": 1}},
                                      {"name": "a page's", "icons": []}, {"shards": [], "settings": 1}])
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
