"""Every objective; `objective.name` in a config chooses one, and its other keys are that one's fields."""

from jaxllm.objectives.causal_lm import CausalLM
from jaxllm.objectives.classification import Classification
from jaxllm.objectives.dpo import DPO
from jaxllm.objectives.masked_lm import MaskedLM
from jaxllm.objectives.seq2seq import Seq2Seq

AnyObjective = CausalLM | MaskedLM | Seq2Seq | Classification | DPO
