"""Pretrained backbones of the VLM: a SigLIP and a Llama of the Hugging Face hub, or of a folder in the hub's format.

train_vlm.py imports this for --vit= and --lm= alone: their sizes become its Config's, their weights its Vit's and
Llama's, and with --lm= texts are tokens of that model. With --lora= only the projector learns, and a narrow pair of
matrices beside each of attention's.
"""
import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrize
from torch.nn.utils.rnn import pad_sequence

import tokenizer
from text_codec import TextCodec

RENAMES = (("vision_model.", ""), ("model.", ""), ("embeddings.", ""), ("encoder.", ""), ("self_attn.", ""),
           ("mlp.", ""), ("out_proj", "o_proj"))  # from the hub's names to ours
SIGLIP = {"image_size": ("side", 224), "patch_size": ("patch", 16), "hidden_size": ("vit_dim", 768),
          "num_hidden_layers": ("vit_depth", 12), "num_attention_heads": ("vit_heads", 12),
          "intermediate_size": ("vit_mlp", 3072)}  # from its config.json to ours, and what it means to leave it out
LLAMA = {"hidden_size": "lm_dim", "num_hidden_layers": "lm_depth", "num_attention_heads": "lm_heads",
         "num_key_value_heads": "lm_kv_heads", "intermediate_size": "lm_mlp"}
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")  # that --lora= stands beside
CLIP, WARMUP = 1.0, 0.03  # norm of the gradient at most; share of the steps over which rates rise


class Lora(nn.Module):
    """A frozen matrix (out, in) plus the product of two narrow ones that learn (arXiv:2106.09685); at first the same."""

    def __init__(self, weight, rank):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.size(1), device=weight.device) * weight.size(1) ** -0.5)
        self.up = nn.Parameter(torch.zeros(weight.size(0), rank, device=weight.device))

    def forward(self, weight):
        return weight + self.up @ self.down


def add_lora(model, rank):
    """Freeze a VLM but its projector, and put a Lora of a rank beside the attention's matrices."""
    for name, module in list(model.named_modules()):
        if name.endswith(ADAPTED):
            parametrize.register_parametrization(module, "weight", Lora(module.weight, rank))
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("project") or name.endswith((".up", ".down")))


def merge_lora(model):
    """Make every Lora a part of its matrix: a checkpoint knows nothing of it."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")


class AdamW(torch.optim.AdamW):
    """AdamW that clips the gradients' norm and lets the rates rise over the first steps, as nanoVLM does it."""

    def __init__(self, groups, warmup):
        super().__init__(groups, fused=True)
        self.warmup = max(1, warmup)

    @torch.no_grad()
    def step(self):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        clip_grad_norm_(params, CLIP)
        for group in self.param_groups:
            group["taken"] = group.get("taken", 0) + 1  # in the group, so that a saved state has it
            group["lr"] *= min(1.0, group["taken"] / self.warmup)
        super().step()


def make_adamw(model, config):
    """AdamW at one rate for both backbones of a VLM and at another for the projector, as nanoVLM does it."""
    projector = list(model.project.parameters())
    backbones = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("project")]
    return AdamW([{"params": backbones, "peak": config.backbone_lr}, {"params": projector, "peak": config.projector_lr}],
                 round(WARMUP * config.num_steps))


