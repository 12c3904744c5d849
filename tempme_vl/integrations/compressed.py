"""`Compressed`: a video-language model beside itself, which reads few tokens of a video and is not changed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import BatchFeature

from tempme_vl.card import Card, may_write, write_card
from tempme_vl.hub import Shareable
from tempme_vl.integrations.base import Feed, Host, VisualTokens, joined
from tempme_vl.integrations.costs import cost_table, decoder_layers
from tempme_vl.integrations.devices import input_device
from tempme_vl.integrations.folder import card, facts, save_merging
from tempme_vl.integrations.generation import check_generation
from tempme_vl.integrations.images import ImageInput, as_image
from tempme_vl.integrations.layers import PLACES, InsideLayers
from tempme_vl.integrations.places import Visuals, by_modality, check_placed, check_places, video_places, with_images
from tempme_vl.integrations.stream import Stream
from tempme_vl.integrations.videos import FpsInput, SampledVideo, TimesInput, VideoInput, pair_up, tell_times
from tempme_vl.libraries import undocumented

IGNORED = -100  # the label of what counts in no loss, as transformers has it


class Counts(NamedTuple):
    """Visual tokens of one video: in the host's own way, and in ours; None where the method decides by the data."""

    native: int
    ours: int | None

    def __str__(self) -> str:
        ours = "a number that the method decides by the data" if self.ours is None else self.ours
        return f"{ours} of {self.native} visual tokens"


class Read(NamedTuple):
    """Tokens of a prompt that the language model reads: of its videos, and all of them.

    Where a method works between its layers, these are the means over the layers, rounded, once the prompt has run.
    """

    visual: int
    prompt: int


