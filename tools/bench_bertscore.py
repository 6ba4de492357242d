"""Time `text_scores` against the package bert_score on the same pairs of texts, with the offline encoder.

    python tools/bench_bertscore.py [--pairs 1000] [--rounds 5] [--threads 1] [--long 0]

Both keep their model loaded and take turns; what is printed is the ratio of their times, minimum, median and maximum over the rounds. Processor time is
counted, so that other programs on the machine disturb little. The pairs are museum captions and reasoning, each truth with two answers; --long adds so
many pairs of over 512 tokens, as an answer without an end gives. It stops when the scores differ by more than 1e-5 in more than 2 of 100 pairs: a few do, since
the package lets padding count when all cosines of a token are negative (lesson 13b, "What goes wrong").
"""
import argparse
import statistics
import time

import numpy as np
import torch
from bert_score import BERTScorer

from vlmcourse.similarity import load_encoder, museum_texts, offline_encoder, text_scores
from vlmcourse.vlm import quiet_transformers


def timed(job):
    "(result, processor seconds)"
    start = time.process_time()
    result = job()
    return result, time.process_time() - start


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pairs", type=int, default=1000)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--long", type=int, default=0)
    a = p.parse_args()
    if min(a.pairs, a.rounds, a.threads) < 1 or not 0 <= a.long <= a.pairs:
        p.error("--pairs, --rounds and --threads must be at least 1, and --long at most --pairs.")
    torch.set_num_threads(a.threads)
    truths = museum_texts((a.pairs + 1) // 2, seed=1)
    references, candidates = [t for t in truths for _ in range(2)][:a.pairs], museum_texts(a.pairs, seed=2)
    for i in range(a.long):
        candidates[i] = " ".join(candidates[i:] + candidates[:i])[:6000]
    encoder = load_encoder(device="cpu")
    with quiet_transformers():
        package = BERTScorer(model_type=str(offline_encoder()), num_layers=encoder.layer, device="cpu")
    ours = lambda: np.array(text_scores(candidates, references, encoder=encoder))
    theirs = lambda: torch.stack(package.score(candidates, references), 1).numpy()
    gaps = np.abs(ours() - theirs()).max(1)      # also warms up
    other = int((gaps >= 1e-5).sum())
    assert other <= a.pairs / 50, f"the scores of {other} pairs differ, by up to {gaps.max():.1e}"
    seconds = [(timed(theirs)[1], timed(ours)[1]) for _ in range(a.rounds)]
    ratios = [slow / fast for slow, fast in seconds]
    long = f", {a.long} of them very long" if a.long else ""
    print(f"{a.pairs} pairs{long}, {len(set(candidates + references))} different texts, {a.rounds} rounds in turn, {a.threads} thread(s), processor time")
    for name, column in zip(("bert_score", "text_scores"), zip(*seconds)):
        print(f"  {name:12} {min(column):6.2f} s  {statistics.median(column):6.2f} s  {max(column):6.2f} s  (minimum, median, maximum)")
    print(f"  ratio        {min(ratios):6.2f}    {statistics.median(ratios):6.2f}    {max(ratios):6.2f}    (bert_score / text_scores: above 1 is faster)")
    print(f"  largest difference of a score: {gaps[gaps < 1e-5].max():.1e}; {other} pairs where padding counts in the package: up to {gaps.max():.1e}")


if __name__ == "__main__":
    main()
