"""Every way of fine-tuning; `peft.kind` in a config chooses one, and its other keys are that one's fields."""

from jaxllm.peft.base import Full
from jaxllm.peft.dora import Dora
from jaxllm.peft.lora import Lora

AnyPeft = Full | Lora | Dora
