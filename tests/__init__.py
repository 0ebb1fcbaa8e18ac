"""Tests, benchmarks and campaigns of faults."""

import os

# Threads that wait for others of their process sleep: two processes test on two cores, and those that spin keep each other's from
# working. The tests of generation take a fifth of the CPU time. It is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
