"""A reward model's scores, whitened by those of the alignment data (Sec. 5.5)."""

import random
from dataclasses import dataclass, replace
from itertools import chain

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minialign.cli import require
from minialign.data.collate import StepLoader
from minialign.data.records import Record
from minialign.rlhf.rewards import Whitening
from minialign.rlhf.scorers import RewardModel
from minialign.training import parallel

# Differs from the paper: whitened by so many records of the alignment data, not by all. They tell
# the mean to 2 or 3 % of the standard deviation.
MEASURED = 1000


@dataclass(frozen=True)
class WhitenedReward:
    """A reward model's scores with mean 0 and standard deviation 1 on the alignment data, so that
    beta of Eq. 2 counts in standard deviations (Sec. 5.5).
    """

    reward: RewardModel
    whitening: Whitening

    @classmethod
    def on(cls, reward: RewardModel, loader: StepLoader, batch_size: int) -> "WhitenedReward":
        """Measured on the stored responses, chosen and rejected ones, of the records that the
        policy takes its prompts from, some at random if they are many; every process scores a
        share.
        """
        loader = replace(loader, accumulate=1, left_out=[])
        numbers = list(loader.records.numbers)
        numbers = random.Random(0).sample(numbers, min(MEASURED, len(numbers)))
        parts = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
        mine = tqdm(
            parallel.shard_batch(parts), "rewards", leave=False, disable=parallel.rank() > 0
        )
        found: list[float] = []
        for batch in chain.from_iterable(map(loader, mine)):
            for name in ("chosen", "rejected"):
                pairs = [pair for pair in batch.pairs if getattr(pair.record, name)]
                if pairs:
                    records = [pair.record for pair in pairs]
                    texts = [(getattr(record, name),) for record in records]
                    scores = reward(records, [pair.picture for pair in pairs], texts)
                    found += scores.flatten().tolist()

        whitening = Whitening.of(torch.tensor(sum(parallel.gather(found), [])))
        same = "the reward model gives all responses of the data the same reward"
        require(whitening.std > 1e-6, f"{same}; train it longer, or give more records")
        return cls(reward, whitening)

    def __call__(
        self, records: list[Record], pictures: list[Image.Image], texts: list[tuple[str, ...]]
    ) -> Tensor:
        """Scores (B, k)."""
        return self.whitening(self.reward(records, pictures, texts))
