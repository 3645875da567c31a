"""Guidance against closed forms: data that is one Gaussian for each of two labels."""

import pytest
import torch

import ddpm
from ddpm import SAMPLERS, Diffusion, clip_x_0
from ddpm_conditional import cfg, classifier_guidance, dynamic_threshold, rescaled, within

MEANS, STD = torch.tensor([-0.8, 0.5], dtype=torch.float64), 0.3
SCALES = [0.0, 0.5, 1.0, 2.0, 3.0, 7.5]


class TwoGaussians(torch.nn.Module):
    """The ideal eps network of p(x_0) = 1/2 N(m_0, s^2) + 1/2 N(m_1, s^2), each pixel alone; label 2 is null.

    q(x_t | y) = N(sqrt(ab) m_y, ab s^2 + 1 - ab), and eps = -sqrt(1 - ab) grad log q(x_t | y).
    """

    def __init__(self, diffusion):
        super().__init__()
        self.diffusion, self.calls = diffusion, []

    def null(self, y):
        return torch.full_like(y, 2)

    def log_q(self, x, t):
        """log q(x_t | y) of each image for both labels; (B, 2)."""
        ab = self.diffusion.alpha_bar[t].view(-1, 1)
        x = x.flatten(1)
        return -0.5 * torch.stack([(x - ab.sqrt() * m) ** 2 / (ab * STD**2 + 1 - ab) for m in MEANS], 1).sum(
            2
        )

    def forward(self, x, t, y=None):
        self.calls.append(len(x))
        y = self.null(t) if y is None else y
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            log_q = self.log_q(z, t)
            mixture = torch.logsumexp(log_q, 1)
            chosen = torch.where(y == 2, mixture, log_q.gather(1, y.clamp(max=1)[:, None])[:, 0])
            score = torch.autograd.grad(chosen.sum(), z)[0]
        return -(1 - self.diffusion.alpha_bar[t]).sqrt().view(-1, 1, 1, 1) * score


class Posterior(TwoGaussians):
    """The ideal classifier of the same data: its logits are log q(x_t | y), as both labels are as likely."""

    def forward(self, x, t):
        return self.log_q(x, t)


def closed_form(diffusion, x, t, y, scale):
    """-sqrt(1 - ab) (grad log q(x_t) + s grad log p(y | x_t)), one pixel at a time, written out.

    With v = ab s^2 + 1 - ab: grad log q(x_t | y) = (sqrt(ab) m_y - x) / v; the mixture's is their mean under
    p(y | x_t) = sigmoid of the difference of log q.
    """
    ab = diffusion.alpha_bar[t].view(-1, 1, 1, 1)
    v = ab * STD**2 + 1 - ab
    of = [(ab.sqrt() * m - x) / v for m in MEANS]
    log_ratio = (((x - ab.sqrt() * MEANS[0]) ** 2 - (x - ab.sqrt() * MEANS[1]) ** 2) / (2 * v)).sum((1, 2, 3))
    p_1 = log_ratio.sigmoid().view(-1, 1, 1, 1)  # p(y = 1 | x_t)
    score_u = (1 - p_1) * of[0] + p_1 * of[1]
    score_c = torch.where((y == 1).view(-1, 1, 1, 1), of[1], of[0])
    return -(1 - ab).sqrt() * (score_u + scale * (score_c - score_u))


@pytest.fixture
def two():
    diffusion = Diffusion(1000, "cosine", "eps")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 1, 1, 2, generator=g, dtype=torch.float64)
    t = torch.tensor([1, 100, 300, 500, 800, 1000])
    return diffusion, TwoGaussians(diffusion), x, t, torch.tensor([0, 1, 1, 0, 1, 0])


@pytest.mark.parametrize("scale", SCALES)
def test_cfg_is_the_closed_form(two, scale):
    diffusion, net, x, t, y = two
    assert torch.allclose(
        cfg(diffusion, net, y, scale)(x, t), closed_form(diffusion, x, t, y, scale), atol=1e-10
    )


@pytest.mark.parametrize("scale", SCALES)
def test_classifier_guidance_is_the_closed_form(two, scale):
    """The same one: by Bayes, grad log p(y | x_t) = grad log q(x_t | y) - grad log q(x_t)."""
    diffusion, net, x, t, y = two
    guided = classifier_guidance(diffusion, diffusion.denoiser(net), Posterior(diffusion), y, scale)
    with torch.no_grad():  # as samplers call it
        assert torch.allclose(guided(x, t), closed_form(diffusion, x, t, y, scale), atol=1e-10)


