"""Basis and weighting on the GPU, forward and backward, against their formulas in plain torch in double precision.

Each floating-point type, each degree, one to three dimensions, open and closed splines.
"""

import itertools

import torch
from torch_spline_conv import spline_basis, spline_weighting

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
"Relative to the largest value."
worst = {}
"By what was compared: the largest error, and the tolerance."
PIECES = {
    1: (lambda v: 1 - v, lambda v: v),
    2: (lambda v: 0.5 * v * v - v + 0.5, lambda v: -v * v + v + 0.5, lambda v: 0.5 * v * v),
    3: (
        lambda v: (1 - v) ** 3 / 6,
        lambda v: (3 * v**3 - 6 * v * v + 4) / 6,
        lambda v: (-3 * v**3 + 3 * v * v + 3 * v + 1) / 6,
        lambda v: v**3 / 6,
    ),
}
"By degree: the pieces of the B-spline."


def close(name, found, expected, tolerance):
    assert torch.isfinite(found).all(), f"{name}: not finite"
    error = ((found.double() - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"{name}: off by {error:.2e} of the largest value, allowed are {tolerance:.0e}"
    worst[name] = (max(error, worst.get(name, (0.0, tolerance))[0]), tolerance)


def reference(pseudo, sizes, opens, degree):
    """Values of shape (edges, (degree + 1) ** dimensions), and the index of the weight of each."""
    values, indices = [], []
    for digits in itertools.product(range(degree + 1), repeat=len(sizes)):
        value, index, offset = 1.0, 0, 1
        for place, digit in enumerate(reversed(digits)):  # the first dimension changes fastest
            scaled = pseudo[:, place] * (sizes[place] - degree * opens[place])
            cell = scaled.detach().floor()
            value = value * PIECES[degree][digit](scaled - cell)
            index = index + (cell.long() + digit) % sizes[place] * offset
            offset *= sizes[place]
        values.append(value)
        indices.append(index)
    return torch.stack(values, 1), torch.stack(indices, 1)


torch.manual_seed(0)
count = 0
for dtype, degree, dimensions, opened in itertools.product(TOLERANCES, (1, 2, 3), (1, 2, 3), (0, 1)):
    tolerance, sizes, opens = TOLERANCES[dtype], [5, 6, 4][:dimensions], [opened, 1, 0][:dimensions]
    # Away from the borders of the cells, where the derivative jumps.
    pseudo = (torch.rand(700, dimensions, device="cuda", dtype=dtype) * 0.98 + 0.01).requires_grad_()
    exact = pseudo.detach().double().requires_grad_()
    as_tensor = torch.tensor(sizes, device="cuda"), torch.tensor(opens, dtype=torch.uint8, device="cuda")
    basis, index = spline_basis(pseudo, *as_tensor, degree)
    wanted, places = reference(exact, sizes, opens, degree)
    same = (index == places).all(1)
    assert same.float().mean() > 0.99, "the indices of the weights differ"  # rounding may move a value to the next cell
    name = f"degree {degree} {dtype}"
    close(f"basis {name}", basis[same], wanted[same], tolerance)
    gradient = torch.randn_like(basis) * same[:, None]
    (found,) = torch.autograd.grad(basis, pseudo, gradient, retain_graph=True)
    (expected,) = torch.autograd.grad(wanted, exact, gradient.double(), retain_graph=True)
    close(f"basis backward {name}", found, expected, 10 * tolerance)

    cells = torch.Size(sizes).numel()
    x = torch.randn(700, 8, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(cells, 8, 16, device="cuda", dtype=dtype, requires_grad=True)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight, basis)]
    plain = [x, weight, basis.detach().requires_grad_()]
    found = spline_weighting(*plain, index)
    expected = torch.einsum("es,ei,esio->eo", wide[2], wide[0], wide[1][index])
    close(f"weighting {name}", found, expected, tolerance)
    gradient = torch.randn_like(found)
    results = torch.autograd.grad(found, plain, gradient)
    references = torch.autograd.grad(expected, wide, gradient.double())
    for result, exact_result in zip(results, references, strict=True):
        close(f"weighting backward {name}", result, exact_result, 10 * tolerance)
    count += 1

# The comparison can fail: the basis of an open spline is not that of a closed one.
pseudo = torch.rand(700, 1, device="cuda")
basis, _ = spline_basis(pseudo, torch.tensor([5], device="cuda"), torch.tensor([1], dtype=torch.uint8, device="cuda"), 1)
try:
    close("", basis, reference(pseudo.double(), [5], [0], 1)[0], 1e-5)
except AssertionError:
    NEGATIVE_CONTROL = "the basis of an open spline is refused where a closed one was asked for"
    COMPARISONS = [{"name": name, "error": error, "tolerance": bound} for name, (error, bound) in worst.items()]
    print(f"{count} cases on {torch.cuda.get_device_name()} agree with the formulas, forward and backward")
else:
    raise AssertionError("the comparison accepts the basis of another spline")
