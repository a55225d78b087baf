"""What a program of an agent may use of NOA ARK: ``ark.ai`` has models say something."""

from . import ai

__all__ = ["ai"]
