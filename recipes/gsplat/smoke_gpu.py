"""Covariances, spherical harmonics, projection and rasterization on the GPU, forward and backward, against plain torch.

The first three have references in the package. The rasterization's is here: all Gaussians of a pixel, sorted by depth, blended
in double precision. Random scenes of 150 Gaussians; three cameras; single precision with fast exponentials.
"""

import torch
from gsplat import (
    fully_fused_projection,
    isect_offset_encode,
    isect_tiles,
    quat_scale_to_covar_preci,
    rasterize_to_pixels,
    spherical_harmonics,
)
from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci, _spherical_harmonics

WIDTH, HEIGHT, TILE = 70, 50, 16
worst = {}
"By what was compared: the largest error, and the tolerance."


def close(name, found, expected, tolerance):
    """Relative to the largest value."""
    assert found.shape == expected.shape, f"{name}: {found.shape}, not {expected.shape}"
    assert torch.isfinite(found).all(), f"{name}: not finite"
    error = ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    assert error <= tolerance, f"{name}: off by {error:.2e} of the largest value, allowed are {tolerance:.0e}"
    worst[name] = (max(error, worst.get(name, (0.0, tolerance))[0]), tolerance)


def compare(name, found, expected, inputs, doubles, tolerance, factor=10):
    """Results and gradients; `doubles` are the inputs in double precision."""
    close(name, found, expected, tolerance)
    gradient = torch.randn_like(found)
    results = torch.autograd.grad(found, inputs, gradient, retain_graph=True)
    references = torch.autograd.grad(expected, doubles, gradient.double(), retain_graph=True)
    for result, reference in zip(results, references, strict=True):
        close(f"{name}, gradients", result, reference, factor * tolerance)


