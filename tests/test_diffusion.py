"""The forward process, the conversions between eps, x_0 and v, and the weighted loss."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from ddpm import Diffusion, DiffusionSettings, clip_x_0
from support.generators import randn_like
from utils import SCHEDULES, WEIGHTINGS, p2

PREDICTIONS = ["eps", "x_0", "v"]


def batch(B=6, T=1000, seed=0):
    g = torch.Generator().manual_seed(seed)
    x_0 = torch.randn(B, 2, 4, 4, generator=g, dtype=torch.float64)
    t = torch.randint(1, T + 1, (B,), generator=g)
    return x_0, t, g


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_images_is_equation_4(schedule):
    diffusion = Diffusion(1000, schedule)
    x_0, t, g = batch()
    x_t, eps = diffusion.noise_images(x_0, t, g)
    for i in range(len(x_0)):
        ab = diffusion.alpha_bar[t[i]]
        assert torch.allclose(x_t[i], ab.sqrt() * x_0[i] + (1 - ab).sqrt() * eps[i])
    at_0, _ = diffusion.noise_images(x_0, torch.zeros_like(t), g)
    assert torch.equal(at_0, x_0)


def test_noising_keeps_the_variance_of_unit_variance_data():
    diffusion = Diffusion()
    g = torch.Generator().manual_seed(0)
    x_0 = torch.randn(4, 1, 200, 200, generator=g)
    x_t, _ = diffusion.noise_images(x_0, torch.tensor([1, 200, 500, 1000]), g)
    assert torch.allclose(x_t.var(dim=(1, 2, 3)), torch.ones(4), atol=0.03)


def test_many_small_steps_are_one_large_one():
    """q(x_t | x_{t-1}) composed t times (DDPM, eq. 2) has the mean and variance of q(x_t | x_0) (eq. 4)."""
    T = 100
    betas, alpha_bar = SCHEDULES["cosine"](T), Diffusion(T, "cosine").alpha_bar
    mean, variance = 1.0, 0.0
    for t in range(1, T + 1):
        mean, variance = (1 - betas[t - 1]) ** 0.5 * mean, (1 - betas[t - 1]) * variance + betas[t - 1]
        assert mean == pytest.approx(alpha_bar[t].sqrt().item())
        assert variance == pytest.approx(1 - alpha_bar[t].item())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_invert_target(schedule, prediction):
    diffusion = Diffusion(1000, schedule, prediction)
    x_0, t, g = batch(T=990)  # at the very end eps -> x_0 divides by almost nothing
    x_t, eps = diffusion.noise_images(x_0, t, g)
    out = diffusion.target(x_0, eps, t)
    eps_back = diffusion.eps_from_output(x_t, out, t)
    assert torch.allclose(eps_back, eps, atol=1e-8)
    assert torch.allclose(diffusion.x_0_from_eps(x_t, eps_back, t), x_0, atol=1e-8)
    assert torch.allclose(diffusion.eps_from_x_0(x_t, x_0, t), eps, atol=1e-8)
    assert torch.equal(diffusion.denoiser(lambda x, t, y: out)(x_t, t), eps_back)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dual_is_the_mean_of_least_variance(schedule):
    """Of an eps and an x_0 with independent errors, whose variances are as 0.03 to 1."""
    diffusion = Diffusion(1000, schedule, "dual")
    x_0, t, g = batch()
    x_t, eps = diffusion.noise_images(x_0, t, g)
    assert torch.allclose(diffusion.eps_from_output(x_t, torch.cat([eps, x_0], dim=1), t), eps, atol=1e-8)
    ones = torch.ones_like(x_0)  # an error of each in turn, of one standard deviation
    from_eps = diffusion.eps_from_output(x_t, torch.cat([eps + 0.03**0.5 * ones, x_0], dim=1), t) - eps
    from_x_0 = diffusion.eps_from_output(x_t, torch.cat([eps, x_0 + ones], dim=1), t) - eps
    variance = from_eps**2 + from_x_0**2
    snr = diffusion.snr[t].view(-1, 1, 1, 1)
    assert torch.allclose(1 / variance, 1 / 0.03 + 1 / snr)  # the law of inverse variances


def test_v_is_the_velocity():
    """v = d x_t / d phi with sqrt(alpha_bar) = cos phi (Salimans & Ho 2022, appendix D)."""
    diffusion = Diffusion(prediction="v")
    x_0, t, g = batch()
    eps = torch.randn(x_0.shape, generator=g, dtype=x_0.dtype)
    phi = diffusion.alpha_bar[t].sqrt().acos().view(-1, 1, 1, 1)
    step = 1e-6
    ahead, behind = ((phi + d).cos() * x_0 + (phi + d).sin() * eps for d in (step, -step))
    assert torch.allclose(diffusion.target(x_0, eps, t), (ahead - behind) / (2 * step), atol=1e-8)


def test_denoiser_closes_over_the_condition():
    diffusion = Diffusion(prediction="eps")
    x_0, t, _ = batch()
    y = torch.arange(len(x_0))
    seen = []

    def net(x, t, y=None):
        seen.append((t, y))
        return x

    assert torch.equal(diffusion.denoiser(net, y)(x_0, t), x_0)
    assert seen[0][1] is y and torch.equal(seen[0][0], t)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_clip_x_0(schedule):
    diffusion = Diffusion(1000, schedule)
    x_0, t, g = batch()
    x_t, eps = diffusion.noise_images(x_0, t, g)
    clipped = clip_x_0(diffusion, lambda x, t: eps)(x_t, t)
    assert torch.allclose(diffusion.x_0_from_eps(x_t, clipped, t), x_0.clamp(-1, 1), atol=1e-6)


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "dual"])
@pytest.mark.parametrize("clip", [False, True])
def test_float32_rounds_x_0_little(prediction, clip):
    """The bounds of clip_x_0's docstring: output -> eps -> x_0, and clipped -> eps -> x_0 again."""
    diffusion, g = Diffusion(1000, "cosine", prediction), torch.Generator().manual_seed(0)
    for time, bound in ((1000, 0.005), (980, 2e-5), (500, 2e-5), (20, 2e-5), (1, 2e-5)):
        x_0, t = torch.rand(64, 3, 32, 32, generator=g) * 2 - 1, torch.full((64,), time)
        x_t, eps = diffusion.noise_images(x_0, t, g)
        out, signal, noise = diffusion.target(x_0, eps, t), diffusion.signal[time], diffusion.noise[time]
        share = 0.03 / (0.03 + diffusion.snr[time])  # of x_0 in dual, whose outputs are not consistent here
        from_eps, from_x_0 = (x_t.double() - noise * eps.double()) / signal, 0.7 * x_0
        exact = {  # in float64, of the float32 numbers that the network gives
            "eps": (x_t.double() - noise * out.double()) / signal,
            "x_0": out.double(),
            "v": signal * x_t.double() - noise * out.double(),
            "dual": (1 - share) * from_eps + share * from_x_0.double(),
        }[prediction]
        out = torch.cat([eps, from_x_0], dim=1) if prediction == "dual" else out
        eps_theta = diffusion.denoiser(lambda *_, out=out: out)
        if clip:
            eps_theta, exact = clip_x_0(diffusion, eps_theta), exact.clamp(-1, 1)
        back = diffusion.x_0_from_eps(x_t, eps_theta(x_t, t), t)
        assert back.dtype == torch.float32 and (back - exact).abs().max() < bound


