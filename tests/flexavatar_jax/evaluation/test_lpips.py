"""LPIPS against a plain transcription of the published module, with weights by a rule."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipelines.errors import UserError
from flexavatar_jax.evaluation import lpips
from flexavatar_jax.published.parity_rule import rule_tensor

RNG = np.random.default_rng(0)
IMAGES = RNG.random((2, 40, 40, 3)).astype(np.float32)
OTHERS = np.clip(IMAGES + 0.2 * RNG.standard_normal(IMAGES.shape), 0, 1).astype(np.float32)


def weights_of(network):
    """The rule's weights; those of the comparison are positive, as the published ones are."""
    weights = {n: rule_tensor(n, s, "lpips") for n, s in lpips.shapes(network).items()}
    return {n: np.abs(w) if n.startswith("lin") else w for n, w in weights.items()}


def conv(x, kernel, bias, stride, pad):
    """A convolution, one tap of its kernel at a time; x is [C, H, W]."""
    x = np.pad(x, [(0, 0), (pad, pad), (pad, pad)])
    k = kernel.shape[-1]
    h, w = ((n - k) // stride + 1 for n in x.shape[1:])
    out = np.zeros((len(kernel), h, w))
    for i in range(k):
        for j in range(k):
            part = x[:, i : i + stride * h : stride, j : j + stride * w : stride]
            out += np.tensordot(kernel[:, :, i, j], part, 1)
    return np.maximum(out + bias[:, None, None], 0)


def pool(x, window, stride):
    h, w = ((n - window) // stride + 1 for n in x.shape[1:])
    parts = [
        x[:, i : i + stride * h : stride, j : j + stride * w : stride]
        for i in range(window)
        for j in range(window)
    ]
    return np.max(parts, axis=0)


def reference_features(network, w, image):
    """The five layers that are compared, as torchvision numbers its modules."""
    x = (2 * image.astype(np.float64).transpose(2, 0, 1) - 1 - SHIFT) / SCALE
    if network == "alex":
        plan = [
            [("c", 1, 0, 4, 2)],
            [("p", 3, 2), ("c", 2, 3, 1, 2)],
            [("p", 3, 2), ("c", 3, 6, 1, 1)],
            [("c", 4, 8, 1, 1)],
            [("c", 5, 10, 1, 1)],
        ]
    else:
        numbers = [(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]
        plan = [
            [("p", 2, 2)] * (s > 1) + [("c", s, n, 1, 1) for n in group]
            for s, group in enumerate(numbers, 1)
        ]
    for layer in plan:
        for kind, *how in layer:
            if kind == "p":
                x = pool(x, *how)
            else:
                group, number, stride, pad = how
                name = f"net.slice{group}.{number}"
                x = conv(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, pad)
        yield x


SHIFT = np.array([-0.030, -0.088, -0.188]).reshape(3, 1, 1)
SCALE = np.array([0.458, 0.448, 0.450]).reshape(3, 1, 1)


def reference(network, w, a, b):
    total = 0.0
    pairs = zip(reference_features(network, w, a), reference_features(network, w, b), strict=True)
    for i, (p, q) in enumerate(pairs):
        p, q = (x / (np.sqrt((x**2).sum(0)) + 1e-10) for x in (p, q))
        total += np.tensordot(w[f"lin{i}.model.1.weight"][0, :, 0, 0], (p - q) ** 2, 1).mean()
    return total


@pytest.mark.parametrize("network", ["vgg", "alex"])
def test_the_distance_is_the_references(network, tmp_path):
    weights = weights_of(network)
    save_file(weights, tmp_path / "lpips.safetensors")
    loaded = lpips.load(tmp_path / "lpips.safetensors", network)
    found = lpips.lpips(loaded, network, IMAGES, OTHERS)
    expected = [reference(network, weights, a, b) for a, b in zip(IMAGES, OTHERS, strict=True)]
    assert min(expected) > 0.01
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    np.testing.assert_array_equal(lpips.lpips(loaded, network, IMAGES, IMAGES), 0)


def test_weights_of_another_network_are_named(tmp_path):
    path = tmp_path / "lpips.safetensors"
    save_file(weights_of("alex"), path)
    with pytest.raises(
        UserError, match=r"no tensor net\.slice1\.0\.weight of shape \[64, 3, 3, 3\]"
    ):
        lpips.load(path, "vgg")
    with pytest.raises(UserError, match="cannot be read"):
        lpips.load(tmp_path / "nowhere.safetensors", "vgg")
    path.write_bytes(b"weights")
    with pytest.raises(UserError, match="no safetensors file"):
        lpips.load(path, "vgg")