def doubled(*tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def blended(means, conics, colours, opacities, background, depths):
    """Colours of shape (cameras, height, width, channels), and how opaque the pixels are; of arguments without a grid."""
    rows, columns = torch.meshgrid(
        torch.arange(HEIGHT, device="cuda") + 0.5, torch.arange(WIDTH, device="cuda") + 0.5, indexing="ij"
    )
    images, alphas = [], []
    for camera in range(means.shape[0]):
        order = depths[camera].argsort()
        order = order[torch.isfinite(depths[camera][order])]  # without the Gaussians that the camera does not see
        dx = means[camera, order, 0] - columns[..., None]
        dy = means[camera, order, 1] - rows[..., None]
        xx, xy, yy = conics[camera, order].unbind(-1)
        sigma = 0.5 * (xx * dx * dx + yy * dy * dy) + xy * dx * dy
        alpha = (opacities[camera, order] * torch.exp(-sigma)).clamp(max=0.999)
        alpha = torch.where(alpha < 1 / 255, torch.zeros_like(alpha), alpha)
        left = torch.cumprod(1 - alpha, -1)
        before = torch.cat([torch.ones_like(left[..., :1]), left[..., :-1]], -1)
        images.append((alpha * before) @ colours[camera, order] + left[..., -1:] * background[camera])
        alphas.append(1 - left[..., -1:])
    return torch.stack(images), torch.stack(alphas)


torch.manual_seed(0)
means = (torch.randn(150, 3, device="cuda") * torch.tensor([1.5, 1.0, 1.0], device="cuda")).requires_grad_()
quats = torch.nn.functional.normalize(torch.randn(150, 4, device="cuda"), dim=-1).requires_grad_()
scales = (torch.rand(150, 3, device="cuda") * 0.2 + 0.05).requires_grad_()
viewmats = torch.eye(4, device="cuda").repeat(3, 1, 1)
viewmats[:, 2, 3], viewmats[:, 0, 3] = 6.0, torch.tensor([-0.3, 0.0, 0.4], device="cuda")
Ks = torch.tensor([[60.0, 0, WIDTH / 2], [0, 60.0, HEIGHT / 2], [0, 0, 1]], device="cuda").repeat(3, 1, 1)

inputs, exact = (quats, scales), doubled(quats, scales)
found = quat_scale_to_covar_preci(*inputs)
expected = _quat_scale_to_covar_preci(*exact)
for name, mine, theirs, tolerance in zip(("covariance", "precision"), found, expected, (1e-5, 1e-4), strict=True):
    compare(name, mine, theirs, inputs, exact, tolerance)
covars = expected[0]

for degree in range(5):
    dirs = torch.randn(500, 3, device="cuda", requires_grad=True)
    coeffs = torch.randn(500, 25, 3, device="cuda", requires_grad=True)
    directions = doubled(dirs, coeffs)
    found, expected = spherical_harmonics(degree, dirs, coeffs), _spherical_harmonics(degree, *directions)
    inputs = (dirs, coeffs) if degree else (coeffs,)  # the lowest degree is the same in all directions
    compare("spherical harmonics", found, expected, inputs, directions[-len(inputs) :], 1e-5)

for model in ("pinhole", "ortho", "fisheye"):
    K = Ks.clone()
    if model == "ortho":
        K[:, [0, 1], [0, 1]] = 15.0
    radii, *results = fully_fused_projection(means, None, quats, scales, viewmats, K, WIDTH, HEIGHT, camera_model=model)
    wide = doubled(means, quats, scales)
    covars, _ = _quat_scale_to_covar_preci(wide[1], wide[2], compute_preci=False)
    wanted, *references = _fully_fused_projection(
        wide[0], covars, viewmats.double(), K.double(), WIDTH, HEIGHT, camera_model=model
    )
    seen = ((radii > 0).all(-1)) & ((wanted > 0).all(-1))
    assert (radii - wanted)[seen].abs().max() <= 1, f"{model}: other radii"
    assert ((radii > 0).all(-1) == (wanted > 0).all(-1)).double().mean() > 0.99, f"{model}: other Gaussians are seen"
    compare(f"{model}, means", results[0][seen], references[0][seen], (means,), wide[:1], 1e-5)
    compare(f"{model}, depths", results[1][seen], references[1][seen], (means,), wide[:1], 1e-5)
    inputs = (quats, scales) if model == "ortho" else (means, quats, scales)  # the place of a Gaussian has no effect there
    compare(f"{model}, conics", results[2][seen], references[2][seen], inputs, wide[-len(inputs) :], 1e-3)

radii, means2d, depths, conics, _ = fully_fused_projection(means, None, quats, scales, viewmats, Ks, WIDTH, HEIGHT)
tiles = -(-WIDTH // TILE), -(-HEIGHT // TILE)
_, keys, ids = isect_tiles(means2d, radii, depths, TILE, *tiles)
offsets = isect_offset_encode(keys, 3, *tiles)
hidden = depths.detach().double().masked_fill(~(radii > 0).all(-1), float("inf"))
for channels in (1, 3, 17):
    colours, background = torch.rand(3, 150, channels, device="cuda"), torch.rand(3, channels, device="cuda")
    opacities = torch.rand(3, 150, device="cuda") * 0.7 + 0.1
    inputs = [tensor.detach().requires_grad_() for tensor in (means2d, conics, colours, opacities, background)]
    exact = doubled(*inputs)
    found, alphas = rasterize_to_pixels(*inputs[:4], WIDTH, HEIGHT, TILE, offsets, ids, inputs[4])
    expected, opaque = blended(*exact, hidden)
    close("opacity of pixels", alphas, opaque, 1e-2)
    # A Gaussian ends at 1/255 of its opacity, and a pixel at a ten-thousandth of its light: a few pixels differ by this.
    compare("rasterization", found, expected, inputs, exact, 1e-2, factor=3)

# The comparison can fail: Gaussians that are blended from the back to the front give another image.
try:
    close("", found, blended(*exact, torch.where(hidden.isinf(), hidden, -hidden))[0], 1e-2)
except AssertionError:
    NEGATIVE_CONTROL = "an image that is blended from the back to the front is refused"
    COMPARISONS = [{"name": name, "error": error, "tolerance": bound} for name, (error, bound) in worst.items()]
    print(f"{len(worst)} results on {torch.cuda.get_device_name()} agree with torch, forward and backward")
else:
    raise AssertionError("the comparison accepts another order of depth")
