"""The token tree: who may attend to whom. Every algorithm of the paper is a choice of tree.

A sequence is a trunk and zero or more branches that fork from it. A plain forward pass is a trunk alone;
a DPO pair is a prompt with two branches; a BDHS completion of S sentences is one trunk (image, prompt, y+)
with S branches, each forking where its sentence was cut. One rule, `may_attend`, covers them all. Each sequence has a
row of its own, or short ones share one, which changes nothing but how much is padding.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from heapq import heapreplace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from minialign.compiled import compiled

TRUNK = 0
PADDING = -1
NEWLINE = -2  # AnyRes ends every row of patches in the learned `image_newline`
COLUMNS = ("ids", "positions", "branch", "fork", "visible", "parent", "feature", "sequence")


@dataclass(frozen=True)
class TokenTree:
    """A batch of N token trees in B rows, right-padded. Every tensor but the last is (B, T).

    ids        token id; image slots hold the image token's id
    positions  RoPE position; a branch continues from its fork, a hidden token leaves a gap
    branch     0 = trunk, 1..S = a branch, -1 = padding
    fork       for a branch token: the trunk position at which its branch forks; 0 elsewhere
    visible    False: no query may attend to this key (Eq. 6)
    parent     column of the token that predicts this one, -1 for the first of a sequence
    feature    row of the batch's image features that fills this slot, NEWLINE for image_newline, -1 for text
    sequence   0..N-1: which sequence of the batch it belongs to, -1 = padding; the row, where none is shared
    tip        (N, S) column of each branch's last token (its fork's, if it has none), -1 where there is no branch
    causal     every token follows the one in the column before it and none is hidden: the rule is plain causal
    """

    ids: Tensor
    positions: Tensor
    branch: Tensor
    fork: Tensor
    visible: Tensor
    parent: Tensor
    feature: Tensor
    sequence: Tensor
    tip: Tensor
    features_expected: int = 0
    causal: bool = False

    @cached_property
    def mask(self) -> Tensor | BlockMask | None:
        """The rule among the tree's own tokens, built once for policy and reference; None: plain causal attention.

        That lets padding attend to what is before it, and nobody reads what it gets.
        """
        if self.causal:
            return None
        return block_mask(self) if self.ids.is_cuda else dense_mask(self, self)

    @property
    def row(self) -> Tensor:
        """(N,) the row that each sequence is in."""
        row, column = (self.branch != PADDING).nonzero(as_tuple=True)
        return row.new_zeros(len(self.tip)).index_put((self.sequence[row, column],), row)

    def to(self, device) -> "TokenTree":
        """The same tree on `device`."""
        tensors = (getattr(self, name).to(device) for name in (*COLUMNS, "tip"))
        return TokenTree(*tensors, self.features_expected, self.causal)

    def rows(self, keep: Tensor) -> "TokenTree":
        """Some of the rows, of which none is shared."""
        tensors = (getattr(self, name)[keep] for name in (*COLUMNS, "tip"))
        return TokenTree(*tensors, self.features_expected, self.causal)

    def append(self, other: "TokenTree") -> "TokenTree":
        """This tree with the columns of `other` behind its own: decoding grows a tree so."""
        columns = (torch.cat([getattr(self, n), getattr(other, n)], dim=1) for n in COLUMNS)
        return TokenTree(*columns, other.tip, self.features_expected)

    def put(self, other: "TokenTree", first: int) -> None:
        """Write the columns of `other` over this tree's own, from column `first` on: so one of fixed size fills up."""
        for name in COLUMNS:
            getattr(self, name)[:, first : first + other.ids.shape[1]] = getattr(other, name)


def may_attend(q_sequence, q_position, q_branch, q_fork, k_sequence, k_position, k_branch, k_visible) -> Tensor:
    """The rule, elementwise on broadcastable tensors; True means "may attend", as in Eq. 6 and in SDPA.

    A query sees a visible key of its own sequence that is not later than itself and lies on its own branch, or on the
    trunk before the fork. Padding sees itself only (its positions are unique), so that no row is empty.
    """
    same_branch = q_branch == k_branch
    before_fork = (k_branch == TRUNK) & (k_position < q_fork)
    seen = (q_sequence == k_sequence) & k_visible & (k_position <= q_position) & (same_branch | before_fork)
    itself = same_branch & (k_position == q_position)
    return torch.where(q_branch == PADDING, itself, seen)


