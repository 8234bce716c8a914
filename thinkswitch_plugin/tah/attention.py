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

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "tah_sdpa"
EMPTY = 2**62  # column and depth of an empty slot: beyond any query's, and a number that padding with floats keeps
SPARE_SLOTS = 64  # keys that a buffer grows by at least
GROWTH = 8  # otherwise by an eighth: each key is copied eight times in all, and little lies idle

Layers = dict[int, tuple[Tensor, Tensor]]
Padding = Literal["none", "right", "mixed"]  # where rows are padded: nowhere, behind their tokens, anywhere


class TaHCache:
    """What earlier tokens left behind at every depth; `past_key_values` of `TaHForCausalLM`.

    Attributes:
        fresh: keys and values of the first call, [B, heads, tokens, head_dim], by depth and layer; empty afterwards.
        fresh_columns: int64 [B, A] by depth: the column of each token of those, EMPTY beyond a row's last.
        buffers: keys and values by layer, as the module describes.
        length: tokens at depth 1, padding included.
        capacity: D, the slots that deeper keys may take.
        filled: how many of them each row has taken.
        columns: int64 [B, capacity], the column of each deeper key, EMPTY where a slot is empty.
        depths: int64 [B, capacity], its depth, EMPTY likewise.
        deepest: the depth of the deepest key held.
        valid: bool [B, length], False at padding; None while there is none.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.fresh: list[Layers] = []
        self.fresh_columns: list[Tensor] = []
        self.buffers: Layers = {}
        self.length = self.capacity = 0
        self.filled: list[int] = []
        self.columns = self.depths = torch.empty(0)
        self.deepest = 1
        self.valid: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens, padding included, depth 1 has seen."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows in another order, as beam search asks; beam_idx: int64 [B]."""
        self._hold()
        self.buffers = {layer: (k[beam_idx], v[beam_idx]) for layer, (k, v) in self.buffers.items()}
        self.columns, self.depths = self.columns[beam_idx], self.depths[beam_idx]
        self.filled = [self.filled[row] for row in beam_idx.tolist()]
        self.valid = None if self.valid is None else self.valid[beam_idx]

    # --- passes ---

    def first(self, valid: Tensor, padding: Padding) -> Pass:
        """The pass at depth 1 over new tokens.

        Args:
            valid: bool [B, T], False at padding.
            padding: where some is. What only follows a row's tokens is seen by none of them, as attention is causal:
                no mask is made, so that kernels without one (flash attention) may run.
        """
        start, end = self.length, self.length + valid.shape[1]
        if start:
            self._hold()
            self._grow(0, end)
        behind = padding == "right" and not start
        masked = self.valid is not None or (padding != "none" and not behind) or (start and valid.shape[1] > 1)
        self.see(valid, padding)
        self.length = end
        mask = None
        if masked:
            column = torch.arange(end, device=valid.device)
            mask = (column <= column[start:, None])[None]
            mask = (mask if self.valid is None else mask & self.valid[:, None, :])[:, None]
        if not start:
            self.fresh = [{}]
        return Pass(self, 1, mask, view=(None, self.capacity, self.capacity + end))

    def see(self, valid: Tensor, padding: Padding) -> None:
        """Note which of the new tokens, bool [B, T], are no padding."""
        if padding != "none" and self.valid is None:
            self.valid = valid.new_ones(valid.shape[0], self.length)
        if self.valid is not None:
            self.valid = torch.cat([self.valid, valid], dim=1)

    def pad_last(self, valid: Tensor) -> None:
        """The newest token turned out to be padding in some rows, bool [B, 1], and there was none before."""
        self.valid = torch.cat([valid.new_ones(len(valid), self.length - 1), valid], dim=1)

    def deeper(self, depth: int, row: Tensor, slot: Tensor, columns: Tensor, counts: list[int]) -> Pass:
        """A pass at depth 2 or more over the tokens that continue, of all rows.

        Args:
            depth: of the pass.
            row: int64 [N], the row of each token, and `slot` its place in that row's tokens, in order.
            slot: int64 [N].
            columns: int64 [B, A], the columns of each row's tokens, left-aligned; EMPTY beyond its last.
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
        at = self.capacity - 1 - before[row] - slot
        self.columns[row, at], self.depths[row, at] = columns[row, slot], depth
        low, end = self.capacity - most, self.capacity + self.length
        deep = (self.columns[:, None, low:] <= query) & (self.depths[:, None, low:] <= depth)
        mask = torch.cat([deep, shallow], dim=2)[:, None]
        return Pass(self, depth, mask, scatter=_Scatter(row, slot, row, at), view=(None, low, end))

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
        most, end = max(taken), self.capacity + self.length
        low = self.capacity - most
        if len(rows) == 1:
            into: Any = rows[0]
            at: Any = low
            pick: Any = slice(rows[0], rows[0] + 1)
        else:
            into = torch.tensor(rows, device=device)
            at = torch.tensor([self.capacity - count for count in taken], device=device)
            pick = None if len(rows) == len(self.filled) else into
        self.columns[into, at], self.depths[into, at] = self.length - 1, depth
        mask = None
        if self.valid is not None or min(taken) < most or self.deepest > depth:
            index = pick if pick is not None else slice(None)
            # An empty slot is deeper than any query.
            deep = self.depths[index, low:] <= depth
            shallow = self.valid[index] if self.valid is not None else deep.new_ones(len(rows), self.length)
            mask = torch.cat([deep, shallow], dim=1)[:, None, None]
        return Pass(self, depth, mask, scatter=_Scatter(slice(None), 0, into, at), view=(pick, low, end))

    # --- buffers ---

    def _hold(self) -> None:
        """Move what the first call left into buffers, as later calls read them.

        From `fresh`, keys and values [B, heads, T, head_dim] at depth 1 and [B, heads, A, head_dim] deeper, to
        `buffers`, [B, heads, capacity + T + spare, head_dim] of the same dtype, zero where nothing is, with `columns`
        and `depths` of the deeper slots, int64 [B, capacity]. Nothing where there is nothing fresh.
        """
        if not self.fresh:
            return
        like = next(iter(self.fresh[0].values()))[0]
        counts = [(columns < EMPTY).sum(1) for columns in self.fresh_columns]
        before = torch.zeros(len(like), dtype=torch.int64, device=like.device)
        self.filled = sum(counts, before).tolist()
        self.capacity = max(self.filled) + SPARE_SLOTS
        self.columns = torch.full((len(like), self.capacity), EMPTY, device=like.device)
        self.depths = torch.full_like(self.columns, EMPTY)
        places = []
        for depth, (columns, count) in enumerate(zip(self.fresh_columns, counts, strict=True), start=2):
            row, slot = (columns < EMPTY).nonzero(as_tuple=True)
            at = self.capacity - 1 - before[row] - slot
            self.columns[row, at], self.depths[row, at] = columns[row, slot], depth
            places.append((row, slot, at))
            before = before + count
        end = self.capacity + self.length
        shallower, *deeper = self.fresh
        # A layer's own keys go as soon as they are copied: at no time are there two of everything.
        for layer in list(shallower):
            pair = shallower.pop(layer)
            passes = [held.pop(layer) for held in deeper]
            joined = []
            for which, shallow in enumerate(pair):
                buffer = shallow.new_zeros(*shallow.shape[:2], end + SPARE_SLOTS, shallow.shape[3])
                buffer[:, :, self.capacity : end] = shallow
                for (row, slot, at), held in zip(places, passes, strict=True):
                    buffer[row, :, at] = held[which][row, :, slot]
                joined.append(buffer)
            self.buffers[layer] = (joined[0], joined[1])
        self.fresh, self.fresh_columns = [], []

    def _grow(self, deep: int, shallow: int) -> None:
        """Let every buffer hold `deep` deeper keys left of D and `shallow` keys of depth 1 right of it."""
        right = next(iter(self.buffers.values()))[0].shape[2] - self.capacity
        more_deep = _more(self.capacity, deep)
        more_shallow = _more(right, shallow)
        if not more_deep and not more_shallow:
            return
        sides = (0, 0, more_deep, more_shallow)
        pad = torch.nn.functional.pad
        for layer in self.buffers:
            # One tensor after the other, each dropped when its copy is there.
            k, v = self.buffers[layer]
            self.buffers[layer] = (k := pad(k, sides), v)
            self.buffers[layer] = (k, pad(v, sides))
            del k, v
        self.columns = pad(self.columns, (more_deep, 0), value=EMPTY)
        self.depths = pad(self.depths, (more_deep, 0), value=EMPTY)
        self.capacity += more_deep


def _more(slots: int, wanted: int) -> int:
    """By how many a side that has so many slots grows, so that it holds `wanted`."""
    return max(wanted - slots, SPARE_SLOTS, slots // GROWTH) if wanted > slots else 0


class _Scatter(NamedTuple):
    """Where a pass's keys [R, heads, A, head_dim] go: key[row, :, slot] to buffer[buffer_row, :, buffer_slot].

    Each is an index of a tensor: an int, a slice, or int64 [N].
    """

    row: Any
    slot: Any
    buffer_row: Any
    buffer_slot: Any


class Pass:
    """One pass through the layers: what its attention sees."""

    def __init__(
        self,
        cache: TaHCache,
        depth: int,
        mask: Tensor | None,
        scatter: _Scatter | None = None,
        view: tuple[Any, int, int] | None = None,
    ):
        """`view` is the rows (None: all), the first slot and the one beyond the last; `depth` counts from 1."""
        self.cache, self.depth, self.mask, self.scatter, self.view = cache, depth, mask, scatter, view

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
        if self.scatter is None:
            new = slice(end - key.shape[2], end)
            keys[:, :, new], values[:, :, new] = key, value
        else:
            row, slot, into, at = self.scatter
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
