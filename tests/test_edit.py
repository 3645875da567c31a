"""Edits: closed forms where the data are Gaussian, and what a user sees of each task."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import TINY, error_line, run_in
from PIL import Image
from test_samplers import heun

import ddpm
import ddpm_conditional
import edit
from ddpm import SAMPLERS, Diffusion
from support import operators

T = 100
MU = torch.tensor([0.3, -0.5], dtype=torch.float64)
SIGMA = torch.tensor([[0.5, 0.35], [0.35, 0.4]], dtype=torch.float64)  # the two pixels are correlated
KNOWN = 0.9  # the first pixel; the second is the hole
CONDITIONAL_MEAN = (MU[1] + SIGMA[1, 0] / SIGMA[0, 0] * (KNOWN - MU[0])).item()
CONDITIONAL_VARIANCE = (SIGMA[1, 1] - SIGMA[1, 0] ** 2 / SIGMA[0, 0]).item()
HOLE = torch.tensor([False, True]).view(1, 1, 1, 2)


def gain(diffusion, t):
    """K_t of the ideal denoiser eps = K_t (x_t - sqrt(ab) mu), for x_0 ~ N(mu, Sigma)."""
    ab = diffusion.alpha_bar[t]
    return (1 - ab).sqrt() * torch.linalg.inv(ab * SIGMA + (1 - ab) * torch.eye(2, dtype=torch.float64))


def ideal(diffusion):
    """The ideal denoiser, of any times t (B,)."""
    gains = torch.stack(
        [torch.zeros(2, 2, dtype=torch.float64), *(gain(diffusion, t) for t in range(1, diffusion.T + 1))]
    )

    def eps_theta(x_t, t):
        x = x_t.flatten(1) - diffusion.alpha_bar[t].sqrt()[:, None] * MU
        return torch.einsum("bij,bj->bi", gains[t], x).view(x_t.shape)

    return eps_theta


def stride(diffusion, sampler, t, s):
    """(a, b, variance) of a stride x_s = a x_t + b eps + noise, from DDIM eq. 12 and DDPM eq. 7 and 11."""
    ab_t, ab_s = diffusion.alpha_bar[t].item(), diffusion.alpha_bar[s].item()
    if sampler == "ddim":
        a = math.sqrt(ab_s / ab_t)
        return a, math.sqrt(1 - ab_s) - a * math.sqrt(1 - ab_t), 0.0
    alpha = ab_t / ab_s
    a = 1 / math.sqrt(alpha)
    return a, -a * (1 - alpha) / math.sqrt(1 - ab_t), (1 - alpha) * (1 - ab_s) / (1 - ab_t)


def inpainting_recursion(diffusion, sampler, timesteps, resample=1, jump=1):
    """Mean and variance of the hole's pixel, replacement drawing the known one anew at each evaluation."""
    mean, variance = 0.0, 1.0  # of x_T

    def along(segment):
        nonlocal mean, variance
        for t, s in pairwise(segment):
            a, b, fresh = stride(diffusion, sampler, t, s)
            K, ab = gain(diffusion, t), diffusion.alpha_bar[t].item()
            known = math.sqrt(ab) * (KNOWN - MU[0].item())  # its mean; its variance is 1 - ab
            off = K[1, 1].item() * (mean - math.sqrt(ab) * MU[1].item()) + K[1, 0].item() * known
            mean = a * mean + b * off
            c = a + b * K[1, 1].item()
            variance = c * c * variance + (b * K[1, 0].item()) ** 2 * (1 - ab) + fresh

    if resample == 1:
        along(timesteps)
        return mean, variance
    down = timesteps[:-1]
    for first in range(0, len(down) - 1, jump):
        part = down[first : first + jump + 1]
        for u in range(resample):
            along(part)
            if u < resample - 1:
                alpha = (diffusion.alpha_bar[part[0]] / diffusion.alpha_bar[part[-1]]).item()
                mean, variance = math.sqrt(alpha) * mean, alpha * variance + 1 - alpha
    along(timesteps[-2:])
    return mean, variance


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("resample, jump", [(1, 1), (3, 1), (2, 4)])
def test_inpainting_has_the_moments_of_its_recursion(sampler, resample, jump):
    diffusion, n = Diffusion(T, "cosine"), 100_000
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(n, 1, 1, 2, dtype=torch.float64, generator=generator)
    x_0 = torch.full((n, 1, 1, 2), KNOWN, dtype=torch.float64)
    way = diffusion.timesteps(10)
    parts = edit.segments(way, resample, jump)
    x = edit.inpaint(diffusion, SAMPLERS[sampler], ideal(diffusion), x_T, parts, x_0, HOLE, generator)
    assert torch.equal(x[..., 0], x_0[..., 0])
    hole = x[..., 1].flatten()
    mean, variance = inpainting_recursion(diffusion, sampler, way, resample, jump)
    assert abs(hole.mean().item() - mean) < 5 * math.sqrt(variance / n)
    assert abs(hole.var().item() - variance) < 5 * variance * math.sqrt(2 / n)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_resampling_brings_the_hole_nearer_to_the_conditional(sampler):
    """By the recursion, with many more repetitions, and in what edit.inpaint draws."""
    diffusion = Diffusion(T, "cosine")
    way, bias = diffusion.timesteps(50), []
    for resample in (1, 2, 5, 20):
        mean, variance = inpainting_recursion(diffusion, sampler, way, resample)
        assert CONDITIONAL_VARIANCE / 2 < variance < SIGMA[1, 1]
        bias.append(abs(mean - CONDITIONAL_MEAN))
    assert bias == sorted(bias, reverse=True)
    assert bias[-1] < bias[0] / 5

    n, drawn = 20_000, []
    for resample in (1, 5):
        generator = torch.Generator().manual_seed(0)
        x_T = torch.randn(n, 1, 1, 2, dtype=torch.float64, generator=generator)
        x_0 = torch.full((n, 1, 1, 2), KNOWN, dtype=torch.float64)
        parts = edit.segments(way, resample, 1)
        x = edit.inpaint(diffusion, SAMPLERS[sampler], ideal(diffusion), x_T, parts, x_0, HOLE, generator)
        drawn.append(abs(x[..., 1].mean().item() - CONDITIONAL_MEAN))
    assert drawn[1] < drawn[0] / 2


