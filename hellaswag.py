"""
HellaSwag: which of four endings does the model find likeliest after the context?

$ python hellaswag.py --model gpt2                      # a Hugging Face name; downloads the validation set
$ python hellaswag.py --model log/latest --style harness
$ python hellaswag.py --model gpt2 --data hellaswag_val.jsonl --limit 1000

The benchmark: Zellers et al. 2019, https://arxiv.org/abs/1905.07830. Two ways of counting are in use:
  completion  build-nanogpt's: the context as it stands, " " + ending tokenized on its own.
              acc: least summed loss; acc_norm: least loss per token of the ending. GPT-2 124M: 28.59 / 29.55
  harness     lm-evaluation-harness's: activity label, cleaned text, context and ending tokenized as one.
              acc: least summed loss; acc_norm: least loss per character of the ending. GPT-2 124M: 28.92 / 31.14
The last line printed is one JSON object. train_gpt2.py also takes from here what it knows of devices and dtypes.
"""

import copy
import json
import logging
import os
import random
import re
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

# Threads that wait sleep sooner, for the sake of busy machines: train_gpt2.py says why, and with what figures.
if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# fineweb.py is beside this file, where `python -I` and PYTHONSAFEPATH=1 do not look.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from fineweb import RunFailed, UserError, explaining, parse_flags, run_cli, without_lone_surrogates

STYLES = ("completion", "harness")

# -----------------------------------------------------------------------------
# the data
# Every example is checked when it is read, before a model is opened: a file that is damaged in its last line is refused
# at once, not after the others are scored. The set is small (10,042 examples), so every rank holds all of it.

def check_example(example):
    # The example with its label as an int. Raises ValueError if it is not one.
    for name in ("ctx", "ctx_a", "ctx_b", "activity_label"):
        if not isinstance(example, dict) or not isinstance(example.get(name), str):
            raise ValueError(f"no text in {name!r}")
    endings, label = example.get("endings"), example.get("label")
    if not isinstance(endings, list) or len(endings) != 4:
        raise ValueError("not four 'endings'")
    if not all(isinstance(text, str) and text.strip() for text in [example["ctx"], *endings]):
        raise ValueError("'ctx' or an ending is empty or not text")
    if str(label) not in ("0", "1", "2", "3"):  # the test split has none; the hub's copy holds it as text
        raise ValueError(f"label {label!r}")
    return {**example, "label": int(label)}


def read_examples(path):
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield check_example(json.loads(line))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a .jsonl file, or none to download the set") from None
    except ValueError as error:  # JSON's and UTF-8's are ones
        raise UserError(f"{path}, line {number}: {error}; a line is a JSON object with ctx, ctx_a, ctx_b, "
                        "activity_label, four endings and a label from 0 to 3") from None


def download():
    import datasets
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # warnings of its retries would tear a progress bar
    remedy = ("give a local file, made where there is a network by: python -c \"import datasets; datasets.load_dataset("
              "'Rowan/hellaswag', split='validation').to_json('hellaswag_val.jsonl')\"")
    with explaining("HellaSwag was not downloaded", remedy):
        return map(check_example, datasets.load_dataset("Rowan/hellaswag", split="validation"))


def load_examples(path=None, limit=0):
    # The first `limit` examples (0: all) of a .jsonl file, or of the validation split (10,042). Raises UserError.
    examples = list(islice(read_examples(path) if path else download(), limit or None))
    if not examples:
        raise UserError(f"{path}: no examples in it")
    return examples


