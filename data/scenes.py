"""The scenes sets: what the training scripts train on, made from the procedural world of world.py.

data/raycaster.py renders rgb, depth, normal, seg and edge; desc, caption and bbox are written by data/texts.py from the
scene itself, questions and answers by data/questions.py. Image-like modalities are stored as tokens of
data/tokenizer.py (with questions: as pixels), texts as tokens of its encodings, speech and sound as tokens of
data/codec.py.

    python data/scenes.py                            # 20,000 training scenes at 64 px -> data/scenes64/train
    python data/scenes.py --size=128                 # the gpu tracks' 200,000 -> data/scenes128/train
    python data/scenes.py --objects [--size=128]     # as many with one object and its label -> data/objects64, data/scenes
    python data/scenes.py --qa                       # the first set's scenes, pixels and questions -> data/qa64
    python data/scenes.py --qa --num=200000          # as many as the gpu track trains on -> data/qa64-large
    python data/scenes.py --audio                    # the first set's captions read aloud, and impacts -> data/audio64
    python data/scenes.py --rich                     # the first set's instances, outlines, poses .. -> data/rich64
    python data/scenes.py --fine                     # the first set's pictures at 128 px -> data/fine64
    python data/scenes.py --course=DIR [--num=20000] # scenes at 128 px as the folder that EPFL's course COM-304 reads
    python data/scenes.py [--objects|--qa|--audio|..] --check    # whether a set is what this machine would make
    python data/scenes.py [--objects|--qa|--audio|..] --preview  # a sheet -> samples/<kind>.png, or WAV files
    python data/scenes.py [--objects|--qa|--audio|..] --frozen   # remake data/frozen/<kind><size>.npz (maintainers)
"""
import argparse
import contextlib
import functools
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import features
import pool
import previews
import questions
import rich
import shards
import streams
import tokenizer
from mel import LENGTHS as HEARD
from raycaster import COLORS, MAX_OBJECTS, render
from shards import ROOT, Fault, sha256
from speech import VOICES
from texts import BBOX_PAD, BBOX_VOCAB, LENGTHS, box_tokens, caption, describe, facts
from world import CLASSES, FIELDS, build, look, sample_close_ups, sample_scenes

VERSION = 2  # of everything that decides the content of a scene; raise it and every frozen number is void
IMAGES = ("rgb", "depth", "normal", "seg", "edge")
FINE = ("rgb", "depth", "normal", "seg")  # what the fine set has with twice as many pixels across
LARGE = 200000  # training scenes of the gpu tracks
CHUNK = 1000  # scenes made between two points of resumption, from a seed of their own
PART = 250  # scenes whose pictures are in memory at once
NO_INDEX = torch.zeros(1, 1, 1, dtype=torch.long)  # an object index for who has no use for boxes
GPU_WORKERS = 8  # processes that share a GPU: it draws faster than one of them writes texts
CHECKED, CHECKED_CHUNKS = 200, 4  # scenes that --check draws again, and from how many chunks
SAME_TOKENS, SAME_PIXELS = 0.995, 0.999  # shares of a picture's tokens and bytes that are the same on any machine
VALIDATION, VALIDATION_SEED = 2000, 1 << 52  # scenes, and a seed beyond all that training sets have


def stop(message):
    sys.exit(f"scenes.py: {message}")


# ------------------------------------------------------------------------------------------------------------
# From scenes to arrays

