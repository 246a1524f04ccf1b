"""A bandit whose arms are responses of one to three tokens, and a softmax policy over them: no
LLaVA."""

import random
from itertools import product

import torch
from torch import Tensor

STOP = 0  # ends a response; so does the longest length


class Bandit:
    """All responses over `vocab` tokens of at most `longest`, their scores, and a reference; all
    from the seed.

    A policy is a table of logits, one row per prefix: (prefixes, vocab). vocab 2 and longest 1 is
    two arms.
    """

    def __init__(self, vocab: int, longest: int, seed: int):
        # Prefixes that go on, and the responses: a prefix and one token more that ends it.
        inner = [p for n in range(longest) for p in product(range(1, vocab), repeat=n)]
        self.responses = []
        for prefix in inner:
            ends = range(vocab) if len(prefix) == longest - 1 else [STOP]
            self.responses += [(*prefix, token) for token in ends]

        # The (prefix, token) of each step: (responses, longest, 2), -1 behind the last.
        numbers = {prefix: i for i, prefix in enumerate(inner)}
        self.steps = torch.full((len(self.responses), longest, 2), -1)
        for i, response in enumerate(self.responses):
            for t, token in enumerate(response):
                self.steps[i, t] = torch.tensor([numbers[response[:t]], token])
        generator = torch.Generator().manual_seed(seed)
        self.reference = 0.5 * torch.randn(len(inner), vocab, generator=generator)
        order = torch.randperm(len(self.responses), generator=generator)
        self.scores = torch.linspace(-0.5, 0.5, len(self.responses))[order]
        self.beta = random.Random(seed).uniform(0.4, 1.0)

    def tokens(self, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row, branch, prefix and token of every token of the responses drawn (B, k), in
        `token_logps`' order.
        """
        steps = self.steps[drawn.flatten()]  # (B k, longest, 2)
        response, place = (steps[..., 0] >= 0).nonzero(as_tuple=True)
        prefix, token = steps[response, place].unbind(-1)
        return response // drawn.shape[1], response % drawn.shape[1], prefix, token

    def probabilities(self, policy: Tensor) -> Tensor:
        """Of every response, exactly."""
        logps = policy.log_softmax(-1)[self.steps[..., 0], self.steps[..., 1]]
        return (logps * (self.steps[..., 0] >= 0)).sum(1).exp()

    def draw(self, policy: Tensor, rows: int, k: int, generator: torch.Generator) -> Tensor:
        """Samples of a policy, as numbers of responses: (rows, k)."""
        chances = self.probabilities(policy.detach())
        return chances.multinomial(rows * k, True, generator=generator).view(rows, k)

    def optimum(self, beta: float) -> Tensor:
        """Eq. 2's, in closed form: pi* proportional to pi_ref exp(r / beta)."""
        best = self.probabilities(self.reference) * (self.scores / beta).exp()
        return best / best.sum()

    def distance(self, policy: Tensor) -> float:
        """The largest error of a probability, from the optimum; which is far from the reference's
        and other betas'.
        """
        best = self.optimum(self.beta)
        reference = self.probabilities(self.reference)
        for other in (reference, self.optimum(2 * self.beta), self.optimum(self.beta / 2)):
            assert (other - best).abs().max() > 0.02  # twice what the tests allow
        return (self.probabilities(policy.detach()) - best).abs().max().item()


def decaying_adam(parameters: list[Tensor], lr: float, steps: int):
    """Adam, and the linear fall of its rate to zero."""
    optimizer = torch.optim.Adam(parameters, lr)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
