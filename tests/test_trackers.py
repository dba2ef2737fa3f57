"""Weights & Biases, TensorBoard and plots, read back from what was written."""
import html
import json
import re
import struct
import subprocess
import sys

import pytest

import train_gpt2
from conftest import ROOT, SMALL, is_untouched, log_lines, refused, run, spawn

pytest.importorskip("wandb")
pytest.importorskip("tensorboard")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, small_shards):
    """A run of 6 steps with both trackers, resumed to 8."""
    out_dir = tmp_path_factory.mktemp("tracked") / "log_of_mine"
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    flags = ["--wandb", "test-project", "--tensorboard", "--data", small_shards, "--checkpoint_every", 3, "--sample_every", 3,
             "--out_dir", out_dir]
    run("train_gpt2.py", *SMALL, *flags, env=offline)
    spawn("train_gpt2.py", "--resume", "--max_steps", 8, "--out_dir", out_dir, "--device", "cpu", env=offline).finish()
    return out_dir


def leveldb_log(data):
    """The records of an offline run's file, which wandb itself only reads to upload it: LevelDB's log format, blocks of
    32 KiB, after a header of 7 bytes, of pieces with checksum (4 bytes), length (2) and type (1)."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:  # no header fits the rest of the block
            at += -at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece of one
            yield record
            record = b""


def test_wandb_has_config_and_metrics_under_one_id(tracked):
    from wandb.proto import wandb_internal_pb2
    ids, names, history, config = [], [], [], {}
    for path in sorted(tracked.glob("wandb/offline-run-*/run-*.wandb")):
        for data in leveldb_log(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                ids.append(record.run.run_id)
                names.append(record.run.display_name)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                history.append({(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item})
    assert len(set(ids)) == 1 and config["n_layer"] == 2 and config["total_batch_size"] == 512
    assert set(names) == {"log_of_mine"} and config["chosen"]["dtype"] == "float32" and config["max_steps"] == 8
    assert all(len(row.keys() - {"step", "_step", "_timestamp", "_runtime"}) > 0 for row in history)  # none is empty
    samples = {row["step"]: row["sample"] for row in history if "sample" in row}
    pages = [path.read_bytes().decode() for path in tracked.glob("wandb/offline-run-*/files/media/html/*")]
    texts = {line["step"]: line["text"] for line in log_lines(tracked, "sample")}
    assert samples.keys() == texts.keys() and len(texts) == 3
    assert all(any(html.escape(text) in page for page in pages) for text in texts.values())
    losses = {row["step"]: row["train/loss"] for row in history if "train/loss" in row}
    assert losses == {line["step"]: line["loss"] for line in log_lines(tracked, "train")} and len(losses) == 8
    validated = {row["step"]: row["val/loss"] for row in history if "val/loss" in row}  # the resumed step's once more
    assert validated == {line["step"]: line["loss"] for line in log_lines(tracked, "val")} and len(validated) == 3


def test_tensorboard_has_the_metrics(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in log_lines(tracked, "train")}, rel=1e-6)
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("sample/text_summary")}
    assert {step: text.strip("`\n") for step, text in texts.items()} == \
        {line["step"]: line["text"].strip("`\n") for line in log_lines(tracked, "sample")}
    configs = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("config/text_summary")]
    assert [json.loads(text.strip("`\n"))["max_steps"] for text in configs] == [6, 8]
    validated = {event.step for event in events.Scalars("val/perplexity")}
    assert validated == {line["step"] for line in log_lines(tracked, "val")} and len(log_lines(tracked, "val")) == 3


def test_plot(tracked, tmp_path):
    out, _ = run("train_gpt2.py", "plot", "--out_dir", tracked, tracked, "--output", tmp_path / "loss.png")
    assert "loss.png" in out and (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_draws_hellaswag_and_gpt2s_lines(tracked, tmp_path):
    lines = [json.dumps({**json.loads(line), "tokenizer": "gpt2", "data": "edu_fineweb10B"} if i == 0 else json.loads(line))
             for i, line in enumerate((tracked / "log.jsonl").read_text().splitlines())]
    lines.append(json.dumps({"kind": "hellaswag", "step": 6, "acc": 0.25, "acc_norm": 0.26, "n": 100}))
    (tmp_path / "log").mkdir()
    (tmp_path / "log/log.jsonl").write_text("\n".join(lines) + "\n")
    run("train_gpt2.py", "plot", "--out_dir", tmp_path / "log", tracked, "--output", tmp_path / "both.svg")
    picture = (tmp_path / "both.svg").read_text()
    assert picture.count("OpenAI's GPT-2 124M") == 2 and "HellaSwag, acc_norm" in picture


def test_plot_says_what_is_missing(tmp_path):
    assert "log.jsonl" in refused("train_gpt2.py", "plot", "--out_dir", tmp_path)


@pytest.mark.parametrize("package,flags", [("wandb", ["--wandb", "p"]), ("tensorboard", ["--tensorboard"])])
def test_a_tracker_that_is_not_installed(package, flags, small_shards, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package or name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in refused("train_gpt2.py", *SMALL, *flags, "--data", small_shards, "--out_dir", tmp_path / "log")
    assert is_untouched(tmp_path / "log")


def test_wandb_without_a_key_is_one_line(small_shards, tmp_path, monkeypatch):
    import wandb

    def init(**about):
        raise wandb.errors.UsageError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])")
    monkeypatch.setattr(wandb, "init", init)
    flags = [*SMALL, "--data", small_shards, "--out_dir", tmp_path / "log"]
    said = refused("train_gpt2.py", *flags, "--wandb", "p")
    assert "api_key not configured" in said and "wandb login" in said
    run("train_gpt2.py", *flags)  # nothing was begun that would refuse this


def test_the_sweep_of_the_readme_gives_each_run_its_folder(tmp_path):
    """The command as wandb's agent puts it together for two runs; a program in the place of python says what it was given."""
    import yaml
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load(re.search(r"```yaml\n(program: .*?)```", (ROOT / "README.md").read_text(), flags=re.S)[1])
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    command, given = create_sweep_command(sweep["command"]), []
    for run_id, lr, rope in (("a", 0.003, True), ("b", 0.006, False)):
        chosen = {name: {"value": about["value"]} for name, about in sweep["parameters"].items() if "value" in about}
        macros = create_sweep_command_args({"args": {**chosen, "lr": {"value": lr}, "rope": {"value": rope}}})
        macros["program"] = [sweep["program"]]
        words = [word for part in command for word in (macros[part[2:-1]] if part.startswith("${") else [part])]
        out = subprocess.run(words, capture_output=True, text=True, check=True,
                             env={"PATH": f"{tmp_path}:/usr/bin:/bin", "WANDB_RUN_ID": run_id}).stdout.splitlines()
        assert out[0] == "train_gpt2.py"
        given.append(train_gpt2.read_flags(out[1:]))
    for config, names, lr, rope, out_dir in zip(*zip(*given), (0.003, 0.006), (True, False), ("log_sweep_a", "log_sweep_b")):
        assert names == {"data", "wandb", "lr", "rope", "out_dir"}
        assert (config.setup.data, config.system.wandb, config.setup.out_dir) == ("input.txt", "my-project", out_dir)
        assert (config.schedule.lr, config.model.rope) == (lr, rope)
