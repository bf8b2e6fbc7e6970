"""Running the model over many token sequences, each distinct prefix once.

Readouts ask for sequences that share much: worked examples before every vignette, one dilemma before four replies, a
persona before every context. Sequences are merged into a tree of tokens; a pack of tree nodes runs as one row, with
the node's depth as position, and a token sees its ancestors only. Nothing is padded, nothing shared is computed twice,
and what a sequence gets does not depend on its neighbours beyond rounding. (Tree attention as in SpecInfer, Miao et al.
2024, arXiv:2305.09781, used here for scoring.) Attention alone is done by sequences, each a row: over a pack as a whole
it would be done for every pair of nodes, most of which do not see each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steerheal.models import LM

PACK_TOKENS = {"cpu": 1024, "cuda": 2048}  # tree nodes per forward pass: enough to saturate the device
WHOLE_TOKENS = {"cpu": 384, "cuda": 2048}  # of a pack whose attention is done as a whole
LONG_PREFIX = 256  # from here on it is: every row would read the prefix anew
LOGIT_ROWS = 512  # positions whose vocabulary-wide logits exist at once
ROW_FILL = 0.8  # a row this short of its group's first begins another: each group is a call, padding is work
MIN_PREFIX = 32  # a shorter prefix of everything is not worth a cache of its own


@dataclass
class Pack:
    """Part of the token tree in depth-first order, behind a prefix that every sequence shares.

    nodes of sequence i, in order: paths[i] [len(sequence) - prefix].
    """

    ids: Tensor  # [n] tokens
    depth: Tensor  # [n] positions in their sequences
    end: Tensor  # [n] one past each node's last descendant
    paths: dict[int, Tensor]

    def to(self, device: torch.device) -> Pack:
        """The same with what the model reads on its device."""
        return Pack(self.ids.to(device), self.depth.to(device), self.end.to(device), self.paths)


@dataclass
class Rows:
    """The sequences of a pack, without those that others begin with, as rows of its nodes, behind the prefix that they share.
    Rows of about one length are a group, padded at their ends."""

    groups: list[tuple[Tensor, Tensor]]  # [rows, width] the node at each place, node 0 where a row has ended; and [rows,
    # prefix + width] the same behind the prefix, counted from its beginning
    places: Tensor  # [n] one of the places of each node, counted row after row and group after group
    shared: int  # tokens of the prefix
    masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)  # by width and window, made once

    @classmethod
    def of(cls, pack: Pack, shared: int, device: torch.device) -> Rows:
        """On the device, of a pack that is not there yet."""
        whole = {int(path[-1]): path for path in pack.paths.values()}  # of equal sequences one
        leaves = [path for node, path in whole.items() if pack.end[node] == node + 1]  # they pass through all other nodes
        alike: list[list[Tensor]] = []
        for path in sorted(leaves, key=len, reverse=True):
            if not alike or len(path) < ROW_FILL * len(alike[-1][0]):
                alike.append([])
            alike[-1].append(path)
        groups, places, taken = [], torch.empty(len(pack.ids), dtype=torch.long), 0
        for paths in alike:
            nodes = nn.utils.rnn.pad_sequence(paths, batch_first=True)
            seen = torch.cat([torch.arange(shared).expand(len(paths), -1), shared + nodes], dim=1)
            groups.append((nodes.to(device), seen.to(device)))
            for path in paths:
                places[path] = taken + torch.arange(len(path))
                taken += nodes.shape[1]
        return cls(groups, places.to(device), shared)

    @property
    def scores(self) -> int:
        """Attention scores per head."""
        return sum(nodes.shape[1] * seen.numel() for nodes, seen in self.groups)

    def attend(self, whole: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """`whole`, attention as in transformers' interface, group by group.

        Args:
            query: [doses, heads, n, d]; key, value: [doses, heads, prefix + n, d].

        Returns:
            [doses, n, heads, d]
        """
        out = []
        for nodes, seen in self.groups:
            kind = nodes.shape[1], options.get("sliding_window")
            if kind not in self.masks:
                self.masks[kind] = self._mask(*kind)
            part, _ = whole(module, _rows(query, nodes), _rows(key, seen), _rows(value, seen), self.masks[kind], **options)
            out.append(part.unflatten(0, (len(query), -1)).flatten(1, 2))
        return _rows(torch.cat(out, dim=1).transpose(1, 2), self.places[None]).transpose(1, 2)

    def _mask(self, width: int, window: int | None) -> Tensor | None:
        """What each place of a row sees, True where it does: [1, 1, width, prefix + width]; None for all up to itself."""
        places = self.shared + width
        if not self.shared and (window is None or width <= window):
            return None
        place = torch.arange(places, device=self.places.device)
        back = place[self.shared :, None] - place[None]
        return ((back >= 0) & (back < (window or places)))[None, None]


def _rows(x: Tensor, nodes: Tensor) -> Tensor:
    """[doses, heads, n, d] by nodes -> [doses * rows, heads, width, d] as nodes [rows, width] have them."""
    doses, heads, n, _ = x.shape
    if doses > 1:
        nodes = (nodes + n * torch.arange(doses, device=nodes.device)[:, None, None]).flatten(0, 1)
    return embedding(nodes, x.transpose(1, 2).flatten(2).flatten(0, 1)).unflatten(2, (heads, -1)).transpose(1, 2)


@contextlib.contextmanager
def attention_by_rows() -> Iterator[None]:
    """Attention over a pack is done row by row where rows are given: its cost is theirs, not that of the pack squared.
    Attention other than sdpa knows nothing of rows and goes by the mask."""
    whole = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                  rows: Rows | None = None, **options: Any) -> tuple[Tensor, None]:
        if rows is None:
            return whole(module, query, key, value, attention_mask, **options)
        return rows.attend(whole, module, query, key, value, **options), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = whole


def training_states(lm: LM, sequences: Sequence[list[int]], first: Sequence[int]) -> Tensor:
    """Final hidden states of each sequence at positions first[i] .. end, through which gradients flow.

    All sequences are one pack, so what several of them begin with is computed, and differentiated, once.

    Returns:
        [sum of (len(sequence) - first[i]), d], sequence after sequence.
    """
    (pack,) = packs(sequences, 0, sum(map(len, sequences)))
    wanted = torch.cat([pack.paths[i][start:] for i, start in enumerate(first)])
    rows, pack = Rows.of(pack, 0, lm.device), pack.to(lm.device)
    states = lm.decoder(input_ids=pack.ids[None], position_ids=pack.depth[None], attention_mask=_masks(lm, pack, 0),
                        use_cache=False, rows=rows).last_hidden_state
    return states[0, wanted.to(states.device)]


@torch.no_grad()
def run_packs(lm: LM, sequences: Sequence[list[int]], keep: int | None = None,
              cache: DynamicCache | None = None) -> Iterator[tuple[Pack, int, Tensor]]:
    """Run the decoder over every sequence.

    Args:
        keep: positions from here on are wanted as nodes, so the shared prefix ends before them; default: the last.
        cache: an empty one, for a caller who wants keys and values: while a pack is out, it holds the shared prefix and
            behind it the pack's nodes.

    Yields:
        (pack, prefix length, final hidden states [1, n, d] of the pack's nodes). Forward hooks on blocks see the pack's
        nodes as one row; the shared prefix passes through the blocks in a call of its own, before the first pack. Where
        a hook makes several rows of one, as under several doses, the states have that many.
    """
    last = min(map(len, sequences)) - 1
    shared = min(common_prefix(min(sequences), max(sequences)), last if keep is None else keep)
    shared = shared if shared >= MIN_PREFIX and len(sequences) > 1 else 0
    if shared:  # without a config every layer of a cache keeps everything; the masks do the windowing
        cache = DynamicCache() if cache is None else cache
        lm.decoder(input_ids=torch.tensor([sequences[0][:shared]], device=lm.device), past_key_values=cache,
                   use_cache=True)
    for pack in packs(sequences, shared, (PACK_TOKENS if shared < LONG_PREFIX else WHOLE_TOKENS)[lm.device.type]):
        rows, pack = Rows.of(pack, shared, lm.device), pack.to(lm.device)
        cheaper = shared < LONG_PREFIX and rows.scores < len(pack.ids) * (shared + len(pack.ids))
        with attention_by_rows():
            out = lm.decoder(input_ids=pack.ids[None], position_ids=pack.depth[None],
                             attention_mask=_masks(lm, pack, shared), past_key_values=cache, use_cache=cache is not None,
                             rows=rows if cheaper else None)
        yield pack, shared, out.last_hidden_state
        if cache is not None:
            cache.crop(-len(pack.ids))


def hidden_states(lm: LM, sequences: Sequence[list[int]], first: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Final hidden states of each sequence at positions first[i] .. end, in any order.

    Args:
        sequences: token ids, each at least first[i] + 1 long.
        first: the first position of each sequence whose state is wanted.

    Yields:
        (i, states) with states [len(sequence) - first[i], d], in the model's dtype.
    """
    if not sequences:
        return
    for pack, shared, states in run_packs(lm, sequences, keep=min(first)):
        for i, path in pack.paths.items():
            yield i, states[0, path[first[i] - shared :].to(states.device)]


def token_logps(lm: LM, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> list[Tensor]:
    """log p of each reply token given the prompt and the reply before it: a float32 [len(reply)] per pair."""
    sequences = [p + r[:-1] for p, r in zip(prompts, replies)]
    out: list[Tensor] = [torch.empty(0)] * len(replies)
    for i, states in hidden_states(lm, sequences, [len(p) - 1 for p in prompts]):
        targets = torch.tensor(replies[i], device=states.device)
        pieces = [lm.logits(h).log_softmax(-1).gather(1, t[:, None])[:, 0]
                  for h, t in zip(states.split(LOGIT_ROWS), targets.split(LOGIT_ROWS))]
        out[i] = torch.cat(pieces).cpu()
    return out


def packs(sequences: Sequence[list[int]], shared: int, size: int) -> Iterator[Pack]:
    """Merge sequences, without their first `shared` tokens, into packs of at most `size` nodes (one sequence at least).

    In lexicographic order neighbours share the most, and a sequence's nodes are the path to where it leaves its
    predecessor plus its own remainder: a depth-first walk of the tree.
    """
    ids: list[int] = []
    depth: list[int] = []
    paths: dict[int, list[int]] = {}
    previous: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        tail = sequences[i][shared:]
        meet = common_prefix(previous, tail) if previous else 0
        if ids and len(ids) + len(tail) - meet > size:
            yield _finish(ids, depth, paths)
            ids, depth, paths, previous, meet = [], [], {}, [], 0
        inherited = next(reversed(paths.values()))[:meet] if paths else []
        paths[i] = inherited + list(range(len(ids), len(ids) + len(tail) - meet))
        ids += tail[meet:]
        depth += range(shared + meet, shared + len(tail))
        previous = tail
    if ids:
        yield _finish(ids, depth, paths)


def _finish(ids: list[int], depth: list[int], paths: dict[int, list[int]]) -> Pack:
    end = list(range(1, len(ids) + 1))
    for path in paths.values():
        for node in path:
            end[node] = max(end[node], path[-1] + 1)
    return Pack(torch.tensor(ids), torch.tensor(depth), torch.tensor(end),
                {i: torch.tensor(path) for i, path in paths.items()})


def _masks(lm: LM, pack: Pack, shared: int) -> Tensor | dict[str, Tensor]:
    """Additive attention masks [1, 1, n, shared + n]: node q sees the prefix and its ancestors, itself included.

    A dict by layer type where the model tells its layers apart.
    """
    n = len(pack.ids)
    index = torch.arange(n, device=lm.device)
    tree = (index[None] <= index[:, None]) & (index[:, None] < pack.end[None])
    sees = torch.cat([tree.new_ones(n, shared), tree], dim=1)
    full = _additive(sees, lm)
    if not windowed(lm):
        return full
    config = lm.model.config.get_text_config()
    position = torch.cat([torch.arange(shared, device=lm.device), pack.depth])
    near = _additive(sees & (pack.depth[:, None] - position[None] < config.sliding_window), lm)
    return {"full_attention": full, "sliding_attention": near} if getattr(config, "layer_types", None) else near


def _additive(sees: Tensor, lm: LM) -> Tensor:
    dtype = lm.model.dtype
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)[None, None]


def windowed(lm: LM) -> bool:
    """Whether some layers see no further back than a sliding window; without types of layers, all of them do."""
    config = lm.model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    return "sliding_attention" in types if types else getattr(config, "sliding_window", None) is not None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
