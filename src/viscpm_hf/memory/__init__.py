"""What a model needs, in which precision and place, and how fast it can be there: from shapes, before any weight is
read."""

from .machine import Machine
from .plan import MemoryPlan, MemoryRow, Work, memory_plan


__all__ = ["Machine", "MemoryPlan", "MemoryRow", "Work", "memory_plan"]