def test_scale_1_is_conditional_and_0_unconditional_exactly(two):
    diffusion, net, x, t, y = two
    assert torch.equal(cfg(diffusion, net, y, 1.0)(x, t), diffusion.denoiser(net, y)(x, t))
    assert torch.equal(cfg(diffusion, net, y, 0.0)(x, t), diffusion.denoiser(net, net.null(y))(x, t))
    guided = classifier_guidance(diffusion, diffusion.denoiser(net), Posterior(diffusion), y, 0.0)
    assert torch.equal(guided(x, t), diffusion.denoiser(net)(x, t))


def test_cfg_is_one_batch_of_both_halves(two):
    diffusion, net, x, t, y = two
    cfg(diffusion, net, y, 3.0)(x, t)
    assert net.calls == [12]
    net.calls.clear()
    cfg(diffusion, net, y, 1.0)(x, t)  # nothing unconditional is needed
    assert net.calls == [6]


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v", "dual"])
def test_cfg_guides_eps_whatever_the_network_predicts(two, prediction):
    """eps is linear in x_0 and in v at fixed x_t, so guidance of any is guidance of eps."""
    diffusion, net, x, t, y = two
    other = Diffusion(1000, "cosine", prediction)

    def predicts(x, t, y):
        eps = net(x, t, y)
        x_0 = diffusion.x_0_from_eps(x, eps, t)
        return torch.cat([eps, x_0], dim=1) if prediction == "dual" else other.target(x_0, eps, t)

    predicts.null = net.null
    assert torch.allclose(cfg(other, predicts, y, 3.0)(x, t), closed_form(diffusion, x, t, y, 3.0), atol=1e-9)


def test_interval(two):
    diffusion, net, x, t, y = two
    eps = cfg(diffusion, net, y, 3.0, interval=(100, 500))(x, t)
    inside = (t >= 100) & (t <= 500)
    assert torch.allclose(eps[inside], closed_form(diffusion, x, t, y, 3.0)[inside])
    assert torch.allclose(eps[~inside], closed_form(diffusion, x, t, y, 1.0)[~inside])
    net.calls.clear()
    cfg(diffusion, net, y, 3.0, interval=(100, 500))(x, torch.full_like(t, 700))
    assert net.calls == [6]  # outside, guidance costs nothing
    # scale 0 is unconditional inside the interval alone
    eps = cfg(diffusion, net, y, 0.0, interval=(100, 500))(x, t)
    assert torch.allclose(eps[~inside], closed_form(diffusion, x, t, y, 1.0)[~inside])
    assert torch.allclose(eps[inside], closed_form(diffusion, x, t, y, 0.0)[inside])


def test_within_bounds_are_inclusive():
    x = torch.zeros(4, 1, 1, 1)
    inside, outside = lambda x, t: x + 1, lambda x, t: x - 1
    eps = within((2, 3), inside, outside)(x, torch.tensor([1, 2, 3, 4]))
    assert eps.flatten().tolist() == [-1, 1, 1, -1]
    assert within((2, 3), inside, outside)(x, torch.tensor([3] * 4)).flatten().tolist() == [1] * 4


@pytest.mark.parametrize("phi", [0.0, 0.3, 1.0])
def test_rescale_restores_the_contrast_of_the_conditional_x_0(phi):
    """std(x_0) = phi std(x_c) + (1 - phi) std(guided x_0), and only the scale changes (Lin et al., 3.4)."""
    diffusion = Diffusion(1000, "cosine", "eps")
    g = torch.Generator().manual_seed(0)
    x_t, eps_u, eps_c = torch.randn(3, 4, 3, 8, 8, generator=g, dtype=torch.float64)
    t = torch.tensor([50, 300, 600, 900])
    eps = torch.lerp(eps_u, eps_c, 5.0)

    def x_0(eps):
        return diffusion.x_0_from_eps(x_t, eps, t).flatten(1)

    result = x_0(rescaled(diffusion, eps, eps_c, x_t, t, phi))
    assert torch.allclose(result.std(1), phi * x_0(eps_c).std(1) + (1 - phi) * x_0(eps).std(1))
    factor = result / x_0(eps)
    assert torch.allclose(factor, factor[:, :1].expand_as(factor))

    def net(x, t, y):
        return torch.cat([eps_u, eps_c])

    net.null = torch.zeros_like
    in_cfg = cfg(diffusion, net, torch.ones(4, dtype=torch.long), 5.0, rescale=phi)(x_t, t)
    assert torch.allclose(x_0(in_cfg), result)


