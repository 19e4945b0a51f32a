"""Every operator with CUDA code on the GPU against plain torch, on random points and graphs.

The operators return indices: sets of neighbours are compared by their distances, which have no ties. A random walk and a
matching have many right results; each is checked for what makes it right.
"""

import torch
from torch_cluster import fps, graclus_cluster, grid_cluster, knn, nearest, radius, random_walk

worst = {}
"By what was compared: the largest error, and the tolerance."


def close(name, found, expected, tolerance):
    assert found.shape == expected.shape, f"{name}: {found.shape}, not {expected.shape}"
    error = (found.double() - expected.double()).abs().max().item() / expected.double().abs().max().item()
    assert error <= tolerance, f"{name}: off by {error:.2e} of the largest value, allowed are {tolerance:.0e}"
    worst[name] = (max(error, worst.get(name, (0.0, tolerance))[0]), tolerance)


def distances(x, y):
    return (y[:, None].double() - x[None].double()).norm(dim=-1)


def farthest_points(x, count):
    """Each next point is the farthest from those that were chosen before; the first is point 0."""
    chosen = [0]
    nearest_chosen = (x - x[0]).norm(dim=-1)
    for _ in range(count - 1):
        chosen.append(int(nearest_chosen.argmax()))
        nearest_chosen = torch.minimum(nearest_chosen, (x - x[chosen[-1]]).norm(dim=-1))
    return torch.tensor(chosen, device=x.device)


torch.manual_seed(0)
for dtype in (torch.float32, torch.float64):
    for dimensions in (2, 3, 17):
        x = torch.randn(900, dimensions, device="cuda", dtype=dtype)
        y = torch.randn(300, dimensions, device="cuda", dtype=dtype)
        table = distances(x, y)
        queries, points = knn(x, y, 7)
        assert torch.equal(queries, torch.arange(300, device="cuda").repeat_interleave(7)), "knn: other queries"
        found = table[queries, points].reshape(300, 7).sort(1).values
        close(f"knn {dtype}", found, table.topk(7, largest=False).values.sort(1).values, 1e-6)
        # Two batches: neighbours are of the query's own batch.
        batch_x, batch_y = (torch.arange(length, device="cuda") * 2 // length for length in (900, 300))
        queries, points = knn(x, y, 7, batch_x, batch_y)
        assert torch.equal(batch_y[queries], batch_x[points]), "knn: a neighbour of another batch"
        apart = table.masked_fill(batch_y[:, None] != batch_x, float("inf"))
        found = table[queries, points].reshape(300, 7).sort(1).values
        close(f"knn of batches {dtype}", found, apart.topk(7, largest=False).values.sort(1).values, 1e-6)

        limit = table.median().item()
        queries, points = radius(x, y, limit, max_num_neighbors=900)
        inside = torch.zeros_like(table)
        inside[queries, points] = 1
        surely = (table - limit).abs() > 1e-5 * limit
        close(f"radius {dtype}", inside[surely], (table < limit).double()[surely], 0)
        found = table[nearest(x, y), torch.arange(900, device="cuda")]
        close(f"nearest {dtype}", found, table.min(0).values, 1e-6)
        chosen = fps(x, ratio=0.1, random_start=False)
        close(f"fps {dtype}", x[chosen], x[farthest_points(x, 90)], 0)
        size = torch.full((dimensions,), 0.7, device="cuda", dtype=dtype)
        cells = ((x - x.min(0).values) / size).long()
        if dimensions < 17:  # the number of a cell must fit into 64 bits
            found = grid_cluster(x, size)[:, None] == grid_cluster(x, size)[None]
            close(f"grid {dtype}", found, (cells[:, None] == cells[None]).all(-1), 0)

adjacent = torch.rand(200, 200, device="cuda") < 0.05
adjacent = (adjacent | adjacent.T).fill_diagonal_(False)
row, col = adjacent.nonzero().T
pairs = graclus_cluster(row, col)
for label, size in zip(*pairs.unique(return_counts=True), strict=True):
    members = (pairs == label).nonzero().flatten()
    assert size <= 2, "graclus: a cluster of more than two"
    assert label == members.min(), "graclus: a cluster has the number of another node"
    assert size == 1 or adjacent[members[0], members[1]], "graclus: a pair without an edge"
single = (pairs == torch.arange(200, device="cuda")) & (pairs.bincount(minlength=200)[pairs] == 1)
assert not adjacent[single][:, single].any(), "graclus: two single neighbours"

walks = random_walk(row, col, torch.arange(200, device="cuda").repeat(200), 10)
lonely = ~adjacent.any(1)
assert (adjacent[walks[:, :-1], walks[:, 1:]] | lonely[walks[:, :-1]]).all(), "random_walk: a step without an edge"
steps = torch.zeros(200, 200, device="cuda")
steps.index_put_((walks[:, :-1].flatten(), walks[:, 1:].flatten()), torch.ones(400_000, device="cuda"), accumulate=True)
often = steps[~lonely] / steps[~lonely].sum(1, keepdim=True)
close("random_walk, steps", often, adjacent[~lonely] / adjacent[~lonely].sum(1, keepdim=True), 0.5)

# The comparison can fail: the neighbours of other queries are others.
x, y = torch.randn(900, 3, device="cuda"), torch.randn(300, 3, device="cuda")
queries, points = knn(x, y.flip(0), 7)
try:
    table = distances(x, y)
    close("", table[queries, points].reshape(300, 7).sort(1).values, table.topk(7, largest=False).values.sort(1).values, 1e-6)
except AssertionError:
    NEGATIVE_CONTROL = "the neighbours of the reversed queries are refused"
    COMPARISONS = [{"name": name, "error": error, "tolerance": bound} for name, (error, bound) in worst.items()]
    print(f"seven operators on {torch.cuda.get_device_name()} agree with torch")
else:
    raise AssertionError("the comparison accepts the neighbours of other queries")
