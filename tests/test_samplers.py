"""Every sampler x schedule x prediction on Gaussian data, where the ideal denoiser and the exact flow are
known.

x_0 ~ N(M, S^2) in each pixel, so x_t ~ N(sqrt(ab) M, ab S^2 + 1 - ab), E[x_0 | x_t] is linear in x_t, and so
is each stride of each sampler: its result is followed here by a recursion of scalars, written in other forms
of the papers' equations than the samplers use.
"""

import math
import re
from itertools import pairwise

import pytest
import torch
from conftest import TINY
from test_guidance import MEANS, STD, TwoGaussians

import ddpm
from ddpm import SAMPLERS, Diffusion, ddim_stride
from ddpm_conditional import cfg
from support.machine import Watched, progress
from utils import SCHEDULES

M, S = 0.3, 0.5
PREDICTIONS = ["eps", "x_0", "v", "dual"]
DETERMINISTIC = ["ddim", "pndm", "dpm_solver"]
ACCURATE = ("linear", "cosine", "quadratic", "sigmoid", "constant", "jsd", "laplace", "flow")


def ideal_net(diffusion):
    """The network that has learned N(M, S^2) perfectly, in whatever it predicts."""

    def net(x_t, t, y=None):
        assert t.dtype == torch.int64 and t.shape == (len(x_t),) and (t >= 1).all()  # t = 0 is never trained
        ab = diffusion.alpha_bar[t].view(-1, 1, 1, 1).to(x_t.dtype)
        x_0 = M + ab.sqrt() * S**2 / (ab * S**2 + 1 - ab) * (x_t - ab.sqrt() * M)  # E[x_0 | x_t]
        eps = (1 - ab).sqrt() / (ab * S**2 + 1 - ab) * (x_t - ab.sqrt() * M)  # E[eps | x_t]
        v, dual = ab.sqrt() * eps - (1 - ab).sqrt() * x_0, torch.cat([eps, x_0], dim=1)
        return {"eps": eps, "x_0": x_0, "v": v, "dual": dual}[diffusion.prediction]

    return net


def scalars(diffusion, x, t):
    """E[x_0 | x_t] and E[eps | x_t] for one number x."""
    ab = diffusion.alpha_bar[t].item()
    spread = ab * S**2 + 1 - ab
    return M + ab**0.5 * S**2 / spread * (x - ab**0.5 * M), (1 - ab) ** 0.5 / spread * (x - ab**0.5 * M)


def exact_flow(diffusion, x, t, s):
    """Where the probability flow takes x from t to s: as many standard deviations from the mean."""
    ab_t, ab_s = diffusion.alpha_bar[t], diffusion.alpha_bar[s]
    z = (x - ab_t.sqrt() * M) / (ab_t * S**2 + 1 - ab_t).sqrt()
    return ab_s.sqrt() * M + (ab_s * S**2 + 1 - ab_s).sqrt() * z


def start(diffusion):
    """x_T at -2, -1, ..., 2 standard deviations of q(x_T); (5, 1, 1, 1)."""
    z = torch.arange(-2.0, 3.0, dtype=torch.float64).view(-1, 1, 1, 1)
    ab = diffusion.alpha_bar[-1]
    return ab.sqrt() * M + (ab * S**2 + 1 - ab).sqrt() * z


def sample(name, diffusion, x, timesteps, **options):
    return SAMPLERS[name](diffusion, diffusion.denoiser(ideal_net(diffusion)), x, timesteps, **options)


