"""Every kind of cache against no cache, on the same tokens: whole rows of the plain forward, read piece by piece."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import cpu_ffi
from jaxllm.models.build import declare, unstack_layers
from jaxllm.models.caches import init_cache, init_paged_cache
from jaxllm.models.config import AdapterConfig, Compute, MLAConfig, ModelConfig, MoEConfig
from jaxllm.parallel.config import AxisRules, MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.sharding import activation_sharding, param_shardings

V, T, SIZE = 29, 16, 4  # vocabulary, tokens of the longest row, tokens of a page
BASE = ModelConfig(vocab_size=V, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=24, max_seq_len=32)
LATENT = MLAConfig(kv_lora_rank=8, q_lora_rank=6, nope_head_dim=6, rope_head_dim=4, value_head_dim=5)
WINDOW = dict(sliding_window=3, layer_pattern=("local", "global"))
CASES = {
  "grouped": dict(),
  "learned": dict(position="learned", norm="layernorm", mlp="gelu", attention_bias=True),
  "window": WINDOW,
  "window-alone": dict(sliding_window=5, layer_pattern=("local",), query_scale=0.7),
  "alibi-window": dict(position="alibi", **WINDOW),
  "sinks-softcap": dict(attention_sinks=True, attention_softcap=1.0, **WINDOW),
  "sink-tokens": dict(sink_tokens=2, **WINDOW),
  "sink-tokens-alibi": dict(sink_tokens=1, position="alibi", **WINDOW),
  "relative": dict(position="relative", relative_buckets=8, relative_max_distance=12),
  "virtual-tokens": dict(adapter=AdapterConfig(prefix_len=3), **WINDOW),
  "latent": dict(mla=LATENT, num_kv_heads=4, head_dim=0),
  "experts": dict(moe=MoEConfig(num_experts=4, top_k=2, mlp_dim=8, first_dense_layers=1, capacity_factor=1.0)),
}
FLAT = [name for name in CASES if not name.startswith(("sink-tokens", "relative"))]
TOKENS = np.random.default_rng(2).integers(0, V, (4, T))
# Rows 0 to 3 are sequences of these tokens; what each call reads of each of them.
CALLS = [(5, 3, 0), (4, 0, 5), (1, 1, 1), (0, 5, 1), (1, 1, 1), (1, 1, 1)]


@functools.cache
def case(name):
  """(config, params, logits of the rows of TOKENS without a cache)"""
  c = dataclasses.replace(BASE, **({"head_dim": 0} | CASES[name]))
  params = unstack_layers(oracle.random_params(c))
  without_limit = c if c.moe is None else dataclasses.replace(c, moe=dataclasses.replace(c.moe, capacity_factor=None))
  return c, params, np.asarray(oracle.forward(without_limit)(params, TOKENS))


class Host:
  """What an engine does on the host: hands out pages, takes back those behind the window, reads tokens in pieces."""

  def __init__(self, name, pages, flat=False, **options):
    self.c, self.params, self.want = case(name)
    self.flat, self.sequences = flat, [0, 1, 2]
    cache = init_paged_cache(self.c, 3, T, pages=pages, page_size=SIZE, **options)
    poison = lambda x: x if x.dtype.itemsize == 1 else x.at[1:].set(jnp.nan)  # noqa: E731
    self.cache = dataclasses.replace(cache, layers=jax.tree.map(poison, cache.layers))
    self.tables = {kind: np.array(table) for kind, table in cache.tables.items()}
    self.missing = {kind: table[0, 0] for kind, table in self.tables.items()}
    self.free = {kind: list(range(1, n)) for kind, n in self.missing.items()}  # page 0 is for what is out of sight
    self.least = {kind: len(free) for kind, free in self.free.items()}

  def release(self, row):
    """Ends a row; its pages are poisoned and go back."""
    for kind, table in self.tables.items():
      gone = [page for page in table[row] if 0 < page < self.missing[kind]]
      self._poison(kind, gone)
      table[row] = self.missing[kind]
    self.cache = dataclasses.replace(self.cache, length=self.cache.length.at[row].set(0))

  def _poison(self, kind, pages):
    self.free[kind] += pages
    if pages and jax.tree.leaves(self.cache.layers)[0].dtype.itemsize > 1:
      layers = tuple(
        jax.tree.map(lambda x: x.at[jnp.array(pages)].set(jnp.nan), layer) if layer.table == kind else layer
        for layer in self.cache.layers
      )
      self.cache = dataclasses.replace(self.cache, layers=layers)

  def read(self, counts):
    """The next tokens of each row; returns (got, want), logits of the real ones."""
    lengths = np.array(self.cache.length)
    self._forget()  # now, and not before drafts are judged
    for kind, table in self.tables.items():
      for row, (length, count) in enumerate(zip(lengths, counts)):
        for page in range(-(-(length + count) // SIZE)):
          if table[row, page] == self.missing[kind]:
            table[row, page] = self.free[kind].pop(0)
      self.least[kind] = min(self.least[kind], len(self.free[kind]))
    news = [TOKENS[s, n : n + count] for s, n, count in zip(self.sequences, lengths, counts)]
    if self.flat:
      tokens = np.concatenate([*news, np.full(16 - sum(counts), 7)])[None]
    else:
      tokens = np.full((3, 1 if max(counts) == 1 else 5), 7)  # few shapes are few compilations
      for row, new in enumerate(news):
        tokens[row, : len(new)] = new
    tables = {kind: jnp.asarray(table) for kind, table in self.tables.items()}
    cache = dataclasses.replace(self.cache, tables=tables).expecting(jnp.array(counts))
    logits, self.cache = oracle.cached_step(self.c)(self.params, tokens, cache)
    assert self.cache.length.tolist() == (lengths + counts).tolist()
    if self.flat:
      got = np.array(logits)[0, : sum(counts)]
    else:
      got = np.concatenate([row[:count] for row, count in zip(np.array(logits), counts)])
    want = np.concatenate([self.want[s, n : n + c] for s, n, c in zip(self.sequences, lengths, counts)])
    return got, want

  def _forget(self):
    """Gives back local layers' pages that lie behind the window of the next token, and poisons them."""
    if "local" not in self.tables:
      return
    for row, length in enumerate(self.cache.length.tolist()):
      behind = max(0, length - self.c.sliding_window + 1) // SIZE
      for page in range(-(-self.c.sink_tokens // SIZE), behind):
        if 0 < self.tables["local"][row, page] < self.missing["local"]:
          self._poison("local", [int(self.tables["local"][row, page])])
          self.tables["local"][row, page] = 0


def same(pair, tolerance=1e-5):
  got, want = pair
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max()))


