"""Masks for words that had none in training: ZegCLIP against naming by the nearest seen word, on generated scenes.

Scenes are `synthetic:words`: 20 classes of two words, such as "striped ring", of which 5 are withheld.

Towers    A small CLIP learns from nothing, by CLIP's contrastive loss, on generated pictures with captions. As in the
          papers it has seen captions of all classes, also of those withheld, and never a mask. Its file is then read
          like any CLIP checkpoint. One pair of towers serves all seeds, as one CLIP does in the papers.
ZegCLIP   The inductive setting: frozen towers, prompts in every block, labels of the withheld classes ignored.
Closed    The same network from the same start, as many steps, images and the same rates; its classes are the seen ones
          only, and they compete (softmax and cross entropy). Unseen words get their scores from the seen ones:
            nearest   a word has the probability of the seen word nearest to it, times the cosine between the two;
            mixture   a pixel is the mean of the seen words' vectors, weighted by their probabilities; a word scores its
                      cosine with that (ConSE, M. Norouzi et al., ICLR 2014).
          Both rules are applied to ZegCLIP's own masks of the seen words, too.
Bias      What is taken off the scores of seen words: for every method the value in 0, 0.01 .. 1 with the best hIoU on
          scenes of their own, which are neither trained nor evaluated on; and for all the paper's 0.1.

A run that was stopped goes on where it ended. Everything is made here: no download, no pretrained weights.

    OMP_NUM_THREADS=1 python examples/open_vocabulary_study.py --out runs/words
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save
from torch import Tensor, nn

from segvit.backbones.clip import build_backbone
from segvit.backbones.vit import PlainViT
from segvit.contracts import Classes, Dense
from segvit.data.synthetic_words import NAMES, WITHHELD, WORDS, draw_words
from segvit.files import open_atomic, write_bytes, write_json, write_text
from segvit.inference.prediction import as_picture, colorize
from segvit.metrics.confusion import ConfusionMatrix
from segvit.metrics.open_vocabulary import OpenVocabulary, open_vocabulary
from segvit.nn.readout import bilinear_rows
from segvit.nn.rename import Rules, rename
from segvit.systems import segmenter, zegclip
from segvit.tasks.data_preview import GAP, INK, PAPER, draw_legend, legend_lines
from segvit.text.architecture import ClipConfig, TextConfig, VisionConfig
from segvit.text.checkpoint import Checkpoint, find_clip
from segvit.text.embeddings import class_embeddings
from segvit.text.tokenize import tokenize
from segvit.text.tower import TextTower, build_text

SIZE, CLOSE, PATCH = 64, 48, 8  # pixels a side of scenes and of captioned pictures, which show objects equally large
JOINT, DEPTH, CONTEXT = 64, 3, 32
IGNORE = WORDS.classes.ignore_index
UNSEEN = [NAMES.index(name) for name in WITHHELD]
SEEN = [number for number in range(len(NAMES)) if number not in UNSEEN]
BIASES = np.arange(101) / 100
PAPER_BIAS = 0.1
# The text tower learns at this part of the rate: else the words of shapes, which pictures teach last, fall together.
TEXT_RATE = 0.05
VISIBLE = 40  # pixels of an object that is worth a caption
METHODS = ("ZegCLIP", "closed set, nearest", "closed set, mixture", "ZegCLIP's seen masks, nearest",
           "ZegCLIP's seen masks, mixture")  # fmt: skip


class Scenes(NamedTuple):
    """Images (N, H, W, 3) and masks (N, H, W) of one kind."""

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]


def scenes(seed: int, count: int) -> Scenes:
    """Generated scenes, as `synthetic:words` has them in its training split."""
    drawn = [draw_words(SIZE, (seed, number, 1)) for number in range(count)]
    return Scenes(*(np.stack(part) for part in zip(*drawn, strict=True)))


def normalised(images: NDArray[np.uint8], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(N, 3, H, W) network input."""
    scaled = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2) / 255
    return (scaled - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def rates(step: int, steps: int, peak: float) -> float:
    """Warm-up over a twentieth of the steps, then a half cosine to 0."""
    warmup = max(1, steps // 20)
    return peak * min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2


def captioned(seed: int, count: int) -> tuple[NDArray[np.uint8], list[list[str]]]:
    """Pictures from close by of one object, every third of two, every sixteenth of none; and the classes in each."""
    images, names = [], []
    for number in range(count):
        objects = 0 if number % 16 == 0 else 2 if number % 3 == 0 else 1
        image, mask = draw_words(CLOSE, (seed, number, 3), objects=objects, zoom=SIZE / CLOSE)
        ids, pixels = np.unique(mask[mask > 0], return_counts=True)
        images.append(image)
        names.append([NAMES[i] for i, area in zip(ids, pixels, strict=True) if area >= VISIBLE] or [NAMES[0]])
    return np.stack(images), names


def untrained(width: int) -> Checkpoint:
    """The architecture of both towers; one head for 64 channels, as the loader reads it off a file."""
    vision = VisionConfig(
        width=width, layers=DEPTH, heads=max(1, width // 64), embed_dim=JOINT, image_size=CLOSE, patch_size=PATCH
    )
    text = TextConfig(width=64, layers=2, heads=1, embed_dim=JOINT, context_length=CONTEXT)
    return Checkpoint(ClipConfig(vision, text), None, "the towers of this study")


@torch.no_grad()
def init_vision(vit: PlainViT) -> None:
    """OpenAI's scales: with timm's small ones all images have the same vector, and the loss does not move."""
    scale, depth = vit.dim**-0.5, len(vit.blocks)
    assert vit.cls_token is not None
    assert vit.pos_embed is not None
    nn.init.normal_(vit.cls_token, std=scale)
    nn.init.normal_(vit.pos_embed, std=scale)
    for name, weight in vit.blocks.named_parameters():
        if name.endswith("qkv.weight"):
            nn.init.normal_(weight, std=scale)
        elif name.endswith("fc1.weight"):
            nn.init.normal_(weight, std=scale * 0.5**0.5)
        elif name.endswith(("proj.weight", "fc2.weight")):
            nn.init.normal_(weight, std=scale * (2 * depth) ** -0.5)


def pretrain(path: Path, *, width: int, steps: int, batch: int, pictures: int, peak: float) -> None:
    """Train both towers by the contrastive loss and write them as one checkpoint of OpenAI's layout."""
    torch.manual_seed(0)
    found, rng = untrained(width), np.random.default_rng(0)
    vit, text, scale = build_backbone(found), build_text(found), nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    assert isinstance(vit, PlainViT)
    init_vision(vit)
    text.token_embedding.sparse = True  # of 49,408 words these captions have a dozen
    words = [weight for name, weight in text.named_parameters() if name != "token_embedding.weight"]
    dense = [*vit.parameters(), *words, scale]
    table = list(text.token_embedding.parameters())
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW([*vit.parameters(), scale], betas=(0.9, 0.98), weight_decay=0.01), 1.0),
        (torch.optim.AdamW(words, betas=(0.9, 0.98), weight_decay=0.01), TEXT_RATE),
        (torch.optim.SparseAdam(table, betas=(0.9, 0.98)), TEXT_RATE),
    ]
    images, names = captioned(0, pictures)
    for step in range(steps):
        chosen = rng.integers(0, pictures, batch)
        flipped = images[chosen, :, :: int(rng.choice([1, -1]))]
        inputs = normalised(flipped[..., rng.permutation(3)], found.vision.mean, found.vision.std)  # hues mean nothing
        loss = contrast(vit(inputs).pooled, text, [sentence(names[i], rng) for i in chosen], scale)
        loss.backward()
        nn.utils.clip_grad_norm_(dense, 1.0)
        for optimizer, part in optimizers:
            optimizer.param_groups[0]["lr"] = part * rates(step, steps, peak)
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"towers: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    write_bytes(path, save(official(vit, text, scale.detach())))


def sentence(names: list[str], rng: np.random.Generator) -> str:
    """What stands under a picture, its objects in any order."""
    return "a photo of a " + " and a ".join(rng.permutation(names))


def contrast(pooled: Tensor | None, text: TextTower, captions: list[str], scale: Tensor) -> Tensor:
    """CLIP's loss; pictures with the same caption share it, so that none is pushed away from its own words."""
    assert pooled is not None
    different = sorted(set(captions))
    place = torch.tensor([different.index(caption) for caption in captions])
    tokens = tokenize(different, context_length=CONTEXT)
    words = F.normalize(text(tokens[:, : int(tokens.argmax(-1).max()) + 1]), dim=-1)
    logits = scale.exp().clamp(max=100) * F.normalize(pooled, dim=-1) @ words.T
    pairs = F.one_hot(place, len(different)).float()
    return (F.cross_entropy(logits, place) + F.cross_entropy(logits.T, (pairs / pairs.sum(0)).T)) / 2


OFFICIAL: Rules = (  # our names of a ViT to OpenAI's
    (r"^cls_token$", "class_embedding"),
    (r"^pos_embed$", "positional_embedding"),
    (r"^embedding\.proj\.weight$", "proj"),
    (r"^embedding\.norm\.", "ln_post."),
    (r"^norm_pre\.", "ln_pre."),
    (r"^patch_embed\.proj\.", "conv1."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^blocks\.", "transformer.resblocks."),
)


def official(vit: PlainViT, text: TextTower, scale: Tensor) -> dict[str, Tensor]:
    """Both towers under OpenAI's names and in its shapes."""
    vision = rename(vit.state_dict(), OFFICIAL, unused="$^")
    vision["class_embedding"] = vision["class_embedding"][0, 0]
    vision["positional_embedding"] = vision["positional_embedding"][0]
    vision["proj"] = vision["proj"].T
    state = {f"visual.{name}": value for name, value in vision.items()} | text.state_dict() | {"logit_scale": scale}
    return {name: value.contiguous() for name, value in state.items()}


@torch.no_grad()
def zero_shot(path: Path, count: int) -> float:
    """How many of `count` new pictures of one object the towers name right, out of 20 names."""
    found = find_clip(None, str(path))
    vit, words = build_backbone(found).eval(), vectors(found)[1:]
    drawn = [draw_words(CLOSE, (1, number, 3), objects=1, zoom=SIZE / CLOSE) for number in range(count)]
    images, masks = (np.stack(part) for part in zip(*drawn, strict=True))
    pooled = vit(normalised(images, found.vision.mean, found.vision.std)).pooled
    assert pooled is not None
    right = torch.from_numpy(masks.max((1, 2)).astype(np.int64)) - 1
    return (pooled @ words.T).argmax(-1).eq(right).double().mean().item()


def vectors(found: Checkpoint) -> Tensor:
    """The unit vectors of all classes (K, E)."""
    return class_embeddings(build_text(found), NAMES, templates="zegclip_voc", cache=False)


def network(path: Path, numbers: list[int], *, unseen: list[int]) -> zegclip.ZegCLIP:
    """ZegCLIP on the towers of a file, for the classes of these numbers; scores are left as they are (bias 0)."""
    found = find_clip(None, str(path))
    vit = build_backbone(found, image_size=SIZE, position_mode="bilinear", doubled_class=True)
    assert isinstance(vit, PlainViT)
    zegclip.add_prompts(vit, num_prompts=10, deep=DEPTH - 1, dropout=0.1)
    head = zegclip.MaskHead(found.vision.embed_dim, layers=3, heads=2, dropout=0.1)
    return zegclip.ZegCLIP(vit, head, vectors(found)[numbers], unseen=unseen, seen_bias=0.0)


class ClosedSet(nn.Module):
    """The same network with masks that compete: their scores are logits of a softmax."""

    def __init__(self, network: zegclip.ZegCLIP) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Dense:
        out = self.network(images)
        return Dense(out.extras["masks"], {}, out.covers)


def train(
    model: nn.Module, system: Any, data: Scenes, *, classes: int, steps: int, batch: int, peak: float, seed: int
) -> None:
    """The trainable weights of `model`, by the loss of its system, in place."""
    rng = np.random.default_rng(seed)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.01)
    counts = {"num_classes": classes, "ignore_index": IGNORE}
    for step in range(steps):
        chosen, turn = rng.integers(0, len(data.images), batch), int(rng.choice([1, -1]))
        images = normalised(data.images[chosen, :, ::turn], zegclip.MEAN, zegclip.STD)
        masks = torch.from_numpy(np.ascontiguousarray(data.masks[chosen, :, ::turn]))
        terms = system.criterion(model(images), masks, system.normalisers(masks, **counts), ignore_index=IGNORE)
        loss = torch.stack(list(terms.values())).sum()
        optimizer.param_groups[0]["lr"] = rates(step, steps, peak)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(
                f"{type(model).__name__}, seed {seed}: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True
            )
    model.eval()


def only_seen(data: Scenes) -> Scenes:
    """The same scenes with seen classes numbered from 0 on and all others ignored."""
    table = np.full(256, IGNORE, np.uint8)
    table[SEEN] = np.arange(len(SEEN))
    return data._replace(masks=table[data.masks])


def nearest_names(chances: Tensor, words: Tensor) -> Tensor:
    """Scores of all words from those of the seen ones (B, S, H, W): an unseen word has its nearest seen word's."""
    cosine, nearest = (words[UNSEEN] @ words[SEEN].T).max(1)
    scores = chances.new_empty(len(chances), len(words), *chances.shape[-2:])
    scores[:, SEEN] = chances
    scores[:, UNSEEN] = chances[:, nearest] * cosine[:, None, None]
    return scores


def mixture_names(chances: Tensor, words: Tensor) -> Tensor:
    """Scores of all words from those of the seen ones (B, S, H, W): cosines with the words' weighted mean."""
    mixed = F.normalize(torch.einsum("bshw,se->behw", chances, words[SEEN]), dim=1)
    return torch.einsum("behw,ke->bkhw", mixed, words)


class Ranked(NamedTuple):
    """The best seen and the best unseen class of every pixel (N, H, W), and by how much the seen one is ahead."""

    seen: NDArray[np.uint8]
    unseen: NDArray[np.uint8]
    ahead: NDArray[np.float32]

    def labels(self, bias: float) -> NDArray[np.uint8]:
        """The winners once `bias` is taken off the seen classes."""
        return np.where(self.ahead >= bias, self.seen, self.unseen)


Answers = dict[str, list[Ranked]]


@torch.no_grad()
def answers(zeg: nn.Module, closed: nn.Module, data: Scenes) -> dict[str, Ranked]:
    """What every method says of the scenes."""
    words = zeg.get_buffer("class_embeddings")
    found: Answers = {method: [] for method in METHODS}
    for images in np.array_split(data.images, max(1, len(data.images) // 20)):
        inputs = normalised(images, zegclip.MEAN, zegclip.STD)
        every = full_size(zeg(inputs).extras["masks"]).sigmoid()
        chances = full_size(closed(inputs).logits).softmax(1)
        own = every[:, SEEN] / every[:, SEEN].sum(1, keepdim=True)
        scores = (every, nearest_names(chances, words), mixture_names(chances, words), nearest_names(own, words),
                  mixture_names(own, words))  # fmt: skip
        for method, part in zip(METHODS, scores, strict=True):
            found[method].append(ranked(part))
    return {
        method: Ranked(*(np.concatenate(part) for part in zip(*parts, strict=True))) for method, parts in found.items()
    }


def full_size(maps: Tensor) -> Tensor:
    """Maps (B, K, h, w) at the scenes' size."""
    return bilinear_rows(maps, (SIZE, SIZE), range(SIZE))


def ranked(scores: Tensor) -> Ranked:
    """The winners of both groups from scores (B, K, H, W)."""
    (known, seen), (new, unseen) = scores[:, SEEN].max(1), scores[:, UNSEEN].max(1)
    names = [np.array(group, np.uint8)[ids.numpy()] for group, ids in ((SEEN, seen), (UNSEEN, unseen))]
    return Ranked(names[0], names[1], (known - new).numpy())


def measure(found: Ranked, data: Scenes, bias: float) -> OpenVocabulary:
    """The figures of a method over all scenes."""
    matrix = ConfusionMatrix(len(NAMES), IGNORE)
    matrix.update(found.labels(bias), data.masks)
    return open_vocabulary(matrix.metrics(), unseen=UNSEEN)


def calibrated(found: Ranked, data: Scenes) -> float:
    """The bias with the best hIoU on these scenes."""
    return float(BIASES[np.argmax([measure(found, data, bias).harmonic for bias in BIASES])])


class Budget(NamedTuple):
    """What is trained how long; the last three are scenes to train on, to calibrate with and to evaluate on."""

    tower_steps: int
    tower_batch: int
    pictures: int
    steps: int
    batch: int
    train: int
    tune: int
    val: int


FULL = Budget(1500, 64, 6000, 800, 16, 3000, 100, 200)
QUICK = Budget(2, 8, 16, 2, 4, 8, 4, 4)
WIDTH, TOWER_RATE, RATE = 64, 2.5e-3, 3e-3
TUNE_SEED, VAL_SEED = 1001, 1002  # the same scenes for every seed of the training


def one_seed(out: Path, seed: int, budget: Budget) -> dict[str, Any]:
    """Train both networks and measure all methods; figures and a sheet of pictures go to `out`."""
    data, tune, val = scenes(seed, budget.train), scenes(TUNE_SEED, budget.tune), scenes(VAL_SEED, budget.val)
    options = {"steps": budget.steps, "batch": budget.batch, "peak": RATE, "seed": seed}
    torch.manual_seed(seed)
    zeg = network(out / "clip.safetensors", [*range(len(NAMES))], unseen=UNSEEN)
    train(zeg, zegclip, data, classes=len(NAMES), **options)
    torch.manual_seed(seed)
    closed = ClosedSet(network(out / "clip.safetensors", SEEN, unseen=[]))
    train(closed, segmenter, only_seen(data), classes=len(SEEN), **options)
    before, after = answers(zeg, closed, tune), answers(zeg, closed, val)
    figures = {}
    for method in METHODS:
        bias = calibrated(before[method], tune)
        tuned, paper = (measure(after[method], val, value)._asdict() for value in (bias, PAPER_BIAS))
        figures[method] = {"bias": bias, "tuned": tuned, "paper": paper}
    views = [after[method].labels(figures[method]["bias"]) for method in (METHODS[0], METHODS[2])]
    with open_atomic(out / f"seed_{seed}.png") as file:
        sheet(val, views).save(file, "PNG", optimize=True)
    return figures


def sheet(data: Scenes, views: list[NDArray[np.uint8]], *, rows: int = 8, zoom: int = 2) -> Image.Image:
    """Scenes with withheld classes beside their labels and what two methods say, and a legend."""
    chosen = [number for number in range(len(data.masks)) if np.isin(data.masks[number], UNSEEN).any()][:rows]
    cell, width = zoom * SIZE + GAP, 4 * (zoom * SIZE + GAP) + GAP
    maps = [data.masks, *views]
    present = sorted({int(i) for part in maps for number in chosen for i in np.unique(part[number])})
    names = tuple(f"{name} (withheld)" if name in WITHHELD else name for name in NAMES)
    lines = legend_lines(Classes(names, WORDS.classes.palette), present, width - 2 * GAP)
    page = Image.new("RGB", (width, 22 + len(chosen) * cell + 22 * len(lines)), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for column, title in enumerate(("image", "label", "ZegCLIP", "closed set, mixture")):
        pen.text((GAP + column * cell, 3), title, INK, font)
    for row, number in enumerate(chosen):
        drawn = [as_picture(data.images[number]), *(colorize(part[number], WORDS.classes) for part in maps)]
        for column, view in enumerate(drawn):
            large = np.kron(view, np.ones((zoom, zoom, 1), np.uint8))
            page.paste(Image.fromarray(large), (GAP + column * cell, 22 + row * cell))
    draw_legend(pen, lines, 22 + len(chosen) * cell)
    return page


def table(seeds: list[dict[str, Any]], key: str) -> list[str]:
    """Mean and standard deviation over the seeds, in percent, one line a method, and hIoU of every seed."""
    lines = ["| method | bias | seen mIoU | unseen mIoU | hIoU | hIoU of each seed |", "|---|---:|---:|---:|---:|---:|"]
    for method in METHODS:
        records = [figures[method] for figures in seeds]
        bias = ", ".join(f"{record['bias'] if key == 'tuned' else PAPER_BIAS:.2f}" for record in records)
        cells = [spread([100 * record[key][name] for record in records]) for name in ("seen", "unseen", "harmonic")]
        each = ", ".join(f"{100 * record[key]['harmonic']:.1f}" for record in records)
        lines.append(f"| {method} | {bias} | {' | '.join(cells)} | {each} |")
    return lines


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{np.mean(values):.1f} +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def report(seeds: list[dict[str, Any]], towers: dict[str, Any], budget: Budget) -> str:
    """The Markdown page."""
    command = "OMP_NUM_THREADS=1 python examples/open_vocabulary_study.py " + " ".join(sys.argv[1:])
    lines = [
        "# Open-vocabulary study", "",
        "ZegCLIP (inductive) against a closed set whose unseen words are named by the nearest seen ones, on generated",
        "scenes of `synthetic:words`. Withheld from masks:", f"{', '.join(WITHHELD)}.",
        "What is compared stands at the top of `examples/open_vocabulary_study.py`.", "",
        f"Towers: {budget.tower_steps} steps of {budget.tower_batch} captioned pictures of {CLOSE} x {CLOSE} pixels;",
        f"zero-shot accuracy on new pictures of one object {100 * towers['zero_shot']:.1f} % (chance 5 %).",
        f"Both networks: {budget.steps} steps of {budget.batch} out of {budget.train} scenes of {SIZE} x {SIZE},",
        f"rate {RATE:g}; {len(seeds)} seeds; {budget.val} scenes to evaluate on, {budget.tune} to calibrate with.",
        "", "Bias calibrated for every method alike:", "", *table(seeds, "tuned"), "",
        f"The paper's bias of {PAPER_BIAS} for all:", "", *table(seeds, "paper"), "",
        f"Measured {time.strftime('%Y-%m-%d')} on a CPU, {torch.get_num_threads()} thread, torch {torch.__version__}, "
        f"Python {platform.python_version()}.", "", f"    {command.strip()}", "",
    ]  # fmt: skip
    return "\n".join(lines)


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file of an earlier run says; else it is made and written."""
    if not path.is_file():
        write_json(path, make())
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/words"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="A few steps, to see that everything runs.")
    parser.add_argument("--table", type=Path, help="Where to write the report as well, a Markdown file.")
    arguments = parser.parse_args()
    budget, out = QUICK if arguments.quick else FULL, arguments.out
    if kept(out / "budget.json", budget._asdict) != budget._asdict():
        parser.error(f"{out} holds a run of another length; give another --out")

    def make_towers() -> dict[str, Any]:
        path = out / "clip.safetensors"
        if not path.is_file():
            pretrain(path, width=WIDTH, steps=budget.tower_steps, batch=budget.tower_batch, pictures=budget.pictures,
                     peak=TOWER_RATE)  # fmt: skip
        return {"zero_shot": zero_shot(path, 4 * budget.val)}

    towers = kept(out / "clip.json", make_towers)
    print(f"zero-shot accuracy {towers['zero_shot']:.3f}", flush=True)
    seeds = [kept(out / f"seed_{seed}.json", lambda seed=seed: one_seed(out, seed, budget))
             for seed in range(arguments.seeds)]  # fmt: skip
    page = report(seeds, towers, budget)
    for path in (out / "results.md", arguments.table):
        if path is not None:
            write_text(path, page)
    print(page)


if __name__ == "__main__":
    main()
