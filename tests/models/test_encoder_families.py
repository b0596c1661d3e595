"""Encoders and encoder-decoders against their `transformers` implementations with random weights."""

import functools
import json
import logging
import tempfile

import jax
import numpy as np
import oracle
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from checkpoint_arrays import params_from_huggingface, params_to_huggingface  # noqa: E402

from jaxllm.inference.model import Model  # noqa: E402
from jaxllm.interop.families import FAMILIES  # noqa: E402
from jaxllm.models.build import declare  # noqa: E402

B, T, S, V = 2, 11, 17, 97
LENGTHS = {"T": (T, 6), "S": (9, S)}  # of the rows; the rest is padding
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
BERT = IDS | dict(
  vocab_size=V,
  hidden_size=32,
  intermediate_size=56,
  num_hidden_layers=3,
  num_attention_heads=4,
  max_position_embeddings=24,
)
DEBERTA = BERT | dict(
  relative_attention=True,
  position_buckets=6,
  norm_rel_ebd="layer_norm",
  share_att_key=True,
  pos_att_type="p2c|c2p",
  position_biased_input=False,
  type_vocab_size=0,
)
MPNET = BERT | dict(pad_token_id=1)
DISTILBERT = IDS | dict(vocab_size=V, dim=32, hidden_dim=56, n_layers=3, n_heads=4, max_position_embeddings=24)
MODERNBERT = BERT | dict(num_hidden_layers=5, local_attention=6, cls_token_id=1, sep_token_id=2)
UNTIED = dict(tie_word_embeddings=False)
T5 = dict(vocab_size=V, d_model=32, d_kv=12, d_ff=56, num_heads=4, pad_token_id=0, eos_token_id=1)
BART = IDS | dict(
  vocab_size=V,
  d_model=32,
  encoder_layers=2,
  decoder_layers=3,
  encoder_attention_heads=4,
  decoder_attention_heads=4,
  encoder_ffn_dim=56,
  decoder_ffn_dim=56,
  max_position_embeddings=24,
  decoder_start_token_id=2,
)
ENCODERS = {
  "bert-mlm": ("BertForMaskedLM", BERT),
  "bert-relu": ("BertForMaskedLM", BERT | dict(hidden_act="relu", type_vocab_size=3, layer_norm_eps=1e-3)),
  "bert-sequence": ("BertForSequenceClassification", BERT | dict(num_labels=3)),
  "bert-token": ("BertForTokenClassification", BERT | dict(num_labels=5)),
  "bert-span": ("BertForQuestionAnswering", BERT),
  "bert-bare": ("BertModel", BERT),
  "roberta-mlm": ("RobertaForMaskedLM", BERT | dict(pad_token_id=1, type_vocab_size=1)),
  "roberta-sequence": ("RobertaForSequenceClassification", BERT | dict(pad_token_id=2, num_labels=4)),
  "roberta-span": ("RobertaForQuestionAnswering", BERT | dict(pad_token_id=1)),
  "xlm-roberta-mlm": ("XLMRobertaForMaskedLM", BERT | dict(pad_token_id=1, type_vocab_size=1)),
  "xlm-roberta-sequence": ("XLMRobertaForSequenceClassification", BERT | dict(pad_token_id=1, num_labels=2)),
  "xlm-roberta-token": ("XLMRobertaForTokenClassification", BERT | dict(pad_token_id=1, num_labels=3)),
  "distilbert-mlm": ("DistilBertForMaskedLM", DISTILBERT),
  "distilbert-sequence": ("DistilBertForSequenceClassification", DISTILBERT | dict(num_labels=3)),
  "distilbert-token": ("DistilBertForTokenClassification", DISTILBERT | dict(num_labels=3, activation="relu")),
  "distilbert-span": ("DistilBertForQuestionAnswering", DISTILBERT),
  "distilbert-bare": ("DistilBertModel", DISTILBERT),
  "electra-generator": ("ElectraForMaskedLM", BERT | dict(embedding_size=20)),
  "electra-discriminator": ("ElectraForPreTraining", BERT | dict(embedding_size=20)),
  "electra-sequence": ("ElectraForSequenceClassification", BERT | dict(embedding_size=32, num_labels=3)),
  "electra-token": ("ElectraForTokenClassification", BERT | dict(embedding_size=20, num_labels=3)),
  "electra-span": ("ElectraForQuestionAnswering", BERT | dict(embedding_size=32)),
  "electra-bare": ("ElectraModel", BERT | dict(embedding_size=20)),
  "deberta-mlm": ("DebertaV2ForMaskedLM", DEBERTA),
  "deberta-sequence": ("DebertaV2ForSequenceClassification", DEBERTA | dict(num_labels=3)),
  "deberta-token": (
    "DebertaV2ForTokenClassification",
    DEBERTA | dict(num_labels=3, position_biased_input=True, type_vocab_size=2, max_relative_positions=9),
  ),
  "deberta-span": ("DebertaV2ForQuestionAnswering", DEBERTA),
  "deberta-bare": ("DebertaV2Model", DEBERTA),
  "deberta-xlarge": ("DebertaV2ForMaskedLM", DEBERTA | dict(conv_kernel_size=3, conv_act="gelu")),
  "deberta-xxlarge": (
    "DebertaV2ForSequenceClassification",
    DEBERTA | dict(num_labels=3, conv_kernel_size=5, num_hidden_layers=1),
  ),
  "camembert-mlm": ("CamembertForMaskedLM", BERT | dict(pad_token_id=1, type_vocab_size=1, hidden_act="quick_gelu")),
  "camembert-token": ("CamembertForTokenClassification", BERT | dict(pad_token_id=1, num_labels=3)),
  "data2vec-text-mlm": ("Data2VecTextForMaskedLM", BERT | dict(pad_token_id=1, type_vocab_size=1)),
  "data2vec-text-bare": ("Data2VecTextModel", BERT | dict(pad_token_id=1, type_vocab_size=1)),
  "xlm-roberta-xl-mlm": ("XLMRobertaXLForMaskedLM", BERT | dict(pad_token_id=1, type_vocab_size=1)),
  "xlm-roberta-xl-sequence": ("XLMRobertaXLForSequenceClassification", BERT | dict(pad_token_id=1, num_labels=2)),
  "mpnet-mlm": ("MPNetForMaskedLM", MPNET),
  "mpnet-sequence": ("MPNetForSequenceClassification", MPNET | dict(num_labels=3)),
  "mpnet-token": ("MPNetForTokenClassification", MPNET | dict(num_labels=3)),
  "mpnet-span": ("MPNetForQuestionAnswering", MPNET),
  "mpnet-bare": ("MPNetModel", MPNET),
  "modernbert-mlm": ("ModernBertForMaskedLM", MODERNBERT),
  "modernbert-sequence": (
    "ModernBertForSequenceClassification",
    MODERNBERT | dict(num_labels=3, classifier_pooling="mean", num_hidden_layers=2),
  ),
  "modernbert-token": (
    "ModernBertForTokenClassification",
    MODERNBERT | dict(num_labels=3, mlp_bias=True, classifier_bias=True, norm_bias=True, attention_bias=True),
  ),
  "modernbert-span": ("ModernBertForQuestionAnswering", MODERNBERT),
  "bert-untied": ("BertForMaskedLM", BERT | UNTIED),
  "roberta-untied": ("RobertaForMaskedLM", BERT | UNTIED | dict(pad_token_id=1, type_vocab_size=1)),
  "distilbert-untied": ("DistilBertForMaskedLM", DISTILBERT | UNTIED),
  "electra-untied": ("ElectraForMaskedLM", BERT | UNTIED | dict(embedding_size=20)),
  "mpnet-untied": ("MPNetForMaskedLM", MPNET | UNTIED),
  "deberta-untied": ("DebertaV2ForMaskedLM", DEBERTA | UNTIED),
  "t5-encoder": ("T5EncoderModel", T5 | dict(num_layers=2, num_decoder_layers=3)),
  "mt5-encoder": ("MT5EncoderModel", T5 | dict(num_layers=2)),
  "modernbert-dense": ("ModernBertForMaskedLM", MODERNBERT | dict(classifier_bias=True, hidden_activation="mish")),
}
ENCODER_DECODERS = {
  "t5": ("T5ForConditionalGeneration", T5 | dict(num_layers=2)),
  "t5-gated-untied": (
    "T5ForConditionalGeneration",
    T5
    | dict(num_layers=3, num_decoder_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    | dict(relative_attention_num_buckets=8, relative_attention_max_distance=12),
  ),
  "t5-span": ("T5ForQuestionAnswering", T5 | dict(num_layers=2)),
  "mt5-span": ("MT5ForQuestionAnswering", T5 | dict(num_layers=2)),
  "mt5": ("MT5ForConditionalGeneration", T5 | dict(num_layers=2)),
  "mbart": ("MBartForConditionalGeneration", BART | dict(pad_token_id=1, scale_embedding=True)),
  "m2m_100": ("M2M100ForConditionalGeneration", BART | dict(pad_token_id=1)),
  "m2m_100-unscaled": (
    "M2M100ForConditionalGeneration",
    BART | dict(pad_token_id=1, scale_embedding=False, activation_function="gelu", encoder_layers=1),
  ),
  "bart-sequence": ("BartForSequenceClassification", BART | dict(num_labels=3)),
  "bart": ("BartForConditionalGeneration", BART),
  "bart-scaled": ("BartForConditionalGeneration", BART | dict(scale_embedding=True, encoder_layers=1)),
  "mbart-sequence": ("MBartForSequenceClassification", BART | dict(pad_token_id=1, num_labels=3)),
  "mbart-span": ("MBartForQuestionAnswering", BART | dict(pad_token_id=1)),
  "bart-span": ("BartForQuestionAnswering", BART),
  "bart-untied": ("BartForConditionalGeneration", BART | UNTIED),
}

# Computed by what others of these compute: their tensors are held in `test_export`.
LIKE_OTHERS = {"roberta-untied", "distilbert-untied", "electra-untied", "mpnet-untied", "mt5-encoder", "mt5-span"}
LIKE_OTHERS |= {"mbart-span", "deberta-untied"}
COMPUTED = [
  pytest.param(name, marks=pytest.mark.slow if name in LIKE_OTHERS else ()) for name in ENCODERS | ENCODER_DECODERS
]


@functools.cache
def case(name):
  """(transformers model, its config as a dict, ModelConfig, params)."""
  stem, settings = (ENCODERS | ENCODER_DECODERS)[name]
  cls = getattr(transformers, stem)
  hf_config = cls.config_class(**settings)
  hf_config.architectures = [stem]
  model = oracle.torch_model(cls, hf_config)
  with torch.no_grad():
    if "T5" in stem and "tie_word_embeddings" in settings:  # this class ties a fresh model's in any case
      model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(model.lm_head.weight))
    elif settings.get("tie_word_embeddings") is False:  # here the copies are one still
      for copy, own in FAMILIES[hf_config.model_type].copies.items():
        model.get_parameter(copy).copy_(model.get_parameter(own))
    if hasattr(model, "final_logits_bias"):
      model.final_logits_bias.normal_()
  hf = hf_config.to_dict() | {key: settings[key] for key in ("tie_word_embeddings",) if key in settings}
  config, params = params_from_huggingface(hf, tensors_of(model))
  return model, hf, config, params


