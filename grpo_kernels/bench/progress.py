"""A bar on stderr where tqdm is installed, lines where it is not."""

import sys

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Progress:
    """``total`` steps; `say` names what is being done."""

    def __init__(self, total=0, quiet=False):
        self.quiet = quiet
        self.bar = None
        if tqdm and not quiet:
            layout = "{percentage:3.0f}%|{bar:24}| {elapsed}<{remaining} {desc}"
            self.bar = tqdm(total=total, file=sys.stderr, leave=False, dynamic_ncols=True, bar_format=layout)

    def say(self, text):
        if self.bar is not None:
            self.bar.set_description_str(text)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def more(self, count):
        """So many steps are to come besides."""
        if self.bar is not None:
            self.bar.total += count
            self.bar.refresh()

    def step(self, count=1):
        if self.bar is not None:
            self.bar.update(count)

    def close(self):
        if self.bar is not None:
            self.bar.close()
