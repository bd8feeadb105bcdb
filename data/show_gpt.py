"""What a GPT makes of a prompt: text, printed as it comes; of labels, in a stream of pictures: a sheet."""
import dataclasses

import torch
from tqdm import tqdm

import speculate
import streams

PICTURE_TOKENS = {"scenes": 64, "patches2": 49}  # of a picture, by the encoding of a stream of pictures
PER_LABEL, PER_ROW = 4, 8


class Show:
    """Opened before the clock starts: the encoding and the prompt in it, the draft; or the tokenizer of pictures."""

    def __init__(self, script, run, meta):
        self.script, self.options, self.meta, self.device = script, run.options, meta, run.device
        self.is_pictures, self.draft = meta["encoding"] in PICTURE_TOKENS, None
        try:
            if self.is_pictures:
                import studio
                self.studio = studio.Studio(run.device, meta["encoding"])
                self.labels = torch.arange(meta["document_start"], meta["vocab"], device=run.device)
            else:
                encode, self.decode = streams.codec(meta)
                self.prompt = encode(run.options.prompt or "\n")
        except UnicodeError:
            raise script.Fault(f"--prompt={ascii(run.options.prompt)} is not text") from None
        except Exception as error:  # tiktoken fetches GPT-2's merges, with errors of several libraries
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise script.Fault(f"the encoding {meta['encoding']!r} of samples cannot be opened ({reason})") from None
        if not self.is_pictures and max(self.prompt) >= meta["vocab"]:
            raise script.Fault(f"--prompt={run.options.prompt} has characters that {run.config.data} does not")
        if run.options.draft and not self.is_pictures:
            self.draft = speculate.load_draft(script, run.options.draft, run.config, meta, run.device)

    def show(self, model, folder):
        with torch.autocast(self.device.type, enabled=False):  # casting all weights for one token takes longer
            if self.is_pictures:
                self.sheet(model, folder / "gpt.png")
                return {}
            return self.text(model, folder / "gpt.txt")

    def text(self, model, path):
        """Continue the prompt on the terminal and in a file: tokens per second, of the draft as well."""
        start = torch.tensor([self.prompt], device=self.device)
        ids, _, speed = speculate.speak(self.script.generate(model, start, self.options), self.decode)
        path.write_bytes(self.decode(self.prompt + ids))
        numbers = {"sampled_per_second": round(speed, 1)}
        if self.draft:
            chunks = speculate.speculate(self.script, model, self.draft, start, self.options)
            ids, checks, speed = speculate.speak(chunks, self.decode)
            numbers["speculated_per_second"] = round(speed, 1)
            numbers["tokens_per_check"] = round(len(ids) / checks, 2)
        return numbers

    def sheet(self, model, path):
        """Pictures of every label, four each."""
        import draw
        length = PICTURE_TOKENS[self.meta["encoding"]]
        options = dataclasses.replace(self.options, sample_tokens=length)
        tokens = self.script.generate(model, self.labels.repeat_interleave(PER_LABEL)[:, None], options)
        bar = tqdm(tokens, total=length, desc="samples", unit="token", dynamic_ncols=True)
        drawn = torch.cat(list(bar), 1).clamp(max=self.meta["document_start"] - 1)
        pictures = list(self.studio.pictures(drawn))
        draw.sheet([pictures[i:i + PER_ROW] for i in range(0, len(pictures), PER_ROW)], path)
