"""Synthetic detection data sets: textured, overlapping shapes on cluttered backgrounds.

The quickstart and the tests use this room; training reads what it writes as any other data.

paint.py draws one shape, stuff.py a background of several kinds, scene.py one image. write.py writes a
data set in COCO's layout, and __main__.py is the command.
"""
