"""The token tree: who may attend to whom. Every algorithm of the paper is a choice of tree.

A sequence is a trunk and zero or more branches that fork from it. A plain forward pass is a trunk
alone; a DPO pair is a prompt with two branches; a BDHS completion of S sentences is one trunk
(image, prompt, y+) with S branches, each forking where its sentence was cut. One rule,
`may_attend`, covers them all.

Most of a tree is a trunk, and a trunk is plain causal. So what attention is given is the rule for
a batch's last columns alone (`TokenTree.mask`): the columns before them, its causal prefix, need
no mask.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

TRUNK = 0
PADDING = -1
NEWLINE = -2  # AnyRes ends every row of patches in the learned `image_newline`
COLUMNS = ("ids", "positions", "branch", "fork", "visible", "parent", "feature")


@dataclass(frozen=True)
class TokenTree:
    """A batch of B token trees, right-padded. Every tensor but the last is (B, T).

    ids        token id; image slots hold the image token's id
    positions  RoPE position; a branch continues from its fork, a hidden token leaves a gap
    branch     0 = trunk, 1..S = a branch, -1 = padding
    fork       for a branch token: the trunk position at which its branch forks; 0 elsewhere
    visible    False: no query may attend to this key (Eq. 6), nor to padding
    parent     column of the token that predicts this one, -1 for the first of a sequence
    feature    row of the batch's image features that fills this slot, NEWLINE for image_newline,
               -1 for text
    tip        (B, S) column of each branch's last token (its fork's, if it has none), -1 where
               there is no branch
    prefix     leading columns in which every row is plain causal: padding aside, each token
               follows the one in the column before it, and none is hidden
    """

    ids: Tensor
    positions: Tensor
    branch: Tensor
    fork: Tensor
    visible: Tensor
    parent: Tensor
    feature: Tensor
    tip: Tensor
    features_expected: int = 0
    prefix: int = 0

    @cached_property
    def mask(self) -> Tensor | None:
        """The rule for the queries behind the causal prefix, (B, 1, T - prefix, T) bool; None
        where the prefix is all. Built once, for policy and reference.
        """
        if self.prefix == self.ids.shape[1]:
            return None
        return dense_mask(self.columns(self.prefix), self)

    def columns(self, first: int) -> "TokenTree":
        """The columns from `first` on, as queries that ask about the whole tree."""
        columns = [getattr(self, name)[:, first:] for name in COLUMNS]
        return TokenTree(*columns, self.tip)

    def to(self, device) -> "TokenTree":
        """The same tree on `device`."""
        tensors = [getattr(self, name).to(device) for name in (*COLUMNS, "tip")]
        return TokenTree(*tensors, self.features_expected, self.prefix)

    def rows(self, keep: Tensor) -> "TokenTree":
        """Some of the rows, as keys: `features_expected` stays that of all."""
        tensors = [getattr(self, name)[keep] for name in (*COLUMNS, "tip")]
        return TokenTree(*tensors, self.features_expected, self.prefix)

    def append(self, other: "TokenTree") -> "TokenTree":
        """This tree with the columns of `other` behind its own: decoding grows a tree so."""
        columns = [torch.cat([getattr(self, n), getattr(other, n)], dim=1) for n in COLUMNS]
        return TokenTree(*columns, other.tip, self.features_expected)

    def put(self, other: "TokenTree", first: int) -> None:
        """Write the columns of `other` over this tree's own, from column `first` on: so a tree of
        fixed width fills up.
        """
        for name in COLUMNS:
            getattr(self, name)[:, first : first + other.ids.shape[1]] = getattr(other, name)


def may_attend(q_position, q_branch, q_fork, k_position, k_branch, k_visible) -> Tensor:
    """The rule, elementwise on broadcastable tensors; True means "may attend", as in Eq. 6.

    A query sees a visible key that is not later than itself and lies on its own branch, or on the
    trunk before the fork. Padding sees itself only (its positions are unique), so that no row is
    empty.
    """
    same_branch = q_branch == k_branch
    before_fork = (k_branch == TRUNK) & (k_position < q_fork)
    seen = k_visible & (k_position <= q_position) & (same_branch | before_fork)
    itself = same_branch & (k_position == q_position)
    return torch.where(q_branch == PADDING, itself, seen)


def dense_mask(query: TokenTree, key: TokenTree) -> Tensor:
    """The rule as a (B, 1, Tq, Tk) bool tensor."""
    q = [column[:, None, :, None] for column in (query.positions, query.branch, query.fork)]
    k = [column[:, None, None, :] for column in (key.positions, key.branch, key.visible)]
    return may_attend(*q, *k)


def image_attention_mask(image_tokens: int, rho_th: float, generator: torch.Generator) -> Tensor:
    """Eq. 6: m_i = 1 if rho_i >= rho_th else 0, rho_i ~ U(0, 1), one per image embedding.

    (image_tokens,) bool.
    """
    return torch.rand(image_tokens, generator=generator) >= rho_th


def mask_of_seed(image_tokens: int, rho_th: float, seed: int) -> Tensor:
    """The mask that a seed stands for: a pair stores its seed, and the report draws the same mask
    again.
    """
    return image_attention_mask(image_tokens, rho_th, torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Branch:
    """Token ids that fork from the trunk before `trunk[fork]`; None forks at the trunk's end."""

    ids: list[int]
    fork: int | None = None


