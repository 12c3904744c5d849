"""A retrieval checkpoint as a model of sentence-transformers: texts, pictures and videos in, normalised vectors out.

All imports of sentence-transformers are here; how it calls a module of several modalities is read off version 6.2.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality_types import Modality
from sentence_transformers.base.modules import InputModule
from sentence_transformers.util import load_dir_path

from tempme_vl.data.splits import VIDEO_EXTENSIONS
from tempme_vl.data.stills import STILLS
from tempme_vl.hub import find_folder
from tempme_vl.search.embed import Embedder, Query
from tempme_vl.search.query_files import query_of_file

_ENDINGS = (*VIDEO_EXTENSIONS, *STILLS)


class TempMeModule(InputModule):
    """The only module of a `SentenceTransformer`; `load` makes both.

    An input is a text; the path of a video or picture, as a Path or as a str that ends like one and names a file; or a
    picture of Pillow. Each is embedded by itself, as `tempme_vl.search.Embedder.query` does it; sentence-transformers
    refuses texts, pictures and videos in one call of `encode`.

    Args:
        checkpoint: folder of a retrieval model, or its name on the Hugging Face hub.
        device: where it stays; default: a GPU where there is one.

    Raises:
        ValueError: see `Embedder.from_pretrained`.
    """

    save_in_root = False  # where sentence-transformers writes a card of its own

    def __init__(self, checkpoint: str, device: str | None = None):
        super().__init__()
        self.checkpoint = checkpoint
        self.embedder = Embedder.from_pretrained(checkpoint, device)

    @property
    def modalities(self) -> list[Modality]:
        """What it takes."""
        return ["text", "image", "video"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """The inputs as queries; a prompt stands in front of texts.

        Raises:
            ValueError: a picture that cannot be read, or an input of another kind.
        """
        queries = [query_of(one) for one in inputs]
        return {"queries": [prompt + one if prompt and isinstance(one, str) else one for one in queries]}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds "sentence_embedding", (N, E) float32 on the CPU, L2-normalised.

        Raises:
            VideoError: a video that cannot be read.
        """
        vectors = [self.embedder.query(query).vector for query in features["queries"]]
        return {**features, "sentence_embedding": torch.from_numpy(np.stack(vectors))}

    def get_embedding_dimension(self) -> int:
        """E."""
        return self.embedder.width

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Copies the checkpoint's folder."""
        shutil.copytree(find_folder(self.checkpoint), output_path, dirs_exist_ok=True)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> TempMeModule:
        """What `save` copied."""
        hub = token, cache_folder, revision, local_files_only
        return cls(str(load_dir_path(model_name_or_path, subfolder, *hub)))


def load(checkpoint: str | Path, device: str | None = None) -> SentenceTransformer:
    """A checkpoint whose `encode` gives (N, E) float32, L2-normalised, and whose `similarity` is the cosine.

    Arguments and errors as in `TempMeModule`.
    """
    module = TempMeModule(str(checkpoint), device)
    return SentenceTransformer(modules=[module], device=str(module.embedder.device), similarity_fn_name="cosine")


def query_of(given: Any) -> Query:
    """A str that names a file of a video or picture is that file. Raises ValueError for an unreadable picture."""
    if isinstance(given, str) and not (given.lower().endswith(_ENDINGS) and Path(given).is_file()):
        return given
    if isinstance(given, str | Path):
        return query_of_file(Path(given))
    query: Query = given  # the model says what else it takes
    return query
