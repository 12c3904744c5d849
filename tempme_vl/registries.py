"""Everything that can be chosen by name, on one page. A new thing is a file, and a line here.

Nothing is imported before it is asked for, so that command lines list the names without torch. Other packages add
theirs by entry points of the groups, programs by `register` (`tempme_vl.registry`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tempme_vl.registry import Registry

if TYPE_CHECKING:
    from tempme_vl.compressors.base import Compressor
    from tempme_vl.data.dataset import DataSet
    from tempme_vl.families.base import Family
    from tempme_vl.integrations.base import Host
    from tempme_vl.merging.method import Method
    from tempme_vl.tasks.heads import Head
    from tempme_vl.tuning.base import Tuning

__all__ = [
    "COMPRESSORS",
    "DATASETS",
    "FAMILIES",
    "HEADS",
    "HOSTS",
    "METHODS",
    "QA_HEADS",
    "SIMILARITY_HEADS",
    "TUNINGS",
]

# how tokens become fewer: docs/add_a_method.md
METHODS: Registry[Method] = Registry(
    "method",
    "tempme_vl.methods",
    "tempme_vl.merging.method:Method",
    {
        "none": "tempme_vl.merging.none:METHOD",
        "tome": "tempme_vl.merging.tome:METHOD",
        "tempme": "tempme_vl.merging.tempme:METHOD",
        "evit": "tempme_vl.merging.evit:METHOD",
        "sta": "tempme_vl.merging.sta:METHOD",
        "diffrate": "tempme_vl.merging.diffrate:METHOD",
        "temporal_only": "tempme_vl.merging.temporal_only:METHOD",
        "reduction_only": "tempme_vl.merging.reduction_only:METHOD",
        "testa": "tempme_vl.merging.testa:METHOD",
        "centerclip": "tempme_vl.merging.centerclip:METHOD",
        "random": "tempme_vl.merging.random:METHOD",
        "uniform": "tempme_vl.merging.uniform:METHOD",
        "pool": "tempme_vl.merging.pool:METHOD",
    },
)

# how a video's features become fewer behind a tower, and inside the language model, where the methods above do not do
# it: docs/add_a_compressor.md
COMPRESSORS: Registry[Compressor] = Registry(
    "compressor",
    "tempme_vl.compressors",
    "tempme_vl.compressors.base:Compressor",
    {
        "fastvid": "tempme_vl.compressors.fastvid:COMPRESSOR",
        "visionzip": "tempme_vl.compressors.visionzip:COMPRESSOR",
        "vidcom2": "tempme_vl.compressors.vidcom2:COMPRESSOR",
        "evs": "tempme_vl.compressors.evs:COMPRESSOR",
        "flashvid": "tempme_vl.compressors.flashvid:COMPRESSOR",
        "holitom": "tempme_vl.compressors.holitom:COMPRESSOR",
        "dycoke": "tempme_vl.compressors.dycoke:COMPRESSOR",
        "unicomp": "tempme_vl.compressors.unicomp:COMPRESSOR",
        "dtd": "tempme_vl.compressors.dtd:COMPRESSOR",
        "prunevid": "tempme_vl.compressors.prunevid:COMPRESSOR",
        "sttm": "tempme_vl.compressors.sttm:COMPRESSOR",
        "scissor": "tempme_vl.compressors.scissor:COMPRESSOR",
        "storm": "tempme_vl.compressors.storm:COMPRESSOR",
        "framefusion": "tempme_vl.compressors.framefusion:COMPRESSOR",
    },
)

# towers, of a library or of a line of models: docs/add_a_backbone.md
FAMILIES: Registry[Family] = Registry(
    "family",
    "tempme_vl.families",
    "tempme_vl.families.base:Family",
    {
        "open_clip": "tempme_vl.families.open_clip:FAMILY",
        "umt": "tempme_vl.families.umt:FAMILY",
        "hf": "tempme_vl.families.hf:FAMILY",
        "timm": "tempme_vl.families.timm:FAMILY",
        "testa": "tempme_vl.families.testa:FAMILY",
    },
)

# of videos, with captions or questions: docs/add_a_dataset.md
DATASETS: Registry[DataSet] = Registry(
    "data set",
    "tempme_vl.datasets",
    "tempme_vl.data.dataset:DataSet",
    {
        "motion": "tempme_vl.data.motion:DATASET",
        "detail": "tempme_vl.data.detail:DATASET",
        "events": "tempme_vl.data.events:DATASET",
        "msrvtt": "tempme_vl.data.msrvtt:DATASET",
        "msvd": "tempme_vl.data.msvd:DATASET",
        "activitynet": "tempme_vl.data.activitynet:DATASET",
        "didemo": "tempme_vl.data.didemo:DATASET",
        "lsmdc": "tempme_vl.data.lsmdc:DATASET",
        "queryd": "tempme_vl.data.queryd:DATASET",
        "condensed_movies": "tempme_vl.data.condensed_movies:DATASET",
        "msrvtt_qa": "tempme_vl.data.msrvtt_qa:DATASET",
        "msvd_qa": "tempme_vl.data.msvd_qa:DATASET",
        "activitynet_qa": "tempme_vl.data.activitynet_qa:DATASET",
        "jsonl": "tempme_vl.data.own:DATASET",
        "pairs": "tempme_vl.data.pairs:DATASET",
    },
)

# video-language models, by the names of their classes: docs/add_a_host.md
HOSTS: Registry[type[Host]] = Registry(
    "host",
    "tempme_vl.hosts",
    "tempme_vl.integrations.base:Host",
    {
        "VideoLlavaForConditionalGeneration": "tempme_vl.integrations.video_llava:VideoLlavaHost",
        "LlavaNextVideoForConditionalGeneration": "tempme_vl.integrations.llava_next_video:LlavaNextVideoHost",
        "LlavaOnevisionForConditionalGeneration": "tempme_vl.integrations.llava_onevision:LlavaOnevisionHost",
        "InstructBlipVideoForConditionalGeneration": "tempme_vl.integrations.instructblip_video:InstructBlipVideoHost",
        "PerceptionLMForConditionalGeneration": "tempme_vl.integrations.perception_lm:PerceptionLMHost",
        "Qwen2_5_VLForConditionalGeneration": "tempme_vl.integrations.qwen2_5_vl:Qwen2_5_VLHost",
        "Qwen2VLForConditionalGeneration": "tempme_vl.integrations.qwen:QwenHost",
        "Qwen2_5OmniThinkerForConditionalGeneration": "tempme_vl.integrations.qwen2_5_omni:Qwen2_5OmniThinkerHost",
        "Qwen3VLForConditionalGeneration": "tempme_vl.integrations.qwen3_vl:Qwen3VLHost",
        "Qwen3VLMoeForConditionalGeneration": "tempme_vl.integrations.qwen3_vl:Qwen3VLHost",
        "Qwen3_5ForConditionalGeneration": "tempme_vl.integrations.qwen:QwenClipsHost",
        "Qwen3_5MoeForConditionalGeneration": "tempme_vl.integrations.qwen:QwenClipsHost",
        "Glm4vForConditionalGeneration": "tempme_vl.integrations.glm4v:Glm4vHost",
        "Glm4vMoeForConditionalGeneration": "tempme_vl.integrations.glm4v:Glm4vHost",
        "Glm46VForConditionalGeneration": "tempme_vl.integrations.glm4v:Glm4vHost",
        "VideoLlama3ForConditionalGeneration": "tempme_vl.integrations.video_llama_3:VideoLlama3Host",
        "Gemma4ForConditionalGeneration": "tempme_vl.integrations.gemma4:Gemma4Host",
        "Molmo2ForConditionalGeneration": "tempme_vl.integrations.molmo2:Molmo2Host",
        "InternVLForConditionalGeneration": "tempme_vl.integrations.internvl:InternVLHost",
        "SmolVLMForConditionalGeneration": "tempme_vl.integrations.smolvlm:SmolVLMHost",
    },
)

# what of a model trains: docs/add_a_tuning.md
TUNINGS: Registry[type[Tuning]] = Registry(
    "tuning",
    "tempme_vl.tunings",
    "tempme_vl.tuning.base:Tuning",
    {
        "full": "tempme_vl.tuning.full:Full",
        "clip4clip": "tempme_vl.tuning.clip4clip:CLIP4Clip",
        "lora": "tempme_vl.tuning.lora:Lora",
        "dora": "tempme_vl.tuning.dora:Dora",
        "prompt": "tempme_vl.tuning.prompt:Prompt",
        "adapter": "tempme_vl.tuning.adapter:Adapter",
        "plevu": "tempme_vl.tuning.plevu:Plevu",
        "dgl": "tempme_vl.tuning.dgl:Dgl",
        "vop": "tempme_vl.tuning.vop:Vop",
        "mv_adapter": "tempme_vl.tuning.mv_adapter:MvAdapter",
        "testa_clip": "tempme_vl.tuning.testa_clip:TestaClip",
    },
)

# what answers questions about tokens: docs/add_a_head.md
QA_HEADS = {
    "classifier": "tempme_vl.tasks.qa.classifier:ClassifierHead",
    "decoder": "tempme_vl.tasks.qa.decoder:DecoderHead",
    "llm": "tempme_vl.tasks.qa.llm:LLMHead",
}
# what compares videos with texts: the same page
SIMILARITY_HEADS = {
    "mean": "tempme_vl.tasks.similarity.mean:MeanHead",
    "maxsim": "tempme_vl.tasks.similarity.max_sim:MaxSimHead",
    "xpool": "tempme_vl.tasks.similarity.xpool:XPoolHead",
    "seqlstm": "tempme_vl.tasks.similarity.seq_lstm:SeqLSTMHead",
    "seqtransf": "tempme_vl.tasks.similarity.seq_transf:SeqTransfHead",
    "tighttransf": "tempme_vl.tasks.similarity.tight_transf:TightTransfHead",
    "eercf": "tempme_vl.tasks.similarity.eercf:EERCFHead",
}
HEADS: Registry[type[Head]] = Registry(
    "head", "tempme_vl.heads", "tempme_vl.tasks.heads:Head", {**QA_HEADS, **SIMILARITY_HEADS}
)