def tensors_of(model):
  """The tensors that `save_pretrained` writes."""
  from safetensors.numpy import load_file

  with tempfile.TemporaryDirectory() as directory:
    model.save_pretrained(directory)
    return load_file(f"{directory}/model.safetensors")


def rows(lengths, size, seed):
  """(tokens, segment ids) of right-padded rows."""
  tokens = np.random.default_rng(seed).integers(3, V, (len(lengths), size))
  mask = (np.arange(size) < np.asarray(lengths)[:, None]).astype(np.int32)
  return np.where(mask, tokens, 0), mask


@functools.cache
def inputs(name):
  """The batch of a case: of the encoder, and of the decoder where there is one."""
  tokens, mask = rows(LENGTHS["T"], T, 1)
  if name in ENCODERS:
    types = np.random.default_rng(2).integers(0, case(name)[2].num_token_types or 1, (B, T))
    return {"tokens": tokens, "segment_ids": mask} | ({"token_types": types} if "bert-" in name[:5] else {})
  if name in ("bart-sequence", "mbart-sequence"):  # the decoder reads the same text, one place later, up to its end
    source = np.where(np.arange(T) == mask.sum(-1, keepdims=True) - 1, IDS["eos_token_id"], tokens)
    shifted = np.concatenate([np.full((B, 1), BART["decoder_start_token_id"]), source[:, :-1]], axis=1)
    return {"tokens": shifted, "segment_ids": mask, "source": source, "source_segment_ids": mask}
  source, source_mask = rows(LENGTHS["S"], S, 3)
  return {"tokens": tokens, "segment_ids": mask, "source": source, "source_segment_ids": source_mask}


