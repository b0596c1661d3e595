"""Doors where the system refuses: one line, exit code 2, nothing half-written. Each runs as a program."""

import os
import shutil
import signal
import subprocess
import sys

import jax
import pytest


@pytest.fixture(scope="module")
def run(job, tmp_path_factory):
  from jaxllm.cli import run_door
  from jaxllm.train import main

  directory = tmp_path_factory.mktemp("runs") / "tiny"
  flags = ["--config.training.steps=1", "--config.training.sample_every=0"]
  assert run_door(main, [f"--config={job}", f"--workdir={directory}", *flags]) == 0
  return directory


def shell(line: str, **environment):
  env = {k: v for k, v in os.environ.items() if k not in ("PYTHONUNBUFFERED", *environment)} | environment
  env["PYTHONPATH"] = os.pathsep.join([os.getcwd(), env.get("PYTHONPATH", "")])
  line = line.replace("jaxllm", f"{sys.executable} -m jaxllm", 1)
  return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=env, timeout=120)


@pytest.mark.parametrize(
  "line, said",
  [
    ("jaxllm --help > /dev/full", "cannot write stdout: the disk is full; free some space"),
    ("jaxllm --help >&-", "cannot write stdout: it is closed; redirect it to a file, or to /dev/null"),
    ("jaxllm.train --help > /dev/full", "cannot write stdout: the disk is full"),
    ("jaxllm.train --config={job} --print-config > /dev/full", "cannot write stdout: the disk is full"),
    ("jaxllm.train --config={job} --print-config >&- <&-", "cannot write stdout: it is closed"),
    ("ulimit -n 12; jaxllm --help", "a limit of 12 open files is too low; raise it"),
    (
      "ulimit -d 500000; jaxllm --help",
      "a limit of 488 MiB of memory is too low for JAX; raise it (ulimit -d 3145728)",
    ),
    (
      "ulimit -v 2000000; jaxllm --help",
      "a limit of 1953 MiB of memory is too low for JAX; raise it (ulimit -v 4194304)",
    ),
    ("jaxllm.train --config={job} --workdir={job}/x", "a part of the path is a file and no folder; check the path"),
    ("jaxllm.train --config={job} --workdir={job}", "cannot create the run directory {job}: it is there already"),
    ("jaxllm.train --config=" + "n" * 300 + ".py", "the name is too long; choose a shorter one"),
    ("jaxllm.evaluate --model={job}/x", "no model at {job}/x: a part of the path is a file and no folder"),
    ("jaxllm.evaluate --model={tmp}/dangling", "is a link to {tmp}/gone, which is not there; mend or remove the link"),
    ("jaxllm.convert --from={tmp}/loop --to={tmp}/x --format=hf", "its links go round in a circle"),
    ("jaxllm.convert --from=~nobody-here/x --to={tmp}/x --format=hf", "a user whom this machine does not know"),
    ("jaxllm.generate --model=x --prompt-file={tmp}", "cannot read the prompt file {tmp}: it is a folder"),
    ("jaxllm.train --config={job} --workdir=", "argument --workdir: '' is no path; name a file or folder"),
    ("jaxllm.convert --from={job} --to=' ' --format=hf", "argument --to: ' ' is no path; name a file or folder"),
    ("jaxllm.evaluate --model={job} --data= ", "argument --data: '' is no path; name a file or folder"),
    ("jaxllm.train --config={job} --config.data.dir=", "data.dir is empty; name the folder of the prepared data"),
    (
      "jaxllm.evaluate --modle={job}",
      "the following arguments are required: --model (python -m jaxllm.evaluate --help",
    ),
    (
      "printf 'a\\377' | PYTHONIOENCODING=utf-8:strict jaxllm.generate --model=x --prompt=-",
      "is not in utf-8 (at byte 1)",
    ),
    ("jaxllm.generate --model=x --prompt=- <&-", "cannot read stdin: it is closed; redirect it to a file"),
    ("jaxllm.generate --model=x --prompt-file=/dev/zero", "a prompt has over 64 Mi characters, which no model reads"),
    ("jaxllm.generate --model=x --prompt=- < /dev/zero", "a prompt has over 64 Mi characters, which no model reads"),
    ("PYTHONIOENCODING=ascii jaxllm --help", "the output is in ascii, which has no '\\u2026'; set PYTHONIOENCODING"),
  ],
)
def test_one_line(job, tmp_path, line, said):
  (tmp_path / "dangling").symlink_to(tmp_path / "gone")
  (tmp_path / "loop").symlink_to("loop")
  done = shell(line.format(job=job, tmp=tmp_path))
  assert done.returncode == 2, done.stderr
  *before, error = done.stderr.splitlines()
  assert error.startswith("error: ") and said.format(job=job, tmp=tmp_path) in error
  assert all(" on cpu: " in line for line in before), before
  assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "loop"]


