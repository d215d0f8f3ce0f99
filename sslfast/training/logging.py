"""What a run says while it trains: a progress bar, ``metrics.jsonl`` and TensorBoard."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from sslfast.training import files


class RunLog:
    """Write the scalars of a run to ``RUN/metrics.jsonl`` and TensorBoard, and show progress.

    One line of ``metrics.jsonl`` is one logged step: ``{"step": 120, "epoch": 2, "loss": 4.2, …}``. ``position()``
    belongs into each checkpoint; handing it back as ``resume_at`` cuts off what was logged after that checkpoint, so
    that a resumed run has every step once; of a file that has become shorter, whole lines are kept. Without a terminal,
    a line every ten seconds replaces the bar.
    """

    def __init__(self, run: Path, total_steps: int, first_step: int = 0, resume_at: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        path = run / "metrics.jsonl"
        _cut(path, resume_at)
        self.file = path.open("ab")
        self.tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=first_step or None)
        self.total_steps, self.first_step = total_steps, first_step
        self.start = self.last_line = time.monotonic()
        self.samples = 0
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=None, dynamic_ncols=True)

    def progress(self, samples: int) -> None:
        """Count one finished step of so many samples."""
        self.samples += samples
        self.bar.update()

    def scalars(self, step: int, epoch: int, **values: float) -> None:
        """Log named values for ``step``, the number of steps finished."""
        rate = self.samples / (time.monotonic() - self.start)
        record = {"step": step, "epoch": epoch, **values, "samples_per_second": round(rate, 1)}
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()
        for name, value in {**values, "samples_per_second": rate}.items():
            self.tensorboard.add_scalar(name, value, step)
        numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items() if name != "lr")
        self.bar.set_postfix_str(f"epoch {epoch}, {numbers}, {rate:,.0f} samples/s", refresh=False)
        if self.bar.disable and (time.monotonic() - self.last_line > 10 or step == self.total_steps):
            self.last_line = time.monotonic()
            left = (self.last_line - self.start) * (self.total_steps - step) / max(1, step - self.first_step)
            print(
                f"step {step}/{self.total_steps}, epoch {epoch}, {numbers}, "
                f"{rate:,.0f} samples/s, {left / 60:.1f} min left",
                flush=True,
            )

    def position(self) -> int:
        """Return the length of ``metrics.jsonl`` in bytes, after making sure that all of it is on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def say(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        self.tensorboard.close()


def read(path: Path) -> list[dict]:
    """Return the lines of a ``metrics.jsonl``; none for what is damaged, such as a last line that is half written."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and {"step", "epoch", "loss"} <= line.keys():
                lines.append(line)
    return lines


def _cut(path: Path, length: int) -> None:
    """Keep the first ``length`` bytes of a file of lines, in a new file: whoever else holds the old one keeps it."""
    content = path.read_bytes() if path.exists() else b""
    kept = content[: max(0, length)]
    kept = kept[: kept.rfind(b"\n") + 1]
    if len(kept) < length:
        print(f"{path} is shorter than when the checkpoint was written: lines of earlier steps are missing", flush=True)
    with files.replacing(path) as file:
        file.write(kept)


class NoLog(RunLog):
    """The log of the ranks that write nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def progress(self, samples: int) -> None:
        pass

    def scalars(self, step: int, epoch: int, **values: float) -> None:
        pass

    def position(self) -> int:
        return 0

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass
