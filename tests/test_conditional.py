"""ddpm_conditional.py: captions as tokens, dropped conditions, the command line and every error of it."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, error_line, run_in
from PIL import Image

import ddpm
import ddpm_conditional
import utils
from ddpm import Diffusion
from ddpm_conditional import cfg, conditional_loss
from modules import EMA, ConditionalUNet, TextUNet, UNet
from support import launch, samples
from support.errors import UserError
from support.images import image_files
from support.loader import Loader
from support.samples import condition_grid
from support.settings import flag, rows_of
from support.text import END, PAD, Vocabulary, find_label, word_codes

SHAPES = [*TINY, "--dataset", "shapes"]
STEPS = TINY.index("--sample-steps")
CLASSIFIER = [*TINY[:STEPS], *TINY[STEPS + 2 :], "--task", "classifier"]  # which has no use for a sampler


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with four tiny runs: on labels, on captions, unconditional, and a classifier."""
    folder = tmp_path_factory.mktemp("runs")
    run_in(folder, ddpm, *TINY)
    run_in(folder, ddpm_conditional, *TINY)
    run_in(folder, ddpm_conditional, *SHAPES)
    run_in(folder, ddpm_conditional, *CLASSIFIER)
    for name in ("ddpm_conditional_digits", "ddpm_conditional_shapes"):  # as if they had learned something
        state = torch.load(folder / "runs" / name / "ckpt.pt", weights_only=True)
        g = torch.Generator().manual_seed(0)
        for weight in state["ema"].values():
            weight += 0.2 * torch.randn(weight.shape, generator=g)
        torch.save(state, folder / "runs" / name / "ckpt.pt")
    return folder / "runs"


def pixels(path):
    return np.asarray(Image.open(path))


def grid_of(result):
    assert result.code == 0, result.err
    return re.search(r"grid +(\S+)", result.out)[1]


# captions


def test_a_caption_is_its_words_then_end_then_padding():
    vocabulary = Vocabulary.of(["A red circle, on white.", "a circle"])
    assert vocabulary.words == ["a", "circle", "on", "red", "white"] and vocabulary.max_tokens == 6
    number = {word: 2 + i for i, word in enumerate(vocabulary.words)}
    tokens = vocabulary.encode(["a RED circle", "", "white white"])
    assert tokens[0].tolist() == [number["a"], number["red"], number["circle"], END, PAD, PAD]
    assert tokens[1].tolist() == [END] + [PAD] * 5
    assert tokens[2].tolist() == [number["white"]] * 2 + [END] + [PAD] * 3
    assert tokens.max() < 2 + len(vocabulary.words)


def test_unknown_words_and_long_captions_are_told():
    vocabulary = Vocabulary.of(["a green circle on gray"])
    with pytest.raises(UserError, match=r"no word 'gren'; the nearest it knows: green, gray"):
        vocabulary.encode(["a gren circle"])
    with pytest.raises(UserError, match=f"; all: {', '.join(vocabulary.words)}"):  # fewer than a hundred
        vocabulary.encode(["a gren car"])
    many = Vocabulary([f"w{i}" for i in range(100)], 5)
    with pytest.raises(UserError) as error:
        many.encode(["a"])
    assert "; all: " not in str(error.value)
    with pytest.raises(UserError, match=r"no word 'zzz'; the nearest it knows: \w+"):
        vocabulary.encode(["zzz"])
    vocabulary.encode(["a a a a a"])
    with pytest.raises(UserError, match="has 6 words; the model reads at most 5"):
        vocabulary.encode(["a a a a a a"])


def test_labels_by_name_and_number():
    names = ["Audi TT Coupe 2012", "BMW M3", "7", "10"]
    assert [find_label(text, names) for text in ("bmw m3", "0", "7", "10")] == [1, 0, 2, 3]
    assert [find_label(text, ["A", "a", "B"]) for text in ("A", "a", "b")] == [0, 1, 2]
    for text in ("4", "-1"):
        with pytest.raises(UserError, match=f"label {text} is out of range: the model's labels are 0 to 3"):
            find_label(text, names)
    with pytest.raises(
        UserError, match=r"'Audi TT' is no class of the model; the nearest: Audi TT Coupe 2012"
    ):
        find_label("Audi TT", names)


def test_a_caption_as_long_as_a_page_is_told():
    with pytest.raises(UserError, match=r"the caption 'w w w .* has 128 words: shorten it to 127"):
        Vocabulary.of(["short", "w " * 128])


# training


