"""POVID's image distortion (Sec. 3.3): what the model predicts for y+ when the image is drowned in
noise.

Every token of y~- is the model's own prediction given the noisy image and the true tokens of y+
before it, and is scored in the same place: by its probability given the clean image and the true
tokens before it, as POVID's published code does. Policy and reference predict each their own. So
y~- is a second rejected response beside the stored y- (Eq. 5).
"""

from dataclasses import replace

import torch
from torch import Tensor

from minialign.align.logps import logps_of, predicting, summed
from minialign.model.llava import Llava
from minialign.model.masks import Sequence, TokenTree, build_tree


def chosen_tree(sequences: list[Sequence], image_id: int) -> TokenTree:
    """The sequences with y+, their first branch, alone: what is looked at in the noisy image."""
    chosen = [replace(sequence, branches=sequence.branches[:1]) for sequence in sequences]
    return build_tree(chosen, image_id, pad_id=0)  # which nobody looks at


@torch.no_grad()
def distorted_ids(model: Llava, chosen: TokenTree, noisy_features: Tensor) -> Tensor:
    """y~-: the likeliest token in the place of every token of y+, row after row, (tokens,); never
    the image token. noisy_features (tiles, patches, D): the tower's of the noisy images.
    """
    _, _, _, hidden = predicting(model, chosen, noisy_features)
    logits = model.lm_head(hidden)
    logits[:, model.config.image_token_id] = -torch.inf
    return logits.argmax(-1)


def distorted_logps(
    model: Llava, tree: TokenTree, features: Tensor, chosen: TokenTree, noisy_features: Tensor
) -> Tensor:
    """`branch_logps` of the whole tree by the clean images' features, (B, S), and in one more
    column that of y~-, summed over its tokens: (B, S + 1), float32.
    """
    predicted = distorted_ids(model, chosen, noisy_features)
    row, branch, ids, hidden = predicting(model, tree, features)
    logps = summed(tree, row, branch, logps_of(model.lm_head, ids, hidden))

    # Both trees have the tokens of y+ row after row.
    of_chosen = branch == 0
    own = logps_of(model.lm_head, predicted, hidden[of_chosen])
    own = summed(tree, row[of_chosen], branch[of_chosen], own)
    return torch.cat([logps, own[:, :1]], dim=1)
