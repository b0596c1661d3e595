"""What the settings of adapters mean: what they begin with, which modules, and what is wrong, each in one line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.models.build import declare, init_params
from jaxllm.models.config import ModelConfig, MoEConfig
from jaxllm.models.lora import DoraWeight
from jaxllm.models.weights import dense, is_adapted, map_weights_with_path, without_adapters
from jaxllm.peft.dora import Dora
from jaxllm.peft.lora import Lora, principal

MODEL = ModelConfig(vocab_size=256, embed_dim=128, num_layers=2, num_heads=4, mlp_dim=64, max_seq_len=16)
EXPERTS = dataclasses.replace(MODEL, moe=MoEConfig(num_experts=4, mlp_dim=64))


def adapted(way, model=MODEL):
  params = init_params(model, jax.random.key(0))
  way.check(params)
  found = {}
  after = way.adapt(params, jax.random.key(1))
  map_weights_with_path(lambda path, w: found.update({path: w}) if is_adapted(w) else None, after)
  return params, after, found


def test_what_adapters_begin_with():
  targets = ("attention/query", "embedding/tokens")
  for init in ("default", "gaussian"):
    _, _, found = adapted(Lora(rank=16, targets=targets, init=init))
    query, table = found["blocks/attention/query/weight"], found["embedding/tokens"]
    assert query.a.shape == (2, 128, 16) and not query.b.any()
    if init == "default":
      assert jnp.abs(query.a).max() <= 128**-0.5 and np.isclose(query.a.std(), (3 * 128) ** -0.5, rtol=0.05)
    else:
      assert np.isclose(query.a.std(), 1 / 16, rtol=0.05)
    assert not table.a.any() and np.isclose(table.b.std(), 1, rtol=0.05)
    assert query.scale == 1.0
  assert not np.array_equal(query.a[0], query.a[1])


def test_dora_begins_as_the_base():
  params, after, found = adapted(Dora(rank=4))
  assert all(isinstance(w, DoraWeight) for w in found.values()) and len(found) == 7
  up = params["blocks"]["mlp"]["up"]["weight"]
  np.testing.assert_allclose(found["blocks/mlp/up/weight"].magnitude, np.linalg.norm(up, axis=-2), rtol=1e-6)
  np.testing.assert_allclose(dense(found["blocks/mlp/up/weight"]), up, atol=1e-6)


def test_pissa_takes_the_largest_singular_values_and_leaves_the_base():
  params, after, found = adapted(Lora(rank=4, alpha=8, init="pissa"))
  for path, w in found.items():
    base = w.base.base
    u, s, v = np.linalg.svd(np.asarray(base, np.float64), full_matrices=False)
    largest = (u[..., :4] * s[..., None, :4]) @ v[..., :4, :]
    np.testing.assert_allclose(2 * np.asarray(w.a) @ np.asarray(w.b), largest, atol=1e-5, err_msg=path)
    np.testing.assert_allclose(dense(w), base, atol=1e-6)
  assert without_adapters(after)["blocks"]["mlp"]["up"]["weight"] is params["blocks"]["mlp"]["up"]["weight"]


def test_principal_parts_share_the_singular_values():
  w = np.random.default_rng(0).normal(size=(3, 12, 8)).astype(np.float32)
  a, b = principal(w, 8)
  np.testing.assert_allclose(a @ b, w, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(a, axis=-2), np.linalg.norm(b, axis=-1), rtol=1e-5)


def test_patterns_exclusions_and_whole_modules():
  way = Lora(
    rank=4,
    alpha=8,
    rank_pattern={"attention/query": 2, ".*/attention/.*": 3, r".*/(key|up)": 6},
    alpha_pattern={"up": 1},
    exclude=("down",),
    modules_to_save=("mlp/gate", "final_norm"),
  )
  _, after, found = adapted(way)
  ranks = {path.split("/")[-2]: (w.rank, w.scale) for path, w in found.items()}
  assert ranks == {"query": (2, 4.0), "key": (3, 8 / 3), "value": (3, 8 / 3), "output": (3, 8 / 3), "up": (6, 1 / 6)}
  trained = way.trained(after)
  assert trained["blocks"]["mlp"]["gate"]["weight"] is True and trained["final_norm"]["scale"] is True
  assert trained["blocks"]["mlp"]["down"]["weight"] is False and trained["embedding"]["tokens"] is False


def test_experts():
  _, _, found = adapted(Lora(rank=4, targets=("moe/up", "moe/down"), rank_pattern={"down": 2}), EXPERTS)
  assert found["blocks/moe/up/weight"].a.shape == (2, 4, 128, 4)
  assert found["blocks/moe/down/weight"].b.shape == (2, 4, 2, 128)
  _, _, found = adapted(Lora(rank=4), EXPERTS)
  assert "blocks/moe/router/weight" not in found and len(found) == 7


def test_nothing_is_dropped_before_experts():
  """As with PEFT, which refuses it too; what is no expert has dropout."""
  with pytest.raises(ConfigError, match="peft.dropout is not for experts: set it to 0 or put blocks/moe/down, "):
    adapted(Lora(rank=2, dropout=0.1), EXPERTS)
  _, _, found = adapted(Lora(rank=2, dropout=0.1, exclude=(".*/moe/.*",)), EXPERTS)
  assert len(found) == 4 and all(w.dropout == 0.1 for w in found.values())


def test_targets_are_matrices():
  """A pattern for all that is in a block does not take its biases and norms."""
  model = dataclasses.replace(MODEL, attention_bias=True)
  assert "bias" in declare(model)[1]["blocks"]["attention"]["query"]
  _, _, found = adapted(Lora(rank=2, targets=(r"blocks/.*", r"embedding/.*")), model)
  assert set(found) == {*(path for path in found if path.endswith("/weight")), "embedding/tokens"}


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(rank=65), r"peft.rank 65 is over the smaller dimension of blocks/mlp/\w+, which is (128 x 64|64 x 128)"),
    (dict(rank=4, rank_pattern={"up": 70}), "peft.rank 70 is over the smaller dimension of blocks/mlp/up"),
    (dict(targets=("qery",)), "peft.targets: 'qery' matches no module; there are blocks/attention/key"),
    (dict(exclude=("qery",)), "peft.exclude: 'qery' matches no module"),
    (dict(rank_pattern={"qery": 2}), "peft.rank_pattern: 'qery' matches no module"),
    (dict(alpha_pattern={"(": 2}), r"peft.alpha_pattern: '\(' is not a regular expression"),
    (dict(modules_to_save=("hed",)), "peft.modules_to_save: 'hed' matches no module; there are blocks/"),
    (dict(rank=0), "peft.rank is 0; it must be at least 1"),
    (dict(rank_pattern={"up": 0}), "peft.rank_pattern.up is 0"),
    (dict(alpha=0), "peft.alpha is 0; it must be over 0"),
    (dict(alpha=-4, init="pissa"), "peft.alpha is -4; it must be over 0"),
    (dict(alpha_pattern={"up": 0}), "peft.alpha_pattern.up is 0"),
    (dict(targets=("up",), rank_pattern={"down": 2}), "peft.rank_pattern: 'down' matches no module; there are .*up$"),
    (dict(exclude=("down",), alpha_pattern={"down": 2}), "peft.alpha_pattern: 'down' matches no module"),
    (dict(targets=("up", "down"), exclude=("all-linear",)), "peft.targets mean only modules that peft.exclude"),
    (dict(lr_ratio=0), "peft.lr_ratio is 0; it must be over 0"),
    (dict(dropout=1), "peft.dropout is 1"),
    (dict(path="somewhere", init="pissa"), "peft.init is 'pissa', but an adapter at peft.path begins as it is"),
  ],
)
def test_mistakes(settings, message):
  with pytest.raises(ConfigError, match=message) as error:
    adapted(Lora(**settings))
  assert "\n" not in str(error.value)
