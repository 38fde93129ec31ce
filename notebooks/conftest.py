"""What pytest needs to run the notebooks through nbval: an environment for the kernels, and a tolerance for numbers.

nbval runs every cell and compares its outputs with the stored ones, character by character. That is too strict for
measured numbers: CPUs differ in the order in which they add, so in the last bits, and a printed digit may change. So:

- Numbers with a decimal point and digits after it, or with an exponent, agree if they differ by at most a thousandth
  of the larger one, or by at most one unit of the last digit that is stored. Thousands separators are understood.
- Everything else must be the same: words, whole numbers (codes, counts, bytes, also `25 %` and torch's `127.`),
  version numbers, `nan`, `inf`. A number and its negative therefore agree only if both print as about zero.
- Only where a number got wider or narrower may the spaces differ that line up a table: then any run of them counts as
  one, and those next to a number as none.

An output that differs from the stored one only so far is replaced by it before nbval compares.
"""

import functools
import os
import re
from collections import defaultdict
from decimal import Decimal

from nbval.plugin import IPyNbCell

collect_ignore = ["solutions"]  # tests/test_checks.py runs them

# What kernels find in their environment, as in build.py: no progress bars, no network, no GPU.
ENVIRONMENT = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

RELATIVE_TOLERANCE = Decimal("1e-3")
# 1.5, -0.25, 1,234.5, 2.5e-07, 1e-05; but not 127., not the 13.0 of a version 2.13.0, not the digits in a name.
NUMBER = re.compile(
    r"(?<![\w.])([-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+(?:[eE][-+]\d+)?|[eE][-+]\d+))(?!\d|\.\d)", re.ASCII
)
TEXTS = ("text/plain", "text/html", "text/markdown")


def pytest_configure(config):
    """Set what the kernels inherit, and put the tolerance in front of nbval's comparison."""
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two kernels run at once; two threads each would wait for each other
    os.environ.pop("QUANTLIB_MODEL", None)
    if not hasattr(IPyNbCell.compare_outputs, "__wrapped__"):
        IPyNbCell.compare_outputs = tolerant(IPyNbCell.compare_outputs)


def tolerant(compare_outputs):
    """Wrap nbval's comparison: `test` holds the fresh outputs, `ref` the stored ones."""

    @functools.wraps(compare_outputs)
    def compare(self, test, ref, skip_compare=None):
        stored, fresh = texts(ref), texts(test)
        for kind in stored:
            for (_, _, old), (holder, key, new) in zip(stored[kind], fresh[kind], strict=False):
                if agree(old, new):
                    holder[key] = old
        return compare_outputs(self, test, ref, skip_compare)

    return compare


def texts(outputs):
    """The texts by kind, as `(holder, key, text)`. Like nbval: the first of a kind is compared with the first, …"""
    found = defaultdict(list)
    for output in outputs:
        if output["output_type"] == "stream":
            found[output["name"]].append((output, "text", output["text"]))
        for kind, text in output.get("data", {}).items():
            if kind in TEXTS:
                found[kind].append((output["data"], kind, text))
    return found


def agree(stored: str, fresh: str) -> bool:
    """Whether two texts are the same but for numbers that agree, by the rule at the top."""
    old, new = NUMBER.split(stored), NUMBER.split(fresh)  # text, number, text, …, number, text
    if not all(map(close, old[1::2], new[1::2])):
        return False
    if list(map(len, old[1::2])) == list(map(len, new[1::2])):
        return old[::2] == new[::2]
    return list(map(squeeze, old[::2])) == list(map(squeeze, new[::2]))


def close(stored: str, fresh: str) -> bool:
    """Whether two numbers agree. In decimal arithmetic: in binary, 0.13 and 0.12 differ by more than 0.01."""
    a, b = (Decimal(number.replace(",", "").replace("−", "-")) for number in (stored, fresh))
    last_digit = Decimal(1).scaleb(a.as_tuple().exponent)
    return abs(a - b) <= max(RELATIVE_TOLERANCE * max(abs(a), abs(b)), last_digit)


def squeeze(text: str) -> str:
    """The text between two numbers, without the spaces that line up a table."""
    return re.sub(" +", " ", text).strip(" ")
