"""The operators are registered with torch, and the CPU half of each gives a result that was computed by hand; the CUDA half
needs a GPU (smoke_gpu.py)."""

import torch
from torch_spline_conv import spline_basis, spline_weighting

for name in ("spline_basis", "spline_weighting"):
    (schema,) = (getattr(torch.ops.torch_spline_conv, name).default._schema,)
    assert len(schema.arguments) == 4, schema
assert torch.ops.torch_spline_conv.cuda_version() == 13000, torch.ops.torch_spline_conv.cuda_version()
pseudo = torch.tensor([[0.0], [0.0625], [0.25], [0.75], [0.9375], [1.0]])
basis, index = spline_basis(pseudo, torch.tensor([5]), torch.tensor([1], dtype=torch.uint8), 1)
assert basis.tolist() == [[1, 0], [0.75, 0.25], [1, 0], [1, 0], [0.25, 0.75], [1, 0]], basis
assert index.tolist() == [[0, 1], [0, 1], [1, 2], [3, 4], [3, 4], [4, 0]], index
x, weight = torch.arange(1.0, 13.0).reshape(6, 2), torch.arange(1.0, 21.0).reshape(5, 2, 2)
rows = torch.einsum("ei,esio->eso", x, weight[index])
assert torch.equal(spline_weighting(x, weight, basis, index), (basis[..., None] * rows).sum(1))
print("spline_basis and spline_weighting are registered; their CPU results are right")
