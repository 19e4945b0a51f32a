"""The extension has its entry points with all arguments, and refuses tensors of the CPU; the reference in plain torch gives a
result that was computed by hand. The kernels need a GPU (smoke_gpu.py)."""

import re

import selective_scan_cuda
import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

for name, arguments in (("fwd", 9), ("bwd", 14)):
    signature = getattr(selective_scan_cuda, name).__doc__.splitlines()[0]
    assert len(set(re.findall(r"arg\d+", signature))) == arguments, signature
assert torch.version.cuda == "13.0", torch.version.cuda
# One channel, one state: the state halves in each step, and the input is added.
u, delta = torch.tensor([[[1.0, 2.0, 4.0]]]), torch.full((1, 1, 3), torch.log(torch.tensor(2.0)).item())
A, B, C = torch.tensor([[-1.0]]), torch.tensor([[1.0]]), torch.tensor([[1.0]])
found = selective_scan_ref(u, delta, A, B, C) / delta
assert torch.allclose(found, torch.tensor([[[1.0, 2.5, 5.25]]])), found
said = "the kernel for a GPU accepts tensors of the CPU"
try:
    selective_scan_fn(u, delta, A, B, C)
except RuntimeError as refusal:
    said = str(refusal)
assert "is_cuda" in said, said
print("selective_scan_cuda has its entry points; the reference scan is right")
