"""What a run writes down as it goes: ``log.csv``, and TensorBoard beside it when wanted."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import MissingExtra

COLUMNS = ("step", "loss", "rate", "grad_norm", "images_per_second")


def summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("tensorboard", "train", "Writing TensorBoard logs") from None
    return SummaryWriter


class Mean:
    """Of the losses since the last row of the log. It stays on the device until it is asked for."""

    def __init__(self, total: float = 0.0, count: int = 0):
        self._total: float | Tensor = total
        self._count = count

    def add(self, loss: Tensor) -> None:
        self._total, self._count = self._total + loss.float(), self._count + 1

    def take(self) -> float:
        mean = float(self._total) / max(1, self._count)
        self._total, self._count = 0.0, 0
        return mean

    def state(self) -> tuple[float, int]:
        return float(self._total), self._count


class Log:
    """``log.csv``, cut back to where a resumed run goes on, and TensorBoard beside it when wanted."""

    def __init__(self, out: Path, first_step: int, tensorboard: bool):
        out.mkdir(parents=True, exist_ok=True)
        path = out / "log.csv"
        rows = []
        if first_step and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= first_step]
        part = path.with_name(".log.csv.part")
        with part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        part.replace(path)
        self.file = path.open("a", newline="", encoding="utf-8")
        self.empty = not rows
        self.board = None
        if tensorboard:
            self.board = summary_writer()(str(out / "tensorboard"), purge_step=first_step + 1)

    def row(self, step: int, loss: float, rate: float, norm: float, speed: float) -> None:
        csv.writer(self.file).writerow([step, f"{loss:.8g}", f"{rate:.6g}", f"{norm:.4g}", f"{speed:.3g}"])
        self.file.flush()
        self.empty = False
        if self.board is not None:
            for name, value in (("loss", loss), ("rate", rate), ("grad_norm", norm), ("images_per_second", speed)):
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        if self.empty:
            Path(self.file.name).unlink(missing_ok=True)
        if self.board is not None:
            self.board.close()
