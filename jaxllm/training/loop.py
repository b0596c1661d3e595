"""The training loop: `train` puts a run together, `Run` takes its steps."""

import contextlib
import dataclasses
import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.base.errors import DataError, UserError
from jaxllm.base.settings import to_mapping
from jaxllm.data.manifest import open_prepared
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.kernels.cpu_ffi import keep_memory_resident, release_memory
from jaxllm.models.build import Params, check_model_on_mesh, init_params
from jaxllm.objectives.heldout import describe
from jaxllm.parallel import agreement
from jaxllm.parallel.batch import local_rows, put_batch
from jaxllm.parallel.mesh import make_mesh
from jaxllm.storage.checkpoints import Checkpoints
from jaxllm.training.batches import Batches, MakeBatches, disk_batches
from jaxllm.training.compile import Frozen, Program, make_program
from jaxllm.training.config import RunConfig
from jaxllm.training.evaluation import Evaluation, open_replay
from jaxllm.training.memory import explain_out_of_memory
from jaxllm.training.meter import Meter
from jaxllm.training.metrics import MetricsLogger
from jaxllm.training.profiling import Profiler
from jaxllm.training.progress import Progress, print_table
from jaxllm.training.rehearsal import rehearse
from jaxllm.training.run_adapter import write_run_adapter
from jaxllm.training.run_directory import hold_run_directory, open_run_directory
from jaxllm.training.samples import sample_text
from jaxllm.training.scores import fill_scores, with_scores
from jaxllm.training.signals import StopRequest
from jaxllm.training.start import begun, keep_record, open_start, start_record
from jaxllm.training.startup import startup_table
from jaxllm.training.state import TrainState
from jaxllm.training.teachers import check_teachers
from jaxllm.training.trackers import flatten, make_trackers
from jaxllm.training.watch import Watch, check_early_stopping, checkpoints_to_keep, evaluations_so_far

logger = logging.getLogger("jaxllm")


class TrainingStopped(UserError):
  """The run met a step that it must not take; the last good state is saved."""


