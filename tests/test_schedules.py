"""The beta schedules: their closed forms, and that they keep their shape for any T."""

import math

import pytest
import torch
from conftest import TINY

from ddpm import Diffusion
from utils import SCHEDULES

NAMES = ("linear", "cosine", "quadratic", "sigmoid", "constant", "jsd", "laplace", "flow")
STEPS = (2, 3, 10, 50, 100, 300, 1000, 4000)


@pytest.mark.parametrize("name", SCHEDULES)  # any that you add is tested as well
def test_betas_are_betas_and_signal_only_falls(name):
    for T in STEPS:
        betas, alpha_bar = SCHEDULES[name](T), Diffusion(T, name).alpha_bar
        assert betas.shape == (T,) and betas.dtype == torch.float64
        assert (betas > 0).all() and (betas < 1).all()
        assert alpha_bar.shape == (T + 1,) and alpha_bar[0] == 1
        assert (alpha_bar.diff() < 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_all_signal_becomes_noise(name):
    for T in STEPS:
        assert (
            T == 3 or Diffusion(T, name).alpha_bar[-1] < 2e-3
        )  # linear betas for T = 1000 leave 0.05 at 300


@pytest.mark.parametrize("name", NAMES)
def test_shape_does_not_depend_on_T(name):
    coarse, fine = Diffusion(500, name).alpha_bar, Diffusion(2000, name).alpha_bar
    assert (coarse - fine[::4]).abs().max() < 0.02


def test_a_schedule_that_keeps_signal_is_used_with_a_note(cli, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "mine", lambda T: torch.full((T,), 0.01, dtype=torch.float64))
    result = cli(*TINY, "--epochs", "1", "--schedule", "mine")
    assert result.code == 0 and "note: schedule mine leaves" in result.err
    assert "schedule" not in cli(*TINY, "--epochs", "1", "--schedule", "linear").err


def test_linear():
    betas = SCHEDULES["linear"](1000)
    assert betas[0].item() == pytest.approx(1e-4) and betas[-1].item() == pytest.approx(0.02)
    assert torch.allclose(betas.diff(), (betas[-1] - betas[0]) / 999)
    assert SCHEDULES["linear"](300)[0].item() == pytest.approx(1e-4 * 1000 / 300)


def test_quadratic_root_is_linear():
    roots = SCHEDULES["quadratic"](1000).sqrt()
    assert roots[0].item() == pytest.approx(0.01) and roots[-1].item() == pytest.approx(0.02**0.5)
    assert torch.allclose(roots.diff(), (roots[-1] - roots[0]) / 999)


def test_sigmoid():
    betas = SCHEDULES["sigmoid"](1001)
    assert betas[500].item() == pytest.approx((1e-4 + 0.02) / 2 * 1000 / 1001)  # its middle
    inner = (betas * 1001 / 1000 - 1e-4) / (0.02 - 1e-4)
    assert torch.allclose(inner.logit(), torch.linspace(-6, 6, 1001, dtype=torch.float64))


def test_constant():
    betas = SCHEDULES["constant"](1000)
    assert (betas == betas[0]).all()
    same = Diffusion(1000, "linear").alpha_bar[-1].log()
    assert Diffusion(1000, "constant").alpha_bar[-1].log() == pytest.approx(same.item(), rel=0.01)


def test_jsd_alpha_bar_is_a_straight_line():
    T = 1000
    alpha_bar = Diffusion(T, "jsd").alpha_bar
    assert torch.allclose(alpha_bar[:-1], 1 - torch.arange(T, dtype=torch.float64) / T)


def test_cosine():
    alpha_bar, s = Diffusion(1000, "cosine").alpha_bar, 0.008
    for t in (1, 250, 500, 900):
        f = math.cos((t / 1000 + s) / (1 + s) * math.pi / 2) ** 2
        assert alpha_bar[t].item() == pytest.approx(f / math.cos(s / (1 + s) * math.pi / 2) ** 2)


def test_laplace():
    alpha_bar, b = Diffusion(1000, "laplace").alpha_bar, 0.5
    log_snr = (alpha_bar / (1 - alpha_bar)).log()
    assert log_snr[500].item() == pytest.approx(0, abs=1e-9)
    for t in (100, 300):  # quantiles of a Laplace distribution of scale b
        assert log_snr[t].item() == pytest.approx(-b * math.log(2 * t / 1000))
        assert log_snr[1000 - t].item() == pytest.approx(b * math.log(2 * t / 1000))


def test_flow_is_the_straight_line_rescaled():
    alpha_bar = Diffusion(1000, "flow").alpha_bar
    for t in (1, 100, 500, 999):
        u = t / 1000
        norm = math.hypot(1 - u, u)
        assert alpha_bar[t].sqrt().item() == pytest.approx((1 - u) / norm)
        assert (1 - alpha_bar[t]).sqrt().item() == pytest.approx(u / norm)


def test_a_schedule_of_ones_own(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "mine", lambda T: torch.full((T,), 0.5, dtype=torch.float64))
    assert Diffusion(3, "mine").alpha_bar.tolist() == [1, 0.5, 0.25, 0.125]
