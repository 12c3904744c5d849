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
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tempme_vl.command import at_least, run
from tempme_vl.command_line import Command
from tempme_vl.evaluation.measure import device_name, paired_times, synchronize
from tempme_vl.integrations import Compressed, SampledVideo, compress
from tempme_vl.integrations.base import pooled
from tempme_vl.integrations.costs import prefill_gflops
from tempme_vl.integrations.in_encoder import InEncoderHost
from tempme_vl.integrations.post_encoder import FrameFeatures, PostEncoderHost, make_plan
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


@dataclass(frozen=True)
class Times:
    """Seconds of one answer, from uint8 frames to the last token.

    Attributes:
        preprocessing: frames to pixels on the device.
        tower: ViT, projector, and merging inside or behind it, until the inputs of the language model are there.
        prefill: until the first token's logits.
        token: each further token.
        total: all of it, on one clock.
    """

    preprocessing: float
    tower: float
    prefill: float
    token: float
    total: float


@dataclass(frozen=True)
class Way:
    """One row of the table.

    Attributes:
        prepare: videos (F, H, W, 3) uint8 to inputs of `generate`, the tower's work done.
        merging: its options, in words.
        tokens: visual tokens of one video that the language model reads.
        tower_gflops, prefill_gflops: of one video and its prompt, computed; a multiply-add is 1.
    """

    name: str
    prepare: Callable[[Sequence[np.ndarray]], Mapping[str, Any]]
    merging: str
    tokens: int
    tower_gflops: float
    prefill_gflops: float


