"""transformers as the independent oracle: random tiny LLaVA models, and logits under any mask."""

import random

import torch
from helpers import randomize


class Oracle:
    """LLaVA as transformers has it."""

    def __init__(self, transformers):
        self.transformers = transformers
        transformers.utils.logging.disable_progress_bar()

    def make(self, seed: int, feature_layer: int = -2, tied: bool = False):
        """A tiny LlavaForConditionalGeneration, sizes and weights from the seed; odd seeds group
        their queries."""
        rng = random.Random(seed)
        torch.manual_seed(seed)
        heads = rng.choice([2, 3]) * (1 + seed % 2)
        groups = 1 + seed % 2
        tower_heads, patch = rng.choice([1, 2, 3]), rng.choice([4, 7])
        text = self.transformers.LlamaConfig(
            vocab_size=rng.randrange(40, 90),
            hidden_size=heads * rng.choice([6, 8]),
            intermediate_size=rng.randrange(20, 60),
            num_hidden_layers=rng.choice([2, 3]),
            num_attention_heads=heads,
            num_key_value_heads=heads // groups,
            head_dim=rng.choice([4, 8, 10]),
            rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-2]),
            rope_parameters={"rope_type": "default", "rope_theta": rng.choice([50.0, 1e4, 1e6])},
        )
        vision = self.transformers.CLIPVisionConfig(
            hidden_size=tower_heads * rng.choice([8, 12]),
            intermediate_size=rng.randrange(20, 60),
            num_hidden_layers=rng.choice([3, 4]),
            num_attention_heads=tower_heads,
            image_size=patch * rng.choice([2, 3])
            + rng.choice([0, 2]),  # what is left of a patch is cut off
            patch_size=patch,
            layer_norm_eps=rng.choice([1e-5, 1e-2]),
        )
        config = self.transformers.LlavaConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            image_token_index=rng.randrange(3, 30),
            vision_feature_layer=feature_layer,
            tie_word_embeddings=tied,
        )
        model = self.transformers.LlavaForConditionalGeneration(config).eval()
        randomize(model, seed, 1.5)
        return model

    def make_next(self, seed: int, family: str, tokens: tuple[int, int] | None = None):
        """A tiny LlavaNextForConditionalGeneration: `vicuna` has as many key as query heads, the
        others fewer.

        `tokens`: size of the vocabulary and id of the image token, from the seed where a tokenizer
        need not fit."""
        rng = random.Random(seed)
        vocab, image = tokens or (rng.randrange(40, 90), rng.randrange(3, 30))
        torch.manual_seed(seed)
        heads, groups, kind = {
            "vicuna": (2, 1, "Llama"),
            "mistral": (4, 2, "Mistral"),
            "34b": (6, 3, "Llama"),
        }[family]
        text = getattr(self.transformers, f"{kind}Config")(
            vocab_size=vocab,
            hidden_size=heads * 6,
            intermediate_size=rng.randrange(20, 60),
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=heads // groups,
            head_dim=8,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": {"vicuna": 1e4, "mistral": 1e6, "34b": 5e6}[family],
            },
            **({"sliding_window": None} if kind == "Mistral" else {}),
        )
        vision = self.transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        config = self.transformers.LlavaNextConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            image_token_index=image,
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]],
            tie_word_embeddings=False,
        )
        model = self.transformers.LlavaNextForConditionalGeneration(config).eval()
        randomize(model, seed, 1.5)
        return model

    @staticmethod
    @torch.no_grad()
    def logits(
        model, ids, pixels, visible: list[bool] | None = None, additive=False, count=None, **options
    ):
        """(T, V) logits; the image token, once in `ids`, is expanded. `visible`: image columns that
        may be seen."""
        vision, image = model.config.vision_config, model.config.image_token_id
        patches = count or (vision.image_size // vision.patch_size) ** 2
        place = ids.index(image)
        whole = torch.tensor([ids[:place] + [image] * patches + ids[place + 1 :]])
        if visible is not None:
            width = whole.shape[1]
            seen = torch.ones(width, dtype=torch.bool)
            seen[place : place + patches] = torch.tensor(visible)
            mask = (torch.ones(width, width).tril().bool() & seen)[None, None]
            if additive:
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            options |= {"attention_mask": mask, "position_ids": torch.arange(width)[None]}
        return model(input_ids=whole, pixel_values=pixels[None], **options).logits[0]
