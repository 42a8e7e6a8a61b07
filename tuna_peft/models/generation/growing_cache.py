"""A key-value cache for generation that grows in place; `tuna_peft.models.generation.generate` uses it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from tuna_peft.limits import CACHE_ROOM


class GrowingLayer(DynamicLayer):
    """A layer of `DynamicCache` that writes new tokens into a buffer with spare room.

    The layer of transformers (5.23) concatenates old and new into a new tensor for every token: with long prompts,
    copying the old ones takes most of the time of a step.
    """

    keys: torch.Tensor
    values: torch.Tensor
    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds `(batch, heads, new, head size)`; returns all keys and all values, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        buffers = self._buffers
        # After other changes of the cache (selecting rows, cropping), `keys` is not a view of the buffer any more.
        if buffers is None or self.keys.data_ptr() != buffers[0].data_ptr() or buffers[0].shape[-2] < end:
            old = (self.keys, self.values) if length else (None, None)
            buffers = self._moved(old[0], key_states, end), self._moved(old[1], value_states, end)
        for buffer, new in zip(buffers, (key_states, value_states), strict=True):
            buffer[..., length:end, :] = new
        self._buffers = buffers
        self.keys, self.values = (buffer[..., :end, :] for buffer in buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these sequences. Frees the old buffer now: kept until the next token, it would double the cache."""
        self._buffers = None
        super().batch_select_indices(indices)

    @staticmethod
    def _moved(states: torch.Tensor | None, new: torch.Tensor, end: int) -> torch.Tensor:
        room = new.new_empty(*new.shape[:-2], end + CACHE_ROOM, new.shape[-1])
        if states is not None:
            room[..., : states.shape[-2], :] = states
        return room
