"""InstructBLIP for video: a Q-Former reads a frame's normed tokens and the prompt, and gives a fixed number of tokens.

Merging saves work in the tower and in the Q-Former; where clips are joined the Q-Former reads a clip at a time, so the
language model gets fewer tokens too. The model's own `generate` always runs its tower, so inputs are for
`Compressed.generate` and `Compressed(...)`, that is, for the language model inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tempme_vl.integrations.base import Request, SampledVideo, VisualTokens
from tempme_vl.integrations.devices import own_weights
from tempme_vl.integrations.in_encoder import InEncoderHost
from tempme_vl.integrations.parts import check_no_gradient, cut_up, frame_size, frames_of_parts
from tempme_vl.integrations.videos import without_start
from tempme_vl.merging import MergeSchedule


class InstructBlipVideoHost(InEncoderHost):
    """Raises:
    ValueError: an encoder-decoder language model (T5), whose labels are another kind.
    """

    feeds = ("embeddings",)
    pixel_name = "pixel_values"
    projector = ("qformer", "query_tokens", "language_projection")

    def __init__(self, model: Any, processor: Any, schedule: MergeSchedule, behind: Request | None = None):
        if behind is not None:
            raise ValueError(
                "InstructBLIP's Q-Former gives a fixed number of tokens a frame without a grid: nothing becomes fewer "
                "behind it; expected a method that merges inside the tower, and where='tower' or 'auto'"
            )
        super().__init__(model, processor, schedule)
        if not model.config.use_decoder_only_language_model:
            raise ValueError("expected InstructBLIP with a decoder-only language model (Vicuna); this one is T5")

    @staticmethod
    def tower_of(model: Any) -> nn.Module:
        return model.vision_model

    @staticmethod
    def layer(model: Any) -> int:
        return -1

    @property
    def target(self) -> Any:
        return self.model.language_model

    @property
    def language_model(self) -> nn.Module:
        return self.model.language_model

    def native_tokens(self) -> int:
        return self.num_frames * self.model.config.num_query_tokens

    def tokens_of(self, schedule: MergeSchedule) -> int:
        return schedule.layer_counts[-1].clips * self.model.config.num_query_tokens

    def input_ids(self, prompt: str, tokens: Sequence[VisualTokens]) -> list[int]:
        """Visual tokens stand in front of everything, <s> included, as in the host."""
        visual = [self.token_id] * sum(len(t.features) for t in tokens)
        return visual + self.processor.tokenizer(self._words(prompt))["input_ids"]

    def _words(self, prompt: str) -> str:
        prompt = without_start(prompt, self.processor.tokenizer)
        return " ".join(part.strip() for part in prompt.split(self.placeholder) if part.strip())

    def check_stream(self) -> None:
        raise ValueError(
            "InstructBLIP's Q-Former reads a video with its prompt, so that a stream has no tokens of its own: "
            "give the whole video to prepare, with frames_at_once to save memory"
        )

    def _tower_tokens(self, videos: Sequence[SampledVideo]) -> Tensor:
        """(V, M, D)."""
        if self.frames_at_once is None:
            return self.frontend(self.pixels(videos)).tokens
        check_no_gradient(self)
        rows = []
        for video in videos:
            parts = cut_up(video, frames_of_parts(self, frame_size(video)))
            rows.append(torch.cat([self.part_tokens(part, first) for first, part in parts], dim=1))
        return torch.cat(rows)

    def encode(self, videos: Sequence[SampledVideo], prompts: Sequence[str]) -> list[VisualTokens]:
        clips = self.frontend.schedule.layer_counts[-1].clips
        tokens = self.frontend.norm(self._tower_tokens(videos))
        tokens = tokens.unflatten(1, (clips, -1)).flatten(0, 1)  # (V * C, N, D)
        words = self.processor.qformer_tokenizer(
            [self._words(prompt) for prompt in prompts], padding=True, return_tensors="pt"
        ).to(tokens.device)
        with own_weights(self.model):
            queries = self.model.query_tokens.to(tokens).expand(len(tokens), -1, -1)
        mask = words["attention_mask"].repeat_interleave(clips, dim=0)
        read = self.model.qformer(
            input_ids=words["input_ids"].repeat_interleave(clips, dim=0),
            attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1),
            query_embeds=queries,
            encoder_hidden_states=tokens,
            encoder_attention_mask=mask.new_ones(tokens.shape[:2]),
        )[0][:, : queries.shape[1]]
        features: Tensor = self.model.language_projection(read).unflatten(0, (-1, clips)).flatten(1, 2)
        return [VisualTokens(row) for row in features]
