"""A compressed model in the place of its host's processor: what calls a model with what its processor made, as do
pipelines and the server of transformers, needs to know nothing of the compression.

Texts go the way of the host's own processor. Videos go through the tower in here, and the model is given features.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL.Image import Image
from PIL.Image import open as open_image
from torch import nn
from transformers import BatchFeature, ProcessorMixin

from tempme_vl.integrations import Compressed, load_compressed
from tempme_vl.integrations.images import ImageInput
from tempme_vl.integrations.videos import VideoInput, read_sampled, without_start
from tempme_vl.manifest import write_manifest
from tempme_vl.messages import few
from tempme_vl.schema import read_json

Message: TypeAlias = Mapping[str, Any]  # role, and content: a text, or parts of type text, video or image

CODE_FILE, SETTINGS_FILE = "processing_tempme_vl.py", "processor_config.json"
_CODE = "from tempme_vl.integrations.processor import CompressedProcessor\n"
_URLS = ("data:", "file://", "http://", "https://")
# of calls to processors: how a batch is made and which frames are read is the compression's own
_NO_MEANING = frozenset({"padding", "return_tensors", "num_frames", "load_audio_from_video", "processor_kwargs"})


class CompressedProcessor(ProcessorMixin):
    """Stands in the place of a host's processor; what is not here is the host's own, such as `tokenizer`.

    Args:
        compressed: its model, or another one with the same weights, is given what this makes.

    Raises:
        ValueError: a host whose `generate` takes no features beside ids of words, which these callers rely on, or a
            method that works inside the language model, which they run without it.
    """

    def __init__(self, compressed: Compressed):
        if compressed.feed != "encoder_outputs":
            raise ValueError(
                f"{type(compressed.host.model).__name__} of this transformers is given features among inputs_embeds, "
                "and pipelines and servers want ids of words beside them: update transformers (5.18 and newer has a "
                "way for most hosts), or call compressed.answer(...)"
            )
        if compressed.inside is not None:
            raise ValueError(
                f"method {compressed.host.method!r} works between the layers of the language model, and pipelines and "
                "servers run that model without it: call compressed.answer(...), or take a method that works before it"
            )
        self.compressed = compressed

    def __getattr__(self, name: str) -> Any:
        if name == "compressed":  # asked for while a copy is made, before it is there
            raise AttributeError(name)
        return getattr(self._own, name)

    @property
    def _own(self) -> Any:
        return self.compressed.host.processor

    def __repr__(self) -> str:
        return f"CompressedProcessor({self.compressed!r})"

    @torch.no_grad()
    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput | Sequence[ImageInput]] | None = None,
        text: str | Sequence[str] = "",
        videos: VideoInput | Sequence[VideoInput | Sequence[VideoInput]] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Inputs for the model's `generate`.

        Args:
            images, text, videos: see `Compressed.prepare`.
            options: what transformers passes on padding and frames, which the compression decides.

        Raises:
            ValueError: other options; or see `Compressed.prepare`.
        """
        if unknown := set(options) - _NO_MEANING:
            raise ValueError(
                f"a compressed model's processor has no {few(sorted(unknown))}: frames and their size are chosen by "
                "compress(...)"
            )
        shown: Any = () if videos is None else [videos] if isinstance(videos, (str, Path)) else videos
        pictures: Any = [images] if isinstance(images, Image) else images
        return self.compressed.prepare(text, shown, images=pictures or None)

    def apply_chat_template(  # type: ignore[override]  # fewer of its options have a meaning
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        tokenize: bool = False,
        return_dict: bool = False,
        **options: Any,
    ) -> Any:
        """A chat as the host's template writes it, or with tokenize the inputs for the model's `generate`.

        Args:
            conversation: messages, or several such lists. A part {"type": "video"} has the video as "video", "path" or
                "url": pixels, or a file's path, or its bytes as a data: URL; an image likewise.
            options: of the template, such as add_generation_prompt; and see `__call__`.

        Raises:
            ValueError: a video that is to be fetched from elsewhere; inputs without return_dict; or see `__call__`.
        """
        single = isinstance(conversation[0], Mapping)
        chats: Any = [conversation] if single else conversation
        written = {name: value for name, value in options.items() if name not in _NO_MEANING}
        tokenizer = self.compressed.tokenizer
        texts = [self._own.apply_chat_template(chat, tokenize=False, **written) for chat in chats]
        if not tokenize:
            return texts[0] if single else texts
        if not return_dict:
            raise ValueError("a compressed model is given more than ids of words: expected return_dict=True")
        images = [[_image(_shown(part, "image")) for part in _parts(chat, "image")] for chat in chats]
        videos = [[self._video(_shown(part, "video")) for part in _parts(chat, "video")] for chat in chats]
        return self(images if any(images) else None, [without_start(text, tokenizer) for text in texts], videos)

    def _video(self, given: Any) -> VideoInput:
        found = _local(given, "video")
        if not isinstance(found, bytes):
            return found
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "video"
            file.write_bytes(found)
            return read_sampled(file, self.compressed.host.num_frames)

    def save_pretrained(self, directory: str | Path) -> None:  # type: ignore[override]  # nothing goes to the hub
        """Into the folder of `Compressed.save_pretrained`: transformers.AutoProcessor.from_pretrained with
        trust_remote_code=True, as its server loads it, gives this class from then on."""
        self._own.save_pretrained(directory)
        file = Path(directory) / SETTINGS_FILE
        where = f"{CODE_FILE.removesuffix('.py')}.{type(self).__name__}"
        settings = {**read_json(file), "auto_map": {"AutoProcessor": where}}
        file.write_text(json.dumps(settings, indent=2) + "\n")
        (Path(directory) / CODE_FILE).write_text(_CODE)
        write_manifest(directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # options go by name
        cls, directory: str | Path, **options: Any
    ) -> CompressedProcessor:
        """Of a folder by `Compressed.save_pretrained`, without the layers of its language model: a model of its own is
        loaded beside it.

        Args:
            options: of the hub, see `load_compressed`; what else transformers passes has no meaning here.
        """
        known = ("revision", "token", "cache_dir", "local_files_only")  # no code of the folder: that is this class
        compressed = load_compressed(directory, **{name: options[name] for name in known if options.get(name)})
        compressed.host.language_model.layers = nn.ModuleList()
        return cls(compressed)

    # a processor of transformers has these, which the host's own may do in another way

    def decode(self, *given: Any, **options: Any) -> Any:
        """As the host's own processor."""
        return self._own.decode(*given, **options)

    def batch_decode(self, *given: Any, **options: Any) -> Any:
        """As the host's own processor."""
        return self._own.batch_decode(*given, **options)

    def post_process_image_text_to_text(self, *given: Any, **options: Any) -> Any:
        """As the host's own processor."""
        return self._own.post_process_image_text_to_text(*given, **options)