SNR = torch.logspace(-4, 4, 50, dtype=torch.float64)


def test_weightings():
    assert (WEIGHTINGS["simple"](SNR) == 1).all()
    assert torch.allclose(WEIGHTINGS["p2"](SNR, gamma=0.5, k=2.0), (2 + SNR) ** -0.5)
    assert torch.allclose(WEIGHTINGS["min_snr"](SNR, gamma=5.0), torch.minimum(5 / SNR, torch.ones_like(SNR)))
    clamped = torch.maximum(WEIGHTINGS["min_snr"](SNR), WEIGHTINGS["x_0"](SNR))  # whichever is more
    assert torch.allclose(WEIGHTINGS["clamped_snr"](SNR), clamped)
    assert torch.allclose(WEIGHTINGS["x_0"](SNR), 1 / SNR)
    assert torch.allclose(WEIGHTINGS["v"](SNR), 1 + 1 / SNR)


def loss_of(diffusion, x_0, seed=3):
    """The loss of a network whose output is 0.3 everywhere, and its inputs x_t, the eps in them, and t."""
    inputs, outputs = [], 2 if diffusion.prediction == "dual" else 1

    def net(x_t, t, y=None):
        inputs.extend((x_t, t))
        return torch.full_like(x_t, 0.3).repeat(1, outputs, 1, 1)

    loss = diffusion.loss(net, x_0, generator=torch.Generator().manual_seed(seed))
    x_t, t = inputs
    return loss, x_t, diffusion.eps_from_x_0(x_t, x_0, t), t


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_default_loss_is_plain_mse_on_the_prediction(prediction):
    diffusion = Diffusion(prediction=prediction)
    x_0, _, _ = batch()
    loss, _, eps, t = loss_of(diffusion, x_0)
    assert loss.item() == pytest.approx(
        (0.3 - diffusion.target(x_0, eps, t)).square().mean().item(), rel=1e-6
    )


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "dual"])
@pytest.mark.parametrize("weighting", [*WEIGHTINGS, partial(p2, gamma=0.5, k=3.0)])
def test_a_weighting_is_the_weight_of_the_error_of_eps(prediction, weighting):
    diffusion = Diffusion(prediction=prediction, weighting=weighting)
    x_0, _, _ = batch()
    loss, x_t, eps, t = loss_of(diffusion, x_0)
    out = torch.full_like(x_t, 0.3).repeat(1, 2 if prediction == "dual" else 1, 1, 1)
    eps_predicted = diffusion.eps_from_output(x_t, out, t)
    alpha_bar = diffusion.alpha_bar[t]
    w = WEIGHTINGS.get(weighting, weighting)(alpha_bar / (1 - alpha_bar))
    expected = (w * (eps_predicted - eps).square().mean(dim=(1, 2, 3))).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_plain_mse_of_dual_is_that_of_its_eps():
    assert (Diffusion(prediction="dual").weight[1:] == 1).all()


