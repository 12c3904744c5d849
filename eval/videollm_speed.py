"""What fewer visual tokens save in a video-language model: tower, prefill, decoding and the whole answer, timed.

Video-LLaVA at its real widths (CLIP ViT-L/14 of 24 layers, Vicuna 7B's layers), random weights. On a CPU with 2 of the
language model's 32 layers, about five minutes on two quiet cores; on a GPU whole, in bfloat16:
    python eval/videollm_speed.py
    python eval/videollm_speed.py --device cuda --llm-layers 32 --batch 4 --repeats 10

Four ways, which take turns: "host", the model without us; "tempme" and "tome", which merge inside the tower;
"post-encoder", the same matching as TempMe's behind the whole tower, by options that leave as many tokens as TempMe.
Weights, frames and words are random: only times and counts mean something.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tempme_vl.command import at_least, run
from tempme_vl.command_line import Command
from tempme_vl.evaluation.measure import device_name
from tempme_vl.evaluation.moments import Times, Watched, first_convolution, time_answer
from tempme_vl.evaluation.stages import Depth, Way, format_rows, head_seconds, in_turns, stage_rows
from tempme_vl.integrations import Compressed, compress
from tempme_vl.integrations.base import pooled
from tempme_vl.integrations.costs import prefill_gflops
from tempme_vl.integrations.in_encoder import InEncoderHost
from tempme_vl.integrations.tiny import word_tokenizer
from tempme_vl.merging import make_schedule
from tempme_vl.reports import finish

PROMPT = "USER: <video> Why is this video funny? ASSISTANT:"
FRAME = (360, 640)  # height and width of the frames that come in
CROSS_PERCENT = 40  # of merging behind the tower; the rest of what it needs comes inside the clips


@dataclass(frozen=True)
class Sizes:
    """Of a Video-LLaVA: its tower, its language model but for the layers, and how many layers that has in truth."""

    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    depth: int


SIZES = {
    "video_llava_7b": Sizes(
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
        },
        {
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
        },
        depth=32,
    ),
    "tiny": Sizes(
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 6,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "max_position_embeddings": 1024,
        },
        depth=4,
    ),
}


@dataclass(frozen=True)
class Options:
    """Times of a Video-LLaVA with all its visual tokens, with TempMe or ToMe inside its tower, or merged behind it."""

    model: Literal["video_llava_7b", "tiny"] = "video_llava_7b"
    llm_layers: int = 2
    """Of the language model; with fewer than it has, times at full depth are extrapolated."""
    frames: int = 8
    batch: int = 1
    """Videos, each with a prompt."""
    new_tokens: int = 16
    """Written behind each prompt."""
    repeats: int = 2
    """Turns that count; one more before them warms up."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] | None = None
    """Default: float32 on a CPU, bfloat16 on a GPU."""
    threads: int | None = None
    """CPU threads; default: torch's choice."""
    r: int = 8
    """Pairs that TempMe merges a frame in each early block."""
    merge_layers: tuple[int, ...] = (16, 18, 20)
    """Blocks in which it joins clips."""
    merge_frames: tuple[int, ...] = (2, 2, 2)
    """Neighbouring clips joined in each of them; also behind the tower."""
    cross_percent: int = 30
    """Percent of tokens that it merges across clips there."""
    intra_percent: int = 10
    """Percent of tokens that it merges inside the clips from there on."""
    seed: int = 0
    json: Path | None = None
    """Also write all numbers to this file."""


def main(options: Options) -> None:
    at_least(1, frames=options.frames, batch=options.batch, repeats=options.repeats, threads=options.threads)
    at_least(1, llm_layers=options.llm_layers)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.new_tokens < 2:
        raise ValueError(f"the first token is prefill's; to time decoding takes 2 or more, got {options.new_tokens}")
    if (
        "mm_encoder_outputs"
        not in inspect.signature(transformers.VideoLlavaForConditionalGeneration.forward).parameters
    ):
        raise ValueError(
            "the host's tower and its language model are timed apart, for which its generate has to take features: "
            f"install transformers 5.18 or newer; this is {transformers.__version__}"
        )
    torch.manual_seed(options.seed)
    model, processor = build(options)
    ways = all_ways(model, processor, options)
    rng = np.random.default_rng(options.seed)
    videos = [rng.integers(0, 256, (options.frames, *FRAME, 3), dtype=np.uint8) for _ in range(options.batch)]
    times = in_turns(ways, lambda way: answer(model, way, videos, options.new_tokens)[0], options.repeats)
    depth = Depth(options.llm_layers, SIZES[options.model].depth, head_seconds(model, options.batch))
    rows = stage_rows(ways, times, depth, options.new_tokens)
    device, weight = model.device, next(model.parameters())
    setting = (
        f"{options.model}, {options.llm_layers} of {SIZES[options.model].depth} layers of its language model, "
        f"{options.frames} frames of {FRAME[0]} x {FRAME[1]} pixels, {options.batch} videos at once, FLOPs with a "
        f"multiply-add as 1, {options.new_tokens} new tokens, {weight.dtype}, "
        f"medians of {options.repeats} turns; {device_name(device)}, {torch.get_num_threads()} CPU threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    merging = "\n".join(f"{way.name}: {way.merging}" for way in ways if way.merging)
    table = format_rows(rows, SIZES[options.model].depth)
    shown = f"\n{merging}\nMeasured on this machine, and true of it alone: {setting}\n\n{table}"
    finish(shown, {"setting": setting, "rows": rows}, options.json)


def build(options: Options) -> tuple[Any, Any]:
    """A random model and its processor with a tokenizer of the prompt's words."""
    sizes = SIZES[options.model]
    tokenizer: Any = word_tokenizer(PROMPT.split(), {"image_token": "<image>", "video_token": "<video>"})
    number = tokenizer.get_vocab()
    config = transformers.VideoLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes.vision),
        text_config=transformers.LlamaConfig(**sizes.text, num_hidden_layers=options.llm_layers, pad_token_id=0),
        video_token_index=number["<video>"],
        image_token_index=number["<image>"],
    )
    lower = options.dtype == "bfloat16" or (options.dtype is None and options.device == "cuda")
    with torch.device(options.device):
        model = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16 if lower else torch.float32
        ).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = tokenizer.all_special_ids  # random weights may write any token

    side = sizes.vision["image_size"]
    crop: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = transformers.VideoLlavaProcessor(
        image_processor=transformers.VideoLlavaImageProcessor(**crop),
        video_processor=transformers.VideoLlavaVideoProcessor(**crop),
        tokenizer=tokenizer,
        patch_size=sizes.vision["patch_size"],
    )
    return model, processor


