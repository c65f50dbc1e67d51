"""From the data formats of labelling tools to the published COCO layout.
tools/convert_dataset.py uses this room; training reads COCO's format only.
"""