def clean(text):
    # lm-evaluation-harness's clean-up (lm_eval/tasks/hellaswag/utils.py): WikiHow's [title], [step] … marks go.
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def render(example, encode, style):
    """One example as tokens: (context ids, four lists of ending ids, four lengths that acc_norm divides by)."""
    # By build-nanogpt's hellaswag.py, and lm-evaluation-harness 0.4's TemplateLM._encode_pair and ConfigurableTask.
    if style == "completion":
        context = encode(example["ctx"])
        adds_space = encode("x x") == 2 * encode("x")  # Llama 2's kind of tokenizer puts a space before any text
        endings = [encode(ending if adds_space else " " + ending) for ending in example["endings"]]
        return context, endings, [len(ending) for ending in endings]
    text = clean(f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}")
    cleaned = [clean(ending) for ending in example["endings"]]
    context = encode(text.rstrip())  # spaces at the end of the context are tokenized with the ending
    # What follows len(context) tokens of the whole is the ending, also where the whole is split differently.
    endings = [encode(f"{text} {ending}")[len(context):] for ending in cleaned]
    return context, endings, [len(ending) for ending in cleaned]

# -----------------------------------------------------------------------------
# an example as rows of tokens
# The four texts of an example begin with the same context. Packed in one row, it is read once instead of four times:
#
#   ids        The man | runs home | sings a song | sits | is tall      (the last token of a text is only predicted)
#   positions   0   1  |  2    3   |   2   3   4  |  2   |  2   3       every ending goes on where the context stops
#   segments    0   0  |  1    1   |   2   2   2  |  3   |  4   4       0 is the context, 1 to 4 are the endings
#
# A token sees its own ending and the context, whose last token predicts the first token of each of the four endings.

def pack(context, endings):
    # One row of a context (ids, at least one) and its endings (lists of ids), as int64 tensors.
    # ids, positions, segments of the T tokens that are read; the endings' tokens; the indices of those that predict
    # them.
    C = len(context)
    ids, positions, segments, targets, indices = list(context), list(range(C)), [0] * C, [], []
    for segment, ending in enumerate(endings, 1):
        read = ending[:-1]
        indices += [C - 1, *range(len(ids), len(ids) + len(read))][:len(ending)]  # an ending may be empty
        targets += ending
        ids += read
        positions += range(C, C + len(read))
        segments += [segment] * len(read)
    return [torch.tensor(numbers, dtype=torch.int64) for numbers in (ids, positions, segments, targets, indices)]


def visibility_mask(positions, segments, window):
    # positions, segments: (B, T) int64. Returns (B, 1, T, T) bool: whether a token (third) sees another (fourth).
    distance = positions[:, :, None] - positions[:, None, :]
    same_text = (segments[:, None, :] == 0) | (segments[:, :, None] == segments[:, None, :])
    return (same_text & (distance >= 0) & (distance < (window or float("inf"))))[:, None]


@dataclass
class Item:
    example: dict
    rows: list       # one (context, its four endings), or four (context, [its ending]); all are lists of ids
    lengths: list    # what acc_norm divides the four losses by
    truncated: bool  # whether a text was cut from the left to what the model reads

    def longest_row(self):
        return max(len(context) + sum(map(len, endings)) for context, endings in self.rows)


def make_item(example, encode, style, block_size, packed):
    # `packed`: one row for the four endings, unless they are too long: cut, they have different contexts.
    context, endings, lengths = render(example, encode, style)
    truncated = len(context) + max(map(len, endings)) > block_size + 1
    if packed and not truncated:
        return Item(example, [(context, endings)], lengths, truncated)
    rows = []
    for ending in endings:
        text = (context + ending)[-(block_size + 1):]
        start = max(1, len(text) - len(ending))  # nothing stands before a text's first token to predict it from
        rows.append((text[:start], [text[start:]]))
    if style == "completion":
        lengths = [len(ending) for _, (ending,) in rows]  # without what was cut
    return Item(example, rows, lengths, truncated)

# -----------------------------------------------------------------------------
# scoring with our own GPT, or one of Transformers' models
# Four texts an example, and of each only the losses of the ending: the context is read once for the four (see above),
# and the head sees no token but those that predict. Both change no loss by more than its rounding, which is tried on
# each model of Transformers before its score counts: one with a recurrent state or a convolution reads text by text.

