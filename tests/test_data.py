"""The loader's one order, whatever the split, and its errors."""
import pickle
import resource
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fineweb
from fineweb import UserError
from train_gpt2 import Corpus, Loader, open_data


def world(rank=0, size=1):
    return SimpleNamespace(rank=rank, size=size, device="cpu", device_type="cpu")


def corpus(lengths=(50, 33, 92, 9), block_size=8):
    starts = np.cumsum([0, *lengths])
    return Corpus([np.arange(a, b) for a, b in zip(starts, starts[1:])], block_size, 10**6, "numbers")


def walk(data, steps, batch_size, size, micro_steps, seed=1):
    """The set of rows of each step, as all ranks together see them."""
    loaders = [Loader(data, batch_size, world(r, size), seed) for r in range(size)]
    return [sorted(tuple(row) for _ in range(micro_steps) for loader in loaders for row in loader.next_batch()[0].tolist())
            for _ in range(steps)]


def test_every_window_once_an_epoch_and_another_order_in_the_next():
    data = corpus()
    expected = {(s, w) for s, n in enumerate([6, 4, 11, 1]) for w in range(n)}
    epochs = [[data.locate(e * 22 + i, seed=3) for i in range(22)] for e in range(3)]
    assert data.windows == 22 and all(len(e) == 22 and set(e) == expected for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != [data.locate(i, seed=4) for i in range(22)]
    shards_in_order = [s for i, (s, _) in enumerate(epochs[0]) if i == 0 or epochs[0][i - 1][0] != s]
    assert sorted(shards_in_order) == [0, 1, 2, 3]  # one shard after the other


def test_windows_do_not_overlap_and_targets_follow():
    data = corpus()
    x, y = Loader(data, 22, world(), 1).next_batch()
    assert torch.equal(x[:, 1:], y[:, :-1]) and len(x.unique()) == 22 * 8 and torch.equal(y[:, -1], x[:, -1] + 1)


@pytest.mark.parametrize("batch_size,size,micro_steps", [(1, 1, 12), (6, 1, 2), (3, 2, 2), (1, 4, 3), (2, 3, 2)])
def test_a_step_sees_the_same_tokens_for_any_split(batch_size, size, micro_steps):
    assert walk(corpus(), 5, batch_size, size, micro_steps) == walk(corpus(), 5, 12, 1, 1)


def test_state_is_two_integers_and_resumes_on_another_split():
    data = corpus()
    loader = Loader(data, 4, world(), 1)
    for _ in range(7):
        loader.next_batch()
    state = loader.state_dict()
    assert state == {"epoch": 1, "window": 6}
    rest = [loader.next_batch()[0] for _ in range(6)]
    pair = [Loader(data, 2, world(r, 2), 1) for r in range(2)]
    for one in pair:
        one.load_state_dict(state)
    for expected in rest:
        assert torch.equal(torch.cat([one.next_batch()[0] for one in pair]), expected)


def test_order_is_the_same_on_every_machine():
    """Raw PCG64 output is guaranteed by numpy; these numbers must never change, or old runs cannot be resumed."""
    from train_gpt2 import permutation
    assert permutation(8, 1337, 0).tolist() == np.argsort(np.random.PCG64([1337, 0]).random_raw(8)).tolist()
    assert [corpus().locate(i, 1337) for i in range(4)] == GOLDEN


GOLDEN = [(1, 0), (1, 1), (1, 3), (1, 2)]


def test_a_trillion_tokens(tmp_path):
    """10,000 sparse shards of 100M tokens: quick to open, small, and any rank's place at any step without walking."""
    first = tmp_path / "edufineweb_val_000000.npy"
    np.lib.format.open_memmap(first, mode="w+", dtype="<u2", shape=(100_000_000,))
    with open(first, "rb") as f:
        header = f.read(128)
    for i in range(1, 10_000):
        with open(tmp_path / f"edufineweb_train_{i:06d}.npy", "wb") as f:
            f.write(header)
            f.truncate(128 + 200_000_000)
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(3):  # another process may hold the disk for a moment
        start = time.perf_counter()
        train, val = open_data(str(tmp_path), SimpleNamespace(vocab_size=50257), 1024)
        loader = Loader(train, 16, world(1023, 1024), 1337)
        loader.load_state_dict({"epoch": 2, "window": 123_456_789})
        x, y = loader.next_batch()
        seconds.append(time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert train.windows == 9_999 * 97_656 and x.shape == (16, 1024)
    assert min(seconds) < 2 and grown < 50, (seconds, grown)


def test_text_is_split_nine_to_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ü" * 500, encoding="utf-8")
    train, val = open_data(str(path), fineweb.get_tokenizer("byte"), 10)
    assert len(train.shards[0]) == 900 and len(val.shards[0]) == 100 and train.shards[0][:2].tolist() == [0xC3, 0xBC]


def test_bad_shards_are_named(gpt2_shards, tmp_path):
    tokenizer = fineweb.get_tokenizer("gpt2")

    def broken(change):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(gpt2_shards, folder)
        path = folder / "edufineweb_train_000001.npy"
        change(path)
        with pytest.raises(UserError) as error:
            data = open_data(str(folder), tokenizer, 32)[0]
            Loader(data, data.windows, world(), 1).next_batch()
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
