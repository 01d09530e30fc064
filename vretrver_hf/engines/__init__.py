"""What runs the model: one interface, several engines."""

from .base import Engine, EngineError, Sampling, Session, TurnResult


__all__ = ["Engine", "EngineError", "Sampling", "Session", "TurnResult"]
