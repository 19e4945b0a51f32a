"""The extension is the wheel's, not a compile at the first use, and has its entry points; the reference in plain torch gives
results that were computed by hand. The kernels need a GPU (smoke_gpu.py)."""

import torch
from gsplat import csrc
from gsplat.cuda._backend import _C
from gsplat.cuda._torch_impl import _quat_scale_to_covar_preci, _spherical_harmonics

assert _C is csrc, "gsplat uses another extension than its own"
PAIRS = ("quat_scale_to_covar_preci", "spherical_harmonics", "projection_ewa_simple", "projection_ewa_3dgs_fused")
MORE = ("projection_ewa_3dgs_packed", "rasterize_to_pixels_3dgs", "projection_2dgs_fused", "projection_2dgs_packed")
LAST = ("rasterize_to_pixels_2dgs", "rasterize_to_pixels_from_world_3dgs")
names = {f"{name}_{way}" for name in (*PAIRS, *MORE, *LAST) for way in ("fwd", "bwd")}
names |= {"adam", "relocation", "intersect_tile", "intersect_offset", "projection_ut_3dgs_fused", "null"}
names |= {"rasterize_to_indices_3dgs", "rasterize_to_indices_2dgs"}
assert names <= set(dir(csrc)), names - set(dir(csrc))
assert csrc.CameraModelType.FISHEYE != csrc.CameraModelType.PINHOLE
assert csrc.UnscentedTransformParameters().beta == 2.0
turned = torch.tensor([[0.5**0.5, 0.0, 0.0, 0.5**0.5]])  # a quarter turn around z
covariance, precision = _quat_scale_to_covar_preci(turned, torch.tensor([[1.0, 2.0, 3.0]]))
assert torch.allclose(covariance[0], torch.diag(torch.tensor([4.0, 1.0, 9.0])), atol=1e-5), covariance
assert torch.allclose(covariance @ precision, torch.eye(3), atol=1e-5)
constant = _spherical_harmonics(0, torch.ones(1, 3), torch.ones(1, 1, 3))
assert torch.allclose(constant, torch.full((1, 3), 0.2820948)), constant
said = "the kernel for a GPU accepts tensors of the CPU"
try:
    csrc.quat_scale_to_covar_preci_fwd(turned, torch.ones(1, 3), True, True, False)
except RuntimeError as refusal:
    said = str(refusal)
assert "CUDA" in said, said
print(f"gsplat.csrc has its {len(names)} entry points; the reference is right")