@functools.cache
def torch_outputs(name):
  """(last hidden state, logits or None) of the transformers model."""
  model, batch = case(name)[0], {key: torch.tensor(x).long() for key, x in inputs(name).items()}
  with torch.no_grad():
    if name in ENCODER_DECODERS:
      out = model(
        input_ids=batch["source"],
        attention_mask=batch["source_segment_ids"],
        decoder_input_ids=batch["tokens"],
        decoder_attention_mask=batch["segment_ids"],
        output_hidden_states=True,
      )
      hidden = out.decoder_hidden_states[-1].numpy()
      return hidden, spans(out) if name.endswith("-span") else out.logits.numpy()
    types = {"token_type_ids": batch["token_types"]} if "token_types" in batch else {}
    out = model(batch["tokens"], attention_mask=batch["segment_ids"], output_hidden_states=True, **types)
  if case(name)[2].head == "none":
    x = out.last_hidden_state.numpy()
    return x, out.pooler_output.numpy() if "pooler_output" in out else x[:, 0]
  if name.endswith("-span"):
    return out.hidden_states[-1].numpy(), spans(out)
  hidden = model.model(batch["tokens"], attention_mask=batch["segment_ids"]) if "modern" in name else None
  hidden = out.hidden_states[-1] if hidden is None else hidden.last_hidden_state
  logits = out.logits.numpy()
  return hidden.detach().numpy(), logits[..., None] if name == "electra-discriminator" else logits


