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
import inspect
import json
import logging
import math
import os
import random
import re
import time
from dataclasses import dataclass

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
    """The first `limit` examples (0: all) of a .jsonl file with its authors' fields, or of the validation split of
    Rowan/hellaswag (10,042 examples, downloaded once). Raises UserError that names the file and the line."""
    examples = []
    if path is None:
        import datasets
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would tear a progress bar

        try:
            rows = datasets.load_dataset("Rowan/hellaswag", split="validation")
        except Exception as error:  # no network, no hub, no space left: too many types to list
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"HellaSwag was not downloaded ({reason}); give a local file, made where there is a network by: "
                            "python -c \"import datasets; datasets.load_dataset('Rowan/hellaswag', split='validation')"
                            ".to_json('hellaswag_val.jsonl')\"") from error
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
        space = "" if encode("x x") == 2 * encode("x") else " "  # Llama 2's kind of tokenizer puts one before any text
        endings = [encode(space + ending) for ending in example["endings"]]
        return context, endings, [len(ending) for ending in endings]
    text = clean(f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}")
    cleaned = [clean(ending) for ending in example["endings"]]
    bare = text.rstrip()  # spaces at the end of the context are tokenized with the ending
    context = encode(bare)
    # What follows len(context) tokens of the whole is the ending, also where the whole is split differently.
    endings = [encode(f"{text} {ending}")[len(context):] for ending in cleaned]
    return context, endings, [len(ending) for ending in cleaned]


# -----------------------------------------------------------------------------
# an example as rows of tokens

@dataclass
class Row:
    """Texts that begin alike, in one row: what they share is read once (branch 0), then comes the rest of each
    (branches 1, 2, …), which sees what is shared and itself."""
    ids: list
    positions: list  # each token's place in its text
    branches: list
    scored: list     # (place in the row, the token to predict there, the ending that it belongs to)


def make_row(texts, starts, endings, shared):
    """texts: lists of ids that agree on their first `shared` tokens; `starts`: where their scored tokens begin, at least
    max(1, shared); `endings`: their numbers. The last token of a text is predicted, never read."""
    row = Row(texts[0][:shared], list(range(shared)), [0] * shared, [])
    for branch, (text, start, ending) in enumerate(zip(texts, starts, endings), 1):
        offset = len(row.ids) - shared
        row.scored += [(place + offset if place >= shared else place, text[place + 1], ending)
                       for place in range(start - 1, len(text) - 1)]
        row.ids += text[shared:-1]
        row.positions += range(shared, len(text) - 1)
        row.branches += [branch] * (len(text) - 1 - shared)
    return row


@dataclass
class Item:
    """One example, ready to run: its four texts, cut from the left to what the model reads."""
    index: int
    texts: list
    starts: list
    lengths: list    # what acc_norm divides the losses by
    truncated: bool

    def rows(self, branching):
        """One row for the four endings; one for each if the model cannot branch, or if cutting left nothing to share."""
        shared = min(len(os.path.commonprefix(self.texts)), *self.starts)
        if branching and shared:
            return [make_row(self.texts, self.starts, range(4), shared)]
        return [make_row([text], [start], [k], 0) for k, (text, start) in enumerate(zip(self.texts, self.starts))]


def prepare(index, example, encode, style, block_size):
    context, endings, lengths = render(example, encode, style)
    whole = [context + ending for ending in endings]
    texts = [text[-(block_size + 1):] for text in whole]
    starts = [max(1, len(context) - len(before) + len(text)) for before, text in zip(whole, texts)]
    if style == "completion":
        lengths = [len(text) - start for text, start in zip(texts, starts)]  # less than the ending where that was cut
    return Item(index, texts, starts, lengths, any(len(text) > block_size + 1 for text in whole))


def batches_of(items, tokens, overhead):
    """items: [(item, its rows)]. Yields lists of them that run together, about `tokens` tokens at a time. Shorter rows
    are padded: a batch ends where that costs more than `overhead`, what another pass costs in tokens."""
    longest_of = lambda rows: max(len(row.ids) for row in rows)
    batch, padding, count = [], 0, 0
    for item, rows in sorted(items, key=lambda pair: longest_of(pair[1]), reverse=True):
        longest = longest_of(batch[0][1] if batch else rows)
        padding, count = padding + sum(longest - len(row.ids) for row in rows), count + len(rows)
        if batch and (padding > overhead or count * longest > tokens):
            yield batch
            batch, padding, count = [], 0, len(rows)
        batch.append((item, rows))
    yield from [batch] if batch else []


# -----------------------------------------------------------------------------
# the model: our own GPT, or one of Transformers'

def is_ours(model):
    return hasattr(model, "hidden_states")


