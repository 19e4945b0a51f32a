"""Two of the engine's own kernels against plain torch in float32, on random input; it only serves: nothing goes backward.

The libraries are loaded from their files, as in smoke.py: the package's own import also wants what the set has beside it.
"""

import site
from pathlib import Path

import torch

for name in ("_core_C", "_C"):  # the second names types of the first
    (place,) = Path(site.getsitepackages()[0], "aphrodite").glob(f"{name}.*so")
    torch.ops.load_library(place)
ops = torch.ops._C

worst = {}
"By what was compared: the largest error, and the tolerance."


def close(name, found, wanted, tolerance):
    """Relative to the value, or absolute where it is below 1."""
    assert torch.isfinite(found).all()
    error = ((found.float() - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
    assert error <= tolerance, f"{name}: off by {error:.2e}, allowed are {tolerance:.0e}"
    worst[name] = (max(error, worst.get(name, (0.0, tolerance))[0]), tolerance)


torch.manual_seed(0)
for dtype, tolerance in ((torch.float16, 5e-3), (torch.bfloat16, 3e-2)):
    for rows, width in ((1, 512), (33, 4096)):
        x = torch.randn(rows, 2 * width, device="cuda", dtype=dtype)
        out = torch.empty(rows, width, device="cuda", dtype=dtype)
        ops.silu_and_mul(out, x)
        wanted = torch.nn.functional.silu(x[:, :width].float()) * x[:, width:].float()
        close(f"silu_and_mul {dtype}", out, wanted, tolerance)
        swapped = torch.nn.functional.silu(x[:, width:].float()) * x[:, :width].float()
        assert not torch.allclose(out.float(), swapped, atol=tolerance, rtol=tolerance), "either half would do"
        x, weight = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((rows, width), (width,)))
        out = torch.empty_like(x)
        ops.rms_norm(out, x, weight, 1e-6)
        wanted = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()
        close(f"rms_norm {dtype}", out, wanted, 2 * tolerance)
NEGATIVE_CONTROL = "silu_and_mul of the swapped halves is refused"
COMPARISONS = [{"name": name, "error": error, "tolerance": bound} for name, (error, bound) in worst.items()]
print("silu_and_mul and rms_norm on", torch.cuda.get_device_name(), "agree with torch")
