"""MLflow: one run per stage, closed as what it was, never in the way of training."""

from __future__ import annotations

import json
import logging
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from scripts.common.artifacts import git_state
from scripts.common.config import LoadedConfig
from scripts.common.distributed import broadcast_from_rank_0, is_main_process
from scripts.common.errors import Interrupted, UserError
from scripts.common.signals import signals_held

log = logging.getLogger(__name__)

NOTE = "mlflow.note.content"  # what MLflow shows as a run's description
# MLflow's pages ask for the kind of an experiment they do not know; "genai_development" is the other answer.
KIND, MODEL_TRAINING = "mlflow.experimentKind", "custom_model_development"
RETRY_SECONDS = 60
METRICS_SECONDS = 2  # between deliveries: each takes a store 5 to 20 ms or, far away, more than a step
METRICS_AT_ONCE = 1000  # MLflow takes no more
MAX_PARAMETER_LENGTH = 500  # long enough for any of ours but a list of datasets
MAX_DESCRIPTION_LENGTH = 5000  # what older servers take


class Tracker:
    """Send to one MLflow run; keep what cannot be delivered and try again later."""

    def __init__(self, client: Any = None, run_id: str | None = None) -> None:
        self.run_id = run_id
        self._client = client
        self._metrics: list[Any] = []
        self._undelivered: list[Callable[[], Any]] = []
        self._delivered_at = self._failed_at = 0.0

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; a long value is cut, as MLflow would refuse it."""
        from mlflow.entities import Param

        entries = [Param(key, str(value)[:MAX_PARAMETER_LENGTH]) for key, value in params.items()]
        self._send(lambda: self._client.log_batch(self.run_id, params=entries))

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record numbers at a step; they are delivered together with those of the seconds before."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        if self._client is not None:
            self._metrics += [Metric(key, float(value), now, step) for key, value in metrics.items()]
            if time.monotonic() - self._delivered_at > METRICS_SECONDS:
                self.deliver()

    def log_dataset(self, path: str, sha256: str, context: str, records: int) -> None:
        """Record a dataset by the hash of its file as an input of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # The name carries the side, as a store keeps one entry per name and digest.
        dataset = Dataset(
            f"{Path(path).name} ({context})",
            sha256[:32],
            "local",
            json.dumps({"uri": path}),
            profile=json.dumps({"num_rows": records}),
        )
        entry = DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
        self._send(lambda: self._client.log_inputs(self.run_id, datasets=[entry]))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file or a folder into the run."""
        send = (
            self._client.log_artifacts if self._client and path.is_dir() else self._client and self._client.log_artifact
        )
        self._send(lambda: send(self.run_id, str(path), folder))

    def set_tag(self, key: str, value: str) -> None:
        """Set a tag."""
        self._send(lambda: self._client.set_tag(self.run_id, key, value))

    def summarise(self, figures: Mapping[str, float]) -> None:
        """Record single figures as tags: a metric of one value would be drawn as a chart with one bar."""
        from mlflow.entities import RunTag

        tags = [RunTag(re.sub(r"[^\w./ -]", "_", f"summary.{key}"), f"{value:.6g}") for key, value in figures.items()]
        self._send(lambda: self._client.log_batch(self.run_id, tags=tags))

    def describe(self, text: str) -> None:
        """Set the description of the run, in Markdown; of one that is too long the last lines are left out."""
        if len(text) > MAX_DESCRIPTION_LENGTH:
            text = text[:MAX_DESCRIPTION_LENGTH].rsplit("\n", 1)[0]
        self.set_tag(NOTE, text)

    def log_model(self, folder: Path, name: str, registered: str, kind: str, tags: Mapping[str, str]) -> None:
        """Put a folder into the store once, as a model of this run and a version of a registered model.

        A store that knows no such models keeps the folder `adapter` in the run instead, as earlier versions of MLflow do.
        """
        self._send(lambda: self._put_model(folder, name, registered, kind, tags))

    def _put_model(self, folder: Path, name: str, registered: str, kind: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import LoggedModelOutput
        from mlflow.exceptions import MlflowException

        client, experiment = self._client, self._client.get_run(self.run_id).info.experiment_id
        try:
            model = client.create_logged_model(experiment, name, self.run_id, dict(tags), model_type=kind)
        except (MlflowException, NotImplementedError) as error:
            log.info("this MLflow store keeps no models (%s); the adapter is in the run", _first_line(error))
            client.log_artifacts(self.run_id, str(folder), "adapter")
            return
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, 0)])
        with suppress(MlflowException):  # it is there already
            client.create_registered_model(registered)
        try:
            source = f"models:/{model.model_id}"
            client.create_model_version(registered, source, self.run_id, dict(tags), model_id=model.model_id)
        except MlflowException as error:  # tried again, it would be put into the store a second time
            log.warning("the model is in MLflow, but not registered as %s: %s", registered, _first_line(error))

    def _send(self, delivery: Callable[[], Any]) -> None:
        if self._client is None:
            return
        self._undelivered.append(delivery)
        self.deliver()

    def deliver(self) -> None:
        """Deliver what waits, unless the store has just failed."""
        if time.monotonic() - self._failed_at > RETRY_SECONDS or not self._failed_at:
            self.flush()

    def flush(self) -> None:
        """Deliver what is queued, in order; on the first failure warn once and keep the rest for a later try."""
        try:
            while self._metrics:
                self._client.log_batch(self.run_id, metrics=self._metrics[:METRICS_AT_ONCE])
                del self._metrics[:METRICS_AT_ONCE]
            while self._undelivered:
                self._undelivered[0]()
                self._undelivered.pop(0)
        except Exception as error:  # the store decides what it raises; training continues
            if not self._failed_at:
                log.warning(
                    "MLflow store is not reachable (%s); training continues, entries are kept", _first_line(error)
                )
            self._failed_at = time.monotonic()
            return
        self._delivered_at = time.monotonic()
        if self._failed_at:
            log.info("MLflow store is back; everything kept was delivered")
            self._failed_at = 0.0

    @property
    def waiting(self) -> int:
        """Count the entries that could not be delivered yet."""
        return len(self._metrics) + len(self._undelivered)


def open_store(config: LoadedConfig) -> None:
    """Point MLflow at the configured store and prove that it answers.

    Raises: UserError when it does not, before any work was done.
    """
    uri = config.values.tracking.mlflow_tracking_uri
    if uri.startswith("file:") or "://" not in uri:  # a folder, which MLflow refuses unless this is set
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        log.info(
            "tracking in a folder; to move to a database: mlflow migrate-filestore --source %s --target sqlite:///mlflow.db",
            uri,
        )
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks; our warning says it in a line
    try:
        mlflow.set_tracking_uri(uri)
        experiment = mlflow.set_experiment(config.values.tracking.experiment)
        if KIND not in experiment.tags:
            mlflow.MlflowClient().set_experiment_tag(experiment.experiment_id, KIND, MODEL_TRAINING)
    except Exception as error:  # the store decides what it raises
        raise _cannot_open(config, error) from None


@contextmanager
def tracked_run(
    config: LoadedConfig,
    stage: str,
    *,
    name: str | None = None,
    parent_run_id: str | None = None,
    earlier: str | None = None,
    resume: bool = False,
) -> Iterator[Tracker]:
    """Open a run and close it as FINISHED, KILLED or FAILED with its traceback.

    `name` is what the list of runs shows; without one it is that of the stage.
    `earlier` is the run of an interrupted try: it is continued, or marked KILLED where its process died silently.
    `tracking.parent_run_id` of the configuration takes precedence over `parent_run_id`.
    """
    broadcast_from_rank_0(lambda: open_store(config))
    if not is_main_process():
        yield Tracker()
        return
    import mlflow

    git = git_state()
    tags = {
        "stage": stage,
        "config_sha256": config.digest(),
        "git_commit": git.commit or "none",
        "git_dirty": str(git.dirty),
    }
    status_before = _status(earlier)
    parent_run_id = config.values.tracking.parent_run_id or parent_run_id
    with ExitStack() as held:
        held.enter_context(signals_held())  # a run that was interrupted while it opens would stay RUNNING for ever
        try:
            if status_before == "RUNNING" and not resume:
                mlflow.MlflowClient().set_terminated(earlier, "KILLED")
            mlflow.start_run(
                run_id=earlier if resume and status_before else None,
                run_name=name or stage,
                tags=tags,
                parent_run_id=parent_run_id if _status(parent_run_id) else None,  # it may lie in another store
                log_system_metrics=True,
            )
        except Exception as error:
            raise _cannot_open(config, error) from None
        tracker = Tracker(mlflow.MlflowClient(), mlflow.active_run().info.run_id)
        status = "FAILED"
        try:
            held.close()
            yield tracker
            status = "FINISHED"
        except (Interrupted, KeyboardInterrupt):
            status = "KILLED"
            raise
        except BaseException:
            text = traceback.format_exc()
            tracker._send(lambda: tracker._client.log_text(tracker.run_id, text, "traceback.txt"))
            raise
        finally:
            with signals_held():
                tracker.flush()
                if tracker.waiting:
                    log.warning(
                        "%d entries could not be delivered to MLflow; manifest.json holds the final figures",
                        tracker.waiting,
                    )
                _end_run(status)


def _end_run(status: str) -> None:
    import mlflow

    try:
        mlflow.end_run(status)
    except Exception as error:  # the result on disk matters more than the mark in the store
        log.warning("the MLflow run could not be marked %s: %s", status, _first_line(error))


def _status(run_id: str | None) -> str | None:
    import mlflow

    try:
        return str(mlflow.MlflowClient().get_run(run_id).info.status) if run_id else None
    except mlflow.exceptions.MlflowException:  # another store than last time
        return None


def _cannot_open(config: LoadedConfig, error: Exception) -> UserError:
    return UserError(
        f"tracking.mlflow_tracking_uri: cannot open {config.values.tracking.mlflow_tracking_uri}: {_first_line(error)}\n"
        "Start that store, or use sqlite:///mlflow.db, which needs no server; with a full disk, free some space."
    )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if not line.startswith("(raised as a result of")]  # SQLAlchemy
    return (lines or [type(error).__name__])[0][:200]
