"""Keys and values of the tokens that a GPT or a VLM has read, so that what it says is computed token by token."""
import functools

import torch


class KVCache:
    """For generate of train_gpt.py and train_vlm.py: every token is computed once."""

    def __init__(self):
        self.length = 0  # tokens read
        self.blocks = {}  # keys and values (B, H, length, D) of each block

    def append(self, layer, k, v):
        """Add keys and values (B, H, T, D) of new tokens to those of a block: all there are."""
        if layer in self.blocks:
            past_k, past_v = self.blocks[layer]
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        self.blocks[layer] = k, v
        self.length = k.size(2)
        return k, v

    def appends(self, num):
        """What each of `num` blocks is given for append."""
        return [functools.partial(self.append, layer) for layer in range(num)]

    def truncate(self, length):
        """Go back to where only the first `length` tokens were read."""
        self.length = min(self.length, length)
        self.blocks = {layer: (k[:, :, :length], v[:, :, :length]) for layer, (k, v) in self.blocks.items()}
