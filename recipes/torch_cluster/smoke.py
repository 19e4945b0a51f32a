"""Every operator is registered with torch, and the CPU half of each gives a known result; the CUDA half needs a GPU
(smoke_gpu.py)."""

import torch
from torch_cluster import fps, graclus_cluster, grid_cluster, knn, nearest, neighbor_sampler, radius, random_walk

for name in ("fps", "graclus", "grid", "knn", "nearest", "radius", "random_walk", "neighbor_sampler"):
    assert getattr(torch.ops.torch_cluster, name).default._schema.returns, name
assert torch.ops.torch_cluster.cuda_version() == 13000, torch.ops.torch_cluster.cuda_version()
corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
centres = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
assert knn(corners, centres, 2).sort(1).values.tolist() == [[0, 0, 1, 1], [0, 1, 2, 3]]
assert radius(corners, centres, 1.5).sort(1).values.tolist() == [[0, 0, 1, 1], [0, 1, 2, 3]]
assert nearest(corners, centres).tolist() == [0, 0, 1, 1]
line = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
assert fps(line, ratio=0.5, random_start=False).tolist() == [0, 3]
assert grid_cluster(line, torch.tensor([5.0])).tolist() == [0, 0, 0, 2]
row, col = torch.tensor([0, 1]), torch.tensor([1, 0])
assert graclus_cluster(row, col).tolist() == [0, 0]
assert random_walk(row, col, torch.tensor([0]), 3).tolist() == [[0, 1, 0, 1]]
assert neighbor_sampler(torch.tensor([0]), torch.tensor([0, 1, 2]), 1.0).tolist() == [0]
print("all eight operators are registered; their CPU results are right")
