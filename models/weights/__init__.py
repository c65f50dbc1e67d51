"""What a file of weights holds: its layout, its architecture, and which weights to take.
The builder, load_detector and the tools use this room; modules of the network do not.
"""
