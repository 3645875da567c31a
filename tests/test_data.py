"""Data sets: every layout, every kind of image file, the cache, and the batches."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from support import cars, images
from support.errors import UserError
from support.images import read_image
from support.loader import Loader
from utils import get_data

RED, BLUE = (220, 30, 40), (20, 40, 230)


def save_image(path, colour=RED, size=(12, 12), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@pytest.fixture
def get(tmp_path, monkeypatch):
    """get_data with its cache in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return get_data


def test_digits(get):
    data = get("digits")
    assert data.images.shape == (1797, 1, 16, 16) and data.images.dtype == torch.uint8
    ucis = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.labels.bincount().tolist() == ucis
    assert data.class_names == list("0123456789") and not data.flip
    assert data.images.min() == 0 and data.images.max() == 255
    assert get("digits", image_size=8, channels=3).images.shape == (1797, 3, 8, 8)
    with pytest.raises(UserError, match="no split 'test'"):
        get("digits", split="test")


def test_limit_is_the_start_of_a_fixed_shuffle(get):
    few, more = get("digits", limit=50), get("digits", limit=300)
    assert len(few.images) == 50 and torch.equal(few.images, more.images[:50])
    assert torch.equal(few.labels, more.labels[:50])
    assert len(few.labels.unique()) == 10
    assert len(get("digits", limit=10**6).images) == 1797


def test_unknown_data_set(get):
    with pytest.raises(UserError, match=r"unknown data set 'cifar11'.*digits, mnist"):
        get("cifar11")


def test_mnist(data_root, get):
    data = get("mnist", data_root, limit=500)
    assert data.images.shape == (500, 1, 28, 28) and len(data.labels.unique()) == 10 and not data.flip
    assert get("mnist", data_root, split="test", limit=10).images.shape == (10, 1, 28, 28)