def recursion(name, diffusion, x, timesteps, z=None, eta=0.0, variance="posterior"):
    """The sampler on one number, z[i] being the noise of stride i; other forms of the equations than in
    ddpm.py.
    """
    history = []  # (lambda_t, x_0, eps), newest last
    for i, (t, s) in enumerate(pairwise(timesteps)):
        ab_t, ab_s = diffusion.alpha_bar[t].item(), diffusion.alpha_bar[s].item()
        x_0, eps = scalars(diffusion, x, t)
        history.append((0.5 * math.log(ab_t) - 0.5 * math.log(1 - ab_t), x_0, eps))
        beta = 1 - ab_t / ab_s
        tilde = (1 - ab_s) / (1 - ab_t) * beta
        if name == "ddpm":  # the posterior mean from x_0 and x_t (DDPM, eq. 7)
            x = (ab_s**0.5 * beta * x_0 + (1 - beta) ** 0.5 * (1 - ab_s) * x) / (1 - ab_t)
            x += ({"posterior": tilde, "beta": beta}[variance] ** 0.5 if s > 0 else 0) * z[i]
        elif name == "ddim":
            sigma = eta * tilde**0.5
            x = ab_s**0.5 * x_0 + (1 - ab_s - sigma**2) ** 0.5 * eps + sigma * (z[i] if z else 0)
        elif name == "pndm":  # the transfer as the PNDM paper writes it, without going through x_0
            e = [h[2] for h in history[-4:]]
            weights = {1: [1], 2: [-1, 3], 3: [5, -16, 23], 4: [-9, 37, -59, 55]}[len(e)]
            e = sum(w * v for w, v in zip(weights, e, strict=True)) / sum(weights)
            slope = (ab_s - ab_t) / (ab_t**0.5 * (((1 - ab_s) * ab_t) ** 0.5 + ((1 - ab_t) * ab_s) ** 0.5))
            x = (ab_s / ab_t) ** 0.5 * x - slope * e
        elif s == 0:
            x = x_0
        else:  # DPM-Solver++(2M), as the integral of a straight line through the last two x_0 over lambda
            now, after = history[-1][0], 0.5 * math.log(ab_s) - 0.5 * math.log(1 - ab_s)
            slope = (x_0 - history[-2][1]) / (now - history[-2][0]) if len(history) > 1 else 0.0
            h = after - now
            x = ((1 - ab_s) / (1 - ab_t)) ** 0.5 * x + ab_s**0.5 * (1 - math.exp(-h)) * (x_0 + slope * h / 2)
    return x


