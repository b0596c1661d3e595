"""The torch side of bench_train.py: the same Llama with torch's best settings for a CPU.

eager, compile: float32, or bfloat16 autocast. pure: weights and activations bfloat16, float32 master weights.
"""

import json
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

settings = json.loads(sys.argv[1])
B, T, V, D, N = (settings[k] for k in ("batch", "length", "vocab", "embed", "heads"))
pure = settings["mode"].startswith("pure")
autocast = settings["dtype"] == "bfloat16" and not pure
dtype = torch.float32 if settings["dtype"] == "float32" else torch.bfloat16


def rotate(x, cos, sin):
  a, b = x.chunk(2, -1)
  return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
  def __init__(self):
    super().__init__()
    self.attention_norm = nn.Parameter(torch.ones(D))
    self.mlp_norm = nn.Parameter(torch.ones(D))
    self.qkv = nn.Linear(D, 3 * D, bias=False)
    self.out = nn.Linear(D, D, bias=False)
    self.gate_up = nn.Linear(D, 2 * settings["mlp"], bias=False)
    self.down = nn.Linear(settings["mlp"], D, bias=False)

  def forward(self, x, cos, sin):
    h = F.rms_norm(x, (D,), self.attention_norm.to(x.dtype), 1e-5)
    q, k, v = (y.view(B, T, N, -1).transpose(1, 2) for y in self.qkv(h).chunk(3, -1))
    y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
    x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
    gate, up = self.gate_up(F.rms_norm(x, (D,), self.mlp_norm.to(x.dtype), 1e-5)).chunk(2, -1)
    return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
  def __init__(self, weights):
    super().__init__()
    self.embedding = nn.Parameter(torch.tensor(weights["embedding/tokens"]))
    self.norm = nn.Parameter(torch.ones(D))
    self.blocks = nn.ModuleList([Block() for _ in range(settings["layers"])])
    head_dim = D // N
    angles = np.outer(np.arange(T), 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim))
    self.register_buffer("cos", torch.tensor(np.cos(angles), dtype=torch.float32))
    self.register_buffer("sin", torch.tensor(np.sin(angles), dtype=torch.float32))

    def put(linear, *names):
      matrices = [weights[f"blocks/{name}/weight"][i] for name in names]
      linear.weight.data.copy_(torch.tensor(np.concatenate(matrices, axis=1)).T)

    for i, block in enumerate(self.blocks):  # noqa: B007, used by `put`
      put(block.qkv, "attention/query", "attention/key", "attention/value")
      put(block.out, "attention/output")
      put(block.gate_up, "mlp/gate", "mlp/up")
      put(block.down, "mlp/down")

  def forward(self, tokens, targets):
    x = F.embedding(tokens, self.embedding).to(dtype)
    cos, sin = self.cos.to(dtype), self.sin.to(dtype)
    for block in self.blocks:
      x = block(x, cos, sin)
    x = F.rms_norm(x, (D,), self.norm.to(dtype), 1e-5)
    logits = F.linear(x, self.embedding.to(dtype)).float()
    return F.cross_entropy(logits.view(-1, V), targets.reshape(-1))


torch.set_num_threads(os.cpu_count())
print(json.dumps(f"torch {torch.__version__}"), flush=True)
sys.stdin = iter(sys.stdin.readline, "")
first = next(sys.stdin)  # the jax side has written the weights by the time that this side is asked to run
model = Llama(np.load(settings["weights"]))
masters = list(model.parameters())
decays = [p.ndim == 2 and p is not model.embedding for p in masters]
if pure:
  masters = [nn.Parameter(p.detach().clone()) for p in masters]
  model.to(torch.bfloat16)
groups = [
  {"params": [p for p, d in zip(masters, decays) if d == which], "weight_decay": 0.1 if which else 0.0}
  for which in (True, False)
]
optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
forward = torch.compile(model) if settings["mode"].endswith("compile") else model


def step(tokens, targets):
  with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
    loss = forward(tokens, targets)
  loss.backward()
  if pure:
    for master, weight in zip(masters, model.parameters()):
      master.grad = weight.grad.float()
  nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
  optimizer.step()
  model.zero_grad(set_to_none=True)
  if pure:
    with torch.no_grad():
      torch._foreach_copy_(list(model.parameters()), masters)
  return loss.item()


batches = np.random.default_rng(1).integers(0, V, (64, B, T + 1))
done, line = 0, first
while line:
  times, losses = [], []
  for _ in range(int(line)):
    rows = torch.tensor(batches[done % len(batches)])
    done += 1
    began = time.perf_counter()
    losses.append(step(rows[:, :-1], rows[:, 1:]))
    times.append(time.perf_counter() - began)
  print(json.dumps({"times": times, "losses": losses}), flush=True)
  line = next(sys.stdin, "")
