"""Fine-tuning a compressed video-language model on questions (recipes/videollm_lora.py)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import torch

from tempme_vl.data.questions import TrainQuestions, most_options
from tempme_vl.data.reader import VideoReader
from tempme_vl.data.videoqa import QASplit
from tempme_vl.evaluation.videollm.ask import as_they_are, ask
from tempme_vl.evaluation.videoqa import accuracy
from tempme_vl.integrations import Host, compress
from tempme_vl.integrations.costs import prefill_gflops
from tempme_vl.integrations.tiny import tiny_host
from tempme_vl.recipes.build import merging, optimizer, video_reader
from tempme_vl.recipes.loop import fit
from tempme_vl.recipes.options.videollm import Options
from tempme_vl.recipes.report import about_run, write_answers, write_results
from tempme_vl.recipes.start import announce, begin, check_files, facts
from tempme_vl.tasks.inputs import HostInput
from tempme_vl.tasks.videollm import VideoLLM, create_video_llm, load_start, load_video_llm
from tempme_vl.training import distributed
from tempme_vl.training.checkpoint import latest_checkpoint
from tempme_vl.training.engine import Trainer
from tempme_vl.training.folder import claim


def main(options: Options) -> None:
    device = begin(options)
    train, val, test = options.source().all_questions()
    check_files(options, train, val, test)
    for split in (val, test):  # now, and not after an epoch
        if split is not None:
            most_options(split)
    half = options.precision == "bf16" or (options.precision == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if half else torch.float32
    source = prepare_host(options, train)
    model = build_model(options, source, dtype).to(device)
    host = model.compressed.host
    reader = video_reader(options, host.num_frames, as_they_are(options.image_size))
    train_reader = replace(reader, transform=as_they_are(options.image_size, options.augment))

    trainer = Trainer(
        model,
        optimizer(options, model, model.is_new_parameter),
        TrainQuestions(train, train_reader, model.tokenizer(), options.seed),
        options,
        facts(options, model.compressed.describe(), train=train, val=val, test=test),
    )
    splits = [split for split in (train, val, test) if split is not None]
    data = "\n".join(f"{split.name}: {len(split.questions)} questions" for split in splits)
    announce(options, host_in_words(model, options.image_size), data)

    def validate() -> tuple[float, dict[str, Any]]:
        assert val is not None
        found, _ = evaluate(model, trainer.engine, val, reader, device, options.eval_batch_size, options.workers)
        return found["accuracy"], {"val_accuracy": found["accuracy"]}

    trained = fit(options, trainer, model, None if val is None else validate)
    if trained is None:
        return
    best = load_video_llm(options.output / "best", dtype=dtype).to(device)
    report, predictions = evaluate(best, best, test, reader, device, options.eval_batch_size, options.workers)
    report |= {
        "host": options.host,
        **about_run(options, trainer, trained, val),
        **host_cost(host, options.image_size),
    }
    write_answers(options, report, predictions, test)
    write_results(options, model, test.name, {"accuracy": report["accuracy"]})


def prepare_host(options: Options, train: QASplit) -> str:
    """The host's name or folder; a tiny one is made first, unless a run that is to be continued has done so."""
    if not options.host.startswith("tiny:"):
        return options.host
    claim(options.output)  # before anything is written to it
    folder = options.output / "host"
    if distributed.is_main() and latest_checkpoint(options.output / "checkpoints") is None:
        texts = [text for q in train.questions for text in (q.question, *q.answers, *q.options)]
        model, processor = tiny_host(options.host.removeprefix("tiny:"), texts, options.seed)
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    distributed.barrier()
    return str(folder)


def build_model(options: Options, source: str, dtype: torch.dtype) -> VideoLLM:
    """The host with merging and LoRA; `source` is its name or folder, or what an earlier run exported."""
    start = load_start(source, dtype=dtype)
    torch.manual_seed(options.seed)
    built = create_video_llm(
        compress(start.model, start.processor, **merging(options, 8), where=options.where),
        lora_rank=0 if options.train_language_model else options.lora_rank,
        train_language_model=options.train_language_model,
        train_frontend=options.train_frontend,
        prompt=options.prompt,
        answer_tokens=options.answer_tokens,
        source=start.source,
        input=HostInput(options.sampling, options.image_size),
    )
    start.check(built)
    built.set_grad_checkpointing(options.grad_checkpointing)
    return built


def evaluate(
    model: VideoLLM,
    encode: Any,
    split: QASplit,
    reader: VideoReader,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Accuracy and written answers on a split, all ranks together; `encode` is the model or its DeepSpeed engine."""
    asked = ask(model, encode, split, reader, device, batch_size, workers)
    return accuracy(asked.predictions, split, normalize=True), dict(asked.predictions)


def host_cost(host: Host, side: int) -> dict[str, int | float | None]:
    """Tokens and GFLOPs of a video with frames of side x side pixels, the host's own and ours; a multiply-add is 1.
    None for what a method decides by the data."""
    costs = host.costs((side, side))
    return {
        "output_tokens": costs.tokens,
        "host_tokens": costs.native_tokens,
        "tower_gflops": costs.tower,
        "host_tower_gflops": costs.native_tower,
        "prefill_gflops": None if costs.tokens is None else prefill_gflops(host, costs.tokens),
        "host_prefill_gflops": prefill_gflops(host, costs.native_tokens),
    }


def host_in_words(model: VideoLLM, side: int) -> str:
    weights, tokens = list(model.parameters()), host_cost(model.compressed.host, side)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    return (
        f"{model.compressed.describe()}\nframes of {side} x {side} pixels: {tokens['host_tokens']} visual tokens -> "
        f"{tokens['output_tokens']}\n{trained:,} of {sum(w.numel() for w in weights):,} weights train; prompt "
        f"{model.prompt!r}"
    )
