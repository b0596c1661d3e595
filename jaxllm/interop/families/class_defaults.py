"""What the config class of each family in transformers gives to keys that config.json lacks, and how else it spells
them; tools/class_defaults.py writes the file."""

import json
from pathlib import Path
from typing import Any

_TABLES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
# Only keys that the tables read; what a class computes of others stands there.
CLASS_DEFAULTS: dict[str, dict[str, Any]] = _TABLES["defaults"]
# Other spellings to the keys that they stand for; where config.json has both, the other spelling goes before the key.
SPELLINGS: dict[str, dict[str, str]] = _TABLES["spellings"]