class Backbones:
    """What --vit and --lm name: config, the Config in their shapes; vocab and codec of the language model.

    script is train_vlm as a module. Raises its Fault for what cannot be read or does not fit.
    """

    def __init__(self, script, config):
        self.script, self.config = script, dataclasses.replace(config)
        self.vocab, self.folders = None, {}
        if config.vit:
            about, self.folders["vit"] = self.fetch(config.vit)
            about = about.get("vision_config", about)
            for theirs, (ours, default) in SIGLIP.items():
                self.take("vit", ours, about.get(theirs, default))
        if config.lm:
            about, self.folders["lm"] = self.fetch(config.lm)
            self.read_llama(about)
        try:
            self.codec = TextCodec(self.folders.get("lm"))
        except (OSError, ValueError) as error:
            raise script.Fault(f"--lm={config.lm}: {error}") from None

    def fetch(self, name):
        """A model on the hub, or one on disk: (config.json as a dict, its folder)."""
        folder = self.script.ROOT / name
        try:
            if not folder.is_dir():
                from huggingface_hub import snapshot_download
                patterns = ["config.json", "tokenizer.json", "*.safetensors"]
                folder = Path(snapshot_download(name, allow_patterns=patterns))
            return json.loads((folder / "config.json").read_text()), folder
        except Exception as error:  # the hub raises many kinds
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise self.script.Fault(f"cannot read the model {name}: {reason}") from None

    def take(self, part, field, value):
        """Set a field of Config to what a backbone has. Raises the script's Fault where another value was asked for."""
        given, usual = getattr(self.config, field), getattr(self.script.CONFIGS[self.config.track], field)
        if given not in (usual, value):
            raise self.script.Fault(f"--{field}={given}: --{part}={getattr(self.config, part)} has {value}, leave it out")
        setattr(self.config, field, value)

    def read_llama(self, about):
        kind, name = about.get("model_type"), self.config.lm
        rope = about.get("rope_parameters") or {}  # where newer versions of transformers have rope_scaling
        scaled = about.get("rope_scaling") or rope.get("rope_type", "default") != "default"
        biased = about.get("attention_bias") or about.get("mlp_bias")
        if kind != "llama" or scaled or biased or not about.get("tie_word_embeddings"):
            raise self.script.Fault(f"--lm={name} is a {kind}: only plain Llamas with tied embeddings load, without "
                                    "scaled positions or biases")
        try:
            for theirs, ours in LLAMA.items():
                self.take("lm", ours, about[theirs])
            self.config.rope_theta = about.get("rope_theta") or about["rope_parameters"]["rope_theta"]
            self.vocab = about["vocab_size"]
        except KeyError as error:
            raise self.script.Fault(f"--lm={name} has a config.json without {error}") from None

    def load(self, model):
        """Fill a VLM's vit and lm with the pretrained weights there are."""
        for part, folder in self.folders.items():
            self.load_part(getattr(model, part), folder)

    def load_part(self, module, folder):
        """Fill a Vit or a Llama: all our weights must be present; extra ones are ignored."""
        state = {}
        for path in sorted(folder.glob("*.safetensors")):
            for key, value in load_file(path).items():
                if key.startswith("text_model."):  # SigLIP's other half
                    continue
                for theirs, ours in RENAMES:
                    key = key.replace(theirs, ours)
                state[key] = value.float()
        wanted = module.state_dict()
        if missing := [key for key, p in wanted.items() if key not in state or state[key].shape != p.shape]:
            raise self.script.Fault(f"{folder} has no weight that fits {missing[0]}: is it a model of the right kind?")
        module.load_state_dict({key: state[key] for key in wanted})

    def convert(self, tokens, answer):
        """Rows (N, L) of our tokens and answer marks in the other model's tokens, of the length that takes."""
        new_tokens, new_answer = [], []
        for ids, marks in zip(tokens.tolist(), answer.tolist()):
            if tokenizer.TEXT_VOCAB - 1 in ids:
                ids = ids[:ids.index(tokenizer.TEXT_VOCAB - 1)]
            row, row_marks, start = [], [], 0
            while start < len(ids):
                stop = next((i for i in range(start, len(ids)) if marks[i] != marks[start]), len(ids))
                part = self.codec.encode(self.codec.decode_ours(ids[start:stop]))
                row += part
                row_marks += [marks[start]] * len(part)
                start = stop
            new_tokens.append(torch.tensor(row, dtype=torch.long))
            new_answer.append(torch.tensor(row_marks, dtype=torch.uint8))
        padded = pad_sequence(new_tokens, batch_first=True, padding_value=self.script.PAD)
        return padded, pad_sequence(new_answer, batch_first=True)
