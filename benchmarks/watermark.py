"""What the watermark survives and what it costs, beside invisible-watermark's own encoder; its decoder reads both.

python -m benchmarks.watermark      # needs pip install -e '.[test]'
"""

from __future__ import annotations

import io
import json
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import skimage
import typer
from imwatermark import WatermarkDecoder, WatermarkEncoder
from numpy.typing import NDArray
from PIL import Image

from benchmarks.machine import machine
from flux2_trt.watermark import MESSAGE, embed

RESULTS = Path(__file__).parent / "results"
PHOTOGRAPHS = (
    "astronaut.png", "camera.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
DRAWINGS = 4  # in the first row of tiny.png, each of 192x192 pixels
SIDES = (256, 512, 1024)
Pixels = NDArray[np.uint8]


def library_embed(image: Pixels) -> Pixels:
    encoder = WatermarkEncoder()
    encoder.set_watermark("bits", MESSAGE)
    return np.ascontiguousarray(encoder.encode(np.ascontiguousarray(image[..., ::-1]), "dwtDct")[..., ::-1])


def bits_read(image: Pixels) -> int:
    bits = WatermarkDecoder("bits", len(MESSAGE)).decode(np.ascontiguousarray(image[..., ::-1]), "dwtDct")
    return int(np.sum(np.array(bits, int) == MESSAGE))


def saved(format: str, **choices: Any) -> Callable[[Pixels], Pixels]:
    def again(image: Pixels) -> Pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format, **choices)
        return np.asarray(Image.open(file).convert("RGB"))

    return again


def resized(image: Pixels) -> Pixels:
    size = (image.shape[1] * 3 // 4, image.shape[0] * 3 // 4)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


HARM: dict[str, Callable[[Pixels], Pixels]] = {
    "PNG, WebP lossless": saved("PNG"),
    "JPEG 100": saved("JPEG", quality=100, subsampling=0),
    "JPEG 95": saved("JPEG", quality=95, subsampling=0),
    "JPEG 90": saved("JPEG", quality=90, subsampling=0),
    "JPEG 85": saved("JPEG", quality=85, subsampling=0),
    "JPEG 75": saved("JPEG", quality=75, subsampling=0),
    "JPEG 95, chroma halved": saved("JPEG", quality=95, subsampling=2),
    "WebP 95": saved("WEBP", quality=95),
    "cut by 8 pixels": lambda image: image[8:, 8:],
    "resized to 3/4": resized,
}


def pictures(side: int) -> Iterator[tuple[str, Pixels]]:
    """Squares out of the middle of photographs that scikit-image ships, and drawings by tiny, enlarged."""
    for name in PHOTOGRAPHS:
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            photograph = image.convert("RGB")
        short = min(photograph.size)
        left, top = (photograph.width - short) // 2, (photograph.height - short) // 2
        yield name, _square(photograph.crop((left, top, left + short, top + short)), side)
    with Image.open(RESULTS / "tiny.png") as sheet:
        for index in range(DRAWINGS):
            left = 12 + 204 * index
            yield f"tiny {index}", _square(sheet.convert("RGB").crop((left, 12, left + 192, 204)), side)


def _square(image: Image.Image, side: int) -> Pixels:
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))


def survival(side: int) -> dict[str, Any]:
    """For every harm, on each picture, how many of the bits come back; and how far the pixels were moved."""
    encoders = {"ours": embed, "library": library_embed}
    bits: dict[str, dict[str, dict[str, int]]] = {harm: {name: {} for name in encoders} for harm in HARM}
    distance: dict[str, dict[str, float]] = {name: {} for name in encoders}
    for picture, image in pictures(side):
        for name, encoder in encoders.items():
            marked = encoder(image)
            error = np.mean((marked.astype(float) - image) ** 2)
            distance[name][picture] = round(10 * float(np.log10(255**2 / error)), 1)
            for harm, harmed in HARM.items():
                after = harmed(marked)
                if after.shape[0] * after.shape[1] >= 256 * 256:
                    bits[harm][name][picture] = bits_read(after)
    return {"side": side, "bits": len(MESSAGE), "psnr_db": distance, "bits_read": bits}


def cost(side: int, repeats: int) -> dict[str, Any]:
    """CPU seconds per megapixel of both encoders, interleaved; other work on the machine does not count."""
    image = next(image for _, image in pictures(side))
    seconds: dict[str, list[float]] = {"ours": [], "library": []}
    for _ in range(repeats):
        for name, encoder in (("ours", embed), ("library", library_embed)):
            started = time.process_time()
            encoder(image)
            seconds[name].append((time.process_time() - started) / (side * side / 1e6))
    return {"side": side, "median_cpu_seconds_per_megapixel": {n: statistics.median(v) for n, v in seconds.items()}}


def main(
    repeats: Annotated[int, typer.Option(help="Repetitions of every timing.")] = 7,
    output: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "watermark.json",
) -> None:
    """Measure, write the result and print it as a table."""
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "packages": {n: version(n) for n in ("invisible-watermark", "numpy", "pillow")} | {"opencv": cv2.__version__},
        "survival": [survival(side) for side in SIDES],
        "cost": [cost(side, repeats) for side in (512, 1024, 2048)],
    }
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for each in result["survival"]:
        print(f"{each['side']}x{each['side']}: pictures with all bits (lowest number of bits), ours and the library's")
        for harm, by_encoder in each["bits_read"].items():
            cells = [
                f"{sum(n == each['bits'] for n in found.values())} of {len(found)} ({min(found.values())})"
                for found in by_encoder.values()
                if found
            ]
            print(f"  {harm:24}" + "".join(f"{cell:16}" for cell in cells))
        print(
            "  PSNR   "
            + ", ".join(f"{n} {min(v.values())} to {max(v.values())} dB" for n, v in each["psnr_db"].items())
        )
    for each in result["cost"]:
        milliseconds = {n: f"{1000 * v:.0f} ms" for n, v in each["median_cpu_seconds_per_megapixel"].items()}
        print(f"{each['side']}x{each['side']}, CPU time per megapixel: {milliseconds}")


if __name__ == "__main__":
    typer.run(main)
