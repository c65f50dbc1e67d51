"""From the data formats of labelling tools to the published COCO layout.

tools/convert_dataset.py uses this room; training reads COCO's format only. formats.py lists the
formats; voc.py, yolo.py and coco.py read one each.
"""
