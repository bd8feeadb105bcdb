"""What a nano4M makes of validation scenes it has never seen: a sheet with the truth beside it, and quality numbers."""
import torch
import torch.nn.functional as F
from tqdm import tqdm

import draw
import generate_4m
import judge as judges
import show_course
import show_more
import studio as metrics
import tokenizer
from texts import parse_desc

CHAIN_STEPS, SHEET_SCENES = 8, 8
DRAWING = {"modality": "rgb", "scheme": "roar", "steps": 16, "temperature": 0.5}  # how a text becomes a picture
PART = 100  # scenes generated at once: 1,000 would take 5 GB
TRUTH_SCENES = 250  # that depth and normals are measured on, over all their pixels


def open_show(script, run, layout, tokens):
    """What shows a model of our scenes, or of data with other picture tokens."""
    kind = Show
    if layout.modalities["rgb"]["vocab"] != tokenizer.VOCAB:
        kind = show_course.TextShow
    return kind(script, run, layout, tokens)


class Show:
    """Opened before the clock starts: tokenizer, text encoding, judge; tokens (B, size) are validation scenes."""

    def __init__(self, script, run, layout, tokens):
        self.script, self.layout, self.device = script, layout, run.device
        self.studio, self.judge = metrics.Studio(run.device), judges.load(run.device)
        self.tokens, self.quality_scenes = tokens.to(run.device), run.options.quality_scenes
        self.drawing = script.Output(**DRAWING)
        self.size = 8 * int(layout.modalities["rgb"]["length"] ** 0.5)

    def show(self, model, folder):
        with tqdm(total=9 if self.quality_scenes else 4, desc="samples", unit="task", dynamic_ncols=True) as bar:
            self.bar = bar
            numbers = self.quality(model) if self.quality_scenes else {}
            self.sheet(model, folder / "4m.png")
        return numbers

    def generate(self, model, tokens, known, outputs):
        """New tokens (B, size); one task of the bar."""
        self.bar.set_postfix_str(f"{' > '.join(output.modality for output in outputs)} of {len(tokens)} scenes")
        parts = enumerate(zip(tokens.split(PART), known.split(PART)))
        made = [generate_4m.generate(self.script, model, self.layout, *part, outputs, seed=i)[0] for i, part in parts]
        self.bar.update()
        return torch.cat(made)

    def only(self, tokens, *modalities):
        return generate_4m.only(self.layout, tokens, *modalities)

    def pictures(self, tokens, modality):
        return self.studio.pictures(tokens[:, self.layout.span[modality]])

    def texts(self, tokens, modality):
        return self.studio.texts(tokens[:, self.layout.span[modality]])

    def described(self, tokens):
        """The objects of each description: lists of dicts."""
        return [parse_desc(text) for text in self.texts(tokens, "desc")]

    def judged(self, pictures):
        """The objects that the judge sees in each picture; of 128 pixels it is shown 64."""
        return self.judge.read(F.avg_pool2d(pictures, pictures.size(-1) // judges.SIDE))

    def labels(self, f1_of, pictures, tokens):
        """What is written over generated pictures: how much of their scenes the judge sees in them."""
        seen, meant = self.judged(pictures), self.described(tokens)
        return [f"rgb, judged F1: {f1_of([a], [b]):.2f}" for a, b in zip(seen, meant)]

    def quality(self, model):
        """Interpretable metrics on validation scenes: against true renderings, or what was asked for."""
        Output, tokens = self.script.Output, self.tokens[:self.quality_scenes]
        few = tokens[:TRUTH_SCENES]
        true = self.studio.truth(self.size, len(few))
        shown = self.only(tokens, "rgb")
        depth = self.generate(model, few, shown[:len(few)], [Output("depth", steps=CHAIN_STEPS, temperature=0.3)])
        normal = self.generate(model, few, shown[:len(few)], [Output("normal", steps=CHAIN_STEPS, temperature=0.3)])
        told = self.described(self.generate(model, tokens, shown, [Output("desc", temperature=0)]))
        from_desc = self.pictures(self.generate(model, tokens, self.only(tokens, "desc"), [self.drawing]), "rgb")
        from_caption = self.pictures(self.generate(model, tokens, self.only(tokens, "caption"), [self.drawing]), "rgb")
        meant = self.described(tokens)
        numbers = {
            "depth_l1": metrics.standardised_l1(self.pictures(depth, "depth"), true["depth"]),
            "normal_degrees": metrics.mean_angle(self.pictures(normal, "normal"), true["normal"]),
            "desc_f1": judges.attribute_f1(told, meant), "desc_object_f1": judges.object_f1(told, meant),
            "rgb_from_desc_f1": judges.object_f1(self.judged(from_desc), meant),
            "rgb_from_caption_f1": judges.caption_f1(self.judged(from_caption), meant),
            "fidelity": self.judge.fidelity(F.avg_pool2d(from_desc, self.size // judges.SIDE), meant),
            **show_more.measure(self, model)}
        return {f"quality_{name}": round(value, 4) for name, value in numbers.items()}

    def glimpse(self, model):
        """Cells of a sheet: what it draws from the descriptions of eight validation scenes."""
        tokens = self.tokens[:SHEET_SCENES]
        drawn = self.generate(model, tokens, self.only(tokens, "desc"), [self.drawing])
        made = self.pictures(drawn, "rgb")
        return list(zip(made, self.labels(judges.object_f1, made, tokens)))

    def sheet(self, model, path):
        """The labelled grid: what the model makes of eight validation scenes, the truth beside it."""
        tokens = self.tokens[:SHEET_SCENES]
        true = self.studio.truth(self.size, len(tokens))
        rows = ["rgb in  >  desc, depth, normal, seg, edge out (chained)", *self.from_rgb(model, tokens[:4], true),
                "desc in  >  rgb, depth, normal out (chained)", *self.from_desc(model, tokens, true),
                "caption in  >  desc, rgb out (chained, four draws)", *self.from_caption(model, tokens, true),
                "half of rgb in  >  the whole rgb out (four draws)", *self.from_half(model, tokens, true)]
        draw.sheet(rows, path)

    def from_rgb(self, model, tokens, true):
        Output, images = self.script.Output, ("depth", "normal", "seg", "edge")
        chain = [Output("desc", temperature=0), *(Output(m, temperature=0.4) for m in images)]
        out = self.generate(model, tokens, self.only(tokens, "rgb"), chain)
        made, rows = {m: self.pictures(out, m) for m in images}, []
        for b, (said, meant) in enumerate(zip(self.texts(out, "desc"), self.texts(tokens, "desc"))):
            f1 = judges.object_f1([parse_desc(said)], [parse_desc(meant)])
            rows.append([(true["rgb"][b], "input"), *((made[m][b], m) for m in made), f"{said}\nobject F1: {f1:.2f}"])
            rows.append([None, *((true[m][b], f"true {m}") for m in made), "TRUE: " + meant])
        return rows

    def from_desc(self, model, tokens, true, scenes=slice(4, 7)):
        Output, some = self.script.Output, tokens[scenes]
        chain = [self.drawing, Output("depth", temperature=0.4), Output("normal", temperature=0.4)]
        out = self.generate(model, some, self.only(some, "desc"), chain)
        made = {m: self.pictures(out, m) for m in ("rgb", "depth", "normal")}
        labels = self.labels(judges.object_f1, made["rgb"], some)
        return [[(made["rgb"][b], labels[b]), *((made[m][b], m) for m in ("depth", "normal")),
                 *((true[m][scenes][b], f"true {m}") for m in made), text]
                for b, text in enumerate(self.texts(some, "desc"))]

    def from_caption(self, model, tokens, true, scenes=(7, 1)):
        chain = [self.script.Output("desc", temperature=0.5), self.drawing]
        same = tokens[list(scenes)].repeat_interleave(4, 0)
        made = self.pictures(self.generate(model, same, self.only(same, "caption"), chain), "rgb")
        labels = self.labels(judges.caption_f1, made, same)
        texts = self.texts(tokens[list(scenes)], "caption")
        return [[*zip(made[4 * i:], labels[4 * i:4 * i + 4]), (true["rgb"][b], "true rgb"), None, text]
                for i, (b, text) in enumerate(zip(scenes, texts))]

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
        labels = self.labels(judges.object_f1, made, same)
        return [[(true["rgb"][b] * (1 - cover) + 0.15 * cover, "input"), *zip(made[4 * i:], labels[4 * i:4 * i + 4]),
                 (true["rgb"][b], "true rgb")] for i, b in enumerate(scenes)]
