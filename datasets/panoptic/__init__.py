"""Panoptic segmentation: each pixel of an image belongs to one segment, or is void.

format.py reads and writes COCO's panoptic format, segments.py gives the masks to train on, quality.py
compares two maps, merge.py makes one of a detector's masks, truth.py evaluates. Evaluation,
datasets.coco_panoptic, datasets.synthetic, tools/predict.py and tools/panoptic_from_instances.py use this
room. Only merge.py and truth.py import torch, because datasets.synthetic starts without it.
"""