def test_loss_draws_every_t_from_1_to_T_alike():
    diffusion = Diffusion(noise_steps=5)
    t = diffusion.sample_timesteps(torch.empty(50000, 1), torch.Generator().manual_seed(0))
    counts = t.bincount(minlength=6)
    assert counts[0] == 0 and len(counts) == 6 and (counts[1:] - 10000).abs().max() < 400  # 4 sigma: 358


def test_loss_depends_on_the_generator_alone():
    diffusion = Diffusion()
    x_0, _, _ = batch()
    torch.manual_seed(1)
    first = loss_of(diffusion, x_0)[0]
    torch.manual_seed(2)
    assert torch.equal(first, loss_of(diffusion, x_0)[0])
    assert not torch.equal(first, loss_of(diffusion, x_0, seed=4)[0])


def test_one_generator_for_each_image():
    x = torch.empty(3, 1, 4, 4)
    together = randn_like(x, [torch.Generator().manual_seed(i) for i in range(3)])
    alone = randn_like(x[:1], [torch.Generator().manual_seed(2)])
    assert torch.equal(together[2:], alone)


@pytest.mark.parametrize("T, steps", [(1000, 1), (1000, 7), (1000, 1000), (2, 2), (10, 7), (999, 500)])
def test_timesteps(T, steps):
    timesteps = Diffusion(T).timesteps(steps)
    assert timesteps[0] == T and timesteps[-1] == 0 and len(timesteps) == steps + 1
    strides = [t - s for t, s in pairwise(timesteps)]
    assert min(strides) >= 1 and max(strides) - min(strides) <= 1


def test_defaults_are_those_of_the_command_line():
    by_default, settings = Diffusion(), DiffusionSettings()
    named = Diffusion(settings.noise_steps, settings.schedule, settings.prediction, settings.weighting)
    assert by_default.prediction == named.prediction
    assert torch.equal(by_default.alpha_bar, named.alpha_bar)
    assert torch.equal(by_default.weight, named.weight)


def test_bad_settings():
    bad_names = (dict(prediction="x"), dict(schedule="x"), dict(weighting="x"))
    for bad in (dict(noise_steps=1), *bad_names):
        with pytest.raises(ValueError):
            Diffusion(**bad)
    for steps in (0, 1001):
        with pytest.raises(ValueError):
            Diffusion().timesteps(steps)