class PostEncoderVideoLlava(PostEncoderHost):
    """Video-LLaVA with merging behind its tower, to compare with: the library merges inside it."""

    @staticmethod
    def tower_of(model: Any) -> nn.Module:
        return model.model.video_tower

    def grid(self, height: int, width: int) -> tuple[int, int]:
        vision = self.model.config.vision_config
        return 1, (vision.image_size // vision.patch_size) ** 2 + 1  # the host keeps CLS, which is in no grid

    def attended(self, grid: tuple[int, int]) -> tuple[int, float]:
        return grid[1], grid[1]

    def features(self, videos: Sequence[SampledVideo]) -> list[FrameFeatures]:
        return self.frames_of(pooled(self.model.model.get_video_features(self.pixels(videos))), videos)


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
    times = measure(model, ways, videos, options.new_tokens, options.repeats)
    rows = summarize(model, ways, times, options)
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

    r = nearest(tome_tokens, range(1, schedule.tokens // 2), costs.tokens)
    tome = compress(model, processor, "tome", options.frames, r=r)

    def behind_options(intra: int) -> dict[str, Any]:
        return {"merge_frames": options.merge_frames, "cross_percent": CROSS_PERCENT, "intra_percent": intra}

    def behind_tokens(intra: int) -> int:
        return make_plan("tempme", options.frames, schedule.tokens, behind_options(intra)).output_tokens

    intra = nearest(behind_tokens, range(51), costs.tokens)
    host = PostEncoderVideoLlava(model, processor, "tempme", options.frames, behind_options(intra))
    behind = Compressed(host, model)

    def prefill(tokens: int) -> float:
        return prefill_gflops(inside.host, tokens + len(PROMPT.split()))  # <s> in place of <video>

    def way(name: str, compressed: Compressed, merging: Mapping[str, Any], tower: float | None = None) -> Way:
        own = compressed.host.costs()
        words = ", ".join(f"{name} {value}" for name, value in merging.items())
        prepare = partial(our_inputs, compressed)
        return Way(name, prepare, words, own.tokens, tower or own.tower, prefill(own.tokens))

    native = costs.native_tokens, costs.native_tower, prefill(costs.native_tokens)
    return [
        Way("host", partial(host_inputs, model, processor), "", *native),
        way("tempme", inside, tempme),
        way("tome", tome, {"r": r}),
        way("post-encoder", behind, behind_options(intra), tower=costs.native_tower),  # one tower, counted one way
    ]


def nearest(count: Callable[[int], int], choices: Iterable[int], wanted: int) -> int:
    """The choice that leaves as many tokens as wanted, or about as many."""
    return min(choices, key=lambda choice: abs(count(choice) - wanted))


def measure(
    model: Any, ways: Sequence[Way], videos: Sequence[np.ndarray], new_tokens: int, repeats: int
) -> dict[str, list[Times]]:
    """Times of each way, taken in turn after one round that does not count."""
    times: dict[str, list[Times]] = {way.name: [] for way in ways}
    for turn in range(1 + repeats):
        for way in ways:
            own, _ = answer(model, way, videos, new_tokens)
            if turn:
                times[way.name].append(own)
    return times


@torch.no_grad()
def answer(model: Any, way: Way, videos: Sequence[np.ndarray], new_tokens: int) -> tuple[Times, Tensor]:
    """One run of `generate` with its moments noted; also the new tokens (B, new_tokens), 2 or more."""
    moments: dict[str, float] = {}

    def note(moment: str) -> None:
        if moment not in moments:
            synchronize(model.device)
            moments[moment] = time.perf_counter()

    # both are called once a pass by every way: the tower's first module, and the language model's last
    patches = next(module for module in model.model.video_tower.modules() if isinstance(module, nn.Conv2d))
    hooks = [
        patches.register_forward_pre_hook(lambda *_: note("pixels")),
        model.lm_head.register_forward_hook(lambda *_: note("first token")),
    ]
    try:
        note("start")
        inputs = way.prepare(videos)
        note("inputs")
        ids = model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        note("end")
    finally:
        for hook in hooks:
            hook.remove()
    start, pixels, ready, first, end = (
        moments[moment] for moment in ("start", "pixels", "inputs", "first token", "end")
    )
    token = (end - first) / (new_tokens - 1)
    return Times(pixels - start, ready - pixels, first - ready, token, end - start), ids[:, -new_tokens:]


def summarize(
    model: Any, ways: Sequence[Way], times: Mapping[str, Sequence[Times]], options: Options
) -> list[dict[str, Any]]:
    """Counts, medians, and medians of a turn's ratios to the host's time, as JSON data."""
    depth = SIZES[options.model].depth
    # a deeper model has one last module too, which is a quarter of what decoding by 2 layers reads
    states = torch.zeros(options.batch, 1, model.lm_head.in_features, device=model.device, dtype=model.dtype)
    head_runs = paired_times({"head": torch.no_grad()(lambda: model.lm_head(states))}, 5, model.device)
    head = statistics.median(head_runs["head"])

    def at_depth(own: Times) -> float:
        prefill, token = (head + (part - head) * depth / options.llm_layers for part in (own.prefill, own.token))
        return own.preprocessing + own.tower + prefill + (options.new_tokens - 1) * token

    def stages(own: Times) -> dict[str, float]:
        return asdict(own) | ({"at_depth": at_depth(own)} if options.llm_layers < depth else {})

    host_runs = [stages(own) for own in times[ways[0].name]]
    rows = []
    for way in ways:
        runs = [stages(own) for own in times[way.name]]
        pairs = list(zip(runs, host_runs, strict=True))
        rows.append(
            {
                "row": way.name,
                "merging": way.merging,
                "tokens": way.tokens,
                "tower_gflops": way.tower_gflops,
                "prefill_gflops": way.prefill_gflops,
                "seconds": {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]},
                "ratios": {
                    stage: statistics.median(run[stage] / host[stage] for run, host in pairs) for stage in runs[0]
                },
                "runs": runs,
            }
        )
    return rows


def format_rows(rows: Sequence[Mapping[str, Any]], depth: int) -> str:
    """Markdown: seconds, and in brackets their ratio to the first row's."""
    heads = {
        "preprocessing": "preprocessing, s",
        "tower": "tower, s",
        "prefill": "prefill, s",
        "token": "decoding, ms a token",
        "total": "end to end, s",
        "at_depth": f"extrapolated to {depth} layers, s",
    }
    stages = [stage for stage in heads if stage in rows[0]["seconds"]]
    lines = [
        ["", "visual tokens", "tower, GFLOPs", "prefill, GFLOPs", *(heads[stage] for stage in stages)],
        ["---", *["---:"] * (3 + len(stages))],
    ]
    for row in rows:
        counts = [str(row["tokens"]), f"{row['tower_gflops']:.4g}", f"{row['prefill_gflops']:.4g}"]
        scaled = [(stage, row["seconds"][stage] * (1e3 if stage == "token" else 1)) for stage in stages]
        lines.append([row["row"], *counts, *(f"{value:.3g} ({row['ratios'][stage]:.2f})" for stage, value in scaled)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run(Command("", Options, main))
