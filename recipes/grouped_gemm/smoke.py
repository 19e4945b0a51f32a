"""The extension loads, has its entry point with all arguments, and checks them; its kernels need a GPU (smoke_gpu.py)."""

import grouped_gemm_backend
import torch
from grouped_gemm import ops

signature = grouped_gemm_backend.gmm.__doc__.splitlines()[0]
assert (signature.count("torch.Tensor"), signature.count("bool")) == (4, 2), signature
assert torch.version.cuda == "13.0", torch.version.cuda
a, b, sizes = torch.ones(8, 16).bfloat16(), torch.ones(2, 16, 8).bfloat16(), torch.tensor([3, 5])
said = "the kernel for a GPU accepts tensors of the CPU"
try:
    ops.gmm(a, b, sizes)
except RuntimeError as refusal:
    said = str(refusal)
assert "is_cuda" in said, said
said = "both operands may not be transposed"
try:
    grouped_gemm_backend.gmm(a, b, a, sizes, True, True)
except RuntimeError as refusal:
    said = str(refusal)
assert "trans_a && trans_b" in said, said
print("grouped_gemm_backend.gmm checks its arguments")