@dataclass(frozen=True)
class Sequence:
    """One token tree before it is laid out: trunk ids with the image token once, its expansion,
    and the branches.

    image_features  how many features the tower gives for the picture
    image_visible   bool (image tokens,), or None when the whole image is visible
    packing         which feature, or NEWLINE, each image token stands for (image tokens,);
                    None: one token per feature
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


def build_tree(
    sequences: list[Sequence], image_token_id: int, pad_id: int, drop_hidden: bool = True
) -> TokenTree:
    """Lay out sequences as one right-padded batch: the only place where sequences are built.

    drop_hidden leaves hidden image tokens out of the sequence: a key that nobody sees changes
    nothing, so the others keep their positions and every logit stays what it was, for a fraction
    of the prefill.
    Raises ValueError where the trunk's image places and the image's tokens disagree, or a fork is
    hidden.
    """
    rows, tips, offset = [], [], 0
    for sequence in sequences:
        row, tip = _lay_out(sequence, image_token_id, offset, drop_hidden)
        rows.append(row)
        tips.append(tip)
        offset += sequence.image_features

    # Padding has unique positions, so that each pad may attend to itself alone.
    width = max(len(row[0]) for row in rows)
    for row in rows:
        count = len(row[0])
        for values, pad in zip(row, [pad_id, None, PADDING, 0, False, -1, -1], strict=True):
            values += range(count, width) if pad is None else [pad] * (width - count)

    columns = [torch.tensor([row[i] for row in rows]) for i in range(len(COLUMNS))]
    branches = max(len(tip) for tip in tips)
    tip = torch.tensor([tip + [-1] * (branches - len(tip)) for tip in tips])
    tree = TokenTree(*columns, tip.view(len(tips), branches), offset)
    return replace(tree, prefix=causal_prefix(tree))


def causal_prefix(tree: TokenTree) -> int:
    """How many leading columns are plain causal in every row.

    Padding counts as causal: it lets a pad attend to what is before it, and nobody reads that.
    """
    follows = tree.visible & (tree.parent == torch.arange(tree.ids.shape[1]) - 1)
    causal = (follows | (tree.branch == PADDING)).all(0)  # (T,)
    return int(causal.long().cumprod(0).sum())


def _lay_out(
    sequence: Sequence, image_token_id: int, feature_offset: int, drop_hidden: bool
) -> tuple[list[list], list[int]]:
    """One sequence, trunk first and then its branches: its columns, and the branches' tips."""
    row: list[list] = [[] for _ in COLUMNS]
    places = sequence.trunk.count(image_token_id)
    if places != (1 if sequence.image_tokens else 0):
        tokens = f"{sequence.image_tokens} image features to fill them"
        raise ValueError(f"{places} image places in the prompt, {tokens}")
    shown = sequence.image_visible
    if shown is not None and len(shown) != sequence.image_tokens:
        raise ValueError(f"a mask of {len(shown)} for {sequence.image_tokens} image features")

    def put(*values) -> int:
        """One more token; returns its column."""
        for column, value in zip(row, values, strict=True):
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
        visible = [True] * sequence.image_tokens if shown is None else shown.tolist()
        packing = range(sequence.image_features)
        if sequence.packing is not None:
            packing = sequence.packing.tolist()
        for feature, seen in zip(packing, visible, strict=True):
            if seen or not drop_hidden:
                filled_by = NEWLINE if feature == NEWLINE else feature_offset + feature
                last = column_of[position] = put(token, position, TRUNK, 0, seen, last, filled_by)
            # Silent in the paper: a hidden token leaves a gap in the RoPE positions; counting them
            # from the mask would shift the text.
            position += 1
    start_of.append(position)

    tips = []
    for number, branch in enumerate(sequence.branches, start=1):
        fork = start_of[len(sequence.trunk) if branch.fork is None else branch.fork]
        if fork - 1 not in column_of:
            where = f"forks at position {fork}, right behind a hidden token or nothing"
            raise ValueError(f"branch {number} {where}")
        last = column_of[fork - 1]
        for i, token in enumerate(branch.ids):
            last = put(token, fork + i, number, fork, True, last, -1)
        tips.append(last)
    return row, tips
