"""All problems of a data set at once, before a run meets them one by one.

tools/check_data.py reports everything: annotations, then files and pixels, then tables. Every training
makes the quick check. Fields of annotations are checked by the rules of training (coco_format.py).
"""
