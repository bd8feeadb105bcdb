"""Any modalities of a scene from any others, with a trained nano4M: one output after another, images in few steps,
texts token by token. script is the module of the training script that the model is of.
"""
import math

import torch


def generate_ar(script, model, layout, tokens, known, output, rng):
    """Fill a modality from left to right until every row has its end token; changes tokens and known."""
    given = known.clone()
    span = layout.span[output.modality]
    end = layout.end.get(output.modality)
    in_modality = layout.kind == layout.names.index(output.modality)
    places, is_unknown = script.gather_places(~known & in_modality)  # in order
    running = torch.ones(len(tokens), 1, dtype=torch.bool, device=tokens.device)  # no end token yet
    for i in range(places.size(1)):
        place = places[:, i:i + 1]
        running &= is_unknown[:, i:i + 1]
        ids, _ = script.draw_tokens(model, layout, tokens, known, place, output, rng)
        script.fill(tokens, known, place, ids, running)
        running &= ids != end
        if not bool(running.any()):
            break
    if end is not None:  # whatever follows the end token is padding
        part = tokens[:, span]
        is_end = (part == end).long()
        ended = is_end.cumsum(1) - is_end > 0
        ended = (ended | ~known[:, span]) & ~given[:, span]
        tokens[:, span] = part.masked_fill(ended, layout.modalities[output.modality]["pad"])
        known[:, span] = ~ended


def check_output(script, output, scheme):
    """Raises script.Fault for settings that nothing can be drawn with."""
    if scheme not in ("roar", "maskgit", "ar") or output.steps < 1:
        raise script.Fault(f"scheme {scheme!r}, {output.steps} steps: schemes are roar, maskgit and ar, steps at "
                           "least 1")
    if not 0 <= output.temperature < math.inf:
        raise script.Fault(f"a temperature of {output.temperature}: it is a number of at least 0")
    if output.top_k < 0:
        raise script.Fault(f"the {output.top_k} likeliest tokens: top_k is at least 0, which is all of them")
    if not 0 < output.top_p <= 1:
        raise script.Fault(f"the likeliest tokens with {output.top_p} of the probability: top_p is above 0, at most 1")


@torch.no_grad()
def generate(script, model, layout, tokens, known, outputs, seed=0):
    """Fill the modalities of outputs one after another; each result is an input of the next.

    tokens int64 (B, size), known bool (B, size): what is given, any places of each row. A given part of an output
    modality stays as it is. Returns new tokens and known. Raises script.Fault for a modality or setting there is not,
    or when a row has nothing known.
    """
    tokens, known = tokens.clone(), known.clone()
    if not bool(known.any(1).all()):
        raise script.Fault("generate needs at least one known token in every row")
    rng = torch.Generator(tokens.device).manual_seed(seed)
    for output in outputs:
        if output.modality not in layout.span:
            raise script.Fault(f"there is no modality {output.modality!r}; there are {', '.join(layout.span)}")
        scheme = output.scheme or ("ar" if output.modality in script.TEXTS else "maskgit")
        check_output(script, output, scheme)
        if scheme == "ar":
            generate_ar(script, model, layout, tokens, known, output, rng)
        else:
            script.generate_masked(model, layout, tokens, known, output, scheme, rng)
    return tokens, known


def only(layout, tokens, *names):
    """The mask (B, size) that knows exactly these modalities."""
    known = torch.zeros_like(tokens, dtype=torch.bool)
    for name in names:
        known[:, layout.span[name]] = layout.valid(tokens)[:, layout.span[name]]
    return known