def contiguous(name, compute=oracle.XLA, **options):
  c, params, want = case(name)
  return oracle.cached_step(c, compute), params, init_cache(c, 4, T, **options), want


@pytest.mark.parametrize("name", CASES)
def test_contiguous(name):
  """Rows of different lengths, padded; then one token a call."""
  step, params, cache, want = contiguous(name)
  first = np.array([6, 3, 1, 5])
  got, cache = step(params, TOKENS[:, :6], cache.expecting(jnp.array(first)))
  for row, count in enumerate(first):
    same((got[row, :count], want[row, :count]))
  for now in range(8):
    at = first + now
    got, cache = step(params, TOKENS[np.arange(4), at][:, None], cache)
    same((got[:, 0], want[np.arange(4), at]))
  assert cache.length.tolist() == (first + 8).tolist()


@pytest.mark.parametrize("name, flat", [(n, False) for n in CASES] + [(n, True) for n in FLAT])
def test_paged(name, flat):
  """Chunks of prompts beside single tokens, pages that a row gave back, poison in all that was not written."""
  host = Host(name, pages=14, flat=flat)
  for counts in CALLS:
    same(host.read(counts))
  host.release(0)  # 12 tokens; their pages serve another row
  host.sequences[0] = 3
  for counts in [(5, 1, 1), (3, 1, 0), (1, 1, 1)]:
    same(host.read(counts))
  assert name == "window-alone" or host.least["global"] < 5