def config_value(model, *names, default=None):
    config = model.config if is_ours(model) else model.config.get_text_config()
    return next((value for value in (getattr(config, name, None) for name in names) if value), default)


def takes_branches(model, items, device):
    """Whether the model can read rows that branch. A Transformers model is asked: the longest of them, both ways."""
    if is_ours(model) or not items:
        return is_ours(model)
    plain, longest = max(((item.rows(False), item.rows(True)) for item in items), key=lambda ways: len(ways[1][0].ids))
    expected = score_rows(model, [plain], device, branching=False)
    try:
        return torch.allclose(score_rows(model, [longest], device, branching=True), expected, rtol=1e-3)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # no such argument, no such shape, ...
        return False


def see(positions, branches, window):
    """(B, T, T) bool: whether the token of a row sees another; padding is in a branch of its own."""
    distance = positions[:, :, None] - positions[:, None]
    alike = (branches == 0)[:, None] | (branches[:, :, None] == branches[:, None])
    return (distance >= 0) & (distance < window) & alike if window else (distance >= 0) & alike


def logits_at(model, idx, seen, positions, places, part):
    """Runs rows, (B, T) int64, and yields their logits (part, vocab_size) at these places among the B * T, `part` of them
    at a time. seen None: plain rows, padded on the right, where a causal model does not look."""
    if is_ours(model):
        hidden = model.hidden_states(idx, model.branches(positions, seen[:, None])).flatten(0, 1)
        yield from (model.logits(hidden[at]) for at in places.split(part))
        return
    inputs = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    if seen is not None:
        mask = torch.zeros(seen.shape, dtype=model.dtype, device=idx.device)
        inputs |= {"attention_mask": mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[:, None], "position_ids": positions}
    head = model.get_output_embeddings()  # it sees these places only; what a model does to logits after it stays
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, -2)[places], *args[1:]))
    try:
        logits = model(input_ids=idx, **inputs).logits
    finally:
        hook.remove()
    yield from (logits if logits.ndim == 2 else logits.flatten(0, 1)[places]).split(part)  # 3: it called no head


def score_rows(model, examples, device, branching):
    """Summed losses of the endings of each example, given as its rows: (len(examples), 4) float64 on the CPU, in nats."""
    rows = [row for rows in examples for row in rows]
    T = max(len(row.ids) for row in rows)
    idx, positions, branches = (
        torch.tensor([values + [fill] * (T - len(values)) for values in columns], device=device)
        for columns, fill in (([row.ids for row in rows], 0), ([row.positions for row in rows], 0),
                              ([row.branches for row in rows], -1)))
    seen = see(positions, branches, config_value(model, "window", "sliding_window")) if branching else None
    owner = [i for i, rows in enumerate(examples) for _ in rows]
    places, tokens, endings = torch.tensor([(r * T + place, token, 4 * owner[r] + ending) for r, row in enumerate(rows)
                                            for place, token, ending in row.scored]).unbind(1)
    # A part of the places at a time: memory stays bounded, on a CPU the logits stay in its cache.
    part = max(1, (2**23 if device.type == "cpu" else 2**27) // config_value(model, "vocab_size"))
    logits = logits_at(model, idx, seen, positions, places.to(device), part)
    found = [F.cross_entropy(x.float(), y, reduction="none") for x, y in zip(logits, tokens.to(device).split(part))]
    losses = torch.zeros(4 * len(examples), dtype=torch.float64)
    return losses.index_add_(0, endings, torch.cat(found).cpu().double()).view(-1, 4)


# -----------------------------------------------------------------------------
# scoring

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
    branching = takes_branches(model, items, device)
    # Tokens in one forward pass, and what starting one costs in tokens (a GPU waits for its launches).
    batches = list(batches_of([(item, item.rows(branching)) for item in items],
                              *((2048, 100) if device.type == "cpu" else (16384, 2048))))
    random.Random(0).shuffle(batches)  # so that the running accuracy is not that of the shortest contexts
    for batch in batches:
        items, rows = zip(*batch)
        losses = score_rows(model, rows, device, branching)
        yield ([item.index for item in items], losses, losses / torch.tensor([item.lengths for item in items]),
               sum(item.truncated for item in items))


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
    data: str | None = flag(None, "examples with the fields of Rowan/hellaswag; downloaded if not given", metavar="FILE.jsonl")
    style: str = flag("completion", "whose way of counting: build-nanogpt's or lm-evaluation-harness's", choices=STYLES)
    limit: int = flag(0, "only so many of the first examples; 0 means all")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = flag("auto", "auto is bfloat16 on CUDA chips and CPUs that have it", choices=("auto", "bfloat16", "float32"))


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
    except Exception as error:  # no network, no such name, a damaged file: too many types to list
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
