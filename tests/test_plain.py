"""tests/plain_gpt2.py, the plain twin, gives train_gpt2.py's numbers: of one process, of two ranks with other
micro-batches, of a resumed run. And the sizes that keep it and the scripts readable."""
import ast
import math
import re
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import plain_gpt2
import train_gpt2
from conftest import ROOT, log_lines, run, run_ranks

TWIN = ROOT / "tests" / "plain_gpt2.py"
STEPS = 30
TOLERANCES = {"loss": 1e-4, "grad_norm": 1e-4, "lr": 1e-12}
FLAGS = ["--sample_every", 0, "--hellaswag_every", 0, "--eval_every", STEPS, "--no_compile", "--dtype", "float32",
         "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def muon_in_float32():
    """Muon computes in bfloat16, which rounds to one part in 256 by any order of adding up: the losses would agree to
    3e-4 alone. In float32 they agree to 1e-6, as AdamW's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A text's bytes, so few that 30 steps pass two epochs; windows neither fill the shards nor end with them."""
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.fromfile(ROOT / "input.txt", dtype=np.uint8).astype(np.uint16)
    tokens[::97] = 256
    sizes = {"val_000000": 3001, "val_000001": 1555, "train_000002": 2500, "train_000003": 2111, "train_000004": 2900}
    for name, size in sizes.items():
        np.save(folder / f"text_{name}.npy", tokens[:size])
        tokens = tokens[size:]
    (folder / "manifest.json").write_text('{"tokenizer": "byte", "vocab_size": 257}')
    return folder


def settings_of(preset, shards):
    """The twin's. tiny trains on input.txt, as users have it, in steps of a twelfth; the small ones on the shards."""
    settings = replace(plain_gpt2.PRESETS[preset], max_steps=STEPS)
    if preset == "tiny":
        return replace(settings, total_batch_size=256, batch_size=1, eval_tokens=4010)
    return replace(settings, data=str(shards))


def flags_of(preset, shards):
    """The same for train_gpt2.py: its own preset, and a flag for each number that is different here; but for what it
    derives, such as GPT-2's last learning rate, a tenth of the first."""
    name = preset.removeprefix("small-")
    settings, whole = asdict(settings_of(preset, shards)), asdict(plain_gpt2.PRESETS[name])
    flags = ["--preset", name, "--data", ROOT / settings["data"]]
    derived = {"data", "vocab_size", "batch_size"} | ({"min_lr"} if name == "gpt2" else set())
    for field in settings.keys() - derived:
        if settings[field] != whole[field]:
            flags += [f"--{field}", settings[field]]
    return flags + FLAGS


@pytest.fixture(scope="module")
def twin(shards):
    """A function: preset -> the twin's log and validation loss."""
    results = {}

    def result(preset):
        if preset not in results:
            results[preset] = plain_gpt2.train(settings_of(preset, shards))
        return results[preset]
    return result


@pytest.fixture(scope="module")
def one_process(shards, tmp_path_factory):
    """A function: preset -> the folder of train_gpt2.py's run in one process, with a checkpoint half-way."""
    folders = {}

    def folder(preset):
        if preset not in folders:
            folders[preset] = tmp_path_factory.mktemp(preset) / "log"
            run("train_gpt2.py", *flags_of(preset, shards), "--checkpoint_every", STEPS // 2,
                "--out_dir", folders[preset])
        return folders[preset]
    return folder


def check_log(out_dir, twin_log, twin_val_loss, first_step=1):
    log = log_lines(out_dir, "train")
    assert [line["step"] for line in log] == list(range(first_step, STEPS + 1))
    for line, twin_line in zip(log, twin_log[first_step - 1:]):
        for name, tolerance in TOLERANCES.items():
            assert line[name] == pytest.approx(twin_line[name], rel=0, abs=tolerance), (name, line["step"])
    val_losses = [line["loss"] for line in log_lines(out_dir, "val")]
    assert val_losses == pytest.approx([twin_val_loss], rel=0, abs=TOLERANCES["loss"])


@pytest.mark.parametrize("preset", ["tiny", "small-gpt2", "small-modern"])
class TestTheTwinGivesTheNumbers:
    def test_of_one_process(self, preset, twin, one_process):
        check_log(one_process(preset), *twin(preset))

    def test_of_a_resumed_run(self, preset, twin, one_process, tmp_path):
        checkpoint = one_process(preset) / f"step_{STEPS // 2:06d}"
        run("train_gpt2.py", "--resume_from", checkpoint, "--checkpoint_every", 0, "--out_dir", tmp_path / "log")
        check_log(tmp_path / "log", *twin(preset), first_step=STEPS // 2 + 1)

    def test_of_two_ranks_and_other_micro_batches(self, preset, twin, shards, tmp_path):
        run_ranks(2, "train_gpt2.py", *flags_of(preset, shards), "--batch_size", 1, "--checkpoint_every", 0,
                  "--out_dir", tmp_path / "log")
        check_log(tmp_path / "log", *twin(preset))


@pytest.mark.parametrize("preset", ["small-gpt2", "small-modern"])
def test_logits_of_large_weights_are_the_same(preset):
    """GELU and its approximation, which GPT-2 has, differ where activations are larger than after 30 steps."""
    settings = plain_gpt2.PRESETS[preset]
    torch.manual_seed(0)
    twin = plain_gpt2.GPT(settings)
    parts = dict.fromkeys(("rope", "rmsnorm", "swiglu", "qk_norm"), settings.modern)
    names = ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "window")
    shape = {name: getattr(settings, name) for name in names}
    model = train_gpt2.GPT(train_gpt2.GPTConfig(**shape, **parts, bias=not settings.modern))
    with torch.no_grad():
        for p in twin.parameters():
            p.normal_(std=0.3)
        model.load_state_dict(twin.state_dict())
        idx = torch.randint(settings.vocab_size, (4, settings.block_size))
        torch.testing.assert_close(twin(idx), model(idx), rtol=0, atol=1e-4)


@pytest.mark.parametrize("preset", ["gpt2", "modern", "tiny"])
def test_a_preset_is_the_same_in_both(preset):
    values = train_gpt2.TrainConfig().update(train_gpt2.PRESETS[preset]).flat()
    values["n_kv_head"] = values["n_kv_head"] or values["n_head"]
    values["min_lr"] = values["lr"] / 10 if values["min_lr"] is None else values["min_lr"]
    settings = asdict(plain_gpt2.PRESETS[preset])
    for name in ("rope", "rmsnorm", "swiglu", "qk_norm"):
        assert values[name] == settings["modern"]
    assert values["bias"] != settings["modern"] and not values["zero_init"] and values["dropout"] == 0
    others = {"modern", "data", "vocab_size", "batch_size"}  # of the twin alone, or derived by train_gpt2.py
    for name in settings.keys() - others:
        assert settings[name] == pytest.approx(values[name]), name


@pytest.mark.parametrize("preset", ["gpt2", "modern", "tiny"])
def test_rates_and_momentum_of_whole_runs_are_the_same(preset):
    """Of which thirty steps show the beginning alone."""
    schedule = train_gpt2.TrainConfig().update(train_gpt2.PRESETS[preset]).schedule
    settings = plain_gpt2.PRESETS[preset]
    for step in range(0, schedule.max_steps, 7):
        assert train_gpt2.learning_rate(step, schedule) == pytest.approx(plain_gpt2.learning_rate(step, settings), rel=1e-9)
        assert train_gpt2.muon_momentum(step, schedule) == pytest.approx(plain_gpt2.muon_momentum(step, settings), rel=1e-12)


def test_the_twin_runs_alone(tmp_path):
    done = subprocess.run([sys.executable, TWIN, "tiny", "3"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    *lines, last = done.stdout.splitlines()
    number = r"[\d.]+(?:e[+-]\d+)?"
    steps = [re.fullmatch(rf"step (\d)  loss ({number})  grad_norm {number}  lr {number}", line) for line in lines]
    assert [step[1] for step in steps] == ["1", "2", "3"] and abs(float(steps[0][2]) - math.log(257)) < 0.1
    assert 2 < float(re.fullmatch(rf"validation loss ({number})", last)[1]) < 5


def comments(lines):
    """Full-line comments."""
    return [line for line in lines if line.lstrip().startswith("#")]


def test_the_twin_is_short_and_plain():
    text = TWIN.read_text()
    lines, tree = text.splitlines(), ast.parse(text)
    assert len(lines) <= 300 and max(map(len, lines)) <= 100
    assert len(comments(lines)) >= len(lines) / 5
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"numpy", "torch"}
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    plain = [node.name for node in classes if [ast.unparse(base) for base in node.bases] != ["nn.Module"]]
    assert plain == ["Settings"]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Try)]


@pytest.mark.parametrize("script, most_lines, most_characters", [
    ("train_gpt2.py", 1920, 101_000), ("fineweb.py", 1150, 56_000), ("hellaswag.py", 420, 24_000)])
def test_sizes(script, most_lines, most_characters):
    """Full-line comments, which say why, are not counted."""
    lines = (ROOT / script).read_text().splitlines()
    code = "".join(f"{line}\n" for line in lines if line not in comments([line]))
    assert max(map(len, lines)) <= 120
    assert code.count("\n") <= most_lines and len(code) <= most_characters
