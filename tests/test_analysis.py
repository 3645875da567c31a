"""analysis.py: its measures against closed forms, every study on tiny runs, every error a user can cause."""

import csv
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, error_line, run_in
from PIL import Image

import analysis
import ddpm
import ddpm_conditional
import edit
import utils
from ddpm import Diffusion, ddim_stride
from support import charts, measures
from support.errors import UserError
from support.generators import seeded_generator as generator
from support.images import image_files, to_uint8, to_x_0
from support.settings import Parser, add_settings


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def images(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed)) * 2 - 1


@pytest.fixture
def drawn():
    """For tests that look at charts."""


@pytest.fixture(autouse=True)
def quick_charts(request, monkeypatch):
    """An empty chart for the other tests: matplotlib takes a second or more for one."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("support.charts.draw_chart", lambda chart, width: Image.new("RGB", (width, 200)))


# charts


def test_names_in_a_chart_cover_neither_curves_nor_each_other():
    ab = np.linspace(0.001, 0.999, 50)
    names = ("one step", "ddim, 50 steps", "pndm, 50 steps", "ddpm, 1000 steps")
    curves = {name: (ab / (1 - ab), ab ** (i + 1)) for i, name in enumerate(names)}
    panel = charts.Panel("low kept", "SNR", "share", curves, log="x", bands=analysis.STAGES)
    figure = charts.new_figure(4.4, 3.5, layout="constrained")
    charts.draw_panel(ax := figure.subplots(), panel)
    figure.draw_without_rendering()
    title = ax.title.get_window_extent()
    title.y0 = (title.y0 + title.y1) / 2  # its second line is empty
    words = (*ax.texts, ax.xaxis.label, *ax.get_legend().get_texts())
    boxes = [title, *(word.get_window_extent() for word in words)]
    assert [text.get_text() for text in ax.texts] == list(analysis.STAGES)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in (*boxes[:i], ax.get_window_extent()))
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1


# weights and schedules


@pytest.mark.parametrize("schedule", utils.SCHEDULES)
def test_snr_is_its_formula(schedule):
    diffusion = Diffusion(200, schedule)
    betas = utils.SCHEDULES[schedule](200)
    alpha_bar = (1 - betas).cumprod(0)
    torch.testing.assert_close(diffusion.snr[1:], alpha_bar / (1 - alpha_bar), rtol=1e-12, atol=0)
    assert diffusion.snr[0] == math.inf


@pytest.mark.parametrize("schedule", utils.SCHEDULES)
def test_ho_weights_are_their_formula_and_undo_the_vlb(schedule):
    betas = utils.SCHEDULES[schedule](1000)
    alpha_bar = (1 - betas).cumprod(0)
    found = analysis.ho_weights(Diffusion(1000, schedule))
    torch.testing.assert_close(found, (1 - betas) * (1 - alpha_bar) / betas, rtol=1e-9, atol=0)
    # DDPM, eq. 12 with sigma^2 = beta: the VLB's weight of the error of eps, times 2; lambda makes it 1
    vlb = betas**2 / (betas * (1 - betas) * (1 - alpha_bar))
    torch.testing.assert_close(found * vlb, torch.ones_like(vlb), rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_continuous_weight_is_within_5_percent(schedule):
    diffusion = Diffusion(1000, schedule)
    ratio = analysis.continuous_weights(diffusion) / analysis.ho_weights(diffusion)  # of t = 1, 2, ...
    assert (ratio[50:] - 1).abs().max() < 0.05  # t > 50
    assert (ratio[:3] - 1).abs().max() > 0.05  # early on a step is no small one


def test_the_continuous_weight_is_the_derivative_of_a_smooth_snr():
    """Of alpha_bar = 1 - t / T (jsd): SNR = T / t - 1, SNR' = -T / t^2, -SNR / SNR' = t (T - t) / T."""
    T, t = 1000, torch.arange(100, 900, dtype=torch.float64)
    found = analysis.continuous_weights(Diffusion(T, "jsd"))[99:899]
    torch.testing.assert_close(found, t * (T - t) / T, rtol=0.02, atol=0)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_schedules_table(analyse, tmp_path):
    assert analyse("schedules", "--schedules", "linear,cosine", "--noise-steps", 100).code == 0
    rows = {row["schedule"]: row for row in rows_of(tmp_path / "runs/analysis/schedules.csv")}
    assert list(rows) == ["linear", "cosine"]
    for name, row in rows.items():
        snr = Diffusion(100, name).snr[1:]
        assert int(row["steps with SNR > 1"]) == (snr > 1).sum()
        assert int(row["steps with SNR > 0.01"]) == (snr > 0.01).sum()
        t = int(row["half the structure gone at t"])
        alpha_bar = Diffusion(100, name).alpha_bar
        assert alpha_bar[t - 1].sqrt() > 0.5 >= alpha_bar[t].sqrt()
        assert float(row["alpha_bar_T"]) == pytest.approx(alpha_bar[100].item(), rel=1e-4)
    points = rows_of(tmp_path / "runs/analysis/schedules_curves.csv")
    assert len(points) == 3 * 2 * 100
    snr = [float(p["y"]) for p in points if (p["chart"], p["curve"]) == ("SNR", "cosine")]
    np.testing.assert_allclose(snr, Diffusion(100, "cosine").snr[1:], rtol=1e-4)


def test_weights_table(analyse, tmp_path):
    assert analyse("weights", "--noise-steps", 200, "--k", 2).code == 0
    rows = rows_of(tmp_path / "runs/analysis/weights.csv")
    shares = {
        (r["schedule"], r["weight of"], r["weighting"]): [
            float(r[f"share of {stage}"]) for stage in analysis.STAGES
        ]
        for r in rows
    }
    np.testing.assert_allclose([sum(three) for three in shares.values()], 1, atol=1e-4)
    # as a weight of eps, L_simple (gamma = 0) counts steps: its shares are those of the steps
    snr = Diffusion(200, "linear").snr[1:]
    steps = [
        (snr < 0.01).float().mean(),
        ((snr >= 0.01) & (snr < 1)).float().mean(),
        (snr >= 1).float().mean(),
    ]
    np.testing.assert_allclose(shares["linear", "error of eps", "P2, gamma 0"], steps, atol=1e-4)
    clean_up = [shares["cosine", "VLB's terms", f"P2, gamma {g}"][2] for g in ("0", "0.5", "1")]
    assert clean_up[0] > clean_up[1] > clean_up[2]  # P2 takes weight from the clean-up
    points = rows_of(tmp_path / "runs/analysis/weights_curves.csv")
    curve = [
        (float(p["x"]), float(p["y"]))
        for p in points
        if (p["chart"], p["curve"]) == ("linear: weight of the VLB's terms", "P2, gamma 0.5")
    ]
    ho = analysis.ho_weights(Diffusion(200, "linear"))
    np.testing.assert_allclose([y for _, y in curve], ho / (2 + snr) ** 0.5, rtol=1e-4)
    total = [
        float(p["y"])
        for p in points
        if (p["chart"], p["curve"]) == ("linear: the same, normalised", "P2, gamma 1")
    ]
    assert sum(total) == pytest.approx(1, abs=1e-3)


def test_p2_weighs_most_where_its_hump_is(analyse, tmp_path):
    """On the cosine schedule the weight of the VLB's terms is sin cos / (k + cot^2)^gamma of an angle, with
    SNR = cot^2. It is largest at SNR k / (1 + 2 gamma) for k = 1; the bound weighs all T terms alike.
    """
    assert analyse("weights", "--gammas", "0,0.5,1,2,3").code == 0
    rows = {(r["schedule"], r["weighting"]): r for r in rows_of(tmp_path / "runs/analysis/weights.csv")}
    for gamma in (
        "0.5",
        "1",
        "2",
        "3",
    ):  # the table's later rows, of the error of eps, have other names' peaks
        row = next(
            r
            for r in rows_of(tmp_path / "runs/analysis/weights.csv")
            if (r["schedule"], r["weight of"], r["weighting"])
            == ("cosine", "VLB's terms", f"P2, gamma {gamma}")
        )
        assert float(row["at SNR"]) == pytest.approx(1 / (1 + 2 * float(gamma)), rel=0.02)
    assert ("linear", "P2, gamma 3") in rows
    curves = rows_of(tmp_path / "runs/analysis/weights_curves.csv")
    y = {(p["chart"], p["curve"]): 0.0 for p in curves}
    for p in curves:
        y[p["chart"], p["curve"]] = max(y[p["chart"], p["curve"]], float(p["y"]))
    # gamma 1 peaks at 0.00154 on the linear schedule, where the bound has 0.001 for each of its 1000 terms
    assert y["linear: the same, normalised", "P2, gamma 1"] == pytest.approx(0.00154, abs=5e-6)
    assert y["linear: the same, normalised", "VLB"] == pytest.approx(0.001)
    assert len([p for p in curves if p["chart"] == "cosine: lambda"]) == 2 * 1000  # over t


def test_the_normalised_weights_have_a_linear_axis_down_to_snr_1e_8():
    result = analysis.weights(analysis.STUDIES["weights"].settings())
    panels = {panel.title: panel for panel in result.figure[0].panels}
    for schedule in ("linear", "cosine"):
        panel = panels[f"{schedule}: the same, normalised"]
        assert panel.log == "x" and panel.x_from == 1e-8
        assert panels[f"{schedule}: lambda"].x_label == "t"


@pytest.mark.parametrize("schedule", utils.SCHEDULES)
def test_default_levels_are_even_in_log_snr_and_at_least_two_in_each_stage(schedule):
    diffusion = Diffusion(1000, schedule)
    levels, log_snr = analysis.stage_levels(diffusion), diffusion.snr.log()
    assert levels == sorted(levels, reverse=True)
    for low, high in analysis.STAGES.values():
        there = (low <= diffusion.snr) & (diffusion.snr < high)
        of_stage = [t for t in levels if there[t]]
        assert len(of_stage) >= min(2, there.sum())  # laplace has one time in the coarse stage
        gaps = log_snr[of_stage].diff()
        if len(gaps) > 1:  # even, but for the distance to the next time
            coarsest = (
                -log_snr[min(of_stage) - 1 : max(of_stage) + 2].diff().min() if min(of_stage) > 1 else 1
            )
            assert gaps.max() - gaps.min() < 0.01 + 2 * coarsest


# measures


def test_psnr():
    x_0 = images(3, 1, 8, 8)
    # sigma in units of [0, 1] is 2 sigma here: a constant error of 0.1 in [0, 1] is 20 dB
    torch.testing.assert_close(measures.psnr(x_0 + 0.2, x_0), torch.full((3,), 20.0))
    assert measures.psnr(x_0, x_0).isinf().all()
    noisy = images(1, 1, 200, 200) * 0 + 2 * 0.5 * torch.randn(1, 1, 200, 200, generator=generator(1))
    assert measures.psnr(noisy, torch.zeros(1, 1, 200, 200)).item() == pytest.approx(6.02, abs=0.05)


def test_ssim_is_one_for_equal_images_and_its_formula_for_constant_ones():
    x = images(2, 3, 16, 16)
    torch.testing.assert_close(measures.ssim(x, x), torch.ones(2, dtype=torch.float64))
    assert (measures.ssim(x, images(2, 3, 16, 16, seed=1)) < 0.3).all()
    a, b = torch.full((1, 1, 16, 16), -0.5), torch.full((1, 1, 16, 16), 0.5)  # 0.25 and 0.75 in [0, 1]
    expected = (2 * 0.25 * 0.75 + 0.01**2) / (0.25**2 + 0.75**2 + 0.01**2)  # no variance: the luminance term
    assert measures.ssim(a, b).item() == pytest.approx(expected)
    assert measures.ssim(x[..., :4, :4], x[..., :4, :4])[0] == pytest.approx(1)  # smaller than the window
    # the contrast term: the negative of an image of mean mid-gray is its opposite
    y = x - x.mean((2, 3), keepdim=True)
    assert (measures.ssim(-y, y) < -0.5).all()


def test_energy_bands_sum_to_one_and_find_a_wave_in_its_band():
    shares = measures.energy_bands(images(5, 3, 16, 12))
    torch.testing.assert_close(shares.sum(1), torch.ones(5, dtype=torch.float64))
    column = torch.arange(32.0)
    for band, (cycles, expected) in enumerate([(1 / 16, "low"), (3 / 16, "middle"), (3 / 8, "high")]):
        wave = (2 * math.pi * cycles * column).cos().expand(1, 1, 32, 32)
        shares = measures.energy_bands(wave)[0]
        assert list(measures.BANDS)[band] == expected and shares[band] == pytest.approx(1, abs=1e-6)


def test_kept_bands():
    x_0, other = normal(200, 1, 16, 16), normal(200, 1, 16, 16, seed=1)
    torch.testing.assert_close(measures.kept_bands(0.3 * x_0, x_0), torch.full((3,), 0.3).double())
    assert measures.kept_bands(other, x_0).abs().max() < 0.05
    # the mean of all x_0 that fit x_t keeps ab of the energy, if x_0 is standard normal
    ab = 0.6
    x_t = ab**0.5 * x_0 + (1 - ab) ** 0.5 * other
    torch.testing.assert_close(
        measures.kept_bands(ab**0.5 * x_t, x_0), torch.full((3,), ab).double(), atol=0.03, rtol=0
    )


def test_kept_colour():
    x_0, other = normal(50, 3, 8, 8), normal(50, 3, 8, 8, seed=1)
    luma = (x_0 * torch.tensor([0.299, 0.587, 0.114]).double().view(3, 1, 1)).sum(1, keepdim=True)
    gray = luma.expand(-1, 3, -1, -1)  # the luminance of x_0 in all channels: no colour
    torch.testing.assert_close(
        measures.kept_colour(gray, x_0), torch.tensor([1.0, 0.0]).double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        measures.kept_colour(x_0 - gray, x_0), torch.tensor([0.0, 1.0]).double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(measures.kept_colour(0.3 * x_0, x_0), torch.full((2,), 0.3).double())
    assert measures.kept_colour(other, x_0).abs().max() < 0.05
    kept = measures.kept_colour(gray, gray)  # gray images have no chroma to be kept
    assert kept[0] == pytest.approx(1) and kept[1].isnan()


def test_frechet_distance_of_two_gaussians():
    n = 200_000
    scale_a, scale_b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.5, 1.0, 0.5])
    turn, _ = torch.linalg.qr(normal(3, 3, seed=5))
    a, b = (
        normal(n, 3) * scale_a @ turn,
        (normal(n, 3, seed=1) * scale_b + torch.tensor([0.3, 0, -0.4])) @ turn,
    )
    # covariances with the same axes: |m|^2 + sum (s_a - s_b)^2
    expected = 0.3**2 + 0.4**2 + ((scale_a - scale_b) ** 2).sum().item()
    assert measures.frechet_distance(a, b) == pytest.approx(expected, rel=0.02)
    assert measures.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert measures.frechet_distance(a, a + 1) == pytest.approx(3, rel=1e-6)


def test_frechet_distance_where_the_axes_differ():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    a, b = normal(500, 4) @ normal(4, 4, seed=1), normal(500, 4, seed=2) @ normal(4, 4, seed=3) + 1
    S_a, S_b = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    root = scipy_linalg.sqrtm(S_a @ S_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(S_a + S_b - 2 * root)
    assert measures.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_says_how_many_images_it_needs():
    with pytest.raises(UserError, match=r"at least 5 images.*there are 4"):
        measures.frechet_distance(normal(4, 4), normal(100, 4))


def test_precision_and_recall_on_constructed_sets():
    line = torch.arange(10.0)[:, None]  # radius to the 3rd neighbour: 2 inside, 3 at the ends
    real = torch.cat([line, line + 100])  # two modes
    assert (
        measures.manifold_coverage(line + 0.1, real) == 1
        and measures.manifold_coverage(real, line + 0.1) == 0.5
    )  # one dropped
    fake = torch.cat([line + 0.1, line + 1000])  # one of two is no data
    assert measures.manifold_coverage(fake, real) == 0.5
    assert measures.manifold_coverage(torch.tensor([[-2.9], [-3.1]]), line) == 0.5  # the end's radius is 3
    assert measures.manifold_coverage(torch.tensor([[4.4]]), line, k=1) == 1
    with pytest.raises(UserError, match="at least 4 images"):
        measures.manifold_coverage(line, line[:3])


def test_diversity_saturation_and_nearest_images():
    x = torch.tensor([0.0, 1.0, 0.0, 0.5]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    # classes {0, 1}, in [0, 1] at distance 0.5, and {0, 0.5}, at 0.25
    assert measures.diversity(x, torch.tensor([7, 7, 3, 3])) == pytest.approx(0.375)
    ends = torch.tensor([-1, -0.9999, 0.5, 1]).view(1, 1, 2, 2)
    assert measures.saturation(ends) == 0.75
    bytes_ = to_uint8(torch.linspace(-1, 1, 4001).view(1, 1, 1, -1))
    share = ((bytes_ == 0) | (bytes_ == 255)).mean()
    assert measures.saturation(torch.linspace(-1, 1, 4001)[None]) == pytest.approx(share, abs=1e-3)
    cloud = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 2)  # 0, 0.2, 1
    distance, index = analysis.nearest_images(to_x_0(cloud[2:]) - 0.2, cloud)
    assert distance.item() == pytest.approx(0.1) and index.tolist() == [2]
    distance, index = analysis.nearest_images(to_x_0(cloud), cloud, skip=1)
    assert index.tolist() == [1, 0, 1] and distance.tolist() == pytest.approx([0.2, 0.2, 0.8])
    many = torch.randint(0, 256, (9000, 1, 2, 2), dtype=torch.uint8, generator=generator(0))
    distance, index = analysis.nearest_images(to_x_0(many[[5, 4500, 8999]]), many)  # in three parts
    assert torch.equal(many[index], many[[5, 4500, 8999]]) and distance.max() < 1e-3


def test_half_life():
    assert analysis.half_life([10, 20, 30], [0.8, 0.6, 0.2]) == pytest.approx(22.5)
    assert analysis.half_life([10], [0.0]) == pytest.approx(5)
    assert analysis.half_life([10, 20], [0.9, 0.6]) == math.inf


# the forward process


@pytest.mark.parametrize("cloud", analysis.CLOUDS.values())
def test_clouds_are_standardised(cloud):
    x = cloud(2000, generator(0)).flatten(1)
    assert x.mean(0).abs().max() < 1e-5 and (x.square().mean(0) - 1).abs().max() < 1e-5


def test_neighbours_kept_and_correlation():
    x = analysis.swiss_roll(300, generator(0))
    assert analysis.neighbours_kept(x, x) == 1 and analysis.neighbours_kept(3 * x + 1, x) == 1
    other = analysis.swiss_roll(300, generator(1))[torch.randperm(300, generator=generator(2))]
    assert analysis.neighbours_kept(other, x) < 0.1  # chance is 10 of 299
    pictures = images(4, 1, 64, 64)
    assert analysis.correlation(0.2 * pictures - 0.5, pictures) == pytest.approx(1, abs=1e-5)
    pictures = analysis.standardised(pictures)
    x_t = 0.6 * pictures + 0.8 * torch.randn(pictures.shape, generator=generator(3))
    assert analysis.correlation(x_t, pictures) == pytest.approx(0.6, abs=0.02)  # sqrt(alpha_bar)


def test_forward_writes_half_lives_and_a_variance_of_one(analyse, tmp_path):
    result = analyse(
        "forward", "--schedules", "linear,flow,constant", "--noise-steps", 200, "--cache-dir", "c"
    )
    assert result.code == 0, result.err
    rows = {row["schedule"]: row for row in rows_of(tmp_path / "runs/analysis/forward.csv")}
    for name, row in rows.items():
        # the variance of 50000 values has a standard error of 0.6 %: of 200, none is off by 5 of it
        assert float(row["variance, largest error"]) < 5 * (2 / 50000) ** 0.5
        # a process that adds the same noise and does not scale the mean ends at 1 + the sum of the betas
        betas = utils.SCHEDULES[name](200)
        assert float(row["mean not scaled"]) == pytest.approx(1 + betas.sum().item(), rel=0.03)
        # corr(x_t, x_0) = sqrt(ab) for a standardised x_0: both studies mean the same by half the structure
        half = (Diffusion(200, name).alpha_bar.sqrt() > 0.5).sum().item()
        assert int(row["half the structure gone at t"]) == half
        assert float(row["image half-life"]) == pytest.approx(half, abs=2.5)
    assert [rows[k]["rank by image"] for k in ("flow", "linear", "constant")] == ["1", "2", "3"]
    assert [rows[k]["rank by points"] for k in ("flow", "linear", "constant")] == ["1", "2", "3"]
    points = rows_of(tmp_path / "runs/analysis/forward_curves.csv")
    variance = [p for p in points if p["chart"].startswith("variance")]
    assert len(variance) == 2 * 3 * 200
    assert [rows[k]["rank"] for k in ("flow", "linear", "constant")] == ["1", "2", "3"]


def test_the_variance_of_the_linear_schedule_would_reach_eleven():
    """T = 1000: beta has a mean of 0.01005, so 1 + sum beta = 11.05."""
    *_, left = analysis.what_is_left(Diffusion(1000, "linear"), images(1, 1, 8, 8), [500], 300, seed=0)
    t, unscaled = left["unscaled"]
    assert t[-1] == 1000 and unscaled[-1] == pytest.approx(11.05, rel=0.03)
    assert max(abs(v - 1) for v in left["variance"][1]) < 5 * (2 / 50000) ** 0.5


def test_half_the_structure_of_cosine_is_gone_where_its_alpha_bar_is_a_quarter():
    row = analysis.schedules(analysis.STUDIES["schedules"].settings(schedules=["cosine"])).rows[0]
    assert row["half the structure gone at t"] == 665  # cos^2((u + s) / (1 + s) pi / 2) = 1/4 at u = 0.664
    *_, left = analysis.what_is_left(Diffusion(1000, "cosine"), images(1, 1, 8, 8), [500], 300, seed=0)
    assert analysis.half_life(*left["image"]) == pytest.approx(665, abs=6)


def test_forward_on_the_users_image_needs_no_network(analyse, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), np.uint8)).save(
        tmp_path / "me.png"
    )
    flags = ["--image", "me.png", "--image-size", 48, "--schedules", "cosine", "--noise-steps", 50]
    result = analyse("forward", *flags, "--out", "here", "--at", 500)
    assert result.code == 0 and "70x40, is cropped to a square and resized to 48x48" in result.err, result.err
    assert Image.open(tmp_path / "here/forward.png").width > 300


# Langevin dynamics, chains, other schedules, blurs


def ideal(diffusion, mean, std):
    """The ideal denoiser of data N(mean, std^2)."""

    def eps_theta(x_t, t):
        ab = diffusion.alpha_bar[t].view(-1, 1, 1, 1).to(x_t.dtype)
        return (1 - ab).sqrt() * (x_t - ab.sqrt() * mean) / (ab * std**2 + 1 - ab)

    return eps_theta


def test_langevin_follows_its_own_recursion():
    diffusion, mean, std, inner, step = Diffusion(50, "cosine"), 0.3, 0.5, 3, 0.2
    timesteps = diffusion.timesteps(10)
    x_T = normal(40000, 1, 1, 1)
    x = analysis.langevin(diffusion, ideal(diffusion, mean, std), x_T, timesteps, generator(1), inner, step)
    m, v = 0.0, 1 / diffusion.alpha_bar[timesteps[0]].item()  # of z = x / sqrt(ab)
    for t in timesteps[:-1]:
        ab = diffusion.alpha_bar[t].item()
        sigma_2 = (1 - ab) / ab
        pull = (
            step * sigma_2 / 2 / (std**2 + sigma_2)
        )  # z <- z - alpha / 2 (z - mean) / (std^2 + sigma^2) + ...
        for _ in range(inner):
            m, v = m + pull * (mean - m), (1 - pull) ** 2 * v + step * sigma_2
    shrink = std**2 / (std**2 + sigma_2)  # Tweedie: E[x_0 | z]
    m, v = mean + shrink * (m - mean), shrink**2 * v
    assert x.mean().item() == pytest.approx(m, abs=4 * (v / 40000) ** 0.5)
    assert x.var().item() == pytest.approx(v, rel=4 * (2 / 40000) ** 0.5)


def test_langevin_draws_from_the_data_when_its_steps_are_small_and_many():
    diffusion = Diffusion(200, "cosine")
    x_T = normal(10000, 1, 1, 1)
    timesteps = diffusion.timesteps(100)
    x = analysis.langevin(diffusion, ideal(diffusion, 0.3, 0.5), x_T, timesteps, generator(1), 20, 0.1)
    assert x.mean().item() == pytest.approx(0.3, abs=0.04) and x.std().item() == pytest.approx(0.5, abs=0.04)


def test_langevin_can_stop_on_the_way():
    diffusion = Diffusion(50, "cosine")
    x = normal(20000, 1, 1, 1)
    eps_theta = ideal(diffusion, 0.3, 0.5)
    at_20 = analysis.langevin(diffusion, eps_theta, x, list(range(50, 19, -1)), generator(1), 20, 0.1)
    ab, before = diffusion.alpha_bar[20].item(), diffusion.alpha_bar[21].item()
    expected = ab * (0.25 + (1 - before) / before)  # the noise of the last level, 21, is still there
    assert at_20.var().item() == pytest.approx(expected, rel=0.1)


@torch.no_grad()
def heun(diffusion, eps_theta, x, timesteps, generator=None):
    """Heun's method on the probability flow: two evaluations a stride, but for one that ends in 0."""
    for t, s, ab_t, ab_s in diffusion.strides(x, timesteps):
        eps = eps_theta(x, t)
        if ab_s < 1:
            eps = (eps + eps_theta(ddim_stride(x, eps, ab_t, ab_s), s)) / 2
        x = ddim_stride(x, eps, ab_t, ab_s)
    return x


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "pndm", "dpm_solver", "heun"])
def test_chains_are_the_samplers_own(sampler, monkeypatch):
    """Chains that join on the way end where each would alone."""
    monkeypatch.setitem(ddpm.SAMPLERS, "heun", heun)
    diffusion, levels = Diffusion(100, "cosine"), [80, 50, 10]
    eps_theta, x_t = ideal(diffusion, 0.1, 0.7), normal(3, 2, 1, 4, 4)

    def own(level):
        return [generator(level, i) for i in range(2)]

    together = [g for level in levels for g in own(level)]
    x = analysis.chains(diffusion, eps_theta, sampler, x_t, levels, 10, together)
    for i, level in enumerate(levels):
        alone = [t for t in range(100, -1, -10) if t <= level]
        expected = ddpm.SAMPLERS[sampler](diffusion, eps_theta, x_t[i], alone, own(level))
        torch.testing.assert_close(x[i], expected)


