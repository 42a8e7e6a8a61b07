"""Chunked log-probabilities against plain log-softmax."""

import pytest
import torch
from rounding import assert_rounded

from tuna_peft.models.forward import logps


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 600])  # less than, and more than, one chunk
def test_value_and_gradient_equal_log_softmax(rows, bias):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=bias).requires_grad_(False)
    targets = torch.randint(0, 50, (rows,))
    weights = torch.randn(rows)
    gradients, values = [], []
    for chunked in (True, False):
        hidden = torch.randn(rows, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if chunked:
            value = logps.token_logps(hidden, logps.Head(head.weight, head.bias), targets)
        else:
            value = head(hidden).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        (value * weights).sum().backward()
        values.append(value.detach())
        gradients.append(hidden.grad)
    assert_rounded(*values, 16 + 50)
    assert_rounded(*gradients, 3 * (16 + 50))


def test_gradcheck():
    layer = torch.nn.Linear(4, 9).double()
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 9, (5,))

    # The forward sums in fp32: a quotient of differences is off by eps / 1e-2 at least, and by the curvature.
    def function(hidden, weight, bias):
        return logps.token_logps(hidden, logps.Head(weight, bias, 0.7, 2.0), targets)

    assert torch.autograd.gradcheck(function, (hidden, layer.weight, layer.bias), eps=1e-2, atol=1e-2)


def test_no_targets():
    head = logps.Head(torch.zeros(9, 4))
    assert logps.token_logps(torch.zeros(0, 4), head, torch.zeros(0, dtype=torch.long)).shape == (0,)