@pytest.mark.parametrize("y", [torch.arange(1000) % 10, torch.tensor([[5, 6, END, PAD]]).repeat(1000, 1)])
def test_conditions_are_dropped_per_sample(y):
    """Each image of one batch has a coin of its own; what is kept is kept whole."""
    seen = []

    def net(x, t, y):
        seen.append(y)
        return x

    def null(y):
        return torch.full_like(y, 10) if y.ndim == 1 else torch.tensor([END, PAD, PAD, PAD]).expand_as(y)

    g = torch.Generator().manual_seed(0)
    for p_uncond in (0.0, 0.1, 1.0):
        conditional_loss(Diffusion(), null, p_uncond, net, torch.zeros(1000, 1, 2, 2), y, g)
        rows = seen[-1].reshape(1000, -1)
        dropped = (rows == null(y).reshape(1000, -1)).all(1)
        assert torch.equal(rows[~dropped], y.reshape(1000, -1)[~dropped])
        assert dropped.float().mean().item() == pytest.approx(p_uncond, abs=0.03)  # 3 standard deviations
    assert 0 < (seen[1].reshape(1000, -1)[:50] != y.reshape(1000, -1)[:50]).any(1).sum() < 25


def test_a_label_run(runs):
    state = torch.load(runs / "ddpm_conditional_digits/ckpt.pt", weights_only=True)
    assert state["kind"] == "ddpm_conditional" and state["class_names"] == [str(k) for k in range(10)]
    assert state["ema"]["label_embedding.weight"].shape == (11, 32)
    grid = pixels(runs / "ddpm_conditional_digits/samples/epoch_0002.png").min(2)
    left = grid.shape[1] - 6 * 66 - 2  # six images of 64 pixels and their gaps
    rows = [(grid[-660 + 66 * k :][:60, : left + 2] < 100).sum() for k in range(10)]
    assert min(rows) > 5  # ten classes as rows, and a name beside each


def test_a_text_run_keeps_its_vocabulary(runs):
    state = torch.load(runs / "ddpm_conditional_shapes/ckpt.pt", weights_only=True)
    data = utils.get_data("shapes", image_size=8, limit=48, cache_dir=runs.parent / "data/cache")
    assert set(state["vocabulary"]["words"]) == {
        word for caption in data.captions for word in caption.split()
    }


def test_a_text_run_from_before_words_were_mixed_goes_on(conditional):
    assert conditional(*SHAPES, "--text-kernel", 0, "--no-adagn", "--no-places").code == 0
    run = Path("runs/ddpm_conditional_shapes")
    state = torch.load(run / "ckpt.pt", weights_only=True)
    for name in ("text_kernel", "adagn", "places"):
        del state["config"][name]
    torch.save(state, run / "ckpt.pt")
    assert conditional("--sample", 1, "--checkpoint", run, "--sample-steps", 1).code == 0
    assert conditional("--resume", run, "--epochs", 3).code == 0
    assert torch.load(run / "ckpt.pt", weights_only=True)["config"]["text_kernel"] == 0


