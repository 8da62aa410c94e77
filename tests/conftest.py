"""Before torch is imported, here and in every process that tests start."""

import os

# tests' tensors are small: a second thread saves nothing, and while it waits it spins on a core that a worker needs
os.environ["OMP_NUM_THREADS"] = "1"
