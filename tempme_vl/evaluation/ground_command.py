"""Text grounding in a video (`tempme-vl ground`)."""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import torch
from PIL import Image

from tempme_vl.command import above_zero, at_least
from tempme_vl.data.stills import is_still, read_still
from tempme_vl.data.transforms import VideoTransform
from tempme_vl.data.video import read_frames
from tempme_vl.evaluation.ground import Region, color, draw_regions, find_regions
from tempme_vl.evaluation.ground_options import GroundOptions
from tempme_vl.reports import finish, format_columns, write_whole
from tempme_vl.tasks.retrieval import AnyRetrievalModel, load_retrieval_model


def main(options: GroundOptions) -> None:
    at_least(1, regions=options.regions, side=options.side)
    above_zero(decode_timeout=options.decode_timeout)
    if options.out.suffix.lower() != ".png":
        raise ValueError(f"--out is the name of a picture, NAME.png; got {options.out}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_retrieval_model(options.checkpoint).to(device).eval()
    frames, times = read(options, model)
    video = VideoTransform(model.frontend.preprocessing, normalize=False)(frames).to(device)
    regions = find_regions(model, video, options.phrase, options.regions)
    shape = model.frontend.shape
    grid = shape.image_size // shape.patch_size
    picture = draw_regions(frames, regions, grid, options.side)
    report = {
        "video": str(options.video),
        "phrase": options.phrase,
        "checkpoint": str(options.checkpoint),
        "times": times.tolist(),
        "grid": [grid, grid],
        "regions": [vars(region) | {"color": color(number)} for number, region in enumerate(regions)],
    }
    write = partial(write_whole, options.out, as_png(picture))
    finish(shown(regions, options), report, options.out.with_suffix(".json"), write)


def read(options: GroundOptions, model: AnyRetrievalModel) -> tuple[np.ndarray, np.ndarray]:
    """The frames (F, S, S, 3) uint8 that the model sees, and their seconds (F,).

    Raises:
        VideoError: a file that cannot be read.
    """
    frames, fit = model.frontend.schedule.frames, model.frontend.preprocessing.fit
    if is_still(options.video):
        return read_still(options.video, frames, fit)
    found = read_frames(
        options.video,
        frames,
        sampling=model.input.sampling,
        start=options.start,
        end=options.end,
        timeout=options.decode_timeout,
        fit=fit,
    )
    return found.pixels, found.times


def as_png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def shown(regions: list[Region], options: GroundOptions) -> str:
    """A line a region, and where they are drawn."""
    lines = [
        {
            "token": str(region.token),
            "score": f"{region.score:.3f}",
            "patches": str(len(region.patches)),
            "frames": str(len({frame for frame, _, _ in region.patches})),
        }
        for region in regions
    ]
    return f"{options.phrase!r} in {options.video}\n{format_columns(lines)}\ndrawn in {options.out}"
