"""Memory of encoding long videos in compressed video-language models: all frames at once, and few at a time.

Towers at their released widths (Qwen2.5-VL 7B; CLIP ViT-L/14 of Video-LLaVA 7B) with random weights, TempMe inside,
and behind each a language model of one narrow layer, which does not run. Every number is of a process of its own:
    python eval/videollm_memory.py --blocks 2                     # on a CPU, minutes
    python eval/videollm_memory.py --no-whole --frames 64 512     # all blocks on a CPU, half an hour
    python eval/videollm_memory.py --device cuda --dtype bfloat16 # all blocks
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers

from tempme_vl.command import at_least, run
from tempme_vl.command_line import Command
from tempme_vl.evaluation.fresh import in_fresh_process
from tempme_vl.evaluation.measure import device_name, memory_now, reset_peak
from tempme_vl.integrations import compress
from tempme_vl.integrations.tiny import word_tokenizer
from tempme_vl.integrations.videos import sample
from tempme_vl.reports import finish

_MIB = 1 << 20
_WORDS = ("why", "USER:", "ASSISTANT:")
_NARROW: dict[str, Any] = {"num_hidden_layers": 1, "intermediate_size": 64, "max_position_embeddings": 64}
_QWEN = {f"{kind}_token": f"<|{kind}_pad|>" for kind in ("image", "video")}
_QWEN |= {f"vision_{side}_token": f"<|vision_{side}|>" for side in ("start", "end")}


@dataclass(frozen=True)
class Options:
    """Peak memory of encoding one video, by the number of its frames."""

    model: Literal["qwen2_5_vl_7b", "video_llava_7b"] = "qwen2_5_vl_7b"
    blocks: int | None = None
    """Of the tower; default: all. What one makes is gone before the next runs, but weights stay."""
    frames: tuple[int, ...] = (64, 128, 256, 512)
    at_once: int = 32
    """Frames that the tower sees at a time."""
    whole: bool = True
    """Also all frames at once."""
    side: int = 224
    """Pixels of a side of the frames. Video-LLaVA's tower has 224."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = 1
    """CPU threads."""
    json: Path | None = None
    """Also write all numbers to this file."""


@dataclass(frozen=True)
class Point:
    """MiB: of the process before, and its highest until the tokens of the video were there; on a GPU of tensors."""

    before: float
    peak: float
    tokens: int


def main(options: Options) -> None:
    at_least(1, blocks=options.blocks, at_once=options.at_once, side=options.side, threads=options.threads)
    ways = (None, options.at_once) if options.whole else (options.at_once,)
    rows: list[dict[str, Any]] = []
    for frames in options.frames:
        for way in ways:
            point = in_fresh_process(measure, options, frames, way)
            rows.append({"frames": frames, "at_once": way, **vars(point)})
            print(rows[-1], flush=True)
    depth = "all blocks" if options.blocks is None else f"{options.blocks} blocks"
    setting = (
        f"{options.model}, {depth} of its tower, frames of {options.side} x {options.side} pixels, {options.dtype}; "
        f"{device_name(torch.device(options.device))}, {options.threads} CPU threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    finish(f"\n{setting}\n\n{format_rows(rows)}", {"setting": setting, "rows": rows}, options.json)


def measure(options: Options, frames: int, at_once: int | None) -> Point:
    """Of one video, in the process that this runs in."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, processor = (qwen if options.model == "qwen2_5_vl_7b" else video_llava)(options)
    model = model.to(options.device, getattr(torch, options.dtype)).eval()
    merging = {"budget": 0.5} if options.model == "qwen2_5_vl_7b" else one_join(model)
    compressed = compress(model, processor, "tempme", frames, "tower", frames_at_once=at_once, **merging)
    pixels = np.random.default_rng(0).integers(0, 256, (frames, options.side, options.side, 3), dtype=np.uint8)
    video = sample(pixels, frames, 2.0)
    device = torch.device(options.device)
    before = memory_now(device)[0]
    reset_peak(device)
    with torch.no_grad():
        (tokens,) = compressed.host.encode([video], [""])
    return Point(before / _MIB, memory_now(device)[1] / _MIB, len(tokens.features))


def one_join(model: Any) -> dict[str, Any]:
    """TempMe with clips of four frames in the last block that the host takes."""
    last = model.config.vision_config.num_hidden_layers + model.config.vision_feature_layer
    return {"r": 8, "merge_layers": (last,), "merge_frames": (4,), "cross_percent": 30, "intra_percent": 10}


def qwen(options: Options) -> tuple[Any, Any]:
    tokenizer: Any = word_tokenizer(_WORDS, _QWEN)
    number = tokenizer.get_vocab()
    depth = options.blocks or 32
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": depth,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [depth - 1 - back for back in (0, 8, 16, 24) if back < depth],
            "tokens_per_second": 2,
        },
        text_config={
            **_NARROW,
            "vocab_size": len(tokenizer),
            "hidden_size": 3584,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": rope,
            "rope_scaling": rope,
        },
        **{f"{name}_id": number[word] for name, word in _QWEN.items()},
    )
    pixels = options.side**2
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        video_processor=transformers.Qwen2VLVideoProcessor(size={"shortest_edge": pixels, "longest_edge": pixels}),
        tokenizer=tokenizer,
        chat_template="{{ messages }}",
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def video_llava(options: Options) -> tuple[Any, Any]:
    tokenizer: Any = word_tokenizer(_WORDS, {"image_token": "<image>", "video_token": "<video>"})
    number = tokenizer.get_vocab()
    vision: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "patch_size": 14,
    }
    config = transformers.VideoLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **vision, num_hidden_layers=options.blocks or 24, image_size=options.side
        ),
        text_config=transformers.LlamaConfig(
            **_NARROW, vocab_size=len(tokenizer), hidden_size=4096, num_attention_heads=32
        ),
        video_token_index=number["<video>"],
        image_token_index=number["<image>"],
    )
    crop: dict[str, Any] = {"height": options.side, "width": options.side}
    size: dict[str, Any] = {"size": {"shortest_edge": options.side}, "crop_size": crop}
    processor = transformers.VideoLlavaProcessor(
        image_processor=transformers.VideoLlavaImageProcessor(**size),
        video_processor=transformers.VideoLlavaVideoProcessor(**size),
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
    )
    return transformers.VideoLlavaForConditionalGeneration(config), processor


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line for each number of frames."""
    ways = list(dict.fromkeys(row["at_once"] for row in rows))
    names = ["all at once" if way is None else f"{way} at once" for way in ways]
    head = ["frames", "tokens", "before, MiB", *(f"{name}: peak, MiB (above)" for name in names)]
    lines = [head, ["---:"] * len(head)]
    for frames in dict.fromkeys(row["frames"] for row in rows):
        own = [row for row in rows if row["frames"] == frames]
        cells = [f"{row['peak']:.0f} ({row['peak'] - row['before']:.0f})" for row in own]
        lines.append([str(frames), str(own[0]["tokens"]), f"{own[0]['before']:.0f}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run(Command("", Options, main))