def host_inputs(model: Any, processor: Any, videos: Sequence[np.ndarray]) -> dict[str, Any]:
    """What the host's `generate` makes of its processor's pixels, made before it, so that both can be timed."""
    inputs = processor(text=[PROMPT] * len(videos), videos=list(videos), return_tensors="pt", padding=True)
    inputs = dict(inputs.to(model.device, model.dtype))
    features = pooled(model.model.get_video_features(inputs.pop("pixel_values_videos")))
    return {**inputs, "mm_encoder_outputs": {"video": BaseModelOutputWithPooling(pooler_output=features)}}


def our_inputs(compressed: Compressed, videos: Sequence[np.ndarray]) -> Mapping[str, Any]:
    return compressed.prepare([PROMPT] * len(videos), videos)


def all_ways(model: Any, processor: Any, options: Options) -> list[Way]:
    """The host first, which all are compared with; ToMe and post-encoder merging leave about as many tokens as TempMe.

    Raises:
        ValueError: options that do not fit the tower.
    """
    joins = {"merge_layers": options.merge_layers, "merge_frames": options.merge_frames}
    percents = {"cross_percent": options.cross_percent, "intra_percent": options.intra_percent}
    tempme: dict[str, Any] = {"r": options.r, **joins, **percents}
    inside = compress(model, processor, "tempme", options.frames, **tempme)
    assert isinstance(inside.host, InEncoderHost), type(inside.host)
    costs, schedule = inside.host.costs(), inside.host.frontend.schedule

    def tome_tokens(r: int) -> int:
        layers = len(schedule.plan)
        return make_schedule("tome", layers, options.frames, schedule.tokens, schedule.prefix, r=r).output_tokens

    r = nearest(tome_tokens, range(1, schedule.tokens // 2), known(inside))
    tome = compress(model, processor, "tome", options.frames, r=r)

    alike: dict[str, Any] = {
        "tokens": known(inside),
        "merge_frames": options.merge_frames,
        "cross_percent": CROSS_PERCENT,
    }
    behind = compress(model, processor, "tempme", options.frames, "behind", **alike)

    def prefill(tokens: int) -> float:
        return prefill_gflops(inside.host, tokens + len(PROMPT.split()))  # <s> in place of <video>

    def way(name: str, compressed: Compressed, merging: Mapping[str, Any]) -> Way:
        words = ", ".join(f"{name} {value}" for name, value in merging.items())
        prepare, tokens = partial(our_inputs, compressed), known(compressed)
        return Way(name, prepare, words, tokens, compressed.host.costs().tower, prefill(tokens))

    native = costs.native_tokens, costs.native_tower, prefill(costs.native_tokens)
    return [
        Way("host", partial(host_inputs, model, processor), "", *native),
        way("tempme", inside, tempme),
        way("tome", tome, {"r": r}),
        way("post-encoder", behind, alike),
    ]


def known(compressed: Compressed) -> int:
    """Visual tokens of a video, by a method that says so ahead."""
    tokens = compressed.counts().ours
    assert tokens is not None, compressed.host.method
    return tokens


def nearest(count: Callable[[int], int], choices: Iterable[int], wanted: int) -> int:
    """The choice that leaves as many tokens as wanted, or about as many."""
    return min(choices, key=lambda choice: abs(count(choice) - wanted))


def answer(model: Any, way: Way, videos: Sequence[np.ndarray], new_tokens: int) -> tuple[Times, Tensor]:
    """One run of `generate` with its moments noted; also the new tokens (B, new_tokens), 2 or more."""
    watched = Watched(first_convolution(model.model.video_tower), model.lm_head, model.device)
    times, ids = time_answer(watched, partial(way.prepare, videos), model.generate, new_tokens)
    return times, ids[:, -new_tokens:]


if __name__ == "__main__":
    run(Command("", Options, main))
