"""Peak memory of contrastive separation (Eq. 9-10), forward and backward, for growing numbers of tokens.

    python research/benchmarks/separation_memory.py --tokens 1024 4096 16384

Every size runs in a process of its own, since the peak memory of a process never falls. Linux only: elsewhere the unit
of `ru_maxrss` differs.
"""

import argparse
import math
import multiprocessing
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor

MIB = 2**20


def measure(tokens: int, classes: int) -> tuple[float, float]:
    """Peak memory above that of the loaded library, MiB, and CPU seconds; one image, all its tokens in Omega."""
    # Imported here: a process starts with the peak of its parent, which therefore has to stay small.
    import torch

    from cosa_hf.objective.separation import contrastive_separation_loss

    def step(side: int) -> None:
        cam_logits = torch.randn(1, classes, side, side, requires_grad=True)
        labels = torch.randint(0, 4, (1, side, side))
        loss = contrastive_separation_loss(cam_logits, labels, torch.ones(1, side, side, dtype=torch.bool))
        loss.backward()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    step(8)  # loads what the first call loads
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    step(math.isqrt(tokens))
    seconds = time.process_time() - start
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / MIB, seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384], help="square numbers")
    parser.add_argument("--classes", type=int, default=20)
    args = parser.parse_args(arguments)
    for tokens in args.tokens:
        if tokens < 4 or math.isqrt(tokens) ** 2 != tokens:
            parser.error(
                f"--tokens: the map of tokens is square here, and {tokens} is not a square number of at least 4"
            )

    # Freed tensors go back to the system at once; glibc would keep those up to 32 MiB, and count them.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    print("| tokens | peak, MiB | KiB a token | CPU seconds | one matrix of all pairs, MiB |")
    print("|---|---|---|---|---|")
    for tokens in args.tokens:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            peak, seconds = process.submit(measure, tokens, args.classes).result()
        pairs = 4 * tokens**2 / MIB
        print(f"| {tokens:,} | {peak:.0f} | {1024 * peak / tokens:.0f} | {seconds:.1f} | {pairs:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
