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
The last line printed is one JSON object. train_gpt2.py also takes from here how a device and a dtype are picked.
"""

import json
import logging
import os
import random
import re
import time
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from fineweb import UserError, one_line, parse_flags, run_cli

STYLES = ("completion", "harness")


# -----------------------------------------------------------------------------
# the data

def check_example(example, where):
    """The example with its label as an int. Raises UserError that begins with `where` if it is not one."""
    def require(condition, problem):
        if not condition:
            raise UserError(f"{where}: {problem}; an example is a JSON object with ctx, ctx_a, ctx_b, activity_label, "
                            "four endings and a label from 0 to 3")
    for name in ("ctx", "ctx_a", "ctx_b", "activity_label"):
        require(isinstance(example, dict) and isinstance(example.get(name), str), f"no text in {name!r}")
    endings = example.get("endings")
    require(isinstance(endings, list) and len(endings) == 4, "not four 'endings'")
    for text in [example["ctx"], *endings]:
        require(isinstance(text, str) and text.strip(), "'ctx' or an ending is empty or not text")
    label = example.get("label")  # the test split has none; the hub's copy holds it as text
    require(str(label) in ("0", "1", "2", "3"), f"label {label!r}")
    return {**example, "label": int(label)}


def read_lines(path):
    """Yields (example, where it stands) for the lines of a .jsonl file that are not blank."""
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield json.loads(line), f"{path}, line {number}"
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a .jsonl file, or none to download the set") from None
    except ValueError as error:  # bad JSON or bad UTF-8
        raise UserError(f"{path}, line {number}: not JSON ({error}); one object a line is expected") from None


def download():
    """Yields (example, where it stands) for the validation split of Rowan/hellaswag, which is downloaded once."""
    import datasets
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # warnings of its retries would tear a progress bar
    try:
        rows = datasets.load_dataset("Rowan/hellaswag", split="validation")
    except Exception as error:  # no network, no hub, no space left: too many types to list
        raise UserError(f"HellaSwag was not downloaded ({one_line(error)}); give a local file, made where there is a "
                        "network by: python -c \"import datasets; datasets.load_dataset('Rowan/hellaswag', "
                        "split='validation').to_json('hellaswag_val.jsonl')\"") from error
    for i, row in enumerate(rows):
        yield row, f"Rowan/hellaswag, example {i}"


def load_examples(path=None, limit=0):
    """The first `limit` examples (0: all) of a .jsonl file with its authors' fields; without one, of the validation
    split (10,042 examples). Raises UserError that names the file and the line."""
    rows = read_lines(path) if path else download()
    examples = [check_example(example, where) for example, where in islice(rows, limit or None)]
    if not examples:
        raise UserError(f"{path}: no examples in it")
    return examples


def clean(text):
    """lm-evaluation-harness's clean-up (lm_eval/tasks/hellaswag/utils.py): WikiHow's [title], [step] … marks go."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def render(example, encode, style):
    """One example as tokens: (context ids, four lists of ending ids, four lengths that acc_norm divides by).
    `encode(text)` gives a list of ids. Sources: build-nanogpt's hellaswag.py; lm-evaluation-harness 0.4's
    TemplateLM._encode_pair and the multiple_choice part of ConfigurableTask."""
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
# A token sees what comes before it in the context and in its own ending, so that its logits are those of a row without
# the other endings. The logits at the context's last token predict the first token of all four.

def pack(context, endings):
    """One row: a context (ids, at least one), then one or more endings of it (lists of ids). Returns int64 tensors:
    ids, positions and segments of the T tokens that are read; targets, all tokens of the endings; indices, the index
    in the row of the token before each target, whose logits predict it."""
    C = len(context)
    ids, positions, segments, targets, indices = list(context), list(range(C)), [0] * C, [], []
    for segment, ending in enumerate(endings, 1):
        read = ending[:-1]
        before = [C - 1, *range(len(ids), len(ids) + len(read))]
        indices += before[:len(ending)]  # the harness style can make an ending of no tokens
        targets += ending
        ids += read
        positions += range(C, C + len(read))
        segments += [segment] * len(read)
    return [torch.tensor(numbers, dtype=torch.int64) for numbers in (ids, positions, segments, targets, indices)]


