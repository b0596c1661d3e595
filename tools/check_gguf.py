"""Checks a GGUF file against llama.cpp and transformers, and our exports of it against llama.cpp.

python tools/check_gguf.py FILE.gguf [--run=DIR] [--out=JSON] [--prompts=24] [--tokens=64]
e.g. --out=experiments/benchmarks/gguf_llama_cpp.json

Needs torch, transformers and llama-cpp-python (built from its package, in some minutes on two cores).
Prints and records:
- tokenizer: how many of some 600 strings (digits, Chinese, emoji, code) llama.cpp cuts in another way;
- logits: top-1 agreement and KL against transformers' float32 of the same file, and greedy continuations; where
  one differs, how near the tie was;
- export: greedy text in llama.cpp from the float32 GGUF that we write, against ours; KL of the quantized ones
  against it. With --run, of that training run's model too.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

from jaxllm import Model, load_model
from jaxllm.data.tokenizers import Tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
PROMPTS = (
  "What is the capital of France?",
  "Write a haiku about the sea.",
  "def fibonacci(n):",
  "The three laws of thermodynamics are",
  "1, 1, 2, 3, 5, 8, 13,",
  "Translate to German: The weather is nice today.",
  "Once upon a time, in a small village,",
  "import numpy as np\n\ndef softmax(x):",
  "The boiling point of water at sea level is",
  "Q: How many legs does a spider have?\nA:",
  "In 1969, Neil Armstrong",
  "List five fruits:\n1.",
  "SELECT name, age FROM users WHERE",
  "The mitochondria is the powerhouse of",
  "Dear Sir or Madam,\n\nI am writing to",
  "Roses are red, violets are",
  "The derivative of x^2 is",
  "<html>\n  <head>\n    <title>",
  "Shakespeare's play Hamlet begins with",
  "The quick brown fox",
  "To make an omelette you need",
  "中国的首都是",
  "The 7 wonders of the ancient world include",
  "class Stack:\n  def __init__(self):",
)
_WORDS = (
  *("Hello", "world's", "I'LL", "don't", "naïve", "Größe", "français", "Ελλάδα", "Привет", "мир", "שלום", "مرحبا"),
  *("世界", "你好，世界！", "日本語の文章", "한국어", "ไทย", "हिन्दी", "🙂", "👩\u200d👧\u200d👦", "🇫🇷", "e\u0301"),
  *("½", "Ⅷ", "٣٤", "１２", "0", "42", "1234567", "3.14159", "-17", "1,000,000", "0xFF", "2024-01-31", "x=1", "a1b2"),
  *("¥500", "10%", "def f(x):", "return x**2", "if (a && b) {", "};", "->", "!=", "//", "/* c */", "\\n", '"""'),
  *("<br/>", "${x}", "...", "?!", "—", "“q”", "A", "ABC", "camelCase", "snake_case", "http://a.b/c?d=1"),
  *("\ufeff", "\u00a0", "\u200b"),
)
_GAPS = (" ", "  ", "\n", "\t", "", "\n\n", "   ", " \n ", "\r\n", "\n\t\t", "\u3000", "        ")


def strings() -> list[str]:
  """Some 600 texts, always the same."""
  rng = np.random.default_rng(0)
  texts = [gap + word for word in _WORDS for gap in _GAPS[:4]]
  for _ in range(300):
    count = rng.integers(2, 30)
    texts.append("".join(rng.choice(_WORDS) + rng.choice(_GAPS) for _ in range(count)))
  source = Path(json.__file__).with_name("decoder.py").read_text().splitlines()
  return texts + ["\n".join(source[i : i + 6]) for i in range(0, 300, 6)]


def llama(path: str | Path, **settings):
  """llama.cpp with a float32 cache, which gives logits of every token."""
  import llama_cpp

  defaults = llama_cpp.llama_model_default_params

  def without_repacking():
    params = defaults()
    params.use_extra_bufts = False  # its AMX kernels of 0.3.36 crash on the first quantized matrix
    return params

  with mock.patch.object(llama_cpp.llama_cpp, "llama_model_default_params", without_repacking):
    exact_cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    common = {"n_ctx": 512, "n_threads": 2, "logits_all": True, "verbose": False}
    return llama_cpp.Llama(str(path), **(common | exact_cache | settings))


