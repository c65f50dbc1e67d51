"""The detector and its losses."""

from models.build import build_model

__all__ = ["build_model"]
