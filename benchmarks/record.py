"""What every benchmark here does with its figures: one line of benchmarks/results.jsonl, under the same names."""
import json, os, shlex, sys
from pathlib import Path

from memkit.core import provenance

RESULTS = Path(__file__).with_name('results.jsonl')


def command():
    "What was typed, with folders and files by their last name."
    return shlex.join(Path(a).name if os.sep in a else a for a in sys.argv)


def load(): return os.getloadavg()[0] if hasattr(os, 'getloadavg') else None


def add_line(path, benchmark, **measured):
    "Append what was measured to the file `path`, with machine, versions, date and command."
    line = provenance(benchmark=benchmark, command=command(), **({'load': load()} | measured))
    with open(path, 'a', encoding='utf-8') as f: f.write(json.dumps(line, ensure_ascii=False) + '\n')
