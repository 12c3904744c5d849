"""Weights that people bring: `files` reads tensors by name in whatever file they stand, `exports` the package's own
folders.

Which names belong to which model is told by the families: `tempme_vl.backbones.clip_checkpoint`, `.umt_checkpoint`.
"""
