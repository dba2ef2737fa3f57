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
The last line printed is one JSON object.
"""

import contextlib
import copy
import inspect
import json
import logging
import math
import os
import random
import re
import time
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fineweb import UserError, flag, get_tokenizer, parse_flags, run_cli

STYLES = ("completion", "harness")


# -----------------------------------------------------------------------------
# the data

def check_example(example, where):
    """`example` reduced to the fields that are used, its label an int. Raises UserError that begins with `where`."""
    def refuse(problem):
        raise UserError(f"{where}: {problem}; an example is a JSON object with ctx, ctx_a, ctx_b, activity_label, "
                        "four endings and a label from 0 to 3")
    if not isinstance(example, dict):
        refuse("not an object")
    for name in ("ctx", "ctx_a", "ctx_b", "activity_label"):
        if not isinstance(example.get(name), str):
            refuse(f"no text in {name!r}")
    if not example["ctx"].strip():
        refuse("empty 'ctx'")
    endings, label = example.get("endings"), example.get("label")
    if not isinstance(endings, list) or len(endings) != 4:
        refuse(f"{len(endings)} endings" if isinstance(endings, list) else "no list in 'endings'")
    for i, ending in enumerate(endings):
        if not isinstance(ending, str) or not ending.strip():
            refuse(f"ending {i} is {'empty' if isinstance(ending, str) else 'not text'}")
    if label in (None, ""):
        refuse("no label (the test split has none)")
    if str(label) not in ("0", "1", "2", "3"):  # the hub's copy holds the label as text
        refuse(f"label {label!r}")
    fields = {name: example[name] for name in ("ctx", "ctx_a", "ctx_b", "activity_label", "endings")}
    return {**fields, "label": int(label)}


def load_examples(path=None, limit=0):
    """The first `limit` examples (0: all) of a .jsonl file as its authors publish it, or of the validation split of
    Rowan/hellaswag (10,042 examples, downloaded once). Raises UserError that names the file and the line."""
    examples = []
    if path is None:
        import datasets
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would tear a progress bar

        try:
            rows = datasets.load_dataset("Rowan/hellaswag", split="validation")
        except Exception as error:  # no network, no hub, no space left: too many types to list
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"HellaSwag was not downloaded ({reason}); give a local file: hellaswag_val.jsonl from "
                            "https://github.com/rowanz/hellaswag/tree/master/data") from error
        rows = rows.select(range(min(limit or len(rows), len(rows))))
        return [check_example(row, f"Rowan/hellaswag, example {i}") for i, row in enumerate(rows)]
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                where = f"{path}, line {number}"
                if limit and len(examples) == limit:
                    break
                if not line.strip():
                    continue
                try:
                    example = json.loads(line)
                except ValueError as error:  # bad JSON or bad UTF-8
                    raise UserError(f"{where}: not JSON ({error}); one object a line is expected") from None
                examples.append(check_example(example, where))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a .jsonl file, or none to download the set") from None
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
        endings = [encode(" " + ending) for ending in example["endings"]]
        return context, endings, [len(ending) for ending in endings]
    text = clean(f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}")
    cleaned = [clean(ending) for ending in example["endings"]]
    bare = text.rstrip()  # spaces at the end of the context are tokenized with the ending
    context = encode(bare)
    # What follows len(context) tokens of the whole is the ending, also where the whole is split differently.
    endings = [encode(f"{text} {ending}")[len(context):] for ending in cleaned]
    return context, endings, [len(ending) for ending in cleaned]


# -----------------------------------------------------------------------------
# the model: our own GPT (hidden states, head and cache), or one of Transformers'

def is_ours(model):
    return hasattr(model, "hidden_states")


def config_value(model, *names, default=None):
    config = model.config if is_ours(model) else model.config.get_text_config()
    return next((value for value in (getattr(config, name, None) for name in names) if value), default)


def new_cache(model):
    """An empty cache, or None for a model whose past is not keys and values that rows can share."""
    if is_ours(model):
        return model.new_cache()
    if getattr(model, "_is_stateful", False) or "past_key_values" not in inspect.signature(model.forward).parameters:
        return None
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def select_rows(cache, rows):
    """A new cache that holds `rows` (1-D int64, repeats allowed) of `cache`, which stays as it is."""
    if hasattr(cache, "select"):
        return cache.select(rows)
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]  # their tensors are replaced, never written to
    chosen.batch_select_indices(rows)
    return chosen


def log_probs(model, idx, keep, targets, cache):
    """Runs idx (B, T) int64 behind `cache` (extended in place; None: at the start). keep (B, T) bool marks the N
    positions that predict a scored token; targets (N, K) holds K candidates for each -> (N, K) float32, in nats."""
    if is_ours(model):
        hidden = model.hidden_states(idx, cache)[keep]  # (N, C)
        logits_of = lambda part: model.logits(hidden[part])
    else:
        last = idx.shape[1] - int(keep.any(0).int().argmax())  # the positions from the first scored one on
        options = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            options["logits_to_keep"] = last
        logits = model(input_ids=idx, **options).logits[:, -last:].flatten(0, 1)  # (B * last, vocab_size)
        where = keep[:, -last:].flatten().nonzero().squeeze(1)  # (N,)
        logits_of = lambda part: logits[where[part]]
    # The softmax sees a part of the positions at a time: memory stays bounded, on a CPU the logits stay in its cache.
    step = max(1, (2**23 if idx.device.type == "cpu" else 2**27) // config_value(model, "vocab_size"))
    parts = [slice(i, i + step) for i in range(0, len(targets), step)]
    return torch.cat([F.log_softmax(logits_of(part).float(), dim=-1).gather(1, targets[part]) for part in parts])


# -----------------------------------------------------------------------------
# scoring

@dataclass
class Item:
    """One example, ready to run."""
    index: int
    rows: list      # four rows of context + ending ids, cut from the left to what the model can read
    starts: list    # in each row the index of the first scored token, at least 1
    lengths: list   # what acc_norm divides each row's loss by
    shared: int     # the rows agree on this many first tokens, none of them scored
    truncated: bool


def prepare(index, example, encode, style, block_size):
    context, endings, lengths = render(example, encode, style)
    whole = [context + ending for ending in endings]
    rows = [row[-(block_size + 1):] for row in whole]  # the last token is predicted, never read
    starts = [max(1, len(context) - len(before) + len(row)) for before, row in zip(whole, rows)]
    if style == "completion":
        lengths = [len(row) - start for row, start in zip(rows, starts)]  # less than the ending where that was cut
    shared = min(len(os.path.commonprefix(rows)), *starts)
    truncated = any(len(row) > block_size + 1 for row in whole)
    return Item(index, rows, starts, lengths, shared, truncated)


def cut_into_runs(values, per_run, per_step):
    """Cuts sorted integers into runs of neighbours at the least cost: `per_run` for each run, and `per_step` for each
    unit by which a value exceeds its run's first. -> [(start, stop)]"""
    firsts = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]] + [len(values)]
    sums = [0, *accumulate(values)]
    best = [(0, 0)]  # for the values before firsts[j]: the least cost, and where the last run begins
    for j in range(1, len(firsts)):
        stop = firsts[j]
        excess = lambda start: sums[stop] - sums[start] - values[start] * (stop - start)
        best.append(min((best[i][0] + per_run + per_step * excess(start), i) for i, start in enumerate(firsts[:j])))
    runs, j = [], len(firsts) - 1
    while j > 0:
        runs.append((firsts[best[j][1]], firsts[j]))
        j = best[j][1]
    return runs[::-1]


