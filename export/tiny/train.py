"""Make the built-in model: `python -m export.tiny.train`.

Autoencoder, text encoder, then the transformer over both, from one seed; the state is saved as it goes, and the same
command resumes after a stop. The result is written to `flux2_trt/assets/tiny` with its configuration and scores.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.numpy import save_file
from safetensors.torch import load_file

from export.modules.autoencoder import VaeDecoder, VaeEncoder
from export.modules.text_encoder import TextEncoder
from export.tiny.autoencoder import train_autoencoder
from export.tiny.config import EvaluationConfig, TrainConfig
from export.tiny.dataset import vocabulary
from export.tiny.evaluate import held_out_scores, torch_generator
from export.tiny.flow import FlowModel, FlowTrainer
from export.tiny.reading import train_text_encoder
from export.tiny.tokenizer import build_tokenizer, save
from flux2_trt.models import TINY_ASSETS, published_spec
from flux2_trt.text import PromptTokenizer

SAVE_SECONDS = 300.0


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc <malloc.h>


def keep_freed_memory() -> None:
    """Let malloc keep what is freed for the next step: getting it anew from Linux costs a third of a matmul."""
    if platform.libc_ver()[0] == "glibc":
        malloc = ctypes.CDLL(None)
        malloc.mallopt(M_MMAP_MAX, 0)
        malloc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def _save_state(state: Any, path: Path) -> None:
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    temporary.replace(path)


def _autoencoder(
    config: TrainConfig, path: Path, start: Path | None, device: torch.device, workers: int
) -> tuple[VaeEncoder, VaeDecoder]:
    spec = published_spec("tiny").autoencoder
    encoder, decoder = VaeEncoder(spec), VaeDecoder(spec)
    if start:
        tensors = _read_half_precision(start / "autoencoder.safetensors")
        for half in (encoder, decoder):
            half.load_state_dict({name: tensors[name] for name in half.state_dict()})
        return encoder.eval(), decoder.eval()
    if not path.exists():
        trained = train_autoencoder(spec, config.autoencoder, config.seed, _log, device, workers)
        _save_state({"encoder": trained[0].state_dict(), "decoder": trained[1].state_dict()}, path)
    state = torch.load(path, weights_only=True, map_location="cpu")
    encoder.load_state_dict(state["encoder"])
    decoder.load_state_dict(state["decoder"])
    return encoder.eval(), decoder.eval()


def _text_encoder(
    config: TrainConfig, path: Path, start: Path | None, tokenizer: PromptTokenizer, device: torch.device, workers: int
) -> TextEncoder:
    spec = published_spec("tiny").text_encoder
    assert spec
    text_encoder = TextEncoder(spec)
    if start:
        text_encoder.load_state_dict(_read_half_precision(start / "text_encoder.safetensors"))
        return text_encoder.eval()
    if not path.exists():
        trained = train_text_encoder(spec, config.text, config.seed, tokenizer, _log, device, workers)
        _save_state(trained.state_dict(), path)
    text_encoder.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return text_encoder.eval()


def _write_half_precision(tensors: dict[str, torch.Tensor], path: Path) -> None:
    values = {name: tensor.detach().float().numpy().astype(np.float16) for name, tensor in tensors.items()}
    overflown = [name for name, value in values.items() if not np.isfinite(value).all()]
    if overflown:
        raise RuntimeError(f"these weights do not fit float16: {', '.join(overflown)}")
    save_file(values, path)


def _read_half_precision(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def main(
    work: Annotated[Path, typer.Option(help="Folder for the state of the training.")] = Path("local/tiny"),
    assets: Annotated[Path, typer.Option(help="Where the finished model goes.")] = TINY_ASSETS,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes torch's default.")] = 0,
    start: Annotated[
        Path | None,
        typer.Option(help="Folder of a finished model to train further; its autoencoder and text encoder stay."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model trains: cpu or cuda.")] = "cpu",
    workers: Annotated[int, typer.Option(help="Processes that draw samples; 0 draws between the steps.")] = 0,
    minutes: Annotated[
        float,
        typer.Option(help="Save the state and stop after so long; 0 trains to the end. The same command goes on."),
    ] = 0.0,
) -> None:
    """Train the built-in model, score it on held-out prompts and write it."""
    began = time.monotonic()
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of a worker
    config, spec, place = TrainConfig(), published_spec("tiny"), torch.device(device)
    assert spec.prompt
    work.mkdir(parents=True, exist_ok=True)
    assets.mkdir(parents=True, exist_ok=True)
    save(build_tokenizer(vocabulary()), assets / "tokenizer.json")
    tokenizer = PromptTokenizer.from_file(assets / "tokenizer.json", spec.prompt)
    encoder, decoder = _autoencoder(config, work / "autoencoder.pt", start, place, workers)
    text_encoder = _text_encoder(config, work / "text_encoder.pt", start, tokenizer, place, workers)

    trainer = FlowTrainer(spec, config.flow, config.seed, encoder.to(place), text_encoder, tokenizer)
    state_file = work / "flow.pt"
    if state_file.exists():
        trainer.load_state(torch.load(state_file, weights_only=True, map_location=place))
        _log(f"resuming at step {trainer.step}")
    elif start:
        trainer.start_from(_read_half_precision(start / "transformer.safetensors"))
    earlier = json.loads((start / "training.json").read_text(encoding="utf-8")) if start else None
    saved = time.monotonic()

    def goes_on(current: FlowTrainer) -> bool:
        nonlocal saved
        now = time.monotonic()
        stops = 0 < minutes * 60 < now - began
        if stops or now - saved > SAVE_SECONDS or current.step == config.flow.steps:
            _save_state(current.state(), state_file)
            saved = now
        return not stops

    trainer.run(_log, workers, goes_on)
    if trainer.step < config.flow.steps:
        _log(f"stopped at step {trainer.step} of {config.flow.steps}; the same command goes on")
        return

    model = trainer.averaged_model()
    scores = _scores(model.to(place), encoder.to(place), decoder.to(place), tokenizer, config.evaluation)
    for module in (model, encoder, decoder):
        module.to("cpu")
    _write_half_precision({**encoder.state_dict(), **decoder.state_dict()}, assets / "autoencoder.safetensors")
    _write_half_precision(dict(model.text_encoder.state_dict()), assets / "text_encoder.safetensors")
    _write_half_precision(
        {**model.conditioning.state_dict(), **model.transformer.state_dict()}, assets / "transformer.safetensors"
    )
    record = {
        "config": asdict(config),
        "flow_seconds": round(trainer.seconds),
        "flow_devices": trainer.devices,
        "scores": scores,
        "started_from": earlier,
    }
    (assets / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _scores(
    model: FlowModel, encoder: VaeEncoder, decoder: VaeDecoder, tokenizer: PromptTokenizer, config: EvaluationConfig
) -> dict[str, dict[str, float]]:
    """The held-out scores at every size of `config`, by size."""
    scores = {}
    for size in (config.size, *config.other_sizes):
        count = config.count if size == config.size else config.other_count
        here = replace(config, size=size, count=count)
        name = f"{size[0]}x{size[1]}"
        scores[name] = held_out_scores(torch_generator(model, encoder, decoder, tokenizer, here), here)
        _log(f"{name}: {json.dumps(scores[name])}")
    return scores


if __name__ == "__main__":
    typer.run(main)
