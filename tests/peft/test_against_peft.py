"""Every kind and option of LoRA and DoRA against `peft`: logits, gradients, and weights after a step of AdamW."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.base.errors import ConfigError
from jaxllm.data.config import DataConfig
from jaxllm.interop import peft as adapters
from jaxllm.models.config import ComputeConfig
from jaxllm.objectives.causal_lm import CausalLM
from jaxllm.objectives.classification import Classification
from jaxllm.parallel.batch import put_batch
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.peft.dora import Dora
from jaxllm.peft.lora import Lora
from jaxllm.training.compile import make_program
from jaxllm.training.config import ModelInitConfig, OptimizerConfig, RunConfig, TrainingConfig
from jaxllm.training.start import begun, open_start

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402
from peft.optimizers import create_loraplus_optimizer  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

B, T, VOCAB = 2, 12, 96
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
ADAM = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1)
OPTIMIZER = OptimizerConfig(
  learning_rate=1e-2, schedule="constant", warmup_steps=0, b1=0.9, b2=0.95, eps=1e-4, weight_decay=0.1, clip_norm=None
)


def llama(**more):
  sizes = SIZES | dict(num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False) | more
  return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def gpt2():
  return transformers.GPT2LMHeadModel(
    transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32)
  )


def bert():
  config = transformers.BertConfig(**SIZES, max_position_embeddings=32, num_labels=3)
  return transformers.BertForSequenceClassification(config)


MODELS = {"llama": llama, "tied llama": lambda: llama(tie_word_embeddings=True), "gpt2": gpt2, "bert": bert}
FAMILY = {"tied llama": "llama"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """name -> (the model in torch, where its files are)."""

  def make(name):
    torch.manual_seed(0)
    model, place = MODELS[name]().eval(), tmp_path_factory.mktemp("model") / "model"
    with torch.no_grad():
      for weight in model.parameters():  # vectors that are not all ones and zeros
        weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(place)
    return model, place

  made = {}
  return lambda name: made[name] if name in made else made.setdefault(name, make(name))


def rows(name):
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, VOCAB, (B, T + 1)).astype(np.int32)
  batch = {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy(),
    "segment_ids": np.ones((B, T), np.int32),
    "loss_weights": np.ones((B, T), np.float32),
  }
  if name == "bert":
    batch |= {"targets": np.array([2, 0], np.int32), "loss_weights": np.ones(B, np.float32)}
    batch["token_types"] = np.zeros((B, T), np.int32)
  return batch


class Theirs:
  """A model with an adapter in PEFT."""

  def __init__(self, name, model, place, tmp_path, settings, randomize):
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    self.name, self.place, self.tmp_path, self.count = name, place, tmp_path, 0
    torch.manual_seed(1)
    self.model = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type=task, **settings)).eval()
    if randomize:
      with torch.no_grad():
        for path, weight in self.model.named_parameters():
          if "lora_B" in path or "lora_embedding_A" in path or "magnitude" in path:
            weight.add_(0.1 * torch.randn_like(weight))

  def logits(self):
    return self.model(input_ids=torch.tensor(rows(self.name)["inputs"], dtype=torch.long)).logits

  def loss(self):
    logits = self.logits()
    targets = torch.tensor(rows(self.name)["targets"], dtype=torch.long)
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))

  def trained(self):
    return {path: weight for path, weight in self.model.named_parameters() if weight.requires_grad}

  def parts(self, values, base):
    """Its trained arrays, or what stands for each, by our paths."""
    self.count += 1
    place = self.tmp_path / f"adapter{self.count}"
    self.model.save_pretrained(place)
    values = {path: value.detach().clone().contiguous() for path, value in values.items()}
    save_file(peft.get_peft_model_state_dict(self.model, state_dict=values), place / "adapter_model.safetensors")
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": True}))
    read = adapters.read_adapter(place, base.config, [FAMILY.get(self.name, self.name)])
    read = read.of_tied() if base.config.tie_embeddings else read
    found = adapters.open_adapter(read, base.config, base.tensors)
    arrays = {f"{path}/{part}": t.read() for path, c in found.changes.items() for part, t in c.parts.items()}
    return arrays | {path: tensor.read() for path, tensor in found.full.items()}


def by_path(tree):
  found = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


class Ours:
  """The same in this package."""

  def __init__(self, name, place, tmp_path, way):
    data = DataConfig(task="classification", packing="none", labels=("a", "b", "c")) if name == "bert" else DataConfig()
    objective = Classification() if name == "bert" else CausalLM()
    training = TrainingConfig(batch_size=B, seq_len=T)
    run = RunConfig(
      model_init=ModelInitConfig(path=str(place)), peft=way, data=data, objective=objective, training=training
    )
    run, self.start = open_start(run, tmp_path / "run")
    compute = ComputeConfig(dtype="float32", matmul="xla", attention="xla", elementwise="xla", cross_entropy="xla")
    mesh = MeshConfig(data=1)
    self.run, self.batch, self.objective = run, rows(name), objective
    self.program = make_program(
      run.model, training, OPTIMIZER, mesh, make_mesh(mesh), objective, run.data, compute, run.peft, self.start
    )
    loaded = begun(tmp_path / "run", self.start, self.program.loaded, lambda: None)
    self.state, self.frozen = self.program.init(jax.random.key(0), loaded)

  def set(self, arrays):
    """Takes the values of trained arrays."""
    assert arrays.keys() == by_path(self.state.params).keys()
    paths = iter(by_path(self.state.params))
    params = jax.tree.map(lambda old: jnp.asarray(arrays[next(paths)]).reshape(old.shape), self.state.params)
    self.state = dataclasses.replace(self.state, params=params)

  def model(self, trained):
    return nnx.merge(self.program.graph, self.program.policy(trained, self.frozen))

  def logits(self):
    types = {"token_types": self.batch["token_types"]} if "token_types" in self.batch else {}
    return jax.jit(lambda trained: self.model(trained)(self.batch["inputs"], **types)[0])(self.state.params)

  def gradients(self):
    def loss(trained):
      found = self.objective({"policy": self.model(trained)}, self.batch, None)
      return found.total / found.weight

    return by_path(jax.jit(jax.grad(loss))(self.state.params))

  def step(self):
    rows = put_batch(self.batch, self.program.batch)
    self.state, _ = self.program.step(self.state, self.frozen, rows)
    return by_path(self.state.params)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
OUR_ATTENTION = ("attention/query", "attention/key", "attention/value", "attention/output")
BERT = dict(r=4, lora_alpha=8, target_modules=["query", "value"])
OUR_BERT = dict(rank=4, alpha=8, targets=OUR_ATTENTION[::2], modules_to_save=("head/weight", "head/bias"))
LLAMA = dict(r=4, lora_alpha=8, target_modules=ATTENTION)
OUR_LLAMA = dict(rank=4, alpha=8, targets=OUR_ATTENTION)
CASES = {
  "LoRA, all-linear": ("llama", dict(r=4, lora_alpha=8, target_modules="all-linear"), Lora(rank=4, alpha=8)),
  "LoRA, GPT-2": (
    "gpt2",
    dict(r=4, lora_alpha=8, target_modules=["attn.c_proj", "c_fc", "mlp.c_proj"], fan_in_fan_out=True),
    Lora(rank=4, alpha=8, targets=("attention/output", "mlp/up", "mlp/down")),
  ),
  "LoRA, BERT classifier": ("bert", BERT, Lora(**OUR_BERT)),
  "rsLoRA": ("llama", LLAMA | dict(use_rslora=True), Lora(**OUR_LLAMA, rslora=True)),
  "LoRA, gaussian": ("llama", LLAMA | dict(init_lora_weights="gaussian"), Lora(**OUR_LLAMA, init="gaussian")),
  "LoRA, rank and alpha patterns": (
    "llama",
    LLAMA | dict(rank_pattern={"q_proj": 2, "v_proj": 6}, alpha_pattern={"k_proj": 5, "v_proj": 3}),
    Lora(
      **OUR_LLAMA,
      rank_pattern={"attention/query": 2, "attention/value": 6},
      alpha_pattern={"attention/key": 5, r".*/value": 3},
    ),
  ),
  "LoRA, exclude": (
    "llama",
    dict(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=["k_proj", "down_proj"]),
    Lora(rank=4, alpha=8, exclude=("attention/key", "mlp/down")),
  ),
  "LoRA, embedding and head": (
    "llama",
    dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    Lora(rank=4, alpha=8, targets=("embedding/tokens", "head", "attention/query")),
  ),
  "LoRA, modules to save": (
    "llama",
    LLAMA | dict(modules_to_save=["lm_head", "embed_tokens", "model.norm"]),
    Lora(**OUR_LLAMA, modules_to_save=("head", "embedding/tokens", "final_norm")),
  ),
  "LoRA+": (
    "llama",
    LLAMA | dict(target_modules=[*ATTENTION, "embed_tokens"]),
    Lora(**OUR_LLAMA | dict(targets=(*OUR_ATTENTION, "embedding/tokens")), lr_ratio=16.0),
  ),
  "DoRA": ("llama", dict(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True), Dora(rank=4, alpha=8)),
  "DoRA, LoRA+": ("llama", LLAMA | dict(use_dora=True), Dora(**OUR_LLAMA, lr_ratio=8.0)),
  "DoRA, BERT classifier": ("bert", BERT | dict(use_dora=True), Dora(**OUR_BERT)),
}


def torch_optimizer(theirs, way):
  if way.lr_ratio != 1:
    more = dict(lr=ADAM["lr"], betas=ADAM["betas"], eps=ADAM["eps"])
    optimizer = create_loraplus_optimizer(
      theirs.model, torch.optim.AdamW, loraplus_lr_ratio=way.lr_ratio, loraplus_weight_decay=0.1, **more
    )
    # There DoRA's magnitudes decay; here no vector does
    vectors = [w for group in optimizer.param_groups for w in group["params"] if w.ndim == 1]
    for group in optimizer.param_groups:
      group["params"] = [w for w in group["params"] if w.ndim > 1]
    optimizer.add_param_group({"params": vectors, "weight_decay": 0.0, "lr": way.lr_ratio * ADAM["lr"]})
    return optimizer
  decays = lambda path, w: w.ndim > 1 and "embed" not in path  # noqa: E731
  trained = theirs.trained().items()
  groups = [{"params": [w for path, w in trained if decays(path, w)]}]
  groups += [{"params": [w for path, w in trained if not decays(path, w)], "weight_decay": 0.0}]
  return torch.optim.AdamW([group for group in groups if group["params"]], **ADAM)


@pytest.mark.parametrize("subject", CASES)
def test_logits_gradients_and_a_step(subject, models, tmp_path, agrees):
  name, settings, way = CASES[subject]
  subject = f"{subject} (PEFT)"
  model, place = models(name)
  theirs = Theirs(name, model, place, tmp_path, settings, randomize=True)
  ours = Ours(name, place, tmp_path, way)
  base = ours.start.policy
  ours.set(theirs.parts(theirs.trained(), base))
  agrees(subject, "logits", ours.logits(), theirs.logits().detach())
  optimizer = torch_optimizer(theirs, way)
  theirs.loss().backward()
  gradients, own = theirs.parts({path: w.grad for path, w in theirs.trained().items()}, base), ours.gradients()
  assert gradients.keys() == own.keys() and all(np.abs(x).max() > 0 for x in gradients.values())
  for path, gradient in gradients.items():
    agrees(subject, "gradients", own[path], gradient.reshape(own[path].shape))
  optimizer.step()
  after, own = theirs.parts(theirs.trained(), base), ours.step()
  for path, array in after.items():
    agrees(subject, "weights after a step of AdamW", own[path], array.reshape(own[path].shape))
  agrees(subject, "logits after a step of AdamW", ours.logits(), theirs.logits().detach())


def test_an_embedding_that_is_the_head_too(models, tmp_path, agrees):
  """There the two have factors of their own with one memory, and a gradient each; here it is one gradient."""
  model, place = models("tied llama")
  settings = dict(r=4, lora_alpha=8, target_modules=["embed_tokens"], ensure_weight_tying=True)
  theirs = Theirs("tied llama", model, place, tmp_path, settings, randomize=True)
  ours = Ours("tied llama", place, tmp_path, Lora(rank=4, alpha=8, targets=("embedding/tokens",)))
  subject = "LoRA, embedding tied to the head (PEFT)"
  ours.set(theirs.parts(theirs.trained(), ours.start.policy))
  agrees(subject, "logits", ours.logits(), theirs.logits().detach())
  theirs.loss().backward()
  table, head = theirs.model.base_model.model.model.embed_tokens, theirs.model.base_model.model.lm_head
  own = ours.gradients()
  a = table.lora_embedding_A["default"].grad.T + head.lora_B["default"].weight.grad
  b = table.lora_embedding_B["default"].grad.T + head.lora_A["default"].weight.grad
  agrees(subject, "gradients", own["embedding/tokens/a"], a)
  agrees(subject, "gradients", own["embedding/tokens/b"], b)


def test_pissa(models, tmp_path, agrees):
  """Singular vectors have either sign, so products are compared; the base stands unchanged under ours."""
  model, place = models("llama")
  theirs = Theirs("llama", model, place, tmp_path, LLAMA | dict(init_lora_weights="pissa"), randomize=False)
  ours = Ours("llama", place, tmp_path, Lora(**OUR_LLAMA, init="pissa"))
  subject, base = "PiSSA (PEFT)", ours.start.policy
  agrees(subject, "logits", ours.logits(), model(torch.tensor(ours.batch["inputs"], dtype=torch.long)).logits.detach())

  def products(arrays):
    paths = {path.removesuffix("/a") for path in arrays if path.endswith("/a")}
    return {path: np.asarray(arrays[f"{path}/a"] @ arrays[f"{path}/b"]) for path in paths}

  def compare(what):
    theirs_now = products(theirs.parts(theirs.trained(), base))
    for path, product in products(by_path(ours.state.params)).items():
      agrees(subject, what, product, theirs_now[path])

  compare("A B at first")
  optimizer = torch_optimizer(theirs, Lora())
  theirs.loss().backward()
  optimizer.step()
  ours.step()
  compare("A B after a step of AdamW")
  agrees(subject, "logits after a step of AdamW", ours.logits(), theirs.logits().detach())


@pytest.mark.parametrize("way", [Lora, Dora], ids=["LoRA", "DoRA"])
def test_peft_adapters_go_on(way, models, tmp_path, agrees):
  """peft.path: its shapes and weights are taken, per-module ranks too, and it is trained from there."""
  model, place = models("llama")
  settings = LLAMA | dict(
    rank_pattern={"q_proj": 2}, use_dora=way is Dora, target_modules=[*ATTENTION[:2], "layers.0.mlp.up_proj"]
  )
  if way is Dora:
    settings["target_modules"] = ATTENTION[:2]
  theirs = Theirs("llama", model, place, tmp_path, settings, randomize=True)
  theirs.model.save_pretrained(tmp_path / "made")
  ours = Ours("llama", place, tmp_path, way(path=str(tmp_path / "made")))
  subject, base = f"{way.kind} of PEFT, trained on", ours.start.policy
  assert ours.run.peft.rank == 4 and ours.run.peft.alpha == 8
  agrees(subject, "logits", ours.logits(), theirs.logits().detach())
  optimizer = torch_optimizer(theirs, way())
  theirs.loss().backward()
  optimizer.step()
  after, own = theirs.parts(theirs.trained(), base), ours.step()
  for path, array in after.items():
    agrees(subject, "weights after a step of AdamW", own[path], array)
  agrees(subject, "logits after a step of AdamW", ours.logits(), theirs.logits().detach())


@pytest.mark.parametrize(
  "subject", ["LoRA, all-linear", "DoRA", "LoRA, modules to save", "LoRA, rank and alpha patterns"]
)
def test_counts_are_pefts(subject, models, tmp_path):
  name, settings, way = CASES[subject]
  model, place = models(name)
  theirs = Theirs(name, model, place, tmp_path, settings, randomize=False)
  ours = Ours(name, place, tmp_path, way)
  assert sum(leaf.size for leaf in jax.tree.leaves(ours.state.params)) == theirs.model.get_nb_trainable_parameters()[0]


WHOLE = {
  "a table": ("gpt2", dict(target_modules=["mlp.c_proj"], modules_to_save=["wte"], fan_in_fan_out=True)),
  "biases": ("bert", dict(target_modules=["query"], bias="all")),
}


@pytest.mark.parametrize("subject", WHOLE)
def test_counts_are_pefts_where_adapters_go_on(subject, models, tmp_path):
  """What an adapter has whole is trained, and no more of the modules that this is in."""
  name, settings = WHOLE[subject]
  model, place = models(name)
  theirs = Theirs(name, model, place, tmp_path, settings, randomize=True)
  theirs.model.save_pretrained(tmp_path / "made")
  ours = Ours(name, place, tmp_path, Lora(path=str(tmp_path / "made")))
  assert sum(leaf.size for leaf in jax.tree.leaves(ours.state.params)) == theirs.model.get_nb_trainable_parameters()[0]


def test_adapters_with_one_layer_whole_do_not_go_on(models, tmp_path):
  """Here all layers of a stack are trained, or none."""
  model, place = models("llama")
  settings = dict(target_modules=["q_proj"], modules_to_save=["layers.0.mlp.up_proj"])
  Theirs("llama", model, place, tmp_path, settings, randomize=True).model.save_pretrained(tmp_path / "made")
  with pytest.raises(ConfigError, match="has blocks/mlp/up/weight whole in some of the layers"):
    Ours("llama", place, tmp_path, Lora(path=str(tmp_path / "made")))
