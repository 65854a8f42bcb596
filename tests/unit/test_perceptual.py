"""The perceptual distance against the package whose weights it reads, and what a loss needs of it."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from genlab.nn import perceptual
from genlab.nn.perceptual import PerceptualDistance


@pytest.fixture(scope="module")
def distance():
    return PerceptualDistance()


def smooth(n, side, seed=0):
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, size=side, mode="bicubic").clamp(-1, 1)


def test_the_package_agrees(distance, monkeypatch, capsys):
    """Away from the border the maps are equal; the border makes little difference to the number."""
    for name, attribute in (("torchsummary", "summary"), ("IPython", "embed")):  # it imports these and uses neither
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**{attribute: None}))
    from stlpips_pytorch import stlpips

    theirs = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    x, y = smooth(2, 128), smooth(2, 128, seed=1)
    y[1] = (x[1] + 0.1 * torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(2))).clamp(-1, 1)
    with torch.no_grad():
        outputs = theirs.net(theirs.scaling_layer(x))
        for i, (ours, raw, reach) in enumerate(zip(distance.features(x), outputs, (2, 4, 4, 5, 6), strict=True)):
            want = F.normalize(raw, dim=1, eps=1e-10)
            assert ours.shape == want.shape
            inside = (..., slice(reach, -reach), slice(reach, -reach))  # what the border's pixels don't touch
            assert torch.allclose(ours[inside], want[inside], atol=1e-5), i
        want = theirs(x, y).flatten()
        assert torch.allclose(distance(x, y), want, rtol=0.05)
    assert (want > 0).all()


def test_zero_symmetric_and_growing(distance):
    x = smooth(3, 64)
    noise = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(distance(x, x), torch.zeros(3))
        near, far = x + 0.05 * noise, x + 0.5 * noise
        assert torch.allclose(distance(x, far), distance(far, x))
        assert (distance(x, near) > 0).all()
        assert (distance(x, far) > distance(x, near)).all()
        assert torch.allclose(distance(x[1:2], far[1:2]), distance(x, far)[1:2], atol=1e-6)  # a row is by itself
        moved = distance(x, x.roll(1, -1))
        assert (moved < distance(x, x.flip(-1))).all()  # shift-tolerant


def test_the_gradient_reaches_the_image_and_no_weights(distance):
    x = smooth(1, 32)
    y = (x + 0.01).requires_grad_()
    distance(x, y).sum().backward()
    assert float(y.grad.abs().sum()) > 0
    assert y.grad.isfinite().all()
    assert not any(p.requires_grad for p in distance.parameters())
    assert not distance.training


def test_missing_weights_are_named(monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install stlpips-pytorch==0\.0\.2"):
        PerceptualDistance()
    PerceptualDistance(pretrained=False)
