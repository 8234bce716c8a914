"""Duo-causal attention: a query at position p and depth d sees a key at (p', d') if and only if p' ≤ p and d' ≤ d.

Knows keys and values by layer and depth, for training, prefill and decoding alike. Leaves to others: which tokens a
pass is made of (`model`). TaH, arXiv 2511.08577, section 3.2.

The first call on a cache keeps the tensors as its passes made them, with their graph: training ends there. Later calls,
which decode, work on one buffer a layer:

    [ …empty | deeper keys, the newest first | depth 1, the oldest first | …empty ]
               D - filled(row)                 D                         D + length

Depth 1 sees what is right of D and never a deeper key. A deeper query of a row sees from that row's newest deeper key
on: one slice, nothing is put together or copied, however long the text is. Each deeper slot knows its depth and the
column of the sequence its token stands in; where a slice alone would show too much (padding, rows that continued a
different number of times, more than two depths), those make a mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "tah_sdpa"
FAR = 2**62  # the column of an empty slot: later than any query, and a number that padding with floats keeps
SLACK = 16  # slots a buffer grows by at least; otherwise it doubles

Layers = dict[int, tuple[Tensor, Tensor]]


class TaHCache:
    """What earlier tokens left behind at every depth; `past_key_values` of `TaHForCausalLM`.

    Attributes:
        fresh: keys and values of the first call, [B, heads, tokens, head_dim], by depth and layer; empty afterwards.
        fresh_columns: int64 [B, A] by depth: the column of each token of those, FAR beyond a row's last.
        buffers: keys and values by layer, as the module describes.
        length: tokens at depth 1, padding included.
        room: D, the slots that deeper keys may take.
        filled: how many of them each row has taken.
        columns: int64 [B, room], FAR where a slot is empty; `tags` likewise holds the depth.
        deepest: of all keys held.
        valid: bool [B, length], False at padding; None while there is none.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.fresh: list[Layers] = []
        self.fresh_columns: list[Tensor] = []
        self.buffers: Layers = {}
        self.length = self.room = 0
        self.filled: list[int] = []
        self.columns = self.tags = torch.empty(0)
        self.deepest = 1
        self.valid: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens, padding included, depth 1 has seen."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows in another order, as beam search asks; beam_idx: int64 [B]."""
        self._hold()
        self.buffers = {layer: (k[beam_idx], v[beam_idx]) for layer, (k, v) in self.buffers.items()}
        self.columns, self.tags = self.columns[beam_idx], self.tags[beam_idx]
        self.filled = [self.filled[row] for row in beam_idx.tolist()]
        self.valid = None if self.valid is None else self.valid[beam_idx]

    # --- passes ---

    def first(self, valid: Tensor, padded: bool) -> Pass:
        """The pass at depth 1 over new tokens; valid: bool [B, T], and whether any of it is False."""
        start, end = self.length, self.length + valid.shape[1]
        if start:
            self._hold()
            self._grow(0, end)
        if padded and self.valid is None:
            self.valid = valid.new_ones(valid.shape[0], start)
        if self.valid is not None:
            self.valid = torch.cat([self.valid, valid], dim=1)
        self.length = end
        mask = None
        if self.valid is not None or (start and valid.shape[1] > 1):
            column = torch.arange(end, device=valid.device)
            mask = (column <= column[start:, None])[None]
            mask = (mask if self.valid is None else mask & self.valid[:, None, :])[:, None]
        if not start:
            self.fresh = [{}]
        return Pass(self, 1, mask, view=(None, self.room, self.room + end))

    def deeper(self, depth: int, row: Tensor, slot: Tensor, columns: Tensor, counts: list[int]) -> Pass:
        """A pass at depth 2 or more over the tokens that continue, of all rows.

        Args:
            depth: of the pass.
            row: int64 [N], the row of each token, and `slot` its place in that row's tokens, in order.
            slot: int64 [N].
            columns: int64 [B, A], the columns of each row's tokens, left-aligned; FAR beyond its last.
            counts: how many each row has.
        """
        self.deepest = max(self.deepest, depth)
        # A row's padding asks as its last token would: so no softmax is over nothing. Nothing sees it.
        query = columns.clamp(max=self.length - 1)[:, :, None]
        shallow = torch.arange(self.length, device=columns.device) <= query
        if self.valid is not None:
            shallow = shallow & self.valid[:, None, :]
        if self.fresh:
            self.fresh.append({})
            self.fresh_columns.append(columns)
            seen = [shallow, *(held[:, None, :] <= query for held in self.fresh_columns)]
            return Pass(self, depth, torch.cat(seen, dim=2)[:, None])
        before = torch.tensor(self.filled, device=row.device)
        self.filled = [held + count for held, count in zip(self.filled, counts, strict=True)]
        most = max(self.filled)
        self._grow(most, self.length)
        at = self.room - 1 - before[row] - slot
        self.columns[row, at], self.tags[row, at] = columns[row, slot], depth
        low = self.room - most
        deep = (self.columns[:, None, low:] <= query) & (self.tags[:, None, low:] <= depth)
        mask = torch.cat([deep, shallow], dim=2)[:, None]
        return Pass(self, depth, mask, put=_Put(row, slot, row, at), view=(None, low, self.room + self.length))

    def deeper_rows(self, depth: int, rows: list[int], device: torch.device) -> Pass:
        """A pass at depth 2 or more over the newest token of some rows of a cache that decodes.

        Args:
            depth: of the pass.
            rows: which rows of the batch continue.
            device: where the keys are.
        """
        self.deepest = max(self.deepest, depth)
        for row in rows:
            self.filled[row] += 1
        self._grow(max(self.filled), self.length)
        taken = [self.filled[row] for row in rows]
        most, end = max(taken), self.room + self.length
        low = self.room - most
        if len(rows) == 1:
            into: Any = rows[0]
            at: Any = low
            pick: Any = slice(rows[0], rows[0] + 1)
        else:
            into = torch.tensor(rows, device=device)
            at = torch.tensor([self.room - count for count in taken], device=device)
            pick = None if len(rows) == len(self.filled) else into
        self.columns[into, at], self.tags[into, at] = self.length - 1, depth
        mask = None
        if self.valid is not None or min(taken) < most or self.deepest > depth:
            index = pick if pick is not None else slice(None)
            # What is empty has the highest tag of all.
            deep = self.tags[index, low:] <= depth
            shallow = self.valid[index] if self.valid is not None else deep.new_ones(len(rows), self.length)
            mask = torch.cat([deep, shallow], dim=1)[:, None, None]
        return Pass(self, depth, mask, put=_Put(slice(None), 0, into, at), view=(pick, low, end))

    # --- buffers ---

    def _hold(self) -> None:
        """Put what the first call left into buffers."""
        if not self.fresh:
            return
        deep = self.fresh_columns
        size = next(iter(self.fresh[0].values()))[0].shape[0]
        device = deep[0].device if deep else None
        counts = [(held < FAR).sum(1) for held in deep]
        filled = sum(counts) if counts else torch.zeros(size, dtype=torch.int64)
        assert isinstance(filled, Tensor)
        self.filled = filled.tolist()
        self.room = max(self.filled) + SLACK
        self.buffers = {}
        first = next(iter(self.fresh[0].values()))[0]
        self.columns = torch.full((size, self.room), FAR, device=first.device)
        self.tags = torch.full_like(self.columns, FAR)
        places = []
        before = torch.zeros(size, dtype=torch.int64, device=device)
        for d, held in enumerate(deep, start=2):
            row, slot = (held < FAR).nonzero(as_tuple=True)
            at = self.room - 1 - before[row] - slot
            self.columns[row, at], self.tags[row, at] = held[row, slot], d
            places.append((row, slot, at))
            before = before + counts[d - 2]
        for layer, pair in self.fresh[0].items():
            joined = []
            for which, shallow in enumerate(pair):
                buffer = shallow.new_zeros(size, shallow.shape[1], self.room + self.length + SLACK, shallow.shape[3])
                buffer[:, :, self.room : self.room + self.length] = shallow
                for (row, slot, at), held_layers in zip(places, self.fresh[1:], strict=True):
                    buffer[row, :, at] = held_layers[layer][which][row, :, slot]
                joined.append(buffer)
            self.buffers[layer] = (joined[0], joined[1])
        self.fresh, self.fresh_columns = [], []

    def _grow(self, deep: int, shallow: int) -> None:
        """Make room for so many keys on either side of D."""
        some = next(iter(self.buffers.values()))[0]
        more_deep = max(self.room, deep + SLACK) if deep > self.room else 0
        right = some.shape[2] - self.room
        more_shallow = max(right, shallow + SLACK) if shallow > right else 0
        if not more_deep and not more_shallow:
            return
        sides = (0, 0, more_deep, more_shallow)
        pad = torch.nn.functional.pad
        self.buffers = {layer: (pad(k, sides), pad(v, sides)) for layer, (k, v) in self.buffers.items()}
        self.columns = pad(self.columns, (more_deep, 0), value=FAR)
        self.tags = pad(self.tags, (more_deep, 0), value=FAR)
        self.room += more_deep