def train(run: RunConfig, workdir: Path, make_batches: MakeBatches = disk_batches) -> dict[str, Any]:
  """Trains as `run` says in `workdir`, from its last checkpoint if it has one; all processes of a job call it.

  Args:
    make_batches: what the batches come from; by default the prepared data.

  Returns:
    The last value of every metric, "step", and "stopped": whether a signal ended the run early.

  Raises:
    ConfigError, DataError, CheckpointError: the run cannot start, or the disk is full.
    TrainingStopped: a bad step, where `training.on_bad_step` is "stop"; more forgotten than `training.replay_limit`.
    OutOfMemory: the devices have too little; the message says what takes it, and what would take less.
  """
  agreement.check_same({**flatten(to_mapping(run)), "--workdir": str(workdir)}, "the config")
  run, start = open_start(run, Path(workdir))
  training, settings = run.training, to_mapping(run)
  if run.optimizer.warmup_steps >= training.steps:
    logger.warning(
      "optimizer.warmup_steps %d are not fewer than training.steps %d: the learning rate never reaches its peak",
      run.optimizer.warmup_steps,
      training.steps,
    )

  # What is computed: nothing is allocated yet, and all that the config got wrong is said here.
  mesh = make_mesh(run.mesh)
  if mesh.devices.flat[0].platform == "cpu":
    keep_memory_resident()
  check_model_on_mesh(run.model, mesh, run.mesh.rules)
  program = make_program(
    run.model, training, run.optimizer, run.mesh, mesh, run.objective, run.data, run.compute, run.peft, start
  )

  # From what: every host reads its own rows of one and the same data.
  with agreement.together():
    prepared = open_prepared(run.data)
    tokenizer = prepared.tokenizer()
    if tokenizer.vocab_size > run.model.vocab_size:
      raise DataError(
        f"the tokenizer of {run.data.dir} has {tokenizer.vocab_size} tokens but model.vocab_size is "
        f"{run.model.vocab_size}; raise it"
      )
    check_teachers(start, tokenizer, run.model)
    batches = with_scores(make_batches(program, run, prepared), run.objective)
    heldout = replay = None
    if batches.heldout is not None:
      heldout = Evaluation(run.objective, program.evaluate, batches.heldout, program.batch)
    replay = open_replay(run, program, prepared)
    check_early_stopping(training, program, heldout, replay)
  # Of what is "auto" the run says what it came to, which a resumed one keeps.
  settings["compute"]["dtype"] = program.compute.dtype
  agreement.check_same({"its digest": prepared.content}, f"the data in {run.data.dir}")

  with contextlib.ExitStack() as stack:
    enter = stack.enter_context
    enter(contextlib.closing(batches))
    stop = enter(StopRequest())
    directory = enter(hold_run_directory(workdir))
    open_run_directory(directory, settings, tokenizer)
    memory = enter(explain_out_of_memory(program, run, directory))
    kept = checkpoints_to_keep(run.checkpoint, training)
    checkpoints = enter(Checkpoints(directory / "checkpoints", dataclasses.replace(run.checkpoint, **kept)))
    profiler = enter(Profiler(run.profile, directory))

    # What models that are not kept say of the rows, from disk or computed now.
    key = jax.random.key(training.seed)
    fill_scores(batches, run, program, prepared, directory, key)

    # Where it starts: the last good checkpoint, or fresh weights, or those of a model; what is frozen comes from there.
    if jax.tree.leaves(program.frozen):
      agreement.first_does(lambda: keep_record(directory, start_record(start, program.params)))
    loaded = begun(directory, start, program.loaded, lambda: init_params(run.model, key, mesh, run.mesh.rules))
    if checkpoints.latest_step() is None:
      resumed, step = None, 0
      state, frozen = program.init(key, loaded)
    else:
      frozen = program.init_frozen(key, loaded) if jax.tree.leaves(program.frozen) else program.frozen
      step, state, data_state = checkpoints.restore(program.state)
      batches.set_state(data_state)
      resumed = step
      logger.info("resuming from step %d", step)
    del loaded  # what is not a part of state or frozen goes
    began = time.monotonic()
    lowered = program.step.lower(*program.arguments)
    if jax.process_count() > 1:
      text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
      agreement.check_same({"its digest": text}, "the compiled step (versions, environment variables)")
    memory.compiled = compiled = lowered.compile()
    memory.warn_if_short()
    if jax.process_index() == 0:
      print_table(startup_table(program, compiled, run, prepared, time.monotonic() - began), str(directory))

    state = rehearse(program, compiled, state, frozen, heldout, replay)

    trackers = make_trackers(run.logging, directory, settings, resumed)
    metrics = enter(MetricsLogger(directory, resumed, trackers))
    going = Run(
      settings=run,
      program=program,
      compiled=compiled,
      rows=local_rows(program.batch),
      batches=batches,
      heldout=heldout,
      replay=replay,
      watch=Watch(training, directory, evaluations_so_far(directory)),
      tokenizer=tokenizer,
      stop=stop,
      checkpoints=checkpoints,
      profiler=profiler,
      metrics=metrics,
      progress=enter(Progress(training.steps)),
      meter=enter(Meter(program)),
      frozen=frozen,
      state=state,
      step=step,
      saved=resumed,
      measured={step: dict(metrics.resumed)},
      latest=dict(metrics.resumed),
    )
    going.take_steps()
    going.end()
  return going.latest | {"step": going.step, "stopped": going.stopped}


class _StoppedMeanwhile(Exception):
  """Somebody asked the run to stop while it evaluated."""


