"""What a visitor may ask for; an operator changes it by environment variables."""

from __future__ import annotations

import dataclasses
import os

from vretrver_hf.images import ImageLimits


@dataclasses.dataclass(frozen=True)
class Limits:
    """
    Bounds of the Space. Each is read from the environment variable of its name with `VRETRVER_` before it.

    Args:
        max_candidates (`int`, *optional*, defaults to 20):
            Most candidates.
        max_bytes (`int`, *optional*, defaults to 10 MiB):
            Most bytes of one picture. An upload may have as many of these as there may be pictures.
        max_request_bytes (`int`, *optional*, defaults to 32 MiB):
            Most bytes of any other request: those of programs hold their pictures.
        max_pixels (`int`, *optional*, defaults to 24,000,000):
            Most pixels that a picture declares.
        max_characters (`int`, *optional*, defaults to 2000):
            Most characters of one text.
        max_queue (`int`, *optional*, defaults to 32):
            Most runs that wait.
        concurrency (`int`, *optional*, defaults to 2):
            Runs at a time; they take turns on the model.
        deadline (`int`, *optional*, defaults to 60):
            Seconds that a run may take.
        keep_files (`int`, *optional*, defaults to 900):
            Seconds after which uploaded and written files are removed.
    """

    max_candidates: int = 20
    max_bytes: int = 10 * 2**20
    max_request_bytes: int = 32 * 2**20
    max_pixels: int = 24_000_000
    max_characters: int = 2000
    max_queue: int = 32
    concurrency: int = 2
    deadline: int = 60
    keep_files: int = 900

    @classmethod
    def from_environment(cls) -> Limits:
        """The bounds that the operator set, and else the defaults."""
        names = {field.name: f"VRETRVER_{field.name.upper()}" for field in dataclasses.fields(cls)}
        return cls(**{name: int(os.environ[variable]) for name, variable in names.items() if variable in os.environ})

    @property
    def max_upload_bytes(self) -> int:
        """Most bytes of an upload: the candidates' pictures, with 4 KiB of headers each."""
        return self.max_candidates * (self.max_bytes + 4096)

    @property
    def images(self) -> ImageLimits:
        return ImageLimits(max_bytes=self.max_bytes, max_pixels=self.max_pixels)