@dataclass
class Item:
    """An example, ready to be scored."""
    example: dict
    rows: list       # one for the four endings, or one for each
    sizes: list      # how many tokens each of the four endings has
    lengths: list    # what acc_norm divides their losses by
    truncated: bool  # whether a text was cut from the left to what the model reads

    def longest_row(self):
        return max(len(ids) for ids, *_ in self.rows)


def make_item(example, encode, style, block_size, packed):
    """`packed`: one row for the four endings, unless cutting left them different contexts."""
    context, endings, lengths = render(example, encode, style)
    truncated = len(context) + max(map(len, endings)) > block_size + 1
    contexts = []
    for i, ending in enumerate(endings):
        text = (context + ending)[-(block_size + 1):]
        start = max(1, len(text) - len(ending))  # nothing stands before a text's first token to predict it from
        contexts.append(text[:start])
        endings[i] = text[start:]
    sizes = [len(ending) for ending in endings]
    if style == "completion":
        lengths = sizes  # without what was cut
    if packed and all(other == contexts[0] for other in contexts):
        rows = [pack(contexts[0], endings)]
    else:
        rows = [pack(contexts[i], endings[i:i + 1]) for i in range(4)]
    return Item(example, rows, sizes, lengths, truncated)


def make_batches(items, device_type):
    """Lists of items that run together. Rows are padded to the first item's, the longest: a new batch begins where
    there would be too many tokens, or where padding would cost more than a new pass (on a GPU, its kernel launches)."""
    max_tokens, max_padding = (2048, 40) if device_type == "cpu" else (16384, 2048)
    batches = []
    T = num_rows = padding = 0
    for item in sorted(items, key=Item.longest_row, reverse=True):
        num_rows += len(item.rows)
        padding += sum(T - len(ids) for ids, *_ in item.rows)
        if not batches or num_rows * T > max_tokens or padding > max_padding:
            batches.append([])
            T, num_rows, padding = item.longest_row(), len(item.rows), 0
        batches[-1].append(item)
    random.Random(0).shuffle(batches)  # so that the running accuracy is not that of the longest examples
    return batches


# -----------------------------------------------------------------------------
# scoring with our own GPT, or one of Transformers' models

def is_ours(model):
    return hasattr(model, "hidden_states")


def config_value(model, our_name, hf_name):
    """A field of the model's config, by its name in our own GPT's or in Transformers'; None without it."""
    if is_ours(model):
        return getattr(model.config, our_name)
    return getattr(model.config.get_text_config(), hf_name, None)


def visibility_mask(positions, segments, window):
    """positions, segments: (B, T) int64; window: how many tokens a token sees, itself included (0 or None: all before).
    Returns (B, 1, T, T) bool, True where a token (third dimension) sees another (fourth)."""
    distance = positions[:, :, None] - positions[:, None, :]
    same_text = (segments[:, None, :] == 0) | (segments[:, :, None] == segments[:, None, :])
    return (same_text & (distance >= 0) & (distance < (window or float("inf"))))[:, None]


def transformers_logits(model, idx, positions, mask, indices):
    """A Transformers model's logits, (N, vocab_size), at N `indices` among the B * T tokens of idx."""
    def select(head, args):
        return args[0].flatten(0, -2)[indices], *args[1:]
    # The head sees these tokens alone; what the model does to logits after its head still happens.
    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        packing = {} if mask is None else {"attention_mask": mask, "position_ids": positions}
        return model(input_ids=idx, **packing).logits
    finally:
        hook.remove()