@dataclasses.dataclass
class Run:
  """A run that has started. Every process takes the same steps and actions: what decides on them is the same on all."""

  settings: RunConfig
  program: Program
  compiled: jax.stages.Compiled
  rows: tuple[int, ...]  # of each batch that this process reads
  batches: Batches
  heldout: Evaluation | None
  replay: Evaluation | None
  watch: Watch
  tokenizer: Tokenizer
  stop: StopRequest
  checkpoints: Checkpoints
  profiler: Profiler
  metrics: MetricsLogger
  progress: Progress
  meter: Meter

  frozen: Frozen
  state: TrainState
  step: int  # steps dispatched so far
  saved: int | None  # the step of the newest checkpoint
  measured: dict[int, dict[str, float]]  # what was measured at each of the last few steps
  latest: dict[str, float]  # the last value of every metric
  stopped: bool = False  # somebody asked for it
  saves_asked: int = 0  # by SIGUSR1
  saves_made: int = 0

  def __post_init__(self):
    # Where the data stood after the last few steps, and how many passes over it that was
    self.positions = {self.step: (self.batches.get_state(), self.batches.epochs)}
    self.unlogged: set[int] = set()  # the last finished step, if it is not in metrics.jsonl
    # The last dispatched step and its metrics, read while the next one computes
    self.running: tuple[int, dict[str, jax.Array]] | None = None

  def take_steps(self) -> None:
    """Steps until there are enough, the data ends, an evaluation says so, or a process is asked to stop."""
    training = self.settings.training
    analysis = self.compiled.memory_analysis()
    freed = 3 * analysis.temp_size_in_bytes // 2 if analysis and self.program.compute.target == "cpu" else None
    self.ask()
    if self.step == 0 and not self.stopped:
      self.evaluate()  # what there is to forget
    while self.step < training.steps and not self.stopped and not self.watch.ended:
      self.act()
      if self.stopped or self.watch.ended:
        break
      batch = self.batches.next(self.policy)
      if batch is None:
        logger.info("the data ended at step %d, after %g epochs", self.step, self.batches.epochs)
        break
      self.profiler.before_step()
      self.state, device_metrics = self.compiled(
        self.state, self.frozen, put_batch(batch, self.program.batch, self.rows)
      )
      self.meter.dispatched(device_metrics)
      self.profiler.after_step(device_metrics)
      self.step += 1
      self.positions[self.step] = self.batches.get_state(), self.batches.epochs
      self.positions.pop(self.step - 3, None)
      if self.running is not None:
        self.finish(*self.running)
      self.running = self.step, device_metrics
      if freed is not None:
        release_memory(beyond=freed)
      self.ask()  # while the devices compute

  def policy(self) -> Params:
    """The parameters of the model that is trained, the frozen ones too."""
    return self.program.policy(self.state.params, self.frozen)

  def ask(self) -> None:
    """Whether any process was told to stop, or to save: all hear the same answer, and no device waits for it."""
    heard = agreement.gather([self.stop.requested, self.stop.saves])
    self.stopped = self.stopped or any(requested for requested, _ in heard)
    self.saves_asked = max(saves for _, saves in heard)

  def act(self) -> None:
    """Evaluates, samples and saves, each where it is due; also what a run that was stopped here had left out."""
    actions = (
      (self.settings.training.eval_every, self.evaluate),
      (self.settings.training.sample_every, self.sample),
      (self.settings.checkpoint.every, self.save),
    )
    due = [act for every, act in actions if self.step and every > 0 and self.step % every == 0]
    if self.step and self.saves_asked > self.saves_made:
      due.append(self.save_as_asked)
    if due:
      self.drain()
      with self.meter.pause():
        for act in due:
          act()
        self.watch.record(self.checkpoints.steps())

  def end(self) -> None:
    """What follows the last step."""
    self.drain()
    if self.step in self.unlogged:
      self.log(self.step)
    if not self.stopped:
      self.evaluate()
    if not self.stopped:
      self.sample()
    self.save()
    self.checkpoints.wait()
    write_run_adapter(
      self.checkpoints.directory.parent, self.settings, self.policy(), self.state.params, self.tokenizer
    )
    self.watch.record(self.checkpoints.steps())
    if self.watch.ended and self.watch.forgets:
      raise TrainingStopped(f"{self.watch.forgets}. Step {self.step} is saved in {self.checkpoints.directory}")
    if self.watch.ended:
      self.progress.say(self.watch.patience_ends)
    if self.watch.best and not self.stopped:
      best = self.watch.best[0]
      self.progress.say(f"the best step is {best}, which is kept: --model=RUN --step={best}")

  def drain(self) -> None:
    """Waits for the step under way."""
    if self.running is not None:
      self.finish(*self.running)
      self.running = None

  def finish(self, number: int, device_metrics: dict[str, jax.Array]) -> None:
    """Waits for a step, logs it where that is due, and ends the run if it was bad."""
    metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
    self.meter.finished()
    halted = bool(metrics.pop("halted"))
    if metrics["skipped"] > self.latest.get("skipped", metrics["skipped"]) or (number == 1 and metrics["skipped"]):
      logger.warning("step %d is skipped: loss %g, gradient norm %g", number, metrics["loss"], metrics["grad_norm"])
    self.measured[number] = metrics
    self.measured.pop(number - 3, None)
    self.latest.update(metrics)
    self.unlogged = {number}
    if halted or number % self.settings.logging.every == 0 or number in (1, self.settings.training.steps):
      self.log(number)
    else:
      self.progress.update(number)
    if halted:
      self.save(number - 1)
      self.checkpoints.wait()
      raise TrainingStopped(
        f"step {number} is bad: loss {metrics['loss']:g}, gradient norm {metrics['grad_norm']:g}. The state "
        f"before it is saved as step {number - 1} in {self.checkpoints.directory}; lower "
        "optimizer.learning_rate in a new run, or resume with --config.training.on_bad_step=skip"
      )

  def log(self, number: int) -> None:
    """A line of metrics.jsonl for a step that is done, and of progress."""
    metrics = self.measured[number]
    metrics |= {
      "tokens": number * self.program.tokens_per_step,
      "epoch": self.positions[number][1],
    } | self.meter.rates()
    self.latest.update(metrics)
    self.metrics.log(number, metrics)
    self.progress.update(number, metrics)
    self.unlogged = set()

  def evaluate(self) -> None:
    """Held-out loss, of the averaged weights too where there are any, and the loss on the replay set; once a step.

    Before step 0 only the latter, which is what later ones are measured against.
    """
    asked = [("replay/", self.replay, self.state.params)]
    if self.step:
      asked += [("eval/", self.heldout, self.state.params)]
      asked += [("eval_ema/", self.heldout, self.state.ema)] if self.state.ema is not None else []
    done = self.measured.setdefault(self.step, {})
    missing = [(prefix, *what) for prefix, *what in asked if what[0] is not None and f"{prefix}loss" not in done]
    with contextlib.suppress(_StoppedMeanwhile):
      for prefix, evaluation, params in missing:
        values = evaluation(params, self.frozen, prefix, self.ask_while_evaluating)
        done.update(values)
        self.latest.update(values)
        self.metrics.log(self.step, values)
        self.watch.see(self.step, done)
        self.progress.say(f"step {self.step}: {describe(values, prefix)}{self.watch.risen(prefix)}")
    if missing and not self.stopped:
      if self.watch.forgets and not self.watch.ended:
        logger.warning("%s", self.watch.forgets)
      if self.watch.best and self.watch.best[0] == self.step:
        self.save()

  def ask_while_evaluating(self) -> None:
    """As `ask`, but gives an evaluation up, for which a resumed run makes up."""
    self.ask()
    if self.stopped:
      raise _StoppedMeanwhile

  def sample(self) -> None:
    """Text that the model writes."""
    if self.settings.objective.writes_text and not agreement.from_first(self.metrics.has_text(self.step, "sample")):
      text = sample_text(self.program, self.policy(), self.tokenizer, self.settings.training)
      self.metrics.log_text(self.step, "sample", text)

  def save_as_asked(self) -> None:
    """The checkpoint that SIGUSR1 asks for, on disk before the next step: the job may be killed soon."""
    self.saves_made = self.saves_asked
    self.save()
    self.checkpoints.wait()
    self.progress.say(f"step {self.step} is saved, as SIGUSR1 asks; the run goes on")

  def save(self, number: int | None = None) -> None:
    """A checkpoint of the step that is done, or of the one before a bad step, after which the state stood still."""
    number = self.step if number is None else number
    if number == self.saved:
      return
    good = dataclasses.replace(self.state, halted=jnp.zeros_like(self.state.halted))
    self.checkpoints.save(number, good, self.positions[number][0], self.measured.get(number, {}))
    self.saved = number
