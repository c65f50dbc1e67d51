"""A run over its lifetime: its folder, its state, its log, and how it stops.
main.py and the tools that read runs use this room; the model and the losses do not.
"""
