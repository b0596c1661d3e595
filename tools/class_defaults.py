"""Writes jaxllm/interop/families/class_defaults.py: what config classes of transformers give to absent keys."""

import dataclasses
import re
import textwrap
from pathlib import Path

import transformers

from jaxllm.interop import families

FOLDER = Path(families.__file__).parent
FILE = FOLDER / "class_defaults.py"
NEEDED = {"num_experts_per_tok"}  # None in a class stands for nothing there
# What others follow from, or what is said in another way.
NOT = {"model_type", "architectures", "id2label", "label2id", "rope_parameters", "layer_types"}
HEAD = '''"""What the config class of each family in transformers gives to keys that config.json lacks.

Written by tools/class_defaults.py. Only keys that the tables read; what a class computes of others stands there.
"""

from typing import Any

'''


def main():
  sources = [path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py") if path != FILE]
  read = {word for source in sources for word in re.findall(r'"(\w+)"', source)} - NOT
  names = sorted({*families.FAMILIES, *(f.name for f in families.FAMILIES.values())})
  lines = []
  for name in names:
    cls = transformers.CONFIG_MAPPING[name]
    cls = cls.sub_configs.get("text_config", cls)
    found = {f.name: f.default for f in dataclasses.fields(cls) if f.name in read}
    found = {key: value for key, value in found.items() if value is not None or key not in NEEDED}
    found = {key: value for key, value in found.items() if isinstance(value, bool | int | float | str | None)}
    if "rope_parameters" in {f.name for f in dataclasses.fields(cls)} and not isinstance(cls.default_theta, dict):
      found["rope_theta"] = float(cls.default_theta)
    items = [f'"{key}":\0{value!r}'.replace("'", '"') for key, value in sorted(found.items())]
    wrapped = textwrap.fill(", ".join(items), 120, initial_indent="    ", subsequent_indent="    ")
    lines.append(f'  "{name}": {{\n{wrapped},\n  }},\n'.replace("\0", " "))
  text = f"{HEAD}# fmt: off\nCLASS_DEFAULTS: dict[str, dict[str, Any]] = {{\n{''.join(lines)}}}\n"
  FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
  main()
