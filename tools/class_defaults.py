"""Writes jaxllm/interop/families/class_defaults.json: what config classes of transformers give to absent keys, and the
other spellings of keys that they know."""

import dataclasses
import json
import re
from pathlib import Path

import transformers

from jaxllm.interop import families

FOLDER = Path(families.__file__).parent
FILE = FOLDER / "class_defaults.json"
NEEDED = {"num_experts_per_tok"}  # None in a class stands for nothing there
# What others follow from, or what is said in another way.
NOT = {"model_type", "architectures", "id2label", "label2id", "rope_parameters", "layer_types"}
BESIDE = {"bloom": {"n_embed": "hidden_size"}, "falcon": {"n_embed": "hidden_size"}}  # spellings in the classes' code


def spellings(cls):
  """Other spelling -> field of a config class; where both stand in config.json, the class takes the other spelling."""
  fields = {f.name for f in dataclasses.fields(cls)}
  pairs = cls.attribute_map.items()
  return {a if b in fields else b: b if b in fields else a for a, b in pairs} | BESIDE.get(cls.model_type, {})


def main():
  sources = [path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")]
  read = {word for source in sources for word in re.findall(r'"(\w+)"', source)} - NOT
  names = sorted({*families.FAMILIES, *(f.name for f in families.FAMILIES.values())})
  tables = {"defaults": {}, "spellings": {}}
  for name in names:
    cls = transformers.CONFIG_MAPPING[name]
    cls = cls.sub_configs.get("text_config", cls)
    found = {f.name: f.default for f in dataclasses.fields(cls) if f.name in read}
    found = {key: value for key, value in found.items() if value is not None or key not in NEEDED}
    found = {key: value for key, value in found.items() if isinstance(value, bool | int | float | str | None)}
    if "rope_parameters" in {f.name for f in dataclasses.fields(cls)} and not isinstance(cls.default_theta, dict):
      found["rope_theta"] = float(cls.default_theta)
    tables["defaults"][name] = found
    tables["spellings"] |= {name: spellings(cls)} if spellings(cls) else {}
  FILE.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
