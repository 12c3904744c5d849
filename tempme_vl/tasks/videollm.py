"""A compressed video-language model as one module to fine-tune: what trains in it, its loss, its answers, its folder.

The module holds the host model, in peft's wrapper where LoRA is trained, and the clip positions, which are not among
the host's own weights. Prompts and videos become inputs inside its forward, so that everything that trains runs where
DeepSpeed expects it. Letters: B videos with a prompt each, F frames of S x S pixels.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BatchFeature, GenerationConfig

from tempme_vl.card import PLACE, Card, write_card
from tempme_vl.hub import Shareable, find_folder, is_hub_id, split_options
from tempme_vl.integrations import Compressed, Feed, Host, load_compressed, load_host
from tempme_vl.integrations.compressed import IGNORED
from tempme_vl.integrations.folder import read_config
from tempme_vl.integrations.videos import without_start
from tempme_vl.manifest import FolderError, check_manifest, errors_in, write_manifest
from tempme_vl.messages import few
from tempme_vl.precision import at_least_float32
from tempme_vl.pretrained import read_safetensors, read_settings, write_settings
from tempme_vl.schema import Size
from tempme_vl.tasks.inputs import VIDEOLLM_FILE, HostInput
from tempme_vl.tasks.losses import gather_rows
from tempme_vl.tasks.pretrained_lm import (
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    exact_buffers,
    has_adapter,
    read_adapter,
    set_grad_checkpointing,
)
from tempme_vl.tuning import Lora

PROMPT = "USER: {video}\n{question} ASSISTANT:"  # LLaVA's, for hosts without a chat template
CONFIG_FILE, TRAINED_FILE = VIDEOLLM_FILE, "trained.safetensors"


@dataclass(frozen=True)
class VideoLLMConfig:
    """videollm.json."""

    source: str
    prompt: str
    answer_tokens: Size
    input: HostInput
    feed: Feed


class VideoLLM(Shareable, nn.Module):
    """A compressed model that learns answers and writes them.

    Args:
        compressed: its model perhaps in peft's wrapper; what trains requires gradients already. Its settings for
            generation are replaced: answers are written greedily.
        prompt: text with {question} and the host's placeholder; default: `default_prompt`.
        answer_tokens: the most tokens of a written answer.
        source: name or folder of the host model, found again from there; needed only for saving.
        input: how frames were read in training.

    Raises:
        ValueError: a prompt without {question} or the placeholder once each.
    """

    def __init__(
        self,
        compressed: Compressed,
        prompt: str | None = None,
        answer_tokens: int = 8,
        source: str | None = None,
        input: HostInput | None = None,
    ):
        super().__init__()
        host = compressed.host
        self.prompt = default_prompt(host.processor, host.placeholder) if prompt is None else prompt
        for part in ("{question}", host.placeholder):
            if self.prompt.count(part) != 1:
                raise ValueError(f"expected a prompt with {part} once, as in {PROMPT!r}; got {self.prompt!r}")
        self.model, self.merging, self.compressed = compressed.model, compressed.merging, compressed
        self.answer_tokens, self.source, self.input = answer_tokens, source, input or HostInput()
        self._ends = _ends(host)
        # not the model's own, which may sample, and punish repetitions
        host.target.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=answer_tokens, eos_token_id=self._ends, pad_token_id=self._ends[0]
        )

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Learns or writes answers; the one way in under DeepSpeed.

        Args:
            batch: video (B, F, 3, S, S), pixels of 0 to 255 of any dtype; times (B, F), seconds of the frames, which
                hosts that are not told times (`Host.uses_time`) do without; prompt, B texts; to learn, answer, B texts.

        Returns:
            with answers: losses (B,), of each answer the mean of -log p over its tokens and the end token; else
            prediction (B, answer_tokens) int64, which `text` reads.

        Raises:
            ValueError: no times for a host that is told them.
        """
        if self.compressed.host.uses_time and "times" not in batch:
            raise ValueError(
                f"{type(self.compressed.host.model).__name__} is told when frames were shown: expected 'times' in the "
                f"batch, (B, F) seconds of the frames, as VideoReader gives them; got {', '.join(batch)}"
            )
        if "answer" in batch:
            return {"losses": self._losses(batch)}
        return {"prediction": self._write(batch)}

    def _inputs(self, batch: Mapping[str, Any], labels: bool | Sequence[str] = False) -> BatchFeature:
        videos = list(batch["video"].round().to(torch.uint8))
        return self.compressed.prepare(batch["prompt"], videos, labels, times=batch.get("times"))

    def _losses(self, batch: Mapping[str, Any]) -> Tensor:
        inputs = self._inputs(batch, labels=batch["answer"])
        labels = inputs.pop("labels")
        first = int((labels != IGNORED).any(dim=0).int().argmax())  # no answer begins before it
        kept = labels.shape[1] - first + 1  # a token is told by the position before it
        if "logits_to_keep" in inspect.signature(type(self.compressed.host.target).forward).parameters:
            inputs["logits_to_keep"] = kept
        # others give all positions
        logits = at_least_float32(self.compressed(**inputs, use_cache=False).logits[:, -kept:-1])
        wanted = labels[:, first:]
        losses = F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
        return losses.sum(dim=1) / (wanted != IGNORED).sum(dim=1)

    @torch.no_grad()
    def _write(self, batch: Mapping[str, Any]) -> Tensor:
        # under ZeRO-3 a rank gathers weights from all others in each step: all take as many as the slowest
        partitioned = hasattr(next(self.model.parameters()), "ds_id")
        written = self.compressed.generate(**self._inputs(batch), synced_gpus=partitioned)
        return F.pad(written, (0, self.answer_tokens - written.shape[1]), value=self._ends[0])

    def loss(self, features: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
        """The mean over the answers of all ranks whose videos were readable; 0 if none was.

        Args:
            features: what forward made of the batch.
            batch: valid (B,), 0 for unreadable videos.
        """
        valid = batch["valid"].bool()
        # DeepSpeed averages over ranks, which may hold unequal numbers of valid ones
        everywhere = gather_rows(valid.long())
        ranks = len(everywhere) // len(valid)
        return features["losses"].where(valid, 0.0).sum() * ranks / everywhere.sum().clamp(min=1)

    # ---- text

    def tokenize(self, question: str, answer: str | None = None, options: Sequence[str] = ()) -> dict[str, str]:
        """The prompt, which lists the options if there are any, and the answer to learn, as texts."""
        return _asked(self.prompt, question, answer, options)

    def tokenizer(self) -> Callable[..., dict[str, Any]]:
        """`tokenize` without the model: a loader's workers need no weights."""
        return partial(_asked, self.prompt)

    def text(self, prediction: Sequence[int]) -> str:
        """A row of `prediction`, up to the end token, as text; empty if nothing was written."""
        ids = list(prediction)
        end = next((place for place, token in enumerate(ids) if token in self._ends), len(ids))
        tokenizer = self.compressed.tokenizer
        return tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    # ---- training

    def is_new_parameter(self, name: str) -> bool:
        """Whether a parameter was in no pretrained model: LoRA and clip positions, which learn at their own rate."""
        return "lora_" in name or name.startswith("merging.")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks of tower and language model in the backward pass."""
        host = self.compressed.host
        host.set_grad_checkpointing(enable)
        set_grad_checkpointing(host.model, enable)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VideoLLM:
        with exact_buffers(self.model):
            super()._apply(fn, recurse)
        return self

    # ---- folders

    def is_saved(self, name: str) -> bool:
        """Whether `save_pretrained` writes a parameter: what is trained and merging's; the host is found again."""
        return name.startswith("merging.") or self.get_parameter(name).requires_grad

    def save_pretrained(self, directory: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes what training made and README.md, and not the host model, which is found again by its name or folder.

        adapter/ is peft's own; trained.safetensors holds the host's own weights that were trained, under the host's
        names; tempme.json and tempme.safetensors are `Compressed`'s. `load_video_llm` reads all of it.

        Args:
            state: full weights when the module's own are partitioned (ZeRO-3) or half precision; default its own.

        Raises:
            ValueError: a host model of unknown origin.
        """
        if self.source is None:
            raise ValueError("to save what was trained, give VideoLLM the `source` of its host, a name or a folder")
        directory, state = Path(directory), self.state_dict() if state is None else state
        merging = {key.removeprefix("merging."): value for key, value in state.items() if key.startswith("merging.")}
        self.compressed.save_merging(directory, merging)
        own = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
        if has_adapter(self.model):
            from peft import get_peft_model_state_dict

            self.model.peft_config["default"].save_pretrained(str(directory / ADAPTER_FOLDER))
            adapter = get_peft_model_state_dict(self.model, own, save_embedding_layers=False)
            _save(adapter, directory / ADAPTER_FOLDER, ADAPTER_WEIGHTS)
        trained = {name for name, weight in self.model.named_parameters() if weight.requires_grad}
        trained = {name for name in trained if "lora_" not in name}
        _save({_host_name(name): own[name] for name in trained}, directory, TRAINED_FILE)
        config = VideoLLMConfig(self.source, self.prompt, self.answer_tokens, self.input, self.compressed.feed)
        write_settings(directory / CONFIG_FILE, config)
        write_card(directory, self.card())
        write_manifest(directory)

    def card(self) -> Card:
        """What is known of it, for people (`tempme_vl.card`)."""
        facts, source = self.compressed.facts(), self.source
        lora = self.model.peft_config["default"].r if has_adapter(self.model) else 0
        trained = {"LoRA": f"of rank {lora} on the language model"} if lora else {}
        on_hub = source is not None and not Path(source).exists() and is_hub_id(source)
        code = (
            "from tempme_vl import read_video\n"
            "from tempme_vl.tasks.videollm import load_video_llm\n\n"
            f'model = load_video_llm("{PLACE}")\n'
            f'video = read_video("clip.mp4", {self.compressed.host.num_frames})\n'
            'prompt = model.tokenize("what is shown")["prompt"]\n'
            "answer = model.compressed.answer(prompt, [video.pixels], times=[video.times])\n"
        )
        return Card(
            f"{facts['host']} that reads few tokens of a video, fine-tuned: {facts['method']}",
            "video-text-to-text",
            {**facts, **trained, **self.input.facts()},
            code,
            (facts["method"],),
            source if on_hub else None,
        )


def _asked(prompt: str, question: str, answer: str | None = None, options: Sequence[str] = ()) -> dict[str, str]:
    listed = f"{question} Options: {', '.join(options)}" if options else question
    asked = {"prompt": prompt.replace("{question}", listed)}
    return asked if answer is None else asked | {"answer": answer}


def create_video_llm(
    compressed: Compressed,
    lora_rank: int = 16,
    train_frontend: bool = False,
    prompt: str | None = None,
    answer_tokens: int = 8,
    source: str | None = None,
    input: HostInput | None = None,
    train_language_model: bool = False,
) -> VideoLLM:
    """Says what trains in a compressed model.

    The projector (`Host.projector`) always trains, as in LLaVA; the language model by LoRA on all its linear layers,
    as a whole, or not at all.

    Args:
        compressed: what `tempme_vl.integrations.compress` gave, its model not in peft's wrapper.
        lora_rank: 0 for none; LoRA's update is scaled by 1, whatever the rank.
        train_frontend: train the tower and the clip positions, too.
        prompt, answer_tokens, source, input: see `VideoLLM`.
        train_language_model: all its weights, word vectors too; without LoRA.

    Raises:
        ValueError: as `VideoLLM`; LoRA on what trains as a whole; a model that has nothing of what its host calls the
            projector; or a projector, a tower or a language model that is to train, of quantised weights.
    """
    if train_language_model and lora_rank:
        raise ValueError(f"the language model trains by LoRA or as a whole; got lora_rank={lora_rank}: give 0 with it")
    host, model = compressed.host, compressed.model
    model.requires_grad_(False)
    compressed.merging.requires_grad_(train_frontend)
    if lora_rank:
        compressed = Compressed(host, Lora(lora_rank).wrap(model, linear_layers(host)), compressed.feed)
    projector = [weight for name, weight in model.named_parameters() if set(name.split(".")) & set(host.projector)]
    if not projector:
        raise ValueError(
            f"{type(model).__name__} has none of {', '.join(host.projector)}, which {type(host).__name__}.projector "
            "says lies between tower and language model"
        )
    _train(projector, "the projector")
    if train_language_model:
        words = host.target.get_output_embeddings()
        _train([*host.language_model.parameters(), *words.parameters()], "the language model")
    if train_frontend:
        _train([weight for part in host.tower_parts for weight in part.parameters()], "the tower")
    return VideoLLM(compressed, prompt, answer_tokens, source, input)


@dataclass(frozen=True)
class Start:
    """A host model before it is compressed and trained.

    Attributes:
        source: the name or folder that its own weights are found by again.
        trained: names of those of its weights that an earlier run trained, which are not found there.
    """

    model: Any
    processor: Any
    source: str
    trained: frozenset[str] = frozenset()

    def check(self, model: VideoLLM) -> None:
        """Raises:
        ValueError: what will train leaves out some of what the earlier run trained, which `save_pretrained` would lose.
        """
        now = {_host_name(name) for name, weight in model.model.named_parameters() if weight.requires_grad}
        if lost := sorted(self.trained - now):
            raise ValueError(
                f"the run that trained this model also trained {few(lost)}, which would be lost: train the same parts "
                "as there (--train-frontend, --train-language-model)"
            )


def load_start(source: str, **options: Any) -> Start:
    """A host to train, from its folder or the hub, or as an earlier run left it.

    Args:
        source: a host's; or what a run exported, such as OUTPUT/best, whose compression is left out.
        options: of the host's `from_pretrained`.

    Raises:
        ValueError: see `load_host` and `load_video_llm`; a run that trained LoRA.
    """
    if not (Path(source) / CONFIG_FILE).is_file():
        return Start(*load_host(source, **options), source)
    run = load_video_llm(source, **options)
    if has_adapter(run.model):
        raise ValueError(
            f"{source} has LoRA beside its weights: merge it into them (merge_and_unload of peft), save the model "
            "and its processor as transformers does, and give that folder"
        )
    trained = frozenset(name for name, weight in run.model.named_parameters() if weight.requires_grad)
    return Start(run.model, run.compressed.host.processor, str(run.source), trained)


def load_video_llm(directory: str | Path, source: str | Path | None = None, **options: Any) -> VideoLLM:
    """What `VideoLLM.save_pretrained` wrote, on the host model that it was trained from.

    Args:
        directory: the folder, or the name of a model on the Hugging Face hub, "organisation/model".
        source: the host model's name or folder, where it is not found by the one that it was trained from.
        options: of the host's `from_pretrained`, such as dtype and device_map. Of the hub (`tempme_vl.hub.HubOptions`):
            revision of `directory`; token, cache_dir, local_files_only of both.

    Raises:
        ValueError: a folder of something else, or a host model that the weights do not fit; or see
            `tempme_vl.hub.find_folder`.
    """
    hub, options = split_options(options)
    directory = find_folder(directory, CONFIG_FILE, **hub)
    options |= {name: value for name, value in hub.items() if name != "revision"}
    if not (directory / CONFIG_FILE).is_file():
        raise ValueError(f"expected {CONFIG_FILE} in {directory}, as save_pretrained of a VideoLLM writes it")
    check_manifest(directory)
    saved = read_settings(directory / CONFIG_FILE, VideoLLMConfig)
    source = str(source or saved.source)
    trained = read_safetensors(directory / TRAINED_FILE)
    adapter = read_adapter(directory / ADAPTER_FOLDER) if (directory / ADAPTER_FOLDER).is_dir() else {}
    model, processor = load_host(source, read_config(directory)["model"], **options)
    there = model.state_dict()
    if wrong := [key for key, value in trained.items() if key not in there or not _alike(there[key], value)]:
        raise FolderError(f"{directory / TRAINED_FILE} does not fit {source}: {sorted(wrong)[:4]} ...")
    model.load_state_dict(trained, strict=False)
    tuned: nn.Module = model
    if adapter:
        from peft import PeftModel, get_peft_model_state_dict

        with errors_in(f"{directory / ADAPTER_FOLDER}, on {source}", Exception):
            tuned = PeftModel.from_pretrained(model, str(directory / ADAPTER_FOLDER), is_trainable=True)
        made = get_peft_model_state_dict(tuned, save_embedding_layers=False)
        if differing := sorted(adapter.keys() ^ made.keys()):
            raise FolderError(
                f"{directory / ADAPTER_FOLDER / ADAPTER_WEIGHTS} does not fit {source}: {differing[:4]} ..."
            )
    for name, weight in tuned.named_parameters():  # so that it is saved again as it was
        weight.requires_grad_(_host_name(name) in trained or "lora_" in name)
    compressed = load_compressed(directory, tuned, processor, saved.feed)
    with errors_in(directory / CONFIG_FILE):
        return VideoLLM(compressed, saved.prompt, saved.answer_tokens, source, saved.input).eval()


def _alike(there: Tensor, value: Tensor) -> bool:
    return there.shape == value.shape and there.is_floating_point() == value.is_floating_point()


def default_prompt(processor: Any, placeholder: str) -> str:
    """A template for prompts by the host's own chat format, or LLaVA's if it has none.

    Raises:
        ValueError: a chat format that writes a video in another way than with the placeholder.
    """
    tokenizer = processor.tokenizer
    chat = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if chat is None:
        return PROMPT.replace("{video}", placeholder)
    parts = [{"type": "video"}, {"type": "text", "text": "{question}"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], chat_template=chat, add_generation_prompt=True
    )
    if text.count(placeholder) != 1 or text.count("{question}") != 1:
        raise ValueError(
            f"the processor's chat template does not write {placeholder!r} and the question once each: {text!r}; give "
            "a prompt of your own, with {question} and " + placeholder
        )
    return without_start(text, tokenizer)


def _train(weights: Sequence[nn.Parameter], what: str) -> None:
    if packed := [weight for weight in weights if not weight.is_floating_point()]:
        raise ValueError(
            f"{what} trains, and {len(packed)} of its {len(weights)} weights are quantised ({packed[0].dtype}), which "
            "have no gradients: quantise the language model alone, such as by llm_int8_skip_modules of "
            "BitsAndBytesConfig with the names of tower and projector"
        )
    for weight in weights:
        weight.requires_grad_(True)


def linear_layers(host: Host) -> str:
    """A pattern of the names of the language model's linear layers, the one that gives the words left out."""
    inner, words = host.language_model, host.target.get_output_embeddings()
    prefix = next(name for name, module in host.model.named_modules() if module is inner)
    names = {name for name, m in inner.named_modules() if isinstance(m, nn.Linear) and m is not words}
    last = sorted({name.rpartition(".")[2] for name in names})
    return rf"{re.escape(prefix)}\.(.*\.)?({'|'.join(map(re.escape, last))})"


def _ends(host: Host) -> list[int]:
    """Tokens that end an answer, the tokenizer's own first.

    Raises:
        ValueError: there is none.
    """
    own, known = host.processor.tokenizer.eos_token_id, host.target.generation_config.eos_token_id
    ends = [token for token in (own, *(known if isinstance(known, list) else [known])) if token is not None]
    if not ends:
        raise ValueError("expected a tokenizer with an end token (eos_token), which ends answers; this one has none")
    return list(dict.fromkeys(ends))


def _host_name(name: str) -> str:
    """A parameter's name in the host model, without what peft's wrapper puts in front."""
    return name.removeprefix("base_model.model.")


def _save(state: Mapping[str, Tensor], directory: Path, name: str) -> None:
    """Writes weights, if there are any."""
    if state:
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
