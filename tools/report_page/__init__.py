"""The page of tools/report.py: from the folders of runs to plain data, charts and one HTML file.

Only tools/report.py and tools/finetune.py use this room.
"""
