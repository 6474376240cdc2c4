"""What a run writes into its directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mistral_ms.errors import ConfigError, TrainingError
from mistral_ms.staging import Lock


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The names below a run's directory.

    Attributes:
        root: the directory.
    """

    root: Path

    @property
    def config(self) -> Path:
        """The run's configuration with everything spelled out."""
        return self.root / "run.yaml"

    @property
    def dataset(self) -> Path:
        """The sequences, when the run packed its inputs itself."""
        return self.root / "dataset"

    @property
    def preferences(self) -> Path:
        """Pairs of answers and their log-probabilities under the reference, of a run with dpo."""
        return self.root / "preferences.npz"

    @property
    def metrics(self) -> Path:
        """One JSON line a step."""
        return self.root / "metrics.jsonl"

    @property
    def held_out(self) -> Path:
        """The held-out sequences, when the run packed them itself."""
        return self.root / "held_out"

    @property
    def evaluations(self) -> Path:
        """One JSON line for each evaluation on held-out data."""
        return self.root / "evaluation.jsonl"

    @property
    def best(self) -> Path:
        """The weights of the lowest loss on held-out data, in a directory of their step."""
        return self.root / "best"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's events."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """One directory per checkpoint, ``step-00000100``."""
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The adapters of the last checkpoint as PEFT writes them, where adapters were trained."""
        return self.root / "adapter"

    @property
    def figures(self) -> Path:
        """Pictures of losses, learning rate, expert load and dropped choices."""
        return self.root / "figures"

    @property
    def summary(self) -> Path:
        """What the run came to."""
        return self.root / "summary.json"

    def log(self, rank: int = 0) -> Path:
        """What MindSpore said in a process."""
        return self.root / ("backend.log" if rank == 0 else f"backend-rank-{rank}.log")

    def failure(self, step: int) -> Path:
        """The report on a step whose loss was not finite."""
        return self.root / f"failure-step-{step:08d}.json"

    def check_new(self) -> None:
        """Checks that there is no run yet.

        Raises:
            TrainingError: another run's files are there.
        """
        for path in (self.metrics, self.checkpoints):
            if path.exists():
                raise TrainingError(
                    "output exists",
                    where=self.root,
                    value=path.name,
                    rule="a new run overwrites nothing",
                    todo=f"go on with --resume {self.root}, or choose another output",
                )

    def begin(self) -> None:
        """Makes the directory of a new run.

        Raises:
            TrainingError: another run's files are there, or it cannot be written.
        """
        self.check_new()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / ".mistral_ms_probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise TrainingError("cannot write", where=self.root, value=error.strerror) from error

    def again(self) -> None:
        """Checks that there is a run to be resumed.

        Raises:
            TrainingError: there is none.
        """
        if not self.checkpoints.is_dir():
            raise TrainingError(
                "nothing to resume",
                where=self.root,
                value="no such directory" if not self.root.exists() else "no checkpoints in it",
                rule="--resume takes the output directory of an earlier run",
            )

    def claim(self) -> Lock:
        """Takes the right to write into the directory, which one training at a time has.

        Raises:
            BusyError: another training has it.
            TrainingError: the directory cannot be written.
        """
        try:
            return Lock(self.root / ".lock", self.root).acquire()
        except OSError as error:
            raise TrainingError("cannot write", where=self.root, value=error.strerror) from error


def run_files(config: Path, output: Path | None, resumed: Path | None) -> RunFiles:
    """Where a training writes.

    Args:
        config: its run file, after which the directory is called where nothing else is said.
        output: what the run file says.
        resumed: the directory of a run that goes on.

    Raises:
        ConfigError: the run file, not that of the resumed run itself, names another directory.
    """
    if resumed is None:
        return RunFiles(output or Path("runs") / config.stem)
    files = RunFiles(resumed)
    own = config.resolve() == files.config.resolve()  # which may have been moved since
    if not own and output is not None and output.resolve() != resumed.resolve():
        raise ConfigError(
            "two directories",
            where="output",
            value=output,
            rule=f"--resume goes on in {resumed}",
            todo="leave output out",
        )
    return files
