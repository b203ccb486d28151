"""Quality: the same samples by every system, and how far the pictures are from those of the reference.

For `tiny`, held-out samples of every kind, which its judge scores too; for other models, a few prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.harness.case import Case
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.result import Missing, Quality
from benchmarks.harness.system import Drawn, Job, Pictures
from flux2_trt.spec import ModelSpec

PEAK = 255.0
SEED = 1
PROMPTS = (
    "a red bicycle leaning against a brick wall in the rain",
    "an old fisherman mending a net, portrait, soft window light",
    'a shop sign that reads "OPEN", at night',
    "three green apples and a blue bowl on a wooden table",
    "a snowy mountain village seen from above",
    "a white cat asleep on a stack of newspapers",
)
TINY_PROMPTS = (
    "a large red circle on a blue background",
    "a green triangle to the left of a yellow square on a white background",
    "a small purple star in the top right corner, gray background",
    "pink diamond above a black cross, on orange",
)
JUDGE_NEEDS = ("torch", "scipy")


@dataclass(frozen=True)
class Task:
    """What is drawn, and what the judge compares it with: a sample of `tiny`, or nothing."""

    prompt: str
    seed: int
    references: tuple[Pictures, ...] = ()
    sample: Any = None

    def job(self, inputs: Inputs, case: Case, reads_prompt: bool) -> Job:
        return inputs.job(case, self.prompt, self.seed, self.references, reads_prompt)


@dataclass
class Gallery:
    """What a system drew: for each task the picture, and its latents after every step."""

    pictures: list[Pictures] = field(default_factory=list)
    latents: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def add(self, drawn: Drawn) -> None:
        self.pictures.append(drawn.pictures[0])
        self.latents.append(drawn.latents)


def tasks_of(spec: ModelSpec, count: int, case: Case) -> list[Task]:
    """`count` of every kind for `tiny`, where its judge can be loaded; else so many prompts, the same ones again with
    other seeds."""
    if spec.name != "tiny" or any(find_spec(name) is None for name in JUDGE_NEEDS):
        prompts = TINY_PROMPTS if spec.name == "tiny" else PROMPTS
        return [Task(prompts[index % len(prompts)], SEED + index) for index in range(count)]
    from export.tiny.dataset import DRAW, sample
    from export.tiny.scenes import render

    tasks = []
    for kind in DRAW:
        rng = np.random.default_rng(SEED)
        for seed in range(count):
            each = sample(rng, held_out=True, kind=kind)
            references = tuple(render(scene, case.width, case.height) for scene in each.references)
            tasks.append(Task(each.prompt, seed, references, each))
    return tasks


def compare(name: str, reference: str, tasks: Sequence[Task], ours: Gallery, theirs: Gallery) -> Quality:
    """Of as many tasks as both have drawn, which are one at least."""
    pairs = list(zip(ours.pictures, theirs.pictures, strict=False))
    differ = [pair for pair in pairs if (pair[0] != pair[1]).any()]
    trajectories = [pair for pair in zip(ours.latents, theirs.latents, strict=False) if pair[0] and pair[1]]
    steps = min((min(len(a), len(b)) for a, b in trajectories), default=0)
    ssim = _ssim()
    return Quality(
        system=name,
        reference=reference,
        pictures=len(pairs),
        identical=len(pairs) - len(differ),
        latent_error_by_step=tuple(
            float(np.mean([relative_error(a[step], b[step]) for a, b in trajectories])) for step in range(steps)
        ),
        psnr_db=float(np.median([psnr(a, b) for a, b in differ])) if differ else None,
        ssim=float(np.median([ssim(a, b) for a, b in pairs])) if ssim else None,
        lpips=_mean(_lpips(), pairs),
        clip=_mean(_clip(), zip(ours.pictures, [task.prompt for task in tasks], strict=False)),
        scores=_scores(tasks, ours.pictures),
    )


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def psnr(ours: Pictures, theirs: Pictures) -> float:
    """Peak signal to noise ratio in dB of two pictures that differ."""
    error = np.mean((ours.astype(np.float64) - theirs.astype(np.float64)) ** 2)
    return float(10 * np.log10(PEAK**2 / error))


def _scores(tasks: Sequence[Task], pictures: Sequence[Pictures]) -> dict[str, float]:
    if not tasks or tasks[0].sample is None:
        return {}
    from export.tiny.judge import judge, score

    verdicts = [judge(task.sample, picture) for task, picture in zip(tasks, pictures, strict=False)]
    return {name: float(value) for name, value in score(verdicts).items()}


def _ssim() -> Callable[[Pictures, Pictures], float] | None:
    """scikit-image's structural similarity (Wang et al. 2004)."""
    if find_spec("skimage") is None:
        return None
    from skimage.metrics import structural_similarity

    return lambda a, b: float(structural_similarity(a, b, channel_axis=-1))