def test_only_resampling_cuts_the_timesteps_into_parts():
    """Else a multistep sampler keeps its history."""
    assert edit.segments([9, 6, 3, 0], 1, 2) == [([9, 6, 3, 0], 1)]
    assert edit.segments([9, 7, 5, 3, 1, 0], 4, 2) == [([9, 7, 5], 4), ([5, 3, 1], 4), ([1, 0], 1)]
    assert edit.segments([9, 6, 3, 0], 4, 5) == [([9, 6, 3], 4), ([3, 0], 1)]
    assert edit.segments([9, 0], 4, 1) == [([9, 0], 1)]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_sdedit_has_the_moments_of_its_recursion(sampler):
    diffusion, n, image = Diffusion(T, "linear"), 100_000, torch.tensor([1.0, 0.4], dtype=torch.float64)
    way = [60, 40, 20, 5, 0]
    mean = diffusion.alpha_bar[60].sqrt() * image
    covariance = (1 - diffusion.alpha_bar[60]) * torch.eye(2, dtype=torch.float64)
    for t, s in pairwise(way):
        a, b, fresh = stride(diffusion, sampler, t, s)
        K = gain(diffusion, t)
        mean = a * mean + b * K @ (mean - diffusion.alpha_bar[t].sqrt() * MU)
        M = a * torch.eye(2) + b * K
        covariance = M @ covariance @ M.T + fresh * torch.eye(2)
    x_0, generator = image.view(1, 1, 1, 2).repeat(n, 1, 1, 1), torch.Generator().manual_seed(0)
    x = edit.sdedit(diffusion, SAMPLERS[sampler], ideal(diffusion), x_0, way, generator).flatten(1)
    error = (covariance.diagonal() / n).sqrt()
    assert ((x.mean(0) - mean).abs() < 5 * error).all()
    assert torch.allclose(x.T.cov(), covariance, atol=5 * math.sqrt(2 / n) * covariance.max().item())


