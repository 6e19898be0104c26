"""What the experiments on the paper's claims share: policy, statistics, curves, pages."""
