"""POVID's image distortion (Sec. 3.3): what the model predicts for y+ when the image is drowned in
noise.

Every token of y~- is the model's own prediction given the noisy image and the true tokens of y+
before it. It is an example of what not to say beside the stored y- (Eq. 5), made anew from the
current policy at every step. Chosen here, where the paper is silent: the prediction is the
likeliest token, never the image token."""

from dataclasses import replace

import torch
from torch import Tensor

from minialign.model.llava import Llava
from minialign.model.masks import Branch, Sequence, TokenTree, build_tree


@torch.no_grad()
def distorted_tree(model: Llava, sequences: list[Sequence], features: Tensor) -> TokenTree:
    """The sequences' tree with one more branch each: y~-, from the tower's `features` of the noisy
    pictures.

    A sequence's first branch is y+; one forward pass over image, prompt and y+, of which no graph
    is kept."""
    image_id, pad_id = model.config.image_token_id, 0  # nobody looks at what padding is
    chosen = [replace(sequence, branches=sequence.branches[:1]) for sequence in sequences]
    tree = build_tree(chosen, image_id, pad_id).to(model.device)
    row, column = (tree.branch == 1).nonzero(as_tuple=True)
    logits = model.lm_head(model(tree, features)[row, tree.parent[row, column]])
    logits[:, image_id] = -torch.inf
    said, start, distorted = logits.argmax(-1).tolist(), 0, []
    for sequence in sequences:
        end = start + len(sequence.branches[0].ids)
        distorted.append(replace(sequence, branches=[*sequence.branches, Branch(said[start:end])]))
        start = end
    return build_tree(distorted, image_id, pad_id)
