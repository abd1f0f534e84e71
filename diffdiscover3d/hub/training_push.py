"""Push a model from its training: at the end and, on request, at each checkpoint."""

import logging
import shlex
import shutil
import tempfile
import threading
from pathlib import Path

from diffdiscover3d.errors import DiffDiscoverError, ModelError, NetworkError, first_line
from diffdiscover3d.hub.upload import push_folder
from diffdiscover3d.training.config import TrainingConfig

logger = logging.getLogger("diffdiscover3d")


class TrainingPush:
    """Pushes the model of a training to a repository; a context manager, left when the training ends.

    The token is that of `hf auth login` or of the environment; it is never an option, so that it is neither stored nor
    logged. Models of checkpoints are uploaded by a thread beside the training. If such a push fails, it is logged and
    the training goes on.

    Args:
        config: options of the training, with `push_to_hub`. The repository is `hub_model_id` or, by default, is called
            as the output folder; without a user, it belongs to the user of the token. It is created if it does not
            exist. If the Hub cannot be reached, this is tried again by the first push.

    Raises:
        ModelError: if the repository's name is invalid.
        NetworkError: if there is no token, or the Hub refuses to create the repository.
    """

    def __init__(self, config: TrainingConfig):
        from huggingface_hub import get_token
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.utils import validate_repo_id

        self.private = config.hub_private_repo or None
        self.every_save = config.hub_strategy == "every_save"
        self.repo_id = config.hub_model_id or Path(config.output_dir).resolve().name
        self._thread: threading.Thread | None = None
        self._stopped = False
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ModelError(f"`hub_model_id` must be a name or user/name, got {self.repo_id!r}.") from error
        if get_token() is None:
            raise NetworkError(
                "--push-to-hub needs a token: log in with `hf auth login`, or set HF_TOKEN; or leave the option out."
            )
        try:
            self._create()
        except HfHubHTTPError as error:
            if 400 <= error.response.status_code < 500:
                raise NetworkError(
                    f"{self.repo_id}: the Hub refuses to create the repository ({first_line(error)}); check "
                    "--hub-model-id and `hf auth whoami`, or leave out --push-to-hub."
                ) from error
            self._warn_unreachable(error)
        except Exception as error:  # the HTTP library raises many kinds
            self._warn_unreachable(error)

    def __enter__(self) -> "TrainingPush":
        return self

    def __exit__(self, *_) -> None:
        self._stopped = True  # an upload that still runs ends with the process, before its commit

    def at_checkpoint(self, task, output: Path, step: int) -> None:
        """Push the model of a checkpoint, unless the push before is still running.

        Args:
            task: the training; its `save` is called.
            output: output folder of the training, with `train_config.json`.
            step: step of the checkpoint, for the commit message.
        """
        if self._thread is not None and self._thread.is_alive():
            logger.info("the model of step %d is not pushed: the push before is still running", step)
            return
        folder = Path(tempfile.mkdtemp(prefix="diffdiscover3d-push-"))
        try:
            task.save(folder, final=False)
            shutil.copyfile(output / "train_config.json", folder / "train_config.json")
        except (DiffDiscoverError, OSError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning("the model of step %d is not pushed: %s", step, error)
            return
        self._thread = threading.Thread(target=self._push_checkpoint, args=(folder, step), daemon=True)
        self._thread.start()

    def finish(self, folder: str | Path) -> None:
        """Push the trained model.

        Raises:
            NetworkError: if the push fails; the message contains the command that pushes by hand.
        """
        if self._thread is not None:
            self._thread.join()
        try:
            logger.info("pushed to %s", self._push(Path(folder), None))
        except (DiffDiscoverError, OSError) as error:
            words = ["diffdiscover3d", "push", str(folder), self.repo_id, *(["--private"] if self.private else [])]
            reason = str(error).rstrip(".")
            raise NetworkError(
                f"{reason}; the training is finished and its model is in {folder}; push it by hand: {shlex.join(words)}"
            ) from error

    def _push_checkpoint(self, folder: Path, step: int) -> None:
        try:
            url = self._push(folder, f"Model after training step {step}")
            logger.info("pushed the model of step %d to %s", step, url)
        except (DiffDiscoverError, OSError) as error:
            if not self._stopped:
                logger.warning("the model of step %d is not pushed: %s", step, error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _push(self, folder: Path, message: str | None) -> str:
        if "/" not in self.repo_id:  # the Hub was down when the training started
            try:
                self._create()
            except Exception as error:
                raise NetworkError(f"{self.repo_id}: the push failed: {first_line(error)}") from error
        return push_folder(folder, self.repo_id, private=self.private, commit_message=message)

    def _create(self) -> None:
        from huggingface_hub import HfApi

        self.repo_id = HfApi().create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id

    def _warn_unreachable(self, error: Exception) -> None:
        logger.warning(
            "the Hub cannot be reached (%s); the training starts, and %s is pushed at its end",
            first_line(error),
            self.repo_id,
        )