def test_two_noisings_are_their_closed_form():
    diffusion, x_0 = Diffusion(40, "cosine"), images(2000, 1, 4, 4)
    rows = analysis.two_noisings(diffusion, x_0, seed=0)
    apart = (x_0 - x_0.roll(1, 0)).square().mean().item()
    for t, one, two in zip(range(1, 41), rows[::2], rows[1::2], strict=True):
        ab = diffusion.alpha_bar[t].item()
        assert one["snr"] == two["snr"] == diffusion.snr[t]
        assert one["pixels"].item() == pytest.approx((2 * (1 - ab)) ** 0.5, rel=0.02)
        assert two["pixels"].item() == pytest.approx((2 * (1 - ab) + ab * apart) ** 0.5, rel=0.02)


@pytest.mark.parametrize("other", utils.SCHEDULES)
def test_a_denoiser_is_asked_at_the_same_snr_on_another_schedule(other):
    trained, other = Diffusion(1000, "cosine"), Diffusion(100, other)
    asked = []

    def spy(x_t, t):
        asked.append(t)
        return x_t

    t = torch.arange(1, 101)
    analysis.on_schedule(trained, other, spy)(torch.zeros(100, 1, 1, 1), t)
    there, wanted = trained.snr[asked[0]].log(), other.snr[t].log()
    low, high = trained.snr[1000].log(), trained.snr[1].log()
    within = (wanted > low) & (wanted < high)
    gap = (trained.snr[1:-1].log() - trained.snr[2:].log())[asked[0].clamp(max=999) - 1]  # to the next t
    gap = torch.maximum(gap, (trained.snr[1:-1].log() - trained.snr[2:].log())[(asked[0] - 2).clamp(min=0)])
    assert ((there - wanted).abs() <= gap / 2 + 1e-9)[within].all() and within.any()