def test_dynamic_threshold():
    """x_0 / s clamped to [-1, 1], s the quantile of |x_0| and at least 1 (Imagen, section 2.3)."""
    diffusion = Diffusion(1000, "cosine", "eps")
    g = torch.Generator().manual_seed(0)
    x_0 = torch.randn(3, 2, 8, 8, generator=g, dtype=torch.float64) * torch.tensor([0.1, 1, 5]).view(
        3, 1, 1, 1
    )
    t = torch.tensor([200, 200, 200])
    x_t, eps = diffusion.noise_images(x_0, t, g)
    for p in (0.5, 0.9, 1.0):
        thresholded = dynamic_threshold(diffusion, lambda x, t: eps, p)
        result = diffusion.x_0_from_eps(x_t, thresholded(x_t, t), t)
        for image, out in zip(x_0, result, strict=True):
            values = image.abs().flatten().sort().values
            s = max(1.0, values.quantile(p, interpolation="nearest").item())
            assert torch.allclose(out, (image / s).clamp(-1, 1), atol=1e-9)
    assert torch.allclose(result[0], x_0[0], atol=1e-9)  # all within [-1, 1]: nothing changes


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_reaches_the_label_under_every_guidance(sampler):
    """Samples of one label have its mean and spread at scale 1; a larger scale moves them on, away from the
    other label."""
    diffusion = Diffusion(1000, "cosine", "eps")
    net = TwoGaussians(diffusion)
    y = torch.tensor([0, 1]).repeat(1500)
    posterior = Posterior(diffusion)

    def draw(eps_theta):
        g = torch.Generator().manual_seed(1)
        x = torch.randn(3000, 1, 1, 1, generator=g, dtype=torch.float64)
        x_0 = SAMPLERS[sampler](diffusion, eps_theta, x, diffusion.timesteps(100), g).flatten()
        return x_0[y == 0], x_0[y == 1]

    plain = draw(cfg(diffusion, net, y, 1.0))
    by_classifier = draw(classifier_guidance(diffusion, diffusion.denoiser(net), posterior, y, 1.0))
    for x_0 in (plain, by_classifier):
        for of_label, mean in zip(x_0, MEANS, strict=True):
            assert of_label.mean() == pytest.approx(mean.item(), abs=0.05)
            assert of_label.std() == pytest.approx(STD, abs=0.05)
    strong = draw(cfg(diffusion, net, y, 3.0))
    assert strong[0].mean() < plain[0].mean() - 0.02 and strong[1].mean() > plain[1].mean() + 0.02
    assert not plain[0].requires_grad and not by_classifier[0].requires_grad


def test_guidance_composes_with_clipping(two):
    """Wrappers act one after the other: what is within [-1, 1] already, clipping leaves alone."""
    diffusion, net, x, t, y = two
    guided = cfg(diffusion, net, y, 7.5)
    assert diffusion.x_0_from_eps(x, guided(x, t), t).abs().max() > 1
    thresholded = dynamic_threshold(diffusion, guided, 0.9)
    for eps_theta in (clip_x_0(diffusion, guided), thresholded):
        assert diffusion.x_0_from_eps(x, eps_theta(x, t), t).abs().max() <= 1 + 1e-6
    assert torch.allclose(clip_x_0(diffusion, thresholded)(x, t), thresholded(x, t))


def test_samplers_run_classifier_guidance_under_no_grad(two):
    diffusion, net, x, _, y = two
    seen = []

    def classifier(x, t):
        seen.append(torch.is_grad_enabled())
        return Posterior(diffusion).log_q(x, t)

    guided = classifier_guidance(diffusion, diffusion.denoiser(net), classifier, y, 2.0)
    x_0 = ddpm.ddim(diffusion, guided, x, diffusion.timesteps(3))
    assert all(seen) and len(seen) == 3 and not x_0.requires_grad
