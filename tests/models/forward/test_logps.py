"""Chunked log-probabilities against plain log-softmax."""

from types import SimpleNamespace

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


@pytest.mark.parametrize(
    ("kind", "settings", "factor", "cap"),
    [
        ("llama", {}, 1.0, None),
        ("cohere", {"logit_scale": 0.0625}, 0.0625, None),
        ("granite", {"logits_scaling": 8.0}, 1 / 8, None),  # granite divides, hyperclovax multiplies
        ("hyperclovax", {"logits_scaling": 8.0}, 8.0, None),
        ("gemma2", {"final_logit_softcapping": 30.0}, 1.0, 30.0),
        ("gemma2", {"final_logit_softcapping": 0.0}, 1.0, None),
        ("odd", {"logit_scale": 0.5, "logits_scaling": 4.0, "final_logit_softcapping": 3.0}, 0.125, 3.0),
    ],
)
def test_the_factor_and_the_cap_of_a_model(kind, settings, factor, cap):
    config = SimpleNamespace(model_type=kind, **settings)
    config.get_text_config = lambda: config
    layer = torch.nn.Linear(4, 9)
    head = logps.output_head(SimpleNamespace(config=config, get_output_embeddings=lambda: layer))
    assert (head.factor, head.cap) == (factor, cap)
    assert head.weight_VD is layer.weight and head.bias_V is layer.bias


@pytest.mark.parametrize(("factor", "cap"), [(0.25, None), (3.0, None), (1.0, 2.0), (3.0, 2.0)])
def test_value_and_gradient_with_a_factor_and_a_cap(factor, cap):
    """Bounds: some ten fp32 operations on logits below 30."""
    torch.manual_seed(0)
    layer, targets, found = torch.nn.Linear(16, 50).requires_grad_(False), torch.randint(0, 50, (7,)), []
    for chunked in (True, False):
        hidden = torch.randn(7, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if chunked:
            value = logps.token_logps(hidden, logps.Head(layer.weight, layer.bias, factor, cap), targets)
        else:
            logits = layer(hidden) * factor
            logits = logits if cap is None else (logits / cap).tanh() * cap
            value = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        value.sum().backward()
        found += [(value.detach(), hidden.grad)]
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=300 * torch.finfo(torch.float32).eps, rtol=1e-5)


def test_no_targets():
    head = logps.Head(torch.zeros(9, 4))
    assert logps.token_logps(torch.zeros(0, 4), head, torch.zeros(0, dtype=torch.long)).shape == (0,)
