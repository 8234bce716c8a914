"""Duo-causal attention: a query at position p and depth d sees a key at (p', d') if and only if p' ≤ p and d' ≤ d.

Knows keys and values by layer and depth, for training, prefill and decoding alike. Leaves to others: which tokens a
pass is made of (`model`). TaH, arXiv 2511.08577, section 3.2.

Depth 1 never sees a deeper key, so its keys are a plain growing buffer and its attention is the backbone's own. Deeper
passes hold only the tokens that continued, left-aligned by row, each slot with the column of the sequence it belongs
to: columns are what is compared, so padding on either side and rows that continue at different places need no case of
their own. Training keeps the tensors of the one pass that made them, with their graph; decoding copies each token's
keys into a buffer that doubles when it is full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "tah_sdpa"
FAR = torch.iinfo(torch.int64).max  # the column of an empty slot: later than any query


class Keys:
    """Keys and values of one depth: [B, heads, slots, head_dim] a layer, of which the first `length` slots are used."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.length = 0

    def put(self, layer: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write slots from `start` on and return all up to their end.

        What is written first is kept as it came, with its graph; a layer that gradient checkpointing runs a second time
        writes nothing.
        """
        if start == 0:
            self.layers.setdefault(layer, (key, value))
            return key, value
        end = start + key.shape[2]
        keys, values = self._room(layer, key, end)
        keys[:, :, start:end], values[:, :, start:end] = key, value
        return keys[:, :, :end], values[:, :, :end]

    def put_rows(
        self, layer: int, rows: Tensor, slots: Tensor, size: int, end: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write one slot of some of `size` rows, and return the first `end` slots of those rows.

        Args:
            layer: which layer.
            rows: int64 [R].
            slots: int64 [R], where each of them writes.
            size: rows of the batch.
            end: slots in use once this is written.
            key: [R, heads, 1, head_dim]; `value` likewise.
        """
        if layer not in self.layers:
            empty = key.new_zeros(size, key.shape[1], 0, key.shape[3])
            self.layers[layer] = (empty, empty)
        keys, values = self._room(layer, key, end)
        keys[rows, :, slots], values[rows, :, slots] = key[:, :, 0], value[:, :, 0]
        return keys[:, :, :end], values[:, :, :end]

    def _room(self, layer: int, like: Tensor, end: int) -> tuple[Tensor, Tensor]:
        held = self.layers[layer]
        capacity = held[0].shape[2]
        if end <= capacity:
            return held
        size, heads, _, width = held[0].shape
        grown = []
        for old in held:
            new = like.new_zeros(size, heads, max(2 * capacity, end + 15), width)
            new[:, :, :capacity] = old
            grown.append(new)
        self.layers[layer] = (grown[0], grown[1])
        return self.layers[layer]


class TaHCache:
    """What earlier tokens left behind at every depth; `past_key_values` of `TaHForCausalLM`.

    Attributes:
        valid: bool [B, T], False at padding; `padded` says whether any is.
        depths: `Keys` by depth, depth 1 first.
        columns: int64 [B, slots] by depth from 2 on: the column each slot's token stands in, FAR where it is empty.
        filled: how many slots each row has at each depth from 2 on.
    """

    is_compileable = False

    def __init__(self, max_depth: int):
        self.depths = [Keys() for _ in range(max_depth)]
        self.columns: list[Tensor | None] = [None] * max_depth
        self.filled: list[list[int]] = [[] for _ in range(max_depth)]
        self.valid: Tensor | None = None
        self.padded = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens, padding included, depth 1 has seen."""
        return self.depths[0].length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows in another order, as beam search asks; beam_idx: int64 [B]."""
        for keys in self.depths:
            keys.layers = {layer: (k[beam_idx], v[beam_idx]) for layer, (k, v) in keys.layers.items()}
        self.columns = [None if held is None else held[beam_idx] for held in self.columns]
        self.filled = [[counts[row] for row in beam_idx.tolist()] if counts else counts for counts in self.filled]
        self.valid = None if self.valid is None else self.valid[beam_idx]

    # --- passes ---

    def first(self, valid: Tensor, padded: bool) -> Pass:
        """The pass at depth 1 over new tokens; valid: bool [B, T]."""
        start = self.depths[0].length
        self.valid = valid if self.valid is None else torch.cat([self.valid, valid], dim=1)
        self.padded = self.padded or padded
        end = start + valid.shape[1]
        self.depths[0].length = end
        mask = None
        if self.padded or (start and valid.shape[1] > 1):
            column = torch.arange(end, device=valid.device)
            mask = (column <= column[start:, None]) & self.valid[:, None, :]
            mask = mask[:, None]
        return Pass(self, 0, mask, start=start)

    def deeper(self, depth: int, columns: Tensor, counts: list[int]) -> Pass:
        """A pass at depth 2 or more over the tokens that continue.

        Args:
            depth: of the pass.
            columns: int64 [B, A], the columns of each row's tokens, in order and left-aligned; FAR beyond its last.
            counts: how many each row has.
        """
        d = depth - 1
        held, start = self.columns[d], self.depths[d].length
        self.columns[d] = columns if held is None else torch.cat([held[:, :start], columns], dim=1)
        # Rows that had fewer than others leave empty slots behind.
        self.padded = self.padded or any(count < start for count in self.filled[d])
        self.filled[d] = [start + count for count in counts]
        self.depths[d].length = start + columns.shape[1]
        last = self.depths[0].length - 1
        # A row's padding asks as its last token would: so no softmax is over nothing. Nothing sees it.
        query = columns.clamp(max=last)[:, :, None]
        seen = [torch.arange(last + 1, device=columns.device) <= query]
        if self.padded:
            assert self.valid is not None
            seen[0] = seen[0] & self.valid[:, None, :]
        for e in range(1, depth):
            kept = self.columns[e]
            assert kept is not None
            seen.append(kept[:, None, : self.depths[e].length] <= query)
        return Pass(self, d, torch.cat(seen, dim=2)[:, None], start=start)

    def deeper_rows(self, depth: int, rows: list[int], size: int, device: torch.device) -> Pass:
        """A pass at depth 2 or more over the newest token of some rows, as decoding makes it.

        Args:
            depth: of the pass.
            rows: which rows of the batch continue.
            size: how many rows the batch has.
            device: where the keys are.
        """
        d = depth - 1
        filled = self.filled[d] = self.filled[d] or [0] * size
        slots = [filled[row] for row in rows]
        for row in rows:
            filled[row] += 1
        end = max(filled)
        column = self.depths[0].length - 1
        index = torch.tensor(rows, device=device)
        slot = torch.tensor(slots, device=device)
        held = self.columns[d]
        width = 0 if held is None else held.shape[1]
        if end > width:
            grown = torch.full((size, max(2 * width, end + 15)), FAR, device=device)
            if held is not None:
                grown[:, :width] = held
            held = self.columns[d] = grown
        assert held is not None
        held[index, slot] = column
        # How much of each depth is read, and whether all of that is to be seen by all of these rows.
        ends = [max(self.filled[e], default=0) for e in range(1, depth)]
        whole = not self.padded and all(
            self.filled[e][row] == most for e, most in enumerate(ends, start=1) if most for row in rows
        )
        mask = None
        if not whole:
            assert self.valid is not None
            seen = [self.valid[index]]
            for e, most in enumerate(ends, start=1):
                kept = self.columns[e]
                if most and kept is not None:
                    seen.append(kept[index, :most] <= column)
            mask = torch.cat(seen, dim=1)[:, None, None]
        self.depths[d].length = end
        return Pass(self, d, mask, rows=None if len(rows) == size else index, index=index, slots=slot, ends=ends)


class Pass:
    """One pass through the layers: what its attention sees."""

    def __init__(
        self,
        cache: TaHCache,
        d: int,
        mask: Tensor | None,
        start: int = 0,
        rows: Tensor | None = None,
        index: Tensor | None = None,
        slots: Tensor | None = None,
        ends: list[int] | None = None,
    ):
        self.cache, self.d, self.mask, self.start = cache, d, mask, start
        self.rows, self.index, self.slots, self.ends = rows, index, slots, ends

    @property
    def depth(self) -> int:
        """Of this pass, 1 first."""
        return self.d + 1

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add this pass's keys and values, [R, heads, A, head_dim], and return all that it sees, shallow to deep."""
        depths = self.cache.depths
        if self.d == 0:
            return depths[0].put(layer, self.start, key, value)
        first = depths[0]
        pieces = [tuple(t[:, :, : first.length] for t in first.layers[layer])]
        if self.slots is None:
            pieces += [tuple(t[:, :, : depths[e].length] for t in depths[e].layers[layer]) for e in range(1, self.d)]
            pieces.append(depths[self.d].put(layer, self.start, key, value))
        else:
            assert self.index is not None
            assert self.ends is not None
            for e, end in enumerate(self.ends, start=1):
                if e == self.d:
                    size = first.layers[layer][0].shape[0]
                    pieces.append(depths[e].put_rows(layer, self.index, self.slots, size, end, key, value))
                elif end:
                    pieces.append(tuple(t[:, :, :end] for t in depths[e].layers[layer]))
        if self.rows is not None:
            pieces = [(k[self.rows], v[self.rows]) for k, v in pieces]
        return torch.cat([k for k, _ in pieces], dim=2), torch.cat([v for _, v in pieces], dim=2)


def duo_causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    duo: Pass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention over what a pass sees, called by the backbone's own attention layers.

    Args:
        module: the attention layer.
        query: [R, heads, A, head_dim]; `key` and `value` with the key heads, of this pass's tokens alone.
        attention_mask: unused beside `duo`, whose mask counts.
        duo: the pass; without it this is plain attention.
        kwargs: scaling and dropout, as the layer says.
    """
    if duo is not None:
        key, value = duo.extend(module.layer_idx, key, value)  # type: ignore[arg-type]
        attention_mask = duo.mask
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, duo_causal_attention)
