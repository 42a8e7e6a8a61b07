"""Measures how much of the adapters' update is left after an export has rounded the weights. `merge` uses it.

Rounding to few bits can give back the values of the base, and the result is then the untrained base. An error relative
to the weights does not show this, because updates are much smaller than weights. For the rounding R, the weight W of
the base and the update U, the share that is kept is

    <R(W + U) - R(W), U> / <U, U>

It is 0 if nothing changed, and 1 without rounding. Rounding errors that do not depend on U cancel or average out; the
KL divergence measures those.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tuna_peft.errors import UserError

_WARN_BELOW, _REFUSE_BELOW = 0.9, 0.5

logger = logging.getLogger("tuna_peft")


@dataclass
class ModuleUpdate:
    """Sums over the weights of one module.

    Attributes:
        kept: <R(W + U) - R(W), U>.
        squared: <U, U>.
    """

    kept: float = 0.0
    squared: float = 0.0

    def add(self, rounded: torch.Tensor, rounded_base: torch.Tensor, update: torch.Tensor) -> None:
        """Adds some weights: R(W + U), R(W) and U, in fp32 and of one shape."""
        update = update.flatten()
        self.kept += torch.dot((rounded - rounded_base).flatten(), update).item()
        self.squared += torch.dot(update, update).item()


@dataclass(frozen=True)
class KeptUpdate:
    """Which share of the update an export keeps.

    Attributes:
        share: Over the weights of all modules; 1 is all of it.
        worst: The smallest share of a single module.
        worst_module: Its name.
    """

    share: float
    worst: float
    worst_module: str

    @classmethod
    def over(cls, modules: Mapping[str, ModuleUpdate]) -> KeptUpdate | None:
        """Sums up an export's modules; None if no module has an update."""
        shares = {name: module.kept / module.squared for name, module in modules.items() if module.squared > 0}
        if not shares:
            return None
        worst = min(shares, key=lambda name: shares[name])
        kept = math.fsum(modules[name].kept for name in shares) / math.fsum(modules[name].squared for name in shares)
        return cls(kept, shares[worst], worst)

    def __str__(self) -> str:
        return f"{self.share:.1%} of the update is kept; {self.worst:.1%} in the worst module, {self.worst_module}"

    def check(self, export: str, fix: str, *, allow_lost_update: bool) -> None:
        """Warns if a tenth of the update is lost, in all or in one module.

        Args:
            export: What was written, for the message.
            fix: What to do instead.
            allow_lost_update: Only warn if more than half is lost.

        Raises:
            UserError: More than half of the update is lost.
        """
        if self.share < _REFUSE_BELOW and not allow_lost_update:
            raise UserError(
                f"rounding would undo the training: of {export}, {self}",
                fix=f"{fix} `--allow-lost-update` writes it all the same.",
            )
        if min(self.share, self.worst) < _WARN_BELOW:
            logger.warning("%s: %s. %s", export, self, fix)
