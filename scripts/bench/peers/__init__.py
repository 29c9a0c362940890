"""Other methods of pruning, written from their papers, to be measured in the same harness.

A peer is evidence and no part of the package. It chooses the units to keep, and may change the
weights of the pruned model as its paper does. All else is that of the package: compaction, the
count of MACs and the constraint, evaluation, and, for `-refitted` variants, the least-squares fit.

wanda-sp   Wanda for whole units, as in the FLAP paper          `scripts.bench.peers.wanda_sp`
flap       An et al. 2023, arXiv 2312.11983                     `scripts.bench.peers.flap`
kprune     Park et al. 2024, arXiv 2308.03449                   `scripts.bench.peers.kprune`
"""