@pytest.mark.parametrize("name", ["window-alone", "sink-tokens", "alibi-window"])
def test_a_windows_pages_are_few(name):
  """Of each row: those of a window and of the tokens that come, and one for the sink tokens."""
  c = case(name)[0]
  few = 1 + 3 * (2 + (c.sink_tokens > 0))
  host = Host(name, pages={"local": few, "global": 1 + 3 * T // SIZE})
  for counts in [(4, 3, 1)] * 2 + [(1, 2, 2)] * 3 + [(1, 1, 1)] * 4:
    same(host.read(counts))
  assert few < 1 + 3 * T // SIZE and host.least["local"] <= 2


@pytest.mark.parametrize("dtype, tolerance", [("int8", 0.03), ("float8_e4m3fn", 0.1)])
@pytest.mark.parametrize("name", ["grouped", "latent", "sink-tokens"])
def test_eight_bits(name, dtype, tolerance):
  host = Host(name, pages=14, dtype=dtype)
  errors = []
  for counts in CALLS:
    got, want = host.read(counts)
    errors.append(np.abs(got - want).max() / np.abs(want).max())
  assert 1e-4 < max(errors) < tolerance


@pytest.mark.parametrize("name", ["grouped", "window", "latent"])
def test_rewind(name, monkeypatch):
  """Drafts that were refused leave no trace, in pages and without; each row keeps as many as were right."""
  step, params, cache, want = contiguous(name)
  host = Host(name, pages=14)
  kept = np.array([3, 5, 4, 6])
  drafts = np.where(np.arange(8) < kept[:, None], TOKENS[:, :8], (TOKENS[:, :8] + 1) % V)
  _, cache = step(params, drafts, cache)
  with monkeypatch.context() as patch:
    patch.setitem(globals(), "TOKENS", drafts)
    host.read((4, 4, 4))
    host.read((4, 4, 4))
  host.cache = dataclasses.replace(host.cache, length=jnp.array(kept[:3]))
  same(host.read((4, 3, 2)))
  cache = dataclasses.replace(cache, length=jnp.array(kept))
  for at in (kept, kept + 1):
    got, cache = step(params, TOKENS[np.arange(4), at][:, None], cache)
    same((got[:, 0], want[np.arange(4), at]))


def test_latents_are_kept_once():
  c, params, _ = case("latent")
  cache = jax.eval_shape(lambda: init_paged_cache(c, 2, 32, pages=8, page_size=SIZE))
  assert [leaf.shape for leaf in jax.tree.leaves(cache.layers[0])] == [(8, 1, SIZE, 8 + 4)]


TWO = dict(architecture="encoder_decoder", num_encoder_layers=2, num_layers=2)
PAIRS = {"relative": CASES["relative"] | TWO, "learned": CASES["learned"] | TWO}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("paged", [False, True])
def test_encoder_decoder(name, paged):
  """The encoder's states are given once; what is kept of them serves every later call, padding left out."""
  c = dataclasses.replace(BASE, **PAIRS[name])
  params = unstack_layers(oracle.random_params(c))
  graph = declare(c, oracle.XLA)[0]
  source, mask = TOKENS[:2, 4:11], np.array([[1] * 7, [1] * 4 + [0] * 3])
  encode = oracle.jit(lambda params: nnx.merge(graph, params).encode(source, segment_ids=mask))
  given = dict(encoded=encode(params), encoded_segment_ids=mask)
  run = oracle.jit(lambda params, tokens, **inputs: nnx.merge(graph, params)(tokens, **inputs))
  want, nothing = run(params, TOKENS[:2, :9], **given)
  assert nothing is None
  if paged:
    cache = init_paged_cache(c, 2, T, pages=8, page_size=SIZE)
    cache = dataclasses.replace(cache, tables={"global": jnp.arange(8).reshape(2, 4)[:, ::-1]})
  else:
    cache = init_cache(c, 2, T)
  got, cache = run(params, TOKENS[:2, :5], cache=cache, **given)
  same((got, want[:, :5]))
  for t in range(5, 9):
    got, cache = run(params, TOKENS[:2, t : t + 1], cache=cache)
    same((got[:, 0], want[:, t]))


def test_the_backend_that_was_named_reads_pages_or_raises():
  c, shapes = BASE, declare(BASE)[1]
  cache = jax.eval_shape(lambda: init_paged_cache(c, 2, T, pages=8, page_size=SIZE))
  tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)

  def trace(**compute):
    graph = declare(c, Compute(**compute))[0]
    jax.eval_shape(lambda p, t, k: nnx.merge(graph, p)(t, cache=k), shapes, tokens, cache)

  trace(attention="xla")
  with pytest.raises(ConfigError, match="paged_attention has no backend 'cudnn' on a100"):
    trace(target="a100", attention="cudnn")


def test_the_cpus_own_kernel_reads_pages():
  """Heads of 16, which it takes; float32 and int8 pages."""
  if not cpu_ffi.available():
    pytest.skip("no C++ kernels here")
  c = dataclasses.replace(BASE, head_dim=16, **WINDOW)
  params = unstack_layers(oracle.random_params(c))
  want = np.asarray(oracle.forward(c)(params, TOKENS[:2]))
  for dtype, tolerance in (("float32", 1e-5), ("int8", 0.03)):
    cache = init_paged_cache(c, 2, T, pages=8, page_size=SIZE, dtype=dtype)
    cache = dataclasses.replace(cache, tables=dict.fromkeys(("global", "local"), jnp.arange(8).reshape(2, 4)))
    step = oracle.cached_step(c, Compute(attention="cpu"))
    got, cache = step(params, TOKENS[:2, :7], cache)
    same((got, want[:, :7]), tolerance)
    got, cache = step(params, TOKENS[:2, 7:8], cache)
    same((got, want[:, 7:8]), tolerance)


KINDS = {
  "contiguous": lambda c, dtype: init_cache(c, 4, 1024, dtype),
  "paged": lambda c, dtype: init_paged_cache(c, 4, 1024, pages=1024, page_size=SIZE, dtype=dtype),
}


@pytest.mark.parametrize("name", ["grouped", "latent"])
@pytest.mark.parametrize("kind, dtype", [(k, t) for k in KINDS for t in ("float32", "bfloat16")] + [("paged", "int8")])
def test_a_donated_cache_is_written_where_it_lies(kind, dtype, name):
  c = dataclasses.replace(case(name)[0], **({"head_dim": 16} if name == "grouped" else {}))
  graph, shapes, _ = declare(c, Compute(dtype="bfloat16" if dtype == "bfloat16" else "float32"))
  cache = jax.eval_shape(lambda: KINDS[kind](c, dtype))
  tokens = jax.ShapeDtypeStruct((4, 1), jnp.int32)
  step = jax.jit(lambda p, t, cache: nnx.merge(graph, p)(t, cache=cache), donate_argnames="cache")
  memory = step.lower(jax.eval_shape(unstack_layers, shapes), tokens, cache).compile().memory_analysis()
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
  assert memory.alias_size_in_bytes >= held
  if name == "grouped" and cpu_ffi.available():  # plain XLA turns what it reads around, and a latent's values are cut
    assert memory.temp_size_in_bytes < 0.3 * held


@pytest.mark.parametrize("paged", [False, True])
def test_on_a_mesh(paged):
  """Rows over data, heads over tensor; the logits are one device's, and so is what each device does not hold."""
  c, rules = dataclasses.replace(BASE, vocab_size=32, num_heads=8, num_kv_heads=4, head_dim=4, **WINDOW), AxisRules()
  mesh = make_mesh(MeshConfig(data=2, tensor=4))
  params = oracle.random_params(c)
  want = np.asarray(oracle.forward(c)(params, TOKENS[:, :8]))
  graph, shapes, axes = declare(c, oracle.XLA)
  table = jnp.arange(4 * T // SIZE).reshape(4, -1)

  def empty():
    if not paged:
      return init_cache(c, 4, T)
    cache = init_paged_cache(c, 4, T, pages=table.size, page_size=SIZE)
    return dataclasses.replace(cache, tables=dict.fromkeys(cache.tables, table))

  def on_mesh(function):
    def run(*arguments):
      with activation_sharding(mesh, rules):
        return function(*arguments)

    return oracle.jit(run)

  step = on_mesh(lambda params, tokens, cache: nnx.merge(graph, params)(tokens, cache=cache))
  params = jax.device_put(params, param_shardings(shapes, axes, mesh, rules))
  cache = on_mesh(empty)()
  got, cache = step(params, TOKENS[:, :6], cache)
  same((got, want[:, :6]))
  for t in (6, 7):
    got, cache = step(params, TOKENS[:, t : t + 1], cache)
    same((got, want[:, t : t + 1]))
  leaf = jax.tree.leaves(cache.layers[0])[0]
  parts = (1, 4, 1, 1) if paged else (2, 1, 4, 1)
  assert leaf.sharding.shard_shape(leaf.shape) == tuple(n // ways for n, ways in zip(leaf.shape, parts))


def test_what_makes_no_sense_is_refused():
  c, params, _ = case("grouped")
  graph = declare(c, oracle.XLA)[0]
  call = lambda tokens, **inputs: nnx.merge(graph, params)(tokens, **inputs)  # noqa: E731
  with pytest.raises(ConfigError, match=r"tokens \(1, 4\) for a cache of 4 rows: give \[4, T\]"):
    call(TOKENS[:1, :4], cache=init_cache(c, 4, T))
  with pytest.raises(ConfigError, match="with a cache each row is one document"):
    call(TOKENS[:2, :4], cache=init_cache(c, 2, T), segment_ids=np.ones((2, 4), np.int32))
  both = dataclasses.replace(BASE, **PAIRS["learned"])
  model = nnx.merge(declare(both, oracle.XLA)[0], oracle.random_params(both))
  for inputs in (dict(), dict(cache=init_cache(both, 2, T))):
    with pytest.raises(ConfigError, match="encoded="):
      model(TOKENS[:2, :4], **inputs)
  with pytest.raises(ConfigError, match=r"read pages row by row: give tokens \[rows, T\]"):
    Host("sink-tokens", pages=14, flat=True).read((2, 2, 2))