def spans(out):
  return torch.stack([out.start_logits, out.end_logits], -1).numpy()


@functools.cache
def forward(config, compute=oracle.XLA):
  """(params, batch) -> (last hidden state, what the head makes of it)."""
  graph = declare(config, compute)[0]

  def run(params, batch):
    model, batch = nnx.merge(graph, params), dict(batch)
    if config.architecture == "encoder_decoder":
      segments = batch.pop("source_segment_ids")
      batch["encoded"] = model.encode(batch.pop("source"), segment_ids=segments)
      batch["encoded_segment_ids"] = segments
    x, _ = model.hidden(**batch)
    if config.head == "lm":
      return x, model.logits(x)
    return x, model.pooled(x) if config.head == "none" else model.classify(x, batch["segment_ids"])

  return oracle.jit(run)


@pytest.mark.parametrize("name", COMPUTED)
def test_padded_batch(name):
  _, _, config, params = case(name)
  hidden, logits = forward(config)(params, inputs(name))
  want_hidden, want_logits = torch_outputs(name)
  assert 0.1 < want_logits.std() < 30  # else the tolerance says nothing
  real = inputs(name)["segment_ids"] == 1
  oracle.assert_close(np.asarray(hidden)[real], want_hidden[real])
  if want_logits.ndim == 3:
    logits, want_logits = np.asarray(logits)[real], want_logits[real]
  oracle.assert_close(logits, want_logits)


def test_pads_inside_of_a_text_are_not_counted():
  """In the families whose code finds positions by the token for padding; attention sees it."""
  seen = []
  for name in ENCODERS | ENCODER_DECODERS:
    config = case(name)[2]
    if config.position_pad_id is None or name in LIKE_OTHERS or config.head != "lm":
      continue
    seen.append(config.position)
    batch = {key: np.array(x) for key, x in inputs(name).items()}
    for key in batch:
      if key.endswith("segment_ids"):
        batch[key] = np.ones_like(batch[key])
      else:
        batch[key] = np.random.default_rng(5).integers(3, V, batch[key].shape)
        batch[key][:, [0, 3, 4, 7]] = config.position_pad_id
    with torch.no_grad():
      ids = {key: torch.tensor(x).long() for key, x in batch.items()}
      if "source" in ids:
        want = case(name)[0](input_ids=ids["source"], decoder_input_ids=ids["tokens"]).logits.numpy()
      else:
        want = case(name)[0](ids["tokens"]).logits.numpy()
    oracle.assert_close(np.asarray(forward(config)(case(name)[3], batch)[1]), want)
  assert {"learned", "sinusoidal"} <= {*seen}


