"""Multi-scale deformable attention; imports torch alone, so that other projects can take the
folder.
"""
