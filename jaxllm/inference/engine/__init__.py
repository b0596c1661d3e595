"""One engine for all that writes text. Read its files in this order: request, pages, scheduler, programs, engine."""

from jaxllm.inference.engine.engine import Engine
from jaxllm.inference.engine.request import Delta, Request

__all__ = ["Delta", "Engine", "Request"]
