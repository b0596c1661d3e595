"""`python -m jaxllm.generate`: what it prints where, and its exit codes."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import tiny_models as tiny

from jaxllm.base.digests import seal
from jaxllm.base.errors import ConfigError
from jaxllm.cli import run_door
from jaxllm.generate import main
from jaxllm.inference.params import SamplingParams

GREEDY = ["--temperature=0", "--max-tokens=8", "--ignore-eos"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  directory = tmp_path_factory.mktemp("models") / "tiny"
  tiny.loose_model().save(directory)
  return str(directory)


def expected(prompt, **settings):
  settings = dict(temperature=0, max_tokens=8, ignore_eos=True) | settings
  return [c.text for c in tiny.loose_model().generate(prompt, SamplingParams(**settings))]


@pytest.fixture
def door(saved, capsys, monkeypatch):
  def run(*argv, stdin=""):
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    code = run_door(main, [f"--model={saved}", *argv])
    out, err = capsys.readouterr()
    return code, out, err

  return run


def test_one_prompt(door):
  code, out, err = door("--prompt=abc", *GREEDY)
  assert (code, out) == (0, expected("abc")[0] + "\n")
  assert "8 tokens in " in err and "tokens/s" in err


def test_prompts_from_everywhere(door, tmp_path):
  (tmp_path / "p").write_text("abc")
  assert door("--prompt=-", *GREEDY, stdin="abc\n")[1] == expected("abc")[0] + "\n"
  assert door(f"--prompt-file={tmp_path / 'p'}", "--echo", *GREEDY)[1] == "abc" + expected("abc")[0] + "\n"
  code, out, _ = door("--prompt=abc", "--prompt", "de", *GREEDY)
  first, second = expected(["abc", "de"])
  assert (code, out) == (0, f"--- prompt 1\n{first}\n--- prompt 2\n{second}\n")


def test_settings_reach_the_sampler(door):
  argv = ["--temperature=1.5", "--top-k=50", "--top-p=0.9", "--min-p=0.01", "--seed=3", "--num-samples=2"]
  settings = dict(temperature=1.5, top_k=50, top_p=0.9, min_p=0.01, seed=3, n=2)
  texts = expected("abc", **settings)
  assert door("--prompt=abc", *argv, "--max-tokens=8", "--ignore-eos")[1] == (
    f"--- sample 1\n{texts[0]}\n--- sample 2\n{texts[1]}\n"
  )
  assert texts[0] != texts[1]
  beams = ["--num-beams=3", "--length-penalty=2", "--early-stopping", "--max-tokens=8"]
  want = expected("abc", num_beams=3, length_penalty=2.0, early_stopping=True, ignore_eos=False)[0]
  assert door("--prompt=abc", *beams)[1] == want + "\n"
  whole = expected("abc")[0]
  assert door("--prompt=abc", *GREEDY, f"--stop={whole[3:5]}")[1] == whole[: whole.find(whole[3:5])] + "\n"


@pytest.mark.parametrize("settings", [dict(max_length=12), dict(max_new_tokens=9), dict(max_tokens=9)], ids=str)
def test_a_text_is_as_long_as_the_models_file_says(saved, tmp_path, capsys, settings):
  shutil.copytree(saved, tmp_path / "m")
  (tmp_path / "m" / "generation_config.json").write_text(
    json.dumps({"do_sample": False, "eos_token_id": []} | settings)
  )
  seal(tmp_path / "m")
  assert main([f"--model={tmp_path / 'm'}", "--prompt=ab"]) == 0  # which <bos> precedes
  assert capsys.readouterr().out == expected("ab", max_tokens=9)[0] + "\n"
  assert main([f"--model={tmp_path / 'm'}", "--prompt=ab", "--max-tokens=4"]) == 0
  assert capsys.readouterr().out == expected("ab", max_tokens=4)[0] + "\n"


def test_interactive_reads_a_prompt_a_line(door):
  code, out, err = door(*GREEDY, stdin="abc\n\nde\n")
  assert (code, out) == (0, expected("abc")[0] + "\n" + expected("de")[0] + "\n")
  assert err.count("tokens/s") == 2
  code, out, err = door(*GREEDY, stdin="x" * 100 + "\nde\n")
  assert (code, out) == (2, expected("de")[0] + "\n")  # a script learns that a prompt failed
  assert "error: the prompt has 101 tokens" in err


@pytest.mark.parametrize(
  "argv, message",
  [
    (["--prompt=" + "x" * 60], "sequence length is over the model's limit of 48"),
    (["--prompt=a", "--temperature=-1"], "temperature is -1.0"),
    (["--prompt=a", "--num-samples=0"], "n is 0"),
    (["--prompt=a", "--dtype=int3"], "dtype is 'int3'"),
    (["--prompt=a", "--step=3"], "has no steps"),
    (["--prompt-file=/nowhere/p"], "cannot read the prompt file /nowhere/p"),
    (["--prompt=a", "--model=/nowhere/m"], "no model at /nowhere/m"),
  ],
)
def test_mistakes_are_one_line_and_exit_code_2(door, argv, message):
  code, out, err = door(*argv)
  assert (code, out) == (2, "")
  assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_usage(capsys):
  with pytest.raises(SystemExit) as stop:
    main(["--help"])
  assert stop.value.code == 0 and "examples:" in capsys.readouterr().out
  for argv, said in (([], "--model"), (["--model=x", "--bogus"], "unrecognized arguments: --bogus")):
    with pytest.raises(ConfigError, match=rf"{said}.* \(python -m jaxllm.generate --help says more\)"):
      main(argv)


def test_ctrl_c_stops_a_text_and_not_the_session(saved):
  command = [sys.executable, "-u", "-m", "jaxllm.generate", f"--model={saved}", "--echo", *GREEDY]
  # A slow text: the signal arrives in the middle of it.
  slow = (
    "import sys, time; from jaxllm.inference.model import Model; stream = Model.stream\n"
    "def slow(self, prompt, sampling):\n"
    "  for delta in stream(self, prompt, sampling):\n"
    "    yield delta\n"
    "    time.sleep(30 if prompt == 'abc' else 0)\n"
    "Model.stream = slow\n"
    "from jaxllm.cli import run_door; from jaxllm.generate import main; sys.exit(run_door(main))\n"
  )
  command[2:4] = ["-c", slow]
  with subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
  ) as process:
    process.stdin.write(b"abc\n")
    process.stdin.flush()
    assert process.stdout.read(4) == ("abc" + expected("abc")[0][0]).encode()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(b"de\n", timeout=60)
  assert out.decode() == "\nde" + expected("de")[0] + "\n"
  assert "stopped" in err.decode() and process.returncode == 0
