"""Speculative decoding (arXiv:2211.17192) for train_gpt.py --draft, and text that is printed while it is drawn.

A small model, the draft, guesses some tokens ahead, and the model checks them in one pass: the text follows the model's
own distribution exactly, and comes faster where the draft is often right.
"""
import codecs
import time

import torch

import checkpoints
from kv_cache import KVCache


def load_draft(script, path, config, meta, device):
    """The smaller model of --draft, whatever its Config was. script: train_gpt.py as a module."""
    weights, config = checkpoints.read_checkpoint(script, path, config)
    draft = script.GPT(config, meta).to(device).eval()
    checkpoints.load_weights(script, draft, weights, path)
    return draft


@torch.no_grad()
def speculate(script, model, draft, tokens, options, seed=0):
    """Continue tokens (1, T): yields chunks (1, n) of options.sample_tokens in all, distributed as generate's.

    The draft guesses options.ahead tokens. One drawn with probability q is kept with probability p / q, p the model's;
    where the first one falls, the model draws from what q left over of p.
    """
    model_cache, draft_cache = KVCache(), KVCache()
    rng = torch.Generator(tokens.device).manual_seed(seed)
    left = options.sample_tokens
    while left > 0:
        known, q = tokens.size(1), []
        for _ in range(options.ahead):
            logits = script.read_tokens(draft, tokens, draft_cache)[0, -1:]
            q.append(script.probabilities(logits, options))  # (1, V)
            tokens = torch.cat([tokens, torch.multinomial(q[-1], 1, generator=rng)], 1)
        q, guesses = torch.cat(q), tokens[0, known:, None]  # (ahead, V), (ahead, 1)
        logits = script.read_tokens(model, tokens, model_cache)[0, -1 - options.ahead:]
        p = script.probabilities(logits, options)  # (ahead + 1, V)
        chance = torch.rand(options.ahead, generator=rng, device=tokens.device)
        kept = chance < (p[:-1].gather(1, guesses) / q.gather(1, guesses))[:, 0]
        n = int(kept.long().cumprod(0).sum())
        residual = (p[n] - q[n]).clamp(min=0) if n < options.ahead else p[n]
        new = torch.multinomial(residual[None], 1, generator=rng)
        tokens = torch.cat([tokens[:, :known + n], new], 1)
        model_cache.truncate(known + n)
        draft_cache.truncate(known + n)
        yield tokens[:, known:][:, :left]
        left -= n + 1


def speak(chunks, decode):
    """Print the tokens of chunks (1, n) as they come: their ids, the number of chunks, tokens per second.

    decode: from a list of tokens to bytes, which may end in the middle of a character.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ids, count, start = [], 0, time.perf_counter()
    for chunk in chunks:
        new = chunk[0].tolist()
        ids, count = ids + new, count + 1
        print(decoder.decode(decode(new)), end="", flush=True)
    print()
    return ids, count, len(ids) / (time.perf_counter() - start)
