"""What runs the model: one interface, several engines."""

from .base import Engine, Sampling, Session, TurnResult


__all__ = ["Engine", "Sampling", "Session", "TurnResult"]