def score_rows(model, rows, device):
    """The losses of all targets of the rows, in nats: (number of targets,) float32."""
    ids, positions, segments, targets, indices = zip(*rows)
    idx = pad_sequence(ids, batch_first=True).to(device)  # (B, T)
    positions = pad_sequence(positions, batch_first=True).to(device)
    mask = None  # rows of one text need none: a causal model does not look at the padding on the right
    if any((segment > 1).any() for segment in segments):
        segments = pad_sequence(segments, batch_first=True, padding_value=-1).to(device)
        mask = visibility_mask(positions, segments, config_value(model, "window", "sliding_window"))
    targets = torch.cat(targets).to(device)
    indices = torch.cat([i * idx.size(1) + index for i, index in enumerate(indices)]).to(device)  # among all B * T
    if is_ours(model):
        outputs = model.hidden_states(idx, positions, mask).flatten(0, 1)[indices]
        head = model.logits
    else:
        outputs = transformers_logits(model, idx, positions, mask, indices)
        head = torch.nn.Identity()
    # A GPU's memory stays bounded; on a CPU so few tokens that malloc uses the same memory again for their logits.
    chunk = 120 if device.type == "cpu" else 2560
    chunks = zip(outputs.split(chunk), targets.split(chunk))
    return torch.cat([F.cross_entropy(head(output).float(), target, reduction="none") for output, target in chunks])


def score_batch(model, items, device):
    """The summed losses of each item's endings, in nats: (len(items), 4) float64 on the CPU."""
    losses = score_rows(model, [row for item in items for row in item.rows], device)
    sizes = [size for item in items for size in item.sizes]
    sums = [part.sum() for part in losses.cpu().double().split(sizes)]
    return torch.stack(sums).view(-1, 4)


def scores_packed(model, packed, alone, device):
    """Whether the last ending scores the same in a packed row, whatever the other endings are, and in a row alone.
    A recurrent state or a convolution goes on from one ending into the next; some models take no such mask or no
    positions, and some mask in their own way as well. Raises UserError if the model is not causal."""
    def losses_of(row, changed_ids):
        return score_rows(model, [row, (changed_ids, *row[1:])], device).view(2, len(row[3]))

    ids = alone[0]
    expected, changed = losses_of(alone, torch.cat([ids[:-1], ids[:1]]))
    if not torch.allclose(expected[:-1], changed[:-1], atol=1e-4):
        raise UserError(f"{type(model).__name__}: not a causal language model; its tokens see those that follow them")
    ids, _, segments, *_ = packed
    others = (segments > 0) & (segments < segments.max())
    try:
        losses, changed = losses_of(packed, torch.where(others, ids.flip(0), ids))[:, len(packed[3]) - len(expected):]
    except Exception:  # what it does not take: each model has its own error
        return False
    return torch.allclose(losses, changed, rtol=0, atol=1e-5) and torch.allclose(losses, expected, rtol=1e-3, atol=1e-3)