def test_classifier_logs_accuracy_per_noise_level(runs):
    with open(runs / "classifier_digits/accuracy.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["t"]) for row in rows if row["epoch"] == "2"] == [1, *range(2, 21, 2)]
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert (runs / "classifier_digits/samples/epoch_0002.png").is_file()


def test_classifier_is_measured_on_images_it_never_saw(conditional, monkeypatch):
    kept_back = {}
    measure = ddpm_conditional.measure_accuracy

    def spy_on_measure(diffusion, net, x_0, *more):
        kept_back["images"] = x_0
        return measure(diffusion, net, x_0, *more)

    class SpyLoader(Loader):
        def __init__(self, images, *more):
            kept_back["trained"] = images.float() / 127.5 - 1
            super().__init__(images, *more)

    monkeypatch.setattr(ddpm_conditional, "measure_accuracy", spy_on_measure)
    monkeypatch.setattr(launch, "Loader", SpyLoader)
    assert conditional(*CLASSIFIER).code == 0
    trained, held_out = (kept_back[name].flatten(1) for name in ("trained", "images"))
    assert (len(trained), len(held_out)) == (43, 5)
    assert (torch.cdist(held_out, trained) > 0).all()


def test_classifier_learns(conditional):
    """Two kinds of pictures that anyone can tell apart: at low noise so can it, at t = T nobody can."""
    folder = "two"
    rng = np.random.default_rng(0)
    for i in range(60):
        kind = i % 2
        picture = rng.integers(0, 60, (8, 8)) + 180 * kind
        path = Path(folder, f"kind {kind}", f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(path)
    data = ["--dataset", "folder", "--data-root", folder, "--channels", 1, "--limit", 60]
    assert conditional(*CLASSIFIER, *data, "--epochs", 30, "--lr", 0.01).code == 0
    with open("runs/classifier_folder/accuracy.csv", newline="") as file:
        last = {int(row["t"]): float(row["accuracy"]) for row in csv.DictReader(file) if row["epoch"] == "30"}
    assert last[1] == 1.0 and last[2] == 1.0 and last[20] < 1.0


def test_init_starts_from_an_unconditional_run(conditional, runs):
    """Width, schedule and so on come with the weights, and before the first step it is the same network."""
    flags = "--limit 48 --batch-size 16 --epochs 1 --sample-steps 2 --device cpu --lr 1e-12 --weight-decay 0"
    result = conditional(*flags.split(), "--init", runs / "ddpm_digits")
    assert result.code == 0 and "init" in result.out, result.err
    before = torch.load(runs / "ddpm_digits/ckpt.pt", weights_only=True)
    after = torch.load("runs/ddpm_conditional_digits/ckpt.pt", weights_only=True)
    for key in ("width", "multipliers", "noise_steps", "schedule", "prediction", "image_size"):
        assert after["config"][key] == before["config"][key]
    for name, weight in before["ema"].items():
        assert torch.allclose(after["net"][name], weight, atol=1e-8)
    net = ConditionalUNet(10, 1, 8, (1, 2), 1, (1,))
    net.load_state_dict(after["net"])
    unet = UNet(1, 8, (1, 2), 1, (1,))
    unet.load_state_dict(before["ema"])
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 9, 20])
    assert torch.allclose(net(x, t, torch.tensor([0, 5, 10])), unet(x, t), atol=1e-5)


def test_each_class_begins_with_a_code_and_the_null_label_with_none(conditional):
    flags = "--limit 16 --epochs 1 --sample-steps 2 --device cpu --lr 1e-12 --weight-decay 0"
    assert conditional(*flags.split()).code == 0
    state = torch.load("runs/ddpm_conditional_digits/ckpt.pt", weights_only=True)
    rows = state["net"]["label_embedding.weight"]
    assert rows[-1].abs().max() < 1e-8 and torch.linalg.matrix_rank(rows) == 10
    assert 0.9 < rows[:-1].std() < 1.1  # N(0, 1)


def test_classes_begin_with_the_codes_of_the_words_that_their_names_share():
    torch.manual_seed(0)
    names = [
        "Audi Coupe 2012",
        "Audi Sedan 2012",
        "BMW Coupe 2012",
        "BMW Sedan 2012",
        "audi  coupe, 2012",
        "?",
    ]
    codes = word_codes(names, 5000)
    # a name is Audi or BMW, plus Coupe or Sedan, plus 2012
    assert torch.allclose(codes[0] - codes[1], codes[2] - codes[3], atol=1e-5)
    assert torch.equal(codes[0], codes[4]) and not codes[5].any()
    assert torch.allclose(codes[:4].std(1), torch.ones(4), atol=0.05)
    shared = F.cosine_similarity(codes[[0, 0]], codes[[1, 3]])  # two words of three, and one
    assert torch.allclose(shared, torch.tensor([2 / 3, 1 / 3]), atol=0.05)


def test_init_serves_captions_too(conditional, runs):
    result = conditional(
        *"--dataset shapes --limit 32 --epochs 1 --sample-steps 2 --device cpu --init".split(),
        runs / "ddpm_digits",
    )
    assert result.code == 0, result.err
    config = torch.load("runs/ddpm_conditional_shapes/ckpt.pt", weights_only=True)["config"]
    assert (config["condition"], config["channels"], config["width"]) == ("text", 1, 8)


def test_the_loss_of_the_data_set_gives_way_to_that_of_init(conditional, runs):
    """The run predicts v; P2, the loss of shapes, is not used, so a flag of it has no effect."""
    result = conditional("--dataset", "shapes", "--init", runs / "ddpm_digits", "--p2-k", 2)
    assert "--p2-k belongs to --weighting p2: add that, or leave it out" in error_line(result)