def _image(given: Any) -> ImageInput:
    found = _local(given, "image")
    if isinstance(found, bytes):
        found = io.BytesIO(found)
    return open_image(found) if isinstance(found, (str, Path, io.BytesIO)) else found


def _local(given: Any, kind: str) -> Any:
    """What a part shows: the bytes that a data: URL holds, else a file's path or pixels.

    Raises:
        ValueError: something that is to be fetched from elsewhere, or no base64.
    """
    if not isinstance(given, str) or not given.startswith(_URLS):
        return given
    if given.startswith("file://"):
        return given.removeprefix("file://")
    start, _, coded = given.partition(";base64,")
    if not start.startswith("data:"):
        raise ValueError(f"expected a path, or the {kind} as a data: URL; got {given[:80]!r}: get it first")
    try:
        return base64.b64decode(coded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"expected the {kind} as base64 in a data: URL; got {given[:80]!r}: {error}") from error


def _parts(chat: Sequence[Message], kind: str) -> Iterator[Message]:
    for message in chat:
        if not isinstance(message["content"], str):
            yield from (part for part in message["content"] if part.get("type") == kind)


def _shown(part: Message, kind: str) -> Any:
    """Raises:
    ValueError: a part that shows nothing.
    """
    found = next((part[name] for name in (kind, "path", "url") if part.get(name) is not None), None)
    if found is None:
        raise ValueError(f"expected a part of type {kind!r} with {kind!r}, 'path' or 'url'; got {dict(part)}")
    return found
