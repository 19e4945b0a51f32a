"""The extension is there, which the package's import does not require, and has its entry points, Hopper's too; it refuses
tensors of the CPU. The kernels need a GPU (smoke_gpu.py)."""

import natten
import torch
from natten import libnatten

assert natten.HAS_LIBNATTEN, "natten does not use its extension"
kinds = [f"{kind}na{dimension}d" for kind in ("", "reference_", "hopper_") for dimension in (1, 2, 3)]
names = {f"{kind}_{way}" for kind in (*kinds, "fmha", "hopper_fmha") for way in ("forward", "backward")}
names |= {f"token_{way}_{dimension}d" for way in ("permute", "unpermute") for dimension in (1, 2, 3)} | {"compute_delta"}
assert names <= set(dir(libnatten)), names - set(dir(libnatten))
assert torch.version.cuda == "13.0", torch.version.cuda
query = torch.ones(1, 8, 1, 32)
output, logsumexp = torch.empty_like(query), torch.empty(1, 8, 1)
said = "the kernel for a GPU accepts tensors of the CPU"
try:
    libnatten.reference_na1d_forward(output, query, query, query, logsumexp, (3,), (1,), (1,), (False,), 1.0, (8,), 0)
except RuntimeError as refusal:
    said = str(refusal)
assert "CUDA" in said, said
print(f"natten.libnatten has {len(names)} entry points")
