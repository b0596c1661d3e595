"""The training loop: one function that reads from top to bottom."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.data.heldout import HeldoutBatches, heldout_batches
from jaxllm.data.manifest import open_prepared
from jaxllm.data.pipeline import train_batches
from jaxllm.errors import CheckpointError, DataError, UserError
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.sharding import check_model_on_mesh
from jaxllm.training import flops
from jaxllm.training.checkpoints import Checkpoints
from jaxllm.training.compile import Program, make_program, put_batch
from jaxllm.training.config import RunConfig
from jaxllm.training.metrics import RunDirectory
from jaxllm.training.profiling import Profiler
from jaxllm.training.progress import Progress
from jaxllm.training.samples import write_samples
from jaxllm.training.signals import StopRequest
from jaxllm.training.startup import startup_table

log = logging.getLogger("jaxllm")


class TrainingStopped(UserError):
  """The run met a step that it must not take; the last good state is saved."""


def train(run: RunConfig, workdir: Path) -> dict[str, Any]:
  """Trains as `run` says in `workdir`, from its last checkpoint if it has one.

  Returns:
    The last metrics of training and evaluation, "step", and "stopped": whether a signal ended it early.

  Raises:
    ConfigError, DataError, CheckpointError: the run cannot start, or the disk is full.
    TrainingStopped: a bad step, where `training.on_bad_step` is "stop".
  """
  training = run.training
  mesh = make_mesh(run.mesh)
  check_model_on_mesh(run.model, mesh)
  prepared = open_prepared(run.data)
  tokenizer = prepared.tokenizer()
  if tokenizer.vocab_size > run.model.vocab_size:
    raise DataError(
      f"the tokenizer of {run.data.dir} has {tokenizer.vocab_size} tokens but model.vocab_size is "
      f"{run.model.vocab_size}; raise it"
    )
  hosts = dict(host_index=jax.process_index(), host_count=jax.process_count(), prepared=prepared)
  sizes = dict(batch_size=training.batch_size, seq_len=training.seq_len)
  batches = train_batches(run.data, **sizes, seed=training.seed, **hosts)
  heldout = heldout_batches(run.data, **sizes, max_batches=training.eval_batches, **hosts)
  program = make_program(run.model, training, run.optimizer, run.mesh, mesh)

  with (
    RunDirectory(workdir, run, tokenizer) as directory,
    Checkpoints(directory.checkpoints, run.checkpoint) as checkpoints,
    StopRequest() as stop,
    Profiler(run.profile, workdir) as profiler,
  ):
    if checkpoints.latest_step() is None:
      state = program.init(jax.random.key(training.seed))
      step = 0
    else:
      step, state, data_state = checkpoints.restore(program.state)
      batches.set_state(data_state)
      log.info("resuming from step %d", step)
    directory.resume_at(step)
    started = time.monotonic()
    compiled = program.step.lower(program.state, program.batch).compile()
    directory.print_table(startup_table(program, compiled, run, prepared, time.monotonic() - started))

    meter = _Meter(program, run)
    saved: int | None = step or None
    results: dict[str, Any] = {}
    pending = None  # the last step's metrics, read when the next one is on its way
    positions = {step: batches.get_state()}  # where the data stood before each step that may be undone
    with Progress(training.steps, step) as progress:

      def report(number: int, device_metrics: dict[str, jax.Array]) -> None:
        """Waits for step `number`, logs it, and stops the run if it was bad."""
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        meter.step()
        halted = metrics.pop("halted")
        if metrics["skipped"] > results.get("skipped", 0):
          log.warning("step %d was skipped: loss %g, gradient norm %g", number, metrics["loss"], metrics["grad_norm"])
        metrics |= {"epoch": batches.epochs, "tokens": number * training.batch_size * training.seq_len}
        results.update(metrics)
        if halted or number % run.logging.every == 0 or number in (1, training.steps):
          metrics |= meter.rates()
          results.update(metrics)
          directory.log(number, metrics)
        progress.update(number, results)
        if halted:
          save(number - 1, metrics={})
          raise TrainingStopped(
            f"step {number} is bad (loss {metrics['loss']:g}, gradient norm {metrics['grad_norm']:g}); the state "
            f"before it is saved as step {number - 1} in {directory.checkpoints}. Lower "
            "optimizer.learning_rate, or resume with --config.training.on_bad_step=skip"
          )

      def save(number: int, metrics: dict[str, float]) -> None:
        nonlocal saved
        if saved != number:
          good = dataclasses.replace(state, halted=jax.numpy.zeros_like(state.halted))
          checkpoints.save(number, good, positions[number], metrics)
          saved = number

      def evaluate_and_sample(number: int, samples: bool) -> None:
        with meter.pause():
          values = evaluate(program, state.params, heldout)
          if state.ema is not None:
            averaged = evaluate(program, state.ema, heldout)
            values |= {name.replace("eval/", "eval/ema_"): value for name, value in averaged.items()}
          results.update(values)
          directory.log(number, values)
          progress.note(f"step {number}: held-out loss {values['eval/loss']:.4f}, "
                        f"{values['eval/bits_per_byte']:.4f} bits per byte")
          if samples:
            write_samples(directory, number, program, state.params, tokenizer, training)

      while step < training.steps and not _any_host(stop.requested):
        profiler.before_step()
        batch = next(batches, None)
        if batch is None:
          log.info("the data ended after %g epochs, at step %d", batches.epochs, step)
          break
        state, device_metrics = compiled(state, put_batch(batch, program.batch["inputs"].sharding))
        step += 1
        positions[step] = batches.get_state()
        positions.pop(step - 3, None)
        if pending is not None:
          report(*pending)
        pending = (step, device_metrics)
        profiler.after_step(device_metrics)

        evaluates = training.eval_every and step % training.eval_every == 0
        samples = training.sample_every and step % training.sample_every == 0
        saves = run.checkpoint.every and step % run.checkpoint.every == 0
        if (evaluates or samples or saves) and step < training.steps:
          report(*pending)
          pending = None
          if evaluates or samples:
            evaluate_and_sample(step, samples)
          if saves:
            with meter.pause():
              save(step, {k: v for k, v in results.items() if isinstance(v, float)})

      if pending is not None:
        report(*pending)
      if not stop.requested:
        evaluate_and_sample(step, samples=True)
      save(step, {k: v for k, v in results.items() if isinstance(v, float)})
      checkpoints.wait()
  return results | {"step": step, "stopped": bool(stop.requested)}
