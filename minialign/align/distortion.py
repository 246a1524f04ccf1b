"""POVID's image distortion (Sec. 3.3): what the model predicts for y+ when the image is drowned in
noise.

Every token of y~- is the model's own prediction given the noisy image and the true tokens of y+
before it. It is an example of what not to say beside the stored y- (Eq. 5), made anew from the
current policy at every step.
"""

from dataclasses import replace

import torch
from torch import Tensor

from minialign.align.logps import predicting
from minialign.model.llava import Llava
from minialign.model.masks import Branch, Sequence, TokenTree, build_tree


@torch.no_grad()
def distorted_tree(model: Llava, sequences: list[Sequence], features: Tensor) -> TokenTree:
    """The sequences' tree with one more branch each: y~-, as long as y+, their first branch.

    features: (tiles, patches, D), the tower's of the noisy pictures. One forward pass over image,
    prompt and y+, of which no graph is kept.
    """
    image_id, pad_id = model.config.image_token_id, 0  # nobody looks at what padding is
    chosen = [replace(sequence, branches=sequence.branches[:1]) for sequence in sequences]
    tree = build_tree(chosen, image_id, pad_id).to(model.device)

    # The likeliest token in the place of every token of y+, row after row; never the image token.
    # Differs from the paper: POVID's code scores these tokens behind the true prefix, lets the
    # reference score its own, and draws fresh noise at every visit.
    _, _, _, hidden = predicting(model, tree, features)
    logits = model.lm_head(hidden)
    logits[:, image_id] = -torch.inf
    lengths = [len(sequence.branches[0].ids) for sequence in sequences]
    predicted = logits.argmax(-1).cpu().split(lengths)

    distorted = []
    for sequence, ids in zip(sequences, predicted, strict=True):
        branches = [*sequence.branches, Branch(ids.tolist())]
        distorted.append(replace(sequence, branches=branches))
    return build_tree(distorted, image_id, pad_id)
