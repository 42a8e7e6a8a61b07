"""The best approximation of an adapter by one of smaller rank. `combine` calls it."""

from __future__ import annotations

import torch

from tuna_peft.export.factors import Factors


def compress(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The factors of rank `rank` whose product is nearest to `B A` in the Frobenius norm (Eckart-Young).

    With `B = Q_B R_B` and `A^T = Q_A R_A`, the singular values of `B A` are those of the small `R_B R_A^T`; the
    product, `(out, in)`, is never built. In float64.

    Args:
        factors: `a` `(R, in)` and `b` `(out, R)`.
        rank: The new rank; factors of at most this rank are returned unchanged.

    Returns:
        The factors, in fp32, and `|B A - B' A'| / |B A|` in the Frobenius norm.
    """
    if factors.a.shape[0] <= rank:
        return factors, 0.0
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    u, singular, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = singular[:rank].sqrt()
    a = (q_a @ (v[:rank].T * root)).T
    b = q_b @ (u[:, :rank] * root)
    error = singular[rank:].norm() / singular.norm().clamp_min(1e-300)
    return Factors(a.float().contiguous(), b.float()), error.item()
