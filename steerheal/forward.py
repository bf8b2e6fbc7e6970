"""Running the model over many token sequences, each distinct prefix once.

Readouts ask for sequences that share much: worked examples before every vignette, one dilemma before four replies, a
persona before every context. Sequences are merged into a tree of tokens; a pack of tree nodes runs as one row, with
the node's depth as position and a mask that lets a token see its ancestors only. Nothing is padded, nothing shared is
computed twice, and what a sequence gets does not depend on its neighbours beyond rounding. (Tree attention as in
SpecInfer, Miao et al. 2024, arXiv:2305.09781, used here for scoring.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steerheal.models import LM

PACK_TOKENS = {"cpu": 384, "cuda": 2048}  # tree nodes per forward pass: enough to saturate the device, and no more,
# because attention inside a pack is dense
LOGIT_ROWS = 512  # positions whose vocabulary-wide logits exist at once
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
    """The sequences of a pack as rows of its nodes, padded at their ends."""

    nodes: Tensor  # [rows, width] the node at each place; where a row has ended, node 0
    places: Tensor  # [n] one of the places of each node, counted row after row

    def spread(self, x: Tensor) -> Tensor:
        """[1, heads, n, d] by nodes -> [rows, heads, width, d] by rows."""
        return embedding(self.nodes, x.transpose(1, 2).flatten(2)[0]).unflatten(2, (x.shape[1], -1)).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        """[rows, width, heads, d] by rows -> [1, n, heads, d] by nodes."""
        return embedding(self.places, x.flatten(2).flatten(0, 1)).unflatten(1, x.shape[2:])[None]

    def mask(self, window: int | None) -> Tensor | None:
        """What each place sees of its row, as attention under a sliding window takes it; None for all before it."""
        place = torch.arange(self.nodes.shape[1], device=self.nodes.device)
        back = place[:, None] - place[None]
        return None if window is None or len(place) <= window else ((back >= 0) & (back < window))[None, None]


@contextlib.contextmanager
def attention_by_rows() -> Iterator[None]:
    """Attention under `training_states` is done row by row: its cost is that of the rows, not of the pack squared."""
    whole = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                  rows: Rows | None = None, **options: Any) -> tuple[Tensor, None]:
        if rows is None:
            return whole(module, query, key, value, attention_mask, **options)
        out, _ = whole(module, *map(rows.spread, (query, key, value)), rows.mask(options.get("sliding_window")), **options)
        return rows.merge(out), None

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
    nodes = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    places = torch.empty_like(pack.ids)
    for i, path in pack.paths.items():
        nodes[i, : len(path)] = path
        places[path] = i * nodes.shape[1] + torch.arange(len(path))
    wanted = torch.cat([pack.paths[i][start:] for i, start in enumerate(first)])
    pack = pack.to(lm.device)
    # attention other than sdpa knows nothing of rows and goes by the mask
    states = lm.decoder(input_ids=pack.ids[None], position_ids=pack.depth[None], attention_mask=_masks(lm, pack, 0),
                        use_cache=False, rows=Rows(nodes.to(lm.device), places.to(lm.device))).last_hidden_state
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
    for pack in packs(sequences, shared, PACK_TOKENS[lm.device.type]):
        pack = pack.to(lm.device)
        out = lm.decoder(input_ids=pack.ids[None], position_ids=pack.depth[None], attention_mask=_masks(lm, pack, shared),
                         past_key_values=cache, use_cache=cache is not None)
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
