"""The training loop: the story of a run, in order. It never looks into a batch."""

import time

from eclosion.config.schema import RunConfig
from eclosion.data.source import Samples
from eclosion.device import autocast, memory_gb
from eclosion.errors import Interrupted
from eclosion.report import write_report
from eclosion.sampling import make_images, save_png, sheet_of
from eclosion.training.context import Context
from eclosion.training.distributed import World
from eclosion.training.drawing import draw, prepared
from eclosion.training.evaluating import evaluate
from eclosion.training.replay import diverged
from eclosion.training.signals import StopRequested, StopSignals
from eclosion.training.start import start
from eclosion.training.validation import validate

__all__ = ["run_until_done"]


def run_until_done(
    run: RunConfig, samples: Samples, *, world: World, stop: StopSignals, resume: str = "auto", accept: bool = False
) -> None:
    """Train until `run.train.duration` is over, from the newest whole checkpoint in the run folder.

    Args:
        run: the checked config.
        samples: the opened data.
        world: the processes that share the work.
        stop: where signals are noted.
        resume: "auto", "never", or the path of a checkpoint.
        accept: whether changed schedule keys are accepted.

    Raises:
        Interrupted: after a signal, when the checkpoint is on disk.
        TrainingDiverged: at a step that is not finite; nothing of it is kept.
    """
    with start(run, samples, world=world, stop=stop, resume=resume, accept=accept) as c:
        state = c.state
        warm_up(c)
        if c.validation_missing() and (validate(c, stop) or state.done):
            c.save()  # the checkpoint of this step does not know its score yet
        if c.preview_missing():
            preview(c, stop)
        if c.evaluation_missing():
            evaluate(c, stop)
            c.save()
        steps = c.loader.steps(state.samples_seen)
        clock = Clock(state.samples_seen)
        try:
            while not state.done:
                with clock.waiting():
                    micro_batches = world.wait_for(stop, lambda: next(steps))  # a server may keep it waiting
                for stage in state.trained:  # frozen stages are in the checkpoint, not in here
                    for i, batch in enumerate(micro_batches):
                        if stage is state.trained[0]:  # a step is dropped whole or made whole
                            world.agree_to_stop(stop)
                            here, micro_batches[i] = prepared(c.task, batch, c.device)
                        else:
                            here = batch.to(c.device)
                        drawn = draw(c.task, stage.name, here, run.seed, state.step, i, world.rank)
                        with world.without_sync(stage.net, last=i + 1 == len(micro_batches)):
                            with autocast(c.device, c.precision):
                                losses = c.task.loss(stage.name, here, drawn)  # [B]: one number per image
                            stage.accumulate(losses, here.weight)
                    stage.update(state.step, state.num_steps)
                state.advance()
                c.account(micro_batches)
                if c.looks_at_device() and state.failed_at():
                    raise diverged(c)

                if state.due(c.every.log):
                    numbers = state.summary(world) | clock.read(state.samples_seen)
                    c.log(numbers | {"sys/memory_gb": memory_gb(c.device)})
                # The checkpoint says how its own weights score, so it comes after. What could make a validation fail
                # has shown itself before the first step.
                best = state.due(c.every.validate) and validate(c, stop)
                if best or state.due(c.every.checkpoint):  # before anything else that may fail
                    c.save()
                if state.due(c.every.sample):
                    preview(c, stop)
                if state.due(c.every.evaluate) and (evaluate(c, stop) or state.due(c.every.checkpoint)):
                    c.save()  # the checkpoint of this step does not know its score yet
                c.store.check()  # a save that failed in the background
                c.tell_failed_saves()
            world.agree_to_stop(stop)  # also during the last picture
        except StopRequested:
            for stage in state.trained:
                stage.drop()
            if state.failed_at():
                raise diverged(c) from None
            c.save(wait=True)
            raise Interrupted(
                stop.received, f"{run.output}: stopped at step {state.step}, which is saved. Start it again to go on."
            ) from None
        finally:
            steps.close()
        c.finish()


def warm_up(c: Context) -> None:
    """Make one backward pass and forget it, where processes exchange gradients.

    After its first pass DDP orders its buckets anew, and with them the order in which three or more
    processes add. Without this a run that was resumed would add its first step in another order
    than the run that never stopped.
    """
    if c.world.size == 1 or c.state.done:
        return
    share = c.loader.micro_batch_size
    first = c.state.samples_seen + c.world.rank * share
    batch = c.world.wait_for(c.stop, lambda: c.loader.batch_at(range(first, first + share)))
    c.world.agree_to_stop(c.stop)
    batch, _ = prepared(c.task, batch, c.device)
    for stage in c.state.trained:
        buffers = [buffer.clone() for buffer in stage.module.buffers()]
        with autocast(c.device, c.precision):
            drawn = draw(c.task, stage.name, batch, c.run.seed, c.state.step, 0, c.world.rank)
            stage.accumulate(c.task.loss(stage.name, batch, drawn), batch.weight)
        stage.drop()
        for buffer, before in zip(stage.module.buffers(), buffers, strict=True):
            buffer.copy_(before)


def preview(c: Context, stop: StopSignals) -> None:
    """Draw the grid of this step with the averaged networks, and bring the report up to date.

    Networks that are frozen as they were drawn, and those behind them, are left out of it.

    After a signal it is left out; it is made when the run goes on.
    """
    options, state = c.run.sample, c.state
    if options.num_images:
        try:
            with c.evaluating() as task:
                images = make_images(
                    task,
                    range(len(c.examples) if c.examples else options.num_images),
                    seed=options.seed,
                    sampler=options.sampler,
                    guidance_scale=options.guidance_scale,
                    precision=c.precision,
                    on_step=lambda *_: c.world.agree_to_stop(stop),  # all leave at the same call, or none
                    examples=c.examples,
                    first=state.span[0],
                    last=state.span[1],
                )
        except StopRequested:
            return
        if c.world.leads:
            path = save_png(sheet_of(images, c.examples), c.folder.sample_grid(state.step))
            c.tracker.log_image(path, step=state.step)
    if c.world.leads:
        write_report(c.folder.root)


class Clock:
    """Speed since the last look, and how much of the time went into waiting for data."""

    def __init__(self, samples_seen: int) -> None:
        self._since, self._samples, self._waited, self._began = time.perf_counter(), samples_seen, 0.0, 0.0

    def waiting(self) -> "Clock":
        """A context whose time counts as waiting for data."""
        return self

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._began

    def read(self, samples_seen: int) -> dict[str, float]:
        """Images per second and the share of time spent waiting, since the last call."""
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        numbers = {
            "perf/images_per_second": (samples_seen - self._samples) / elapsed,
            "perf/data_wait": self._waited / elapsed,
        }
        self._since, self._samples, self._waited = now, samples_seen, 0.0
        return numbers