@pytest.mark.parametrize(
  "name, value, said",
  [
    ("JAX_PLATFORMS", "nonsense", "Backend 'nonsense' is not in the list of known backends"),
    ("JAX_PLATFORMS", "cuda", "JAX_PLATFORMS"),  # whether there is its plugin, and no chip, or not even that
    ("JAX_ENABLE_X64", "maybe", "invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'; mend the environment"),
    ("JAX_DEFAULT_MATMUL_PRECISION", "wow", "for JAX flag jax_default_matmul_precision; mend the environment variable"),
  ],
)
def test_variables_of_jax(run, name, value, said):
  if value == "cuda" and any(device.platform == "gpu" for device in jax.devices()):
    pytest.skip("there is a chip")
  done = shell(f"jaxllm.evaluate --model={run}", **{name: value})
  assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
  assert done.stderr.splitlines()[-1].startswith("error: ") and said in done.stderr.splitlines()[-1]


def test_a_closed_stderr_changes_nothing():
  done = shell("jaxllm --help 2>&-")
  assert done.returncode == 0 and "commands:" in done.stdout


def test_a_stderr_that_nobody_can_write_to_changes_nothing(job):
  for where in ("2>&-", "2> /dev/full"):
    done = shell(f"jaxllm.prepare --config={job} {where}")
    assert done.returncode == 0 and "already prepared" in done.stdout


def test_a_reader_that_is_gone_is_no_success(job):
  done = shell(f"set -o pipefail; jaxllm.train --config={job} --print-config | true")
  assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_file_that_grows_too_large_leaves_nothing(run, tmp_path):
  done = shell(f"ulimit -f 20; jaxllm.convert --from={run} --to={tmp_path / 'x'} --format=jaxllm")
  errors = done.stderr.splitlines()
  assert done.returncode == 2 and f"cannot write {tmp_path}/x: the file grew too large" in errors[-1]
  assert not list(tmp_path.iterdir()) and "Traceback" not in done.stderr


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="mounts")
@pytest.mark.parametrize("options, said", [("size=64k", "the disk is full"), ("ro,size=1m", "is read-only")])
def test_a_file_system_that_refuses(job, run, tmp_path, options, said):
  """Disks are mounted in a name space of the test's own."""
  mount = f"mount -t tmpfs -o {options} none {tmp_path} && "
  for door in (
    f"jaxllm.convert --from={run} --to={tmp_path}/x --format=hf",
    f"jaxllm.train --config={job} --workdir={tmp_path}/run",
  ):
    done = subprocess.run(
      ["unshare", "--mount", "bash", "-c", mount + door.replace("jaxllm", f"{sys.executable} -m jaxllm", 1)],
      capture_output=True,
      text=True,
      env=os.environ | {"PYTHONPATH": os.getcwd()},
      timeout=120,
    )
    if "mount" in done.stderr:
      pytest.skip("this sandbox cannot mount")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert said in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("error: "), done.stderr
