"""What a nano4M makes of validation scenes it has never seen: a sheet with the truth beside it, and quality numbers."""
import torch
import torch.nn.functional as F
from tqdm import tqdm

import draw
import studio as metrics

CHAIN_STEPS, SHEET_SCENES = 8, 8


class Show:
    """Opened before the clock starts: the tokenizer, the text encoding; tokens (B, size) are validation scenes."""

    def __init__(self, script, run, layout, tokens):
        self.script, self.layout, self.device = script, layout, run.device
        self.studio = metrics.Studio(run.device)
        self.tokens, self.quality_scenes = tokens.to(run.device), run.options.quality_scenes
        self.size = 8 * int(layout.modalities["rgb"]["length"] ** 0.5)

    def show(self, model, folder):
        with tqdm(total=8 if self.quality_scenes else 4, desc="samples", unit="task", dynamic_ncols=True) as bar:
            self.bar = bar
            numbers = self.quality(model) if self.quality_scenes else {}
            self.sheet(model, folder / "4m.png")
        return numbers

    def generate(self, model, tokens, known, outputs):
        """New tokens (B, size); one task of the bar."""
        self.bar.set_postfix_str(f"{' > '.join(output.modality for output in outputs)} of {len(tokens)} scenes")
        made, _ = self.script.generate(model, self.layout, tokens, known, outputs)
        self.bar.update()
        return made

    def only(self, tokens, modality):
        return self.script.only(self.layout, tokens, modality)

    def pictures(self, tokens, modality):
        return self.studio.pictures(tokens[:, self.layout.span[modality]])

    def texts(self, tokens, modality):
        return self.studio.texts(tokens[:, self.layout.span[modality]])

    def quality(self, model):
        """Interpretable metrics on validation scenes, against their true renderings."""
        Output, tokens = self.script.Output, self.tokens[:self.quality_scenes]
        true = self.studio.truth(self.size, len(tokens))
        rgb, desc = self.only(tokens, "rgb"), self.only(tokens, "desc")
        depth = self.generate(model, tokens, rgb, [Output("depth", steps=CHAIN_STEPS, temperature=0.3)])
        normal = self.generate(model, tokens, rgb, [Output("normal", steps=CHAIN_STEPS, temperature=0.3)])
        said = self.generate(model, tokens, rgb, [Output("desc", temperature=0)])
        drawn = self.generate(model, tokens, desc, [Output("rgb", "roar", steps=16, temperature=0.5)])
        numbers = {
            "rgb_to_depth_l1": metrics.standardised_l1(self.pictures(depth, "depth"), true["depth"]),
            "rgb_to_normal_degrees": metrics.mean_angle(self.pictures(normal, "normal"), true["normal"]),
            "rgb_to_desc_f1": metrics.attribute_f1(self.texts(said, "desc"), self.texts(tokens, "desc")),
            "desc_to_rgb_l1": (self.pictures(drawn, "rgb") - true["rgb"]).abs().mean().item()}
        return {name: round(value, 4) for name, value in numbers.items()}

    def sheet(self, model, path):
        """The labelled grid: what the model makes of eight validation scenes, the truth beside it."""
        tokens = self.tokens[:SHEET_SCENES]
        true = self.studio.truth(self.size, len(tokens))
        rows = ["rgb in  >  depth, normal, seg, edge, desc out (chained)", *self.from_rgb(model, tokens[:4], true),
                "desc in  >  rgb, depth, normal out (chained)", *self.from_desc(model, tokens, true),
                "caption in  >  rgb out (four draws)", *self.from_caption(model, tokens, true),
                "half of rgb in  >  the whole rgb out (four draws)", *self.from_half(model, tokens, true)]
        draw.sheet(rows, path)

    def from_rgb(self, model, tokens, true):
        Output, images = self.script.Output, self.script.IMAGES[1:]
        chain = [*(Output(m, temperature=0.4) for m in images), Output("desc", temperature=0)]
        out = self.generate(model, tokens, self.only(tokens, "rgb"), chain)
        made, rows = {m: self.pictures(out, m) for m in images}, []
        for b, (said, meant) in enumerate(zip(self.texts(out, "desc"), self.texts(tokens, "desc"))):
            rows.append([(true["rgb"][b], "input"), *((made[m][b], m) for m in made), said])
            rows.append([None, *((true[m][b], f"true {m}") for m in made), "TRUE: " + meant])
        return rows

    def from_desc(self, model, tokens, true, scenes=slice(4, 7)):
        Output, some = self.script.Output, tokens[scenes]
        chain = [Output("rgb", "roar", steps=24, temperature=0.7, guidance=2.0), Output("depth", temperature=0.4),
                 Output("normal", temperature=0.4)]
        out = self.generate(model, some, self.only(some, "desc"), chain)
        made = {m: self.pictures(out, m) for m in ("rgb", "depth", "normal")}
        return [[*((made[m][b], m) for m in made), *((true[m][scenes][b], f"true {m}") for m in made), text]
                for b, text in enumerate(self.texts(some, "desc"))]

    def from_caption(self, model, tokens, true, scenes=(7, 1)):
        output = self.script.Output("rgb", "roar", steps=24, temperature=0.7, guidance=2.0)
        same = tokens[list(scenes)].repeat_interleave(4, 0)
        made = self.pictures(self.generate(model, same, self.only(same, "caption"), [output]), "rgb")
        texts = self.texts(tokens[list(scenes)], "caption")
        return [[*((picture, "rgb") for picture in draws), (true["rgb"][b], "true rgb"), None, text]
                for b, draws, text in zip(scenes, made.split(4), texts)]

    def from_half(self, model, tokens, true, scenes=(2, 5)):
        span, side = self.layout.span["rgb"], self.size // 8
        rng = torch.Generator(tokens.device).manual_seed(0)
        hidden = torch.rand(side * side, generator=rng, device=tokens.device).argsort() < side * side // 2
        cover = F.interpolate(hidden.view(1, 1, side, side).float(), scale_factor=8)[0].cpu()
        same = tokens[list(scenes)].repeat_interleave(4, 0)
        known = self.only(same, "rgb")
        known[:, span] &= ~hidden
        output = self.script.Output("rgb", steps=12, temperature=0.6)
        made = self.pictures(self.generate(model, same, known, [output]), "rgb")
        return [[(true["rgb"][b] * (1 - cover) + 0.15 * cover, "input"), *((picture, "rgb") for picture in draws),
                 (true["rgb"][b], "true rgb")] for b, draws in zip(scenes, made.split(4))]