def test_dual_as_init_and_in_latents(conditional, cli):
    few = "--dataset shapes --limit 32 --epochs 1 --batch-size 16 --device cpu".split()
    small = "--width 8 --multipliers 1 2 --blocks 1 --sample-steps 2".split()
    assert cli(*few, *small).code == 0
    assert conditional(*few, "--sample-steps", 2, "--init", "runs/ddpm_shapes").code == 0
    config = torch.load("runs/ddpm_conditional_shapes/ckpt.pt", weights_only=True)["config"]
    assert (config["prediction"], config["weighting"], config["width"]) == ("dual", "p2", 8)
    assert cli(*few, "--task", "autoencoder").code == 0
    assert cli(*few, *small, "--latent", "runs/autoencoder_shapes", "--name", "latent").code == 0
    weights = torch.load("runs/latent/ckpt.pt", weights_only=True)["net"]
    assert len(weights["conv_out.weight"]) == 8  # an eps and an x_0 of four channels
    assert cli("--sample", 2, "--checkpoint", "runs/latent", "--sample-steps", 2).code == 0


@pytest.mark.parametrize("flags", [TINY, CLASSIFIER, SHAPES])
def test_interrupted_and_resumed_is_the_same_bit_for_bit(conditional, monkeypatch, flags):
    assert conditional(*flags, "--name", "whole").code == 0
    real, calls = EMA.update, []

    def interrupted(self, net, step):
        calls.append(step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, net, step)

    with monkeypatch.context() as patch:
        patch.setattr(EMA, "update", interrupted)
        assert conditional(*flags, "--name", "parts").code == 130
    assert conditional("--resume", "runs/parts").code == 0
    whole, parts = (torch.load(f"runs/{name}/ckpt.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(whole["ema"][name], parts["ema"][name]) for name in whole["ema"])


def test_resume_with_other_captions_is_told(conditional):
    Path("pictures").mkdir()
    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(f"pictures/{i}.png")

    def caption(words):
        lines = [json.dumps({"file_name": f"{i}.png", "text": word}) for i, word in enumerate(words)]
        Path("pictures/metadata.jsonl").write_text("\n".join(lines))

    data = ["--dataset", "folder", "--data-root", "pictures"]
    caption(["a", "b", "c", "d"])
    assert conditional(*TINY, *data).code == 0
    caption(["a", "b", "c", "e"])  # the same tokens, but another word
    assert "the data set has changed" in error_line(
        conditional("--resume", "runs/ddpm_conditional_folder", "--epochs", 3)
    )


def test_real_captions_train(conditional, data_root):
    emoji = ["--dataset", "folder", "--data-root", data_root / "emoji", "--image-size", 8]
    cars = ["--dataset", "stanfordcars", "--data-root", data_root, "--image-size", 8]
    assert conditional(*TINY, *emoji, "--name", "emoji").code == 0
    assert conditional(*TINY, *cars, "--name", "classes").code == 0
    scipy_there = pytest.importorskip("scipy")
    assert scipy_there and conditional(*TINY, *cars, "--condition", "text", "--name", "cars").code == 0
    words = torch.load("runs/cars/ckpt.pt", weights_only=True)["vocabulary"]["words"]
    assert {"a", "photo", "of"} < set(words)
    for name in ("classes", "cars"):
        config = torch.load(f"runs/{name}/ckpt.pt", weights_only=True)["config"]
        assert (config["prediction"], config["weighting"], config["p2_k"]) == ("x_0", "p2", 0.1)
    assert conditional(*TINY, *cars, "--p2-k", 2, "--name", "k").code == 0
    config = torch.load("runs/k/ckpt.pt", weights_only=True)["config"]
    assert (config["prediction"], config["weighting"], config["p2_k"]) == ("x_0", "p2", 2.0)


@pytest.mark.parametrize(
    "flags, loss",
    [
        ([], ("dual", "p2", 1.0)),
        (["--p2-k", 2], ("dual", "p2", 2.0)),
        (["--prediction", "eps"], ("eps", None, 1.0)),
        (["--weighting", "min_snr"], ("v", "min_snr", 1.0)),
        (["--weighting", "p2"], ("v", "p2", 1.0)),
    ],
)
def test_a_loss_that_was_typed_is_not_mixed_with_that_of_the_data_set(conditional, flags, loss):
    assert conditional(*SHAPES, "--epochs", 1, *flags).code == 0
    config = torch.load("runs/ddpm_conditional_shapes/ckpt.pt", weights_only=True)["config"]
    assert (config["prediction"], config["weighting"], config["p2_k"]) == loss


# sampling


@pytest.mark.parametrize("sampler", ddpm.SAMPLERS)
@pytest.mark.parametrize("guidance", ["cfg", "classifier"])
def test_every_sampler_with_every_guidance(conditional, runs, sampler, guidance):
    flags = ["--classifier", runs / "classifier_digits"] if guidance == "classifier" else []
    flags += ["--guidance", guidance, "--sampler", sampler, "--sample-steps", 4, "--labels", "0,3,7"]
    result = conditional(
        "--sample", 6, "--checkpoint", runs / "ddpm_conditional_digits", *flags, "--out", "o"
    )
    assert Image.open(grid_of(result)).height > 3 * 64
    lines = [json.loads(line) for line in open("o/metadata.jsonl")]
    assert [line["text"] for line in lines] == ["0", "3", "7"] * 2
    assert [p.name for p in image_files(Path("o"))] == [line["file_name"] for line in lines]


def test_classifier_guidance_of_an_unconditional_run(conditional, runs):
    flags = ["--guidance", "classifier", "--classifier", runs / "classifier_digits", "--sample-steps", 3]
    run = ["--sample", 2, "--checkpoint", runs / "ddpm_digits", "--labels", "1,2"]
    grid_of(conditional(*run, *flags, "--out", "a", "--guidance-scale", 0))
    grid_of(conditional(*run, *flags, "--out", "b", "--guidance-scale", 20))
    assert not np.array_equal(pixels("a/00000.png"), pixels("b/00000.png"))


def test_prompts(conditional, runs):
    words = torch.load(runs / "ddpm_conditional_shapes/ckpt.pt", weights_only=True)["vocabulary"]["words"]
    assert {"a", "red", "blue", "circle", "square"} <= set(words)
    run = ["--checkpoint", runs / "ddpm_conditional_shapes", "--sample-steps", 2]
    result = conditional("--sample", 4, *run, "--prompt", "a red circle", "A blue square.", "--out", "o")
    assert Image.open(grid_of(result)).height > 2 * 64
    lines = [json.loads(line) for line in open("o/metadata.jsonl")]
    assert [line["text"] for line in lines] == ["a red circle", "A blue square."] * 2
    grid_of(conditional("--sample", 4, *run, "--prompt", "a red circle", "--prompt", ""))
    grid = grid_of(conditional("--sample", 4, *run))  # the previews' captions,
    assert "cfg_ddpm_2_seed0" in grid  # and their sampler, which for shapes is ddpm
    assert "cfg_ddim_2_seed0" in grid_of(conditional("--sample", 4, *run, "--sampler", "ddim"))


def test_what_is_drawn_depends_on_the_condition_seed_and_number_alone(conditional, runs):
    run = ["--checkpoint", runs / "ddpm_conditional_digits", "--sampler", "ddpm", "--sample-steps", 5]
    asked = {
        "a": ["--sample", 6, "--labels", "3,7"],
        "b": ["--sample", 6, "--labels", "3,7", "--batch-size", 4],
        "c": ["--sample", 3, "--batches", 2, "--labels", "3"],
        "d": ["--sample", 6, "--labels", "3,7", "--guidance-scale", "0"],
        "e": ["--sample", 6, "--labels", "1", "--guidance-scale", "0"],
    }
    for out, flags in asked.items():
        assert conditional(*run, *flags, "--out", out).code == 0
    of = {out: np.stack([pixels(p) for p in image_files(Path(out))]).astype(int) for out in asked}
    assert np.abs(of["a"] - of["b"]).max() <= 1
    assert (
        np.abs(of["a"] - of["c"])[::2].max() <= 1
    )  # the images 0, 2, 4 are threes in both, from equal noise
    assert np.abs(of["d"] - of["e"]).max() <= 1  # scale 0 does not look at the label


def test_scales_are_columns_from_the_same_noise(conditional, runs):
    run = [
        "--sample",
        2,
        "--checkpoint",
        runs / "ddpm_conditional_digits",
        "--labels",
        "4",
        "--sample-steps",
        3,
    ]
    one = Image.open(grid_of(conditional(*run)))
    three = Image.open(grid_of(conditional(*run, "--guidance-scale", "1,3,7", "--out", "o")))
    assert three.width > 2 * one.width and len(image_files(Path("o"))) == 6
    grid_of(conditional(*run, "--guidance-scale", 3, "--out", "p"))
    for i in range(2):
        assert np.array_equal(pixels(f"o/0000{i}_scale3.png"), pixels(f"p/0000{i}.png"))


def test_samples_have_the_guidance_scale_of_the_previews(conditional):
    assert conditional("--limit", 16, "--epochs", 1, "--sample-steps", 2, "--guidance-scale", 2).code == 0
    few = "--sample 2 --checkpoint runs/ddpm_conditional_digits --labels 4 --sample-steps 2".split()
    for name, typed, scale in (("o", [], 2), ("p", ["--guidance-scale", 5], 5)):
        assert conditional(*few, *typed, "--out", name).code == 0
        lines = [json.loads(line) for line in Path(name, "metadata.jsonl").read_text().splitlines()]
        assert [line["guidance_scale"] for line in lines] == [scale, scale]


def test_batches_are_grids_of_their_own(conditional, runs):
    run = ["--checkpoint", runs / "ddpm_conditional_digits", "--labels", "4", "--sample-steps", 3]
    result = conditional("--sample", 2, "--batches", 3, *run, "--out", "o", "--animate")
    grids = re.findall(r"grid +(\S+)", result.out)
    assert len(set(grids)) == 3 and len(re.findall(r"gif +(\S+)", result.out)) == 3
    files = image_files(Path("o"))
    assert [p.name for p in files] == [f"{i:05d}.png" for i in range(6)]
    assert not np.array_equal(pixels(files[0]), pixels(files[2]))


def test_a_grid_of_conditions_and_scales():
    """Rows are conditions, columns are scales and then images; what is missing stays white."""
    x = [torch.full((5, 1, 64, 64), -1.0), torch.full((5, 1, 64, 64), 0.0)]
    for of_scale in x:
        of_scale[1::2] += 0.5  # the second condition
    grid = np.asarray(condition_grid(x, ["first", "second"], "", ["scale 1", "scale 3"]).convert("L"))

    def block(value):
        """Top, left, and number of pixels, of all that has the value of one condition at one scale."""
        here = np.isclose(grid, value, atol=1)
        here[:, here.sum(0) < 60] = False  # not the lines of letters
        here[here.sum(1) < 60] = False
        return np.flatnonzero(here.any(1)).min(), np.flatnonzero(here.any(0)).min(), here.sum() / 128**2

    first, first_3, second, second_3 = (block(value) for value in (0, 128, 64, 191))
    assert [round(pixels) for *_, pixels in (first, first_3, second, second_3)] == [3, 3, 2, 2]
    assert first[0] == first_3[0] < second[0] == second_3[0]
    assert first[1] == second[1] < first_3[1] == second_3[1]


@pytest.mark.parametrize("each,scales,across", [(8, 1, 8), (10, 1, 10), (20, 1, 10), (10, 2, 5), (3, 9, 1)])
def test_rows_of_a_condition_are_even_and_at_most_16_images_wide(each, scales, across):
    x = [torch.zeros(2 * each, 1, 96, 96)] * scales
    grid = condition_grid(x, ["a", "b"], "", [""] * scales)
    assert grid.width // 98 == across * scales and np.all(np.asarray(grid)[-20:-4, -20:-4] == 128)


@pytest.mark.parametrize(
    "flags",
    [
        "--guidance-interval 5 15",
        "--guidance-rescale 0.7",
        "--dynamic-threshold 0.9 --guidance-scale 8",
        "--guidance-interval 1 9 --guidance-rescale 0.5 --dynamic-threshold 0.995",
    ],
)
def test_every_guidance_option_changes_the_images(conditional, runs, flags):
    run = ["--sample", 2, "--checkpoint", runs / "ddpm_conditional_digits", "--sample-steps", 10, "--no-clip"]
    scale = ["--guidance-scale", 8] if "scale" in flags else []
    grid_of(conditional(*run, *scale, "--out", "plain"))
    grid_of(conditional(*run, *flags.split(), "--out", "changed"))
    assert not np.array_equal(pixels("plain/00000.png"), pixels("changed/00000.png"))


def test_previews_take_guidance(conditional):
    lr = ["--lr", 0.05]  # so that in six steps labels have come to mean something
    for name, flags in (
        ("plain", []),
        ("scale", ["--guidance-scale", 30]),
        ("cut", ["--dynamic-threshold", 1]),
    ):
        assert conditional(*TINY, *lr, "--name", name, *flags).code == 0
    below_caption = slice(-10 * 66, None)
    plain, scale, cut = (
        pixels(f"runs/{name}/samples/epoch_0002.png")[below_caption] for name in ("plain", "scale", "cut")
    )
    assert not np.array_equal(plain, scale) and not np.array_equal(plain, cut)


@pytest.mark.parametrize("condition", ["label", "text"])
def test_cfg_of_a_network_equals_two_passes(condition):
    torch.manual_seed(0)
    unet = dict(channels=1, width=16, multipliers=(1, 2), blocks=1, attention=(1,))
    if condition == "label":
        net, y = ConditionalUNet(3, **unet).eval(), torch.tensor([0, 1, 2, 0, 1])
    else:
        net = TextUNet(vocabulary=6, max_tokens=3, text_width=32, **unet).eval()
        y = torch.tensor([[2, 3, END], [4, END, PAD], [5, END, PAD], [END, PAD, PAD], [3, 2, END]])
    for p in net.parameters():
        if not p.any():  # what starts at zero
            p.data.normal_(0, 0.1)
    diffusion = Diffusion(prediction="v")
    x, t = torch.randn(5, 1, 16, 16), torch.tensor([1, 10, 300, 700, 1000])
    with torch.no_grad():
        eps_u, eps_c = (diffusion.denoiser(net, of)(x, t) for of in (net.null(y), y))
        assert torch.allclose(cfg(diffusion, net, y, 3.0)(x, t), eps_u + 3 * (eps_c - eps_u), atol=1e-5)
        assert torch.equal(cfg(diffusion, net, y, 1.0)(x, t), eps_c)
        assert torch.equal(cfg(diffusion, net, y, 0.0)(x, t), eps_u)


# errors


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--p-uncond 1.5", "expected a number of at least 0, at most 1"),
        ("--p-uncond -0.1", "expected a number of at least 0, at most 1"),
        ("--condition text", "data set digits has no captions: train it with --condition label"),
        (
            "--dataset shapes --limit 4 --condition label",
            "shapes has no labels: train it with --condition text",
        ),
        ("--dataset shapes --limit 4 --task classifier", "data set shapes has no labels to classify by"),
        ("--task classifier --limit 1", "a classifier takes two images or more"),
        ("--task classifier --p-uncond 0.2", "--p-uncond belongs to --task diffusion"),
        ("--task classifier --prediction eps", "--prediction belongs to --task diffusion"),
        ("--task classifier --guidance-scale 2", "--guidance-scale belongs to --task diffusion"),
        ("--guidance-scale 1,3", "previews are drawn with one --guidance-scale"),
        ("--guidance-scale 1,x", "expected a number of at least 0"),
        ("--guidance-scale -1", "expected a number of at least 0"),
        ("--guidance-scale ,", "expected values with commas"),
        ("--guidance-scale 3,3.0", "lists the same scale twice"),
        ("--guidance-interval 9 3", "LOW must not be above HIGH"),
        ("--guidance-interval 0 3", "expected a whole number of at least 1"),
        ("--guidance-interval 1 2000", "t runs from 1 to 1000"),
        ("--guidance-rescale 2", "at most 1"),
        ("--dynamic-threshold 0", "above 0"),
        ("--labels 1", "--labels goes with --sample"),
        ("--prompt x", "--prompt goes with --sample"),
        ("--batches 2", "--batches goes with --sample"),
        ("--sample -3 --checkpoint x", "expected a whole number of at least 1"),
        ("--sample 0 --checkpoint x", "expected a whole number of at least 1"),
        ("--sample 3 --checkpoint x --batches 0", "expected a whole number of at least 1"),
        ("--sample 3 --checkpoint nowhere", "no checkpoint nowhere"),
        ("--sample 3 --checkpoint x --guidance classifier", "--guidance classifier needs --classifier RUN"),
        ("--sample 3 --checkpoint x --classifier y", "--classifier belongs to --guidance classifier"),
        ("--init nowhere", "no checkpoint nowhere"),
        ("--init x --resume y", "leave one out"),
        ("--task segmentation", "invalid choice"),
    ],
)
def test_errors_are_one_line(conditional, tmp_path, flags, told):
    assert told in error_line(conditional(*flags.split()))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "run, flags, told",
    [
        ("ddpm_conditional_digits", "--labels 10", "label 10 is out of range: the model's labels are 0 to 9"),
        ("ddpm_conditional_digits", "--labels 1,-1", "label -1 is out of range"),
        ("ddpm_conditional_digits", "--labels 1,--3", "'--3' is no class of the model"),
        ("ddpm_conditional_digits", "--labels seven", "'seven' is no class of the model; the nearest: "),
        ("ddpm_conditional_digits", "--prompt seven", "trained on labels: ask it with --labels"),
        ("ddpm_conditional_shapes", "--labels 1", "trained on captions: ask it with --prompt"),
        ("ddpm_conditional_shapes", "--prompt redd", "no word 'redd'; the nearest it knows: red"),
        ("ddpm_conditional_shapes", "--guidance classifier --classifier C", "trained on captions: use cfg"),
        ("ddpm_digits", "", "of kind 'ddpm'; a 'ddpm_conditional' one is needed"),
        ("classifier_digits", "", "of kind 'classifier'; a 'ddpm_conditional' one is needed"),
        ("ddpm_conditional_digits", "--p-uncond 0.5", "--p-uncond comes from the checkpoint"),
        ("ddpm_conditional_digits", "--guidance-interval 1 21", "t runs from 1 to 20"),
        ("ddpm_conditional_digits", "--guidance classifier --classifier U", "a 'classifier' one is needed"),
    ],
)
def test_errors_of_sampling(conditional, runs, run, flags, told):
    flags = (
        flags.replace(" C", f" {runs / 'classifier_digits'}")
        .replace(" U", f" {runs / 'ddpm_digits'}")
        .split()
    )
    assert told in error_line(
        conditional("--sample", 2, "--checkpoint", runs / run, "--sample-steps", 2, *flags)
    )


