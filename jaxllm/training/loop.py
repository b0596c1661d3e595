"""The training loop: one function that reads from top to bottom."""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.data.heldout import heldout_batches
from jaxllm.data.manifest import open_prepared
from jaxllm.data.pipeline import train_batches
from jaxllm.errors import DataError, UserError
from jaxllm.evaluation.bits_per_byte import describe, heldout_metrics
from jaxllm.kernels.cpu_ffi import keep_memory_resident
from jaxllm.models.build import check_model_on_mesh
from jaxllm.parallel.mesh import make_mesh
from jaxllm.storage.checkpoints import Checkpoints
from jaxllm.training.compile import make_program, put_batch
from jaxllm.training.config import RunConfig
from jaxllm.training.meter import Meter
from jaxllm.training.metrics import MetricsLogger
from jaxllm.training.profiling import Profiler
from jaxllm.training.progress import Progress, print_table
from jaxllm.training.run_directory import open_run_directory
from jaxllm.training.samples import sample_text
from jaxllm.training.signals import StopRequest
from jaxllm.training.startup import startup_table
from jaxllm.training.trackers import make_trackers

log = logging.getLogger("jaxllm")


class TrainingStopped(UserError):
  """The run met a step that it must not take; the last good state is saved."""


def train(run: RunConfig, workdir: Path) -> dict[str, Any]:
  """Trains as `run` says in `workdir`, from its last checkpoint if it has one.

  Returns:
    The last value of every metric, "step", and "stopped": whether a signal ended the run early.

  Raises:
    ConfigError, DataError, CheckpointError: the run cannot start, or the disk is full.
    TrainingStopped: a bad step, where `training.on_bad_step` is "stop".
  """
  training, settings = run.training, dataclasses.asdict(run)
  writes_text = run.objective.name == "causal_lm"  # then it can be sampled from, and measured in bits per byte

  # What is computed: nothing is allocated yet, and all that the config got wrong is said here.
  mesh = make_mesh(run.mesh)
  if mesh.devices.flat[0].platform == "cpu":
    keep_memory_resident()
  check_model_on_mesh(run.model, mesh, run.mesh.rules)
  program = make_program(run.model, training, run.optimizer, run.mesh, mesh, run.objective, run.data)
  prepared = open_prepared(run.data)
  tokenizer = prepared.tokenizer()
  if tokenizer.vocab_size > run.model.vocab_size:
    raise DataError(
      f"the tokenizer of {run.data.dir} has {tokenizer.vocab_size} tokens but model.vocab_size is "
      f"{run.model.vocab_size}; raise it"
    )
  hosts = dict(host_index=jax.process_index(), host_count=jax.process_count(), prepared=prepared)
  sizes = dict(batch_size=training.batch_size, seq_len=training.seq_len, decoder_start_id=run.model.decoder_start_id)
  batches = train_batches(run.data, **sizes, seed=training.seed, **hosts)
  heldout = None  # where nothing is held out there is nothing to evaluate
  if prepared.total("heldout", "documents"):
    heldout = heldout_batches(run.data, **sizes, max_batches=training.eval_batches, **hosts)

  directory = open_run_directory(workdir, settings)
  if jax.process_index() == 0:
    tokenizer.save(directory / "tokenizer")
  with (
    StopRequest() as stop,
    Checkpoints(directory / "checkpoints", run.checkpoint) as checkpoints,
    Profiler(run.profile, directory) as profiler,
  ):
    # Where it starts: the last good checkpoint, or fresh weights.
    if checkpoints.latest_step() is None:
      resumed, step, state = None, 0, program.init(jax.random.key(training.seed))
    else:
      step, state, data_state = checkpoints.restore(program.state)
      batches.set_state(data_state)
      resumed = step
      log.info("resuming from step %d", step)
    began = time.monotonic()
    compiled = program.step.lower(program.state, program.batch).compile()
    if jax.process_index() == 0:
      print_table(startup_table(program, compiled, run, prepared, time.monotonic() - began), str(directory))

    trackers = make_trackers(run.logging, directory, settings, resumed)
    meter = Meter(program)
    latest: dict[str, float] = {}  # the last value of every metric
    positions = {step: batches.get_state()}  # where the data stood after the last few steps
    running = None  # the last dispatched step and its metrics, read while the next one computes
    with (
      MetricsLogger(directory, resumed, trackers) as metrics_logger,
      Progress(training.steps) as progress,
    ):

      def finish(number: int, device_metrics: dict[str, jax.Array]) -> None:
        """Waits for a step, logs it, and ends the run if it was bad."""
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        meter.step()
        halted = metrics.pop("halted")
        if metrics["skipped"] > latest.get("skipped", metrics["skipped"]) or (number == 1 and metrics["skipped"]):
          log.warning("step %d is skipped: loss %g, gradient norm %g", number, metrics["loss"], metrics["grad_norm"])
        logged = halted or number % run.logging.every == 0 or number in (1, training.steps)
        if logged:
          metrics |= {"tokens": number * program.tokens_per_step, "epoch": batches.epochs} | meter.rates()
          metrics_logger.log(number, metrics)
        latest.update(metrics)
        progress.update(number, metrics if logged else None)
        if halted:
          save(number - 1)
          raise TrainingStopped(
            f"step {number} is bad: loss {metrics['loss']:g}, gradient norm {metrics['grad_norm']:g}. The state "
            f"before it is saved as step {number - 1} in {checkpoints.directory}; lower "
            "optimizer.learning_rate in a new run, or resume with --config.training.on_bad_step=skip"
          )

      def save(number: int) -> None:
        if number != checkpoints.latest_step():
          good = dataclasses.replace(state, halted=jnp.zeros_like(state.halted))
          checkpoints.save(number, good, positions[number], latest)

      def evaluate(number: int, params: Any, prefix: str = "eval/") -> None:
        def metric_sums(batch):
          return program.evaluate(params, put_batch(batch, program.batch))

        values = heldout_metrics(metric_sums, heldout, heldout.bytes if writes_text else None, prefix)
        latest.update(values)
        metrics_logger.log(number, values)
        progress.say(f"step {number}: {describe(values, prefix)}")

      def look(number: int) -> None:
        """Held-out loss, of the averaged weights too where there are any."""
        if heldout is None:
          return
        evaluate(number, state.params)
        if state.ema is not None:
          evaluate(number, state.ema, "eval_ema/")

      def sample(number: int) -> None:
        text = writes_text and sample_text(program, state.params, tokenizer, training)
        if text:
          metrics_logger.log_text(number, "sample", text)

      def due(every: int) -> bool:
        return every > 0 and step % every == 0 and step < training.steps

      while step < training.steps and not stop.anywhere():
        batch = next(batches, None)
        if batch is None:
          log.info("the data ended at step %d, after %g epochs", step, batches.epochs)
          break
        profiler.before_step()
        state, device_metrics = compiled(state, put_batch(batch, program.batch))
        profiler.after_step(device_metrics)
        step += 1
        positions[step] = batches.get_state()
        positions.pop(step - 3, None)
        if running is not None:
          finish(*running)
        running = step, device_metrics

        periodic = (
          (training.eval_every, look),
          (training.sample_every, sample),
          (run.checkpoint.every, save),
        )
        if any(due(every) for every, _ in periodic):
          finish(*running)
          running = None
          with meter.pause():
            for every, action in periodic:
              if due(every):
                action(step)

      if running is not None:
        finish(*running)
      if not stop.requested:
        look(step)
        sample(step)
      save(step)
      checkpoints.wait()
  batches.close()
  return latest | {"step": step, "stopped": stop.requested}
