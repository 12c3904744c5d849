"""Everything that can be chosen by name, on one page. A new thing is a file, and a line here.

Nothing is imported before it is asked for, so that command lines list the names without torch. Other packages add
theirs by entry points of the groups, programs by `register` (`tempme_vl.registry`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tempme_vl.registry import Registry

if TYPE_CHECKING:
    from tempme_vl.data.dataset import DataSet
    from tempme_vl.families.base import Family
    from tempme_vl.merging.method import Method
    from tempme_vl.tasks.heads import Head

__all__ = ["DATASETS", "FAMILIES", "HEADS", "METHODS", "QA_HEADS", "SIMILARITY_HEADS"]

# how tokens become fewer: docs/add_a_method.md
METHODS: Registry[Method] = Registry(
    "method",
    "tempme_vl.methods",
    "tempme_vl.merging.method:Method",
    {
        "none": "tempme_vl.merging.none:METHOD",
        "tome": "tempme_vl.merging.tome:METHOD",
        "tempme": "tempme_vl.merging.tempme:METHOD",
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
    },
)

# of videos, with captions or questions: docs/add_a_dataset.md
DATASETS: Registry[DataSet] = Registry(
    "data set",
    "tempme_vl.datasets",
    "tempme_vl.data.dataset:DataSet",
    {
        "motion": "tempme_vl.data.motion:DATASET",
        "msrvtt": "tempme_vl.data.msrvtt:DATASET",
        "msvd": "tempme_vl.data.msvd:DATASET",
        "activitynet": "tempme_vl.data.activitynet:DATASET",
        "didemo": "tempme_vl.data.didemo:DATASET",
        "lsmdc": "tempme_vl.data.lsmdc:DATASET",
        "msrvtt_qa": "tempme_vl.data.msrvtt_qa:DATASET",
        "msvd_qa": "tempme_vl.data.msvd_qa:DATASET",
        "activitynet_qa": "tempme_vl.data.activitynet_qa:DATASET",
        "jsonl": "tempme_vl.data.own:DATASET",
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
}
HEADS: Registry[type[Head]] = Registry(
    "head", "tempme_vl.heads", "tempme_vl.tasks.heads:Head", {**QA_HEADS, **SIMILARITY_HEADS}
)
