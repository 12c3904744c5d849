"""What merging inside the tower saves in Qwen2.5-VL, beside merging behind it: tower, prefill, whole answer, timed.

The widths of the 7B model (a tower of 32 blocks, windows and all), random weights, 2 of the language model's 28 layers;
about ten minutes on two quiet CPU cores:
    python eval/qwen_speed.py
    python eval/qwen_speed.py --device cuda --llm-layers 28 --frames 32 --repeats 10

Rows take turns: the host itself; TempMe inside the tower by its usual plan and at --budget; TempMe and EVS behind the
whole tower at the same budget. Weights, frames and words are random: only times and counts mean something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers

from tempme_vl.command import at_least, run
from tempme_vl.command_line import Command
from tempme_vl.evaluation.measure import device_name
from tempme_vl.evaluation.moments import Times, Watched, first_convolution, time_answer
from tempme_vl.evaluation.stages import Depth, Way, format_rows, head_seconds, in_turns, stage_rows
from tempme_vl.integrations import Compressed, compress
from tempme_vl.integrations.costs import prefill_gflops
from tempme_vl.integrations.tiny import word_tokenizer
from tempme_vl.reports import finish

NAMED = {f"{name}_token": f"<|{name}_pad|>" for name in ("image", "video")}
AROUND = {f"vision_{side}_token": f"<|vision_{side}|>" for side in ("start", "end")}
PROMPT = "USER: <|vision_start|><|video_pad|><|vision_end|> Why is this video funny? ASSISTANT:"
LAYERS = 28  # of the 7B model's language model


@dataclass(frozen=True)
class Options:
    """Times of a Qwen2.5-VL with all its visual tokens, merged inside its tower, or behind it."""

    width: Literal["7b", "tiny"] = "7b"
    blocks: int = 32
    """Of the tower; four of them see whole frames, the last one among them, as in the released ones of 32."""
    llm_layers: int = 2
    """Of the language model; with fewer than 28, times at full depth are extrapolated."""
    frames: int = 16
    frame: tuple[int, int] = (224, 392)
    """Height and width of the frames that come in."""
    budget: float = 0.25
    """Share of the visual tokens that is kept, but in the row of the usual plan."""
    new_tokens: int = 8
    repeats: int = 2
    """Turns that count; one more before them warms up."""
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None
    """CPU threads; default: torch's choice."""
    seed: int = 0
    json: Path | None = None
    """Also write all numbers to this file."""


def main(options: Options) -> None:
    at_least(1, blocks=options.blocks, llm_layers=options.llm_layers, repeats=options.repeats, threads=options.threads)
    at_least(2, frames=options.frames, new_tokens=options.new_tokens)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model, processor = build(options)
    ways = all_ways(model, processor, options)
    rng = np.random.default_rng(options.seed)
    video = rng.integers(0, 256, (options.frames, *options.frame, 3), dtype=np.uint8)
    watched = Watched(first_convolution(model.model.visual), model.lm_head, model.device)

    def answer(way: Way) -> Times:
        return time_answer(watched, partial(way.prepare, [video]), model.generate, options.new_tokens)[0]

    times = in_turns(ways, answer, options.repeats)
    depth = Depth(options.llm_layers, LAYERS, head_seconds(model, 1))
    rows = stage_rows(ways, times, depth, options.new_tokens)
    setting = (
        f"Qwen2.5-VL, widths {options.width}, {options.blocks} blocks of its tower, {options.llm_layers} of {LAYERS} "
        f"layers of its language model, {options.frames} frames of {options.frame[0]} x {options.frame[1]} pixels, "
        f"FLOPs with a multiply-add as 1, {options.new_tokens} new tokens, {model.dtype}, medians of {options.repeats} "
        "turns; "
        f"{device_name(model.device)}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )
    shown = f"\nMeasured on this machine, and true of it alone: {setting}\n\n{format_rows(rows, LAYERS)}"
    finish(shown, {"setting": setting, "rows": rows}, options.json)


def build(options: Options) -> tuple[Any, Any]:
    """A random model and its processor with a tokenizer of the prompt's words."""
    tokenizer: Any = word_tokenizer(PROMPT.split(), NAMED | AROUND)
    ids: dict[str, Any] = {f"{n}_id": tokenizer.convert_tokens_to_ids(word) for n, word in (NAMED | AROUND).items()}
    small = options.width == "tiny"
    vision = {
        "depth": options.blocks,
        "hidden_size": 32 if small else 1280,
        "intermediate_size": 64 if small else 3420,
        "num_heads": 2 if small else 16,
        "out_hidden_size": 64 if small else 3584,
        "fullatt_block_indexes": list(range(options.blocks - 1, -1, -max(1, options.blocks // 4)))[::-1],
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3] if small else [16, 24, 24]}
    text = {
        "vocab_size": len(tokenizer) if small else 152064,
        "hidden_size": 64 if small else 3584,
        "intermediate_size": 128 if small else 18944,
        "num_hidden_layers": options.llm_layers,
        "num_attention_heads": 4 if small else 28,
        "num_key_value_heads": 2 if small else 4,
        "rope_parameters": rope,
        "rope_scaling": rope,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **ids)
    with torch.device(options.device):
        model = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=torch.float32 if options.device == "cpu" else torch.bfloat16
        ).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = tokenizer.all_special_ids  # random weights may write any token
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        video_processor=transformers.Qwen2VLVideoProcessor(),
        tokenizer=tokenizer,
        chat_template="",
    )
    return model, processor


def all_ways(model: Any, processor: Any, options: Options) -> list[Way]:
    """The host first, which all are compared with.

    Raises:
        ValueError: a budget that a row cannot reach.
    """

    def way(name: str, method: str, where: Literal["tower", "behind"], **limit: Any) -> Way:
        compressed = compress(model, processor, method, options.frames, where, **limit)
        costs = compressed.host.costs(options.frame)
        assert costs.tokens is not None, name
        prefill = prefill_gflops(compressed.host, costs.tokens + len(PROMPT.split()))
        words = ", ".join(f"{name} {value}" for name, value in limit.items())
        return Way(name, partial(inputs, compressed), words, costs.tokens, costs.tower, prefill)

    budget = {"budget": options.budget}
    return [
        way("host", "none", "behind"),
        way("TempMe in the tower, its usual plan", "tempme", "tower"),
        way("TempMe in the tower", "tempme", "tower", **budget),
        way("TempMe behind the tower", "tempme", "behind", **budget),
        way("EVS behind the tower", "evs", "behind", **budget),
    ]


def inputs(compressed: Compressed, videos: Sequence[np.ndarray]) -> Mapping[str, Any]:
    return compressed.prepare(PROMPT, [list(videos)], fps=2.0)


if __name__ == "__main__":
    run(Command("", Options, main))
