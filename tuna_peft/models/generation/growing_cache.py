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
        """Keeps these sequences."""
        self.rebuild(indices, self.get_seq_length())

    def rebuild(
        self, kept: torch.Tensor, width: int, other: GrowingLayer | None = None, added: torch.Tensor | None = None
    ) -> None:
        """Keeps the last `width` tokens of some sequences, and adds sequences of another layer, in a single copy.

        Sequences end at the right; shorter ones get zeros at the left, which the attention mask has to hide.

        Args:
            kept: `(K,)` indices of own sequences; repeated ones are copied.
            width: Tokens of the new layer.
            other: A layer with at most `width` tokens.
            added: `(A,)` indices of its sequences.
        """
        if not self.get_seq_length():  # of a model whose layers share keys and values
            return
        parts = [(self, kept)] if other is None or added is None else [(self, kept), (other, added)]
        rows = sum(len(indices) for _, indices in parts)
        buffers = []
        for name in ("keys", "values"):
            states = getattr(self, name)
            buffer = states.new_zeros(rows, states.shape[1], width + CACHE_ROOM, states.shape[3])
            start = 0
            for layer, indices in parts:
                old = getattr(layer, name)[..., -width:, :]
                target = buffer[start : (start := start + len(indices)), :, width - old.shape[2] : width]
                torch.index_select(old, 0, indices, out=target)
            self._buffers = None  # frees the old keys before the new values are made
            setattr(self, name, buffer[..., :width, :])
            buffers.append(buffer)
        self._buffers = buffers[0], buffers[1]

    @staticmethod
    def _moved(states: torch.Tensor | None, new: torch.Tensor, end: int) -> torch.Tensor:
        room = new.new_empty(*new.shape[:-2], end + CACHE_ROOM, new.shape[-1])
        if states is not None:
            room[..., : states.shape[-2], :] = states
        return room
