"""mT5 (arXiv 2010.11934): T5 whose logits are never scaled."""

import dataclasses

from jaxllm.interop.families import table as t
from jaxllm.interop.families.t5 import T5


def _write(c):
  hf = {key: value for key, value in T5.write(c).items() if key != "scale_decoder_outputs"}
  return hf | ({"architectures": ["MT5EncoderModel"]} if c.architecture == "encoder" else {})


MT5 = dataclasses.replace(
  T5,
  name="mt5",
  architecture="MT5ForConditionalGeneration",
  architectures=t.classes("MT5", "span"),
  others=("MT5EncoderModel",),
  read=lambda hf: T5.read(hf) | {"logit_scale": None},
  write=_write,
)