def _lpips() -> Callable[[Pictures, Pictures], float] | None:
    """LPIPS with AlexNet (Zhang et al. 2018), where the package and the network's weights are already here."""
    if why_no_lpips():
        return None
    import lpips
    import torch

    network = lpips.LPIPS(net="alex", verbose=False)

    def tensor(picture: Pictures) -> Any:
        return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1

    def distance(ours: Pictures, theirs: Pictures) -> float:
        with torch.inference_mode():
            return float(network(tensor(ours), tensor(theirs)))

    return distance


ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's name of the weights, without which lpips would download them
CLIP_MODEL = "openai/clip-vit-base-patch16"
CLIP_SCALE = 100.0


def why_no_lpips() -> str | None:
    for name in ("lpips", "torchvision", "torch"):
        if find_spec(name) is None:
            return f"the package {name} is not installed"
    import os

    import torch

    weights = os.path.join(torch.hub.get_dir(), "checkpoints", ALEXNET)
    return None if os.path.exists(weights) else f"its weights {ALEXNET} are not in torch's cache"


def _clip() -> Callable[[Pictures, str], float] | None:
    """CLIP score: 100 times the cosine of picture and prompt (Hessel et al. 2021), from weights already here."""
    if why_no_clip():
        return None
    import torch
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(CLIP_MODEL, local_files_only=True).eval()
    processor = CLIPProcessor.from_pretrained(CLIP_MODEL, local_files_only=True)

    def cosine(picture: Pictures, prompt: str) -> float:
        given = processor(text=[prompt], images=[picture], return_tensors="pt", padding=True, truncation=True)
        with torch.inference_mode():
            found = model(**given)
        return CLIP_SCALE * float((found.image_embeds * found.text_embeds).sum())

    return cosine


def why_no_clip() -> str | None:
    for name in ("transformers", "torch"):
        if find_spec(name) is None:
            return f"the package {name} is not installed"
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(CLIP_MODEL, "config.json"), str):
        return None
    return f"{CLIP_MODEL} is not in the Hugging Face cache"


def unscored(spec: ModelSpec) -> list[Missing]:
    """The measures of quality that cannot be taken here."""
    reasons = {
        "SSIM": None if find_spec("skimage") else "scikit-image is not installed: pip install 'flux2-trt[benchmark]'",
        "LPIPS": why_no_lpips(),
        "CLIP score": why_no_clip(),
    }
    if spec.name == "tiny":
        lacking = [name for name in JUDGE_NEEDS if find_spec(name) is None]
        reasons["judge's scores"] = (
            f"{', '.join(lacking)} not installed: pip install 'flux2-trt[benchmark]'" if lacking else None
        )
    return [Missing(name, reason) for name, reason in reasons.items() if reason]


def _mean(measure: Callable[..., float] | None, pairs: Iterable[tuple[Any, Any]]) -> float | None:
    return None if measure is None else float(np.mean([measure(*pair) for pair in pairs]))
