"""A compressed video-language model as lmms-eval wants it: requests in, answers or losses out, in batches.

All imports of the harness are here; what a request holds is read off version 0.7.3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import BatchFeature

from tempme_vl.integrations import SampledVideo
from tempme_vl.integrations.compressed import IGNORED
from tempme_vl.integrations.videos import read_sampled, without_start
from tempme_vl.libraries import undocumented
from tempme_vl.lmms_eval.arguments import cut, generation_options, load, video_of

with undocumented("lmms-eval"):
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms

_read = lru_cache(maxsize=4)(read_sampled)  # the choices of a question ask for the same video one after the other


class Request(Protocol):
    """What the harness asks, its `Instance`: the arguments depend on the kind of request."""

    args: tuple[Any, ...]


class TempMe(lmms):
    """lmms-eval's model `tempme_vl`; its arguments are those of `--model_args`.

    Args:
        pretrained: a folder that `Compressed.save_pretrained` wrote, or a host model: a folder or a name on the hub.
        batch_size: requests at a time.
        device: by default, and with several ranks, the one that accelerate gives this rank.
        dtype: as in `from_pretrained`.
        prompt: with {video} (for images, too) and {text}, and \\n for a new line; by default the processor's chat
            template.
        sampling: how frames are chosen; a name in `tempme_vl.data.sampling.SAMPLING`. "uniform" is what the harness's
            own models do.
        timeout: seconds that decoding a video may take.
        trust_remote_code: whether transformers may run code of the folder.
        options: of `compress` for a host model: method, num_frames, r, merge_layers=16/18/20, ...

    Raises:
        ValueError: options for a model that is compressed already, ones that do not fit the host, or no prompt where
            the processor has no chat template.
    """

    is_simple = True  # the harness's plain interface: the chat one knows no multiple choice by losses

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        prompt: str | None = None,
        sampling: str = "uniform",
        timeout: float = 60.0,
        trust_remote_code: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        alone = self._world_size == 1
        self.device = torch.device(device) if device and alone else self.accelerator.device
        self.batch_size = int(batch_size)
        self.compressed = load(pretrained, self.device, dtype, options, trust_remote_code)
        host = self.compressed.host
        if prompt is None and not getattr(host.processor, "chat_template", None):
            raise ValueError(
                f"the processor of {pretrained} has no chat template: say how a prompt looks, such as "
                "prompt=USER: {video}\\n{text} ASSISTANT:"
            )
        self.prompt = prompt and prompt.replace("\\n", "\n")
        self.sampling, self.timeout = sampling, timeout

    def generate_until(self, requests: list[Request]) -> list[str]:
        """An answer for each request (context, generation kwargs, doc_to_visual, doc id, task, split)."""
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="tempme_vl") as bar, torch.no_grad():
            for group in alike.values():
                stops, options = generation_options(requests[group[0]].args[1])
                for rows, inputs in self._batches(requests, group):
                    ids = self.compressed.generate(**inputs, **options)
                    texts = self.compressed.tokenizer.batch_decode(ids, skip_special_tokens=True)
                    for row, text in zip(rows, texts, strict=True):
                        answers[row] = cut(text, stops)
                    bar.update(len(rows))
        return answers

    def loglikelihood(self, requests: list[Request]) -> list[GenerationResult]:
        """For each request (context, continuation, doc_to_visual, doc id, task, split) the mean loss of the
        continuation's tokens, and whether all of them are the likeliest.

        The harness takes the choice with the smallest number, whatever its base class says of likelihoods. And it makes
        text of a bare pair (0.7 to 0.7.3), which its multiple choice then cannot read; a GenerationResult keeps it.

        Raises:
            ValueError: a continuation without a token.
        """
        results: dict[int, GenerationResult] = {}
        ended = self.compressed.tokenizer.eos_token_id is not None
        with tqdm(total=len(requests), disable=self.rank != 0, desc="tempme_vl") as bar, torch.no_grad():
            for rows, inputs in self._batches(requests, range(len(requests)), labels=True):
                labels = inputs.pop("labels")[:, 1:]
                wanted = labels != IGNORED
                if ended:  # `prepare` puts an end behind each answer, which is no part of a continuation
                    wanted &= wanted.cumsum(1) < wanted.sum(1, keepdim=True)
                counts = wanted.sum(1).tolist()
                if 0 in counts:
                    empty = requests[rows[counts.index(0)]].args[1]
                    raise ValueError(f"expected a continuation of a token at least; got {empty!r}")
                logits = self.compressed(**inputs).logits[:, :-1][wanted].float()
                losses = cross_entropy(logits, labels[wanted], reduction="none").split(counts)
                greedy = (logits.argmax(-1) == labels[wanted]).split(counts)
                for row, loss, likeliest in zip(rows, losses, greedy, strict=True):
                    results[row] = GenerationResult((loss.mean().item(), bool(likeliest.all())))
                bar.update(len(rows))
        return [results[row] for row in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Request]) -> list[str]:
        raise NotImplementedError(
            "tempme_vl answers one question at a time: choose a task whose output_type is generate_until, "
            "multiple_choice or loglikelihood"
        )

    def clean(self) -> None:
        """Frees the model's memory, for a judge that the harness runs next."""
        del self.compressed
        super().clean()

    def _batches(
        self, requests: Sequence[Request], wanted: Sequence[int], labels: bool = False
    ) -> Iterator[tuple[list[int], BatchFeature]]:
        """Inputs of `batch_size` requests at a time, and which ones they are; with `labels` on the second argument."""
        for start in range(0, len(wanted), self.batch_size):
            rows = list(wanted[start : start + self.batch_size])
            prompts, videos, images, targets = [], [], [], []
            for context, answer, *where in (requests[row].args for row in rows):
                doc, visuals = self._document(*where)
                videos.append([self._video(visual) for visual in visuals if not isinstance(visual, Image)])
                images.append([visual for visual in visuals if isinstance(visual, Image)])
                prompts.append(self._prompt(context, visuals))
                targets.append(answer(doc) if callable(answer) else answer)
            some = images if any(images) else None  # not every host takes any
            yield rows, self.compressed.prepare(prompts, videos, targets if labels else False, images=some)

    def _document(
        self, doc_to_visual: Callable[..., Any] | None = None, doc_id: Any = None, task: str = "", split: str = ""
    ) -> tuple[Any, list[Any]]:
        """The document of a request, its videos and images; a continuation is also asked for alone, without either."""
        if doc_to_visual is None:
            return None, []
        doc = self.task_dict[task][split][doc_id]
        return doc, list(doc_to_visual(doc) or [])

    def _video(self, visual: object) -> SampledVideo:
        path, start, end = video_of(visual)
        return _read(path, self.compressed.host.num_frames, self.sampling, start, end, self.timeout)

    def _prompt(self, context: str, visuals: Sequence[object]) -> str:
        host = self.compressed.host
        places = {"video": host.placeholder, "image": host.image_placeholder or ""}
        kinds = ["image" if isinstance(visual, Image) else "video" for visual in visuals]
        if any(place and place in context for place in places.values()):  # the task says where
            kinds = []
        if self.prompt is not None:
            return self.prompt.format(video="".join(places[kind] for kind in kinds), text=context)
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": context}]
        chat = [{"role": "user", "content": content}]
        text = host.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return without_start(text, self.compressed.tokenizer)
