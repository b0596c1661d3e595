"""BART with norms before the parts: mBART (arXiv 2001.08210), and M2M-100 (2010.11125) and NLLB-200 (2207.04672), whose
positions are sinusoids."""

import dataclasses

from jaxllm.interop.families import bart
from jaxllm.interop.families import table as t

PRE_NORM = t.BIASED | {"architecture": "encoder_decoder", "init": "normal"}


def _read_m2m(hf):
  # Frequencies from 1 to 1 / 10000, both included, where ours leave the last out.
  half, pad = hf["d_model"] // 2, hf["pad_token_id"]
  theta = 10000.0 ** (half / (half - 1))
  return bart.read(hf) | {"sinusoidal_theta": theta, "position_offset": pad + 1, "position_pad_id": pad}


MBART = dataclasses.replace(
  bart.BART,
  name="mbart",
  architecture="MBartForConditionalGeneration",
  architectures=t.classes("MBart", "sequence", "span"),
  weights=bart.weights("norm"),
  fields=PRE_NORM | {"position": "learned", "position_offset": 2, "embedding_norm": True, "head_bias": True},
  requires={"is_encoder_decoder": True},
  # Without a token of its own the decoder starts with the first one.
  read=lambda hf: bart.read(hf) | {"decoder_start_id": hf["decoder_start_token_id"] or hf["bos_token_id"] or 0},
  labels=2,
)
M2M_100 = dataclasses.replace(
  MBART,
  name="m2m_100",
  architecture="M2M100ForConditionalGeneration",
  architectures={},
  fields=PRE_NORM | {"position": "sinusoidal"},
  read=_read_m2m,
  write=lambda c: bart.BART.write(c) | {"pad_token_id": c.position_offset - 1},
  ignored=("*.embed_positions.weights",),
)