class _Put(NamedTuple):
    """Which of a pass's keys go where: key[row, :, slot] to buffer[into, :, at]."""

    row: Any
    slot: Any
    into: Any
    at: Any


class Pass:
    """One pass through the layers: what its attention sees."""

    def __init__(
        self,
        cache: TaHCache,
        depth: int,
        mask: Tensor | None,
        put: _Put | None = None,
        view: tuple[Any, int, int] | None = None,
    ):
        """`view` is the rows (None: all), the first slot and the one beyond the last; `depth` counts from 1."""
        self.cache, self.depth, self.mask, self.put, self.view = cache, depth, mask, put, view

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add this pass's keys and values, [R, heads, A, head_dim], and return all that it sees."""
        cache = self.cache
        if cache.fresh:
            # A layer that gradient checkpointing runs a second time finds what it left and leaves it there.
            cache.fresh[self.depth - 1].setdefault(layer, (key, value))
            if self.depth == 1:
                return key, value
            pairs = [*(held[layer] for held in cache.fresh[: self.depth - 1]), (key, value)]
            return torch.cat([k for k, _ in pairs], dim=2), torch.cat([v for _, v in pairs], dim=2)
        keys, values = cache.buffers[layer]
        assert self.view is not None
        rows, low, end = self.view
        if self.put is None:
            new = slice(end - key.shape[2], end)
            keys[:, :, new], values[:, :, new] = key, value
        else:
            row, slot, into, at = self.put
            keys[into, :, at], values[into, :, at] = key[row, :, slot], value[row, :, slot]
        seen = slice(low, end)
        if rows is None:
            return keys[:, :, seen], values[:, :, seen]
        return keys[rows, :, seen], values[rows, :, seen]


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