def dense_mask(query: TokenTree, key: TokenTree) -> Tensor:
    """The rule as a (B, 1, Tq, Tk) bool tensor for SDPA."""
    q = (column[:, None, :, None] for column in (query.sequence, query.positions, query.branch, query.fork))
    k = (column[:, None, None, :] for column in (key.sequence, key.positions, key.branch, key.visible))
    return may_attend(*q, *k)


def block_mask(tree: TokenTree) -> BlockMask:
    """The rule for FlexAttention: the blocks of 128 x 128 in which it holds somewhere, and the rule within them."""
    sequence, positions, branch = tree.sequence, tree.positions, tree.branch  # and not `tree`: no cycle with tree.mask
    fork, visible = tree.fork, tree.visible

    def rule(row, head, q, k):
        return may_attend(
            sequence[row, q], positions[row, q], branch[row, q], fork[row, q],
            sequence[row, k], positions[row, k], branch[row, k], visible[row, k],
        )  # fmt: skip

    rows, width = tree.ids.shape
    return compiled(create_block_mask)(rule, rows, None, width, width, device=tree.ids.device)


def image_attention_mask(image_tokens: int, rho_th: float, generator: torch.Generator) -> Tensor:
    """Eq. 6: m_i = 1 if rho_i >= rho_th else 0, rho_i ~ U(0, 1), one per image embedding. (image_tokens,) bool."""
    return torch.rand(image_tokens, generator=generator) >= rho_th


