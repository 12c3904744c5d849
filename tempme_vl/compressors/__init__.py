"""Compressors between a tower and a language model, and inside the latter. A new one is a file with a `Compressor`, and
a line in `tempme_vl.registries`; from outside the package `COMPRESSORS.register("name", COMPRESSOR)`, or an entry point
of the group "tempme_vl.compressors"."""

from __future__ import annotations

from tempme_vl.compressors.base import Clip, Compressor, FrameFeatures, KeptFeatures, by_frame, kept
from tempme_vl.registries import COMPRESSORS

__all__ = ["COMPRESSORS", "Clip", "Compressor", "FrameFeatures", "KeptFeatures", "by_frame", "kept"]