def followed(name, diffusion, x, timesteps, z=None, **options):
    """The recursion for each of the numbers in x; (len(x),)."""
    ends = [recursion(name, diffusion, v, timesteps, z, **options) for v in x.flatten().tolist()]
    return torch.tensor(ends, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_sampler_is_its_recursion(name, schedule):
    x = start(Diffusion(1000, schedule))
    for steps in (
        [1000, 889, 778, 667, 556, 444, 333, 222, 111, 0],
        [1000, 999, 640, 12, 3, 1, 0],
        [700, 600, 250],
    ):
        expected = followed(name, Diffusion(1000, schedule), x, steps)
        for prediction in PREDICTIONS:
            got = sample(name, Diffusion(1000, schedule, prediction), x, steps)
            assert torch.allclose(got.flatten(), expected, rtol=1e-6, atol=1e-8), prediction


STOCHASTIC = [
    ("ddpm", dict(variance="posterior")),
    ("ddpm", dict(variance="beta")),
    ("ddim", dict(eta=0.5)),
    ("ddim", dict(eta=1.0)),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name, options", STOCHASTIC)
def test_stochastic_sampler_is_its_recursion_draw_by_draw(name, options, schedule, monkeypatch):
    """With the noise z of each stride known, so the mean and every term of the variance are tested."""
    x = start(Diffusion(1000, schedule))
    for steps in ([1000, 833, 667, 500, 333, 167, 0], [700, 600, 250]):
        z = [0.7, -1.3, 2.1, 0.4, -0.2, 5.0][: len(steps) - 1]
        expected = followed(name, Diffusion(1000, schedule), x, steps, z, **options)
        for prediction in PREDICTIONS:
            drawn = iter(z)
            fixed = lambda x, generator, drawn=drawn: torch.full_like(x, next(drawn))  # noqa: E731
            monkeypatch.setattr(ddpm, "randn_like", fixed)
            got = sample(name, Diffusion(1000, schedule, prediction), x, steps, **options)
            assert torch.allclose(got.flatten(), expected, rtol=1e-6, atol=1e-8), prediction
            left = 5.0 if steps[-1] == 0 else None  # no noise is drawn in a stride that ends in x_0
            assert next(drawn, None) == left


@pytest.mark.parametrize("schedule", ACCURATE)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_error_against_the_exact_flow_falls(name, schedule):
    def errors(prediction, *steps):
        diffusion = Diffusion(1000, schedule, prediction)
        x = start(diffusion)
        exact = exact_flow(diffusion, x, 1000, 0)
        ways = [diffusion.timesteps(n, "even") for n in steps]
        return [(sample(name, diffusion, x, way) - exact).abs().max() for way in ways]

    for prediction in PREDICTIONS:
        few, more = errors(prediction, 5, 50)
        assert more < 0.8 * few
    few, more = errors(prediction, 50, 1000)
    assert more < 0.8 * few
    assert more < (0.3 if schedule == "laplace" else 0.1)  # laplace begins with a jump to snr = 22


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "T, steps", [(1000, 1), (1000, 2), (1000, 20), (1000, 999), (1000, 1000), (7, 5), (2, 2)]
)
def test_timesteps_fall_from_T_to_0_with_any_spacing(schedule, T, steps):
    diffusion = Diffusion(T, schedule)
    for spacing in ("even", "log_snr", None):
        times = diffusion.timesteps(steps, spacing)
        assert len(times) == steps + 1 and times[0] == T and times[-1] == 0
        assert all(t > s for t, s in pairwise(times)) and all(type(t) is int for t in times)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_log_snr_strides_are_even_in_log_snr(schedule):
    """From SNR 0.001, below which x_t is noise, to t = 1, as far as there are whole numbers between."""
    diffusion, steps = Diffusion(100_000, schedule), 12
    times, log_snr = diffusion.timesteps(steps, "log_snr"), diffusion.snr.log()
    start, end = max(log_snr[-1].item(), math.log(1e-3)), log_snr[1].item()
    for i, t in enumerate(times[1:-1], start=1):
        wanted = start + (end - start) * i / (steps - 1)
        assert min(log_snr[t - 1], end) + 1e-9 >= wanted >= log_snr[min(t + 1, 100_000)] - 1e-9


def test_the_spacing_of_a_schedule():
    """Strides even in t, but not where the last of 20 would be a leap, from an SNR below 25 to the image."""
    needs_it = {schedule for schedule in SCHEDULES if Diffusion(1000, schedule).snr[50] < 25}
    assert needs_it >= {"constant", "jsd", "laplace"} and not needs_it & {"cosine", "linear"}
    for schedule in SCHEDULES:
        diffusion = Diffusion(1000, schedule)
        spacing = "log_snr" if schedule in needs_it else "even"
        assert diffusion.timesteps(20) == diffusion.timesteps(20, spacing)
    assert Diffusion().timesteps(4) == [1000, 750, 500, 250, 0]


@pytest.mark.parametrize("schedule, least", [("constant", 5), ("jsd", 1.4), ("laplace", 1.6)])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_schedule_that_needs_it_comes_nearer_to_the_exact_flow(name, schedule, least):
    """In 20 strides, on N(0.3, 0.5^2). Where the last stride remains a leap, as laplace's, less is gained."""
    diffusion = Diffusion(1000, schedule)
    x = start(diffusion)
    exact = exact_flow(diffusion, x, 1000, 0)
    ways = diffusion.timesteps(20, "even"), diffusion.timesteps(20)
    even, spaced = ((sample(name, diffusion, x, way) - exact).abs().mean() for way in ways)
    assert spaced < even / least


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_error_vanishes_with_the_steps_if_the_schedule_is_refined(name):
    error = []
    for T in (100, 1000, 10000):
        diffusion = Diffusion(T, "cosine")
        x = start(diffusion)
        error.append(
            (sample(name, diffusion, x, diffusion.timesteps(T)) - exact_flow(diffusion, x, T, 0)).abs().max()
        )
    assert error[1] < error[0] / 3 and error[2] < error[1] / 3 and error[2] < 1e-3


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["pndm", "dpm_solver"])
def test_second_order_beats_ddim_with_20_evaluations(name, schedule):
    diffusion = Diffusion(1000, schedule)
    x = start(diffusion)
    exact = exact_flow(diffusion, x, 1000, 0)
    error = {
        n: (sample(n, diffusion, x, diffusion.timesteps(20)) - exact).abs().max() for n in ("ddim", name)
    }
    assert error[name] < error["ddim"] / 2


