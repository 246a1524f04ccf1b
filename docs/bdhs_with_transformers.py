"""BDHS (arXiv 2407.02477, Algorithm 1) on transformers' LLaVA, in one file: nothing of minialign.

    python docs/bdhs_with_transformers.py MODEL PICTURE "What is there?" "A red cup. It is large."

MODEL is a LLaVA-1.5 or 1.6 folder, the last text y+, the response to spoil. To be ported: a whole
forward pass per token; the traps are in `next_logits`. tests/test_porting.py tests it against ours.
"""

import argparse
import random
import re

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

# The prompt with its control tokens, `<image>` once, and the space that stands before a response.
TEMPLATE = "<s>USER: <image>\n{} ASSISTANT: "  # LLaVA-1.5's
YES_NO = re.compile(r"(Yes|yes|No|no)\b(?!-)")
DECODING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
SWAP = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}


def next_logits(model, ids, features, visible):
    """The logits (V,) behind `ids`, which hold the image token once per feature.

    features (N, D): the picture as the decoder gets it. visible (N,) bool: the mask of Eq. 6.
    """
    ids = torch.tensor(ids, device=features.device)
    is_image = ids == model.config.image_token_id
    embeddings = model.get_input_embeddings()(ids)
    embeddings[is_image] = features.to(embeddings.dtype)

    # No query sees a hidden key. (It sees itself, or softmax would have nothing to divide by.)
    seen = torch.ones_like(is_image)
    seen[is_image] = visible.to(ids.device)
    may_attend = seen & torch.ones(len(ids), len(ids), device=ids.device).tril().bool()
    may_attend.fill_diagonal_(True)
    # A mask of numbers that are added: of True and False "eager" attention would add 1 and 0.
    mask = torch.zeros(may_attend.shape, dtype=embeddings.dtype, device=ids.device)
    mask.masked_fill_(~may_attend, torch.finfo(mask.dtype).min)

    # Positions are those of the whole sequence: hidden tokens leave gaps, no text moves up.
    positions = torch.arange(len(ids), device=ids.device)
    inputs = {"inputs_embeds": embeddings[None], "position_ids": positions[None]}
    output = model(**inputs, attention_mask=mask[None, None], use_cache=False)  # (1, 1, T, T)
    return output.logits[0, -1].float()


def complete(model, ids, features, visible, stops, generator, config):
    """Go on from `ids` up to a token of `stops` or the length limit: the new ids."""
    new = []
    while len(new) < config.max_new_tokens and not (new and new[-1] in stops):
        logits = next_logits(model, ids + new, features, visible)
        logits[model.config.image_token_id] = -torch.inf
        probs = torch.softmax(logits.double().cpu() / (config.temperature or 1.0), dim=-1)
        drawn = torch.multinomial(probs, 1, generator=generator)
        new.append(int(drawn if config.temperature else probs.argmax()))
    return new


def cut(sentence, rng):
    """Alg. 1 l. 11-14: perhaps swap a leading Yes or No, then keep what is before a random word."""
    match = YES_NO.match(sentence)
    swapped = SWAP[match[1]] if match and rng.random() >= 0.5 else ""
    if swapped:
        sentence = swapped + sentence[match.end() :]
    words = [word.start() for word in re.finditer(r"\S+", sentence)]
    if swapped:
        words = words[1:] or [len(swapped)]  # what was swapped stays
    return sentence[: rng.choice(words)].rstrip()


@torch.no_grad()
def bdhs(model, tokenizer, features, question, chosen, similarity, seeds, config):
    """Algorithm 1 with a seed per iteration: (rejected response, iterations, phi).

    features: see `next_logits`. similarity: phi of two texts. config: the flags of `main`.
    """
    image, eos = model.config.image_token_id, tokenizer.eos_token_id
    full_stops = {i for piece, i in tokenizer.get_vocab().items() if piece.endswith(".")}
    for token in tokenizer.get_added_vocab():
        if token in question + chosen:
            raise SystemExit(f"{token} in a text would become a control token: take it out")

    def go_on(response, stops, visible, generator):
        """What the model adds to a response's beginning, and whether it came to an end."""
        # Prompt and response are tokenised as one text; a last space would be a token of its own.
        text = (config.template.format(question) + response).rstrip(" ")
        ids = tokenizer(text, add_special_tokens=False).input_ids
        place = ids.index(image)
        ids = ids[:place] + [image] * len(features) + ids[place + 1 :]
        new = complete(model, ids, features, visible, stops, generator, config)
        before, after = tokenizer.batch_decode([ids, ids + new], **DECODING)
        return after[len(before) :], new[-1] in stops

    for iteration, seed in enumerate(seeds, start=1):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        # Eq. 6: an image token is hidden with probability rho_th, for a whole iteration.
        visible = torch.rand(len(features), generator=generator) >= config.rho_th

        if iteration == len(seeds) > 1:
            text, ended = go_on("", {eos}, visible, generator)  # l. 5-7: unguided
        else:
            text, ended = "", True
            for found in re.finditer(r"\S.*?(?:[.!?]+(?=\s|$)|$)", chosen.rstrip(), re.DOTALL):
                # Eq. 7: what stands before a sentence is y+ itself, nothing sampled or swapped.
                kept, before = cut(found[0], rng), chosen[: found.start()]
                beginning = before + kept if kept else before.rstrip()
                tail, stopped = go_on(beginning, full_stops | {eos}, visible, generator)
                sentence = kept + (tail if kept else tail.lstrip())
                text += before[len(before.rstrip()) :] * bool(sentence) + sentence
                ended = ended and stopped

        # l. 17-19: what is too similar to y+, empty or cut short is sampled again.
        text = text.strip()
        phi = similarity(text, chosen)
        if phi < config.eps_s and text and ended:
            break
    return text, iteration, phi


def main():
    """Print a rejected response, the iterations that it took and phi."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "picture", "question", "chosen"):
        parser.add_argument(name)
    flags = {"rho-th": 0.99, "n-bdhs": 5, "eps-s": 0.97, "temperature": 1.0, "seed": 0}
    flags |= {"max-new-tokens": 128, "template": TEMPLATE, "encoder": "all-mpnet-base-v2"}
    for name, default in flags.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    config = parser.parse_args()
    from sentence_transformers import SentenceTransformer

    model = AutoModelForImageTextToText.from_pretrained(config.model, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    processor = AutoImageProcessor.from_pretrained(config.model)
    picture = processor(Image.open(config.picture).convert("RGB"), return_tensors="pt")
    features = model.get_image_features(**picture.to(model.dtype)).pooler_output[0].detach()
    encoder = SentenceTransformer(config.encoder)

    def similarity(*texts):
        return float(encoder.similarity(*encoder.encode(texts)))

    pair, seeds = (config.question, config.chosen), range(config.seed, config.seed + config.n_bdhs)
    print(*bdhs(model, tokenizer, features, *pair, similarity, seeds, config))


if __name__ == "__main__":
    main()