def check_tokenizer(path: Path, ours: Tokenizer) -> dict:
  """How many strings our tokenizer and llama.cpp's cut differently, or do not bring back."""
  theirs, texts = llama(path, vocab_only=True), strings()
  want = [theirs.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
  got = [ids.tolist() for ids in ours.encode_batch(texts)]
  differ = [text for text, a, b in zip(texts, got, want) if a != b]
  decoded = sum(ours.decode_bytes(ids) != text.encode() for text, ids in zip(texts, got))
  for text in differ[:3]:
    print("  differs:", repr(text[:80]))
  return {"strings": len(texts), "tokens": sum(map(len, want)), "differ": len(differ), "not_round_trip": decoded}


def prompt_ids(model: Model, count: int) -> list[list[int]]:
  """The prompts as ids: every other one as a chat where the model has a template."""
  tokenizer = model.tokenizer
  ids = []
  for i, prompt in enumerate(PROMPTS[:count]):
    if i % 2 == 0 and tokenizer.chat_templates:
      text = tokenizer.render_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
      ids.append(tokenizer.encode_chat(text).tolist())
    else:
      ids.append(tokenizer.encode_prompt(prompt).tolist())
  return ids


def kl(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
  """KL(p || q) in nats at every position."""
  log_p, log_q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in map(np.float64, (p_logits, q_logits)))
  return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def compare(reference, ours, prompts: list[list[int]]) -> dict:
  """Top-1 agreement and KL of two functions ids -> logits [T, V], over every position of the prompts."""
  agree, divergences = [], []
  for ids in prompts:
    a, b = reference(ids), ours(ids)
    agree.append(a.argmax(-1) == b.argmax(-1))
    divergences.append(kl(a, b))
  agreement, divergence = np.concatenate(agree), np.concatenate(divergences)
  facts = {"prompts": len(prompts), "positions": agreement.size, "top1_agreement": float(agreement.mean())}
  return facts | {"mean_kl": float(divergence.mean()), "max_kl": float(divergence.max())}


def compare_greedy(reference, ours: list[list[int]], theirs: list[list[int]], prompts: list[list[int]]) -> dict:
  """How many continuations are the same; of the others, how far apart the reference has the two tokens."""
  gaps = []
  for prompt, a, b in zip(prompts, ours, theirs):
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
    if at is not None:
      logits = reference(prompt + b[:at])[-1]
      gaps.append({"token": at, "logit_gap": float(logits[b[at]] - logits[a[at]])})
  return {"prompts": len(prompts), "identical": len(prompts) - len(gaps), "first_differences": gaps}


def padded(model: Model, length: int):
  """ids -> logits [T, V] of our model, at one compiled length: later tokens are not seen."""

  def logits(ids):
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(model(tokens))[0, : len(ids)]

  return logits


def greedy_ours(model: Model, prompts: list[list[int]], tokens: int) -> list[list[int]]:
  done = model.generate(prompts, temperature=0.0, max_tokens=tokens, ignore_eos=True)
  return [list(c.token_ids) for c in done]


def greedy_llama(model, prompts: list[list[int]], tokens: int) -> list[list[int]]:
  rows = []
  for prompt in prompts:
    model.reset()
    model.eval(prompt)
    row = []
    for _ in range(tokens):
      row.append(int(np.argmax(model.scores[model.n_tokens - 1])))
      model.eval(row[-1:])
    rows.append(row)
  return rows


def llama_logits(model):
  def logits(ids):
    model.reset()
    model.eval(ids)
    return model.scores[: len(ids)].copy()

  return logits


def check_transformers(path: Path, model: Model, prompts: list[list[int]], tokens: int) -> dict:
  """Logits and greedy continuations against transformers, which dequantizes the file itself."""
  import torch
  import transformers

  torch.set_num_threads(os.cpu_count() or 1)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
  ).eval()

  @torch.no_grad()
  def logits(ids):
    return theirs(torch.tensor([ids])).logits[0].numpy()

  @torch.no_grad()
  def greedy(prompt):
    ids, past = torch.tensor([prompt]), None
    row = []
    for _ in range(tokens):
      out = theirs(ids, past_key_values=past, use_cache=True)
      past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
      row.append(int(ids))
    return row

  facts = compare(logits, padded(model, 128), prompts)
  ours = greedy_ours(model, prompts, tokens)
  return facts | {"greedy": compare_greedy(logits, ours, [greedy(p) for p in prompts], prompts)}


def check_export(model: Model, prompts: list[list[int]], tokens: int, dtypes: tuple[str, ...]) -> dict:
  """Our GGUF files of the model, in llama.cpp."""
  facts: dict = {}
  with tempfile.TemporaryDirectory() as directory:
    file = Path(directory) / "f32.gguf"
    model.save(file, format="gguf", dtype="float32")
    facts["tokenizer"] = check_tokenizer(file, model.tokenizer)
    exact = llama(file)
    reference = llama_logits(exact)
    facts["f32"] = {"bytes": file.stat().st_size} | compare(reference, padded(model, 128), prompts)
    ours, theirs = greedy_ours(model, prompts, tokens), greedy_llama(exact, prompts, tokens)
    facts["f32"]["greedy"] = compare_greedy(reference, ours, theirs, prompts)
    for dtype in dtypes:
      small = file.with_name(f"{dtype}.gguf")
      model.save(small, format="gguf", quantize=dtype)
      rounded = llama(small)
      facts[dtype] = {"bytes": small.stat().st_size} | compare(reference, llama_logits(rounded), prompts)
      rounded.close()
      small.unlink()
    exact.close()
  return facts


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("file", type=Path)
  parser.add_argument("--run", type=Path, help="a training run or model directory to export too")
  parser.add_argument("--out", type=Path)
  parser.add_argument("--prompts", type=int, default=len(PROMPTS))
  parser.add_argument("--tokens", type=int, default=64)
  args = parser.parse_args()
  model = load_model(args.file, dtype="float32")
  facts: dict = {"tokens": args.tokens}
  commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
  packages = ("jax", "gguf", "llama-cpp-python", "torch", "transformers", "tokenizers")
  facts |= {"commit": commit.stdout.strip(), "versions": {p: importlib.metadata.version(p) for p in packages}}

  def report(name, found):
    facts[name] = found
    print(name, json.dumps(found, indent=1), flush=True)

  report("tokenizer", check_tokenizer(args.file, model.tokenizer))
  prompts = prompt_ids(model, args.prompts)
  report("transformers", check_transformers(args.file, model, prompts, args.tokens))
  dtypes = ("f16", "bf16", "q8_0", "q4_0", "q4_1")
  report("export", check_export(model, prompts, args.tokens, dtypes))
  if args.run:
    run = load_model(args.run)
    report("run_export", check_export(run, prompt_ids(run, args.prompts), args.tokens, dtypes))
  if args.out:  # beside the results of other files
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.write_text(json.dumps(results | {args.file.name: facts}, indent=2) + "\n")


if __name__ == "__main__":
  main()
