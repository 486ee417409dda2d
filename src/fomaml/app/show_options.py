"""The options of `fomaml data`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fomaml.app.data_options import DATA_ROOT, SOURCE, DataOptions, TaskOptions
from fomaml.app.group_options import GroupOptions
from fomaml.app.parser import group, option, positional


@dataclass(frozen=True)
class ShowOptions:
    """Show what a source holds: tasks, sizes, classes, examples, what would be left out, and which settings fit.

    Of a table or of arrays without --task it lists the columns. Ends with a line that trains on the source.

    Example: fomaml data folder:my/photos --image-size 84 84 --rgb --out out/photos
    Example: fomaml data table:my/machines.csv
    Example: fomaml data table:my/machines.csv --task machine --target wear --order hour
    """

    source: str = positional(SOURCE, "", metavar="SOURCE")
    ways: int | None = option("N, the classes of a task, as in `fomaml train`")
    shots: int | None = option("K, the support examples, as in `fomaml train`")
    data_root: Path | None = option(DATA_ROOT)
    out: Path | None = option(
        "the folder to write data.json, data.txt and a picture to: a sheet of images, or a plot of series "
        "(pip install 'fomaml[plots]'); default: none"
    )
    json: bool = option("print one JSON object instead of text", False)
    data: DataOptions = group(DataOptions)
    rows: GroupOptions = group(GroupOptions)
    tasks: TaskOptions = group(TaskOptions)
