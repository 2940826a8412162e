"""Numbers, pictures and texts for whatever loggers a trainer has."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_numbers(trainer: pl.Trainer, values: dict[str, float]) -> None:
    """Writes numbers that are for the curves alone, at the step that the last training batch was logged at."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=last_step(trainer))


def log_figure(trainer: pl.Trainer, name: str, figure: "Figure") -> None:
    """Shows a picture: in TensorBoard, by `log_image` of a logger that has it (W&B), else as a file of the run."""
    if not trainer.is_global_zero:
        return
    from matplotlib.image import imsave

    pixels = _pixels(figure)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, pixels, last_step(trainer), dataformats="HWC")
        elif hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[pixels], step=last_step(trainer))
        elif logger.save_dir is not None:
            imsave(_file(logger, f"{name}.png"), pixels)


def log_text(trainer: pl.Trainer, name: str, text: str) -> None:
    """Shows a text: in TensorBoard, by `log_text` of a logger that has it (W&B), else as a file of the run."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            block = "\n".join(f"    {line}" for line in text.splitlines())  # as it is, in Markdown
            logger.experiment.add_text(name, block, last_step(trainer))
        elif hasattr(logger, "log_text"):
            logger.log_text(key=name, columns=["text"], data=[[text]], step=last_step(trainer))
        elif logger.save_dir is not None:
            _file(logger, f"{name}.txt").write_text(text, encoding="utf-8")


class EarlierRows(pl.Callback):
    """Begins the metrics.csv of a run that goes on with the rows of the run before, up to the checkpoint.

    Args:
        file: that run's metrics.csv; nothing is done where there is none.
        step: of the checkpoint. Rows of later ones, and one that was cut, are left out: they come again.
    """

    def __init__(self, file: Path, step: int) -> None:
        self.file, self.step = file, step

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not (trainer.is_global_zero and self.file.is_file()):
            return
        rows = list(csv.DictReader(self.file.read_text().rpartition("\n")[0].splitlines()))
        rows = [row for row in rows if None not in row.values() and row.get("step", "").isdigit()]
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                for row in rows:
                    if (step := int(row["step"])) < self.step:
                        logger.experiment.log_metrics({key: value for key, value in row.items() if value}, step)
                logger.save()


def last_step(trainer: pl.Trainer) -> int:
    """The step under which Lightning logs the last training batch: they count from 0."""
    return max(0, trainer.global_step - 1)


def _file(logger: pl.loggers.Logger, name: str) -> Path:
    folder = getattr(logger, "log_dir", None) or logger.save_dir
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _pixels(figure: "Figure") -> np.ndarray:
    """(height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
