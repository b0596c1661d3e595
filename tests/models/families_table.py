"""docs/families.md: what the tests of real configurations have seen of every family and head."""

import json
import math
from pathlib import Path

from shrinking import REAL, class_of, family_of
from shrinking import TEXT as LENGTH

from jaxllm.interop.families import DECODERS, ENCODERS, FAMILIES
from jaxllm.interop.huggingface import config_from_huggingface
from jaxllm.interop.stored import param_shapes

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "families.md"
# "family head" -> {"error": the largest, "greedy": whether it decoded, "models": that it was seen with}
RECORD = ROOT / "experiments" / "benchmarks" / "families.json"
# family -> {"equal": …, "largest_difference": …, "note": …}, of files that llama.cpp has read
GGUF = ROOT / "experiments" / "benchmarks" / "gguf.json"
COLUMNS = "family", "head", "largest logit error", "greedy", "export", "GGUF", "largest real model, parameters"
HEADS = {
  "sequence": "sequence classification",
  "token": "token classification",
  "span": "question answering",
  "none": "embeddings",
}
TEXT = """# Families

What reads and writes, and what was seen of it. `tests/models/test_real_configs.py` takes the config.json of {real}
published models (`tests/models/real_configs/`), divides their sizes and keeps their oddities, lets transformers save a
model with random weights for each, and holds this package's beside it. It writes this page:

    FAMILIES_TABLE=1 pytest tests/models/test_real_configs.py

(with `-m ""`: three sizes of every model) out of `experiments/benchmarks/families.json`, to which every such run adds
what it saw; remove it to begin anew.

- *largest logit error*: from transformers, both in float32, over the largest logit; two texts of {length} tokens, the
  second one padded: more than any window and any original length of these models. Where it is more than 1e-5 both are
  held against float64, and transformers is off by as much. Of embeddings: of the hidden states and what is pooled.
- *greedy*: prompts longer than any window, decoded through the cache to the tokens of transformers' `generate`.
- *export*: the written tensors have the names, types and bits of the file that was read, and transformers' model of the
  written directory computes the same.
- *GGUF*: llama.cpp's logits of the exported file (experiments/benchmarks/gguf.json).
- *largest real model*: the largest of the real configurations; as many parameters as in transformers, which
  `tests/models/test_family_sizes.py` shows of all of them.

"""
LEFT_OUT = """
Left out, and refused by name: layers that are not attention (Mamba, RWKV, Qwen3-Next, Qwen3.5, Kimi Linear, Falcon-H1,
Granite 4, Nemotron-H, LFM2), chunked attention with experts beside it (Llama 4), per-layer embeddings and layers that
share keys and values (Gemma 3n, Gemma 4), sparse attention by an indexer (DeepSeek-V3.2), layers that share their
weights (ALBERT), the first DeBERTa and what only it sets (attention to content or to distances alone, projections of
distances by themselves, no buckets), biases of distances in every layer (UMT5), activations with parameters of their
own (PReLU, xIELU: Apertus), norms after the residual stream is taken (BLOOM's
`apply_residual_connection_post_layernorm`), T5's classifiers of texts and tokens, BART with an embedding of its own for
each side, and images or sound: of a model that sees only its language model is read (Gemma 3).

The classes for texts in decoders read the state of the last token that is not padding: here by `segment_ids`, in
transformers by `pad_token_id`. Labels of tokens are [B, T, labels] also where there is one (ELECTRA's discriminator,
whose logits are [B, T] in transformers).
"""
SEEN: dict[str, dict] = {}


def classes(family):
  """`ModelConfig.head` -> the class in transformers, of each head that a family has."""
  table = FAMILIES[family]
  others = {head: cls for head, cls in table.architectures.items() if head != "none" or table in ENCODERS}
  encoders = [cls for cls in table.others if cls.endswith("EncoderModel")]  # of encoder-decoders, alone
  return {"lm": table.architecture} | others | ({"none": encoders[0]} if encoders else {})


def head_of(config):
  """`ModelConfig.head` of a config.json."""
  named = class_of(config).__name__
  if named == "ElectraForPreTraining":  # each token replaced or not
    return "token"
  return next((head for head, cls in classes(family_of(config)).items() if cls == named), "lm")


def parameters(config):
  """How many a config.json's model has here, by shapes alone."""
  c = config_from_huggingface(config)
  unused = 0 if c.first_norm else c.embed_dim  # the first layer has a norm here, of which nothing is made
  return sum(map(math.prod, param_shapes(c).values())) - unused


def rows():
  """(family, head) of each row, in their order."""
  return [(family, head) for family in FAMILIES for head in classes(family)]


def row_names(family, head):
  """The row's first two columns."""
  if head != "lm":
    return family, HEADS[head]
  if FAMILIES[family] in DECODERS:
    return family, "causal language model"
  return family, "masked language model" if FAMILIES[family] in ENCODERS else "sequence to sequence"


def saw(name, config, error, decoded):
  """Notes what a small model of a configuration showed: its logits' error, whether it decoded; and that its export was
  the same."""
  _add(f"{family_of(config)} {head_of(config)}", {"error": error, "greedy": decoded, "models": [name]})


def _add(key, new):
  row = SEEN.setdefault(key, {"error": 0.0, "greedy": False, "models": []})
  row["error"] = max(row["error"], new["error"])
  row["greedy"] |= new["greedy"]
  row["models"] = sorted({*row["models"], *new["models"]})


def write():
  """Writes the record and the page of what was seen, now and before."""
  for key, row in (json.loads(RECORD.read_text()) if RECORD.exists() else {}).items():
    _add(key, row)
  RECORD.write_text(json.dumps(dict(sorted(SEEN.items())), indent=1) + "\n")
  largest = {}
  for name in REAL:
    config = REAL[name]
    count = parameters(config)
    key = family_of(config), head_of(config)
    largest[key] = max(largest.get(key, (0, "")), (count, name))
  gguf = json.loads(GGUF.read_text()) if GGUF.exists() else {}
  lines = [COLUMNS, ("---",) * len(COLUMNS)]
  for family, head in rows():
    seen = SEEN.get(f"{family} {head}")
    decodes = head == "lm" and FAMILIES[family] not in ENCODERS
    count, name = largest.get((family, head), (0, ""))
    error = f"{seen['error']:.0e}" if seen else "not checked"
    greedy = "equal" if seen and seen["greedy"] else "not checked"
    export = "bit-equal" if seen else "not checked"
    cells = error, greedy if decodes else "", export, _gguf(gguf.get(family)) if head == "lm" else ""
    lines.append((*row_names(family, head), *cells, f"{name}, {count:,}" if name else ""))
  table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
  PAGE.write_text(TEXT.format(real=len(REAL), length=LENGTH) + table + "\n" + LEFT_OUT)


def _gguf(record):
  if record is None:
    return "not checked"
  if record.get("note", "").startswith("not written"):
    return record["note"]
  words = ["equal" if record["equal"] else "differs"]
  if record.get("largest_difference") is not None:
    words.append(f"{record['largest_difference']:.0e}")
  return ", ".join(words) + (f" ({record['note']})" if record.get("note") else "")
