"""The README: its flag tables are those of --help, and its commands run as printed.

$ python tests/test_readme.py    # writes the flag tables anew
"""
import dataclasses
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fineweb
import hellaswag
import train_gpt2
from conftest import ROOT, run, shell

README = ROOT / "README.md"
COMMANDS = {"train_gpt2.py": (train_gpt2.GPTConfig, train_gpt2.TrainConfig), "train_gpt2.py sample": (train_gpt2.SampleConfig,),
            "train_gpt2.py eval": (train_gpt2.EvalConfig,), "train_gpt2.py plot": (train_gpt2.PlotConfig,),
            "fineweb.py": (fineweb.Config,), "hellaswag.py": (hellaswag.Flags,)}


def flag_tables():
    """From the dataclasses, where --help has them from."""
    lines = []
    for command, classes in COMMANDS.items():
        lines += ["", f"`python {command}`", "", "| flag | default | meaning |", "|---|---|---|"]
        for cls in classes:
            for f in dataclasses.fields(cls):
                if "help" in f.metadata:
                    default = f.metadata.get("default_text", f.default)
                    choices = f": {', '.join(map(str, f.metadata['choices']))}" if "choices" in f.metadata else ""
                    shown = {None: "", True: "on", False: "off"}.get(default, default) if not isinstance(default, (int, float)) or isinstance(default, bool) else default
                    lines.append(f"| `--{f.name}` | {shown} | {f.metadata['help']}{choices} |".replace("|auto", "\\|auto"))
    return "\n".join(lines).strip()


def with_flag_tables(text):
    start, end = "<!-- flags -->\n", "<!-- end of flags -->\n"
    return text[:text.index(start)] + start + flag_tables() + "\n" + text[text.index(end):]


def test_flag_tables_are_those_of_help():
    text = README.read_text()
    assert text == with_flag_tables(text), "run python tests/test_readme.py"
    assert "| `--n_layer` | 12 |" in text
    for command, classes in COMMANDS.items():
        script, *sub = command.split()
        shown = set(re.findall(r"^  --(\w+)", run(script, *sub, "--help")[0], flags=re.M))
        assert shown == {f.name for cls in classes for f in dataclasses.fields(cls) if "help" in f.metadata}, command


def blocks():
    """Shell blocks after a line <!-- runs on a CPU -->; their lines run in one folder, one after the other."""
    return re.findall(r"<!-- runs on a CPU -->\n+```bash\n(.*?)```", README.read_text(), flags=re.S)


def test_readme_has_commands_to_run():
    assert len(blocks()) >= 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The repository as a user has it after the first command: a run in log/, here a short one."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("train_gpt2.py", "fineweb.py", "hellaswag.py", "input.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    shell("python train_gpt2.py --max_steps 2 --total_batch_size 256 --sample_every 0 --eval_tokens 2048", folder)
    return folder


@pytest.mark.parametrize("number", range(len(blocks())))
def test_commands_run_as_printed(number, folder):
    shell(blocks()[number], folder)


if __name__ == "__main__":
    README.write_text(with_flag_tables(README.read_text()))