def test_failed_download_is_a_user_error(get, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("Error downloading:\nno route to host")

    monkeypatch.setattr("torchvision.datasets.MNIST", refuse)
    with pytest.raises(UserError, match=r"Error downloading: no route to host.*--data-root"):
        get("mnist", "nowhere")
    with pytest.raises(UserError, match="unknown split 'validation'"):
        get("mnist", "nowhere", split="validation")


def test_imagenette_as_downloaded(get, tmp_path, capsys):
    for part, wnid in (("train", "n01440764"), ("train", "n03028079"), ("val", "n03028079")):
        save_image(tmp_path / "imagenette2-160" / part / wnid / "x.JPEG")
    data = get("imagenette", tmp_path)
    assert data.class_names == ["tench", "church"] and data.labels.tolist() == [0, 1]
    assert len(get("imagenette", tmp_path, split="test").images) == 1
    assert "1 images of 3925" in capsys.readouterr().err


# Stanford Cars

NAMES = [
    "AM General Hummer SUV 2000",
    "Acura RL Sedan 2012",
    "Ram C/V Cargo Van Minivan 2012",
    "Acura Integra Type R",
]


def cars_annotations(path, numbers):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([f"{i:05d}.jpg", 1, 1, 9, 9, k] for i, k in enumerate(numbers, start=1))


def test_cars_as_torchvision_has_them(get, tmp_path):
    root = tmp_path / "stanford_cars"
    for i in (1, 2, 3):
        save_image(root / f"cars_train/{i:05d}.jpg")
    save_image(root / "cars_test/00001.jpg")
    (root / "devkit").mkdir()
    (root / "devkit/train_perfect_preds.txt").write_text("14\n3\n196\n")
    for where in (tmp_path, root, root / "cars_train"):
        data = get("stanfordcars", where, image_size=8)
        assert data.images.shape == (3, 3, 8, 8) and data.flip
        assert data.labels.tolist() == [13, 2, 195] and len(data.class_names) == 196
    test = get("stanfordcars", tmp_path, split="test")
    assert len(test.images) == 1 and test.labels is None


def test_cars_class_names_by_scipy(get, tmp_path):
    io = pytest.importorskip("scipy.io")
    save_image(tmp_path / "cars_train/00002.jpg")
    (tmp_path / "devkit").mkdir()
    names = np.empty((1, 3), object)
    names[0] = ["A", "B", "C"]
    io.savemat(tmp_path / "devkit/cars_meta.mat", {"class_names": names})
    kind = [("class", "O"), ("fname", "O")]
    annotations = np.array([(3, "00001.jpg"), (2, "00002.jpg")], kind)
    io.savemat(tmp_path / "devkit/cars_train_annos.mat", {"annotations": annotations})
    data = get("stanfordcars", tmp_path)
    assert data.class_names == ["A", "B", "C"] and data.labels.tolist() == [1]


def kaggle_by_classes(root):
    """names.csv and anno_train.csv beside car_data/car_data/{train,test}/<Class>/; alphabetical order is not
    official.
    """
    (root / "names.csv").write_text("".join(f"{name}\n" for name in NAMES))
    cars_annotations(root / "anno_train.csv", [4, 3, 1])
    for i, k in enumerate([4, 3, 1], start=1):
        save_image(root / "car_data/car_data/train" / NAMES[k - 1].replace("/", "-") / f"{i:05d}.jpg")
    save_image(root / "car_data/car_data/test" / NAMES[1] / "00001.jpg")


@pytest.mark.parametrize("folder", ["", "stanford-car-dataset-by-classes-folder"])
def test_cars_by_classes_from_kaggle(get, tmp_path, folder):
    root = tmp_path / folder
    root.mkdir(exist_ok=True)
    kaggle_by_classes(root)
    for where in (tmp_path, root, root / "car_data", root / "car_data/car_data"):
        data = get("stanfordcars", where)
        assert data.class_names == NAMES
        assert sorted(data.labels.tolist()) == [0, 2, 3]  # with "Ram C/V", whose folder is "Ram C-V"
        test = get("stanfordcars", where, split="test")
        assert test.labels.tolist() == [1] and test.class_names == NAMES


def test_cars_are_not_looked_for_above_the_data_root(get, tmp_path):
    save_image(tmp_path / "in/cars_train/00001.jpg")
    (tmp_path / "names.csv").write_text("alice\nbob\n")
    cars_annotations(tmp_path / "anno_train.csv", [2])
    assert get("stanfordcars", tmp_path / "in").labels is None


def test_cars_beside_other_data(get, tmp_path):
    save_image(tmp_path / "train/dog/1.png")
    save_image(tmp_path / "train/cat/1.png")
    save_image(tmp_path / "stanford_cars/cars_train/00001.jpg")
    assert len(get("stanfordcars", tmp_path).images) == 1


def test_cars_with_damaged_devkit(get, tmp_path, capsys):
    pytest.importorskip("scipy")
    save_image(tmp_path / "cars_train/00001.jpg")
    (tmp_path / "devkit").mkdir()
    (tmp_path / "devkit/cars_meta.mat").write_text("version https://git-lfs.github.com/spec/v1")
    assert get("stanfordcars", tmp_path).labels is None and "can't be read" in capsys.readouterr().err
    (tmp_path / "devkit/train_perfect_preds.txt").write_text("one\n")
    with pytest.raises(UserError, match="one class number a line"):
        get("stanfordcars", tmp_path)


def test_cars_by_classes_without_names_use_the_annotations(get, tmp_path):
    kaggle_by_classes(tmp_path)
    (tmp_path / "names.csv").unlink()
    data = get("stanfordcars", tmp_path)
    assert sorted(data.labels.tolist()) == [0, 2, 3]
    assert data.class_names[2] == "Ram C-V Cargo Van Minivan 2012"


def test_cars_of_an_unknown_class_are_an_error(get, tmp_path):
    kaggle_by_classes(tmp_path)
    save_image(tmp_path / "car_data/car_data/train/Trabant/00009.jpg")
    with pytest.raises(UserError, match="Trabant"):
        get("stanfordcars", tmp_path)


def test_cars_in_doubled_folders(get, tmp_path):
    for i in (1, 2):
        save_image(tmp_path / f"cars_train/cars_train/{i:05d}.jpg")
    assert get("stanfordcars", tmp_path).labels is None
    cars_annotations(tmp_path / "anno_train.csv", [181, 7])
    assert get("stanfordcars", tmp_path).labels.tolist() == [180, 6]
    save_image(tmp_path / "cars_train/cars_train/00003.jpg")
    with pytest.raises(UserError, match=r"00003\.jpg"):
        get("stanfordcars", tmp_path)


def test_cars_in_plain_class_folders(get, tmp_path):
    names = ["Acura RL Sedan 2012", "BMW M3 Coupe 2012"]
    for name in names:
        save_image(tmp_path / "train" / name / "x.jpg")
    save_image(tmp_path / "test" / names[0] / "x.jpg")
    save_image(tmp_path / "train/cover.jpg")  # a stray one
    assert get("stanfordcars", tmp_path).class_names == names
    assert get("stanfordcars", tmp_path, split="test").labels.tolist() == [0]


def test_no_cars(get, tmp_path):
    save_image(tmp_path / "imagenette2-160/train/n01440764/x.jpg")  # not mistaken for cars
    with pytest.raises(UserError) as error:
        get("stanfordcars", tmp_path)
    text = str(error.value)
    assert str(tmp_path / "cars_train") in text and "car_data/car_data/" in text and "devkit/" in text
    assert "kaggle datasets download -d jutrera/stanford-car-dataset-by-classes-folder" in text
    assert "kaggle datasets download -d rickyyyyyyy/torchvision-stanford-cars" in text


def test_real_cars(data_root, get, capsys):
    source = utils.stanfordcars(data_root, "train")
    assert len(source.images) == 8144 and len(source.class_names) == 196
    with open(data_root / "stanford_cars_by_class/anno_train.csv", newline="") as file:
        official = {row[0]: int(row[5]) for row in csv.reader(file)}
    assert source.labels == [official[p.name] - 1 for p in source.images]
    pytest.importorskip("scipy")
    names = (data_root / "stanford_cars_by_class/names.csv").read_text().splitlines()
    assert source.class_names == [name.strip() for name in names]


# folder


def test_flat_folder(get, tmp_path):
    save_image(tmp_path / "in/b.png")
    save_image(tmp_path / "in/a.jpg")
    save_image(tmp_path / "in/.hidden.jpg")
    (tmp_path / "in/notes.txt").write_text("no image")
    data = get("folder", tmp_path / "in", image_size=8)
    assert data.images.shape == (2, 3, 8, 8) and data.labels is None and data.flip


def test_class_folders(get, tmp_path):
    for name in ("in/dog/1.png", "in/cat/1.png", "in/cat/deep/2.png"):
        save_image(tmp_path / name)
    (tmp_path / "in/empty").mkdir()
    save_image(tmp_path / "in/cat/.ipynb_checkpoints/1.png")
    data = get("folder", tmp_path / "in")
    assert data.class_names == ["cat", "dog"] and data.labels.tolist() == [0, 0, 1]


def test_folder_with_splits(get, tmp_path):
    for name in ("train/dog/1.png", "train/cat/1.png", "test/cat/1.png", "validation/cat/1.png"):
        save_image(tmp_path / "in" / name)
    assert get("folder", tmp_path / "in").class_names == ["cat", "dog"]
    assert len(get("folder", tmp_path / "in", split="test").images) == 1
    with pytest.raises(UserError, match="no split 'test'"):
        get("folder", tmp_path / "in/train", split="test")
    save_image(tmp_path / "vehicles/train/1.png")
    save_image(tmp_path / "vehicles/plane/1.png")
    assert get("folder", tmp_path / "vehicles").class_names == ["plane", "train"]


def test_captions(get, tmp_path):
    save_image(tmp_path / "in/png/a.png")
    save_image(tmp_path / "in/png/b.png")
    captions = {"png/b.png": "bee", "png/a.png": "ay", "gone": "!"}
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    text = "\n".join(lines) + "\n\n"
    (tmp_path / "in/metadata.jsonl").write_text(text, encoding="utf-8-sig")  # as Windows' editors write it
    data = get("folder", tmp_path / "in")
    assert data.captions == ["bee", "ay"] and not data.flip and data.skipped == [str(tmp_path / "in/gone")]
    (tmp_path / "in/metadata.jsonl").write_text(f'{lines[1]}\n{{"file_name": 3}}\n')
    with pytest.raises(UserError, match="line 2"):
        get("folder", tmp_path / "in")


def test_real_captions(data_root, get):
    data = get("folder", data_root / "emoji", limit=20, image_size=16)
    assert data.images.shape == (20, 3, 16, 16) and len(data.captions) == 20 and not data.skipped


def test_no_images(get, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        get("folder", tmp_path / "in")
    with pytest.raises(UserError, match="does not exist"):
        get("folder", tmp_path / "out")
    (tmp_path / "in/broken.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="none of the 1 images"):
        get("folder", tmp_path / "in")


# image files


def mean_colour(path, channels=3):
    return read_image(path, 8, channels).astype(float).mean(axis=(1, 2))


def test_every_kind_of_image(tmp_path):
    red = Image.new("RGB", (20, 16), RED)
    half = Image.new("RGBA", (16, 16), (0, 0, 0, 0))  # transparent, with a red left half
    half.paste((*RED, 255), (0, 0, 8, 16))
    images = {
        "rgb.png": (red, RED),
        "upper.JPG": (red, RED),
        "gray.png": (Image.new("L", (16, 16), 77), (77, 77, 77)),
        "gray.jpg": (Image.new("L", (16, 16), 77), (77, 77, 77)),
        "palette.png": (red.quantize(4), RED),
        "palette.gif": (red.quantize(4), RED),
        "cmyk.jpg": (red.convert("CMYK"), RED),
        "bits16.png": (Image.fromarray(np.full((16, 16), 77 * 257, np.uint16)), (77, 77, 77)),
        "bits16.tif": (Image.fromarray(np.full((16, 16), 77 * 257, np.uint16)), (77, 77, 77)),
        "float.tif": (Image.fromarray(np.full((16, 16), 0.3, np.float32)), (76.5, 76.5, 76.5)),
        "bilevel.png": (Image.new("1", (16, 16), 1), (255, 255, 255)),
        "la.png": (Image.new("LA", (16, 16), (0, 0)), (255, 255, 255)),  # all transparent: white
        "rgba.png": (Image.new("RGBA", (16, 16), (*RED, 0)), (255, 255, 255)),
        "half.webp": (half, tuple((255 + c) / 2 for c in RED)),
    }
    for name, (image, colour) in images.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        assert np.abs(mean_colour(tmp_path / name) - colour).max() < 5, name
        luma = np.dot(colour, (0.299, 0.587, 0.114))
        assert np.abs(mean_colour(tmp_path / name, channels=1) - luma).max() < 5, name


def test_transparent_palette_is_laid_on_white(tmp_path):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, *RED])
    image.save(tmp_path / "p.png", transparency=1)
    assert np.abs(mean_colour(tmp_path / "p.png") - 255).max() < 2


def test_exif_rotation(tmp_path):
    image = Image.new("RGB", (16, 16), BLUE)
    image.paste(RED, (0, 0, 16, 8))  # red on top
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to view"
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    upright = read_image(tmp_path / "x.jpg", 8, 3).astype(int)
    assert np.abs(upright[:, :, -1].mean(axis=1) - RED).max() < 12  # the top has gone to the right
    assert np.abs(upright[:, :, 0].mean(axis=1) - BLUE).max() < 12


def test_broken_exif_does_not_make_a_broken_image(tmp_path):
    Image.new("RGB", (16, 16), RED).save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x09\x01\x12")
    assert np.abs(mean_colour(tmp_path / "x.jpg") - RED).max() < 5


def test_resize_keeps_the_aspect_and_crops_the_center(tmp_path):
    image = Image.new("RGB", (64, 16), BLUE)
    image.paste(RED, (24, 0, 40, 16))  # a red square in the middle of a wide image
    image.save(tmp_path / "wide.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        for size in (8, 16, 32):
            pixels = read_image(tmp_path / name, size, 3).astype(int)
            assert pixels.shape == (3, size, size)
            middle = pixels[:, size // 4 : -size // 4, size // 4 : -size // 4]  # the rim may ring
            assert np.abs(middle - np.array(RED)[:, None, None]).max() <= 3


def test_unreadable_images_are_skipped_and_listed(get, tmp_path, capsys):
    for i in range(4):
        save_image(tmp_path / f"in/{'ab'[i % 2]}/{i}.png", RED if i % 2 else BLUE)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "in/a/1bad.png")
    (tmp_path / "in/a/1bad.png").write_bytes((tmp_path / "in/a/1bad.png").read_bytes()[:1500])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(tmp_path / "in/a/2bad.jpg", exif=exif)
    (tmp_path / "in/a/2bad.jpg").write_bytes((tmp_path / "in/a/2bad.jpg").read_bytes()[:900])
    (tmp_path / "in/b/0bad.jpg").write_bytes(b"%!PS-Adobe\n(this would be run by Ghostscript) show")
    for _ in range(2):  # decoded, then from the cache
        data = get("folder", tmp_path / "in", image_size=8)
        assert data.labels.tolist() == [0, 0, 1, 1]
        assert (data.images[:2, 2] > 200).all() and (data.images[2:, 0] > 200).all()  # labels still fit
        bad = ("a/1bad.png", "a/2bad.jpg", "b/0bad.jpg")
        assert data.skipped == [str(tmp_path / "in" / name) for name in bad]
        err = capsys.readouterr().err
        assert "3 unreadable" in err and all(name in err for name in data.skipped)


# cache


def test_cache_is_used_and_never_stale(get, tmp_path, monkeypatch):
    for i in range(3):
        save_image(tmp_path / f"in/{i}.png", RED)
    first = get("folder", tmp_path / "in", image_size=8)
    decoded = []
    monkeypatch.setattr(images, "read_image", lambda *a: decoded.append(a[0]) or read_image(*a))
    assert torch.equal(get("folder", tmp_path / "in", image_size=8).images, first.images) and not decoded

    before = os.stat(tmp_path / "in/1.png")
    save_image(tmp_path / "in/1.png", BLUE)
    os.utime(tmp_path / "in/1.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # same name, (size) and time
    changed = get("folder", tmp_path / "in", image_size=8)
    assert len(decoded) == 3 and (changed.images[1, 2] > 200).all()
    (tmp_path / "in/2.png").unlink()
    assert len(get("folder", tmp_path / "in", image_size=8).images) == 2
    save_image(tmp_path / "in/3.png", BLUE)
    assert len(get("folder", tmp_path / "in", image_size=8).images) == 3
    assert get("folder", tmp_path / "in", image_size=16, channels=1).images.shape == (3, 1, 16, 16)


def test_damaged_cache_is_made_anew(get, tmp_path, capsys):
    save_image(tmp_path / "in/0.png")
    first = get("folder", tmp_path / "in")
    (cache,) = (tmp_path / "data/cache").iterdir()
    assert cache.name.startswith("folder_train_64x64_rgb_")
    cache.write_bytes(cache.read_bytes()[:500])
    assert torch.equal(get("folder", tmp_path / "in").images, first.images)
    assert "damaged" in capsys.readouterr().err


def test_cache_that_cannot_be_written_is_a_note(get, tmp_path, capsys):
    save_image(tmp_path / "in/0.png")
    (tmp_path / "file").write_text("in the way")
    assert len(get("folder", tmp_path / "in", cache_dir=tmp_path / "file/cache").images) == 1
    assert "not cached" in capsys.readouterr().err


# batches


def numbered(N=10, **options):
    images = torch.arange(N, dtype=torch.uint8).view(N, 1, 1, 1).repeat(1, 1, 2, 2)
    images[..., 1] += 100  # left columns 0..N-1, right ones 100..
    return Loader(images, 4, y=torch.arange(N), **options)


def test_an_epoch_is_every_image_once():
    loader = numbered()
    batches = list(loader.epoch(0))
    assert [len(x) for x, _ in batches] == [4, 4, 2] and loader.batches == 3
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    assert sorted(y.tolist()) == list(range(10)) and y.tolist() != list(range(10))
    assert torch.allclose(x[:, 0, 0, 0], y / 127.5 - 1)  # image and label stay together, in [-1, 1]


def test_epochs_differ_and_can_be_repeated_and_entered_anywhere():
    def order(epoch, start=0, seed=0):
        return [y.tolist() for _, y in numbered(seed=seed, flip=True).epoch(epoch, start)]

    assert order(0) == order(0) and order(0) != order(1) and order(0) != order(0, seed=1)
    assert order(3, start=2) == order(3)[2:]


def test_flips():
    loader = numbered(100, flip=True)
    loader.batch_size = 100
    x, y = next(loader.epoch(0))
    flipped = x[:, 0, 0, 0] > x[:, 0, 0, 1]
    assert 25 < flipped.sum() < 75
    assert torch.allclose(torch.where(flipped, x[:, 0, 0, 1], x[:, 0, 0, 0]), y / 127.5 - 1)
    loader.flip = False
    x, _ = next(loader.epoch(0))
    assert (x[:, 0, 0, 0] < x[:, 0, 0, 1]).all()


# captions of cars


def test_car_captions(get, tmp_path):
    assert cars.caption("Audi TT RS Coupe 2012") == "a photo of a 2012 Audi TT RS Coupe"
    assert cars.caption("smart fortwo") == "a photo of a smart fortwo"
    kaggle_by_classes(tmp_path)
    data = get("stanfordcars", tmp_path)
    assert data.captions == [cars.caption(NAMES[k]) for k in data.labels]
    assert not any(caption.endswith("2012") for caption in data.captions)


def test_cars_without_class_names_have_no_captions(get, tmp_path):
    save_image(tmp_path / "cars_train/00001.jpg")
    (tmp_path / "devkit").mkdir()
    (tmp_path / "devkit/train_perfect_preds.txt").write_text("14\n")
    data = get("stanfordcars", tmp_path, image_size=8)
    assert data.labels.tolist() == [13] and data.captions is None
