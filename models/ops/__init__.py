"""Multi-scale deformable attention. It imports torch alone: other projects can copy the folder."""
