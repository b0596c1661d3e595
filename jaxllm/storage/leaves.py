"""Leaves of a state by path, and the plain nested dicts in which they are stored."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def leaf_paths(tree: Any) -> dict[str, Any]:
  """Leaf path ("opt_state/0/mu/blocks/attention/query") -> leaf, in the tree's own order."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
  if len(leaves) != len(flat):
    raise ValueError("two leaves of the state have the same path")
  return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, dict]:
  """Paths to nested dicts; a leaf at the top, which would be no directory, becomes {"value": leaf}."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, name = path.split("/") if "/" in path else (path, "value")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def unnest(tree: Mapping[str, Any], paths: Mapping[str, Any]) -> dict[str, Any]:
  leaves = {}
  for path in paths:
    node: Any = tree
    for name in path.split("/") if "/" in path else (path, "value"):
      node = node[name]
    leaves[path] = node
  return leaves


def is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored_form(leaf: Any) -> Any:
  if not isinstance(leaf, jax.Array):
    return np.asarray(leaf)
  return jax.random.key_data(leaf) if is_key(leaf) else leaf


def num_elements(leaf: Any) -> int:
  return math.prod(np.shape(leaf))


def describe(leaf: Any) -> dict[str, Any]:
  if not hasattr(leaf, "dtype"):
    leaf = np.asarray(leaf)
  described: dict[str, Any] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
  if isinstance(leaf, jax.Array) and is_key(leaf):
    described["impl"] = str(jax.random.key_impl(leaf))
  return described