def is_ours(model):
    return hasattr(model, "hidden_states")


def model_limits(model):
    # How many tokens the model reads, and how many a token sees (0 or None: all before it).
    if is_ours(model):
        return model.config.block_size, model.config.window
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next(filter(None, limits), 2048), getattr(config, "sliding_window", None)


def score_rows(model, rows, device):
    # rows: pairs (context, endings) of ids. Returns the summed loss of every ending, in nats: float64 on the CPU.
    ids, positions, segments, targets, indices = zip(*(pack(*row) for row in rows))
    idx = pad_sequence(ids, batch_first=True).to(device)  # (B, T)
    positions = pad_sequence(positions, batch_first=True).to(device)
    mask = None  # rows of one text need none: a causal model does not look at the padding on the right
    if any(len(endings) > 1 for _, endings in rows):
        segments = pad_sequence(segments, batch_first=True, padding_value=-1).to(device)
        mask = visibility_mask(positions, segments, model_limits(model)[1])
    targets = torch.cat(targets).to(device)
    indices = torch.cat([i * idx.size(1) + index for i, index in enumerate(indices)]).to(device)  # among all B * T
    if is_ours(model):
        logits = model.logits(model.hidden_states(idx, positions, mask).flatten(0, 1)[indices])
    else:
        def select(head, args):  # the head sees these tokens alone; what the model does to logits still happens
            return args[0].flatten(0, -2)[indices], *args[1:]
        packing = {} if mask is None else {"attention_mask": mask, "position_ids": positions}
        with model.get_output_embeddings().register_forward_pre_hook(select):
            logits = model(input_ids=idx, **packing).logits
    chunks = zip(logits.split(128), targets.split(128))  # a float32 copy of all would be large
    losses = [F.cross_entropy(chunk.float(), target, reduction="none") for chunk, target in chunks]
    sizes = [len(ending) for _, endings in rows for ending in endings]
    return torch.stack([part.sum() for part in torch.cat(losses).cpu().double().split(sizes)])


def score_batch(model, items, device):
    # (len(items), 4) float64 on the CPU: the summed losses of each item's endings, in nats.
    return score_rows(model, [row for item in items for row in item.rows], device).view(-1, 4)


