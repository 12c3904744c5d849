"""A retrieval checkpoint as an index uses it: one vector a segment or query, and merged tokens in the space of texts.

Letters: B segments, F frames of N0 input tokens (CLS first), M merged tokens, D their width in the tower, L words, E
embedding width.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tempme_vl.data.splits import Video
from tempme_vl.data.transforms import VideoTransform
from tempme_vl.hub import find_folder
from tempme_vl.manifest import CARD_FILE, MANIFEST_FILE, READ
from tempme_vl.pipeline import VideoRetrieval
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import read_json
from tempme_vl.search.matching import text_parts
from tempme_vl.search.tracing import attention_of_cls, traced
from tempme_vl.tasks.retrieval import MatchingRetrievalModel
from tempme_vl.tasks.similarity.base import token_embeddings
from tempme_vl.tasks.similarity.max_sim import MaxSimHead

Query = str | Path | Video | Image.Image
"""A text; a video file or a part of one, `Video(name, path, start, end)`; or a picture of Pillow."""


class Embedded(NamedTuple):
    """Segments, on the CPU.

    Attributes:
        vectors: (B, E) float32, L2-normalised.
        tokens: (B, M, E) float32, L2-normalised; None of a tower whose single tokens are not in the space of texts.
        source: (B, F, N0) int64, the merged token that holds each input token, -1 for none.
        attention: (B, M) float32, how much the CLS tokens looked at each token (`attention_of_cls`); None of a tower
            that does not pool by them.
        fusion: (B, M, D) float32, the tokens as the model's fusion layers take them; None of a model without these.
    """

    vectors: np.ndarray
    tokens: np.ndarray | None
    source: np.ndarray
    attention: np.ndarray | None
    fusion: np.ndarray | None


class EmbeddedQuery(NamedTuple):
    """A query, on the CPU.

    Attributes:
        vector: (E,) float32, L2-normalised.
        parts: (L, E) float32, L2-normalised: what looks for its nearest merged token. A text's words where the model's
            head compares these, else the text itself; a video's merged tokens. None where there are none to find.
        trained: whether the head was trained to compare these parts with tokens.
        of_cls: whether it was trained to compare the parts with CLS tokens alone, which a merged token has a part in by
            the attention it gets.
        fusion: of a text what fusion layers read, (1, L, D of the text's tower) or its ids (1, L), and the mask of its
            words (1, L), on the model's device; None of anything else, and of a model without these layers.
    """

    vector: np.ndarray
    parts: np.ndarray | None
    trained: bool = False
    of_cls: bool = False
    fusion: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Layout:
    """What merged tokens stand for: F frames of `prefix` tokens and `grid` x `grid` patches, row by row.

    Attributes:
        resize: "shortest", the patches cover a frame's central square; "squash", they cover all of it.
    """

    frames: int
    prefix: int
    grid: int
    resize: str

    @property
    def tokens(self) -> int:
        """N0."""
        return self.prefix + self.grid**2


class Embedder:
    """A retrieval model with what reads its videos and texts.

    Args:
        retrieval: the model.
        fingerprint: of the folder it comes from, see `fingerprint`.
        source: that folder, or its name on the Hugging Face hub.
    """

    def __init__(self, retrieval: VideoRetrieval, fingerprint: str, source: str):
        self.retrieval, self.fingerprint, self.source = retrieval, fingerprint, source
        self.model, self.device = retrieval.model, retrieval.device
        self._alone = threading.Lock()  # one trace at a time, whichever thread asks
        frontend = self.model.frontend
        self.transform: VideoTransform = retrieval.reader.transform
        self.sampling: str = self.model.input.sampling
        self.width = frontend.shape.embed_dim
        shape = frontend.shape
        grid = shape.image_size // shape.patch_size
        self.layout = Layout(frontend.schedule.frames, shape.num_prefix, grid, self.transform.preprocess.resize)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: str | torch.device | None = None, timeout: float | None = 60.0
    ) -> Embedder:
        """Reads the folder of a retrieval model, or of one on the Hugging Face hub.

        Args:
            device: default: a GPU where there is one.
            timeout: seconds that decoding a query may take.

        Raises:
            ValueError: see `VideoRetrieval.from_pretrained`.
        """
        folder = find_folder(source)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        local = str(Path(folder).resolve()) if Path(source).is_dir() else str(source)
        return cls(VideoRetrieval.from_pretrained(folder, device, timeout), fingerprint(folder), local)

    @property
    def has_tokens(self) -> bool:
        """Whether single merged tokens are in the space of texts."""
        return self.model.frontend.shape.pooling != "attention"

    @property
    def fusion_width(self) -> int | None:
        """D, of tokens as the fusion layers take them; None of a model without these."""
        return self.model.frontend.shape.width if isinstance(self.model, MatchingRetrievalModel) else None

    def __repr__(self) -> str:
        return f"Embedder({self.retrieval!r}, {self.fingerprint[:12]})"

    @torch.inference_mode()
    def videos(self, video: Tensor) -> Embedded:
        """Embeds (B, F, 3, S, S) uint8, or normalised."""
        batch = {"video": video.to(self.device), "frame_mask": torch.ones(video.shape[:2], device=self.device)}
        with self._alone, traced(self.model.frontend) as trace:
            features = self.model(batch)
        (output,) = trace.outputs
        tokens = None
        if self.has_tokens:
            tokens = _numpy(F.normalize(token_embeddings(self.model.frontend, output), dim=-1))
        assert output.source is not None
        shape = self.model.frontend.shape
        attention = _numpy(attention_of_cls(trace, shape.num_prefix)) if shape.pooling == "cls" else None
        fusion = None if self.fusion_width is None else _numpy(features["tokens"])
        vectors = _numpy(_mean(features["video"].float()))
        return Embedded(vectors, tokens, self._by_frame(output.source), attention, fusion)

    @torch.inference_mode()
    def in_texts(self, fusion: np.ndarray) -> np.ndarray:
        """(M, D) tokens as fusion layers take them -> (M, E), L2-normalised, in the space of texts."""
        tokens = torch.from_numpy(fusion).to(self.device)
        return _numpy(F.normalize(at_least_float32(self.model.frontend.head(tokens)), dim=-1))

    def query(self, query: Query) -> EmbeddedQuery:
        """Embeds what is looked for.

        Raises:
            VideoError: a file that cannot be read.
            ValueError: an empty text, or something else.
        """
        if isinstance(query, str):
            return self.text(query)
        embedded = self.videos(self.frames_of(query)[None])
        return EmbeddedQuery(embedded.vectors[0], None if embedded.tokens is None else embedded.tokens[0])

    def frames_of(self, shown: Path | Video | Image.Image) -> Tensor:
        """(F, 3, S, S), the frames of a video, or a picture as often. Raises as `query`."""
        if isinstance(shown, Image.Image):
            picture = np.asarray(shown.convert("RGB"))
            return self.transform(picture[None]).expand(self.layout.frames, -1, -1, -1)
        if isinstance(shown, Path | Video):
            return self.retrieval.reader(shown if isinstance(shown, Video) else Video(shown.name, shown)).video
        raise ValueError(f"expected a text, a picture of Pillow, a Path or a Video; got {type(shown).__name__}")

    def text(self, text: str) -> EmbeddedQuery:
        """Embeds a text. Raises ValueError for an empty one."""
        if not text.strip():
            raise ValueError("expected a text to search for; got an empty one")
        of_cls = self.model.frontend.shape.pooling == "cls"
        if isinstance(self.model, MatchingRetrievalModel):
            encoded = text_parts(self.model, *self.retrieval.tokenizer(text), self.device)
            own = _numpy(_mean(encoded["text"]))
            first, second = self.model.fine_text_parts
            return EmbeddedQuery(own[0], own, of_cls=of_cls, fusion=(encoded[first], encoded[second]))
        found = self.retrieval.encode_text([text])
        if found.ndim == 2:
            vector = F.normalize(found, dim=-1)
            return EmbeddedQuery(vector[0].numpy(), vector.numpy() if self.has_tokens else None, of_cls=of_cls)
        words = found[0, self.retrieval.tokenizer(text)[1].bool()]
        head = self.retrieval.head
        vector = _mean(words[None])
        of_tokens = isinstance(head, MaxSimHead) and head.told.of == "tokens"
        parts = words if of_tokens else vector
        return EmbeddedQuery(
            vector[0].numpy(), parts.numpy() if self.has_tokens else None, of_tokens, of_cls and not of_tokens
        )

    def _by_frame(self, source: Tensor) -> np.ndarray:
        """(B, F, N0) of a trace, in which a tower of divided attention counts the prefix once."""
        frames, prefix, tokens = self.layout.frames, self.layout.prefix, self.layout.tokens
        if source.shape[1] != frames * tokens:
            shared = source[:, None, :prefix].expand(-1, frames, -1)
            source = torch.cat([shared, source[:, prefix:].unflatten(1, (frames, -1))], 2)
        return source.reshape(-1, frames, tokens).cpu().numpy()


def fingerprint(folder: str | Path) -> str:
    """SHA-256 of what makes a saved model: the hashes of all that is read of its folder, without the card.

    Those of its manifest where it has one, which loading the model compares with the files.
    """
    folder = Path(folder)
    if (folder / MANIFEST_FILE).exists():
        entries = read_json(folder / MANIFEST_FILE)["files"]
        hashes = {name: str(entry["sha256"]) for name, entry in entries.items()}
    else:
        names = sorted({path.name for pattern in READ for path in folder.glob(pattern)} - {MANIFEST_FILE})
        hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    hashes.pop(CARD_FILE, None)
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _mean(vectors: Tensor) -> Tensor:
    """(B, E), L2-normalised, of vectors (B, E), or of several of each, (B, K, E)."""
    return F.normalize(vectors if vectors.ndim == 2 else vectors.mean(1), dim=-1)


def _numpy(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
