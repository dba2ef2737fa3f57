"""The README: short enough to be read, its table of flags that of --help, and its commands run as printed.

$ python tests/test_readme.py    # writes the table of flags anew
"""
import re

import pytest

import benchmark
from conftest import ROOT, fineweb, run, shell

README = ROOT / "README.md"
COMMANDS = ["train_gpt2.py", "train_gpt2.py sample", "train_gpt2.py eval", "train_gpt2.py plot", "fineweb.py", "hellaswag.py"]
DEFAULTS = {"True": "on", "False": "off",  # as the tables say what --help says
            "' '": "a line break",  # between quotes
            fineweb.DEFAULT_OUT: "edu_fineweb10B beside the script"}


def help_entries(command):
    """[flag with its values, meaning] of each flag, in the order of --help."""
    script, *subcommand = command.split()
    text, _ = run(script, *subcommand, "--help", env={"COLUMNS": "129"})  # from 130 on tyro puts groups side by side
    entries = []
    for line in re.findall(r"\n  (.*\S)", text.partition("-h, --help")[2]):  # a group's title has one space
        if line.startswith("-"):
            entries.append(line)
        else:
            entries[-1] += "  " + line.strip()
    return [re.split(r"\s{2,}", entry, maxsplit=1) for entry in entries]


def flag_table():
    """One for all commands."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for command in COMMANDS:
        lines.append(f"| **`{command}`** | | |")
        for flag, about in help_entries(command):
            name, _, values = flag.partition(" ")
            name = name.rstrip(",")  # --x, --no_x
            meaning, default = re.fullmatch(r"(.*) \(default: (.*)\)", " ".join(about.split())).groups()
            default = "one per core" if name == "--workers" else DEFAULTS.get(default, default)
            choices = f" ({values[1:-1].replace(',', ', ')})" if values.startswith("{") else ""
            lines.append(f"| `{name}` | {default} | {meaning}{choices} |")
    return "\n".join(lines)


def with_flag_table(text):
    start, end = "<!-- flags -->\n", "<!-- end of flags -->\n"
    return text[:text.index(start)] + start + flag_table() + "\n" + text[text.index(end):]


def test_flag_table_is_that_of_help():
    text = README.read_text()
    assert text == with_flag_table(text), "run python tests/test_readme.py"
    assert "| `--n_layer` | 12 | transformer blocks |" in text


def test_a_stranger_finishes_it():
    text = README.read_text()
    assert len(text) <= 20000 and text.count("\n") <= 300


def test_every_part_of_the_benchmark_that_it_names_is_there():
    named = re.findall(r"(?:benchmark\.py|`B) (\w+)", README.read_text())
    assert len(set(named)) >= 8 and set(named) <= {*benchmark.COMMANDS, "all"}


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
    README.write_text(with_flag_table(README.read_text()))