def score_items(model, items, device, tokens, overhead):
    """Summed losses of the four endings of each item: (len(items), 4) float64 on the CPU, in nats. A context runs
    once; its last state predicts the first token of the four endings, which then run as rows behind its cache."""
    shared = min(item.shared for item in items)
    cache = new_cache(model) if shared else None
    shared = shared if cache is not None else 0
    losses = torch.zeros(len(items), 4, device=device)
    if shared:
        idx = torch.tensor([item.rows[0][:shared] for item in items], device=device)  # (B, shared)
        first = torch.tensor([[row[shared] for row in item.rows] for item in items], device=device)  # (B, 4)
        scored = torch.tensor([[start == shared for start in item.starts] for item in items], device=device)
        keep = torch.zeros_like(idx, dtype=torch.bool)
        keep[:, -1] = True
        losses -= log_probs(model, idx, keep, first, cache).where(scored, 0)
    rest = sorted(((len(row) - 1 - shared, i, k) for i, item in enumerate(items) for k, row in enumerate(item.rows)),
                  reverse=True)  # (tokens still to read, item, ending), longest first
    rest = [entry for entry in rest if entry[0]]
    for start, stop in cut_into_runs([-length for length, _, _ in rest], overhead, 1):
        longest = rest[start][0]
        at_once = max(1, min(tokens // longest, 4 * tokens // (longest + shared)))  # rows; the cache counts less
        for part in (rest[i:min(i + at_once, stop)] for i in range(start, stop, at_once)):
            score_rows(model, items, part, shared, cache, losses)
    return losses.double().cpu()


def score_rows(model, items, part, shared, cache, losses):
    """Adds to losses (B, 4) those of `part`: (tokens to read, item, ending), longest first. Shorter rows are padded on
    the right, where a causal model does not look."""
    device, longest = losses.device, part[0][0]
    idx = torch.zeros(len(part), longest, dtype=torch.int64)
    targets = torch.full((len(part), longest), -1)
    for row, (length, i, k) in enumerate(part):
        tokens, start = torch.tensor(items[i].rows[k]), items[i].starts[k]
        idx[row, :length] = tokens[shared:-1]
        skip = max(0, start - shared - 1)  # context that this example does not share with the others of its run
        targets[row, skip:length] = tokens[shared + 1 + skip:]
    which = torch.tensor([[i, k] for _, i, k in part], device=device)
    idx, targets = idx.to(device), targets.to(device)
    keep = targets >= 0
    behind = select_rows(cache, which[:, 0]) if shared else None
    found = torch.zeros(targets.shape, device=device)
    found[keep] = log_probs(model, idx, keep, targets[keep][:, None], behind).squeeze(1)
    losses[which[:, 0], which[:, 1]] -= found.sum(1)


def batches_of(items, tokens, overhead):
    """Items in batches that run together, about `tokens` tokens of context each. The contexts of a batch have one
    length, or so nearly that running the rest of the longer ones four times costs less than another batch."""
    items = sorted(items, key=lambda item: item.shared)
    for start, stop in cut_into_runs([item.shared for item in items], 2 * overhead, 3):
        at_once = max(1, tokens // max(1, items[start].shared))
        yield from (items[i:min(i + at_once, stop)] for i in range(start, stop, at_once))


@contextlib.contextmanager
def eval_mode(model):
    """Evaluation mode; afterwards every module is back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def score(model, examples, encode, style, device):
    """Yields batches of examples as they are scored: (their indices, summed losses (B, 4), losses as acc_norm divides
    them (B, 4), how many had a row cut); losses are float64 on the CPU, in nats."""
    block_size = config_value(model, "block_size", "n_positions", "max_position_embeddings", "n_ctx", default=2048)
    items = [prepare(i, example, encode, style, block_size) for i, example in enumerate(examples)]
    # Tokens in one forward pass, and what starting one costs in tokens (a GPU waits for its launches).
    tokens, overhead = (2048, 40) if device.type == "cpu" else (16384, 2048)
    batches = list(batches_of(items, tokens, overhead))
    random.Random(0).shuffle(batches)  # so that the running accuracy is not that of the shortest contexts
    for batch in batches:
        losses = score_items(model, batch, device, tokens, overhead)
        yield ([item.index for item in batch], losses, losses / torch.tensor([item.lengths for item in batch]),
               sum(item.truncated for item in batch))


@torch.no_grad()
def evaluate(model, examples, encode, style="completion", device=None, progress=False):
    """Scores `examples` (from load_examples) with our own GPT or a Transformers causal LM.

    encode: text -> list of ids; style: "completion" or "harness"; device: where the model is (found if not given);
    progress: show a bar on rank 0. With torch.distributed initialised every rank calls this with all the examples,
    scores its share of them (possibly none), and returns the result for all.

    -> dict: n, acc, acc_norm (fractions), acc_stderr, acc_norm_stderr (sample standard deviation / sqrt(n)),
    truncated (examples with a row cut from the left to the model's context length).
    Raises UserError without examples and for an unknown style."""
    from tqdm import tqdm

    if style not in STYLES:
        raise UserError(f"HellaSwag style {style!r}: not one of {', '.join(STYLES)}")
    if not examples:
        raise UserError("no HellaSwag examples to score")
    model = getattr(model, "module", model)      # out of DDP's wrapper: a rank may have no examples
    model = getattr(model, "_orig_mod", model)   # out of torch.compile's: every batch has another shape
    device = torch.device(device or next(model.parameters()).device)
    distributed = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    mine = examples[rank::world_size]

    sums = torch.zeros(4, dtype=torch.int64)  # examples, right by sum, right by acc_norm's measure, truncated
    with eval_mode(model), tqdm(total=len(mine), unit="example", disable=not progress or rank > 0) as bar:
        for indices, losses, normed, truncated in score(model, mine, encode, style, device):
            labels = torch.tensor([mine[i]["label"] for i in indices])
            right, right_norm = ((x.argmin(1) == labels).sum().item() for x in (losses, normed))
            sums += torch.tensor([len(indices), right, right_norm, truncated])
            bar.update(len(indices))
            bar.set_postfix_str(f"acc {sums[1] / sums[0]:.2%}, acc_norm {sums[2] / sums[0]:.2%}")
    if distributed:
        sums = sums.to(device)
        dist.all_reduce(sums)
    n, right, right_norm, truncated = sums.tolist()
    acc, acc_norm = right / n, right_norm / n
    stderr = lambda p: math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0
    return {"n": n, "acc": acc, "acc_norm": acc_norm, "acc_stderr": stderr(acc), "acc_norm_stderr": stderr(acc_norm),
            "truncated": truncated}


# -----------------------------------------------------------------------------
# the command line

@dataclass
class Flags:
    model: str = flag("gpt2", "a Hugging Face causal LM, or a folder that holds one", metavar="NAME_OR_FOLDER")
    data: str | None = flag(None, "examples as the authors publish them; downloaded if not given", metavar="FILE.jsonl")
    style: str = flag("completion", "whose way of counting: build-nanogpt's or lm-evaluation-harness's", choices=STYLES)
    limit: int = flag(0, "only so many of the first examples; 0 means all")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = flag("auto", "auto is bfloat16 where the chip has it", choices=("auto", "bfloat16", "float32"))


def pick_device(name):
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: no such device here; auto, cpu, cuda, cuda:1 or mps") from None
    return name


def pick_dtype(name, device):
    """"auto" is bfloat16 only where the chip multiplies it natively; elsewhere it would be slower than float32."""
    if name != "auto":
        return getattr(torch, name)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.startswith("cuda") else
              device == "cpu" and (cpu.get("amx_bf16") or cpu.get("avx512_bf16") or cpu.get("bf16")))
    return torch.bfloat16 if native else torch.float32


def open_model(name, style):
    """A model and its tokenizer -> (model, encode), from one of our own checkpoints or with Transformers. As in
    lm-evaluation-harness, special tokens that a tokenizer adds by itself (Llama's BOS) are added in that style."""
    config = os.path.join(name, "config.json")
    if os.path.isdir(name) and not os.path.exists(config):
        raise UserError(f"{name}: no config.json in this folder; --model takes a model folder or a Hugging Face name")
    if os.path.exists(config):
        with open(config, encoding="utf-8") as f:
            ours = json.load(f).get("model_type") == "train_gpt2"
        if ours or os.path.exists(os.path.join(name, "train_state.pt")):
            from train_gpt2 import GPT

            return GPT.from_pretrained(name), get_tokenizer(name).encode
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name)
        for key in ("activation_function", "hidden_act"):  # the same tanh formula, in one kernel instead of eight
            if getattr(config, key, None) == "gelu_new":
                setattr(config, key, "gelu_pytorch_tanh")
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--model {name}: no causal language model opens ({reason})") from None
    return model, lambda text: tokenizer.encode(text, add_special_tokens=style == "harness", verbose=False)


def main(argv):
    flags = Flags(**parse_flags(argv, Flags, prog="hellaswag.py", description=__doc__.strip().split("\n")[0]))
    if flags.limit < 0:
        raise UserError(f"--limit {flags.limit}: 0 means all, else a number of examples")
    device = pick_device(flags.device)
    examples = load_examples(flags.data, flags.limit)
    model, encode = open_model(flags.model, flags.style)
    model = model.to(device, pick_dtype(flags.dtype, device))
    started = time.perf_counter()
    result = evaluate(model, examples, encode, flags.style, device, progress=True)
    speed = round(len(examples) / (time.perf_counter() - started), 2)
    print(json.dumps({"model": flags.model, "style": flags.style, **result, "examples_per_second": speed}))


if __name__ == "__main__":
    run_cli(main)