def modalities(size, kind="scenes"):
    """Length, vocabulary and pad id (-1: none) of each modality of a kind of shards at this size."""
    image = {"length": (size // 8) ** 2, "vocab": tokenizer.VOCAB, "pad": -1}
    text = {"vocab": tokenizer.TEXT_VOCAB, "pad": tokenizer.TEXT_VOCAB - 1}
    if kind == "objects":
        return {"label": {"length": 1, "vocab": len(CLASSES), "pad": -1}, "rgb": image}
    if kind == "qa":
        return {"qa": {"length": LENGTHS["qa"], **text}}
    if kind == "audio":  # the silence after it is told by tokens too
        codes = {m: {"length": length, "vocab": tokenizer.VOCAB, "pad": -1} for m, length in HEARD.items()}
        return {**codes, "timing": {"length": LENGTHS["caption"], "vocab": 3 + HEARD["speech"], "pad": 0, "end": 1},
                "voice": {"length": 1, "vocab": len(VOICES), "pad": -1, "end": -1}}
    if kind == "rich":
        return rich.modalities(size)
    if kind == "fine":
        return {f"fine_{m}": {**image, "length": 4 * image["length"]} for m in FINE}
    places = tokenizer.place_tokens(tokenizer.load_text())
    return {**{m: image for m in IMAGES}, "desc": {"length": LENGTHS["desc"], **text, "places": places},
            "caption": {"length": LENGTHS["caption"], **text},
            "bbox": {"length": LENGTHS["bbox"], "vocab": BBOX_VOCAB, "pad": BBOX_PAD}}


def array_forms(size, kind):
    """{array: (shape per scene, dtype)} of a set: its modalities, and what else is about every scene."""
    forms = {m: ((about["length"],), np.uint16) for m, about in modalities(size, kind).items()}
    forms["scene"] = (len(FIELDS) * (1 if kind == "objects" else MAX_OBJECTS),), np.int32
    if kind == "objects":
        forms[f"pixels{size // 2}"] = (3, size // 2, size // 2), np.uint8
    if kind == "qa":
        forms |= {"pixels": ((3, size, size), np.uint8), "answer": ((LENGTHS["qa"],), np.uint8),
                  "family": ((questions.MOST + 1,), np.uint8)}
    return forms


def rendered(codes, size, device, report):
    """Scenes, pictures and object index as `render` gives them, of PART codes after another; report(n) after each."""
    for part in codes.split(PART):
        scenes = {name: value.to(device) for name, value in build(part).items()}
        yield scenes, *render(scenes, size)
        report(len(part))


def ignore(count):
    """For who does not want to hear of progress."""


def as_bytes(pictures):
    return (pictures * 255).round().byte().cpu().numpy()


def joined(parts):
    """One dict of arrays from those of consecutive scenes."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def draw(kind, codes, size, device, coder, report=ignore):
    """The arrays of scenes that are made from pictures: tokens, bytes of pixels, boxes."""
    parts = []
    for scenes, images, index in rendered(codes, 2 * size if kind == "fine" else size, device, report):
        if kind == "scenes":
            boxes = np.array([box_tokens(objects, size) for objects in facts(scenes, index)], np.uint16)
            parts.append({**{m: coder.encode_flat(images[m]) for m in IMAGES}, "bbox": boxes})
        elif kind == "objects":
            half = as_bytes(F.avg_pool2d(images["rgb"], 2))
            parts.append({"rgb": coder.encode_flat(images["rgb"]), f"pixels{size // 2}": half})
        elif kind == "rich":
            parts.append(rich.drawn(scenes, images, index, coder))
        elif kind == "fine":
            parts.append({f"fine_{m}": coder.encode_flat(images[m]) for m in FINE})
        else:
            parts.append({"pixels": as_bytes(images["rgb"])})
    return joined(parts)


def write(kind, codes, seed, encoding, describe_first):
    """The arrays of scenes that follow from their codes alone, whatever the machine, and {desc, caption: list of str}.

    With questions: qa tokens; answer (n, length) uint8, 1 to 5 where that turn's answer is; family (n, 5) uint8, of
    questions.FAMILIES counted from 1 on, 0: no such turn.
    """
    arrays, rng = {"scene": codes.numpy().astype(np.int32)}, random.Random(seed)
    if kind == "objects":
        fields = dict(zip(FIELDS, codes.unbind(1)))
        label = fields["shape"] * len(COLORS) + fields["color"]
        return {**arrays, "label": label[:, None].numpy().astype(np.uint16)}, {}
    if kind == "rich":
        return {**arrays, "pose": rich.pose_tokens(build(codes, torch.double)).numpy().astype(np.uint16)}, {}
    if kind == "fine":
        return arrays, {}
    objects = facts(build(codes), NO_INDEX.expand(len(codes), 1, 1))
    if kind == "audio":
        return arrays, {"caption": [caption(o, rng) for o in objects]}
    if kind == "scenes":
        texts = {"desc": [describe(o) for o in objects], "caption": [caption(o, rng) for o in objects]}
        for m, lines in texts.items():
            arrays[m] = np.array([tokenizer.text_tokens(encoding, text, LENGTHS[m]) for text in lines], np.uint16)
        return arrays, texts
    dialogues = questions.ask(objects, rng, describe_first)
    tokens, marks = zip(*(questions.encode(encoding, turns, LENGTHS["qa"]) for turns in dialogues))
    families = [[family for family, _, _ in turns] + [0] * (questions.MOST + 1 - len(turns)) for turns in dialogues]
    arrays |= {"qa": np.array(tokens, np.uint16), "answer": np.array(marks, np.uint8)}
    return {**arrays, "family": np.array(families, np.uint8)}, {}


def hear(codes, captions, seed, coder, rows=None, report=ignore):
    """The arrays of scenes that are heard, see codec.heard_arrays. rows: of which scenes alone; default: all."""
    import codec  # here, as no other kind of set takes it
    objects = facts(build(codes), NO_INDEX.expand(len(codes), 1, 1))
    return codec.heard_arrays(coder, objects, captions, seed, rows, report)


@functools.cache  # a worker process loads them once
def load_coders(kind, device):
    """The tokenizer of pictures, or of sounds, and the encoding of a kind of set."""
    if kind == "audio":
        import codec
        return codec.load(), None
    return tokenizer.load_tokenizer(device), tokenizer.load_text(tokenizer.QA if kind == "qa" else tokenizer.TEXT)


def sample(kind, n, seed, avoid=()):
    """Codes of n random scenes of a kind of set. avoid: looks to leave out; close-ups have too many to meet twice."""
    return sample_close_ups(n, seed) if kind == "objects" else sample_scenes(n, seed, avoid)


def make(kind, n, size, seed, device, report=ignore, avoid=(), describe_first=questions.DESCRIBE_FIRST):
    """n scenes of a kind of set: ({array: (n, ...)}, {desc, caption: list of str}). The scenes of the qa, audio,
    rich and fine sets are the scenes set's.

    Arrays are made from the scenes alone, each with randomness of its own: a new one changes none that exists.
    """
    coder, encoding = load_coders(kind, device)
    codes = sample(kind, n, seed, avoid)
    arrays, texts = write(kind, codes, seed, encoding, describe_first)
    if kind == "audio":
        return {**arrays, **hear(codes, texts["caption"], seed, coder, report=report)}, texts
    return {**arrays, **draw(kind, codes, size, device, coder, report)}, texts


# ------------------------------------------------------------------------------------------------------------
# Sets

def set_name(size, num, kind):
    """A set's folder below data/. Both tracks ask about pictures of 64 px: the gpu track's has a folder of its own."""
    large = kind == "qa" and size < 128 and num >= LARGE
    return f"{kind}{size}-large" if large else f"{kind}{size}"


def identity_of(size, num, seed, kind):
    """What decides the content of a training set."""
    identity = {"name": set_name(size, num, kind), "version": VERSION, "size": size, "num": num, "seed": seed}
    if kind == "qa":
        return {**identity, "questions": questions.VERSION, "text": sha256(tokenizer.QA)}
    if kind == "audio":
        import codec
        return {**identity, "sounds": codec.VERSION, "codec": sha256(codec.WEIGHTS)}
    if kind == "fine":
        return {**identity, "tokenizer": sha256(tokenizer.WEIGHTS)}
    if kind == "rich":
        return {**identity, "rich": rich.VERSION, "tokenizer": sha256(tokenizer.WEIGHTS),
                "features": sha256(features.WEIGHTS)}
    return {**identity, "tokenizer": sha256(tokenizer.WEIGHTS), "text": sha256(tokenizer.TEXT)}


def open_arrays(part, identity, kind):
    """The arrays of a set in the making, memory maps by name, and how many rows of them an earlier run has made."""
    state, forms = part / "state.json", array_forms(identity["size"], kind)
    if state.exists():
        found = json.loads(state.read_text())
        if found["identity"] == identity:
            return {m: np.lib.format.open_memmap(part / f"{m}.npy", "r+") for m in forms}, found["done"]
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    arrays = {m: np.lib.format.open_memmap(part / f"{m}.npy", "w+", dtype, (identity["num"], *shape))
              for m, (shape, dtype) in forms.items()}
    return arrays, 0


def make_chunk(job, report, kind, size, device, more):
    """The arrays of one chunk. job: its number of scenes and its seed."""
    n, seed = job
    torch.set_num_threads(1)
    return make(kind, n, size, seed, device, report=report, **more)[0]


@functools.cache
def looks_of_validation():
    with np.load(shards.FROZEN / "scenes64.npz") as arrays:
        return look(arrays["scene"])


def validation_looks(kind):
    """What no training scene may look like."""
    return () if kind == "objects" else looks_of_validation()


def chunks_of(num, seed, start=0):
    """Number of scenes and seed of each chunk of a set, from the scene `start` on."""
    return [(min(CHUNK, num - first), (seed << 32) + first // CHUNK) for first in range(start, num, CHUNK)]


def make_chunks(kind, size, device, jobs, workers, progress):
    """Yield the arrays of every chunk in order; with one worker they are made by this process."""
    more = {"avoid": validation_looks(kind)}
    if workers > 1 and len(jobs) > 1:
        work = functools.partial(make_chunk, kind=kind, size=size, device=device, more=more)
        yield from pool.results(work, jobs, workers, progress)
        return
    for n, seed in jobs:
        yield make(kind, n, size, seed, device, report=progress, **more)[0]


def make_shards(size, num, seed, device, kind="scenes", workers=1):
    """Write data/<kind><size>/train: an array of num rows per modality and meta.json. Resumes, or verifies.

    workers: processes of one thread each that make chunks. What comes out does not depend on their number.
    """
    identity = identity_of(size, num, seed, kind)
    out = ROOT / identity["name"] / "train"
    if shards.verify(out, identity):
        print(f"{out}: {num:,} scenes, already there and verified")
        return
    part = out.with_name("train.part")
    arrays, done = open_arrays(part, identity, kind)
    jobs = chunks_of(num, seed, done)
    with contextlib.ExitStack() as stack:
        first = f"{identity['name']} (starting)"  # a CPU compiles for half a minute, once: then it is in torch's cache
        bar = stack.enter_context(tqdm(total=num, initial=done, unit=" scenes", desc=first))
        stack.enter_context(pool.heartbeat(bar))

        def progress(count):
            bar.set_description(identity["name"], refresh=False)
            bar.update(count)

        chunks = stack.enter_context(contextlib.closing(make_chunks(kind, size, device, jobs, workers, progress)))
        for chunk in chunks:
            n = len(next(iter(chunk.values())))
            for m, array in arrays.items():
                array[done:done + n] = chunk[m]
                array.flush()
            done += n
            write_json(part / "state.json", {"identity": identity, "done": done})
    hashes = {m: sha256(part / f"{m}.npy") for m in arrays}
    write_json(part / "meta.json", {**identity, "modalities": modalities(size, kind), "sha256": hashes,
                                    "content_sha256": shards.content_sha256(part)}, indent=1)
    (part / "state.json").unlink()
    part.rename(out)
    print(f"{out}: {num:,} scenes")


def check_shards(size, num, seed, device, kind):
    """Make some scenes of a set again: a line that says how alike they are. Fault if they are not.

    What follows from scenes alone has to be equal. Pictures are rounded, and another machine rounds otherwise:
    SAME_TOKENS of their tokens have to be equal, and SAME_PIXELS of the bytes differ by at most two.
    """
    identity = identity_of(size, num, seed, kind)
    folder = ROOT / identity["name"] / "train"
    if not shards.verify(folder, identity):
        raise Fault(f"there is no {folder}")
    content = shards.content_sha256(folder)
    if content != shards.read_meta(folder).get("content_sha256"):
        raise Fault(f"{folder} is damaged (its content is not that of meta.json); delete it and make it again")
    arrays = {name: np.load(folder / f"{name}.npy", "r") for name in array_forms(size, kind)}
    coder, encoding = load_coders(kind, device)
    jobs, rng = chunks_of(num, seed), np.random.default_rng(0)
    chosen = rng.choice(len(jobs), min(CHECKED_CHUNKS, len(jobs)), replace=False)
    shares = {name: 0.0 for name in arrays}
    for i in sorted(chosen):
        n, chunk_seed = jobs[i]
        codes = sample(kind, n, chunk_seed, validation_looks(kind))
        rows = np.sort(rng.choice(n, min(n, CHECKED // len(chosen)), replace=False))
        written, texts = write(kind, codes, chunk_seed, encoding, questions.DESCRIBE_FIRST)
        if kind == "audio":
            drawn = hear(codes, texts["caption"], chunk_seed, coder, rows)
        else:
            drawn = draw(kind, codes[rows], size, device, coder)
        for name, array in arrays.items():
            chunk = array[i * CHUNK:i * CHUNK + n]
            share = alike(name, chunk[rows], drawn[name]) if name in drawn else alike(name, chunk, written[name])
            shares[name] += share / len(chosen)
    for name, share in shares.items():
        rounded = name in (*IMAGES, *HEARD, *rich.DRAWN) or name.startswith("fine")
        least = SAME_PIXELS if name.startswith("pixels") else SAME_TOKENS if rounded else 1
        if share < least - 1e-9:
            raise Fault(f"{folder}: of {name} made again {100 * share:.2f} % are the same, and {100 * least:g} % should be")
    what = "sounds" if kind == "audio" else "pictures"
    told = ", ".join(f"{name} {100 * share:.2f} %" for name, share in shares.items() if name not in shards.EXACT)
    return f"{folder}: content {content[:16]}, all of it the same again; of {what} {told}"


def alike(name, stored, again):
    """The share of an array's values that are the same, of pixels those that differ by two at most."""
    if stored.shape != again.shape:
        return 0.0
    reach = 2 if name.startswith("pixels") else 0
    return float((np.abs(stored.astype(np.int32) - again.astype(np.int32)) <= reach).mean())


def write_json(path, value, indent=None):
    """Write a file under a temporary name first."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=indent))
    temporary.replace(path)


def report_questions(folder):
    """Print how well the questions of a set are answered without its pictures."""
    arrays, _ = shards.read(folder, ["qa", "family"])
    turns = questions.decode(arrays["qa"], arrays["family"])
    print("Answers guessed right without the picture, from every other question:")
    print(questions.table(turns[::2], turns[1::2]))


def write_stream():
    """data/scenes/{train,val}.bin from the objects set: every scene's label, counted from 4096 on, then its tokens."""
    folder, source, frozen = ROOT / "scenes", ROOT / "objects64" / "train", shards.FROZEN / "objects64.npz"
    arrays, meta = shards.read(source, ["label", "rgb"], modalities(64, "objects"))
    identity = {"name": "scenes", "train": sha256(source / "meta.json"), "val": sha256(frozen)}
    if streams.finished(folder, identity):
        return
    folder.mkdir(exist_ok=True)
    with np.load(frozen) as validation:
        splits = {"train": arrays, "val": {name: validation[name] for name in arrays}}
    for split, tokens in splits.items():
        rows = np.concatenate([tokens["label"].astype(np.int64) + tokenizer.VOCAB, tokens["rgb"]], 1)
        streams.write_bin(folder / f"{split}.bin", rows.flatten())
    streams.finish(folder, identity, tokenizer.VOCAB + len(CLASSES), document_start=tokenizer.VOCAB, encoding="scenes")
    print(f"{folder}: the same as a stream of tokens")


def make_frozen(size, device, num=VALIDATION, kind="scenes"):
    """Write data/frozen/<kind><size>.npz: the validation set's tokens, texts, pixels and scenes."""
    more = {"describe_first": 0} if kind == "qa" else {}
    arrays, texts = make(kind, num, size, VALIDATION_SEED, device, **more)
    arrays |= {f"{m}_text": np.frombuffer("\n".join(lines).encode(), np.uint8) for m, lines in texts.items()}
    arrays["modalities"] = np.frombuffer(json.dumps(modalities(size, kind)).encode(), np.uint8)
    path = shards.FROZEN / f"{kind}{size}.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path}: {num:,} scenes, {path.stat().st_size / 1e6:.1f} MB")


def preview(kind, path, device):
    """Draw a contact sheet of some scenes of a kind of set; what is heard becomes a folder of WAV files."""
    if kind == "scenes":
        previews.draw_scenes(build(sample_scenes(24, seed=7)), IMAGES, path)
    elif kind == "objects":
        previews.draw_objects(make("objects", 600, 64, 7, device)[0], load_coders("objects", device)[0], path)
    elif kind == "audio":
        path = path.with_suffix("")
        previews.write_sounds(*make("audio", 6, 64, 7, device), load_coders("audio", device)[0], path)
    elif kind == "fine":
        previews.draw_fine(make("fine", 8, 64, 7, device)[0], load_coders("fine", device)[0], path)
    elif kind == "rich":
        previews.draw_rich(make("rich", 8, 64, 7, device)[0], load_coders("rich", device)[0], path)
    else:
        previews.draw_questions(make("qa", 24, 64, 7, device)[0], path)
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="picture width and height in pixels, a multiple of 8")
    parser.add_argument("--num", type=int, help="training scenes; 20,000, and 200,000 from 128 px up")
    parser.add_argument("--seed", type=int, default=1, help="of the training scenes; validation has its own")
    kinds = parser.add_mutually_exclusive_group()
    for option, about in (("objects", "scenes with one object and its class, 64 px"), ("qa", "scenes with questions"),
                          ("audio", "captions read aloud and the sounds of objects that are struck"),
                          ("rich", "instances, features, outlines, poses, palettes and metadata"),
                          ("fine", "rgb, depth, normal and seg with twice as many pixels across")):
        kinds.add_argument(f"--{option}", dest="kind", action="store_const", const=option, default="scenes", help=about)
    kinds.add_argument("--course", type=Path, metavar="DIR", help="write scenes at 128 px as the course's folder")
    parser.add_argument("--preview", action="store_true", help="draw a contact sheet instead")
    parser.add_argument("--frozen", action="store_true", help="remake the frozen validation set instead")
    parser.add_argument("--check", action="store_true", help="see whether a set is what this machine would make")
    arguments = parser.parse_args()
    kind, size = arguments.kind, 128 if arguments.course else arguments.size
    num = arguments.num
    if num is None:
        num = 20000 if size < 128 else LARGE
    fits = size in (64, 128) if kind == "objects" else size >= 16 and size % 8 == 0
    if not fits or num < 1 or not 0 <= arguments.seed < 1 << 20:
        stop("--size must be a multiple of 8 from 16 up (--objects: 64, 128), --num at least 1, --seed 0 to 2^20 - 1")
    if arguments.course and arguments.course.exists():
        stop(f"{arguments.course} is there already: name a folder that is not")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if arguments.preview:
            preview(kind, ROOT.parent / "samples" / f"{kind}.png", device)
        elif arguments.frozen:
            make_frozen(size, device, kind=kind)
        elif arguments.check:
            print(check_shards(size, num, arguments.seed, device, kind))
        else:
            workers = pool.cores() if device == "cpu" else min(pool.cores(), GPU_WORKERS)
            if not arguments.course or not (ROOT / "scenes128" / "train").exists():
                make_shards(size, num, arguments.seed, device, kind, workers)
            if kind == "qa":
                report_questions(ROOT / set_name(size, num, kind) / "train")
            if kind == "objects" and size == 64:
                write_stream()  # train_gpt.py --data=scenes reads it
            if arguments.course:
                import course  # here, as it brings the hub's client, which no other kind needs
                course.export(arguments.course, arguments.num)
    except KeyboardInterrupt:
        stop("interrupted; run the same command to continue")
    except Fault as fault:
        stop(fault)
    except OSError as error:
        stop(f"cannot write: {error}")


if __name__ == "__main__":
    main()
