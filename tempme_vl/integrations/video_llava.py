"""Video-LLaVA: CLIP or LanguageBind ViT, hidden state -2 with the CLS tokens, a token-wise projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from tempme_vl.integrations.in_encoder import InEncoderHost
from tempme_vl.integrations.tiny import SIDE, WIDTH, text_sizes, word_tokenizer


class VideoLlavaHost(InEncoderHost):
    keeps_prefix = True

    @staticmethod
    def tower_of(model: Any) -> nn.Module:
        return model.model.video_tower

    @property
    def image_tower(self) -> Any:
        return self.model.model.image_tower

    def project(self, tokens: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(tokens)

    def project_grid(self, tokens: Tensor) -> Tensor:
        return self.project(tokens.flatten(1, 2))

    @staticmethod
    def tiny(words: Sequence[str]) -> tuple[PreTrainedModel, ProcessorMixin]:
        named = {"image_token": "<image>", "video_token": "<video>"}
        tokenizer = word_tokenizer(words, named)
        sizes: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}
        vision = transformers.CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=8,
        )
        ids: dict[str, Any] = {
            f"{kind}_token_index": tokenizer.convert_tokens_to_ids(f"<{kind}>") for kind in ("image", "video")
        }
        text = transformers.LlamaConfig(**text_sizes(tokenizer))
        config = transformers.VideoLlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-1, **ids)
        processor = transformers.VideoLlavaProcessor(
            image_processor=transformers.VideoLlavaImageProcessor(**sizes),
            video_processor=transformers.VideoLlavaVideoProcessor(**sizes),
            tokenizer=tokenizer,
            patch_size=8,
        )
        return transformers.VideoLlavaForConditionalGeneration(config), processor