class Compressed(Shareable):
    """Makes inputs for a model out of prompts and videos. No module: what the model trains stays in the model.

    Attributes:
        read: tokens of each prompt that `prepare` made last, answers not counted.
        inside: what the method does between the layers of the language model, while `generate` or a call of this runs;
            None for nothing.

    Args:
        host: see `tempme_vl.integrations.base.Host`.
        model: the model as the user has it, perhaps in peft's wrapper.
        feed: how features reach the model: "encoder_outputs" as `mm_encoder_outputs` of its forward (transformers from
            5.18 on), "embeddings" among `inputs_embeds`. Default: the first that the model and the host have.

    Raises:
        ValueError: a way that is not there, a tokenizer whose placeholder is another token than the model's, or a
            method inside a language model whose layers cannot be given fewer tokens.
    """

    def __init__(self, host: Host, model: Any, feed: Feed | None = None):
        self.host, self.model = host, model
        possible = [way for way in host.feeds if way == "embeddings" or _takes_encoder_outputs(host.target)]
        if not possible or feed not in (None, *possible):
            raise ValueError(
                f"{type(host.model).__name__} of this transformers takes video features by {possible or 'no way'}; "
                f"expected one of {list(host.feeds)}, got feed={feed!r} (encoder_outputs: transformers 5.18 and newer)"
            )
        self.feed: Feed = feed or possible[0]
        self.tokenizer = host.processor.tokenizer
        self.read: tuple[Read, ...] = ()
        self._whole: tuple[Read, ...] = ()  # what goes into the first layer
        self.inside = InsideLayers.of(host)

    @property
    def merging(self) -> nn.ModuleDict:
        """Modules that merging adds (TempMe's clip positions), for an optimizer: the model does not know them."""
        return self.host.merging

    @property
    def placeholder(self) -> str:
        """What stands for a video in a prompt, such as "<video>"."""
        return self.host.placeholder

    @property
    def image_placeholder(self) -> str | None:
        """What stands for an image in a prompt, such as "<image>"; None where the host knows none."""
        return self.host.image_placeholder

    def __repr__(self) -> str:
        costs = self.host.costs()
        ours = "by the data" if costs.tokens is None else costs.tokens
        frames = f"{self.host.num_frames} frames, {ours} of the host's {costs.native_tokens} tokens"
        return f"Compressed({type(self.host.model).__name__}, {self.host.method}: {frames}, by {self.feed})"

    def counts(self, frame: tuple[int, int] | None = None) -> Counts:
        """Visual tokens of a video: the host's own, and ours. Computed, without running the model.

        Args:
            frame: height and width in pixels of the frames that come in, where the host keeps their size; default:
                usual ones.

        Returns:
            (native, ours); ours is None where the method decides by the data, and then its text says so.
        """
        costs = self.host.costs(frame)
        return Counts(costs.native_tokens, costs.tokens)

    def describe(self) -> str:
        """Tokens and costs of one video: the host's own and ours."""
        return cost_table(self.host)

    @undocumented("transformers")
    def stream(self, fps: float | None = None) -> Stream:
        """A video that is encoded while its frames come in, for `prepare` in the place of a video.

        Args:
            fps: frames a second, for hosts that are told times, if `Stream.add` is not told times.

        Raises:
            ValueError: a host or method that knows no token of a video before its end.
        """
        return Stream(self.host, fps)

    @undocumented("transformers")
    def prepare(
        self,
        text: str | Sequence[str],
        videos: str | Path | Sequence[VideoInput | Stream | Sequence[VideoInput | Stream]] = (),
        labels: bool | Sequence[str] = False,
        fps: FpsInput = None,
        times: TimesInput = None,
        images: Image | Sequence[ImageInput | Sequence[ImageInput]] | None = None,
    ) -> BatchFeature:
        """Inputs for `generate` and forward of the model, on its device.

        The tower runs here, with gradients as usual in torch: call it under `torch.no_grad()` to answer questions.
        Use the result once: beam search expands it in place.

        Args:
            text: prompts with the host's placeholders for every video, such as "<video>", and for every image
                (`image_placeholder`).
            videos: a list of videos a prompt (or one video for every placeholder). Each is a file's path, of which
                `num_frames` frames are read, from the first to the last, as lmms-eval's models read them; or what
                `tempme_vl.read_video` gave, where other frames are wanted; or uint8 frames (T, H, W, 3) or
                (T, 3, H, W), of which `num_frames` are taken evenly; T may be less. Or `SampledVideo`s, whose frames
                were chosen already and know their times. Or what `stream` gave, with what was added so far.
            labels: True for labels on all words of the prompts; or for each prompt its answer, which is put behind it
                with an end token and alone has labels. Else prompts are padded on the left, for generation.
            fps: frames a second of the frames given, for hosts that are told times (`Host.uses_time`): a number for
                all videos, or one for each, in order or in a list a prompt. Untold, 24 are assumed with a warning, as
                these hosts' own processors do. Files, and what `read_video` gave, tell their times; None stands for
                them in a list.
            times: in place of fps the seconds of the frames given: T for each video, in order or in a list a prompt.
            images: a list of images a prompt (or one image for every placeholder): of PIL, or uint8 pixels (H, W, 3) or
                (3, H, W). They go the host's own way, through its processor and tower, and nothing of them merges.

        Returns:
            input_ids and mm_encoder_outputs, or inputs_embeds; attention_mask, labels if wanted, and what the host
            needs besides, such as position_ids; visual_places for a method that works inside the language model, which
            only `generate` and calls of this object read.

        Raises:
            VideoError: a file that cannot be read.
            ValueError: not one video or image for every placeholder, videos or images in another form, images where
                the host takes none (`Host.check_images`), answers with an image's placeholder, both fps and times, or
                not one of them for each video, or one for a file.
        """
        prompts, groups = pair_up(text, videos, self.host.placeholder)
        pictures = self._pair_images(prompts, images, groups)
        tokens = self._encode(prompts, groups, fps, times)
        shown = [self.host.encode_images(group) if group else [] for group in pictures]
        place = self.host.image_placeholder
        written = [with_images(prompt, place, group) for prompt, group in zip(prompts, shown, strict=True)]
        rows = [self.host.input_ids(prompt, group) for prompt, group in zip(written, tokens, strict=True)]
        visual = [sum(len(video.features) for video in group) for group in tokens]
        self.read = self._whole = tuple(Read(count, len(row)) for count, row in zip(visual, rows, strict=True))
        unlabelled = [0] * len(rows)
        if labels and not isinstance(labels, bool):
            rows, unlabelled = self._append_answers(rows, labels)
        visuals = by_modality(self.host, prompts, tokens, shown)
        for of_one_kind in visuals.values():
            check_places(self.host, prompts, rows, of_one_kind)
        device = input_device(self.host.target.get_input_embeddings())
        side = self.tokenizer.padding_side if labels else "left"
        pad = next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)
        input_ids = _pad(rows, pad, side).to(device)
        mask = _pad([[1] * len(row) for row in rows], 0, side).to(device)
        inputs: dict[str, Any] = {"attention_mask": mask, **self.host.extra_inputs(input_ids, mask, tokens, shown)}
        if labels:
            target = [[IGNORED] * n + row[n:] for n, row in zip(unlabelled, rows, strict=True)]
            padded = _pad(target, IGNORED, side).to(device)
            for of_one_kind in visuals.values():
                padded = padded.masked_fill(input_ids == of_one_kind.token_id, IGNORED)
            inputs["labels"] = padded
        if self.inside is not None:
            check_placed(self.host, tokens)
            inputs[PLACES] = video_places(self.host, input_ids, visuals[self.host.modality])
            self.inside.counts = []
        self.host.remember(inputs)
        return BatchFeature({**inputs, **self._feed(input_ids, visuals)})

    def _pair_images(
        self,
        prompts: list[str],
        images: Image | Sequence[ImageInput | Sequence[ImageInput]] | None,
        videos: list[list[VideoInput | Stream]],
    ) -> list[list[Image]]:
        """The images of each prompt."""
        place = self.host.image_placeholder
        if images is None:
            if place and (found := [prompt for prompt in prompts if place in prompt]):
                raise ValueError(
                    f"{found[0][:80]!r} has a place for an image ({place!r}): give images=, one for each place"
                )
            return [[] for _ in prompts]
        if place is None:
            self.host.check_images(0)
        assert place is not None
        _, groups = pair_up(prompts, images, place, "image")
        for group, beside in zip(groups, videos, strict=True):
            if group:
                self.host.check_images(len(beside))
        return [[as_image(image) for image in group] for group in groups]

    def _encode(
        self, prompts: list[str], groups: list[list[VideoInput | Stream]], fps: FpsInput, times: TimesInput
    ) -> list[list[VisualTokens]]:
        streams = [video for group in groups for video in group if isinstance(video, Stream)]
        if any(stream.host is not self.host for stream in streams):
            raise ValueError("expected streams of this compressed model, as its stream() gives them; got another's")
        given = [[video for video in group if not isinstance(video, Stream)] for group in groups]
        sampled = tell_times(given, self.host.num_frames, fps, times)
        whole = [video for group in sampled for video in group]
        self._warn_untold([*whole, *(stream.video for stream in streams)])
        behind = [prompt for prompt, group in zip(prompts, sampled, strict=True) for _ in group]
        encoded = iter(self.host.encode(whole, behind) if whole else [])
        return [[video.finish() if isinstance(video, Stream) else next(encoded) for video in group] for group in groups]

    def _warn_untold(self, videos: Sequence[SampledVideo]) -> None:
        untold = sum(not video.is_timed for video in videos)
        if self.host.uses_time and untold:
            warnings.warn(
                f"{type(self.host.model).__name__} is told when frames were shown, and nobody said so of {untold} of "
                f"{len(videos)} videos: {self.host.assumed_fps:g} frames a second are assumed. Give fps= (of the "
                "frames as they are given) or times=",
                stacklevel=4,
            )

    def _append_answers(self, rows: list[list[int]], answers: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        if isinstance(answers, str) or len(answers) != len(rows):
            raise ValueError(f"expected an answer for each of {len(rows)} prompts; got labels={answers!r}")
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        place = self.host.image_placeholder
        if place and (found := [answer for answer in answers if place in answer]):
            raise ValueError(f"the answer {found[0][:80]!r} has a place for an image ({place!r}): expected words alone")
        behind = [self.tokenizer(answer, add_special_tokens=False)["input_ids"] + end for answer in answers]
        return [row + answer for row, answer in zip(rows, behind, strict=True)], [len(row) for row in rows]

    def _feed(self, input_ids: Tensor, visuals: Mapping[str, Visuals]) -> dict[str, Any]:
        visuals = {name: of_one_kind for name, of_one_kind in visuals.items() if of_one_kind.flat}
        if self.feed == "encoder_outputs":
            makers: dict[str, Any] = {"image": self.host.image_output, self.host.modality: self.host.encoder_output}
            outputs = {
                name: makers[name]([joined(group) for group in of_one_kind.groups if group])
                for name, of_one_kind in visuals.items()
            }
            return {"input_ids": input_ids, "mm_encoder_outputs": outputs}
        words = input_ids
        for of_one_kind in visuals.values():  # a placeholder may lie outside the table of words
            words = words.masked_fill(input_ids == of_one_kind.token_id, 0)
        embedded = self.host.target.get_input_embeddings()(words)
        for of_one_kind in visuals.values():
            features = torch.cat([visual.features for visual in of_one_kind.flat]).to(embedded)
            embedded = embedded.masked_scatter((input_ids == of_one_kind.token_id).unsqueeze(-1), features)
        return {"inputs_embeds": embedded}

    def __call__(self, **inputs: Any) -> Any:
        """The model's forward on what `prepare` gave; for most hosts and methods `model(**inputs)` is the same.

        Raises:
            ValueError: see `tempme_vl.integrations.layers.InsideLayers.running`.
        """
        with self._running(inputs) as given:
            return self._target(**given)

    @property
    def _target(self) -> Any:
        return self.model if self.host.target is self.host.model else self.host.target

    @contextmanager
    def _running(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What the model is given, and what happens inside it meanwhile."""
        if self.inside is None:
            yield dict(inputs)
            return
        with self.inside.running(inputs) as given:
            yield given
        mask = inputs.get("attention_mask")
        if PLACES in inputs and mask is not None and len(mask) == len(self._whole):
            pairs = zip(self._whole, mask.sum(1).tolist(), self.layer_tokens, strict=True)
            gone = [(read, length - sum(row) / len(row)) for read, length, row in pairs]
            self.read = tuple(Read(round(read.visual - less), round(read.prompt - less)) for read, less in gone)

    @property
    def layer_tokens(self) -> tuple[tuple[int, ...], ...]:
        """Of each prompt that was prepared last the tokens that each layer of the language model reads: where a method
        works between them, once the prompt has run."""
        if self.inside is not None and self.inside.counts:
            return tuple(map(tuple, self.inside.tokens(len(self._whole))))
        layers = len(decoder_layers(self.host))
        return tuple((read.prompt,) * layers for read in self._whole)

    def generate(self, **inputs: Any) -> Any:
        """New tokens after what `prepare` gave, without the prompt: (B * num_return_sequences, L) ids.

        With return_dict_in_generate=True what the model's `generate` gives, whose `sequences` are these ids.

        Raises:
            ValueError: see `tempme_vl.integrations.layers.InsideLayers.running`; no cache for a method that works
                inside the language model; or what this transformers mixes up (`check_generation`).
        """
        target = self._target
        check_generation(target, inputs)
        prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        self.host.remember(inputs)
        if "inputs_embeds" in inputs and next(target.parameters()).is_meta:  # offloaded
            # else transformers 4 makes ids of its own, where the weights are
            inputs["input_ids"] = inputs["attention_mask"][:, :0]
        if self.inside is not None:
            self.inside.check_generation(inputs)
        with self._running(inputs) as given:
            output = target.generate(**given)
        if isinstance(output, Tensor):
            return output[:, prompt:]
        output.sequences = output.sequences[:, prompt:]
        return output

    @torch.no_grad()
    def answer(
        self,
        text: str | Sequence[str],
        videos: str | Path | Sequence[VideoInput | Stream | Sequence[VideoInput | Stream]] = (),
        fps: FpsInput = None,
        times: TimesInput = None,
        images: Image | Sequence[ImageInput | Sequence[ImageInput]] | None = None,
        **options: Any,
    ) -> list[str]:
        """What the model writes behind the prompts.

        Args:
            text, videos, fps, times, images: see `prepare`.
            options: of the model's `generate`.
        """
        written = self.generate(**self.prepare(text, videos, fps=fps, times=times, images=images), **options)
        ids = written if isinstance(written, Tensor) else written.sequences
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def prompt_embeds(
        self,
        text: str | Sequence[str],
        videos: str | Path | Sequence[VideoInput | Sequence[VideoInput]] = (),
        fps: FpsInput = None,
        times: TimesInput = None,
        images: Image | Sequence[ImageInput | Sequence[ImageInput]] | None = None,
    ) -> list[Tensor]:
        """What the language model reads, for servers that take embeddings in place of words (docs/serving.md).

        Args:
            text, videos, fps, times, images: see `prepare`.

        Returns:
            (L, D_llm) of each prompt.

        Raises:
            ValueError: a language model that is told more than embeddings: positions of several axes, or features for
                deeper layers; or see `prepare`.
        """
        name = type(self.host.model).__name__
        if self.inside is not None:
            raise ValueError(
                f"method {self.host.method!r} works between the layers of the language model, where embeddings do not "
                "reach: serve the model whole"
            )
        if "embeddings" not in self.host.feeds:
            raise ValueError(
                f"{name} also has features for deeper layers, which embeddings do not carry: serve it whole"
            )
        inputs = Compressed(self.host, self.model, "embeddings").prepare(text, videos, False, fps, times, images)
        if more := set(inputs) - {"inputs_embeds", "attention_mask"}:
            raise ValueError(
                f"the language model of {name} is told {', '.join(sorted(more))} beside embeddings, and a server that "
                "takes embeddings would number them from 0 on: serve the model whole"
            )
        rows = zip(inputs["inputs_embeds"], inputs["attention_mask"].bool(), strict=True)
        return [embedded[seen] for embedded, seen in rows]

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the model and its processor as transformers does, tempme.json, the weights of `merging`, and
        README.md."""
        directory = Path(directory)
        free = may_write(directory)  # before peft writes a card
        self.model.save_pretrained(directory)
        self.host.processor.save_pretrained(directory)
        write_card(directory, self.card(), anyway=free)
        self.save_merging(directory)

    def card(self) -> Card:
        """What is known of it, for people (`tempme_vl.card`)."""
        return card(self.host)

    def facts(self) -> dict[str, str]:
        """Rows of a card: the host, what it is given, and what of that its language model reads."""
        return facts(self.host)

    def save_merging(self, directory: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes what belongs to the compression alone: tempme.json, and tempme.safetensors if anything was learnt.

        Args:
            state: weights of `merging`, where its own are partitioned (ZeRO-3) or half precision.
        """
        save_merging(self.host, Path(directory), state)


def _takes_encoder_outputs(model: nn.Module) -> bool:
    return "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters


def _pad(rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
    """Rows of numbers as one (B, L) int64 tensor."""
    length = max(len(row) for row in rows)
    filled = [[value] * (length - len(row)) for row in rows]
    both = zip(rows, filled, strict=True)
    return torch.tensor([[*fill, *row] if side == "left" else [*row, *fill] for row, fill in both])
