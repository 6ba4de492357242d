"""Print how long imports take, each in a fresh Python, the best of three.

    python tools/bench_import.py
"""
import subprocess
import sys

CASES = [   # what is timed, what is imported before the clock starts, the aim in seconds
    ("import vlmcourse", "", 0.2),
    ("import torch", "", None),
    ("from vlmcourse.sft import train", "import torch", 1.0),
]


def seconds(code, before):
    "Best of three; the first run may have to read the files from the disk."
    timed = f"{before}\nimport time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True) for _ in range(3)]
    failed = next((r for r in runs if r.returncode), None)
    if failed:
        raise SystemExit(f"{code}: {failed.stderr.strip().splitlines()[-1]}")
    return min(float(r.stdout) for r in runs)


if __name__ == "__main__":
    for code, before, aim in CASES:
        after = f" after {before}" if before else ""
        print(f"{seconds(code, before):6.3f} s  {code}{after}" + (f"  (aim: under {aim} s)" if aim else ""), flush=True)
