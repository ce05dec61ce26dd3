"""Does a run of `memkit reproduce` that is killed again and again end in the same records? kill -9 of the whole run at random moments, resumed each time; compared with a run left alone."""
import argparse, json, os, random, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

from record import RESULTS, add_line

from memkit.core import InputError


def run(profile, jobs, home, figures, seconds=None):
    "Run until the end, or until it is killed; whether it has ended."
    env = os.environ | dict(MEMKIT_HOME=str(home/'cache'), MEMKIT_FIGURES=str(figures), MEMKIT_PROGRESS='0')
    process = subprocess.Popen([sys.executable, '-m', 'memkit', 'reproduce', '--profile', profile, '--jobs', str(jobs)], env=env, start_new_session=True)
    try: code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL) # its children notice by themselves
        process.wait()
        return False
    if code: raise SystemExit(f'memkit reproduce ended with code {code}')
    return True


def records(home, figures, profile):
    "What a run has left: the summary of every step, and every figure's numbers, without dates and durations."
    def plain(x):
        if isinstance(x, dict): return {k: plain(v) for k, v in x.items() if k not in ('provenance', 'seconds', 'training_seconds')}
        return [plain(v) for v in x] if isinstance(x, list) else x
    read = lambda p: plain(json.loads(p.read_text(encoding='utf-8')))
    steps = {p.parent.name: read(p)['summary'] for p in (home/'cache'/'steps').glob('*/done.json') if not p.parent.name.startswith('draw_figures')}
    return steps, {p.name: read(p) for p in sorted((figures/profile).glob('*.json'))}, {p.name: p.read_bytes() for p in sorted((figures/profile).glob('*.csv'))}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--profile', default='smoke')
    parser.add_argument('--kills', type=int, default=10)
    parser.add_argument('--every', type=float, nargs=2, default=(15., 60.), help='seconds between two kills, from and to')
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--reference', type=Path, nargs=2, metavar=('HOME', 'FIGURES'), help='cache and figures of a run of the same code that was left alone; without it one is made')
    o = parser.parse_args()
    work, rng = Path(tempfile.mkdtemp(prefix='memkit-kills-')), random.Random(o.seed)
    try:
        if o.reference:
            (work/'alone').mkdir()
            (work/'alone'/'cache').symlink_to(o.reference[0].resolve())
            (work/'alone'/'figures').symlink_to(o.reference[1].resolve())
        else: run(o.profile, o.jobs, work/'alone', work/'alone'/'figures')
        began, ended, kills = time.monotonic(), False, []
        while not ended:
            left = rng.uniform(*o.every) if len(kills) < o.kills else None
            ended = run(o.profile, o.jobs, work/'killed', work/'killed'/'figures', left)
            if not ended:
                kills.append(round(left, 1))
                print(f'kill {len(kills)} after {left:.0f} s', flush=True)
        a, b = (records(work/k, work/k/'figures', o.profile) for k in ('alone', 'killed'))
        names = ('steps', 'figures', 'tables')
        differ = {n: sorted(k for k in {*x, *y} if x.get(k) != y.get(k)) for n, x, y in zip(names, a, b)}
        result = dict(profile=o.profile, kills=kills, seconds=round(time.monotonic() - began), compared={n: len(x) for n, x in zip(names, a)}, differ=differ)
        print(json.dumps(result, indent=1))
        add_line(RESULTS, 'kills', **result)
        if any(differ.values()) or not all(result['compared'].values()): raise SystemExit('the records differ')
    finally: shutil.rmtree(work, ignore_errors=True)


if __name__ == '__main__':
    try: main()
    except InputError as e: sys.exit(f'{e}')