def mask_of_seed(image_tokens: int, rho_th: float, seed: int) -> Tensor:
    """The mask that a seed stands for: a pair stores its seed, and the report draws the same mask again."""
    return image_attention_mask(image_tokens, rho_th, torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Branch:
    """Token ids that fork from the trunk before `trunk[fork]`; None forks at the trunk's end."""

    ids: list[int]
    fork: int | None = None


@dataclass(frozen=True)
class Sequence:
    """One token tree before it is laid out: trunk ids with the image token once, its expansion, and the branches.

    image_features  how many features the tower gives for the picture
    image_visible   bool (image tokens,), or None when the whole image is visible
    packing         which feature, or NEWLINE, each image token stands for (image tokens,); None: one token per feature
    """

    trunk: list[int]
    branches: list[Branch] = field(default_factory=list)
    image_features: int = 0
    image_visible: Tensor | None = None
    packing: Tensor | None = None

    @property
    def image_tokens(self) -> int:
        """How many tokens the picture takes up."""
        return self.image_features if self.packing is None else len(self.packing)

    @property
    def length(self) -> int:
        """Tokens of trunk, picture and all branches together, hidden ones included."""
        text = len(self.trunk) + sum(len(branch.ids) for branch in self.branches)
        return text - bool(self.image_tokens) + self.image_tokens


def shared_rows(lengths: list[int], pack: int | None) -> list[list[int]]:
    """The numbers of the sequences in each row: of one (pack None), or of several in up to `pack` tokens.

    Of all counts of rows, dealt out longest first, each to the emptiest row, that with the fewest tokens, padding
    included: never more than with a row each. A sequence longer than `pack` makes the others' rows as wide, too.
    """
    ways = [[[number] for number in range(len(lengths))]]
    if pack is None:
        return ways[0]
    longest_first = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    for count in range(len(lengths) - 1, 0, -1):
        rows: list[tuple[int, list[int]]] = [(0, []) for _ in range(count)]  # a heap: the emptiest row is the first
        for number in longest_first:
            tokens, row = rows[0]
            heapreplace(rows, (tokens + lengths[number], [*row, number]))
        if max(rows)[0] <= max(pack, *lengths):
            ways.append([row for _, row in rows])
    return min(ways, key=lambda rows: len(rows) * max(sum(lengths[number] for number in row) for row in rows))


def build_tree(
    sequences: list[Sequence],
    image_token_id: int,
    pad_id: int,
    drop_hidden: bool = True,
    pack: int | None = None,
) -> TokenTree:
    """Lay out sequences as one right-padded batch: the only place where sequences are built.

    drop_hidden leaves hidden image tokens out of the sequence: a key that nobody sees changes nothing, so the
    others keep their positions and every logit stays what it was, for a fraction of the prefill.
    pack: sequences share rows of up to so many tokens (see `shared_rows`), for training; None: a row each.
    Raises ValueError where the trunk's image places and the image's tokens disagree, or a fork is hidden.
    """
    rows, tips = [], [[]] * len(sequences)
    offsets = [*accumulate((sequence.image_features for sequence in sequences), initial=0)]
    for members in shared_rows([sequence.length for sequence in sequences], pack):
        rows.append([[] for _ in COLUMNS])
        for number in members:
            tips[number] = _put(rows[-1], sequences[number], number, image_token_id, offsets[number], drop_hidden)
    width, branches = max(len(row[0]) for row in rows), max(len(tip) for tip in tips)
    for row in rows:
        count = len(row[0])
        # Padding has unique positions, so that each pad may attend to itself alone.
        for values, pad in zip(row, [pad_id, None, PADDING, 0, False, -1, -1, -1], strict=True):
            values += range(count, width) if pad is None else [pad] * (width - count)
    columns = [torch.tensor([row[i] for row in rows]) for i in range(len(COLUMNS))]
    tip = torch.tensor([tip + [-1] * (branches - len(tip)) for tip in tips]).view(len(tips), branches)
    tree = TokenTree(*columns, tip, offsets[-1])
    follows = tree.visible & (tree.parent == torch.arange(width) - 1)
    return replace(tree, causal=bool((follows | (tree.branch == PADDING)).all()))


def _put(
    row: list[list], sequence: Sequence, index: int, image_token_id: int, feature_offset: int, drop_hidden: bool
) -> list[int]:
    """Put a sequence behind what the row's columns hold, trunk first and then its branches; returns the branches' tips.

    index is its number in the batch.
    """
    places = sequence.trunk.count(image_token_id)
    if places != (1 if sequence.image_tokens else 0):
        raise ValueError(f"{places} image places in the prompt, {sequence.image_tokens} image features to fill them")
    if sequence.image_visible is not None and len(sequence.image_visible) != sequence.image_tokens:
        raise ValueError(f"a mask of {len(sequence.image_visible)} for {sequence.image_tokens} image features")

    def put(*values) -> int:
        """One more token; returns its column."""
        for column, value in zip(row, (*values, index), strict=True):
            column.append(value)
        return len(row[0]) - 1

    start_of: list[int] = []  # trunk index -> position
    column_of: dict[int, int] = {}  # trunk position -> column
    position, last = 0, -1  # the last token's column: the next one's parent
    for token in sequence.trunk:
        start_of.append(position)
        if token != image_token_id:
            last = column_of[position] = put(token, position, TRUNK, 0, True, last, -1)
            position += 1
            continue
        visible = [True] * sequence.image_tokens if sequence.image_visible is None else sequence.image_visible.tolist()
        packing = range(sequence.image_features) if sequence.packing is None else sequence.packing.tolist()
        for feature, seen in zip(packing, visible, strict=True):
            if seen or not drop_hidden:
                filled_by = NEWLINE if feature == NEWLINE else feature_offset + feature
                last = column_of[position] = put(token, position, TRUNK, 0, seen, last, filled_by)
            position += 1
    start_of.append(position)
    tips = []
    for number, branch in enumerate(sequence.branches, start=1):
        fork = start_of[len(sequence.trunk) if branch.fork is None else branch.fork]
        if fork - 1 not in column_of:
            raise ValueError(f"branch {number} forks at position {fork}, right behind a hidden token or nothing")
        last = column_of[fork - 1]
        for i, token in enumerate(branch.ids):
            last = put(token, fork + i, number, fork, True, last, -1)
        tips.append(last)
    return tips
