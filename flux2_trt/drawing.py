"""Drawing: the pictures that are made in one pass, as all that their cost depends on."""

from __future__ import annotations

from dataclasses import dataclass

from flux2_trt.errors import UsageError
from flux2_trt.images import check_size
from flux2_trt.spec import ModelSpec

MEGAPIXEL = 1024 * 1024
MAX_STEPS = 100  # rows of the tables that plans are built for
DEFAULT_TEXT_TOKENS = 512  # of a model that takes prompt embeds, and does not say how many


@dataclass(frozen=True)
class Drawing:
    """`batch` pictures of `width` x `height` pixels, denoised together in `steps`.

    `references`: pixels of each reference picture, which all share; `text_tokens`: of each prompt; `guided`: each
    picture is denoised with and without its prompt, as classifier-free guidance wants.
    """

    width: int
    height: int
    batch: int
    references: tuple[int, ...]
    text_tokens: int
    steps: int
    guided: bool
    pixels_per_token: int

    @property
    def pixels(self) -> int:
        return self.width * self.height

    @property
    def image_tokens(self) -> int:
        return self.pixels // self.pixels_per_token**2

    @property
    def latent_tokens(self) -> int:
        """Of a picture and its references."""
        return self.image_tokens + sum(pixels // self.pixels_per_token**2 for pixels in self.references)

    @property
    def all_tokens(self) -> int:
        return self.latent_tokens + self.text_tokens

    @property
    def sequences(self) -> int:
        """Rows of the transformer's batch."""
        return self.batch * (2 if self.guided else 1)

    @staticmethod
    def of(
        spec: ModelSpec,
        width: int | None = None,
        height: int | None = None,
        batch: int = 1,
        num_references: int = 0,
        steps: int | None = None,
        text_tokens: int | None = None,
    ) -> Drawing:
        """The model's defaults for what is None; references of 1 MP, or of the model's limit where that is less.

        Raises UsageError for what the model does not draw.
        """
        sampling = spec.sampling
        width = sampling.width if width is None else width
        height = sampling.height if height is None else height
        check_size(width, height, sampling, spec.autoencoder.pixels_per_token)
        steps = sampling.num_inference_steps if steps is None else steps
        if not 1 <= steps <= MAX_STEPS:
            raise UsageError(f"--steps is {steps}; it is from 1 to {MAX_STEPS}")
        for name, value, least in (("batch", batch, 1), ("num-references", num_references, 0)):
            if value < least:
                raise UsageError(f"--{name} is {value}; it is at least {least}")
        longest = spec.prompt.max_length if spec.prompt else DEFAULT_TEXT_TOKENS
        return Drawing(
            width=width,
            height=height,
            batch=batch,
            references=(min(MEGAPIXEL, sampling.max_reference_area or MEGAPIXEL),) * num_references,
            text_tokens=longest if text_tokens is None else text_tokens,
            steps=steps,
            guided=sampling.guidance_kind == "classifier_free" and sampling.guidance_scale > 1.0,
            pixels_per_token=spec.autoencoder.pixels_per_token,
        )
