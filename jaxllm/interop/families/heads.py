"""The heads that decoders have beside the language model's, in classes that all families share: labels of a text, by
the state of its last token (a reward model has one label), labels of each token, and the span of an answer."""

import dataclasses
import re

from jaxllm.interop.families import table as t

# Those of which transformers has no class with a head; a model with it is written as none of them.
WITHOUT = {
  "sequence": {"cohere", "cohere2", "granite"},
  "token": {
    *("cohere", "cohere2", "deepseek_v2", "gemma3", "gemma3_text", "gptj", "granite", "olmo", "olmo2", "olmo3", "opt"),
  },
  "span": {
    *("cohere", "cohere2", "deepseek_v2", "deepseek_v3", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4"),
    *("gpt_oss", "granite", "olmo", "olmo2", "olmo3", "phi3", "starcoder2"),
  },
}
STEMS = {"gemma3_text": "Gemma3Text"}  # of the classes' names, where they differ from the language model's
CLASSIFIERS = {"bloom", "falcon", "gpt2", "gpt_neox"}  # whose matrix for tokens is the `classifier`, not the `score`
RENAMED = {"llama", "qwen2", "qwen3", "qwen3_moe", "smollm3"}  # whose class for spans has the model as `transformer`


def with_heads(family: t.Family) -> t.Family:
  """A decoder's family that has these heads too."""
  stem = STEMS.get(family.name, re.sub("(ForCausalLM|LMHeadModel)$", "", family.architecture))
  classes = {head: cls for head, cls in t.classes(stem, *WITHOUT).items() if family.name not in WITHOUT[head]}
  own = tuple(w for w in family.weights if w.ours[0] in ("head/weight", "head/bias"))
  token = t.linear("head", "classifier" if family.name in CLASSIFIERS else "score")
  heads = {"sequence": t.linear("head", "score"), "token": token, "span": t.linear("head", "qa_outputs")}
  other = {"span": "transformer."} if family.name in RENAMED else {}
  return dataclasses.replace(
    family,
    architectures={**family.architectures, **classes},
    weights=tuple(w for w in family.weights if w not in own),
    more_weights=lambda c: family.more_weights(c) + heads.get(c.head, own),
    by_head=dict.fromkeys(heads, {"head_bias": True}) | {"sequence": {"head_bias": False, "pooling": "last"}},
    prefixes={**family.prefixes, **other},
    renamed={**family.renamed, **{prefix: family.prefix for prefix in other.values()}},
  )
