"""The pictures of tools/explain.py: attention of one image, and of a batch by BatchFormerV2.

Only tools/explain.py uses this room.
"""