def reads_packed_rows(model, examples, encode, device):
    # Whether an ending scores the same in a packed row as alone: not so with a recurrent state or a convolution, or
    # where a model takes no mask or no positions. Tried on three texts. Raises UserError if the model is not causal.
    half = model_limits(model)[0] // 2
    texts = [(example["ctx"], example["endings"][-1]) for example in (examples[0], examples[len(examples) // 2])]
    endings = (ending for example in examples for ending in example["endings"])
    texts.append((max((example["ctx"] for example in examples), key=len), max(endings, key=len)))
    try:
        if model.dtype != torch.float32:  # its rounding hides what an ending sees of the others
            model = copy.deepcopy(model).float()
        for context, ending in texts:
            context, ending = encode(context)[-half:], encode(ending)[:half]
            middle = len(ending) // 2
            alone = [(context, [ending]), (context, [ending[:middle]]), (context + ending[:middle], [ending[middle:]])]
            whole, *parts = score_rows(model, alone, device)
            if not torch.isfinite(whole):
                raise UserError(f"{type(model).__name__}: its loss is {whole.item()}; its weights are damaged")
            if not torch.isclose(whole, sum(parts), rtol=1e-4):
                raise UserError(f"{type(model).__name__}: not a causal language model; its tokens see those after them")
            packed = [(context, 4 * [ending]), (context, 3 * [ending[::-1]] + [ending])]
            losses = score_rows(model, packed, device)[3::4]  # of the last ending, after two kinds of others
            if not (torch.allclose(losses, whole, rtol=1e-4) and torch.allclose(losses[0], losses[1], rtol=1e-6)):
                return False
        return True
    except UserError:
        raise
    except Exception:  # what a model does not take, or a GPU that holds it in bfloat16 only: each has its own error
        return False


class Interrupted(Exception):
    """A signal ended an evaluation: on all ranks, whichever got it."""


@torch.no_grad()
def evaluate(model, examples, encode, style="completion", device=None, progress=False, stop=None):
    """Scores `examples` (from load_examples) with our own GPT or a Transformers causal LM. encode: text -> list of ids;
    style: one of STYLES; device: where the model is, found if not given; progress: show a bar. With torch.distributed
    initialised every rank calls this with all the examples, and scores its share. Returns a dict: n; acc, acc_norm,
    their standard errors; truncated, of how many a text was cut. Raises UserError for a model that is not causal."""
    if style not in STYLES:
        raise UserError(f"HellaSwag style {style!r}: not one of {', '.join(STYLES)}")
    model = getattr(model, "_orig_mod", model)  # as torch.compile wraps it: every batch has another shape
    device = torch.device(device or next(model.parameters()).device)
    distributed = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    packed = is_ours(model) or reads_packed_rows(model, examples, encode, device)  # an error is that of all ranks
    block_size = model_limits(model)[0]
    items = [make_item(example, encode, style, block_size, packed) for example in examples[rank::world_size]]
    items.sort(key=Item.longest_row, reverse=True)  # of rows that run together the shorter ones are padded
    batches = []
    while items:
        size = max(1, 2048 // (len(items[0].rows) * items[0].longest_row()))  # about 2048 tokens
        batches.append(items[:size])
        items = items[size:]
    random.Random(0).shuffle(batches)  # so that the running accuracy is not that of the longest examples
    counts = torch.zeros(4, dtype=torch.int64)  # right by acc's measure, right by acc_norm's, truncated, ranks stopped
    with tqdm(total=sum(map(len, batches)), unit="example", disable=not progress or rank > 0) as bar:
        for batch in batches:
            if stop is not None and stop.number > 0:
                break
            losses = score_batch(model, batch, device)
            lengths = torch.tensor([item.lengths for item in batch])
            labels = torch.tensor([item.example["label"] for item in batch])
            right, right_norm = ((values.argmin(1) == labels).sum() for values in (losses, losses / lengths))
            counts[:3] += torch.tensor([right, right_norm, sum(item.truncated for item in batch)])
            bar.update(len(batch))
            bar.set_postfix_str(f"acc {counts[0] / max(1, bar.n):.2%}, acc_norm {counts[1] / max(1, bar.n):.2%}")
    for module in in_training:
        module.training = True
    counts[3] = stop is not None and stop.number > 0
    if distributed:
        counts = counts.to(device)
        dist.all_reduce(counts)
    right, right_norm, truncated, stops = counts.tolist()
    if stops:
        raise Interrupted
    n = len(examples)
    acc, acc_norm = right / n, right_norm / n
    return {"n": n, "acc": acc, "acc_norm": acc_norm, "acc_stderr": (acc * (1 - acc) / max(1, n - 1)) ** 0.5,
            "acc_norm_stderr": (acc_norm * (1 - acc_norm) / max(1, n - 1)) ** 0.5, "truncated": truncated}

# -----------------------------------------------------------------------------
# device and dtype, also of train_gpt2.py
# They are chosen here because this file imports nothing of the training script, which imports it. A CPU's bfloat16 is
# timed, not looked up: many chips have the instructions and still multiply float32 faster.

def pick_device(name):
    """auto, cpu, cuda, cuda:N or mps -> cpu, mps or cuda:N, the process's own under torchrun. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: not one of auto, cpu, cuda, cuda:N, mps")
    if name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise UserError(f"--device {name}: for one process; those of torchrun take one device each with --device cuda")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name.startswith("cuda") and int(name[5:]) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; start as many "
                        "processes as devices, or use --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available here; use --device cpu")
    return name


def check_device(name):
    # PyTorch's builds leave out old and very new chips: they have no kernels there.
    remedy = "install a build for this chip (https://pytorch.org/get-started/previous-versions), or add --device cpu"
    with explaining(f"--device {name}: this PyTorch cannot use it", remedy, kind=RunFailed):
        torch.ones(1, device=name).add(1).item()
    return name


def pick_dtype(name, device_type, matmul, without_bfloat16=torch.float32):
    """The torch.dtype of a name, and why, or ""."""
    # auto: on CUDA bfloat16, or `without_bfloat16` where the chip has none; on a CPU the faster of bfloat16 and float32
    # in a typical matmul, (tokens, inputs, outputs); elsewhere float32.
    if name != "auto":
        return getattr(torch, name), ""
    if device_type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else without_bfloat16, ""
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device_type == "cpu" else {}
    if not (cpu.get("amx_bf16") or cpu.get("avx512_bf16") or cpu.get("bf16")):
        return torch.float32, ""
    speedup = matmul_seconds(torch.float32, *matmul) / matmul_seconds(torch.bfloat16, *matmul)
    if speedup >= 1.1:  # less is not worth its rounding
        return torch.bfloat16, f"bfloat16: {speedup:.1f} times as fast as float32 on this chip"
    return torch.float32, f"float32: {1 / speedup:.1f} times as fast as bfloat16 on this chip"


def matmul_seconds(dtype, tokens, inputs, outputs):
    x, weight = torch.ones(tokens, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    tries = []
    while len(tries) < 3 or sum(tries) < 0.08:  # seconds; a busy machine needs some for one that nothing disturbed
        started = time.perf_counter()
        F.linear(x, weight)
        tries.append(time.perf_counter() - started)
    return min(tries)


# dense bf16 (fp16 where the chip has no bf16) TFLOP/s with sums in fp32, from NVIDIA's data sheets and white papers
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "A10": 125, "L40S": 362,
               "L4": 121, "T4": 65, "V100": 125, "A4000": 76.7, "RTX 3060": 25.5, "RTX 3070": 40.6, "RTX 3080": 59.5,
               "RTX 3090": 71, "RTX 4060 Ti": 44.1, "RTX 4070": 58.3, "RTX 4080": 97.5, "RTX 4090": 165.2,
               "RTX 5070": 61.7, "RTX 5080": 112.6, "RTX 5090": 209.5}


def peak_flops(device_type):
    # Of one device, or None where it is unknown.
    name = torch.cuda.get_device_name() if device_type == "cuda" else ""
    for chip, teraflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{chip}\b(?! Ti| SUPER| D| Laptop|.* MIG)", name):
            return teraflops * 1e12
    return None

# -----------------------------------------------------------------------------
# the command line
# Models are opened by Transformers, also for train_gpt2.py, which copies them into its own GPT.

@dataclass
class Flags:
    model: str = "gpt2"  # a Hugging Face causal LM, or a folder that holds one
    data: str | None = None  # a .jsonl file with the fields of Rowan/hellaswag; downloaded if not given
    style: Literal[STYLES] = "completion"  # whose way of counting: build-nanogpt's or lm-evaluation-harness's
    limit: int = 0  # only so many of the first examples; 0: all
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: the faster one


def follow(path):
    # The folder that a path given for a checkpoint means: of a run's folder the newest one; `latest` is a link to it,
    # or on a disk without links a file with its name.
    path = Path(path)
    if (path / "latest").exists():
        return follow(path / "latest")
    if path.name in ("latest", "best") and path.is_file():
        return path.parent / path.read_text().strip()
    return path.resolve() if path.is_symlink() else path


def load_causal_lm(name, config=None, dtype=torch.float32):
    """A Transformers model, and the names of the weights that its files hold beyond it. Raises UserError."""
    from transformers import AutoModelForCausalLM, logging
    # Why not let it raise by itself? It makes missing weights up at random, with a warning in a table, and scores of
    # these look like scores; of misshapen ones its error does not say the name.
    logging.set_verbosity_error()
    model, loaded = AutoModelForCausalLM.from_pretrained(
        name, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    for weight, found, expected in loaded["mismatched_keys"]:
        raise UserError(f"{name}: {weight} has shape {[*found]}, by config.json {[*expected]}")
    if loaded["missing_keys"]:
        raise UserError(f"{name}: its files lack weights, such as {min(loaded['missing_keys'])}")
    # Old GPT-2 files, OpenAI's too, hold causal masks beside the weights, which not every version knows to leave out.
    return model, [key for key in loaded["unexpected_keys"] if not key.endswith((".attn.bias", ".attn.masked_bias"))]


def open_model(name, style, dtype="float32", device="cpu"):
    """The model on the device, and encode: text -> list of ids. Raises UserError."""
    # A tokenizer adds its own special tokens (Llama's BOS) in style harness, as there.
    name = str(follow(name))
    if os.path.isdir(name) and not os.path.exists(os.path.join(name, "config.json")):
        raise UserError(f"{name}: no config.json in this folder; --model takes a model folder or a Hugging Face name")
    from transformers import AutoConfig, AutoTokenizer
    with explaining(f"--model {name}: Transformers cannot open it", "what train_gpt2.py alone reads is scored by: "
                    f"python train_gpt2.py eval --checkpoint {name}", but=UserError):
        config = AutoConfig.from_pretrained(name)
        config.use_cache = False  # nothing is generated
        for key in ("activation_function", "hidden_act"):  # the same formula, in one kernel instead of eight
            if getattr(config, key, None) == "gelu_new":
                setattr(config, key, "gelu_pytorch_tanh")
        width = config.get_text_config().hidden_size
        dtype, _ = pick_dtype(dtype, torch.device(device).type, (256, width, 4 * width))
        # Why not cast the parameters? Some buffers must follow (GPT-1's mask, XGLM's positions) and some must not
        # (rotary tables): Transformers knows which, where it opens the model in its dtype.
        model = load_causal_lm(name, config, dtype)[0].to(device)
        try:
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device))
        except RuntimeError:  # XLNet makes some parameters in float32, whatever is asked for
            print(f"{name}: scored in float32, for its layers do not run in {str(dtype)[6:]}")
            model = load_causal_lm(name, config)[0].to(device)
        tokenizer = AutoTokenizer.from_pretrained(name)

    def encode(text):
        text = without_lone_surrogates(text)
        ids = tokenizer.encode(text, add_special_tokens=style == "harness", verbose=False)
        num_rows = model.get_input_embeddings().weight.size(0)
        if max(ids, default=0) >= num_rows:  # no earlier: many a tokenizer has a few ids more, which no text here has
            raise UserError(f"--model {name}: its tokenizer has {len(tokenizer)} ids and a text has the id {max(ids)}, "
                            f"the model has embeddings of {num_rows}; give it the tokenizer that it was trained with")
        return ids
    return model, encode


def main(argv):
    flags = parse_flags(Flags, argv, prog="hellaswag.py", description=__doc__.strip().split("\n")[0])
    if flags.limit < 0:
        raise UserError(f"--limit {flags.limit}: 0 means all, else a number of examples")
    device = check_device(pick_device(flags.device))
    examples = load_examples(flags.data, flags.limit)
    model, encode = open_model(flags.model, flags.style, flags.dtype, device)
    started = time.perf_counter()
    result = evaluate(model, examples, encode, flags.style, device, progress=True)
    speed = round(len(examples) / (time.perf_counter() - started), 2)
    print(json.dumps({"model": flags.model, "style": flags.style, "dtype": str(model.dtype)[6:], **result,
                      "examples_per_second": speed}))


if __name__ == "__main__":
    run_cli(main)
