"""The loader's one order, whatever the split, and its errors."""
import os
import pickle
import shutil
import time
import tracemalloc
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fineweb
from fineweb import UserError
from train_gpt2 import Corpus, GPTConfig, open_data, training_batches


def world(rank=0, size=1):
    return SimpleNamespace(rank=rank, size=size, device="cpu", device_type="cpu")


def corpus(lengths=(50, 33, 92, 9), block_size=8):
    starts = np.cumsum([0, *lengths])
    return Corpus([np.arange(a, b) for a, b in zip(starts, starts[1:])], block_size, 10**6, "numbers")


def walk(data, steps, batch_size, size, micro_steps, seed=1):
    """The set of rows of each step, as all ranks together see them."""
    ranks = [training_batches(data, 0, batch_size, world(rank, size), seed) for rank in range(size)]
    return [sorted(tuple(row) for _ in range(micro_steps) for batches in ranks for row in next(batches)[0].tolist())
            for _ in range(steps)]


def test_every_window_once_an_epoch_and_another_order_in_the_next():
    data = corpus()
    expected = {(s, w) for s, n in enumerate([6, 4, 11, 1]) for w in range(n)}
    epochs = [[data.locate(e * 22 + i, seed=3) for i in range(22)] for e in range(3)]
    assert data.num_windows == 22 and data.windows_per_shard.tolist() == [6, 4, 11, 1]
    assert all(len(e) == 22 and set(e) == expected for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != [data.locate(i, seed=4) for i in range(22)]
    shards_in_order = [s for i, (s, _) in enumerate(epochs[0]) if i == 0 or epochs[0][i - 1][0] != s]
    assert sorted(shards_in_order) == [0, 1, 2, 3]  # one shard after the other


def test_windows_do_not_overlap_and_targets_follow():
    data = corpus()
    x, y = next(training_batches(data, 0, 22, world(), 1))
    assert torch.equal(x[:, 1:], y[:, :-1]) and len(x.unique()) == 22 * 8 and torch.equal(y[:, -1], x[:, -1] + 1)


@pytest.mark.parametrize("batch_size,size,micro_steps", [(1, 1, 12), (6, 1, 2), (3, 2, 2), (1, 4, 3), (2, 3, 2)])
def test_a_step_sees_the_same_tokens_for_any_split(batch_size, size, micro_steps):
    assert walk(corpus(), 5, batch_size, size, micro_steps) == walk(corpus(), 5, 12, 1, 1)


@pytest.mark.parametrize("start", [0, 1, 5, 21, 22, 28, 50])
def test_the_place_is_a_window_number_and_the_rest_is_the_same_on_another_split(start):
    """From within an epoch, from its end and from later ones."""
    data = corpus()
    windows = [x for x, _ in islice(training_batches(data, 0, 1, world(), 1), start + 24)]
    rest = torch.cat(windows[start:])
    places = [data.locate(number, 1) for number in range(start, start + 24)]
    assert torch.equal(rest, data.read_windows(places)[:, :-1])
    alone = [x for x, _ in islice(training_batches(data, start, 4, world(), 1), 6)]
    assert torch.equal(torch.cat(alone), rest)
    pair = [training_batches(data, start, 2, world(rank, 2), 1) for rank in range(2)]
    for expected in alone:
        assert torch.equal(torch.cat([next(batches)[0] for batches in pair]), expected)
    three = [training_batches(data, start, 4, world(rank, 3), 1) for rank in range(3)]
    for expected in rest.split(12):
        assert torch.equal(torch.cat([next(batches)[0] for batches in three]), expected)


def test_order_is_the_same_on_every_machine():
    """Raw PCG64 output is guaranteed by numpy; these numbers must never change, or old runs cannot be resumed."""
    from train_gpt2 import permutation
    assert permutation(8, 1337, 0).tolist() == np.argsort(np.random.PCG64([1337, 0]).random_raw(8)).tolist()
    assert [corpus().locate(i, 1337) for i in range(4)] == GOLDEN


GOLDEN = [(1, 0), (1, 1), (1, 3), (1, 2)]


def test_a_trillion_tokens(tmp_path, monkeypatch):
    """10,000 sparse shards of 100M tokens: opened in twice the time of half of them, small, and any rank's place at any
    step without walking."""
    opened, located = [], []
    read_shard, locate = fineweb.read_shard, Corpus.locate

    def watched_read(path):
        opened.append(path)
        return read_shard(path)

    def watched_locate(self, number, seed):
        located.append(number)
        return locate(self, number, seed)

    def open_folder(folder):
        opened.clear()
        started = time.process_time()  # of this process alone, whatever else the machine does
        train, _ = open_data(str(folder), SimpleNamespace(name="gpt2", vocab_size=50257), GPTConfig())
        return train, time.process_time() - started

    monkeypatch.setattr(fineweb, "read_shard", watched_read)
    monkeypatch.setattr(Corpus, "locate", watched_locate)
    first = tmp_path / "edufineweb_val_000000.npy"
    np.lib.format.open_memmap(first, mode="w+", dtype="<u2", shape=(100_000_000,))
    with open(first, "rb") as f:
        header = f.read(128)
    for i in range(1, 10_000):
        with open(tmp_path / f"edufineweb_train_{i:06d}.npy", "wb") as f:
            f.write(header)
            f.truncate(128 + 200_000_000)
    half = tmp_path / "half"
    half.mkdir()
    for path in sorted(tmp_path.glob("*.npy"))[:4_999] + [first]:
        os.link(path, half / path.name)
    tracemalloc.start()  # the process's own peak may lie in an earlier test
    seconds_of_half = open_folder(half)[1]
    train, seconds = open_folder(tmp_path)
    first_window = 2 * train.num_windows + 123_456_789
    batches = training_batches(train, first_window, 16, world(1023, 1024), 1337)
    x, y = next(batches)
    batches.close()  # the next batch has been read ahead
    megabytes = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert train.num_windows == 9_999 * 97_656 and x.shape == (16, 1024)
    assert seconds < 3 * seconds_of_half and megabytes < 20, (seconds, seconds_of_half, megabytes)
    mine = first_window + 1023 * 16
    assert located == [*range(mine, mine + 16), *range(mine + 16_384, mine + 16_400)]
    assert len(opened) <= 10_000 + 4  # every header once, and the one or two shards of each batch


def test_text_is_split_nine_to_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ü" * 500, encoding="utf-8")
    train, val = open_data(str(path), fineweb.get_tokenizer("byte"), GPTConfig(block_size=10))
    assert len(train.shards[0]) == 900 and len(val.shards[0]) == 100 and train.shards[0][:2].tolist() == [0xC3, 0xBC]


def test_bad_shards_are_named(gpt2_shards, tmp_path):
    tokenizer = fineweb.get_tokenizer("gpt2")

    def broken(change):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(gpt2_shards, folder)
        path = folder / "edufineweb_train_000001.npy"
        change(path)
        with pytest.raises(UserError) as error:
            data = open_data(str(folder), tokenizer, GPTConfig(block_size=32))[0]
            next(training_batches(data, 0, data.num_windows, world(), 1))
        assert path.name in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "truncated" in broken(lambda p: p.write_bytes(p.read_bytes()[:-1000]))
    assert "truncated" in broken(lambda p: p.write_bytes(b""))
    assert "int32" in broken(lambda p: np.save(p, np.zeros(2000, np.int32)))
    assert "2-D" in broken(lambda p: np.save(p, np.zeros((20, 100), np.uint16)))
    assert "not a .npy" in broken(lambda p: p.write_text("hello"))
    assert "truncated" in broken(lambda p: p.open("wb").write(pickle.dumps([1])))
    tokens = np.zeros(2000, np.uint16)
    tokens[1234] = 50257
    assert "50257 at offset 1234" in broken(lambda p: np.save(p, tokens))
