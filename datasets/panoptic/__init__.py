"""Panoptic segmentation: each pixel of an image belongs to one segment, or is void.

format.py reads and writes COCO's panoptic format, quality.py compares two segmentations, merge.py makes
one of a detector's masks. Evaluation, datasets.synthetic and tools/panoptic_from_instances.py use this
room. Only merge.py imports torch, because datasets.synthetic starts without it.
"""