@pytest.mark.parametrize("name", ENCODERS | ENCODER_DECODERS)
def test_export(name, tmp_path):
  from safetensors.numpy import save_file

  model, _, config, params = case(name)
  written, tensors = params_to_huggingface(config, model.config.model_type, params)
  original = tensors_of(model)
  assert tensors.keys() == original.keys()
  for tensor_name, tensor in tensors.items():
    np.testing.assert_array_equal(tensor, original[tensor_name], err_msg=tensor_name)
  save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
  (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": 0} | written))  # 0: inside this vocabulary
  again, info = type(model).from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  for tensor_name, tensor in again.state_dict().items():
    np.testing.assert_array_equal(tensor.numpy(), model.state_dict()[tensor_name].numpy(), err_msg=tensor_name)
  assert params_from_huggingface(written, tensors)[0] == config


@pytest.mark.parametrize("name", ["modernbert-mlm", "t5", "deberta-xlarge"])
def test_packed_documents(name):
  """Two documents in a row see neither each other nor, across, the other's source."""
  _, _, config, params = case(name)
  batch = inputs(name)
  first, second = 6, T - 6
  tokens = np.concatenate([batch["tokens"][1:, :first], batch["tokens"][:1, :second]], axis=1)
  packed = {
    "tokens": tokens,
    "positions": np.concatenate([np.arange(first), np.arange(second)])[None],
    "segment_ids": np.repeat([1, 2], [first, second])[None].astype(np.int32),
  }
  alone = {"tokens": batch["tokens"][::-1], "segment_ids": np.arange(T)[None] < np.array([[first], [second]])}
  if name == "t5":
    packed["source"] = np.concatenate([batch["source"][1:, :8], batch["source"][:1, : S - 8]], axis=1)
    packed["source_segment_ids"] = np.repeat([1, 2], [8, S - 8])[None].astype(np.int32)
    alone["source"] = batch["source"][::-1]
    alone["source_segment_ids"] = (np.arange(S)[None] < np.array([[8], [S - 8]])).astype(np.int32)
  alone["segment_ids"] = alone["segment_ids"].astype(np.int32)
  got, want = forward(config)(params, packed)[0], forward(config)(params, alone)[0]
  oracle.assert_close(got[0, :first], want[0, :first])
  oracle.assert_close(got[0, first:], want[1, :second])


def test_the_names_of_debertas_third_version():
  """As its files and transformers without `legacy` have the head for masked tokens."""
  model, hf, config, params = case("deberta-mlm")
  names = {
    "cls.predictions.transform.": "lm_predictions.lm_head.",
    "cls.predictions.bias": "lm_predictions.lm_head.bias",
  }
  renamed = {}
  for key, tensor in tensors_of(model).items():
    old = next((old for old in names if key.startswith(old)), "")
    renamed[names.get(old, "") + key.removeprefix(old)] = tensor
  assert renamed.keys() != tensors_of(model).keys()
  got_config, got = params_from_huggingface(hf, renamed)
  assert got_config == config
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_the_encoder_of_a_whole_t5(caplog):
  """As people load one by `T5EncoderModel.from_pretrained`; its texts have vectors."""
  model, hf, config, params = case("t5")
  with caplog.at_level(logging.WARNING, "jaxllm"):
    c, encoder = params_from_huggingface(hf | {"architectures": ["T5EncoderModel"]}, tensors_of(model))
  assert "no part of a 'T5EncoderModel' stand aside" in caplog.text
  ids = [5, 9, 11, 4, 1]
  with torch.no_grad():
    want = model.encoder(torch.tensor([ids])).last_hidden_state[0].numpy()
  ours = Model(c, encoder)
  oracle.assert_close(ours.encode([ids])[0], want)
  mean = want.mean(0)
  oracle.assert_close(ours.embed([ids])[0], mean / np.linalg.norm(mean))
