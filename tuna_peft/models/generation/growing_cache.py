"""Keys and values of generation that grow in place."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from tuna_peft.limits import CACHE_ROOM


class GrowingLayer(DynamicLayer):
    """A layer of `DynamicCache` that writes new tokens behind the old ones.

    transformers' own puts both into a new tensor for every token: on long prompts, copying what is there already takes
    most of the time of a step.
    """

    keys: torch.Tensor
    values: torch.Tensor
    _rooms: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds `(batch, heads, new, head size)`; returns all keys and all values, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        rooms = self._rooms
        # Whatever else changes the cache (selecting rows, cropping) leaves tensors of its own.
        if rooms is None or self.keys.data_ptr() != rooms[0].data_ptr() or rooms[0].shape[-2] < end:
            rooms = (
                self._moved(self.keys if length else None, key_states, end),
                self._moved(self.values if length else None, value_states, end),
            )
        for room, new in zip(rooms, (key_states, value_states), strict=True):
            room[..., length:end, :] = new
        self._rooms = rooms
        self.keys, self.values = (room[..., :end, :] for room in rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows. The old room goes at once: kept until the next token, it would double the whole cache."""
        self._rooms = None
        super().batch_select_indices(indices)

    @staticmethod
    def _moved(states: torch.Tensor | None, new: torch.Tensor, end: int) -> torch.Tensor:
        room = new.new_empty(*new.shape[:-2], end + CACHE_ROOM, new.shape[-1])
        if states is not None:
            room[..., : states.shape[-2], :] = states
        return room
