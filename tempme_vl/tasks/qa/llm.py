"""Answers written by a language model that reads the video's merged tokens in front of the question (LLaVA).

Letters as in `tempme_vl.tasks.qa.base`; H is the language model's width, P the length of a prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tempme_vl.backbones.base import TowerShape
from tempme_vl.hub import require_hub
from tempme_vl.manifest import FolderError, errors_in
from tempme_vl.precision import at_least_float32
from tempme_vl.pretrained import CONFIG_FILE
from tempme_vl.schema import THEIR_LAYERS, Size, check_plain, read, read_json, write
from tempme_vl.tasks.pretrained_lm import (
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    exact_buffers,
    has_adapter,
    read_adapter,
    set_grad_checkpointing,
)
from tempme_vl.tasks.qa.base import HeadContext, QAHead, chosen, head_place
from tempme_vl.tasks.qa.options import DTYPES, TEMPLATE, Dtype, LLMOptions
from tempme_vl.tuning import Lora

PLACEHOLDER = -1  # stands for a visual token in a prompt; no tokenizer has it
LLM_FOLDER, TOKENIZER_FOLDER = "llm", "tokenizer"


@dataclass(frozen=True)
class _Saved:
    """The JSON data of an `LLMHead`."""

    num_visual: Size
    template: str
    max_words: Size
    answer_words: Size
    train_llm: bool
    source: str | None
    lora: bool
    dtype: Dtype  # of the language model's weights

    def __post_init__(self) -> None:
        if self.lora and self.source is None:
            raise ValueError("'source': expected the name or folder of the language model that LoRA was added to")


class LLMHead(QAHead):
    """A causal language model of transformers behind a projector.

    A prompt is the tokenizer's start token, if it has one, the projected visual tokens, and the template
    with the question. The answer follows as the next word, and ends with the tokenizer's end token.

    Args:
        llm: takes inputs_embeds, attention_mask and position_ids (Llama, Qwen, Mistral, ...); plain, or with LoRA by
            peft (`Lora.wrap`). Its settings for generation are replaced: answers are written greedily.
        tokenizer: its own.
        width: D of the visual tokens.
        num_visual: M, visual tokens of a video: `MergeSchedule.output_tokens`.
        template: text with {question} in it.
        max_words: most pieces of template and question together; of longer questions the end is left out.
        answer_words: most pieces of an answer, the end token among them; longer ones are cut and lose it.
        train_llm: train the language model's own weights, too; without LoRA only.
        source: name or folder of the model that LoRA was added to; needed only for saving.

    Raises:
        ValueError: a template without {question} or one that runs into the answer, a tokenizer without an end token
            or of another vocabulary, sizes below 1, more words than the model has positions, or train_llm with LoRA.
    """

    name = "llm"
    options = LLMOptions
    uses_answers = False
    writes = True

    def __init__(
        self,
        llm: Any,
        tokenizer: Any,
        width: int,
        num_visual: int,
        template: str = TEMPLATE,
        max_words: int = 64,
        answer_words: int = 8,
        train_llm: bool = False,
        source: str | None = None,
    ):
        super().__init__()
        self.has_lora = has_adapter(llm)
        plain = llm.get_base_model() if self.has_lora else llm
        shape = plain.config.get_text_config()
        _check_sizes(shape, tokenizer, num_visual, max_words, answer_words)
        if template.count("{question}") != 1:
            raise ValueError(f"expected a template with {{question}} once; got {template!r}")
        if self.has_lora and train_llm:
            raise ValueError("with LoRA the language model's own weights stay as they are; leave train_llm out")
        self.projector = nn.Sequential(
            nn.Linear(width, shape.hidden_size), nn.GELU(), nn.Linear(shape.hidden_size, shape.hidden_size)
        )
        self.llm, self.tokenizer, self.num_visual, self.template = llm, tokenizer, num_visual, template
        self.max_words, self.answer_words, self.train_llm, self.source = max_words, answer_words, train_llm, source
        # with LoRA, only LoRA is trained in there
        self.new_parameters = (r"^projector\.", *([r"^llm\."] if self.has_lora else []))
        if not self.has_lora:
            llm.requires_grad_(train_llm)
        self._base_dtype = _dtype_name(plain.dtype)
        # not asked of the tokenizer: whether it adds its start token depends on files and on transformers' version
        self._start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._end = tokenizer.eos_token_id
        # not the model's own, which may sample, and punish repetitions
        plain.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=answer_words, eos_token_id=self._end, pad_token_id=self._end
        )
        self._answer_pieces("")  # raises for a template that runs into the answer

    @classmethod
    def create(cls, context: HeadContext, options: LLMOptions) -> LLMHead:
        """See `QAHead.create`.

        Raises:
            ValueError: no language model, or see `load_llm` and the class.
        """
        if options.llm is None:
            raise ValueError("--head llm needs --llm, a folder or the hub name of a causal language model")
        folder = Path(options.llm)
        source = str(folder.resolve()) if folder.is_dir() else options.llm  # found again from any working directory
        llm, rank = load_llm(source, options.dtype), options.lora_rank
        return cls(
            Lora(rank, options.lora_alpha, options.lora_dropout).wrap(llm, task="CAUSAL_LM") if rank else llm,
            load_tokenizer(source),
            context.frontend.shape.width,
            context.frontend.schedule.output_tokens,
            options.template,
            options.max_words,
            options.answer_words,
            options.train_llm,
            source,
        )

    # ---- text

    def tokenize(self, question: str, answer: str | None = None, options: Sequence[str] = ()) -> dict[str, Tensor]:
        """See `QAHead.tokenize`; P = num_visual + max_words, and one for the start token.

        Returns:
            question_ids, question_mask (P,), padded on the left; ids are `PLACEHOLDER` for visual tokens. To train,
            answer_ids, answer_mask (answer_words,), padded on the right; to choose, option_ids, option_mask
            (K, answer_words) alike.

        Raises:
            ValueError: a template that is longer than max_words by itself.
        """
        prompt = [*self._start, *[PLACEHOLDER] * self.num_visual, *self._question_pieces(question)]
        padding = len(self._start) + self.num_visual + self.max_words - len(prompt)
        asked = {
            "question_ids": torch.tensor([self._end] * padding + prompt),
            "question_mask": torch.tensor([0] * padding + [1] * len(prompt)),
        }
        if answer is not None:
            asked["answer_ids"], asked["answer_mask"] = self._answer_ids(answer)
        elif options:
            ids, masks = zip(*map(self._answer_ids, options), strict=True)
            asked["option_ids"], asked["option_mask"] = torch.stack(ids), torch.stack(masks)
        return asked

    def text(self, prediction: Sequence[int]) -> str:
        """A row of `prediction`, up to the end token, as text; empty if nothing was written."""
        ids = list(prediction)
        ids = ids[: ids.index(self._end)] if self._end in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def _question_pieces(self, question: str) -> list[int]:
        kept = question
        while True:
            pieces = self._pieces(self.template.replace("{question}", kept))
            excess = len(pieces) - self.max_words
            if excess <= 0:
                return pieces
            if not kept:
                raise ValueError(
                    f"the template has {len(pieces)} pieces without a question: {self.template!r}; raise max_words, "
                    f"now {self.max_words}"
                )
            kept = kept[:-excess]  # a piece has one character or more

    def _answer_pieces(self, answer: str) -> list[int]:
        """Read behind a prompt, where a word has other pieces than at the start of a text."""
        prompt = self.template.replace("{question}", "?")
        before = self._pieces(prompt)
        whole = self._pieces(prompt + ("" if prompt[-1].isspace() else " ") + (answer or "a"))
        if whole[: len(before)] != before:
            raise ValueError(f"the template's last piece runs into the answer; end {self.template!r} with a colon")
        return whole[len(before) :] if answer else []

    def _answer_ids(self, answer: str) -> tuple[Tensor, Tensor]:
        """Ids and mask, both (answer_words,)."""
        pieces = [*self._answer_pieces(answer.strip()), self._end][: self.answer_words]
        padding = self.answer_words - len(pieces)
        return torch.tensor(pieces + [self._end] * padding), torch.tensor([1] * len(pieces) + [0] * padding)

    def _pieces(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    # ---- answers

    def forward(self, tokens: Tensor, size: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `QAHead.forward`; the loss of an answer is -log p of all its pieces and the end token.

        A batch may have several answers to a question: answer_row (A,) int64 says whose they are. Of options, the one
        with the smallest loss is chosen.

        Raises:
            ValueError: another number of visual tokens than the prompts have places for.
        """
        prompt, mask = self._prompt(tokens, batch["question_ids"]), batch["question_mask"]
        if "answer_ids" in batch:
            if "answer_row" in batch:
                prompt, mask = prompt[batch["answer_row"]], mask[batch["answer_row"]]
            return {"losses": self._losses(prompt, mask, batch["answer_ids"], batch["answer_mask"])}
        return self._answer(prompt, mask, batch)

    def _prompt(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """Tokens (B, M, D) at the placeholders of ids (B, P), words elsewhere -> (B, P, H)."""
        visual = ids == PLACEHOLDER
        places, there = visual.sum(dim=1), tokens.shape[1]
        if not bool((places == there).all()):
            raise ValueError(
                f"the prompts have places for {sorted(set(places.tolist()))} visual tokens, but videos have {there}: "
                "num_visual must be the schedule's output_tokens"
            )
        words = self._embed(ids.clamp(min=0))
        return words.masked_scatter(visual.unsqueeze(-1), self.projector(tokens).to(words.dtype))

    def _embed(self, ids: Tensor) -> Tensor:
        return self.llm.get_input_embeddings()(ids)

    def _losses(self, prompt: Tensor, mask: Tensor, ids: Tensor, words: Tensor) -> Tensor:
        """(A,): prompts (A, P, H) with their mask, each with an answer, ids and words (A, L)."""
        mask = torch.cat([mask, words], dim=1)
        num_words = ids.shape[1]
        output = self.llm(
            inputs_embeds=torch.cat([prompt, self._embed(ids)], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),  # whatever the padding
            use_cache=False,
            logits_to_keep=num_words + 1,
        )
        # a word is told by the position before it; models without logits_to_keep give all positions
        logits = at_least_float32(output.logits[:, -num_words - 1 : -1])
        return (F.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * words).sum(dim=1)

    @torch.no_grad()
    def _answer(self, prompt: Tensor, mask: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "option_ids" in batch:
            questions, options, _ = batch["option_ids"].shape
            rows = torch.arange(questions, device=prompt.device).repeat_interleave(options)
            ids, words = batch["option_ids"].flatten(0, 1), batch["option_mask"].flatten(0, 1)
            losses = self._losses(prompt[rows], mask[rows], ids, words).view(questions, options)
            if "option_valid" in batch:
                losses = losses.masked_fill(~batch["option_valid"].bool(), torch.inf)
            return chosen(-losses)
        # under ZeRO-3 a rank gathers weights from all others in each step: all take as many as the slowest
        partitioned = hasattr(next(self.llm.parameters()), "ds_id")
        made = self.llm.generate(
            inputs_embeds=prompt,
            attention_mask=mask,
            synced_gpus=partitioned,
            return_dict_in_generate=True,
            output_logits=True,
        )
        words = made.sequences
        # a step's logits at a time, as there may be 150,000 words
        chances = [
            at_least_float32(logits).log_softmax(dim=1).gather(1, word.unsqueeze(1))
            for logits, word in zip(made.logits, words.T, strict=True)
        ]
        ended = F.pad((words == self._end).cumsum(dim=1)[:, :-1], (1, 0))
        scores = torch.cat(chances, dim=1).masked_fill(ended > 0, 0.0).sum(dim=1, keepdim=True).exp()
        return {"prediction": F.pad(words, (0, self.answer_words - words.shape[1]), value=self._end), "scores": scores}

    def set_grad_checkpointing(self, enable: bool) -> None:
        set_grad_checkpointing(self.llm, enable)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LLMHead:
        with exact_buffers(self.llm):
            super()._apply(fn, recurse)
        return self

    # ---- folders

    def without_weights(self) -> QAHead:
        empty = nn.Module()
        return copy.deepcopy(self, {id(part): empty for part in (self.llm, self.projector)})

    def is_saved(self, name: str) -> bool:
        """With LoRA, nothing of the language model but LoRA."""
        return not (self.has_lora and name.startswith("llm.")) or "lora_" in name

    def save(self, directory: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Writes tokenizer/ and, without LoRA, llm/config.json; with LoRA adapter/, as peft has it.

        With LoRA the language model itself is not written: it is found again by its name or folder.

        Raises:
            ValueError: LoRA on a model of unknown origin.
        """
        self.tokenizer.save_pretrained(directory / TOKENIZER_FOLDER)
        if not self.has_lora:
            self.llm.config.save_pretrained(directory / LLM_FOLDER)
            kept = {key: value for key, value in state.items() if key not in self._tied}
            dtype = next(value.dtype for key, value in kept.items() if key.startswith("llm."))
            return self._written(_dtype_name(dtype)), kept
        if self.source is None:
            raise ValueError("to save LoRA, give LLMHead the `source` of its language model, a name or a folder")
        folder = directory / ADAPTER_FOLDER
        self.llm.peft_config["default"].save_pretrained(folder)
        adapter = self._adapter({k.removeprefix("llm."): v for k, v in state.items() if k.startswith("llm.")})
        adapter = {key: value.detach().cpu().contiguous() for key, value in adapter.items()}
        save_file(adapter, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        kept = {key: value for key, value in state.items() if not key.startswith("llm.")}
        return self._written(self._base_dtype), kept

    def _written(self, dtype: Any) -> dict[str, Any]:
        options = ("num_visual", "template", "max_words", "answer_words", "train_llm", "source")
        return write(_Saved(**{name: getattr(self, name) for name in options}, lora=self.has_lora, dtype=dtype))

    @classmethod
    def load(cls, config: Mapping[str, Any], directory: Path, shape: TowerShape) -> LLMHead:
        saved = read(_Saved, config, head_place(directory))
        options = {key: value for key, value in asdict(saved).items() if key not in ("dtype", "lora")}
        folder = directory / (ADAPTER_FOLDER if saved.lora else LLM_FOLDER)
        adapter: dict[str, Tensor] = {}
        if saved.lora:
            from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

            adapter = read_adapter(folder)
            llm = load_llm(str(saved.source), saved.dtype)
            with _explained(folder):
                llm = get_peft_model(llm, LoraConfig.from_pretrained(str(folder)))
                set_peft_model_state_dict(llm, adapter)
        else:
            check_plain(read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE), THEIR_LAYERS)
            with _explained(folder / CONFIG_FILE):
                llm_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
                dtype = getattr(torch, saved.dtype)
                llm = AutoModelForCausalLM.from_config(llm_config, dtype=dtype, trust_remote_code=False)
        tokenizer = load_tokenizer(directory / TOKENIZER_FOLDER)
        with errors_in(head_place(directory)):
            head = cls(llm, tokenizer, shape.width, **options)
        if saved.lora and (differing := sorted(adapter.keys() ^ head._adapter().keys())):
            raise FolderError(f"{folder / ADAPTER_WEIGHTS} does not fit {saved.source}: {differing[:4]} ...")
        return head

    def anew(self, folder: Path) -> Sequence[str]:
        """Everything: of another model's folder only the front end is gone on from."""
        return ("",)

    @classmethod
    def is_whole(cls, config: Mapping[str, Any]) -> bool:
        return not config.get("lora")

    def complete_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.has_lora:  # read by `load`
            return {**state, **{f"llm.{key}": value for key, value in self.llm.state_dict().items()}}
        return {**state, **{key: state[same] for key, same in self._tied.items() if same in state}}

    def _adapter(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """LoRA's weights under peft's names; of the model's state by default."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.llm, state, save_embedding_layers=False)

    @property
    def _tied(self) -> dict[str, str]:
        """Weights that are another one, such as the words in and out of many models: name -> the other's name."""
        first: dict[int, str] = {}
        names = {name: first.setdefault(id(p), name) for name, p in self.named_parameters(remove_duplicate=False)}
        return {name: other for name, other in names.items() if name != other}


def load_llm(source: str, dtype: str = "float32") -> Any:
    """A causal language model of transformers, from safetensors files only and without running code of the folder.

    Args:
        source: a folder, or a name on the hub.
        dtype: of its weights, one of `DTYPES`.

    Raises:
        ValueError: another dtype, or nothing that can be loaded whole there.
    """
    if dtype not in DTYPES:
        raise ValueError(f"expected a dtype of {', '.join(DTYPES)}; got {dtype!r}")
    with _explained(source):
        require_hub(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    llm, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers would leave them random
        raise ValueError(f"{source} lacks {len(missing)} weights of a {type(llm).__name__}: {missing[:4]} ...")
    return llm


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder, or of a name on the hub; of sentencepiece or any other kind.

    Raises:
        ValueError: there is none.
    """
    with _explained(source):
        require_hub(source)
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _check_sizes(shape: Any, tokenizer: Any, num_visual: int, max_words: int, answer_words: int) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError("expected a tokenizer with an end token (eos_token), which ends answers; this one has none")
    if len(tokenizer) > shape.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} pieces, the language model {shape.vocab_size}")
    if min(num_visual, max_words, answer_words) < 1:
        raise ValueError(
            f"expected num_visual, max_words and answer_words of at least 1; got {num_visual}, {max_words}, "
            f"{answer_words}"
        )
    positions, needed = getattr(shape, "max_position_embeddings", None), 1 + num_visual + max_words + answer_words
    if positions is not None and needed > positions:
        raise ValueError(
            f"the language model has {positions} positions; a prompt and its answer need up to {needed}, {num_visual} "
            "of them visual: merge more tokens, or allow fewer words"
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _explained(source: str | Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # other libraries' readers fail in many ways, of damaged files above all
        raise FolderError(
            f"could not load {str(source)!r}: {error}\nExpected a causal language model of transformers with its "
            "tokenizer and safetensors weights, in a folder or by its name on the hub"
        ) from error
