"""A retrieval checkpoint as a model of mteb: its tasks of texts, pictures and videos are run by name.

All imports of mteb are here; what its tasks hand over is read off version 2.26.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Video as VideoFeature
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import EncoderProtocol, ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import BatchedInput, PromptType
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader

from tempme_vl.data.splits import Video
from tempme_vl.hub import find_folder
from tempme_vl.search.embed import Embedder, fingerprint

TAKEN = ("video", "image", "text")


class TempMeEncoder(AbsEncoder):
    """What mteb calls; `load` makes it.

    Videos are read from their files by this package, with the frames that the model was trained with: torchcodec,
    through which mteb reads them, is not used.

    Args:
        model_name, revision: of the `ModelMeta`.
        device: default: a GPU where there is one.
        checkpoint: folder of a retrieval model, or its name on the Hugging Face hub.

    Raises:
        ValueError: see `Embedder.from_pretrained`.
    """

    mteb_model_meta: ModelMeta  # mteb sets it, too, where it loads the model

    def __init__(self, model_name: str, revision: str | None, *, device: str | None = None, checkpoint: str):
        self.name, self.revision = model_name, revision
        self.embedder = Embedder.from_pretrained(checkpoint, device)

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """(N, E) float32, L2-normalised, a row an input; other arguments than `inputs` change nothing.

        Args:
            inputs: batches with one of "text", "image" and "video": texts, pictures of Pillow, and a dataset's videos.

        Raises:
            ValueError: inputs of another kind or of two.
            VideoError: a video that cannot be read.
        """
        found = [self._embed(batch) for batch in as_files(inputs)]
        return np.concatenate(found) if found else np.empty((0, self.embedder.width), np.float32)

    def _embed(self, batch: Mapping[str, Any]) -> np.ndarray:
        kinds = [kind for kind in TAKEN if kind in batch]
        if len(kinds) != 1 or "audio" in batch:
            raise ValueError(f"expected one of {', '.join(TAKEN)}, each input by itself; got {', '.join(batch)}")
        (kind,) = kinds
        if kind == "text":
            return np.stack([self.embedder.text(text).vector for text in batch["text"]])
        read = self._picture if kind == "image" else self._video
        return self.embedder.videos(torch.stack([read(one) for one in batch[kind]])).vectors

    def _picture(self, picture: Image) -> Tensor:
        return self.embedder.frames_of(picture)

    def _video(self, video: Any) -> Tensor:
        """Of a path, or what datasets gives of a video that it does not decode: path and bytes."""
        if isinstance(video, str | Path):
            return self.embedder.frames_of(Path(video))
        if not isinstance(video, dict) or not (video.get("bytes") or video.get("path")):
            raise ValueError(
                f"expected videos as a column of datasets.Video, or their paths; got {type(video).__name__}"
            )
        if not video.get("bytes"):
            return self.embedder.frames_of(Path(video["path"]))
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            file.write(video["bytes"])
            file.flush()
            return self.embedder.frames_of(Video(str(video.get("path")), Path(file.name)))


def load(checkpoint: str | Path, name: str | None = None, device: str | None = None) -> TempMeEncoder:
    """A checkpoint for `mteb.evaluate(load("runs/x/best"), mteb.get_tasks(tasks=["MSVDT2VRetrieval"]))`.

    Arguments and errors as in `model_meta` and `TempMeEncoder`.
    """
    meta = model_meta(checkpoint, name)
    model = TempMeEncoder(str(meta.name), meta.revision, device=device, checkpoint=str(checkpoint))
    model.mteb_model_meta = meta
    return model


def model_meta(checkpoint: str | Path, name: str | None = None) -> ModelMeta:
    """What mteb knows of a checkpoint. Its own `load_model` asks for mteb's extra `video`, which `load` does not.

    Args:
        checkpoint: folder of a retrieval model, or its name on the Hugging Face hub.
        name: "organisation/model", under which mteb keeps results; default: "tempme_vl/" and the folder's name.

    Raises:
        ValueError: no such folder or name.
    """
    folder = Path(find_folder(checkpoint))
    return ModelMeta(
        loader=_load,
        loader_kwargs={"checkpoint": str(checkpoint)},
        name=name or f"tempme_vl/{folder.resolve().name}",
        revision=fingerprint(folder),
        release_date=None,
        languages=["eng-Latn"],
        n_parameters=None,
        memory_usage_mb=None,
        max_tokens=None,
        embed_dim=None,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        modalities=["text", "image", "video"],
    )


def as_files(inputs: DataLoader[BatchedInput]) -> DataLoader[BatchedInput]:
    """The same inputs, their videos as files that nobody has decoded."""
    dataset = inputs.dataset
    if not isinstance(dataset, Dataset) or not isinstance(dataset.features.get("video"), VideoFeature):
        return inputs
    # its type says which batches come out, and a dataset of datasets has rows of any kind
    plain: Any = dataset.cast_column("video", VideoFeature(decode=False))
    return DataLoader(plain, batch_size=inputs.batch_size, collate_fn=inputs.collate_fn, num_workers=inputs.num_workers)


def _load(name: str, revision: str | None, *, checkpoint: str, device: str | None = None) -> EncoderProtocol:
    return TempMeEncoder(name, revision, device=device, checkpoint=checkpoint)