def test_a_classifier_that_does_not_fit_the_model_is_told(conditional, runs, tmp_path):
    state = torch.load(runs / "classifier_digits/ckpt.pt", weights_only=True)
    for setting, value in (
        ("dataset", "mnist"),
        ("image_size", 16),
        ("schedule", "linear"),
        ("noise_steps", 30),
    ):
        torch.save({**state, "config": {**state["config"], setting: value}}, "other.pt")
        flags = ["--guidance", "classifier", "--classifier", "other.pt", "--sample-steps", 2]
        line = error_line(
            conditional("--sample", 2, "--checkpoint", runs / "ddpm_conditional_digits", *flags)
        )
        assert f"was trained with {flag(setting)} {value}, the model with" in line
    torch.save({**state, "class_names": [f"{k}'" for k in range(10)]}, "other.pt")
    line = error_line(conditional("--sample", 2, "--checkpoint", runs / "ddpm_conditional_digits", *flags))
    assert "knows other classes" in line


def test_data_without_labels_or_captions(conditional, tmp_path):
    Image.new("L", (8, 8), 60).save(tmp_path / "flat.png")
    flags = ["--dataset", "folder", "--data-root", "."]
    for condition in ("label", "text"):
        line = error_line(conditional(*flags, "--condition", condition))
        assert "data set folder has no" in line and "choose another --dataset" in line
    assert "data set folder has no" in error_line(conditional(*flags))


