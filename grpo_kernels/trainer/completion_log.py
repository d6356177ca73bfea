"""Completions and their rewards, for the reader of a run: some in a table on the terminal, all in parquet files."""

import json
import math
import shutil
from pathlib import Path

from accelerate.utils import gather_object

from ..extras import needs

FOLDER = "completions"
_NARROWEST = 60


class CompletionLog:
    """The completions of the last rollout, of all processes. The main process prints and writes."""

    def __init__(self, args, names):
        with needs("train", "log_completions"):
            import pyarrow  # noqa: F401
        self.folder, self.main = Path(args.output_dir) / FOLDER, args.should_save
        self.most, self.names = args.num_completions_to_print, names
        self._texts, self._rows, self._shown = [], [], False

    def gather(self, accelerator, prompts, completions):
        own = list(zip(map(_plain, prompts), map(_plain, completions), strict=True))
        self._texts = gather_object(own) if accelerator.num_processes > 1 else own

    def keep(self, step, order, rewards, advantages):
        """``order``: of the gathered texts; rewards [B, K] and advantages [B] are in that order already."""
        self._rows, self._shown = [], False
        for i, values, advantage in zip(order, rewards.tolist(), advantages.tolist(), strict=True):
            prompt, completion = self._texts[i]
            scores = {name: None if math.isnan(v) else v for name, v in zip(self.names, values, strict=True)}
            self._rows.append({**scores, "step": step, "prompt": prompt, "completion": completion, "advantage": advantage})

    def show(self):
        """Once per rollout, when the run logs."""
        if self._shown or not self._rows or not self.main:
            return
        self._shown = True
        for line in table(self._rows[: self.most], self.names):
            print(line)
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f"completions_{self._rows[0]['step']:06d}.parquet"
        pq.write_table(pa.Table.from_pylist(self._rows), new)


def table(rows, names):
    """Lines: prompt and completion on one line each row, cut to the terminal, without the control characters that are in them."""
    if not rows:
        return
    width = max(_NARROWEST, shutil.get_terminal_size().columns - 10 * (len(names) + 1) - 4)
    left = width // 3
    yield f"step {rows[0]['step']}"
    yield f"  {'prompt':{left}} {'completion':{width - left}}" + "".join(f"{name[-9:]:>10}" for name in (*names, "advantage"))
    for row in rows:
        cells = "".join(f"{_number(row[name]):>10}" for name in (*names, "advantage"))
        yield f"  {_cut(row['prompt'], left)} {_cut(row['completion'], width - left)}{cells}"


def _number(value):
    return "-" if value is None else f"{value:.3g}"


def _cut(text, width):
    text = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    return f"{text if len(text) <= width else text[: width - 3] + '...':{width}}"


def _plain(text):
    """A string as it is; messages as JSON."""
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