def make_items(model, examples, encode, style, device):
    """The examples as Items, packed if the model reads them so. A Transformers model is tried on the shortest, a
    middling and the longest one, in float32: rounding to bfloat16 hides what an ending sees of the others."""
    limits = (config_value(model, "block_size", name) for name in ("max_position_embeddings", "max_seq_len"))
    settings = encode, style, next(filter(None, limits), 2048)
    items = [make_item(example, *settings, packed=True) for example in examples]
    if is_ours(model) or not items:
        return items
    by_length = sorted(items, key=Item.longest_row)
    dtypes = [tensor.dtype for tensor in (*model.parameters(), *model.buffers())]
    try:
        model.float()
        tried = by_length[0], by_length[len(items) // 2], by_length[-1]
        alone = [make_item(item.example, *settings, packed=False) for item in tried]
        packed = all(scores_packed(model, a.rows[-1], b.rows[-1], device) for a, b in zip(tried, alone))
    except torch.OutOfMemoryError:  # of a GPU that holds the model in bfloat16 only
        packed = False
    finally:
        for tensor, dtype in zip((*model.parameters(), *model.buffers()), dtypes):
            tensor.data = tensor.data.to(dtype)
    return items if packed else [make_item(example, *settings, packed=False) for example in examples]


@torch.no_grad()
def evaluate(model, examples, encode, style="completion", device=None, progress=False):
    """Scores `examples` (from load_examples) with our own GPT or a Transformers causal LM. encode: text -> list of ids;
    style: "completion" or "harness"; device: where the model is (found if not given); progress: show a bar on rank 0.
    With torch.distributed initialised every rank calls this with all the examples, scores its share of them (possibly
    none), and returns the result for all.
    Returns a dict: n, acc, acc_norm (fractions), acc_stderr, acc_norm_stderr (sample standard deviation / sqrt(n)),
    truncated (examples with a text cut from the left to the context length). Raises UserError for an unknown style."""
    if style not in STYLES:
        raise UserError(f"HellaSwag style {style!r}: not one of {', '.join(STYLES)}")
    model = getattr(model, "module", model)     # out of DDP's wrapper: a rank may have no examples
    model = getattr(model, "_orig_mod", model)  # out of torch.compile's: every batch has another shape
    device = torch.device(device or next(model.parameters()).device)
    distributed = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    share = examples[rank::world_size]
    training = [module for module in model.modules() if module.training]
    model.eval()
    items = make_items(model, share, encode, style, device)
    counts = torch.zeros(4, dtype=torch.int64)  # examples, right by acc's measure, right by acc_norm's, truncated
    with tqdm(total=len(share), unit="example", disable=not progress or rank > 0) as bar:
        for batch in make_batches(items, device.type):
            losses = score_batch(model, batch, device)
            lengths = torch.tensor([item.lengths for item in batch])
            labels = torch.tensor([item.example["label"] for item in batch])
            right = (losses.argmin(1) == labels).sum()
            right_norm = ((losses / lengths).argmin(1) == labels).sum()
            counts += torch.tensor([len(batch), right, right_norm, sum(item.truncated for item in batch)])
            bar.update(len(batch))
            bar.set_postfix_str(f"acc {counts[1] / counts[0]:.2%}, acc_norm {counts[2] / counts[0]:.2%}")
    for module in training:
        module.training = True
    if distributed:
        counts = counts.to(device)
        dist.all_reduce(counts)
    n, right, right_norm, truncated = counts.tolist()
    acc, acc_norm = right / n, right_norm / n
    return {"n": n, "acc": acc, "acc_norm": acc_norm, "acc_stderr": (acc * (1 - acc) / max(1, n - 1)) ** 0.5,
            "acc_norm_stderr": (acc_norm * (1 - acc_norm) / max(1, n - 1)) ** 0.5, "truncated": truncated}


# -----------------------------------------------------------------------------
# device and dtype, also of train_gpt2.py

def pick_device(name):
    """name: auto, cpu, cuda, cuda:N or mps. Returns "cpu", "mps" or "cuda:N"; auto and cuda are the process's own GPU
    under torchrun. Raises UserError for a device that is not there, and for one cuda:N for several processes."""
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
    """Raises UserError where PyTorch has no kernels for the chip: its builds leave out old and very new ones."""
    try:
        torch.ones(1, device=name).add(1).item()
    except RuntimeError as error:
        problem = UserError(f"--device {name}: this PyTorch cannot use it ({one_line(error)}); install a build for "
                            "this chip (https://pytorch.org/get-started/previous-versions), or add --device cpu")
        problem.exit_code = 1
        raise problem from None


def pick_dtype(name, device_type, matmul, without_bfloat16=torch.float32):
    """The torch.dtype of a name (auto, bfloat16, float16 or float32), and why, or "". auto is on CUDA bfloat16 where
    the chip has it, else `without_bfloat16`; on a CPU the faster of bfloat16 and float32 in a matmul typical of the
    work, (tokens, inputs, outputs); elsewhere float32."""
    if name != "auto":
        return getattr(torch, name), ""
    if device_type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else without_bfloat16, ""
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device_type == "cpu" else {}
    if not (cpu.get("amx_bf16") or cpu.get("avx512_bf16") or cpu.get("bf16")):
        return torch.float32, ""
    return faster_dtype(matmul_seconds(torch.float32, *matmul), matmul_seconds(torch.bfloat16, *matmul))


def matmul_seconds(dtype, tokens, inputs, outputs):
    """The least of some tries."""
    x, weight = torch.ones(tokens, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    tries = []
    while len(tries) < 3 or sum(tries) < 0.03:
        started = time.perf_counter()
        F.linear(x, weight)
        tries.append(time.perf_counter() - started)
    return min(tries)


def faster_dtype(float32_seconds, bfloat16_seconds):
    """bfloat16 where it saves enough to be worth its rounding: many chips that have it multiply float32 faster."""
    speedup = float32_seconds / bfloat16_seconds
    if speedup >= 1.1:
        return torch.bfloat16, f"bfloat16: {speedup:.1f} times as fast as float32 on this chip"
    return torch.float32, f"float32: {1 / speedup:.1f} times as fast as bfloat16 on this chip"


# -----------------------------------------------------------------------------
# the command line

@dataclass
class Flags:
    model: str = "gpt2"  # a Hugging Face causal LM, or a folder that holds one
    data: str | None = None  # a .jsonl file with the fields of Rowan/hellaswag; downloaded if not given
    style: Literal[STYLES] = "completion"  # whose way of counting: build-nanogpt's or lm-evaluation-harness's
    limit: int = 0  # only so many of the first examples; 0: all
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: the faster one


def open_model(name, style):
    """The model in float32 and encode (text -> list of ids), from a Hugging Face name or a model folder. As in
    lm-evaluation-harness, a tokenizer adds its own special tokens (Llama's BOS) in that style. Raises UserError."""
    if os.path.isdir(name) and not os.path.exists(os.path.join(name, "config.json")):
        raise UserError(f"{name}: no config.json in this folder; --model takes a model folder or a Hugging Face name")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
    try:
        if PretrainedConfig.get_config_dict(name)[0].get("model_type") == "train_gpt2":
            raise ValueError(f"only our script reads it; python train_gpt2.py eval --checkpoint {name} scores it")
        config = AutoConfig.from_pretrained(name)
        config.use_cache = False  # nothing is generated
        for key in ("activation_function", "hidden_act"):  # the same tanh formula, in one kernel instead of eight
            if getattr(config, key, None) == "gelu_new":
                setattr(config, key, "gelu_pytorch_tanh")
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # no network, no such name, a damaged file: too many types to list
        raise UserError(f"--model {name}: Transformers cannot open it ({one_line(error)})") from None
    num_rows = model.get_input_embeddings().weight.size(0)

    def encode(text):
        ids = tokenizer.encode(text, add_special_tokens=style == "harness", verbose=False)
        if max(ids, default=0) >= num_rows:  # no earlier: many a tokenizer has a few ids more, which no text here has
            raise UserError(f"--model {name}: its tokenizer has {len(tokenizer)} ids and a text has the id {max(ids)}, "
                            f"the model has embeddings of {num_rows}; give it the tokenizer that it was trained with")
        return ids
    return model, encode


def main(argv):
    flags = parse_flags(Flags, argv, prog="hellaswag.py", description=__doc__.strip().split("\n")[0])
    if flags.limit < 0:
        raise UserError(f"--limit {flags.limit}: 0 means all, else a number of examples")
    device = pick_device(flags.device)
    check_device(device)
    examples = load_examples(flags.data, flags.limit)
    model, encode = open_model(flags.model, flags.style)
    width = config_value(model, "n_embd", "hidden_size") or 768
    dtype, _ = pick_dtype(flags.dtype, torch.device(device).type, (256, width, 4 * width))
    model = model.to(device)
    for p in model.parameters():  # not the rotary tables, which need float32
        p.data = p.data.to(dtype)
    started = time.perf_counter()
    result = evaluate(model, examples, encode, flags.style, device, progress=True)
    speed = round(len(examples) / (time.perf_counter() - started), 2)
    about = {"model": flags.model, "style": flags.style, "dtype": str(dtype)[6:]}
    print(json.dumps({**about, **result, "examples_per_second": speed}))


if __name__ == "__main__":
    run_cli(main)