def test_sampling_on_another_schedule_gives_the_data():
    """Gaussian data, cosine's denoiser asked through linear: DDIM comes to the data's mean and spread."""
    trained, other = Diffusion(1000, "cosine"), Diffusion(1000, "linear")
    eps_theta = analysis.on_schedule(trained, other, ideal(trained, 0.3, 0.5))
    x = ddpm.ddim(other, eps_theta, normal(20000, 1, 1, 1), other.timesteps(200))
    assert x.mean().item() == pytest.approx(0.3, abs=0.02) and x.std().item() == pytest.approx(0.5, abs=0.03)


# studies of tiny runs


@pytest.fixture
def analyse(script):
    return lambda *args: script(analysis, *args)


TINY_CONDITIONAL = [*TINY, "--limit", 200, "--width", 8]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of tiny runs of every kind: unconditional, by label, by caption, classifier, denoiser."""
    folder = tmp_path_factory.mktemp("runs")
    run_in(folder, ddpm, *TINY, "--limit", 200)
    run_in(folder, ddpm, *TINY, "--limit", 200, "--prediction", "eps", "--weighting", "p2", "--name", "p2")
    run_in(folder, ddpm_conditional, *TINY_CONDITIONAL)
    text = ["--dataset", "shapes", "--limit", 32, "--prediction", "eps", "--name", "text"]
    run_in(folder, ddpm_conditional, *TINY_CONDITIONAL, *text)
    run_in(folder, ddpm_conditional, *classifier_flags(200), "--task", "classifier")
    run_in(
        folder,
        ddpm_conditional,
        *classifier_flags(100),
        "--task",
        "classifier",
        "--image-size",
        16,
        "--name",
        "c16",
    )
    run_in(folder, ddpm, *denoiser_flags(), "--task", "denoiser", "--sigma", 0.4)
    return folder / "runs"


def classifier_flags(limit):
    flags = f"--limit {limit} --batch-size 16 --epochs 2 --width 8 --multipliers 1 2 --blocks 1 --attention 1"
    return [*flags.split(), "--noise-steps", "20", "--image-size", "8", "--device", "cpu"]


def denoiser_flags():
    flags = "--limit 48 --batch-size 16 --width 8 --multipliers 1 2 --blocks 1 --attention 1 --image-size 8"
    return [*flags.split(), "--device", "cpu"]


STUDIES = {
    "noise": "ddpm_digits --images 4 --draws 2 --sample-steps 4",
    "denoise": "ddpm_digits denoiser_digits --images 4",
    "samplers": "ddpm_digits --samples 30 --schedules linear,flow",
    "guidance": "ddpm_conditional_digits --per-label 3 --guidance-scale 0,1,3 --sample-steps 3",
    "evaluate": "ddpm_digits ddpm_conditional_digits --samples 60 --sample-steps 3",
    "losses": "ddpm_digits p2 --images 16",
    "score": "ddpm_digits --samples 30 --langevin-levels 4 --inner 2 --point-epochs 2",
}


def run_study(analyse, runs, study, flags, *more):
    named = [str(runs / part) if (runs / part).is_dir() else part for part in flags.split()]
    judged = hasattr(analysis.STUDIES[study].settings(), "classifier")
    return analyse(study, *named, *(["--classifier", runs / "classifier_digits"] if judged else []), *more)


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_writes_its_figure_and_table(analyse, runs, study, tmp_path, drawn):
    result = run_study(analyse, runs, study, STUDIES[study], "--out", "o")
    assert result.code == 0, result.err
    assert Image.open(tmp_path / f"o/{study}.png").width > 200
    rows = rows_of(tmp_path / f"o/{study}.csv")
    for name in ("figure", "table"):  # both named, and the table printed
        path = re.search(rf"{name} +(\S+)", result.out)[1]
        assert (tmp_path / path).is_file()
    header = result.out.splitlines()[0]
    assert all(column in header for column in rows[0])
    if study != "evaluate":
        assert len(rows_of(tmp_path / f"o/{study}_curves.csv")) > 5


def test_noise_measures_each_reconstruction_at_each_level(analyse, runs, tmp_path):
    result = run_study(analyse, runs, "noise", STUDIES["noise"] + " --levels 2,10,20 --out o")
    assert result.code == 0, result.err
    rows = rows_of(tmp_path / "o/noise.csv")
    ways = ["one-step x_0", "chain, ddim", "chain, pndm", "chain, ddpm"]
    assert [(r["reconstruction"], r["t"]) for r in rows] == [(w, t) for w in ways for t in ("2", "10", "20")]
    for row in rows:
        assert float(row["snr"]) == pytest.approx(Diffusion(20, "cosine").snr[int(row["t"])].item(), rel=1e-4)
        # PSNR is a mean over images of a convex function of their MSE
        assert float(row["psnr"]) >= -10 * math.log10(float(row["mse"])) - 1e-3
        assert 0 <= float(row["classifier agrees"]) <= 1
        assert (row["spread of draws"] != "") == (row["reconstruction"] == "chain, ddpm")
        if row["spread of draws"]:  # MSE of draws = MSE of their mean + their variance (K - 1) / K
            spread = (2 * float(row["spread of draws"])) ** 2 / 4 / 2
            assert float(row["mse"]) == pytest.approx(float(row["mse of their mean"]) + spread, rel=1e-3)


def test_noise_draws_all_that_it_measured(analyse, runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "support.charts.draw_chart", lambda chart, width: drawn.append(chart) or Image.new("RGB", (9, 9))
    )
    assert run_study(analyse, runs, "noise", STUDIES["noise"] + " --levels 10,20 --out o").code == 0
    assert Diffusion(20, "cosine").snr[20] < 1e-4  # which was once left out
    mse = next(panel for panel in drawn[0].panels if panel.title == "mse")
    for x, _ in mse.curves.values():
        assert len(x) == 2 and min(x) > mse.x_from


def test_noise_with_out_keeps_an_image_of_each_level_and_way(analyse, runs, tmp_path):
    flags = " --levels 5,20 --samplers ddim --keep-eps --out o"
    assert run_study(analyse, runs, "noise", STUDIES["noise"] + flags).code == 0
    names = {path.name for path in (tmp_path / "o/noise").iterdir()}
    ways = ("x_t", "one-step x_0", "chain, ddim", "chain, ddim, eps kept")
    assert names == {f"{way}, t = {t}, image {i}.png" for way in ways for t in (5, 20) for i in (1, 2, 3, 4)}
    assert run_study(analyse, runs, "noise", STUDIES["noise"] + flags).code == 0
    assert len(list((tmp_path / "o/noise_2").iterdir())) == len(names)


def test_keeping_eps_is_ddim_with_a_clipped_x_0_and_changes_nothing_where_none_is_clipped():
    diffusion = Diffusion(100, "cosine")
    times, x = diffusion.timesteps(10), normal(3, 1, 4, 4)
    near = ideal(diffusion, 0.1, 0.05)  # of x_0 near 0.1: no x_0 leaves [-1, 1]
    kept = analysis.ddim_keeping_eps(diffusion, near, x, times)
    torch.testing.assert_close(kept, ddpm.ddim(diffusion, near, x, times))
    wide = ideal(diffusion, 0.5, 2.0)
    x_s = analysis.ddim_keeping_eps(diffusion, wide, x, times[5:7])
    eps, (ab_t, ab_s) = wide(x, torch.full((3,), times[5])), diffusion.alpha_bar[times[5:7]]
    x_0 = ((x - (1 - ab_t).sqrt() * eps) / ab_t.sqrt()).clamp(-1, 1)
    torch.testing.assert_close(x_s, ab_s.sqrt() * x_0 + (1 - ab_s).sqrt() * eps)
    clipped = ddpm.ddim(diffusion, ddpm.clip_x_0(diffusion, wide), x, times[5:7])
    assert (x_s - clipped).abs().max() > 0.01  # eps is not derived again


def test_noise_without_clipping_leaves_x_0_as_the_network_says(analyse, runs, tmp_path):
    flags = ["--images", 4, "--levels", 20, "--samplers", "ddim", "--sample-steps", 4, "--out"]
    plain = analyse("noise", runs / "p2", *flags, "a")
    unclipped = analyse("noise", runs / "p2", *flags, "b", "--no-clip")
    assert plain.code == unclipped.code == 0 and "x_0 is not clipped" in unclipped.out
    one, other = (float(rows_of(tmp_path / f"{out}/noise.csv")[0]["mse"]) for out in "ab")
    assert other > 10 * one  # at t = T an error of eps is divided by the signal, which is nearly 0


def test_noise_measures_colour_where_there_is_some(analyse, runs, tmp_path):
    flags = ["--images", 4, "--samplers", "ddim", "--sample-steps", 2]
    result = analyse("noise", runs / "text", *flags, "--levels", "1,20", "--out", "o")
    assert result.code == 0, result.err
    rows = {(row["reconstruction"], row["t"]): row for row in rows_of(tmp_path / "o/noise.csv")}
    little, much = rows["one-step x_0", "1"], rows["one-step x_0", "20"]
    for kept in ("luma kept", "chroma kept"):  # with little noise most is seen, even by two epochs of eps
        assert float(little[kept]) > 0.3 and float(little[kept]) > float(much[kept]) + 0.2
    assert {p["chart"] for p in rows_of(tmp_path / "o/noise_curves.csv")} >= {"luma kept", "chroma kept"}
    assert "ddpm" not in result.out and "spread" not in result.out  # of a sampler that did not run
    result = run_study(analyse, runs, "noise", STUDIES["noise"], "--out", "gray")
    assert (
        "luma kept" not in rows_of(tmp_path / "gray/noise.csv")[0] and "2 draws of each by ddpm" in result.out
    )


def test_noise_levels_can_be_chosen_by_their_snr(analyse, runs, tmp_path):
    flags = ["--images", 2, "--samplers", "ddim", "--sample-steps", 2, "--snr", "10,1,0.1", "--out", "o"]
    result = analyse("noise", runs / "ddpm_digits", *flags)
    assert result.code == 0, result.err
    snr = Diffusion(20, "cosine").snr[1:]
    for row, wanted in zip(rows_of(tmp_path / "o/noise.csv"), (10, 1, 0.1), strict=False):
        distance = (snr.log() - math.log(wanted)).abs()
        assert int(row["t"]) == distance.argmin() + 1 and float(row["snr"]) == pytest.approx(wanted, rel=0.5)


def test_a_sampler_with_two_evaluations_a_stride_works_in_every_study(analyse, runs, tmp_path, monkeypatch):
    monkeypatch.setitem(ddpm.SAMPLERS, "heun", heun)
    flags = ["--samplers", "heun,ddim", "--images", 4, "--sample-steps", 4, "--levels", "10,20"]
    result = analyse("noise", runs / "ddpm_digits", *flags, "--out", "o")
    assert result.code == 0 and "chain, heun" in result.out, result.err
    result = analyse(
        "samplers", runs / "ddpm_digits", "--samplers", "heun,ddim", "--schedules", "linear", "--out", "o"
    )
    assert result.code == 0, result.err
    for row in rows_of(tmp_path / "o/samplers.csv"):  # counted, and the last stride takes one
        assert (
            int(row["evaluations"]) == int(row["steps"]) * 2 - 1
            if row["sampler"] == "heun"
            else int(row["steps"])
        )
    for study, run in (("guidance", "ddpm_conditional_digits"), ("evaluate", "ddpm_digits")):
        few = ["--per-label", 1, "--guidance-scale", 2] if study == "guidance" else ["--samples", 17]
        more = [
            "--sampler",
            "heun",
            "--sample-steps",
            2,
            "--classifier",
            runs / "classifier_digits",
            "--out",
            "o",
        ]
        assert analyse(study, runs / run, *few, *more).code == 0


def test_forward_follows_several_images(analyse, tmp_path):
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    flags = ["--image-size", 16, "--schedules", "linear", "--noise-steps", 20, "--out", "o"]
    assert analyse("forward", "--image", "0.png", "1.png", *flags).code == 0
    assert analyse("forward", "--image", "0.png", *flags).code == 0
    both, one = (rows_of(tmp_path / f"o/forward{end}.csv")[0] for end in ("", "_2"))
    assert (
        both["points half-life"] == one["points half-life"]
        and both["mean correlation"] != one["mean correlation"]
    )


def test_losses_of_different_schedules_are_compared_by_snr(analyse, runs, tmp_path):
    state = torch.load(runs / "p2/ckpt.pt", weights_only=True)
    state["config"]["schedule"] = "linear"
    torch.save(state, "linear.pt")
    flags = ["--images", 4, "--out", "o"]
    result = analyse("losses", runs / "ddpm_digits", "linear.pt", *flags)
    assert result.code == 0 and "over SNR" in result.out, result.err
    assert "over SNR" not in analyse("losses", runs / "ddpm_digits", runs / "p2", *flags).out


def test_studies_land_in_the_runs_folder_and_never_overwrite(analyse, runs):
    for number in ("", "_2"):
        result = run_study(analyse, runs, "losses", STUDIES["losses"])
        assert result.code == 0, result.err
        for end in (".png", ".csv", "_curves.csv"):
            assert (runs / f"ddpm_digits/losses{number}{end}").is_file()


def test_losses_are_the_errors_of_the_network(analyse, runs, tmp_path):
    assert run_study(analyse, runs, "losses", STUDIES["losses"], "--out", "o").code == 0
    points = rows_of(tmp_path / "o/losses_curves.csv")
    eps = {(p["curve"], p["x"]): float(p["y"]) for p in points if p["chart"] == "mse of eps"}
    x_0 = {(p["curve"], p["x"]): float(p["y"]) for p in points if p["chart"] == "mse of x_0"}
    for (run, snr), error in eps.items():
        assert x_0[run, snr] == pytest.approx(error / float(snr), rel=1e-3)
    rows = rows_of(tmp_path / "o/losses.csv")
    assert [r["weighting"] for r in rows] == ["plain MSE"] * 3 + ["p2"] * 3
    training = [p for p in points if p["chart"].startswith("training")]
    assert len(training) == 2 * 2  # two runs of two epochs


def test_evaluate_measures_what_sample_writes(analyse, runs, tmp_path):
    """The floor is beside every run; copies of training images have distance 0 to the nearest."""
    assert run_study(analyse, runs, "evaluate", STUDIES["evaluate"], "--out", "o").code == 0
    rows = rows_of(tmp_path / "o/evaluate.csv")
    assert [r["run"].split("/")[-1] for r in rows] == [
        "ddpm_digits",
        "ddpm_conditional_digits",
        "real images",
    ]
    assert {r["n"] for r in rows} == {"60"}
    assert rows[0]["label accuracy"] == "" and rows[1]["label accuracy"] != ""
    assert float(rows[2]["frechet"]) < float(rows[0]["frechet"])  # two epochs draw noise
    assert float(rows[2]["precision"]) > float(rows[0]["precision"]) + 0.3
    result = sampled(runs, tmp_path)
    path, cpu = runs / "ddpm_digits", torch.device("cpu")
    model = analysis.Model(str(path), *ddpm.load_network(path), cpu, path)
    settings = analysis.Settings(batch_size=3)
    x, evaluations = analysis.draw_samples(model, range(4), ddpm.ddim, 3, settings)
    assert np.abs(np.subtract(to_uint8(x)[..., 0], result, dtype=int)).max() <= 1 and evaluations == 3


def sampled(runs, tmp_path):
    """What `ddpm.py --sample` writes, (B, H, W) uint8."""
    argv = sys.argv
    flags = f"--sample 4 --checkpoint {runs / 'ddpm_digits'} --sampler ddim --sample-steps 3 --device cpu"
    sys.argv = ["ddpm.py", *flags.split(), "--out", str(tmp_path / "s")]
    try:
        ddpm.main()
    finally:
        sys.argv = argv
    return np.stack([np.asarray(Image.open(p)) for p in image_files(tmp_path / "s")])


def test_guidance_of_an_unconditional_model_and_of_captions(analyse, runs, tmp_path):
    flags = "ddpm_digits --per-label 3 --guidance-scale 0,2 --sample-steps 2 --labels 1,2,3,4,5,6,7"
    result = run_study(analyse, runs, "guidance", flags, "--out", "a")
    assert result.code == 0, result.err
    kinds = [row["guidance"] for row in rows_of(tmp_path / "a/guidance.csv")]
    assert kinds == ["classifier", "classifier", "real images"]
    prompts = ["--prompt", "a red circle", "a blue square"]
    flags = ["--per-label", 2, "--guidance-scale", "1,3", "--sample-steps", 2, "--out", "b"]
    result = analyse("guidance", runs / "text", *prompts, *flags)
    assert result.code == 0, result.err
    rows = rows_of(tmp_path / "b/guidance.csv")
    made = [("cfg", "1", "4"), ("cfg", "3", "4"), ("real images", "", "4")]
    assert [(r["guidance"], r["scale"], r["n"]) for r in rows] == made
    assert "accuracy" not in rows[0] and float(rows[0]["diversity"]) > 0 and rows[-1]["diversity"] == ""


def test_guidance_measures_real_images_of_the_labels_where_there_are_any(analyse, runs, tmp_path):
    flags = ["--per-label", 2, "--guidance-scale", "1,3", "--sample-steps", 2, "--labels", "1,7"]
    assert analyse("guidance", runs / "ddpm_conditional_digits", *flags, "--out", "a").code == 0
    *samples, real = rows_of(tmp_path / "a/guidance.csv")
    data = utils.get_data("digits", image_size=8, limit=200)
    high = measures.energy_bands(to_x_0(data.images[torch.isin(data.labels, torch.tensor([1, 7]))]))[:, 2]
    assert real["guidance"] == "real images" and high.min() < float(real["sharpness"]) < high.max()
    assert len(samples) == 2 and 0 < float(real["diversity"])
    drawn = [p for p in rows_of(tmp_path / "a/guidance_curves.csv") if p["curve"] == "real images"]
    level = {(p["x"], p["y"]) for p in drawn if p["chart"] == "sharpness"}
    assert level == {("1", real["sharpness"]), ("3", real["sharpness"])}  # a line across the chart
    state = torch.load(runs / "ddpm_conditional_digits/ckpt.pt", weights_only=True)
    state["config"] |= {"dataset": "folder", "data_root": "gone"}
    torch.save(state, "ckpt.pt")
    result = analyse("guidance", "ckpt.pt", *flags, "--out", "b")
    assert result.code == 0 and "no real images" in result.err and "--data-root" in result.err, result.err
    assert [row["guidance"] for row in rows_of(tmp_path / "b/guidance.csv")] == ["cfg", "cfg"]


def test_denoise_without_a_run_and_of_a_denoiser_alone(analyse, runs, tmp_path):
    result = analyse("denoise", "--images", 64, "--out", "a", "--cache-dir", "c")
    assert result.code == 0, result.err
    rows = rows_of(tmp_path / "a/denoise.csv")
    blurs = ["blur 0.5", "blur 1", "blur 2"]  # sigmas of a 32nd, a 16th and an eighth of 16 pixels
    assert [r["denoised by"] for r in rows] == ["x_t", "noisy", *blurs] * 3
    by_way = {(r["noise"], r["denoised by"]): float(r["psnr"]) for r in rows}
    for t in ("t = 250", "t = 500", "t = 750"):
        best = max(blurs, key=lambda blur: by_way[t, blur])
        assert by_way[t, best] > by_way[t, "noisy"]
        assert [r["denoised by"] for r in rows if r["noise"] == t and r["best"]] == [best]
    ab = Diffusion(1000, "linear").alpha_bar[500].item()  # x_t / sqrt(ab) is x_0 + noise of (1 - ab) / ab
    assert by_way["t = 500", "noisy"] == pytest.approx(-10 * math.log10((1 - ab) / ab / 4), abs=0.2)
    result = analyse("denoise", runs / "denoiser_digits", "--out", "b")
    assert result.code == 0, result.err
    rows = [r for r in rows_of(tmp_path / "b/denoise.csv") if r["noise"].startswith("sigma")]
    ways = {r["denoised by"] for r in rows}
    assert ways == {"one step, epoch 1", "one step, epoch 5", "noisy"}
    sigmas = [float(r["sigma"]) for r in rows if r["denoised by"] == "one step, epoch 5"]
    assert sigmas == [0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0]
    losses = [p for p in rows_of(tmp_path / "b/denoise_curves.csv") if p["chart"] == "training loss"]
    log = rows_of(runs / "denoiser_digits/log.csv")
    assert [float(p["y"]) for p in losses] == pytest.approx([float(r["loss"]) for r in log], rel=1e-3)
    result = analyse("losses", runs / "denoiser_digits", "--out", "b")  # its training curve alone
    assert result.code == 0 and len(rows_of(tmp_path / "b/losses_curves.csv")) == len(log), result.err


def test_a_denoiser_is_shown_beside_clean_and_noisy_images(runs, monkeypatch):
    path, columns = runs / "denoiser_digits", {}
    model = analysis.Model(
        str(path), *ddpm.load_network(path, kinds=("denoiser",)), torch.device("cpu"), path
    )
    monkeypatch.setattr(
        analysis,
        "make_grid",
        lambda x, caption, n, heads: columns.update(
            zip(heads, x.unflatten(0, (-1, n)).unbind(1), strict=True)
        ),
    )
    analysis.one_level(model)
    assert list(columns) == ["clean", "noisy", "epoch 1", "epoch 5"]
    x_0, z = columns["clean"], columns["noisy"]
    assert (z - x_0).std().item() == pytest.approx(2 * 0.4, rel=0.2)  # --sigma 0.4, of images in [0, 1]
    t = torch.zeros(len(z), dtype=torch.long)
    with torch.no_grad():
        torch.testing.assert_close(
            columns["epoch 5"], model.net(z, t), rtol=1e-4, atol=1e-4
        )  # the last epoch
    assert not torch.equal(columns["epoch 1"], columns["epoch 5"])


def test_the_iterative_way_is_shown_after_every_fifth_stride(analyse, runs, monkeypatch):
    shown = []
    monkeypatch.setattr(analysis, "make_grid", lambda *a, **b: shown.append(b) or Image.new("RGB", (9, 9)))
    assert analyse("denoise", runs / "ddpm_digits", "--images", 2, "--out", "o").code == 0
    for level in shown[:-1]:  # what was measured stands under the head of each column, one blur is the best
        first, *heads = level["heads"]
        values = [float(re.fullmatch(r".+\n(-?[0-9.]+) dB( \*)?", head)[1]) for head in heads]
        blurs = {value: head for value, head in zip(values, heads, strict=True) if head.startswith("blur")}
        assert first == "x_0" and len(blurs) == 3 and blurs[max(blurs)].endswith("*")
        assert sum("*" in head for head in heads) == 1
    heads = shown[-1]["heads"]  # of T = 20: 990 is 20
    fifth = [ddpm.at(990, 20), *ddpm.strided_timesteps(20)[1:-1]][::5]
    assert heads == [*(f"t = {t}" for t in fifth), "iterative", "one step", "blurred"]


def parsed(script, flags):
    """The settings that a command of another script asks for, by its own parser."""
    module = {"ddpm.py": ddpm, "ddpm_conditional.py": ddpm_conditional, "edit.py": edit}[script]
    if module is edit:
        return vars(edit.make_parser().parse_args([*map(str, flags)]))
    parser = Parser()
    add_settings(parser, module.GROUPS)
    return vars(parser.parse_args([*map(str, flags)]))


def test_report_has_pages_for_each_item_in_its_order(analyse, runs, tmp_path, monkeypatch):
    asked, made, parser = {}, [], analysis.make_parser()

    def quick(name, study):
        """The study, recorded, with the settings that make it quick."""
        few = [part for part in STUDIES.get(name, "").split() if not (runs / part).is_dir()]
        typed = vars(parser.parse_args([name, *few]))

        def run(settings, *models):
            asked[name] = settings
            vars(settings).update({key: value for key, value in typed.items() if hasattr(settings, key)})
            return study.run(settings, *models)

        return study._replace(run=run)

    studies = {
        name: study if name == "report" else quick(name, study) for name, study in analysis.STUDIES.items()
    }
    monkeypatch.setattr(analysis, "STUDIES", studies)
    monkeypatch.setattr(
        "support.runs.figure_of", lambda *command: made.append(command) or [Image.new("RGB", (400, 900))]
    )
    classifier = ["--classifier", runs / "classifier_digits"]
    result = analyse("report", runs / "ddpm_conditional_digits", *classifier, "--seed", 3, "--out", "o")
    assert result.code == 0 and "left out" not in result.err, result.err
    order = [what for _, what in analysis.REPORT]
    assert list(asked) == [what for what in order if what in studies]
    assert set(asked) == {*studies} - {"report"}  # no study is forgotten
    assert [command[0] for command in made] == [
        what.split()[0].format(kind="ddpm_conditional") for what in order if what not in studies
    ]
    for script, *flags in made:
        typed = parsed(script, flags)
        assert str(typed["checkpoint"]) == str(runs / "ddpm_conditional_digits") and typed["seed"] == 3
        if "image" in typed:
            assert [Image.open(file).size for file in typed["image"]] == [(8, 8)]
    assert (asked["forward"].dataset, asked["forward"].image_size) == ("digits", 8)  # the run's, not ours
    assert all(asked[name].noise_steps == 20 for name in ("schedules", "forward", "weights"))
    assert all(settings.seed == 3 for settings in asked.values())
    pdf = (tmp_path / "o/report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", pdf)) > len(order) / 3
    assert b"/Type42" in pdf.replace(b" ", b"") or b"/CIDFontType2" in pdf  # letters, not drawings of them
    for study in asked:
        assert (tmp_path / f"o/{study}.png").is_file() and (tmp_path / f"o/{study}.csv").is_file()


def test_no_two_of_many_curves_look_the_same():
    curves = {f"curve {i}": ((1, 2), (i, i)) for i in range(25)}
    charts.draw_panel(ax := charts.new_figure(4, 3).subplots(), charts.Panel("p", "x", "y", curves))
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 25


def texts_of(page) -> list[str]:
    return [text.get_text() for place in page.subfigs for text in place.texts]


def test_a_page_has_heading_question_figure_numbers_and_room_for_a_text():
    curves = {"a": ((1, 2, 3), (4, 5, 6)), "b": ((1, 2, 3), (6, 5, 4))}
    chart = charts.Chart([charts.Panel(f"panel {i}", "t", "y", curves) for i in range(5)])
    grid, rows = Image.new("RGB", (1600, 900)), [{"setting": k, "value": 1234.5678} for k in range(150)]
    pages = charts.pages_of(
        [charts.section("heading", "a question?", ["how to read it"], [grid, chart], rows)]
    )
    drawn = [charts.draw_page(page) for page in pages]
    text = [line for page in drawn for line in texts_of(page)]
    assert text[:2] == ["heading", "a question?"] and text[-1] == "Your text:"
    after = text[text.index("how to read it") + 1 : -1]
    lines = "\n".join(after).splitlines()
    assert len(lines) == 151 and all(line.endswith("1.23e+03") for line in lines[1:])  # none is left out
    for page, parts in zip(drawn, pages, strict=True):
        assert sum(tall for tall, _ in parts) <= charts.TALL
        page.draw_without_rendering()
        boxes = [text.get_window_extent() for place in page.subfigs for text in place.texts]
        boxes += [ax.get_tightbbox() for place in page.subfigs for ax in place.axes]
        for i, box in enumerate(boxes):
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.bbox.x1 and box.y1 <= page.bbox.y1
            assert not any(box.overlaps(other) for other in boxes[:i])
    axes = [ax for page in drawn for place in page.subfigs for ax in place.axes]
    assert sum(bool(ax.lines) for ax in axes) == 5  # charts are drawn as lines, not as a picture of them
    assert sum(bool(ax.images) for ax in axes) == 1


def test_a_wide_table_is_in_parts_that_fit_and_loses_nothing():
    rows = [{"run": f"run {i}", **{f"measure {k}": i + k / 10 for k in range(9)}} for i in range(3)]
    whole, parts = charts.aligned(rows), charts.aligned(rows, 50)
    assert len(whole) == 4 and len(whole[0]) > 50 and len(parts) == 12 and max(map(len, parts)) <= 50
    for i in range(4):  # each line of the whole is the lines of the parts, after the first column
        assert whole[i].split() == " ".join([whole[i][:5], *(line[5:] for line in parts[i::4])]).split()
        assert {line[:5] for line in parts[i::4]} == {whole[i][:5]}
    assert charts.aligned([], 50) == []


@pytest.mark.parametrize("colour, channels", [("L", 1), ("RGB", 3)])
def test_an_image_of_the_user_has_the_noise_of_its_kind(tmp_path, colour, channels):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)
    Image.fromarray(pixels).convert(colour).save(tmp_path / "me.png")
    chosen = analysis.STUDIES["forward"].settings(image=[str(tmp_path / "me.png")])
    x, y = analysis.chosen_images(chosen)
    assert x.shape == (1, channels, 64, 64) and y is None


@pytest.mark.parametrize("width", [11, charts.WIDE])  # inches, of a picture and of a page
def test_clouds_are_squares_in_rows_of_their_own_number(width):
    x, y = analysis.swiss_roll(200, generator(0)).flatten(1).T.tolist()
    names = [f"{schedule}, t = {t}" for schedule in ("linear", "scaled_linear") for t in range(994, 1001)]
    clouds = [charts.Panel(name, "", "", {"roll": (x, y)}, kind="cloud") for name in names]
    chart = charts.Chart(clouds, 7)
    figure = charts.new_figure(width, charts.layout(chart, width)[2], layout="constrained")
    charts.draw_panels(chart, width, figure)
    figure.draw_without_rendering()
    boxes = [ax.get_window_extent() for ax in figure.axes]
    for row in (boxes[:7], boxes[7:]):
        assert len({round(box.y0) for box in row}) == 1 and len({round(box.x0) for box in row}) == 7
    for ax, box in zip(figure.axes, boxes, strict=True):
        assert box.width == pytest.approx(box.height, abs=1) and box.width > 8.7 * width  # pixels, of 100
        assert ax.lines[0].get_xdata() == pytest.approx(x) and ax.get_xlim() == ax.get_ylim() == (-3, 3)
        titles = [other.title.get_window_extent() for other in figure.axes if other is not ax]
        assert not any(ax.title.get_window_extent().overlaps(title) for title in titles)
    first, second = charts.shown(chart)  # on a page, whose rows may be on two pages
    for part in (first, second):
        (place,) = charts.draw_page([part]).subfigs
        assert len(place.axes) == 7


@pytest.mark.parametrize("low,high", [(3, 4), (5, 50), (0.4, 3), (20, 8000), (1e-4, 0.3), (1e-8, 1e5)])
def test_labels_of_a_logarithmic_axis_are_two_or_more_and_apart(low, high):
    chart = charts.Chart([charts.Panel("title", "x", "y", {"a": ([low, high], [low, high])}, "xy")] * 3)
    figure = charts.new_figure(11, charts.layout(chart, 11)[2], layout="constrained")
    charts.draw_panels(chart, 11, figure)
    figure.draw_without_rendering()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = axis.get_view_interval()
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            labels = [
                tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()
            ]
            boxes = [label.get_window_extent() for label in labels]
            assert len(boxes) >= 2
            assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])


def test_a_report_of_two_runs_compares_them(analyse, runs, tmp_path, monkeypatch):
    few, asked, pages = dict(analysis.STUDIES), [], []
    for name in ("losses", "noise"):

        def run(settings, *models, name=name):
            asked.append((name, len(models)))
            return analysis.Result([], [{"a": 1}])

        few[name] = few[name]._replace(run=run)
    monkeypatch.setattr(analysis, "STUDIES", few)
    monkeypatch.setattr(analysis, "REPORT", [("1", "losses"), ("P2", "noise")])
    monkeypatch.setattr(
        analysis, "write_report", lambda path, found: pages.extend(charts.pages_of(found)) or path
    )
    both = [runs / "ddpm_digits", runs / "p2"]
    assert analyse("report", *both, "--out", "o").code == 0
    assert asked == [("losses", 2), ("noise", 1), ("noise", 1)]
    text = [texts_of(charts.draw_page(page)) for page in pages]
    assert sum(line.startswith("P2: noise") for lines in text for line in lines) == 2
    settings = next(line for lines in text for line in lines if line.startswith("setting"))
    assert re.search(r"^weighting +None +p2$", settings, re.MULTILINE)


def test_a_second_report_leaves_the_files_of_the_first(analyse, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "REPORT", [("1", "edit.py sdedit --image {image} # why?")])
    monkeypatch.setattr("support.runs.figure_of", lambda *_: [Image.new("RGB", (400, 900))])
    for seed, files in ((0, {"report.pdf", "report_image.png"}), (1, {"report_2.pdf", "report_image_2.png"})):
        before = {path: path.read_bytes() for path in tmp_path.glob("o/*")}
        assert analyse("report", runs / "ddpm_digits", "--seed", seed, "--out", "o").code == 0
        assert all(path.read_bytes() == content for path, content in before.items())
        assert {path.name for path in {*tmp_path.glob("o/*")} - before.keys()} == files


def test_single_images_go_into_a_folder_of_their_own(tmp_path, drawn):
    x = torch.zeros(1, 1, 4, 4)
    (tmp_path / "o/noise").mkdir(parents=True)  # of a study whose other files were moved
    charts.publish("noise", analysis.Result([], [{"a": 1}], images={"x": x}), str(tmp_path / "o"))
    assert [path.name for path in tmp_path.glob("o/noise*/*")] == ["x, image 1.png"]
    assert not [*(tmp_path / "o/noise").iterdir()] and (tmp_path / "o/noise_2/x, image 1.png").is_file()


def test_a_report_shows_every_setting(tmp_path):
    configs = [
        {"flip": flip, "lr": 0.1, "name": None, "multipliers": [1, 2], "space": object()}
        for flip in (True, False)
    ]
    named = zip(("a", "b"), configs, strict=True)
    section = charts.settings_section([analysis.Model(k, None, None, c, None, tmp_path) for k, c in named])
    (page,) = charts.pages_of([section])
    (table,) = [line for line in texts_of(charts.draw_page(page)) if line.startswith("setting")]
    rows = [line.split() for line in table.splitlines()]
    assert ["flip", "True", "False"] in rows and {row[0] for row in rows[1:]} == {"flip", "lr", "multipliers"}


def test_report_tells_on_its_page_why_a_study_is_left_out(analyse, runs, monkeypatch):
    monkeypatch.setattr(analysis, "REPORT", [("2.c", "guidance")])
    result = analyse("report", runs / "ddpm_digits", "--out", "o")
    assert result.code == 0 and "guidance is left out" in result.err and "--classifier RUN" in result.err


def test_the_figure_of_another_script_or_what_it_says(runs, tmp_path):
    flags = ["--sample", 3, "--sample-steps", 2, "--device", "cpu", "--checkpoint"]
    (figure,) = analysis.runs.figure_of("ddpm.py", *flags, runs / "ddpm_digits")
    assert figure.width > 2 * 96
    shutil.copytree(runs / "ddpm_digits", tmp_path / "o'brien's run")  # which is printed with quotes
    (figure,) = analysis.runs.figure_of("ddpm.py", *flags, tmp_path / "o'brien's run")
    assert figure.width > 2 * 96
    with pytest.raises(UserError, match="no checkpoint nowhere"):
        analysis.runs.figure_of("ddpm.py", *flags, "nowhere")


def test_without_matplotlib_grids_and_tables_are_written_and_one_line_says_what_to_install(
    analyse, runs, tmp_path, monkeypatch, drawn
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for study, flags in (("noise", STUDIES["noise"]), ("losses", STUDIES["losses"])):
        result = run_study(analyse, runs, study, flags, "--out", "o")
        assert "pip install matplotlib" in error_line(result)
        assert (tmp_path / f"o/{study}.csv").is_file() and (tmp_path / f"o/{study}_curves.csv").is_file()
    assert (tmp_path / "o/noise.png").is_file() and not (tmp_path / "o/losses.png").exists()
    result = analyse("schedules", "--out", "o")
    assert "pip install matplotlib" in error_line(result) and (tmp_path / "o/schedules.csv").is_file()
    result = analyse("report", runs / "ddpm_digits", "--out", "p")  # says so at once
    assert "pip install matplotlib" in error_line(result) and not [*(tmp_path / "p").glob("*")]


# errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("nosuch", "invalid choice"),
        ("", "STUDY"),
        ("noise", "takes one run"),
        ("noise nowhere", "no checkpoint nowhere"),
        ("noise {denoiser_digits}", "'denoiser'"),
        ("noise {ddpm_digits} --levels 30", "t runs from 1 to 20"),
        ("noise {ddpm_digits} --samplers euler", "'euler' is none of"),
        ("noise {ddpm_digits} --classifier {c16}", "--image-size 16"),
        ("noise {ddpm_digits} --classifier {ddpm_digits}", "'classifier' one is needed"),
        ("noise {ddpm_digits} --image none.png", "there is no such file"),
        ("noise {ddpm_digits} --image text.png", "can't be read as an image"),
        ("noise {ddpm_digits} --data-root x --cache-dir", "expected one argument"),
        ("forward --image plain.png", "of a single colour"),
        ("denoise {ddpm_digits} {p2}", "one of each"),
        ("guidance {ddpm_digits}", "--classifier RUN"),
        ("guidance {text} --labels 1", "--prompt"),
        ("guidance {ddpm_conditional_digits} --labels eleven", "no class of the model"),
        ("guidance {text} --classifier {classifier_digits}", "captions"),
        ("evaluate {ddpm_digits}", "--task classifier --dataset digits"),
        ("evaluate {ddpm_digits} {text} --classifier {classifier_digits}", "compare runs of the same data"),
        (
            "evaluate {ddpm_digits} --classifier {classifier_digits} --samples 500",
            "takes 1000, and there are 200",
        ),
        (
            "evaluate {ddpm_digits} --classifier {classifier_digits} --samples 10 --sample-steps 2",
            "at least 17",
        ),
        ("losses", "at least one run"),
        ("score {ddpm_digits} {p2}", "one run at most"),
        ("score --classifier {classifier_digits}", "name a RUN"),
        ("samplers {ddpm_digits} --samples 30", "--classifier RUN"),
        (
            "samplers {ddpm_digits} --classifier {classifier_digits} --samples 16",
            "at least 17 samples, not 16",
        ),
        ("denoise {ddpm_digits} --image-size 16", "--image-size comes from the run"),
        ("denoise {ddpm_digits} --schedule cosine", "--schedule comes from the run"),
        ("noise {ddpm_digits} --image plain.png --images 3", "leave it out beside --image"),
        ("noise {ddpm_digits} --levels 3 --snr 1", "leave it out beside --levels"),
        ("report {ddpm_digits} --classifier {c16}", "--image-size 16"),
    ],
)
def test_errors_are_one_line(analyse, runs, tmp_path, arguments, says):
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "plain.png")
    names = {path.name: str(path) for path in runs.iterdir()}
    result = analyse(*arguments.format(**names).split())
    assert says in error_line(result)


def test_a_data_set_that_moved_is_told(analyse, runs):
    """The run knows where its data were; where they are not, --data-root is asked for."""
    state = torch.load(runs / "ddpm_digits/ckpt.pt", weights_only=True)
    state["config"]["dataset"], state["config"]["data_root"] = "folder", "gone"
    torch.save(state, "ckpt.pt")
    assert "--data-root" in error_line(analyse("losses", "ckpt.pt"))


def test_a_judge_that_knows_other_noise_judges_but_does_not_guide(analyse, runs, tmp_path):
    state = torch.load(runs / "classifier_digits/ckpt.pt", weights_only=True)
    state["config"]["schedule"] = "linear"
    torch.save(state, "linear.pt")
    flags = ["--per-label", 3, "--guidance-scale", "1", "--sample-steps", 2, "--out", "o"]
    result = analyse("guidance", runs / "ddpm_conditional_digits", "--classifier", "linear.pt", *flags)
    assert result.code == 0 and "no classifier guidance" in result.err and "--schedule linear" in result.err
    assert [row["guidance"] for row in rows_of(tmp_path / "o/guidance.csv")] == ["cfg", "real images"]
    told = error_line(
        analyse(
            "guidance", runs / "ddpm_conditional_digits", "--guide", "linear.pt", *flags, "--per-label", 2
        )
    )
    assert "--schedule linear" in told


def test_few_images_of_each_label_leave_the_frechet_distance_out(analyse, runs, tmp_path):
    flags = "ddpm_conditional_digits --labels 3,7 --per-label 2 --guidance-scale 1 --sample-steps 2"
    result = run_study(analyse, runs, "guidance", flags, "--out", "o")
    assert result.code == 0 and "takes more than 16 images" in result.out, result.err
    rows = rows_of(tmp_path / "o/guidance.csv")
    assert "frechet" not in rows[0] and rows[0]["accuracy"] != ""
    assert {row["n"] for row in rows} == {"4"}


def test_a_conditional_model_gets_the_label_of_each_image_and_the_figure_says_so(analyse, runs, monkeypatch):
    seen, denoiser = [], Diffusion.denoiser
    monkeypatch.setattr(
        Diffusion, "denoiser", lambda self, net, y=None: seen.append(y) or denoiser(self, net, y)
    )
    for study in ("losses", "noise", "denoise"):
        seen.clear()
        more = ["--samplers", "ddpm,ddim", "--sample-steps", 2] if study == "noise" else []
        result = analyse(study, runs / "ddpm_conditional_digits", "--images", 3, *more, "--out", "o")
        assert result.code == 0 and "gets the label of each image" in result.out, result.err
        data = utils.get_data("digits", image_size=8, limit=200)
        labels = data.labels[torch.randperm(200, generator=generator(0))[:3]]
        assert seen
        for y in seen:  # each image has its own label at every level, in every draw
            assert torch.equal(y, labels.repeat(len(y) // 3) if len(y) > 1 else labels[:1])
    result = analyse("losses", runs / "p2", "--images", 4, "--out", "o")
    assert "condition" not in result.err + result.out
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save("mine.png")
    result = analyse("losses", runs / "ddpm_conditional_digits", "--image", "mine.png", "--out", "o")
    assert result.code == 0 and "the null condition" in result.err, result.err


def test_samplers_of_a_conditional_model_draw_its_classes_in_turn(analyse, runs, monkeypatch):
    seen, denoiser = [], Diffusion.denoiser
    monkeypatch.setattr(
        Diffusion, "denoiser", lambda self, net, y=None: seen.append(y) or denoiser(self, net, y)
    )
    flags = ["--samplers", "ddim", "--schedules", "linear", "--out", "o"]
    result = analyse("samplers", runs / "ddpm_conditional_digits", *flags)
    assert result.code == 0 and "its classes or example captions in turn" in result.out, result.err
    assert seen and all(y.tolist() == list(range(8)) for y in seen)
    seen.clear()
    result = analyse("samplers", runs / "ddpm_digits", *flags)
    assert result.code == 0 and "conditional" not in result.out and set(seen) == {None}


def test_claims_about_guidance_are_answered_by_the_table():
    row = {"guidance": "cfg", "diversity": 0.2, "sharpness": 0.02, "contrast": 0.3}
    rows = [row | {"scale": 1.0}, row | {"scale": 5.0, "diversity": 0.1, "sharpness": 0.01}]
    strong = "sharper: no (sharpness 0.02 to 0.01), less diverse: yes (diversity 0.2 to 0.1)"
    assert analysis.claims(rows) == [f"cfg, scale 5 beside 1, too strong? {strong}"]
    rows.append(row | {"scale": 0.0, "sharpness": 0.01, "accuracy": 0.1})
    rows[0]["accuracy"] = 0.9
    rows[1]["diversity"] = 0.1999  # what an untrained model may give
    assert "less diverse: no" in analysis.claims(rows[:2])[0]
    weak = analysis.claims(rows)[1]
    assert "too weak" in weak and "blurry: yes" in weak and "random: yes (accuracy 0.9 to 0.1)" in weak


def test_guidance_shows_batches_of_a_prompt_as_rows_and_scales_as_columns(analyse, runs, monkeypatch):
    shown = []
    monkeypatch.setattr(analysis, "make_grid", lambda *a: shown.append(a) or Image.new("RGB", (9, 9)))
    flags = "--show 3 --batches 2 --guidance-scale 1,3 --sample-steps 2 --per-label 1 --out o".split()
    assert analyse("guidance", runs / "text", "--prompt", "a red circle", "a blue square", *flags).code == 0
    x, _, columns, rows, heads = shown[0]
    assert len(x) == 2 * 2 * 2 * 3 and columns == 2 * 3 and heads == ["scale 1", "scale 3"]
    assert rows == [f"{text}, batch {b}" for text in ("a red circle", "a blue square") for b in (1, 2)]
    assert len({tuple(one.flatten().tolist()) for one in x}) == len(x)  # no draw is shown twice


def test_comparing_runs_names_the_nearest_and_says_how_guidance_works(analyse, runs):
    result = run_study(analyse, runs, "evaluate", STUDIES["evaluate"], "--out", "o")
    assert "nearest to real images: " in result.out and "eps_u + s (eps_c - eps_u)" in result.out
    flags = "ddpm_digits --samples 60 --sample-steps 3 --out o"
    assert "eps_u" not in run_study(analyse, runs, "evaluate", flags).out  # one run is compared with none


@pytest.mark.parametrize("study", ["samplers", "score"])
def test_quality_is_measured_on_what_a_small_data_set_allows(analyse, runs, study, tmp_path):
    """200 images: 128 samples would take 256; 100 are drawn."""
    flags = " ".join(part for part in STUDIES[study].split() if part not in ("--samples", "30"))
    flags += " --samplers ddim" if study == "samplers" else ""
    result = run_study(analyse, runs, study, flags, "--out", "o")
    assert result.code == 0, result.err
    assert {row["n"] for row in rows_of(tmp_path / f"o/{study}.csv")} - {"1000", ""} == {"100"}


def test_nothing_is_kept_of_a_band_that_the_image_has_nothing_in():
    wave = (2 * math.pi / 16 * torch.arange(32.0)).cos().expand(1, 1, 32, 32)
    low, middle, high = measures.kept_bands(wave + 0.1 * images(1, 1, 32, 32), wave)
    assert low == pytest.approx(1, abs=0.05) and middle.isnan() and high.isnan()


def test_levels_are_times_of_the_run_and_defaults_are_scaled():
    assert analysis.chosen_levels(None, (250, 500, 750), 1000) == [750, 500, 250]
    assert analysis.chosen_levels(None, (250, 500, 750), 20) == [15, 10, 5]
    assert analysis.chosen_levels([3, 9, 3], (250,), 20) == [9, 3]
    with pytest.raises(UserError, match="from 1 to 20"):
        analysis.chosen_levels([21], (250,), 20)


def test_a_real_face_at_256_needs_no_network(analyse, data_root, tmp_path):
    face = image_files(data_root / "faces", recursive=True)[0]
    flags = ["--image", face, "--image-size", 256, "--out", "o"]
    assert analyse("forward", *flags, "--schedules", "linear,cosine", "--noise-steps", 40).code == 0
    assert Image.open(tmp_path / "o/forward.png").width > 7 * 256
    assert analyse("denoise", *flags, "--levels", "250,500").code == 0
    rows = {(r["noise"], r["denoised by"]): r for r in rows_of(tmp_path / "o/denoise.csv")}
    blurs = [f"blur {256 // n}" for n in (32, 16, 8)]
    for t in ("t = 250", "t = 500"):  # a blur gains much on a photograph
        best = max(blurs, key=lambda blur, t=t: float(rows[t, blur]["psnr"]))
        assert float(rows[t, best]["psnr"]) > float(rows[t, "noisy"]["psnr"]) + 8
        assert [blur for blur in blurs if rows[t, blur]["best"]] == [best]
