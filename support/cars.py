"""Stanford Cars (Krause et al. 2013) in each of the layouts in which people have it."""

import re
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError, note
from .files import read_csv
from .images import entries, image_files, labelled_folders

SIGNS = ("names.csv", "cars_meta.mat", "train_perfect_preds.txt", "cars_train_annos.mat")
LAYOUTS = """accepted, each under --data-root or in a sub-folder of it whose name contains "car", if most
class names end in a year, or names.csv, anno_*.csv or devkit/ is there (--dataset folder takes any images):
  torchvision              Kaggle, by classes            Kaggle, doubled          by classes
  cars_train/00001.jpg     names.csv                     cars_train/              train/
  devkit/                  anno_train.csv                  cars_train/00001.jpg     <Class name>/*.jpg
    cars_meta.mat          car_data/car_data/            devkit/                  test/
    train_perfect_preds.txt  train/<Class name>/*.jpg                               <Class name>/*.jpg
                             test/<Class name>/*.jpg
get it (its original address is gone) with one of
  kaggle datasets download -d jutrera/stanford-car-dataset-by-classes-folder --unzip -p data/stanford_cars
  kaggle datasets download -d rickyyyyyyy/torchvision-stanford-cars --unzip -p data"""


def caption(name: str) -> str:
    """A caption for a class: "Audi TT RS Coupe 2012" gives "a photo of a 2012 Audi TT RS Coupe"."""
    return "a photo of a " + re.sub(r"^(.*) (\d{4})$", r"\2 \1", name)


def captions(labels: Sequence[int] | None, class_names: Sequence[str] | None) -> list[str] | None:
    """A caption for each label; None where labels or the name of a class are not known."""
    names = [class_names[k] for k in labels or ()]
    unknown = not names or any(re.fullmatch(r"class \d+", name) for name in names)
    return None if unknown else [caption(name) for name in names]


def labelled_cars(root: Path, split: str) -> tuple[Path, list[Path], list[int] | None, list[str] | None]:
    """The folder of the cars, files, labels and class names, the official ones if known; else UserError."""
    folder, near = find_images(root, split)
    files, labels, folders = labelled_folders(folder)
    if path := find_file(near, "names.csv"):
        official = [name for row in read_csv(path) if (name := row[0].strip())]
    else:
        official = [str(name) for name in read_mat(find_file(near, "cars_meta.mat"), "class_names")]
    if len(flat := image_files(folder)) > len(files):
        files, labels, folders = flat, None, None
    elif official:  # labels by folder name
        number_of = {key(name): k for k, name in enumerate(official)}
        if odd := [folder / name for name in folders if key(name) not in number_of]:
            raise UserError(f"{odd[0]} is no class of names.csv or the devkit: rename or move it")
        return folder, files, [number_of[key(folders[k])] for k in labels], official
    if not (numbers := labels_by_file(files, near, split)):
        return folder, files, labels, folders  # in alphabetical order
    if official and max(numbers) >= len(official):
        raise UserError(f"class {max(numbers) + 1} of {folder} is none of the {len(official)} classes")
    if not official:  # class names by folder
        name_of = dict(zip(numbers, (folders[k] for k in labels), strict=True)) if folders else {}
        official = [name_of.get(k, f"class {k + 1}") for k in range(max(195, *numbers) + 1)]
    return folder, files, numbers, official


def find_images(root: Path, split: str) -> tuple[Path, list[Path]]:
    """The folder of the images, and the folders where names.csv or devkit/ may be; else UserError."""
    root, flat = root.absolute(), f"cars_{split}"
    inner = {flat, split, "car_data"}  # --data-root may be one of the layout's own folders
    top = next(p for p in (root, *root.parents) if p.name not in inner)
    bases = [root, *(f for f in entries(root) if f.is_dir() and "car" in f.name.lower())]
    bases += [root.parent] if root.name in inner else []
    parts = [f"{flat}/{flat}", flat, f"car_data/car_data/{split}", f"car_data/{split}", split]
    candidates = [base / part for part in parts for base in bases]
    for images in candidates:
        near = [p for p in (images, *images.parents) if p.is_relative_to(top)]
        if are_cars(images, near, split):
            return images, near
    shown = "\n".join(f"  {p}" for p in candidates)
    raise UserError(f"no Stanford Cars ({split} split) under {root}; looked at\n{shown}\n{LAYOUTS}")


def are_cars(folder: Path, near: list[Path], split: str) -> bool:
    """Whether a folder has images that are of Stanford Cars by their names or the files beside them."""
    flat, (files, _, classes) = image_files(folder), labelled_folders(folder)
    by_year = [name for name in classes if re.search(r" (19|20)\d\d$", name)]
    numbered = folder.name == f"cars_{split}" and any(re.fullmatch(r"\d{5}", path.stem) for path in flat)
    beside = any(find_file(near, name) for name in (*SIGNS, f"anno_{split}.csv"))
    return bool(flat or files) and (beside or numbered or 2 * len(by_year) > len(classes))


def key(name: str) -> str:
    """A class name to compare by: "Ram C/V" is the folder "Ram C-V", as folder names have no slash."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def find_file(near: list[Path], name: str) -> Path | None:
    """The nearest file of that name, in one of the folders or in a devkit in it."""
    places = [place / kit / name for place in near for kit in ("", "devkit", "car_devkit/devkit")]
    return next((p for p in places if p.is_file()), None)


def read_mat(path: Path | None, variable: str) -> list:
    """The entries of an array in a MATLAB file; none without the file or without scipy."""
    try:
        if path:
            from scipy.io import loadmat

            return list(loadmat(str(path), squeeze_me=True)[variable])
    except ImportError:
        note(f"{path.name} was not read: that takes `pip install scipy`")
    except Exception as error:  # scipy raises almost anything on a file that is no MATLAB file
        note(f"{path} can't be read ({error}) and is left out")
    return []


def labels_by_file(files: list[Path], near: list[Path], split: str) -> list[int]:
    """Official class numbers, less 1, by file name: from anno_*.csv, train_perfect_preds.txt or a .mat."""
    annotations = "cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
    if path := find_file(near, f"anno_{split}.csv"):  # file name, box, class number
        number_of = {Path(row[0]).stem: int(row[-1]) for row in read_csv(path) if row[-1].strip().isdecimal()}
    elif split == "train" and (path := find_file(near, "train_perfect_preds.txt")):  # line i is of image i
        lines = path.read_text(errors="replace").split()
        if not all(line.isdecimal() for line in lines):
            raise UserError(f"{path} should hold one class number a line, and nothing else")
        number_of = {f"{i:05d}": int(k) for i, k in enumerate(lines, start=1)}
    elif rows := read_mat(path := find_file(near, annotations), "annotations"):
        number_of = {Path(str(row["fname"])).stem: int(row["class"]) for row in rows}
    else:
        return []
    if number_of and min(number_of.values()) < 1:
        raise UserError(f"{path} should number the classes from 1 on")
    if unknown := [p for p in files if p.stem not in number_of]:
        raise UserError(f"{unknown[0]} and {len(unknown) - 1} more have no class in {path}: move them away")
    return [number_of[p.stem] - 1 for p in files]
