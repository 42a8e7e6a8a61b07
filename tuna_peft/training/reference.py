"""Log-probabilities under the frozen stack below the adapter that trains: `reference: below`.

With a stack, the reference of DPO is not the bare base: it is the base with all adapters below the one that trains.
"""

from __future__ import annotations

import torch
from peft import PeftModel

from tuna_peft.data.batch import PackedBatch
from tuna_peft.errors import UserError
from tuna_peft.models.base.shards import is_sharded
from tuna_peft.models.forward.scoring import response_logps, unwrap
from tuna_peft.models.stack.adapters import active_adapters, adapter_names


class ReferenceLogps:
    """Summed log-probabilities of responses with the top adapter off, computed once for each row.

    Each prompt is computed alone, so that its values do not depend on the batch that it was met in: a training that is
    resumed has the same ones, whatever the size of its batches. They are kept by the hash of the row's tokens.
    """

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
        """`(B, N)` summed log-probabilities, in nats; 0 where there is no response.

        Args:
            model: The `PeftModel` that trains, or its wrapper for distributed training.
            batch: On the model's device.
        """
        hashes = batch.row_hashes_B.tolist()
        missing = {row_hash: row for row, row_hash in enumerate(hashes) if row_hash not in self._sums}
        if missing:
            stack = unwrap(model)  # no exchange between processes: each has other rows in its cache
            training = stack.training
            stack.eval()  # the reference has no dropout
            with active_adapters(stack, adapter_names(stack)[:-1]):
                for row_hash, row in missing.items():
                    self._sums[row_hash] = response_logps(stack, batch.part(row, row + 1)).sums_BN[0].cpu()
            stack.train(training)
        sums_BN = torch.zeros(batch.ranks_BN.shape)
        for row, row_hash in enumerate(hashes):
            own = self._sums[row_hash][: sums_BN.shape[1]]  # zeros follow the responses, in batches of any width
            sums_BN[row, : len(own)] = own
        return sums_BN.to(batch.ranks_BN.device)


def require_stack_below(model: torch.nn.Module) -> None:
    """Raises UserError if `model` has no adapter to switch off, or its base is spread over processes."""
    if not isinstance(model, PeftModel):
        raise UserError("reference='below' needs an adapter: the model itself trains", fix="Pass a peft_config.")
    if is_sharded(model):
        raise UserError(
            "reference='below' does not work with a sharded base: processes would take different numbers of passes",
            fix="Use one GPU, or DDP.",
        )
