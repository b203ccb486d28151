"""Make the built-in model: `python -m export.tiny.train`.

Autoencoder, text encoder, then the transformer over both, from one seed; the state is saved as it goes, and the same
command resumes after a stop. The result is written to `flux2_trt/assets/tiny` with its configuration and scores.
"""

from __future__ import annotations

import ctypes
import json
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
from export.tiny.config import TrainConfig
from export.tiny.dataset import vocabulary
from export.tiny.evaluate import held_out_scores, torch_generator
from export.tiny.flow import FlowTrainer
from export.tiny.reading import train_text_encoder
from export.tiny.tokenizer import build_tokenizer, save
from flux2_trt.models import published_spec
from flux2_trt.text import PromptTokenizer

ASSETS = Path(__file__).parents[2] / "flux2_trt" / "assets" / "tiny"
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


def _autoencoder(config: TrainConfig, path: Path, start: Path | None) -> tuple[VaeEncoder, VaeDecoder]:
    spec = published_spec("tiny").autoencoder
    encoder, decoder = VaeEncoder(spec), VaeDecoder(spec)
    if start:
        tensors = _read_half_precision(start / "autoencoder.safetensors")
        for half in (encoder, decoder):
            half.load_state_dict({name: tensors[name] for name in half.state_dict()})
        return encoder.eval(), decoder.eval()
    if not path.exists():
        trained = train_autoencoder(spec, config.autoencoder, config.seed, _log)
        _save_state({"encoder": trained[0].state_dict(), "decoder": trained[1].state_dict()}, path)
    state = torch.load(path, weights_only=True)
    encoder.load_state_dict(state["encoder"])
    decoder.load_state_dict(state["decoder"])
    return encoder.eval(), decoder.eval()


def _text_encoder(config: TrainConfig, path: Path, start: Path | None, tokenizer: PromptTokenizer) -> TextEncoder:
    spec = published_spec("tiny").text_encoder
    assert spec
    text_encoder = TextEncoder(spec)
    if start:
        text_encoder.load_state_dict(_read_half_precision(start / "text_encoder.safetensors"))
        return text_encoder.eval()
    if not path.exists():
        trained = train_text_encoder(spec, config.text, config.seed, tokenizer, _log)
        _save_state(trained.state_dict(), path)
    text_encoder.load_state_dict(torch.load(path, weights_only=True))
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
    assets: Annotated[Path, typer.Option(help="Where the finished model goes.")] = ASSETS,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes torch's default.")] = 0,
    start: Annotated[
        Path | None,
        typer.Option(help="Folder of a finished model to train further; its autoencoder and text encoder stay."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the flow model trains: cpu or cuda.")] = "cpu",
    count: Annotated[int, typer.Option(help="Held-out samples of every kind to score; 0 for none.")] = 100,
    stop: Annotated[int, typer.Option(help="Write the model as it is after so many steps; 0 trains to the end.")] = 0,
) -> None:
    """Train the built-in model, score it on held-out prompts and write it."""
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    config, spec = TrainConfig(), published_spec("tiny")
    assert spec.prompt
    work.mkdir(parents=True, exist_ok=True)
    assets.mkdir(parents=True, exist_ok=True)
    save(build_tokenizer(vocabulary()), assets / "tokenizer.json")
    tokenizer = PromptTokenizer.from_file(assets / "tokenizer.json", spec.prompt)
    encoder, decoder = _autoencoder(config, work / "autoencoder.pt", start)

    text_encoder = _text_encoder(config, work / "text_encoder.pt", start, tokenizer)

    trainer = FlowTrainer(spec, config.flow, config.seed, encoder.to(device), text_encoder, tokenizer)
    state_file = work / "flow.pt"
    if state_file.exists():
        trainer.load_state(torch.load(state_file, weights_only=True, map_location=device))
        _log(f"resuming at step {trainer.step}")
    elif start:
        trainer.start_from(_read_half_precision(start / "transformer.safetensors"))
    earlier = json.loads((start / "training.json").read_text(encoding="utf-8")) if start else None
    saved = time.monotonic()

    def save_sometimes(current: FlowTrainer) -> None:
        nonlocal saved
        if time.monotonic() - saved > SAVE_SECONDS or current.step in (stop, current.total_steps):
            _save_state(current.state(), state_file)
            saved = time.monotonic()

    trainer.run(_log, save_sometimes, stop or trainer.total_steps)

    model = trainer.averaged_model().to("cpu")
    encoder = encoder.to("cpu")
    _write_half_precision({**encoder.state_dict(), **decoder.state_dict()}, assets / "autoencoder.safetensors")
    _write_half_precision(dict(model.text_encoder.state_dict()), assets / "text_encoder.safetensors")
    _write_half_precision(
        {**model.conditioning.state_dict(), **model.transformer.state_dict()}, assets / "transformer.safetensors"
    )
    evaluation = replace(config.evaluation, count=count)
    generate = torch_generator(model, encoder, decoder, tokenizer, evaluation)
    scores = held_out_scores(generate, evaluation)
    _log(json.dumps(scores, indent=2))
    record = {
        "config": asdict(config),
        "flow_steps": trainer.step,
        "flow_steps_planned": trainer.total_steps,
        "flow_seconds": round(trainer.seconds),
        "samples_of_every_kind": count,
        "scores": scores,
        "started_from": earlier,
    }
    (assets / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