def test_flags_that_mean_nothing_to_a_classifier_are_told_on_resume_too(conditional, runs):
    run = runs / "classifier_digits"
    assert "--sampler belongs to --task diffusion" in error_line(
        conditional("--resume", run, "--epochs", 3, "--sampler", "pndm")
    )


def test_guidance_without_dropped_conditions_is_a_note(conditional):
    assert "nothing unconditional is learned" in conditional(*TINY, "--p-uncond", 0).err
    assert "scale 1" in caption_used(conditional, "--checkpoint", "runs/ddpm_conditional_digits")
    assert "nothing conditional is learned" in conditional(*TINY, "--p-uncond", 1).err


def caption_used(conditional, *flags):
    """The caption of the grid that sampling writes."""
    captions = []
    with pytest.MonkeyPatch.context() as patch:
        real = samples.make_grid
        patch.setattr(
            samples, "make_grid", lambda x, caption, *more: captions.append(caption) or real(x, caption)
        )
        grid_of(conditional("--sample", 2, "--sample-steps", 2, *flags))
    return captions[0]


def test_more_images_than_a_grid_shows_is_a_note(conditional, runs, monkeypatch):
    monkeypatch.setattr(samples, "GRID_LIMIT", 6)
    run = ["--sample", 4, "--checkpoint", runs / "ddpm_conditional_digits", "--sample-steps", 2]
    result = conditional(*run, "--guidance-scale", "1,2", "--out", "o")
    assert "a grid shows the first 3 images of each scale" in result.err
    assert len(image_files(Path("o"))) == 8


def test_init_that_contradicts_is_told(conditional, runs):
    line = error_line(conditional("--init", runs / "ddpm_digits", "--width", 16))
    assert "--width 8, not 16" in line
    assert "a 'ddpm' one is needed" in error_line(conditional("--init", runs / "classifier_digits"))


def test_out_with_captions_of_another_set_is_not_overwritten(conditional, runs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/metadata.jsonl").write_text("mine")
    run = ["--sample", 2, "--checkpoint", runs / "ddpm_conditional_digits", "--sample-steps", 2]
    assert "mine already holds" in error_line(conditional(*run, "--out", "mine"))
    assert (tmp_path / "mine/metadata.jsonl").read_text() == "mine"


def test_help_names_every_flag(conditional):
    text = " ".join(conditional("--help").out.split())
    for group in ddpm_conditional.GROUPS.values():
        for name, row in rows_of(group).items():
            assert row["help"] and re.search(rf"{flag(name)}[ ,]", text)
