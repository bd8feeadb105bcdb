"""Classifier-free guidance by several conditions at once (composable diffusion, arXiv:2206.01714, for masked models)."""
import torch


class Guided:
    """A nano4M that predicts u + sum of w_i (c_i - u), log-probabilities up to a constant.

    u sees what is known of the output modality alone, c_i besides that the modalities of its condition; a negative
    weight leads away from what they say. While nothing of the output is known there is no u: it is the mean of c_i,
    each as weighty as its positive weight. conditions: [(modalities, weight)].
    """

    def __init__(self, model, layout, output, conditions):
        self.model, self.layout, self.output, self.conditions = model, layout, output, conditions

    def __call__(self, tokens, enc_pos, visible, dec_pos, counted=None):
        kind = self.layout.kind[enc_pos]

        def given(modalities):
            names = torch.tensor([self.layout.names.index(m) for m in (self.output, *modalities)], device=kind.device)
            return self.model(tokens, enc_pos, visible & torch.isin(kind, names), dec_pos, counted)

        parts = [(given(modalities), weight) for modalities, weight in self.conditions]
        own = visible & (kind == self.layout.names.index(self.output))
        if not bool(own.any(1).all()):
            sizes = torch.tensor([max(weight, 0.0) for _, weight in parts])
            sizes = sizes / sizes.sum() if sizes.any() else torch.full_like(sizes, 1 / len(sizes))
            return sum(size * c for size, (c, _) in zip(sizes.tolist(), parts))
        base = given(())
        return base + sum(weight * (c - base) for c, weight in parts)