def test_renoising_is_the_forward_process_between_two_times():
    """q(x_t | x_s) after q(x_s | x_0) is q(x_t | x_0)."""
    diffusion, n = Diffusion(T, "cosine"), 200_000
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.full((n, 1, 1, 1), 0.7, dtype=torch.float64)
    x_s, _ = diffusion.noise_images(x_0, torch.full((n,), 20), generator)
    x_t = edit.renoise(diffusion, x_s, 20, 70, generator)
    ab = diffusion.alpha_bar[70].item()
    assert x_t.mean().item() == pytest.approx(math.sqrt(ab) * 0.7, abs=5 * math.sqrt((1 - ab) / n))
    assert x_t.var().item() == pytest.approx(1 - ab, rel=5 * math.sqrt(2 / n))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_inversion_and_sampling_give_the_image_back(schedule):
    diffusion = Diffusion(1000, schedule)
    x_0 = torch.randn(64, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.7
    way = diffusion.timesteps(250)
    x_T = edit.ddim_inversion(diffusion, ideal(diffusion), x_0, way)
    assert (ddpm.ddim(diffusion, ideal(diffusion), x_T, way) - x_0).abs().max() < 1e-3
    # and x_T is what DDIM's linear map takes there: the image is not merely copied through
    M, c = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for t, s in pairwise(way):
        a, b, _ = stride(diffusion, "ddim", t, s)
        step = a * torch.eye(2) + b * gain(diffusion, t)
        M, c = step @ M, step @ c - b * gain(diffusion, t) @ MU * diffusion.alpha_bar[t].sqrt()
    expected = torch.linalg.solve(M, (x_0.flatten(1) - c).T).T
    assert torch.allclose(x_T.flatten(1), expected, atol=0.02)


def test_more_iterations_invert_better():
    diffusion = Diffusion(1000, "linear")
    x_0 = torch.randn(16, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    way, errors = diffusion.timesteps(20), []
    for iterations in (1, 2, 4, 8):
        x_T = edit.ddim_inversion(diffusion, ideal(diffusion), x_0, way, iterations)
        errors.append((ddpm.ddim(diffusion, ideal(diffusion), x_T, way) - x_0).abs().max().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 100


def test_slerp_stays_on_the_sphere_and_ends_where_it_should():
    a, b = torch.randn(2, 5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    for u in (0.0, 0.2, 0.5, 1.0):
        x = edit.slerp(a, b, torch.full((5,), u, dtype=torch.float64))
        assert torch.allclose(x.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
    assert torch.allclose(x, b)
    assert torch.allclose(edit.slerp(a, b, torch.zeros(5, dtype=torch.float64)), a)
    halves = edit.slerp(a, b, torch.full((5,), 0.5, dtype=torch.float64))
    assert torch.allclose(
        torch.cosine_similarity(halves.flatten(1), a.flatten(1)),
        torch.cosine_similarity(halves.flatten(1), b.flatten(1)),
    )
    assert torch.allclose(edit.slerp(a, a, torch.full((5,), 0.3, dtype=torch.float64)), a)  # no angle between


def random_denoiser(seed, channels=1):
    """Some smooth function of x_t and t, which is no symmetry of any view."""
    torch.manual_seed(seed)
    first, last = torch.nn.Conv2d(channels, 8, 3, padding=1), torch.nn.Conv2d(8, channels, 3, padding=1)
    net = torch.nn.Sequential(first, torch.nn.Tanh(), last).double()
    return lambda x_t, t: net(x_t) * (t.double() / T).view(-1, 1, 1, 1) + 0.3 * x_t


SQUARE = (1, 8, 8)


def view_of(name, shape=SQUARE):
    return edit.make_view(name, shape, pieces=4, seed=0)


@pytest.mark.parametrize("name", [*operators.VIEWS, "rotate270"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 12)])
def test_views_are_orthogonal_and_can_be_undone(name, shape):
    view = view_of(name, shape)
    numbers = math.prod(shape)
    matrix = view.see(torch.eye(numbers).view(numbers, *shape)).flatten(1)  # a row for each unit vector
    assert torch.equal(matrix @ matrix.T, torch.eye(numbers))
    assert torch.equal(view.undo(torch.eye(numbers).view(numbers, *shape)).flatten(1), matrix.T)
    assert not torch.equal(matrix, torch.eye(numbers))
    assert edit.is_isometry(view, shape)


@pytest.mark.parametrize(
    "view",
    [
        operators.View(lambda x: 2 * x, lambda x: x / 2),
        operators.View(lambda x: x.roll(1, 2), lambda x: x.roll(1, 2)),  # orthogonal, undone wrongly
        operators.View(lambda x: x[:, :, :4], lambda x: x),
        operators.View(*[partial(operators.low_pass, sigma=1)] * 2),
    ],
)
def test_other_views_are_no_isometry(view):
    assert not edit.is_isometry(view, SQUARE)


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "dpm_solver"])
@pytest.mark.parametrize("name", ["flip", "mirror", "rotate180", "negative"])
def test_an_anagram_of_one_condition_from_the_turned_noise_is_turned(sampler, name):
    """V V = 1 and one denoiser: eps_theta(V x) = V eps_theta(x), so sampling commutes with V."""
    diffusion, view = Diffusion(T, "cosine"), view_of(name)
    one = random_denoiser(0)
    eps_theta = ddpm.clip_x_0(diffusion, edit.anagram(one, one, view))
    x_T = torch.randn(3, *SQUARE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    way = diffusion.timesteps(8)
    there = SAMPLERS[sampler](diffusion, eps_theta, x_T, way)
    turned = SAMPLERS[sampler](diffusion, eps_theta, view.see(x_T), way)
    assert torch.allclose(turned, view.see(there), atol=1e-9)
    assert not torch.allclose(turned, there, atol=1e-2)


def test_an_anagram_is_the_mean_of_both_readings():
    eps_1, eps_2, view = random_denoiser(0), random_denoiser(1), view_of("rotate90")
    x, t = torch.randn(2, *SQUARE, dtype=torch.float64), torch.tensor([5, 70])
    turned_back = torch.rot90(eps_2(torch.rot90(x, 1, (2, 3)), t), -1, (2, 3))
    assert torch.allclose(edit.anagram(eps_1, eps_2, view)(x, t), (eps_1(x, t) + turned_back) / 2)


@pytest.mark.parametrize("size, width, sigma", [(64, 33, 2.0), (32, 17, 1.0)])
def test_a_hybrid_is_low_frequencies_of_one_and_high_of_the_other(size, width, sigma):
    eps_1, eps_2 = random_denoiser(0), random_denoiser(1)
    x, t = torch.randn(2, 1, size, size, dtype=torch.float64), torch.tensor([5, 70])
    at = torch.arange(width, dtype=torch.float64) - width // 2
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()

    def G(x):
        x = torch.nn.functional.pad(x, [width // 2] * 4, mode="reflect")
        x = torch.nn.functional.conv2d(x, kernel.view(1, 1, -1, 1))
        return torch.nn.functional.conv2d(x, kernel.view(1, 1, 1, -1))

    expected = G(eps_1(x, t)) + eps_2(x, t) - G(eps_2(x, t))
    found = edit.hybrid(eps_1, eps_2, partial(operators.low_pass, sigma=sigma))(x, t)
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("cycles", [1, 2, 5])
def test_the_sharp_filter_keeps_low_waves_and_halves_one_at_its_cut(cycles):
    """A wave of f cycles a side is multiplied by 1 / (1 + (f / cycles)^8); a constant stays."""
    for f in (0, 1, 2, 5, 8):
        for dims in ((1, 16), (16, 1)):
            wave = (2 * math.pi * f * torch.arange(16, dtype=torch.float64) / 16 + 0.3).cos().view(dims)
            wave = wave.expand(1, 1, 16, 16)
            gain = 1 / (1 + (f / cycles) ** 8)
            assert torch.allclose(edit.sharp_low_pass(wave, cycles), gain * wave, atol=1e-12)


def test_a_hybrid_takes_any_filter():
    eps_1, eps_2 = random_denoiser(0), random_denoiser(1)
    x, t = torch.randn(2, *SQUARE, dtype=torch.float64), torch.tensor([5, 70])
    G = partial(edit.sharp_low_pass, cycles=2.5)
    mixed = edit.hybrid(eps_1, eps_2, G)(x, t)
    assert torch.allclose(mixed, G(eps_1(x, t)) + eps_2(x, t) - G(eps_2(x, t)))
    none, all_of_it = (edit.hybrid(eps_1, eps_2, lambda x, k=k: k * x)(x, t) for k in (0, 1))
    assert torch.allclose(none, eps_2(x, t)) and torch.allclose(all_of_it, eps_1(x, t))


def test_a_hybrid_of_one_condition_is_that_condition():
    one = random_denoiser(0)
    x, t = torch.randn(2, *SQUARE, dtype=torch.float64), torch.tensor([5, 70])
    assert torch.allclose(edit.hybrid(one, one, partial(operators.low_pass, sigma=2))(x, t), one(x, t))


def test_score_distillation_ends_where_the_denoiser_is_content():
    """With eps = (x_t - sqrt(ab) x) / sqrt(1 - ab), a denoiser that knows one image only, that is x."""
    diffusion = Diffusion(T, "cosine")
    image = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8

    def eps_theta(x_t, t):
        signal, noise = diffusion.scales(t, x_t)
        return (x_t - signal * image) / noise

    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    parameters = edit.pixels(torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    seen = edit.score_distillation(diffusion, eps_theta, parameters, 400, 0.02, generators, (1, 10, 400))
    far = (seen - image).abs().amax((1, 2, 3, 4))
    assert far[0] > far[1] > far[2] and far[2] < 1e-2


def test_score_distillation_seeks_the_mode():
    """For Gaussian data the mean gradient is w sqrt(ab) K_t (x - mu): all go to mu, however far data lie."""
    diffusion, n = Diffusion(T, "cosine"), 64
    noise = torch.randn(n, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    x = edit.score_distillation(diffusion, ideal(diffusion), edit.pixels(3 * noise), 1000, 0.01, generators)
    x = x.flatten(0, 1).flatten(1)
    assert ((x.mean(0) - MU).abs() < 5 * x.std(0) / math.sqrt(n)).all()
    assert (x.std(0) < SIGMA.diagonal().sqrt() / 5).all()


def test_coarse_parameterisations_are_coarse_and_can_be_optimised():
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    target = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for name, make in edit.PARAMETERISATIONS.items():
        theta, g = make(noise)
        optimizer = torch.optim.Adam(theta, 0.05)
        before = (g() - target).square().mean().item()
        for _ in range(50):
            optimizer.zero_grad()
            loss = (g() - target).square().mean()
            loss.backward()
            optimizer.step()
        assert loss.item() < before, name
    x = edit.fourier(noise)[1]()
    spectrum = torch.fft.fft2(x).abs()
    frequency = torch.fft.fftfreq(32).abs() * 32
    outside = (frequency[:, None] > 4) | (frequency[None] > 4)
    assert spectrum[..., outside].max() < 1e-4 * spectrum.max() and (spectrum[..., ~outside] > 0).all()
    assert (torch.linalg.matrix_rank(edit.low_rank(noise)[1]().detach()) == 4).all()


@pytest.mark.parametrize(
    "problem, shape, options",
    [
        ("colourise", (3, 8, 8), {}),
        ("super_resolve", (3, 8, 8), {"factor": 4}),
        ("super_resolve", (1, 12, 12), {"factor": 3}),
        ("deblur", (1, 16, 16), {}),
        ("deblur", (3, 12, 12), {"sigma": 0.8}),
    ],
)
def test_a_measurement_and_its_pseudo_inverse(problem, shape, options):
    """Penrose's four conditions, and the projection of DDNM: A x = y, and the rest of x is unchanged."""
    measurement = edit.PROBLEMS[problem](shape, **options)
    n = math.prod(shape)
    A = measurement.A(torch.eye(n).view(n, *shape)).flatten(1).T  # (m, n)
    m = len(A)
    y_shape = measurement.A(torch.zeros(1, *shape)).shape[1:]
    A_inverse = measurement.inverse(torch.eye(m).view(m, *y_shape)).flatten(1).T
    assert torch.allclose(A @ A_inverse @ A, A, atol=1e-4)
    assert torch.allclose(A_inverse @ A @ A_inverse, A_inverse, atol=1e-3)
    assert torch.allclose(A_inverse @ A, (A_inverse @ A).T, atol=1e-4)
    assert torch.allclose(A @ A_inverse, (A @ A_inverse).T, atol=1e-4)
    assert torch.linalg.matrix_rank(A) < n  # something is lost

    x, truth = torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(0))
    projected = measurement.project(x, measurement.A(truth))
    assert torch.allclose(measurement.A(projected), measurement.A(truth), atol=1e-4)
    lost = torch.eye(n) - A_inverse @ A
    assert torch.allclose(lost @ projected.flatten(), lost @ x.flatten(), atol=1e-3)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_what_was_measured_is_kept(sampler):
    """A = the first pixel. At t = T, where x_t says almost nothing, one stride takes the other to E x_0."""
    diffusion, (measurement, y) = Diffusion(1000, "cosine"), first_pixel()
    x_T = torch.randn(4, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eps_theta = edit.ddnm(diffusion, ideal(diffusion), measurement, y)
    x = SAMPLERS[sampler](diffusion, eps_theta, x_T, [1000, 0], torch.Generator().manual_seed(0))
    assert torch.allclose(x[..., 0], y[..., 0], atol=1e-6)
    assert torch.allclose(x[..., 1], MU[1].expand(4, 1, 1), atol=0.05)
    way = diffusion.timesteps(50)
    x = SAMPLERS[sampler](diffusion, eps_theta, x_T, way, torch.Generator().manual_seed(0))
    if sampler != "pndm":  # which goes along an extrapolated eps: run_restore projects once more
        assert torch.allclose(x[..., 0], y[..., 0], atol=1e-6)


def first_pixel():
    """The measurement of the first of two pixels, and what it gave: inpainting, as DDNM sees it."""
    keep = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    y = torch.full((1, 1, 1, 2), KNOWN, dtype=torch.float64) * keep
    return edit.Measurement(lambda x: x * keep, lambda y: y * keep), y


def test_restoring_has_the_mean_of_its_recursion():
    """DDIM is affine in x_T, so from x_T = 0 it gives the mean, that of DDNM, Algorithm 1, step by step."""
    diffusion, (measurement, y) = Diffusion(T, "cosine"), first_pixel()
    way, x = diffusion.timesteps(20), torch.zeros(2, dtype=torch.float64)
    for t, s in pairwise(way):
        ab_t, ab_s = diffusion.alpha_bar[t], diffusion.alpha_bar[s]
        eps = gain(diffusion, t) @ (x - ab_t.sqrt() * MU)
        x_0 = (x - (1 - ab_t).sqrt() * eps) / ab_t.sqrt()
        x_0[0] = KNOWN  # A+ y + (I - A+ A) x_0
        x = ab_s.sqrt() * x_0 + (1 - ab_s).sqrt() * (x - ab_t.sqrt() * x_0) / (1 - ab_t).sqrt()
    eps_theta = edit.ddnm(diffusion, ideal(diffusion), measurement, y)
    found = ddpm.ddim(diffusion, eps_theta, torch.zeros(1, 1, 1, 2, dtype=torch.float64), way)
    assert torch.allclose(found.flatten(), x, atol=1e-9)
    assert MU[1] + 0.1 < found[..., 1].item() < CONDITIONAL_MEAN + 0.1  # it has heard of the first pixel


# ------------------------------------------------------------------------------------------------------------
# What a user sees


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Tiny runs: unconditional, by label, by caption, and a classifier, on images of 8x8."""
    folder = tmp_path_factory.mktemp("runs")
    run_in(folder, ddpm, *TINY, "--limit", 200)
    run_in(folder, ddpm, *TINY, "--dataset", "shapes", "--limit", 32, "--name", "colour")
    run_in(folder, ddpm_conditional, *TINY, "--limit", 200)
    run_in(folder, ddpm_conditional, *TINY, "--dataset", "shapes", "--limit", 32, "--name", "text")
    i = TINY.index("--sample-steps")  # which means nothing to a classifier
    run_in(folder, ddpm_conditional, *TINY[:i], *TINY[i + 2 :], "--limit", 200, "--task", "classifier")
    for name, seed in (("a", 0), ("b", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder / "runs"


@pytest.fixture
def make(script, runs, tmp_path):
    """Run `edit.py TASK ...`; with --out, -> the result and the images written."""

    def run(task, run, *flags):
        done = script(edit, task, "--checkpoint", runs / run, "--device", "cpu", *flags)
        return done

    return run


def pictures(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


TASKS = {
    "sdedit": ("ddpm_conditional_digits", ["--labels", "3,5"]),
    "inpaint": ("ddpm_conditional_digits", ["--labels", "3", "--box", "2,2,4,4", "--resample", 2]),
    "anagram": ("ddpm_conditional_digits", ["--labels", "6,9", "--draws", 2]),
    "hybrid": ("ddpm_conditional_digits", ["--labels", "6,9", "--draws", 2]),
    "interpolate": ("ddpm_conditional_digits", ["--labels", "6,9", "--frames", 3]),
    "sds": ("ddpm_conditional_digits", ["--labels", "6", "--draws", 2, "--steps", 3]),
    "restore": ("ddpm_conditional_digits", ["--labels", "6", "--factor", 2]),
}


def images_for(task, runs, count=2):
    files = [runs.parent / f"{name}.png" for name in "ab"[:count]]
    return ["--image", *files] if "image" in edit.EDITS[task].flags.split() else []


@pytest.mark.parametrize("sampler", [*SAMPLERS, "heun"])
@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_works_with_every_sampler(make, runs, tmp_path, monkeypatch, task, sampler):
    monkeypatch.setitem(SAMPLERS, "heun", heun)  # of two evaluations a stride
    run, flags = TASKS[task]
    flags = [*flags, *images_for(task, runs), "--sampler", sampler, "--sample-steps", 4]
    result = make(task, run, *flags, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    figure = next(line.split()[1] for line in result.out.splitlines() if line.startswith("figure"))
    assert figure.startswith(str(runs / run / "edits" / task))
    assert len(pictures(tmp_path / "out")) > 0
    assert all(picture.shape == (8, 8) for picture in pictures(tmp_path / "out"))


@pytest.mark.parametrize("task", list(TASKS))
def test_batches_change_nothing(make, runs, tmp_path, task):
    run, flags = TASKS[task]
    flags = [*flags, *images_for(task, runs), "--sampler", "ddpm", "--sample-steps", 4]
    for size in (1, 3):
        assert make(task, run, *flags, "--batch-size", size, "--out", tmp_path / str(size)).code == 0
    one, three = (pictures(tmp_path / str(size)) for size in (1, 3))
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("task", ["sdedit", "inpaint", "interpolate", "restore", "sds"])
def test_an_unconditional_model_edits_too(make, runs, tmp_path, task):
    flags = {"inpaint": ["--box", "0,0,4,8"], "restore": ["--problem", "deblur"], "sds": ["--steps", 2]}
    result = make(task, "ddpm_digits", *flags.get(task, []), *images_for(task, runs))
    assert result.code == 0, result.err


def test_at_scale_0_labels_mean_nothing(make, tmp_path):
    flags = ["--labels", "3,5", "--draws", 2, "--steps", 3, "--guidance-scale"]
    for scale in (0, 5):
        result = make("sds", "ddpm_conditional_digits", *flags, scale, "--out", tmp_path / str(scale))
        assert result.code == 0, result.err
    none, much = (np.stack(pictures(tmp_path / scale)).reshape(2, 2, 2, 8, 8) for scale in ("0", "5"))
    assert (none[:, 0] == none[:, 1]).all()  # (pixels or fourier, label, draw, ...)
    assert (much[:, 0] != much[:, 1]).any()


def test_nothing_is_overwritten(make, runs):
    before = set((runs / "text" / "edits").glob("*")) if (runs / "text" / "edits").exists() else set()
    for _ in range(2):
        flags = ["--prompt", "a red circle", "a blue square", "--draws", 1]
        assert make("hybrid", "text", *flags).code == 0
    assert len(set((runs / "text" / "edits").glob("*"))) == len(before) + 2


@pytest.mark.parametrize("flags", [["--resample", 3, "--jump", 2], ["--sampler", "pndm"], ["--no-clip"]])
def test_known_pixels_come_out_exactly(make, runs, tmp_path, flags):
    where = ["--box", "2,1,3,5", "--draws", 2, "--out", tmp_path / "out"]
    flags = [*images_for("inpaint", runs), *where, *flags, "--sample-steps", 5]
    assert make("inpaint", "ddpm_digits", *flags).code == 0
    hole = np.zeros((8, 8), dtype=bool)
    hole[1:6, 2:5] = True
    given = [np.asarray(Image.open(runs.parent / f"{name}.png")) for name in "aabb"]
    for x, x_0 in zip(pictures(tmp_path / "out"), given, strict=True):
        assert (x[~hole] == x_0[~hole]).all() and (x[hole] != x_0[hole]).any()


def test_a_mask_is_a_box_that_was_painted(make, runs, tmp_path):
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[1:6, 2:5] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask).resize((24, 24), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    found = []
    for name, where in enumerate((["--box", "2,1,3,5"], ["--mask", "mask.png"], ["--mask", "large.png"])):
        flags = [*images_for("inpaint", runs, 1), *where, "--out", tmp_path / f"{name}"]
        result = make("inpaint", "ddpm_digits", *flags)
        assert result.code == 0 and ("nearest" in result.err) == (name == 2), result.err
        found += pictures(tmp_path / f"{name}")
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


def test_masks_are_read_as_they_were_painted(make, runs, tmp_path):
    """16 bits are not cut off at 8, and what is transparent was not painted."""
    hole = np.zeros((8, 8), dtype=bool)
    hole[1:6, 2:5] = True
    masks = {
        "l": Image.fromarray((255 * hole).astype(np.uint8)),
        "i": Image.fromarray(np.where(hole, 65535, 3000).astype(np.uint16)),
        "la": Image.merge(
            "LA", [Image.new("L", (8, 8), 255), Image.fromarray((255 * hole).astype(np.uint8))]
        ),
    }
    found = []
    for name, mask in masks.items():
        mask.save(tmp_path / f"{name}.png")
        flags = [*images_for("inpaint", runs, 1), "--mask", f"{name}.png", "--out", tmp_path / name]
        assert make("inpaint", "ddpm_digits", *flags).code == 0
        found += pictures(tmp_path / name)
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


def test_one_stride_has_a_start_too(make, runs):
    result = make("sdedit", "ddpm_digits", *images_for("sdedit", runs), "--sample-steps", 1)
    assert result.code == 0 and "i_start 0" in result.out, result.err


def test_a_conditional_model_without_a_condition_is_noted(make, runs):
    result = make("restore", "ddpm_conditional_digits", *images_for("restore", runs))
    assert result.code == 0 and "null condition" in result.err


def test_sdedit_starts_later_and_keeps_more(make, runs):
    result = make("sdedit", "ddpm_digits", *images_for("sdedit", runs), "--strength", "1,0.5,0.1")
    assert result.code == 0, result.err
    far = [
        float(line.split(": ")[1].split()[0]) for line in result.out.splitlines() if "from the input" in line
    ]
    assert len(far) == 3 and far == sorted(far, reverse=True)


def test_sdedit_starts_where_cs180_does():
    assert ddpm.strided_timesteps(1000) == [*range(990, 0, -30), 0]
    assert [ddpm.strided_timesteps(1000)[i] for i in edit.I_STARTS] == [960, 900, 840, 780, 690, 390]


@pytest.mark.parametrize("problem", ["colourise", "deblur", "super_resolve"])
def test_degraded_images_are_taken_as_they_are(make, runs, tmp_path, problem):
    small = np.random.default_rng(0).integers(60, 200, (2, 2, 3), dtype=np.uint8)
    if problem == "colourise":
        small[:] = small[..., :1]
    size = (2, 2) if problem == "super_resolve" else (8, 8)
    y = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.NEAREST))
    y = blurred(y, 1.5).round().astype(np.uint8) if problem == "deblur" else y
    Image.fromarray(y).save(tmp_path / "y.png")
    flags = ["--image", "y.png", "--problem", problem, "--degraded", "--out", tmp_path / "out"]
    result = make("restore", "colour", *flags)
    assert result.code == 0 and "resized" not in result.err, result.err
    x = pictures(tmp_path / "out")[0].astype(float)  # (8, 8, 3)
    A = {
        "colourise": lambda x: x.mean(2, keepdims=True),
        "super_resolve": lambda x: x.reshape(2, 4, 2, 4, 3).mean((1, 3)),
        "deblur": lambda x: blurred(x, 1.5),
    }[problem]
    given = y.mean(2, keepdims=True) if problem == "colourise" else y
    assert np.abs(A(x) - given).mean() < 10  # of 255: what left the range was cut off
    assert np.abs(A(np.flip(x, (0, 1))) - given).mean() > 15


def blurred(x, sigma):
    """x (n, n, C) under a Gaussian along rows and columns, whose weights sum to 1 at the edges as well."""
    at = np.arange(len(x))
    B = np.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2)
    B /= B.sum(1, keepdims=True)
    return np.einsum("ij,jkc,lk->ilc", B, x, B)


def test_the_classifier_names_what_was_made(make, runs):
    judge = ["--classifier", runs / "classifier_digits"]
    result = make("anagram", "ddpm_conditional_digits", "--labels", "6,9", "--draws", 3, *judge)
    assert result.code == 0 and "as asked in" in result.out and "of 3" in result.out, result.err
    for split in ([], ["--cycles", 1.5], ["--sigma", 1]):
        result = make("hybrid", "ddpm_conditional_digits", "--labels", "6,9", "--draws", 3, *split, *judge)
        assert result.code == 0 and "names both as asked in" in result.out, result.err
    flags = [*images_for("inpaint", runs), "--box", "0,0,4,8", *judge]
    result = make("inpaint", "ddpm_conditional_digits", *flags)
    assert result.code == 0 and "of 2 as it names the input" in result.out, result.err


# ------------------------------------------------------------------------------------------------------------
# What a user gets wrong


@pytest.mark.parametrize(
    "task, run, flags, message",
    [
        ("inpaint", "ddpm_digits", ["--box", "4,4,5,2"], "leaves the image"),
        ("inpaint", "ddpm_digits", ["--box", "4,4,0,2"], "w and h"),
        ("inpaint", "ddpm_digits", ["--box", "4,4"], "x,y,w,h"),
        ("inpaint", "ddpm_digits", [], "--box"),
        ("inpaint", "ddpm_digits", ["--box", "0,0,4,4", "--mask", "m.png"], "one of them out"),
        ("inpaint", "ddpm_digits", ["--mask", "black.png"], "no hole"),
        ("inpaint", "ddpm_digits", ["--mask", "nothing.png"], "no such file"),
        ("inpaint", "ddpm_digits", ["--mask", "text.png"], "can't be read"),
        ("inpaint", "ddpm_digits", ["--box", "0,0,4,4", "--labels", "3"], "unconditional"),
        ("inpaint", "ddpm_digits", ["--box", "0,0,4,4", "--prompt", "a dog"], "unconditional"),
        (
            "inpaint",
            "ddpm_digits",
            ["--box", "0,0,4,4", "--eta", "0.5", "--sampler", "ddpm"],
            "--eta belongs",
        ),
        ("inpaint", "ddpm_digits", ["--box", "0,0,4,4", "--sample-steps", "50"], "noise steps"),
        ("inpaint", "ddpm_digits", ["--box", "0,0,4,4", "--jump", "2"], "--resample"),
        ("sdedit", "ddpm_digits", ["--guidance-scale", "2"], "--labels or --prompt"),
        ("sdedit", "ddpm_digits", ["--i-start", "40"], "--i-start"),
        ("sdedit", "ddpm_digits", ["--i-start", "1", "--strength", "0.5"], "leave one out"),
        ("sdedit", "ddpm_digits", ["--strength", "1.5"], "at most 1"),
        ("sdedit", "ddpm_conditional_digits", ["--labels", "3", "--guidance-interval", "15", "5"], "LOW"),
        ("sds", "ddpm_conditional_digits", ["--labels", "3", "--guidance-scale", "2,2"], "twice"),
        ("restore", "ddpm_digits", ["--factor", "8"], "one of 2, 4"),
        ("restore", "ddpm_digits", ["--factor", "100", "--degraded"], "one of 2, 4"),
        ("sdedit", "ddpm_conditional_digits", ["--labels", "11"], "out of range"),
        ("sdedit", "ddpm_conditional_digits", ["--labels", "3", "--guidance-scale", "1,3"], "one scale"),
        ("anagram", "ddpm_digits", [], "conditional model"),
        ("hybrid", "ddpm_digits", ["--labels", "3,5"], "conditional model"),
        ("hybrid", "ddpm_conditional_digits", [], "two conditions"),
        ("hybrid", "ddpm_conditional_digits", ["--labels", "6"], "two conditions"),
        ("hybrid", "ddpm_conditional_digits", ["--labels", "6,9", "--sigma", 2, "--cycles", 2], "leave one"),
        ("sds", "ddpm_digits", ["--out", "black.png"], "is a file"),
        ("anagram", "ddpm_conditional_digits", ["--labels", "6,9,8"], "two conditions"),
        ("anagram", "ddpm_conditional_digits", ["--labels", "6,9", "--view", "rotate45"], "no isometry"),
        ("anagram", "ddpm_conditional_digits", ["--labels", "6,9", "--view", "inside"], "unknown"),
        ("anagram", "ddpm_conditional_digits", ["--labels", "6,9", "--pieces", "2"], "--pieces belongs"),
        (
            "anagram",
            "ddpm_conditional_digits",
            ["--labels", "6,9", "--view", "jigsaw", "--pieces", "3"],
            "divide",
        ),
        ("anagram", "text", ["--prompt", "a red circle", "a red dog"], "dog"),
        (
            "sds",
            "ddpm_conditional_digits",
            ["--labels", "3", "--parameterisations", "clay"],
            "none of pixels",
        ),
        ("restore", "ddpm_digits", ["--problem", "colourise"], "gray"),
        ("restore", "ddpm_digits", ["--problem", "deblur", "--factor", "2"], "--factor belongs"),
        ("interpolate", "ddpm_conditional_digits", ["--labels", "1,2,3"], "two --image files"),
    ],
)
def test_mistakes_give_one_line(make, runs, tmp_path, task, run, flags, message):
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    assert message in error_line(make(task, run, *flags, *images_for(task, runs)))


def test_a_missing_image_is_a_mistake(make):
    assert "no such file" in error_line(make("sdedit", "ddpm_digits", "--image", "nothing.png"))
    assert "--image" in error_line(make("sdedit", "ddpm_digits"))


def test_images_that_are_there_are_kept(make, runs, tmp_path):
    (tmp_path / "out").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "out" / "00000.png")
    flags = [*images_for("sdedit", runs), "--out", tmp_path / "out"]
    assert "already holds images" in error_line(make("sdedit", "ddpm_digits", *flags))