@pytest.mark.parametrize("name, options", STOCHASTIC[:1] + STOCHASTIC[2:])
def test_stochastic_samples_have_the_mean_and_variance_of_the_data(name, options):
    diffusion = Diffusion(200, "cosine")
    x = torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = sample(
        name, diffusion, x, diffusion.timesteps(200), generator=torch.Generator().manual_seed(1), **options
    )
    assert x.mean().item() == pytest.approx(M, abs=0.01) and x.std().item() == pytest.approx(S, abs=0.015)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance(schedule):
    diffusion = Diffusion(1000, schedule)
    runs = [("ddim", dict(eta=1.0)), ("ddpm", dict(variance="posterior"))]
    x, steps = start(diffusion), diffusion.timesteps(20)
    a, b = (
        sample(name, diffusion, x, steps, generator=torch.Generator().manual_seed(5), **options)
        for name, options in runs
    )
    assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_number_of_steps_of_every_small_T(schedule):
    """No rounding error takes a square root below 0; DDIM's sigma^2 may come out as 1 - ab_s and a bit."""
    for T in range(2, 24):
        diffusion = Diffusion(T, schedule)
        for steps in range(1, T + 1):
            x = torch.ones(1, 1, 1, 1)
            for name, options in STOCHASTIC + [(n, {}) for n in SAMPLERS if T < 8]:
                x = SAMPLERS[name](diffusion, lambda x, t: x, x, diffusion.timesteps(steps), **options)
                assert x.dtype == torch.float32


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_one_step_sampler_can_be_called_in_segments(name):
    diffusion = Diffusion(1000, "linear")
    x, eps_theta = start(diffusion), diffusion.denoiser(ideal_net(diffusion))
    whole = SAMPLERS[name](diffusion, eps_theta, x, [1000, 600, 300, 0], torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    for segment in ([1000, 600], [600, 300, 0]):
        x = SAMPLERS[name](diffusion, eps_theta, x, segment, generator)
    assert torch.equal(x, whole)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name):
    diffusion = Diffusion()
    x = start(diffusion)
    generators = [torch.Generator().manual_seed(i) for i in range(5)]
    batch = sample(name, diffusion, x, [1000, 500, 0], generator=generators)
    alone = sample(name, diffusion, x[3:4], [1000, 500, 0], generator=[torch.Generator().manual_seed(3)])
    assert torch.allclose(batch[3:4], alone, rtol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_denoiser_may_take_gradients_inside_a_sampler(name):
    diffusion = Diffusion()

    def eps_theta(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(x.square().sum() / 2, x)[0]  # which is x

    x = SAMPLERS[name](diffusion, eps_theta, torch.ones(2, 1, 1, 1), [1000, 500, 0], torch.Generator())
    assert not x.requires_grad and x.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_type_is_kept_and_each_stride_is_evaluated(name, dtype):
    calls = []

    def eps_theta(x, t):
        assert t.dtype == torch.int64 and t.shape == (2,) and x.dtype == dtype
        calls.append(t[0].item())
        return x

    x = torch.ones(2, 1, 1, 1, dtype=dtype)
    x = SAMPLERS[name](Diffusion(), eps_theta, x, [1000, 700, 20, 0], torch.Generator())
    assert x.dtype == dtype and set(calls) >= {1000, 700, 20} and min(calls) >= 1
    if name in ("ddpm", *DETERMINISTIC):
        assert calls == [1000, 700, 20]  # one evaluation a stride


def test_runge_kutta_start_costs_nine_evaluations_and_never_looks_at_0():
    for timesteps in (Diffusion().timesteps(12), [3, 2, 1, 0], [1, 0], [1000, 0]):
        diffusion, calls = Diffusion(), []

        def eps_theta(x, t, diffusion=diffusion, calls=calls):
            calls.append(t[0].item())
            return diffusion.denoiser(ideal_net(diffusion))(x, t)

        x = SAMPLERS["pndm"](diffusion, eps_theta, start(diffusion), timesteps, runge_kutta=True)
        strides = len(timesteps) - 1
        assert len(calls) == strides + 3 * min(3, strides) and min(calls) >= 1 and x.isfinite().all()


def test_runge_kutta_stride_is_of_second_order():
    """Halving a stride divides the error of a DDIM stride by 4, of a pseudo Runge-Kutta stride by 8."""
    diffusion = Diffusion(10000, "cosine")
    x = start(diffusion)

    def error(stride, **options):
        exact = exact_flow(diffusion, x, 6000, 6000 - stride)
        return (sample("pndm", diffusion, x, [6000, 6000 - stride], **options) - exact).abs().max()

    assert error(800) / error(400) == pytest.approx(4, rel=0.15)
    assert error(800, runge_kutta=True) / error(400, runge_kutta=True) > 7


@torch.no_grad()
def heun(diffusion, eps_theta, x, timesteps, generator=None):
    """A sampler that a student may add: Heun's method on the flow (Karras et al. 2022, Algorithm 1)."""
    for t, s, ab_t, ab_s in diffusion.strides(x, timesteps):
        eps = eps_theta(x, t)
        x_s = ddim_stride(x, eps, ab_t, ab_s)
        if ab_s < 1:  # the mean of both ends of the stride
            x_s = ddim_stride(x, (eps + eps_theta(x_s, s)) / 2, ab_t, ab_s)
        x = x_s
    return x


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "heun", heun)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_added_second_order_sampler_is_of_second_order(added, schedule):
    """Halving the strides halves the error of DDIM and divides that of Heun by four, against the flow."""
    diffusion = Diffusion(10000, schedule)
    x, exact = start(diffusion), exact_flow(diffusion, start(diffusion), 9000, 1000)

    def error(name, strides):
        timesteps = [9000 - 8000 * i // strides for i in range(strides + 1)]
        return (sample(name, diffusion, x, timesteps) - exact).abs().max()

    for strides in (10, 20, 40):
        assert error("ddim", strides) / error("ddim", 2 * strides) == pytest.approx(2, rel=0.1)
        assert error("heun", strides) / error("heun", 2 * strides) == pytest.approx(4, rel=0.1)
        assert error("heun", strides) < error("ddim", strides) / 2


def test_an_added_sampler_works_under_guidance_and_watched(added):
    """As every sampler: guided samples have the label's mean and spread, the bar fills, calls are counted."""
    diffusion, steps = Diffusion(1000, "cosine", "eps"), 100
    y = torch.tensor([0, 1]).repeat(1500)
    x = torch.randn(3000, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bar = progress("sampling", 3000)
    eps_theta = Watched(cfg(diffusion, TwoGaussians(diffusion), y, 1.0), 1000, bar, keep=(1000, 500))
    x_0 = SAMPLERS["heun"](diffusion, eps_theta, x, diffusion.timesteps(steps)).flatten()
    for label in (0, 1):
        assert x_0[y == label].mean() == pytest.approx(MEANS[label].item(), abs=0.05)
        assert x_0[y == label].std() == pytest.approx(STD, abs=0.05)
    assert eps_theta.evaluations == 2 * steps - 1
    assert 3000 * (1 - 1 / steps) <= bar.n <= 3000
    assert list(eps_theta.kept) == [1000, 500] and torch.equal(eps_theta.kept[1000], x)


def test_an_added_sampler_is_a_choice_of_the_command_line(cli, added):
    assert cli(*TINY, "--sampler", "heun").code == 0
    result = cli("--sample", 3, "--checkpoint", "runs/ddpm_digits", "--sample-steps", 5, "--animate")
    assert result.code == 0 and re.search(r"grid +\S*heun_5_seed0.png", result.out), result
    assert "heun" in cli("--help").out and "invalid choice" in cli("--sampler", "heum").err


@pytest.mark.parametrize("name", SAMPLERS)
def test_watched_counts_keeps_and_moves_the_bar(name):
    """It counts what the sampler evaluates, changes nothing, and moves the bar as far as t has fallen."""
    diffusion, moves = Diffusion(20, "linear"), []
    x, timesteps, generator = start(diffusion), diffusion.timesteps(4), torch.Generator()
    eps_theta = diffusion.denoiser(ideal_net(diffusion))

    class Bar:
        def update(self, images):
            moves.append(images)

    watched = Watched(eps_theta, 20, Bar(), keep=[20, 10, 0])
    x_0 = SAMPLERS[name](diffusion, watched, x, timesteps, generator.manual_seed(0))
    assert torch.equal(x_0, SAMPLERS[name](diffusion, eps_theta, x, timesteps, generator.manual_seed(0)))
    assert watched.evaluations >= 4 and list(watched.kept) == [20, 10]  # nothing is evaluated at 0
    assert torch.equal(watched.kept[20], x)
    assert 5 * (1 - 5 / 20) <= sum(moves) <= 5 and min(moves) > 0  # all but, at most, the last stride
    if name in ("ddpm", *DETERMINISTIC):
        half_way = SAMPLERS[name](diffusion, eps_theta, x, timesteps[:3], generator.manual_seed(0))
        assert torch.equal(watched.kept[10], half_way)
        assert watched.evaluations == 4 and moves == [5 * 5 / 20] * 3
    assert Watched(lambda x, t: -x, 20)(x, torch.tensor([7] * 5)).equal(-x)  # a bar is not needed
