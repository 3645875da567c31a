"""Data sets larger than memory: mapped files, batches made ahead, shuffled by stretches of the file."""

import gc
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_line
from PIL import Image

from support import cache, loader
from support.cache import fingerprint
from support.files import digest
from support.loader import Loader, ahead
from utils import DATASETS, get_data


def test_ahead_gives_the_same_items_and_errors_and_ends_with_its_user():
    assert list(ahead(iter(range(10)))) == list(range(10))

    def broken():
        yield 1
        raise OSError("gone")

    items = ahead(broken())
    assert next(items) == 1
    with pytest.raises(OSError, match="gone"):
        next(items)
    made = []
    items = ahead((made.append(i) or i for i in range(10**9)), depth=2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.2)
    assert len(made) <= 6  # three used, two waiting, one in hand
    threads = threading.active_count()
    items.close()
    time.sleep(0.5)
    assert threading.active_count() < threads


def test_a_set_that_does_not_fit_gives_the_same_batches():
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    batches = Loader(images, 6, y=torch.arange(20), flip=True)
    whole = list(batches.epoch(2, start=1))
    batches.resident = False
    for (a, y_a), (b, y_b) in zip(whole, batches.epoch(2, start=1), strict=True):
        assert torch.equal(a, b) and torch.equal(y_a, y_b)


def test_a_large_set_is_shuffled_by_stretches_of_its_file(monkeypatch):
    monkeypatch.setattr(loader, "MAPPED", 10**4)
    batches = Loader(torch.zeros(40_000, 1, 1, 1, dtype=torch.uint8), 64, y=torch.arange(40_000))
    order = batches.shuffled(torch.Generator().manual_seed(0))
    assert torch.equal(order.sort().values, torch.arange(40_000))  # each image once
    assert torch.equal(order, batches.shuffled(torch.Generator().manual_seed(0)))
    assert not torch.equal(order, batches.shuffled(torch.Generator().manual_seed(1)))
    begun = order[: 64 * 256] // 64  # the stretches that are open at first: no more than 256,
    assert len(begun.unique()) == 256 and len(begun[:64].unique()) > 40  # but a batch is of many
    y = torch.cat([y for _, y in batches.epoch(0)])
    assert torch.equal(y.sort().values, torch.arange(40_000))


def save_array(path, n, size=8, channels=3):
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, channels), np.uint8)
    np.save(path, images)
    return images


@pytest.mark.parametrize("channels", [1, 3])
def test_an_array_file_is_a_data_set(tmp_path, channels):
    images = save_array(tmp_path / "a.npy", 9, channels=channels)
    data = get_data("folder", tmp_path / "a.npy", cache_dir=tmp_path / "cache")
    assert np.array_equal(data.images.numpy(), images.transpose(0, 3, 1, 2)) and data.flip
    assert not (tmp_path / "cache").exists()  # nothing was decoded
    small = get_data("folder", tmp_path / "a.npy", image_size=4, limit=5, cache_dir=tmp_path / "cache")
    assert small.images.shape == (5, channels, 4, 4)


def test_an_array_file_that_is_none(cli):
    def line(path):
        return error_line(cli("--dataset", "folder", "--data-root", path))

    for shape, kind in (((3, 8, 8, 3), "f4"), ((3, 8, 8), "u1"), ((3, 3, 8, 8), "u1")):
        np.save("bad.npy", np.zeros(shape, kind))
        assert "bad.npy is no array of images" in line("bad.npy")
    Path("bad.npy").write_bytes(b"no array")
    assert "bad.npy is no array of images" in line("bad.npy") and "can't be read" in line("none.npy")


def own_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("decoded", [False, True])
def test_memory_does_not_grow_with_the_data_set(tmp_path, monkeypatch, decoded):
    for module in (cache, loader):
        monkeypatch.setattr(module, "MAPPED", 10**7)
    save_array(tmp_path / "a.npy", 25_000, 32)  # 77 MB
    size = 16 if decoded else 32  # 19 MB
    get = partial(get_data, "folder", tmp_path / "a.npy", image_size=size, cache_dir=tmp_path / "cache")
    if decoded:
        get()
    gc.collect()
    before = own_memory()
    batches = Loader(get().images, 64, flip=True)
    for _ in batches.epoch(0):
        pass
    assert digest(batches.images)
    assert own_memory() - before < 12e6


def test_a_cache_with_unreadable_files_is_mapped_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 4)
    (tmp_path / "in").mkdir()
    for i in range(11):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"in/{i:02d}.png")
    for i in (0, 5, 10):
        (tmp_path / f"in/{i:02d}.png").write_bytes(b"broken")
    for _ in range(2):
        data = get_data("folder", tmp_path / "in", image_size=8, cache_dir=tmp_path / "cache")
        assert (data.images[:, 0, 0, 0] / 20).tolist() == [1, 2, 3, 4, 6, 7, 8, 9]
        assert [Path(p).name for p in data.skipped] == ["00.png", "05.png", "10.png"]


def test_a_large_set_is_known_by_part_of_it(monkeypatch):
    class Huge(torch.Tensor):
        def numel(self):
            return 2**31

    x = torch.arange(40, dtype=torch.uint8).view(10, 4)
    whole, part = digest(x), digest(x.as_subclass(Huge))
    assert whole != part and len(part) == 16
    y = x.clone()
    y[0] += 1
    assert digest(y) != whole and digest(y.as_subclass(Huge)) != part


def test_a_large_array_is_known_by_its_file(tmp_path, monkeypatch):
    images = save_array(tmp_path / "a.npy", 9)
    monkeypatch.setattr(np, "ascontiguousarray", None)  # it is not read

    def known():
        source = DATASETS["folder"](tmp_path / "a.npy", "train")
        return fingerprint(source.images, source.root)

    before = known()
    assert known() == before
    np.save(tmp_path / "a.npy", images[::-1])
    assert known() != before


def test_a_cache_that_cannot_be_mapped_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "read_cache", lambda *args: None)
    data = get_data("digits", image_size=8, limit=5, cache_dir=tmp_path)
    assert data.images.shape == (5, 1, 8, 8)
