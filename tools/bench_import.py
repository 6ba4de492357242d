"""Print how long imports take, each in a fresh Python, the best of three.

    python tools/bench_import.py
"""
import subprocess
import sys
import time

CASES = [   # what is timed, what is imported before the clock starts, the aim in seconds
    ("import vlmcourse", "", 0.2),
    ("import torch", "", None),
    ("from vlmcourse.sft import train", "import torch", 1.0),
]


def seconds(code, before):
    "Best of three; the first run may have to read the files from the disk."
    timed = f"{before}\nimport time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    return min(float(python(timed)) for _ in range(3))


def python(code):
    "What `code` prints in a fresh Python."
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"{code}: {ran.stderr.strip().splitlines()[-1]}")
    return ran.stdout


def whole(code):
    "Seconds of a whole Python process that runs `code`, best of three."
    def once():
        start = time.perf_counter()
        python(code)
        return time.perf_counter() - start
    return min(once() for _ in range(3))


if __name__ == "__main__":
    for code, before, aim in CASES:
        after = f" after {before}" if before else ""
        print(f"{seconds(code, before):6.3f} s  {code}{after}" + (f"  (aim: under {aim} s)" if aim else ""), flush=True)
    print(f"{whole('import vlmcourse'):6.3f} s  python -c 'import vlmcourse', start and end of Python included "
          f"({whole('pass'):.3f} s of it Python's own)")
